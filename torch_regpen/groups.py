"""What a magnitude is: an element's modulus, or the root mean square of a group of elements.

A penalty sees a tensor only through its magnitudes. A grouping takes a tensor apart into magnitudes and directions
(`Grouping.polar`) and can put new magnitudes back along the old directions; nothing else in the package knows how a
group lies in its tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Elements", "Grouping", "Slices", "resolve"]

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

    @abstractmethod
    def count(self, shape: torch.Size) -> int:
        """How often a group counts: its number of elements, or once."""

    def check(self, shape: torch.Size) -> None:  # noqa: B027  most fit every shape
        """Raise `ValueError` where a tensor of this shape cannot be grouped so."""


@dataclass(frozen=True)
class Elements(Grouping):
    """Each element is a group of its own; its magnitude is its modulus."""

    def polar(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        u = w.abs().to(working_dtype(w.dtype))
        if w.is_complex():
            return u, lambda magnitude: w * _ratio(magnitude, u)
        return u, lambda magnitude: torch.copysign(torch.where(u == 0, 0, magnitude), w)

    def count(self, shape: torch.Size) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class NormGrouping(Grouping):
    """Groups whose magnitude is their root mean square, each counted once for each of its elements.

    Args:
        scale: False takes the norm in place of the root mean square and counts each group once.
    """

    scale: bool = True

    @abstractmethod
    def view(self, w: Tensor) -> Tensor:
        """`w` in a shape in which the groups lie along whole dimensions."""

    @abstractmethod
    def dims(self, ndim: int) -> list[int]:
        """The dimensions of that view, of `ndim` dimensions, that run inside a group."""

    def polar(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        x = self.view(w)
        u = self.norm(x) / math.sqrt(self.count(w.shape))
        return u, lambda magnitude: (x * _ratio(magnitude, u)).reshape(w.shape)

    def norm(self, x: Tensor) -> Tensor:
        """The norm of each group of a view, broadcastable to it."""
        dims = self.dims(x.ndim)
        if not dims:
            return x.abs().to(working_dtype(x.dtype))
        dtype = None if x.is_complex() else working_dtype(x.dtype)
        norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
        return norm

    def count(self, shape: torch.Size) -> int:
        return self.size(shape) if self.scale else 1

    @abstractmethod
    def size(self, shape: torch.Size) -> int:
        """The number of elements of a group."""


@dataclass(frozen=True)
class Slices(NormGrouping):
    """One group for each index along a dimension: a row, a column, a filter."""

    dim: int

    def view(self, w: Tensor) -> Tensor:
        return w

    def dims(self, ndim: int) -> list[int]:
        return [d for d in range(ndim) if d != self.dim % ndim]

    def size(self, shape: torch.Size) -> int:
        return math.prod(shape) // shape[self.dim] if shape[self.dim] else 1

    def check(self, shape: torch.Size) -> None:
        if not -len(shape) <= self.dim < len(shape):
            raise ValueError(
                f"groups along dimension {self.dim} of a tensor of shape {tuple(shape)}, which has "
                f"{len(shape)} dimension(s); leave it out with `select`, or choose another grouping"
            )


def _ratio(magnitude: Tensor, u: Tensor) -> Tensor:
    """`magnitude / u`, and 0 where `u` is 0: a zero group has no direction. NaN stays NaN."""
    return magnitude / u.masked_fill(u == 0, math.inf)


def resolve(groups: str | int | Grouping | None, unit_dims: tuple[int, int] = (0, 1), scale: bool = True) -> Grouping:
    """The grouping that a user's `groups` means for a tensor whose output and input units lie along `unit_dims`.

    Raises:
        ValueError: a name that is none of "output" and "input".
        TypeError: anything but None, a name, an int or a `Grouping`.
    """
    if groups is None:
        return Elements()
    if isinstance(groups, Grouping):
        return groups
    if isinstance(groups, int) and not isinstance(groups, bool):
        return Slices(groups, scale=scale)
    if isinstance(groups, str):
        if groups == "output":
            return Slices(unit_dims[0], scale=scale)
        if groups == "input":
            return Slices(unit_dims[1], scale=scale)
        raise ValueError(f"groups={groups!r}: the names are 'output' and 'input'; an int names a dimension")
    raise TypeError(f"groups must be None, 'output', 'input', an int or a Grouping, not {groups!r}")
