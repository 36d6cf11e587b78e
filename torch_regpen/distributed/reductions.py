"""Sums, maxima and norms over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..groups.grouping import working_dtype
from ..groups.norms import NormGrouping
from .shards import Along, DTensor, Partial, Replicate, sharded_over

try:
    from torch.distributed import ReduceOp
except ImportError:  # a build without torch.distributed
    ReduceOp = None  # type: ignore[assignment,misc]

__all__ = ["AcrossShards", "max_over_ranks", "reduce_shards", "sum_over_ranks", "without"]


def max_over_ranks(values: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the largest of some 0-dim tensors, over all ranks. If one is NaN, the result is NaN.

    Args:
        values: pairs of a value and the parameter it was computed from, on the shard of this rank.
    """
    largest: dict[Along | None, list[Tensor]] = {}
    for value, w in values:
        along = (w.device_mesh, sharded_over(w)) if isinstance(w, DTensor) else None
        largest.setdefault(along, []).append(value)
    tops = []
    for along, found in largest.items():
        top = torch.stack([x.to(found[0]) for x in found]).max()
        if along is not None and along[1]:
            # In some backends a maximum ignores NaN.
            pair = _all_reduce_(torch.stack([top.nan_to_num(torch.inf), top.isnan().to(top)]), along, "MAX")
            top = pair[0].masked_fill(pair[1] > 0, torch.nan)
        tops.append(top)
    return torch.stack([top.to(tops[0]) for top in tops]).max()


def reduce_shards(x: Tensor, like: Tensor, op: str) -> Tensor:
    """The sum (`op="sum"`) or maximum ("max") of `x` over the ranks that hold different shards of `like`."""
    if not isinstance(like, DTensor):
        return x
    placements = [Replicate() if placement.is_replicate() else Partial(op) for placement in like.placements]
    return DTensor.from_local(x, like.device_mesh, placements, run_check=False).full_tensor()


@dataclass(frozen=True, kw_only=True)
class AcrossShards(NormGrouping):
    """The groups of a sharded tensor on the shard of this rank, if each group is divided over several ranks.

    Args:
        grouping: the grouping of the whole tensor.
        shape: the shape of the whole tensor.
        along: the mesh dimensions over which a group is divided.
        norms: the norms of the groups, if they are already known and need no gradient.
        scale: see `NormGrouping`.
    """

    grouping: NormGrouping
    shape: torch.Size
    along: Along
    norms: Tensor | None = field(default=None, compare=False)

    def view(self, w: Tensor) -> Tensor:
        return self.grouping.view(w)

    def dims(self, ndim: int) -> list[int]:
        return self.grouping.dims(ndim)

    def size(self, shape: torch.Size) -> int:
        return self.grouping.size(self.shape)

    def row_length(self, shape: torch.Size) -> int | None:
        return None  # only a part of each group is on this rank

    def norm(self, x: Tensor) -> Tensor:
        if self.norms is not None and not torch.is_grad_enabled():
            return self.norms
        return self.root(_SumOverRanks.apply(self.squares(x), self.along), x.dtype)

    def totals(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return _all_reduce_(torch.stack(super().totals(*xs)), self.along).unbind()

    def largest(self, x: Tensor) -> Tensor:
        return _all_reduce_(super().largest(x), self.along, "MAX")

    def all_known(self, condition: Tensor) -> bool:
        return False  # it may not hold on other ranks, and all ranks must call the next collective

    def squares(self, x: Tensor) -> Tensor:
        """This rank's part of the squared norms, in float64 to avoid overflow."""
        return self.grouping.norm(x).double().square()

    def root(self, squares: Tensor, dtype: torch.dtype) -> Tensor:
        """The norms from their squares. At a norm of 0 the gradient is 0."""
        zero = squares == 0
        return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0).to(working_dtype(dtype))


class _SumOverRanks(torch.autograd.Function):
    """A differentiable sum over ranks. Its backward sums the gradients of all ranks, because each rank uses the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, along: Along) -> Tensor:
        ctx.along = along
        return _all_reduce_(x.clone(), along)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(g, ctx.along), None


def sum_over_ranks(xs: Sequence[tuple[Tensor, Along | None]]) -> list[Tensor]:
    """Sum each tensor over the ranks along its mesh dimensions, in float64, with one collective per dimension."""
    sums = [x.double() for x, _ in xs]
    steps = dict.fromkeys((along[0], dim) for _, along in xs if along is not None for dim in along[1])
    for mesh, dim in steps:
        together = [i for i, (_, along) in enumerate(xs) if along is not None and along[0] == mesh and dim in along[1]]
        flat = _all_reduce_(torch.cat([sums[i].flatten() for i in together]), (mesh, (dim,)))
        for i, x in zip(together, flat.split([sums[i].numel() for i in together]), strict=True):
            sums[i] = x.view_as(sums[i])
    return sums


def _all_reduce_(x: Tensor, along: Along, op: str = "SUM") -> Tensor:
    """Reduce `x` over the ranks along each mesh dimension; in place if `x` is contiguous."""
    x = x.contiguous()
    mesh, dims = along
    for dim in dims:
        dist.all_reduce(x, getattr(ReduceOp, op), group=mesh.get_group(dim))
    return x


def without(along: Along | None, others: Along) -> Along | None:
    """The mesh dimensions in `along` that are not in `others`."""
    return along and (along[0], tuple(dim for dim in along[1] if dim not in others[1]))
