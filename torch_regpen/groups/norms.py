"""Groups whose magnitude is their norm."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .grouping import Grouping, Rebuild, _ratio, largest, working_dtype

LONG = 1 << 14  # elements of which a norm in float32 is taken at once on a CPU; of more it drifts


PART = 1 << 9  # elements of the parts into which a longer one is cut


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
        x, u = self._magnitudes(w)
        return u, lambda magnitude: (x * _ratio(magnitude, u)).reshape(w.shape)

    def _magnitudes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The view of `w`, and the magnitude of each group, broadcastable to it."""
        x = self.view(w)
        return x, self.norm(x) / math.sqrt(self.count(w.shape))

    def scale_(self, w: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        """Give each group of `w` the magnitude `change(u)`, in place; `view(w)` has to be one."""
        x, u = self._magnitudes(w)
        x.mul_(_ratio(change(u), u))

    def spread(self, magnitudes: Tensor, w: Tensor) -> Tensor:
        """One number for each group, as one for each element of `w`."""
        return magnitudes.expand(self.view(w).shape).reshape(w.shape)

    def norm(self, x: Tensor) -> Tensor:
        """The norm of each group of a view, broadcastable to it."""
        dims = self.dims(x.ndim)
        if not dims:
            return x.abs().to(working_dtype(x.dtype))
        if dims[0] == 0 and len(dims) < x.ndim and x.device.type == "cpu" and not _traced():
            return _norm_across(x, dims)
        dtype = None if x.is_complex() else working_dtype(x.dtype)
        if math.prod([x.shape[d] for d in dims]) <= LONG or x.device.type != "cpu":
            norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
            return norm
        for dim in reversed(dims):
            x = _norm_along(x, dim, dtype)
            dtype = None
        return x

    def totals(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """The sum over each group of each of some views of one shape, broadcastable to them."""
        dims = self.dims(xs[0].ndim)
        return tuple(x.sum(dim=dims, keepdim=True) for x in xs) if dims else xs

    def all_known(self, condition: Tensor) -> bool:
        """Whether it holds for all groups, where that can be asked: on a CPU, where nobody waits for the answer."""
        return type(condition) is Tensor and condition.device.type == "cpu" and not _traced() and bool(condition.all())

    def largest(self, x: Tensor) -> Tensor:
        """The largest element of each group of a view, 0 or more, broadcastable to it."""
        dims = self.dims(x.ndim)
        if not dims:
            return x
        return x.amax(dim=dims, keepdim=True) if x.numel() else x.sum(dim=dims, keepdim=True)  # amax of nothing raises

    def size(self, shape: torch.Size) -> int:
        """The number of elements of a group."""
        return max(math.prod(shape) // max(math.prod(self.magnitudes_shape(shape)), 1), 1)

    def count(self, shape: torch.Size) -> int:
        return self.size(shape) if self.scale else 1

    def magnitudes_shape(self, shape: torch.Size) -> torch.Size:
        sizes = list(self.view(torch.empty(shape, device="meta")).shape)
        for dim in self.dims(len(sizes)):
            sizes[dim] = 1
        return torch.Size(sizes)

    def excess(self, w: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
        """The largest norm of `residual` over groups, 0-dim, less `slope * sqrt(count)` where the group of `w` is zero.

        With `residual = -grad - subgradient` and the slope of the penalty at zero, it is the distance to the
        subdifferential.
        """
        u, _ = self.polar(w)
        radius = torch.where(u == 0, slope * math.sqrt(self.count(w.shape)), 0)
        return largest((self.norm(self.view(residual)) - radius).clamp_min(0))


def _traced() -> bool:
    """Whether what is computed may be differentiated, transformed or compiled."""
    transformed: bool = torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed


def _norm_along(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """The norm over a dimension, which is kept; by norms of parts that are short enough for float32 not to drift."""
    size = x.shape[dim]
    norms: Tensor
    if size <= LONG:
        norms = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
        return norms
    parts, rest = divmod(size, PART)
    whole = x.narrow(dim, 0, parts * PART).unflatten(dim, (parts, PART))
    norms = torch.linalg.vector_norm(whole, dim=dim + 1, dtype=dtype)
    if rest:
        norms = torch.cat(
            [norms, torch.linalg.vector_norm(x.narrow(dim, -rest, rest), dim=dim, keepdim=True, dtype=dtype)], dim
        )
    return _norm_along(norms, dim, None)


def _norm_across(x: Tensor, dims: list[int]) -> Tensor:
    """The norm over dim 0 and others, in the order of memory: vector_norm strides through it, and drifts."""
    dtype = working_dtype(x.dtype)
    squares = torch.zeros((1, *x.shape[1:]), dtype=torch.float64, device=x.device)
    for rows in x.split(max(1, (len(x) << 16) // max(x.numel(), 1))):
        squares += rows.abs().to(dtype).square_().sum(0)
    for dim in dims[1:]:
        squares = squares.sum(dim, keepdim=True)
    return squares.sqrt_().to(dtype)
