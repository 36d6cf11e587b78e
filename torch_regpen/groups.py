"""What a magnitude is: an element's modulus, a group's root mean square, a singular value.

A penalty sees a tensor only through its magnitudes. A grouping takes a tensor apart into magnitudes and directions
(`Grouping.polar`) and can put new magnitudes back along the old directions; nothing else in the package knows how a
group lies in its tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "Blocks",
    "Elements",
    "Grouping",
    "Groups",
    "Heads",
    "SingularValues",
    "Slices",
    "Units",
    "WholeTensor",
    "resolve",
]

Rebuild = Callable[[Tensor], Tensor]

LONG = 1 << 14  # elements of which a norm in float32 is taken at once on a CPU; of more it drifts
PART = 1 << 9  # elements of the parts into which a longer one is cut


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


@dataclass(frozen=True)
class Slices(NormGrouping):
    """One group for each index along a dimension: a row, a column, a filter."""

    dim: int

    def view(self, w: Tensor) -> Tensor:
        return w

    def dims(self, ndim: int) -> list[int]:
        return [d for d in range(ndim) if d != self.dim % ndim]

    def separates(self, dim: int, ndim: int) -> bool:
        return dim == self.dim % ndim

    def check(self, shape: torch.Size) -> None:
        _check_dim(self.dim, shape)


@dataclass(frozen=True)
class WholeTensor(NormGrouping):
    """The whole tensor is one group."""

    def view(self, w: Tensor) -> Tensor:
        return w

    def dims(self, ndim: int) -> list[int]:
        return list(range(ndim))


@dataclass(frozen=True)
class Blocks(NormGrouping):
    """`k` consecutive elements of the flattened tensor form a group.

    Args:
        k: the size of a block, 1 or more; a tensor with a remainder raises `ValueError`.
        scale: False takes the norm in place of the root mean square and counts each block once.
    """

    k: int

    def __post_init__(self) -> None:
        _check_positive("Blocks(k)", self.k)

    def view(self, w: Tensor) -> Tensor:
        return w.reshape(-1, self.k)

    def dims(self, ndim: int) -> list[int]:
        return [1]

    def check(self, shape: torch.Size) -> None:
        if math.prod(shape) % self.k:
            raise ValueError(
                f"blocks of {self.k} do not divide the {math.prod(shape)} elements of a tensor of shape {tuple(shape)}"
            )


@dataclass(frozen=True)
class Units(NormGrouping):
    """One group for each index along some dimensions of a tensor, once it is viewed in another shape.

    Args:
        shape: the shape of the view.
        kept: its dimensions along which the groups lie; all others run inside a group.
    """

    shape: tuple[int, ...]
    kept: tuple[int, ...]

    def view(self, w: Tensor) -> Tensor:
        return w.reshape(self.shape)

    def dims(self, ndim: int) -> list[int]:
        return [d for d in range(ndim) if d not in self.kept]


@dataclass(frozen=True)
class Heads(NormGrouping):
    """The rows (or columns) of each head of an attention layer are a group: those of q, k and v where they are stacked.

    On a model it means the projections to queries, keys and values, unless `select` says otherwise, and cuts each as
    its layer does: rows of `in_proj_weight`, `qkv` and `q_proj`, columns of the Conv1D of transformers and of an output
    projection that is selected. A projection that queries share (grouped-query attention) has fewer heads.

    Args:
        n: the number of heads, 1 or more; a dimension that it does not divide raises `ValueError`.
        dim: the dimension along which the heads lie; None goes by the layer, and is 0 where there is none. A layer of
            your own whose `qkv` stacks head by head needs it: without, q, k and v are taken to lie one after another.
        scale: False takes the norm in place of the root mean square and counts each head once.
    """

    n: int
    dim: int | None = None

    def __post_init__(self) -> None:
        _check_positive("Heads(n)", self.n)

    def view(self, w: Tensor) -> Tensor:
        view: Tensor = w.unflatten(self.dim or 0, (self.n, -1))
        return view

    def dims(self, ndim: int) -> list[int]:
        dim = self.dim or 0
        return [d for d in range(ndim) if d != dim % (ndim - 1)]

    def check(self, shape: torch.Size) -> None:
        dim = self.dim or 0
        _check_dim(dim, shape)
        if shape[dim] % self.n:
            raise ValueError(f"{self.n} heads do not divide dimension {dim} of a tensor of shape {tuple(shape)}")


@dataclass(frozen=True)
class SingularValues(Grouping):
    """The magnitudes are the singular values of the tensor flattened to dim 0 by the rest, each counted once.

    Each use costs a singular value decomposition, `O(m * n * min(m, n))`: for a square layer of a thousand units about
    a second on a CPU. Singular values up to `eps * max(m, n)` times the largest count as zero: rounding makes them of
    zeros (with the eps of float32 at most: the elements of half types are rounded to ones that are not).
    """

    def polar(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        left, u, right = self._svd(w)
        return u, lambda magnitude: ((left * magnitude) @ right).reshape(w.shape)

    def check(self, shape: torch.Size) -> None:
        if len(shape) < 2:
            raise ValueError(
                f"a tensor of shape {tuple(shape)} has no singular values; leave it out with `select`, or choose "
                "another grouping"
            )

    def magnitudes_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([min(shape[0], math.prod(shape[1:]))])

    def excess(self, w: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
        """As for other groups, in spectral norm."""
        # What the zero singular values can absorb lies across the row and the column space of w; there the nearest
        # point has its singular values cut at the slope. All else of the residual counts, in spectral norm.
        left, u, right = self._svd(w)
        left, right = left * (u > 0), right * (u > 0)[:, None]
        r = residual.flatten(1)
        across = r - left @ (left.mH @ r)
        across = across - (across @ right.mH) @ right
        left, v, right = _decomposed(across)
        absorbed = (left * v.clamp_max(slope)) @ right
        farthest = _decomposed(r - absorbed)[1].amax()
        return torch.where(u.any(), farthest, (v.amax() - slope).clamp_min(0))  # exactly 0 at a zero tensor

    def _svd(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = w.flatten(1)
        left, u, right = _decomposed(x.to(torch.promote_types(x.dtype, working_dtype(x.dtype))))
        rounding = torch.finfo(u.dtype).eps * max(x.shape)
        return left, u.masked_fill(u <= rounding * u.amax(), 0) if u.numel() else u, right


Groups = str | int | Grouping

NAMES = "'output', 'input' and 'tensor'"


def resolve(groups: Groups | None, scale: bool = True) -> Grouping:
    """The grouping that a user's `groups` means for a tensor without a module, or with the layout of a Linear.

    Raises:
        ValueError: an unknown name.
        TypeError: anything but None, a name, an int or a `Grouping`.
    """
    if groups is None:
        return Elements()
    if isinstance(groups, Grouping):
        return groups if scale or not isinstance(groups, NormGrouping) else replace(groups, scale=False)
    if isinstance(groups, int) and not isinstance(groups, bool):
        return Slices(groups, scale=scale)
    if groups == "output":
        return Slices(0, scale=scale)
    if groups == "input":
        return Slices(1, scale=scale)
    if groups == "tensor":
        return WholeTensor(scale=scale)
    if isinstance(groups, str):
        raise ValueError(f"groups={groups!r}: the names are {NAMES}; an int names a dimension")
    raise TypeError(f"groups must be None, one of {NAMES}, an int or a Grouping of torch_regpen.groups, not {groups!r}")


def largest(x: Tensor) -> Tensor:
    """The largest of all elements, 0-dim; 0 where there are none, as on ranks that hold nothing of a tensor."""
    return x.max() if x.numel() else x.new_zeros(())


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


def _ratio(magnitude: Tensor, u: Tensor) -> Tensor:
    """`magnitude / u`, and 0 where `u` is 0: a zero group has no direction. NaN stays NaN."""
    return magnitude / u.masked_fill(u == 0, math.inf)


def _decomposed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition; NaN where `x` is not finite, at which torch.linalg raises."""
    finite = x.isfinite().all()
    left, u, right = torch.linalg.svd(torch.where(finite, x, 0), full_matrices=False)
    one = torch.where(finite, 1.0, math.nan)
    return left * one, u * one, right


def _check_dim(dim: int, shape: torch.Size) -> None:
    if not -len(shape) <= dim < len(shape):
        raise ValueError(
            f"groups along dimension {dim} of a tensor of shape {tuple(shape)}, which has {len(shape)} dimension(s); "
            "leave it out with `select`, or choose another grouping"
        )


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more, not {value!r}")
