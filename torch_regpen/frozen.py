"""Zeros that hold: weights that are exactly zero are kept there, while the others are fitted without the penalty."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .dual import GAP, STEPS
from .groups import largest
from .sharding import local, maximum

__all__ = ["FROZEN", "FrozenZeros", "all_zero"]

# In a param_group, so that it travels in the optimizer's state dict: the indices of its parameters whose zeros hold.
FROZEN = "zeros_frozen"

OWN = (GAP, STEPS)  # what the package keeps in the optimizer's state


class FrozenZeros:
    """Where the zeros are that are to stay zero, found in each parameter when they are first needed."""

    def __init__(self) -> None:
        self._masks: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_masks": {}}  # in a copy the same ids may mean other tensors; the zeros are found anew

    def silence(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Take the gradient off the zeros of a parameter, and the first time the optimizer's state too.

        Momentum and moments would otherwise push pruned weights on for ever.
        """
        if id(parameter) not in self._masks:
            zeros = self._masks[id(parameter)] = local(parameter) == 0
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and name not in OWN:
                    local(value).masked_fill_(zeros, 0)
        if parameter.grad is not None and not parameter.grad.is_sparse:
            local(parameter.grad).masked_fill_(self._masks[id(parameter)], 0)

    def hold(self, parameters: Iterable[Tensor]) -> None:
        """Put the zeros back, wherever an update has moved them all the same."""
        for parameter in parameters:
            if id(parameter) in self._masks:
                local(parameter).masked_fill_(self._masks[id(parameter)], 0)

    def thaw(self) -> None:
        """Forget them."""
        self._masks.clear()


def all_zero(parameter: Tensor) -> bool:
    """Whether a parameter is zero everywhere, on every rank; reads it back from the device."""
    return bool(maximum([(largest(local(parameter.detach()).abs()), parameter)]) == 0)
