"""The step size of an optimizer, for the proximal map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..groups.grouping import working_dtype
from .chunks import Slicer

__all__ = ["Step", "adaptive", "is_scalar", "on_device_of", "quotient", "same_number"]


@dataclass(slots=True, eq=False)
class Step:
    """The step that an optimizer takes for a unit gradient: `numerator`, or `numerator / (sqrt(moment) + eps)`.

    Attributes:
        numerator: a number, a 0-dim tensor, or a tensor of the parameter's shape; with a moment, a tensor.
        max_change: the largest change of an element in one step, for optimizers that normalize their steps; else None.
        no_gradient_yet: whether each element has had no gradient yet, if the optimizer's state says so; else None.
        moment: the second moment, of the parameter's shape; its root is computed only when `size` is read.
        eps: with a moment: 0-dim or of the parameter's shape, not 0.
    """

    numerator: float | Tensor
    max_change: float | Tensor | None = None
    no_gradient_yet: Tensor | None = None
    moment: Tensor | None = None
    eps: Tensor | None = None

    @property
    def size(self) -> float | Tensor:
        """The step: a number, a 0-dim tensor, or a tensor of the parameter's shape."""
        if self.moment is None:
            return self.numerator
        return torch.div(self.numerator, self._root().add_(self.eps))  # type: ignore[arg-type]

    def _root(self, out: Tensor | None = None) -> Tensor:
        moment: Any = self.moment  # in half precision eps would be 0
        return torch.sqrt(moment.to(working_dtype(moment.dtype)), out=out)

    def size_into(self, out: Tensor | None) -> Tensor:
        """`size` of a step that differs by element, in the memory of `out`, or in new memory if it is None."""
        if self.moment is None:
            return torch.add(self.numerator, 0, out=out)
        root = self._root(out).add_(self.eps)  # type: ignore[arg-type]
        return torch.div(self.numerator, root, out=root)

    @property
    def elements(self) -> Tensor | None:
        """The part that differs by element: the moment, or the step itself; None for a number."""
        return self.numerator if self.moment is None and isinstance(self.numerator, Tensor) else self.moment

    @property
    def by_element(self) -> bool:
        """Whether each element has its own step."""
        return self.elements is not None and self.elements.ndim > 0

    @property
    def unseen(self) -> Tensor | None:
        """Whether each element has had no gradient yet; None if that is not known."""
        return self.no_gradient_yet if self.moment is None else self.moment == 0

    def scaled(self, elements: Tensor, factor: float | Tensor) -> Step:
        """The step with other `elements`, times a factor."""
        if self.moment is None:
            return replace(self, numerator=elements * factor)
        return replace(self, numerator=self.numerator * factor, moment=elements)

    def sliced(self, take: Slicer) -> Step:
        """The step for the slice of the parameter that `take` returns."""
        numerator, max_change = take(self.numerator), take(self.max_change)
        if self.moment is not None:
            moment, eps = take(self.moment), take(self.eps)
            return replace(self, numerator=numerator, max_change=max_change, moment=moment, eps=eps)
        return replace(self, numerator=numerator, max_change=max_change, no_gradient_yet=take(self.no_gradient_yet))


def adaptive(steps: Sequence[Step]) -> tuple[list[Tensor], Tensor, Tensor, float | Tensor] | None:
    """The moments, the numerators and the eps of steps that all have a moment, and their `max_change`; else None.

    Numerators or eps are 0-dim if all steps share one tensor; else there is one element for each step.
    """
    moments = [step.moment for step in steps if step.moment is not None]
    if len(moments) < len(steps):
        return None
    numerators, eps = (_stacked([getattr(step, name) for step in steps]) for name in ("numerator", "eps"))
    return moments, numerators, eps, steps[0].max_change  # type: ignore[return-value]


def _stacked(xs: list[Tensor]) -> Tensor:
    return xs[0] if all(x is xs[0] for x in xs) else torch.stack(xs)


def quotient(numerator: Tensor, denominator: float | Tensor) -> Tensor:
    """`numerator / denominator`, and 0 for 0/0 (for instance because lr is 0) and for NaN."""
    return (numerator / denominator).nan_to_num_(0, math.inf, -math.inf)


def on_device_of(like: Tensor, x: float | Tensor) -> float | Tensor:
    """A 0-dim tensor on the device of `like`, without waiting for that device; a number is returned unchanged.

    An lr may be a tensor on the CPU while the weights are on another device, where some operations refuse it.
    """
    if not isinstance(x, Tensor) or x.device == like.device:
        return x
    return x.to(like.device, non_blocking=like.device.type != "cpu")  # a copy to the CPU has to be waited for


def is_scalar(x: float | Tensor) -> bool:
    """Whether it is a number or a 0-dim tensor."""
    return not isinstance(x, Tensor) or x.ndim == 0


def same_number(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two numbers are equal, or two tensors identical; comparing values would synchronize with the device."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
