"""Views of whole groups for a term over groups: of the whole tensor, or of chunks that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import local
from ..groups.grouping import working_dtype
from ..groups.layouts import Slices
from ..groups.norms import NormGrouping
from .chunks import sizes
from .terms import Term

__all__ = ["GroupChunk", "all_groups", "group_chunks", "has_group_views", "is_group_lasso", "scales_in_place"]


def is_group_lasso(terms: list[Term], *beside: Tensor) -> bool:
    """Whether the terms are one group lasso in full precision for which `has_group_views` holds."""
    if not has_group_views(terms, *beside):
        return False
    w = terms[0].tensor
    return terms[0].linear > 0 and not terms[0].quadratic and w.dtype == working_dtype(w.dtype)


@dataclass(slots=True, eq=False)
class GroupChunk:
    """Views of some whole groups of a tensor with one term, and of the same part of other tensors.

    Attributes:
        views: views of the tensor and of the other tensors.
        grouping: the groups of the views.
        lam: lambda times the factors of the term: a number, or one for each group.
        size: the number of elements in a group.
        count: the weight of a group: `size`, or 1.
    """

    views: list[Tensor]
    grouping: NormGrouping
    lam: Any
    size: int
    count: int

    @property
    def radius(self) -> Any:
        """The factor on the norm of a group in the penalty: `lam * sqrt(count)`."""
        return self.lam * math.sqrt(self.count)


def all_groups(term: Term, *beside: Tensor) -> GroupChunk:
    """A term over groups as one chunk. `has_group_views` must hold."""
    grouping: Any = term.grouping
    views = [grouping.view(x) for x in (term.tensor, *beside)]
    shape, dims, lam = views[0].shape, grouping.dims(views[0].ndim), term.scaled_lam
    size = math.prod(shape[dim] for dim in dims)
    if len(dims) > 1 and dims[0] == 1 and len(dims) == len(shape) - 1 and all(x.is_contiguous() for x in views):
        views, grouping = [x.flatten(1) for x in views], Slices(0)
        lam = lam.flatten(1) if isinstance(lam, Tensor) and lam.ndim else lam
    return GroupChunk(views, grouping, lam, size, size if term.grouping.scale else 1)  # type: ignore[attr-defined]


def group_chunks(term: Term, *beside: Tensor) -> Iterator[GroupChunk]:
    """A term over groups in chunks that fit the cache. `has_group_views` must hold."""
    whole = all_groups(term, *beside)
    x, lam = whole.views[0], whole.lam
    dims = whole.grouping.dims(x.ndim)
    kept = [dim for dim in range(x.ndim) if dim not in dims]
    if not kept:
        yield whole
        return
    dim = max(kept, key=x.size)
    chunks = -(-x.numel() // sizes(x).group_chunk) or 1
    length = max(1, -(-x.shape[dim] // chunks))
    for start in range(0, x.shape[dim], length):
        some = [view.narrow(dim, start, min(length, view.shape[dim] - start)) for view in whole.views]
        part = lam
        if isinstance(lam, Tensor) and lam.ndim > dim and lam.shape[dim] > 1:
            part = lam.narrow(dim, start, some[0].shape[dim])
        yield replace(whole, views=some, lam=part)


def has_group_views(terms: list[Term], *beside: Tensor) -> bool:
    """Whether the terms are one term over groups, and its groups are views of its tensor and of the other tensors."""
    if not scales_in_place(terms):
        return False
    grouping: Any = terms[0].grouping
    return all(torch._C._is_alias_of(grouping.view(x), x) for x in beside)  # type: ignore[attr-defined]


def scales_in_place(terms: list[Term]) -> bool:
    """Whether `scale_` can apply their prox with a scalar step: one term, whose groups are views of its tensor."""
    if len(terms) != 1 or torch.compiler.is_compiling():
        return False
    w, grouping = terms[0].tensor, terms[0].grouping
    if not isinstance(grouping, NormGrouping) or terms[0].center is not None or terms[0].penalty.positive:
        return False
    return local(w) is w and torch._C._is_alias_of(grouping.view(w), w)  # type: ignore[attr-defined]
