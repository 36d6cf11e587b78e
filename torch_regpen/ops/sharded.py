"""Terms on sharded tensors: each rank works on its shard, as on a plain tensor.

This suffices for functions of single elements. If a group is divided over ranks, its squared norm is summed over those
ranks (`AcrossShards`). If a penalty needs the whole tensor, the tensor is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..distributed.reductions import AcrossShards, sum_over_ranks, without
from ..distributed.shards import Along, DTensor, full_tensor, local, shard_like, sharded_over
from ..groups.grouping import Elements, Grouping
from ..groups.layouts import Slices, WholeTensor
from ..groups.nm import NM
from .terms import Term

__all__ = ["ShardedTerms", "on_local_shards", "total_over_ranks"]


class ShardedTerms:
    """The terms of one tensor, which may be sharded, converted to terms on a plain tensor.

    Args:
        terms: terms that are all on the same tensor.
        whole: if True, gather the tensor on every rank even if the terms do not need it.

    Attributes:
        terms: the terms on the shard of this rank, or on the whole tensor if a term needs it.
        along: the mesh dimensions over which a sum over elements must also be summed; None for a whole tensor.
    """

    def __init__(self, terms: list[Term], whole: bool = False) -> None:
        self.parameter = terms[0].tensor
        self.terms = terms
        self.along: Along | None = None
        self.whole = whole
        w = self.parameter
        if not isinstance(w, DTensor):
            return
        groupings = [_grouping_on_shard(term, w) for term in terms]
        self.whole = whole or None in groupings
        if not self.whole:
            self.along = w.device_mesh, sharded_over(w)
        memo: dict[int, Tensor] = {}
        self.terms = [
            replace(
                term,
                tensor=self._plain(w, memo),
                grouping=grouping if grouping is not None and not self.whole else term.grouping,
                weights=self._plain(term.weights, memo),
                center=self._plain(term.center, memo),
            )
            for term, grouping in zip(terms, groupings, strict=True)
        ]

    def take(self, x: Any) -> Any:
        """Convert a tensor that belongs to the parameter, such as a step for each element, to a plain tensor."""
        if not isinstance(x, Tensor) or not isinstance(self.parameter, DTensor):
            return x
        if x.ndim == 0:
            return full_tensor(x)
        x = shard_like(x, self.parameter)
        return full_tensor(x) if self.whole else local(x)

    def give(self, x: Tensor) -> Tensor:
        """Convert a plain tensor shaped like `terms[0].tensor` to a tensor that is sharded like the parameter."""
        w = self.parameter
        if not isinstance(w, DTensor):
            return x
        if self.whole:
            return shard_like(x, w)
        return DTensor.from_local(x, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride())

    def _plain(self, x: Any, memo: dict[int, Tensor]) -> Any:
        # Terms that share a tensor must still share it afterwards.
        if x is None:
            return None
        if id(x) not in memo:
            memo[id(x)] = full_tensor(x) if self.whole else local(x)
        return memo[id(x)]


def on_local_shards(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Extend a function of terms on a plain tensor to terms on sharded tensors.

    The function must return a tensor of the shape of the plain tensor.
    """

    @wraps(function)
    def of_terms(terms: list[Term], *args: Any) -> Tensor:
        sharded = ShardedTerms(terms)
        return sharded.give(function(sharded.terms, *map(sharded.take, args)))

    return of_terms


@torch.no_grad()
def total_over_ranks(each: Sequence[ShardedTerms], value: Callable[[list[Term]], Tensor]) -> tuple[Tensor, list[Term]]:
    """Sum all terms over all ranks, with one collective for each mesh dimension.

    Args:
        each: the terms of each tensor.
        value: a function that returns the value of some terms on this rank, a 0-dim tensor.

    Returns:
        The sum, a 0-dim tensor; and the terms with the norms of groups across ranks stored, so that their gradients
        need no collective.
    """
    crossing: list[tuple[Term, Any, Along | None]] = []
    others: dict[Along | None, list[Term]] = {}
    for sharded in each:
        for term in sharded.terms:
            if isinstance(term.grouping, AcrossShards):
                crossing.append((term, term.grouping, sharded.along))
            else:
                others.setdefault(sharded.along, []).append(term)
    squares = [(grouping.squares(term.offset(term.tensor)), grouping.along) for term, grouping, _ in crossing]
    reduced = sum_over_ranks([*squares, *((value(terms), along) for along, terms in others.items())])
    found = [term for terms in others.values() for term in terms]
    # Every rank that holds a part of a group now knows the norm of the group; do not sum over those ranks again.
    remaining: dict[Along | None, list[Term]] = {}
    for (term, grouping, along), square in zip(crossing, reduced, strict=False):
        known = replace(term, grouping=replace(grouping, norms=grouping.root(square, term.tensor.dtype)))
        remaining.setdefault(without(along, grouping.along), []).append(known)
        found.append(known)
    sums = reduced[len(crossing) :] + sum_over_ranks([(value(terms), along) for along, terms in remaining.items()])
    return torch.stack(sums).sum(), found


def _grouping_on_shard(term: Term, w: DTensor) -> Grouping | None:
    """The grouping of a term on the shard of this rank; None if the term needs the whole tensor."""
    over = sharded_over(w)
    grouping = term.grouping
    if not over:
        return grouping
    if term.elementwise:
        return Elements()
    if (
        isinstance(grouping, NM)
        or not term.penalty.separable
        or not isinstance(grouping, Elements | Slices | WholeTensor)
    ):
        return None
    if isinstance(grouping, Elements):
        return grouping
    inside = [d % w.ndim for d in grouping.dims(w.ndim)]
    crossing = tuple(i for i in over if w.placements[i].dim % w.ndim in inside)  # type: ignore[attr-defined]
    if not crossing:
        return grouping
    return AcrossShards(grouping=grouping, scale=grouping.scale, shape=w.shape, along=(w.device_mesh, crossing))
