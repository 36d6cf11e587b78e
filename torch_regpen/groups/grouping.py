"""What a magnitude is: an element's modulus, a group's root mean square, a singular value."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rebuild = Callable[[Tensor], Tensor]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype in which magnitudes are computed: float64 for double precision, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


class Grouping(ABC):
    """How the elements of a tensor form groups."""

    @abstractmethod
    def polar(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        """The magnitudes `u` of the groups of `w`, and the map from new magnitudes to a tensor with the old directions.

        The directions of a zero group are zero: whatever its new magnitude, it stays zero.
        """

    def count(self, shape: torch.Size) -> int:
        """How often a group counts: its number of elements, or once."""
        return 1

    def check(self, shape: torch.Size) -> None:  # noqa: B027  most fit every shape
        """Raise `ValueError` where a tensor of this shape cannot be grouped so."""

    @abstractmethod
    def magnitudes_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the magnitudes of a tensor of this shape."""

    def separates(self, dim: int, ndim: int) -> bool:
        """Whether each slice of a tensor along a dimension holds whole groups."""
        return False


@dataclass(frozen=True)
class Elements(Grouping):
    """Each element is a group of its own; its magnitude is its modulus."""

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
        """One number for each group, as one for each element of `w`."""
        return magnitudes


def largest(x: Tensor) -> Tensor:
    """The largest of all elements, 0-dim; 0 where there are none, as on ranks that hold nothing of a tensor."""
    return x.max() if x.numel() else x.new_zeros(())


def _ratio(magnitude: Tensor, u: Tensor) -> Tensor:
    """`magnitude / u`, and 0 where `u` is 0: a zero group has no direction. NaN stays NaN."""
    return magnitude / u.masked_fill(u == 0, math.inf)
