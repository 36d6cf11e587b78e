"""Groupings whose magnitude is a norm or a root mean square."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .grouping import Grouping, Rebuild, _ratio, largest, working_dtype

LONG = 1 << 14  # on a CPU, float32 norms over more elements than this accumulate too much rounding error
PART = 1 << 9  # longer norms are computed from norms of parts with this many elements


@dataclass(frozen=True, kw_only=True)
class NormGrouping(Grouping):
    """Groups with magnitude `||w_g|| / sqrt(n_g)`, each weighted by its size `n_g`; the base of all groups of elements.

    Args:
        scale: if False, the magnitude is the norm `||w_g||` and each group has weight 1.

    Example:
        >>> import torch
        >>> from torch_regpen.groups import NormGrouping, Slices
        >>> rows = Slices(0)
        >>> isinstance(rows, NormGrouping), rows.count(torch.Size([2, 5]))
        (True, 5)
    """

    scale: bool = True

    @abstractmethod
    def view(self, w: Tensor) -> Tensor:
        """Reshape `w` so that each group spans whole dimensions."""

    @abstractmethod
    def dims(self, ndim: int) -> list[int]:
        """The dimensions of the view that run inside a group.

        Args:
            ndim: the number of dimensions of the view.
        """

    def polar(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        x, u = self._magnitudes(w)
        return u, lambda magnitude: (x * _ratio(magnitude, u)).reshape(w.shape)

    def _magnitudes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the view of `w` and the magnitude of each group, which broadcasts to the view."""
        x = self.view(w)
        return x, self.norm(x) / math.sqrt(self.count(w.shape))

    def scale_(self, w: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        """Change the magnitude of each group from `u` to `change(u)`, in place. `view(w)` must not copy."""
        x, u = self._magnitudes(w)
        x.mul_(_ratio(change(u), u))

    def spread(self, magnitudes: Tensor, w: Tensor) -> Tensor:
        """Expand one number per group to one per element of `w`."""
        return magnitudes.expand(self.view(w).shape).reshape(w.shape)

    def norm(self, x: Tensor) -> Tensor:
        """The norm of each group of a view `x`; broadcasts to it."""
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
        """The sum over each group, for several views of the same shape; each result broadcasts to its view."""
        dims = self.dims(xs[0].ndim)
        return tuple(x.sum(dim=dims, keepdim=True) for x in xs) if dims else xs

    def all_known(self, condition: Tensor) -> bool:
        """Whether `condition` is known to hold for all groups; False on other devices, to avoid synchronization."""
        return type(condition) is Tensor and condition.device.type == "cpu" and not _traced() and bool(condition.all())

    def largest(self, x: Tensor) -> Tensor:
        """The largest element of each group of a non-negative view; broadcasts to it."""
        dims = self.dims(x.ndim)
        if not dims:
            return x
        # amax raises for empty tensors
        return x.amax(dim=dims, keepdim=True) if x.numel() else x.sum(dim=dims, keepdim=True)

    def size(self, shape: torch.Size) -> int:
        """The number of elements in a group."""
        return max(math.prod(shape) // max(math.prod(self.magnitudes_shape(shape)), 1), 1)

    def count(self, shape: torch.Size) -> int:
        return self.size(shape) if self.scale else 1

    def row_length(self, shape: torch.Size) -> int | None:
        """The size of a group if the groups are the rows of a reshaped contiguous tensor; None if they are not."""
        w = torch.empty(shape, device="meta")
        x = self.view(w)
        dims = self.dims(x.ndim)
        in_order = x.is_contiguous() and torch._C._is_alias_of(x, w)  # type: ignore[attr-defined]
        if not in_order or sorted(dims) != list(range(x.ndim - len(dims), x.ndim)):
            return None
        return math.prod(x.shape[dim] for dim in dims)

    def magnitudes_shape(self, shape: torch.Size) -> torch.Size:
        sizes = list(self.view(torch.empty(shape, device="meta")).shape)
        for dim in self.dims(len(sizes)):
            sizes[dim] = 1
        return torch.Size(sizes)

    def excess(self, w: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
        """`max_g max(||residual_g|| - r_g, 0)`, 0-dim, where `r_g = slope * sqrt(count)` if `w_g` is zero, else 0.

        With `residual = -grad - subgradient` and `slope` the derivative of the penalty at zero, this is the distance of
        `-grad` to the subdifferential.
        """
        u, _ = self.polar(w)
        radius = torch.where(u == 0, slope * math.sqrt(self.count(w.shape)), 0)
        return largest((self.norm(self.view(residual)) - radius).clamp_min(0))


def _traced() -> bool:
    """Whether the computation may be differentiated, transformed by torch.func or compiled."""
    transformed: bool = torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed


def _norm_along(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """The norm over one dimension, which is kept. Long dimensions are split to limit float32 rounding errors."""
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
    """The norm over dimension 0 and others, in memory order; vector_norm would be slower and less accurate here."""
    dtype = working_dtype(x.dtype)
    squares = torch.zeros((1, *x.shape[1:]), dtype=torch.float64, device=x.device)
    for rows in x.split(max(1, (len(x) << 16) // max(x.numel(), 1))):
        squares += rows.abs().to(dtype).square_().sum(0)
    for dim in dims[1:]:
        squares = squares.sum(dim, keepdim=True)
    return squares.sqrt_().to(dtype)
