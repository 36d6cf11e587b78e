"""Find the RegularizedOptimizer inside the wrapper of a trainer."""

from __future__ import annotations

from ..optim.wrapper import RegularizedOptimizer

__all__ = ["find_regularized"]


def find_regularized(optimizer: object) -> RegularizedOptimizer | None:
    """The RegularizedOptimizer that `optimizer` is or wraps, as in Lightning and Accelerate; else None."""
    found = None
    while optimizer is not None:
        if isinstance(optimizer, RegularizedOptimizer):
            found = optimizer  # continue, since a LightningOptimizer is also an instance of the class it wraps
        optimizer = getattr(optimizer, "optimizer", None)
    return found
