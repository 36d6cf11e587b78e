"""A smaller copy of a model, without the input features that it does not read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..penalties.coupling import UnitSet, coupled_units
from .folding import zero_units
from .shrink import Cut, Shrinking, copied_model, in_eval_mode

__all__ = ["shrink_inputs"]

INPUTS = "inputs"
CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def shrink_inputs(model: nn.Module, example_inputs: Tensor) -> tuple[nn.Module, list[int]]:
    """A copy of a model that takes only the input features with a nonzero weight, and the indices of these features.

    With `smaller, kept = shrink_inputs(model, x)`, `smaller(x[..., kept])` equals `model(x)` up to rounding. Features
    lie along the last dimension. If convolutions read them, or the model flattens images, they are the channels
    (dimension 1), and the call is `smaller(x[:, kept])`. A penalty with `groups="input"` on the first layer makes
    features unread. At least one feature is kept. To remove units too, call `shrink` first; then more features may be
    unread.

    Args:
        model: a model whose input is one floating-point tensor; it is not changed.
        example_inputs: an example of this tensor.

    Returns:
        The copy, in the mode of the model, and the sorted indices of the features that it takes.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError: the model is not a module, or the example input is not a floating-point tensor.
        ValueError: no feature can be removed, because the model uses its inputs other than by multiplying them with the
            columns of its first layers; see also `shrink`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_regpen.export import shrink_inputs
        >>> model, x = nn.Linear(4, 2), torch.ones(1, 4)
        >>> with torch.no_grad():
        ...     _ = model.weight.index_fill_(1, torch.tensor([0, 2]), 0.0)
        >>> smaller, kept = shrink_inputs(model, x)
        >>> smaller, kept
        (Linear(in_features=2, out_features=2, bias=True), [1, 3])
    """
    if not isinstance(example_inputs, Tensor) or not example_inputs.is_floating_point() or not example_inputs.ndim:
        raise TypeError("example_inputs must be one floating-point tensor; the features of other inputs are not known")
    reasons = []
    kinds = [nn.Linear, CONVOLUTIONS.get(example_inputs.ndim)]
    for kind in filter(None, reversed(kinds) if example_inputs.ndim > 3 else kinds):  # channels of images first
        whole = _Whole(kind, copied_model(model), example_inputs)
        found, left = coupled_units(whole, example_inputs)
        sets = [units for units in found if any(part.module is whole.inputs for part in units.members)]
        if sets:
            with in_eval_mode(whole):
                shrinking = Shrinking(whole, example_inputs)
                shrinking.remove(_cuts(shrinking, whole, sets))
            shrinking.warn_about_what_stays("features that are not read")
            return whole.model, whole.inputs.weight.flatten(1).argmax(1).tolist()
        reasons.append(left[INPUTS])
    raise ValueError(f"no input feature of {type(model).__name__} can be removed: {'; '.join(dict.fromkeys(reasons))}")


def _cuts(shrinking: Shrinking, whole: _Whole, sets: list[UnitSet]) -> list[Cut]:
    """The unread features that seem removable, judging by the modules alone; one feature is kept."""
    cuts: list[Cut] = []
    most = len(whole.inputs.weight) - 1
    for units in sets:
        unread = zero_units(units.readers)[:most]
        alone = all(part.module is whole.inputs or isinstance(part.module, _NormBase) for part in units.members)
        reason = shrinking.obstacle(units) if alone else "other layers write the same units"
        if reason:
            shrinking.name_staying(INPUTS, len(unread), reason)
        elif unread:
            cuts.append([(units, unread)])
            most -= len(unread)
    return cuts


class _Whole(nn.Module):
    """A model after an identity layer, so that the input features become units that this layer writes.

    Args:
        kind: the layer: a Linear, or a convolution of one pixel.
        model: the model.
        x: an input.
    """

    def __init__(self, kind: Any, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        n = x.shape[-1 if kind is nn.Linear else 1]
        self.inputs = kind(n, n, **({} if kind is nn.Linear else {"kernel_size": 1}), bias=False).to(x)
        self.model = model
        with torch.no_grad():
            self.inputs.weight.copy_(torch.eye(n).reshape(self.inputs.weight.shape))

    def forward(self, x: Tensor) -> Any:
        return self.model(self.inputs(x))
