"""Terms on sharded tensors: each rank works on its shard, as a plain tensor.

Functions of single elements need no more than that. The norms of groups that continue on other ranks are summed over
those ranks (`AcrossShards`). A penalty that needs the whole tensor gets it gathered.
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
from .terms import Term

__all__ = ["ShardedTerms", "on_local_shards", "total_over_ranks"]


class ShardedTerms:
    """The terms of one tensor, which may be sharded, on plain tensors.

    Args:
        terms: all on one tensor.
        whole: gather the tensor on every rank, whether the terms need that or not.

    Attributes:
        terms: on the shard of this rank; or on the whole tensor, where a term needs that.
        along: the mesh dimensions over which sums over elements are sums over ranks too; None for a whole tensor.
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
        """A plain tensor of what belongs to the parameter, such as a step for each of its elements."""
        if not isinstance(x, Tensor) or not isinstance(self.parameter, DTensor):
            return x
        if x.ndim == 0:
            return full_tensor(x)
        x = shard_like(x, self.parameter)
        return full_tensor(x) if self.whole else local(x)

    def give(self, x: Tensor) -> Tensor:
        """A plain tensor of the shape of `terms[0].tensor`, as one that is sharded like the parameter."""
        w = self.parameter
        if not isinstance(w, DTensor):
            return x
        if self.whole:
            return shard_like(x, w)
        return DTensor.from_local(x, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride())

    def _plain(self, x: Any, memo: dict[int, Tensor]) -> Any:
        # Terms that share a tensor must go on sharing it.
        if x is None:
            return None
        if id(x) not in memo:
            memo[id(x)] = full_tensor(x) if self.whole else local(x)
        return memo[id(x)]


def on_local_shards(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a function of terms on a plain tensor, which returns a tensor like it, one of terms on any tensor."""

    @wraps(function)
    def of_terms(terms: list[Term], *args: Any) -> Tensor:
        sharded = ShardedTerms(terms)
        return sharded.give(function(sharded.terms, *map(sharded.take, args)))

    return of_terms


@torch.no_grad()
def total_over_ranks(each: Sequence[ShardedTerms], value: Callable[[list[Term]], Tensor]) -> tuple[Tensor, list[Term]]:
    """The sum of all terms over all ranks, 0-dim, by one collective for each mesh dimension.

    Args:
        each: the terms of each tensor.
        value: the value of some terms on this rank, 0-dim.

    Returns:
        The sum; and the terms, in which the norms of groups across ranks are known, so that their gradient needs no
        collective.
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
    # Each rank that holds a part of a group now knows the whole norm, so those dimensions are not summed again.
    remaining: dict[Along | None, list[Term]] = {}
    for (term, grouping, along), square in zip(crossing, reduced, strict=False):
        known = replace(term, grouping=replace(grouping, norms=grouping.root(square, term.tensor.dtype)))
        remaining.setdefault(without(along, grouping.along), []).append(known)
        found.append(known)
    sums = reduced[len(crossing) :] + sum_over_ranks([(value(terms), along) for along, terms in remaining.items()])
    return torch.stack(sums).sum(), found


def _grouping_on_shard(term: Term, w: DTensor) -> Grouping | None:
    """The groups of a term on the shard of this rank; None where they can be found only on the whole tensor."""
    over = sharded_over(w)
    grouping = term.grouping
    if not over:
        return grouping
    if term.elementwise:
        return Elements()
    if not term.penalty.separable or not isinstance(grouping, Elements | Slices | WholeTensor):
        return None
    if isinstance(grouping, Elements):
        return grouping
    inside = [d % w.ndim for d in grouping.dims(w.ndim)]
    crossing = tuple(i for i in over if w.placements[i].dim % w.ndim in inside)  # type: ignore[attr-defined]
    if not crossing:
        return grouping
    return AcrossShards(grouping=grouping, scale=grouping.scale, shape=w.shape, along=(w.device_mesh, crossing))
