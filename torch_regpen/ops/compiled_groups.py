"""The steps of a group lasso through torch.compile; see `compiled`.

Each function returns False and changes nothing if the kernels do not support the tensors.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..groups.layouts import Slices
from ..groups.norms import LONG
from . import kernels
from .compiled import plain, run, scalar, takes
from .group_chunks import GroupChunk, all_groups, has_group_views, is_group_lasso
from .root_search import root
from .step import Step, quotient
from .terms import Term

__all__ = ["average_groups_", "scale_groups_", "shrink_groups_"]


class _Sums:
    """`GroupSums` of the rows of a matrix."""

    def __init__(self, x: Tensor, r: Tensor, moment: Tensor | None = None, eps: Tensor | None = None) -> None:
        self.arguments = x, r, moment, eps

    def weighted(self) -> Any:
        return run(kernels.weighted, *self.arguments)

    def at_zero(self) -> Any:
        return run(kernels.at_zero, *self.arguments)

    def powers(self, theta: Tensor) -> Any:
        return run(kernels.powers, *self.arguments, theta)


def shrink_groups_(terms: list[Term], step: Step) -> bool:
    """The prox of a group lasso in a per-coordinate metric, in place."""
    moment, eps, most = step.moment, step.eps, step.max_change
    if moment is None or eps is None or most is None or not is_group_lasso(terms, moment):
        return False
    groups = _rows(terms[0], moment)
    if groups is None:
        return False
    x, m = groups.views
    radius = _column(x, step.numerator * groups.radius)
    if _one_kernel_is_faster(x):
        run(kernels.shrink_all_, x, radius, m, eps, scalar(most * math.sqrt(groups.size)))
    else:
        sums = _Sums(x, radius, m, eps)
        theta = root(sums, groups.grouping)
        change = run(kernels.change_norm, *sums.arguments, theta)
        change.clamp_min_(torch.finfo(x.dtype).tiny)  # 0 where lr is 0
        factor = (most * math.sqrt(groups.size) / change).clamp_max_(1)
        run(kernels.shrink_, *sums.arguments, theta, factor)
    increment_version(terms[0].tensor)
    return True


def average_groups_(terms: list[Term], gap: Tensor, sums: Tensor, step: Step) -> bool:
    """A step of dual averaging of a group lasso in a per-coordinate metric, in place."""
    moment, eps, max_change = step.moment, step.eps, step.max_change
    if moment is None or eps is None or max_change is None or not is_group_lasso(terms, gap, sums, moment):
        return False
    groups = _rows(terms[0], gap, sums, moment)
    if groups is None:
        return False
    w, d, s, m = groups.views
    norm = run(kernels.norm, w)
    most, zero = quotient(step.numerator, max_change), norm == 0  # type: ignore[arg-type]
    slope = (most * groups.radius / norm).masked_fill_(zero, 0)
    least = zero * (most * groups.lam)
    added = w, d, s, m, step.numerator, eps, slope, least, _column(w, groups.radius)
    if _one_kernel_is_faster(w):
        run(kernels.average_all_, *added, scalar(max_change))
    else:
        run(kernels.add_steps_, *added)
        theta = root(_Sums(w, d), groups.grouping)
        run(kernels.shrink_latent_, w, d, s, m, theta, scalar(max_change))
    increment_version(terms[0].tensor)
    return True


def _one_kernel_is_faster(x: Tensor) -> bool:
    """Whether one kernel for all Newton steps is faster than one for each. Only on a CPU can they stop early."""
    return x.is_cuda


def scale_groups_(terms: list[Term], gap: Tensor, sums: Tensor) -> bool:
    """A step of dual averaging over groups, in place, once it is in `sums`: a number for each group, or for all."""
    if not has_group_views(terms, gap) or terms[0].tensor.dtype != gap.dtype:
        return False
    groups = _rows(terms[0], gap)
    if groups is None:
        return False
    w, d = groups.views
    u = run(kernels.latent_norm, w, d).div_(math.sqrt(groups.count))
    factors = terms[0].penalty.rho_prox(u, sums * groups.lam) / u.masked_fill(u == 0, math.inf)
    run(kernels.scale_latent_, w, d, factors)
    increment_version(terms[0].tensor)
    return True


def _rows(term: Term, *beside: Tensor) -> GroupChunk | None:
    """Matrices with a group in each row; None if a group is not contiguous or the kernels do not support them."""
    groups = all_groups(term, *(x.detach() for x in beside))
    x = groups.views[0]
    dims = groups.grouping.dims(x.ndim)
    along_rows = dims == list(range(x.ndim - len(dims), x.ndim)) and all(view.is_contiguous() for view in groups.views)
    if not along_rows or not 1 < groups.size <= LONG or x.numel() == groups.size:
        return None
    views = [plain(view.detach(), x.numel() // groups.size, groups.size) for view in groups.views]
    lam = groups.lam.reshape(-1, 1) if isinstance(groups.lam, Tensor) and groups.lam.ndim else groups.lam
    return replace(groups, views=views, grouping=Slices(0), lam=lam) if takes(*views) else None


def _column(x: Tensor, value: float | Tensor) -> Tensor:
    """`value` as a column with one element for each row of `x`."""
    return torch.zeros_like(x[:, :1]) + value
