"""Where the RegularizedOptimizer is, in what a trainer made of it."""

from __future__ import annotations

from ..optim.wrapper import RegularizedOptimizer

__all__ = ["find_regularized"]


def find_regularized(optimizer: object) -> RegularizedOptimizer | None:
    """The RegularizedOptimizer that `optimizer` is or wraps, as those of Lightning and Accelerate do; else None."""
    found = None
    while optimizer is not None:
        if isinstance(optimizer, RegularizedOptimizer):
            found = optimizer  # go on: a LightningOptimizer says that it is an instance of what it wraps
        optimizer = getattr(optimizer, "optimizer", None)
    return found
