"""What operations copy, and what they read back from a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestCopy(TorchDispatchMode):
    """The number of elements of the largest tensor that is made, views of some tensors apart."""

    def __init__(self, *tensors):
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.storages:
                self.largest = max(self.largest, tensor.numel())
        return result


class Reads(TorchDispatchMode):
    """Counts the operations that read a value back from a tensor."""

    NAMES = frozenset({"local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "allclose"})

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.strip("_") in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
