"""How groups lie in a tensor: slices, blocks, units of a layer, heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .norms import NormGrouping


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


def _check_dim(dim: int, shape: torch.Size) -> None:
    if not -len(shape) <= dim < len(shape):
        raise ValueError(
            f"groups along dimension {dim} of a tensor of shape {tuple(shape)}, which has {len(shape)} dimension(s); "
            "leave it out with `select`, or choose another grouping"
        )


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more, not {value!r}")
