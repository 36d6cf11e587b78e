"""The interface of a grouping, and the simplest one: every element is a group of its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rebuild = Callable[[Tensor], Tensor]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype of magnitudes: float64 for float64 and complex128 tensors, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


class Grouping(ABC):
    """Defines which elements of a tensor form a group, and the magnitude of a group.

    Example:
        >>> import torch
        >>> from torch_regpen.groups import Slices
        >>> u, rebuild = Slices(0).polar(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> rebuild(2 * u)  # twice the magnitudes, in the same directions
        tensor([[6., 8.],
                [0., 0.]])
    """

    @abstractmethod
    def polar(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        """Return the magnitudes of the groups of `w`, and a function from new magnitudes to a tensor like `w`.

        The function keeps the direction of each group. A zero group has direction zero, so it stays zero.
        """

    def count(self, shape: torch.Size) -> int:
        """The factor `n_g` on each group in the penalty: its number of elements, or 1."""
        return 1

    def check(self, shape: torch.Size) -> None:  # noqa: B027  most groupings accept every shape
        """Raise `ValueError` if a tensor of this shape cannot be divided into these groups."""

    @abstractmethod
    def magnitudes_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the magnitudes of a tensor of shape `shape`."""

    def separates(self, dim: int, ndim: int) -> bool:
        """Whether no group crosses from one slice along `dim` of an `ndim`-dimensional tensor to another."""
        return False


@dataclass(frozen=True)
class Elements(Grouping):
    """Each element is a group of its own; its magnitude is `|w|`.

    Example:
        >>> import torch
        >>> from torch_regpen.groups import Elements
        >>> Elements().polar(torch.tensor([1.0, -2.0]))[0]
        tensor([1., 2.])
    """

    def polar(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        u = w.abs().to(working_dtype(w.dtype))
        if w.is_complex():
            return u, lambda magnitude: w * _ratio(magnitude, u)
        return u, lambda magnitude: w.sign() * magnitude.masked_fill(u == 0, 0)

    def magnitudes_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def separates(self, dim: int, ndim: int) -> bool:
        return True

    def spread(self, magnitudes: Tensor, w: Tensor) -> Tensor:
        """Expand one number per group to one per element of `w`."""
        return magnitudes


def largest(x: Tensor) -> Tensor:
    """The largest element, 0-dim; 0 for an empty tensor, such as the shard of a rank that holds no elements."""
    return x.max() if x.numel() else x.new_zeros(())


def _ratio(magnitude: Tensor, u: Tensor) -> Tensor:
    """`magnitude / u`, or 0 where `u` is 0, since a zero group has no direction. NaN stays NaN."""
    return magnitude / u.masked_fill(u == 0, math.inf)
