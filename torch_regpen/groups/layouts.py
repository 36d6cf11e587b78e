"""Groupings of a tensor into slices, blocks, units of a layer, or attention heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils import checked_count
from .norms import NormGrouping


@dataclass(frozen=True)
class Slices(NormGrouping):
    """One group for each index along a dimension: rows, columns, filters.

    Args:
        dim: the dimension; a negative one counts from the end.
        scale: see `NormGrouping`.

    Example:
        >>> import torch
        >>> from torch_regpen.groups import Slices
        >>> Slices(0, scale=False).polar(torch.tensor([[3.0, 4.0], [6.0, 8.0]]))[0]
        tensor([[ 5.],
                [10.]])
    """

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
    """The whole tensor is one group.

    Args:
        scale: see `NormGrouping`.

    Example:
        >>> import torch
        >>> from torch_regpen.groups import WholeTensor
        >>> WholeTensor().polar(torch.full((2, 2), 3.0))[0]
        tensor([[3.]])
    """

    def view(self, w: Tensor) -> Tensor:
        return w

    def dims(self, ndim: int) -> list[int]:
        return list(range(ndim))


@dataclass(frozen=True)
class Blocks(NormGrouping):
    """Each `k` consecutive elements of the flattened tensor form a group.

    Args:
        k: the number of elements in a block, 1 or more.
        scale: see `NormGrouping`.

    Raises:
        ValueError: `k` is not a positive int, or does not divide the number of elements (when used).

    Example:
        >>> import torch
        >>> from torch_regpen.groups import Blocks
        >>> Blocks(2, scale=False).polar(torch.tensor([3.0, 4.0, 0.0, 0.0]))[0]
        tensor([[5.],
                [0.]])
    """

    k: int

    def __post_init__(self) -> None:
        checked_count("Blocks(k)", self.k)

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
    """One group for each combination of indices along chosen dimensions, after the tensor is reshaped.

    Args:
        shape: the new shape.
        kept: the dimensions of the new shape that index the groups; the others run inside a group.
        scale: see `NormGrouping`.

    Example:
        >>> import torch
        >>> from torch_regpen.groups import Units
        >>> gru = Units((3, 8, 4), kept=(1,))  # 3 gates, 8 hidden units, 4 inputs
        >>> gru.magnitudes_shape(torch.Size([24, 4]))
        torch.Size([1, 8, 1])
    """

    shape: tuple[int, ...]
    kept: tuple[int, ...]

    def view(self, w: Tensor) -> Tensor:
        return w.reshape(self.shape)

    def dims(self, ndim: int) -> list[int]:
        return [d for d in range(ndim) if d not in self.kept]


@dataclass(frozen=True)
class Heads(NormGrouping):
    """One group for each head of an attention layer: its rows (or columns), in q, k and v together if they are stacked.

    A penalty on a model with these groups penalizes the projections to queries, keys and values, unless `select` is
    given. It divides each as its layer does: the rows of `in_proj_weight`, `qkv` and `q_proj`; the columns of a Conv1D
    of transformers, and of an output projection if selected. In grouped-query attention the projections to keys and
    values have fewer heads.

    Args:
        n: the number of heads, 1 or more.
        dim: the dimension along which the heads lie. None takes it from the layer, or 0 for a bare tensor. Set it for
            your own layer if its stacked `qkv` is ordered head by head; by default q, k and v follow one another.
        scale: see `NormGrouping`.

    Raises:
        ValueError: `n` is not a positive int, or does not divide the dimension (when used).

    Example:
        >>> import torch
        >>> from torch_regpen.groups import Heads
        >>> Heads(2).polar(torch.tensor([1.0, 1.0, 5.0, 5.0]))[0].flatten()
        tensor([1., 5.])
    """

    n: int
    dim: int | None = None

    def __post_init__(self) -> None:
        checked_count("Heads(n)", self.n)

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


def _check_dim(dim: int, shape: torch.Size) -> None:
    if not -len(shape) <= dim < len(shape):
        raise ValueError(
            f"cannot group along dimension {dim}: the tensor of shape {tuple(shape)} has {len(shape)} dimension(s); "
            "exclude it with `select`, or choose another grouping"
        )
