"""What an operation copies, for tests of memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestCopy(TorchDispatchMode):
    """The number of elements of the largest tensor that is made, views of `w` apart."""

    def __init__(self, w):
        super().__init__()
        self.storage = w.untyped_storage().data_ptr()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.storage:
                self.largest = max(self.largest, tensor.numel())
        return result
