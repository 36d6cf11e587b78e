"""The proximal map of all terms of one tensor together, in place and for batches of tensors.

It is known in closed form for a single penalty of any kind, and for sums of L1, L2 and elastic nets over elements and
over groups of one grouping; `closed_forms.check_prox` raises for other terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..functional import magnitudes, soft_threshold
from ..groups.grouping import Elements, working_dtype
from ..groups.nm import NM
from ..groups.norms import NormGrouping
from . import compiled_groups, foreach
from .batches import JointBatch, TensorBatch, as_one_tensor
from .chunks import buffer_like, slicers, split_like
from .group_chunks import group_chunks, is_group_lasso, scales_in_place
from .root_search import shrink_factors
from .sharded import on_local_shards
from .step import Step, is_scalar
from .terms import Term, chunked_terms, separable_dims

__all__ = ["clip_change", "one_step", "prox", "prox_", "zero_lengths_"]


def one_step(steps: Sequence[Step]) -> bool:
    """Whether all steps are the same scalar, without a max_change."""
    return steps[0].max_change is None and is_scalar(steps[0].size) and all(step is steps[0] for step in steps)


def prox_(batch: TensorBatch, steps: Sequence[Step]) -> None:
    """The proximal map of the terms of each tensor, in place, with its own step; see `prox`."""
    if isinstance(batch, JointBatch):
        matrix = batch.matrix()
        prox_(matrix, [batch.step(steps)])
        batch.scatter_(matrix.tensors[0])
        return
    step = steps[0]
    if batch.has_fused_prox and one_step(steps):
        linear, quadratic = batch.coefficients
        if linear:
            foreach.soft_threshold_(batch.tensors, step.size * linear)
        if quadratic:
            foreach.mul_(batch.tensors, 1 / (1 + step.size * (2 * quadratic)))
        return
    flat, flat_steps = as_one_tensor(batch, steps)
    if flat is not batch:
        prox_(flat, flat_steps)
        torch._foreach_copy_(batch.tensors, split_like(flat.tensors[0], batch.tensors))
        return
    for terms, step in zip(batch.each, steps, strict=True):
        terms = [term for term in terms if not term.inactive]
        if _prox_along_rays_(terms, step) or (batch.compiled and compiled_groups.shrink_groups_(terms, step)):
            continue
        if _shrink_groups_(terms, step):
            continue
        for some, take in chunked_terms(terms):
            part = step.sliced(take)
            some[0].tensor.copy_(prox(some, part.size, part.max_change))


def _prox_along_rays_(terms: list[Term], step: Step) -> bool:
    """Apply the proximal map of a single term over groups in place; returns False if it would need a copy."""
    if step.max_change is not None or not is_scalar(step.size) or not scales_in_place(terms):
        return False
    (term,) = terms
    w = term.tensor
    rows = [dim for dim in separable_dims(terms) if dim == 0]  # norms across rows are read in memory order
    for take in slicers(w, rows, times=8):
        scale_(term, take(w), step.size * take(term.scaled_lam))
    return True


def _shrink_groups_(terms: list[Term], step: Step) -> bool:
    """Apply the prox of a group lasso with a step for each element in place; returns False if it does not apply."""
    elements = step.elements
    if elements is None or not step.by_element or not is_group_lasso(terms, elements):
        return False
    buffers: list[Tensor | None] = [None, None, None]
    for part in group_chunks(terms[0], elements):
        x, some = part.views
        buffers = [buffer_like(x, buffer) for buffer in buffers]
        r = step.scaled(some, part.radius).size_into(buffers[2])
        factors = shrink_factors(x, r, part.grouping, (buffers[0], buffers[1]))
        change = torch.addcmul(x, x, factors, value=-1, out=factors)  # x - x * factors
        if step.max_change is not None:
            most = step.max_change * math.sqrt(part.size)
            norm = part.grouping.norm(change).clamp_min_(torch.finfo(change.dtype).tiny)  # 0 where lr is 0
            change.mul_((most / norm).clamp_max_(1))
        x.sub_(change)
    return True


def scale_(term: Term, w: Tensor, t: float | Tensor) -> None:
    """Apply the proximal map of a term over groups to `w`, in place."""
    grouping: Any = term.grouping
    grouping.scale_(w, partial(term.penalty.rho_prox, t=t))


def zero_lengths_(batch: TensorBatch) -> None:
    """If a direction of a weight under weight_norm has become zero, set its length to zero instead.

    The weight is `length * direction / ||direction||`, which is 0/0 for a zero direction. The direction becomes tiny.
    """
    for terms in batch.normalized:
        direction, length = terms[0].tensor, terms[0].length
        dims = [dim for dim in range(direction.ndim) if length.ndim == 0 or length.shape[dim] == 1]  # type: ignore[union-attr]
        zero = direction.abs().amax(dims, keepdim=True).reshape(length.shape) == 0  # type: ignore[union-attr]
        length.masked_fill_(zero, 0)  # type: ignore[union-attr]
        direction.masked_fill_(zero, torch.finfo(direction.dtype).tiny ** 0.25)


@on_local_shards
def prox(terms: list[Term], step: float | Tensor, max_change: float | Tensor | None = None) -> Tensor:
    """`argmin_v 1/2 sum_i (v_i - w_i)^2 / step_i + (the terms at v)`: the proximal map of all terms of one tensor.

    Args:
        terms: all terms of one tensor; `check_prox` must have accepted them.
        step: a number, or a tensor of steps that is 0-dim or of the shape of the parameter.
        max_change: the most by which an element changes; a group changes by at most this times `sqrt(size)`, in norm.
    """
    w = terms[0].tensor
    if len(terms) == 1 and terms[0].penalty.coefficients is None:
        term = terms[0]
        t = step * term.scaled_lam
        x = term.offset(w)
        if isinstance(term.grouping, NM):
            v = term.grouping.project(x, t)
        else:
            v = magnitudes.prox(lambda u: term.penalty.rho_prox(u, t), x, term.grouping)
            v = clip_change(x, v, max_change, term.grouping)
        return v if term.center is None else v + term.center
    v = w.to(torch.promote_types(w.dtype, working_dtype(w.dtype)))
    v, step = _prox_quadratic(terms, v, step)
    linear = [term for term in terms if term.linear]
    grouped = [term for term in linear if term.grouped]
    center = linear[0].center if linear else None
    if center is not None:
        v = v - center
    thresholds = [term.scaled_lam * term.linear for term in linear if not term.grouped]
    if thresholds:
        v = soft_threshold(v, step * sum(thresholds))
    if center is not None and not grouped:
        v, center = v + center, None
    x = w if center is None else w - center
    if any(term.penalty.positive for term in terms):
        x, v = x.clamp_min(0), v.clamp_min(0)
    v = clip_change(x, v, max_change, Elements())
    if grouped:
        v = clip_change(x, _prox_grouped(grouped, v, step), max_change, grouped[0].grouping)
    return v if center is None else v + center


def clip_change(old: Tensor, new: Tensor, max_change: float | Tensor | None, grouping: Any) -> Tensor:
    """`new`, moved back towards `old` if it changed too much.

    An element may change by `max_change`, and a group by `max_change * sqrt(size)` in norm.
    """
    if max_change is None:
        return new
    if isinstance(grouping, Elements) and not new.is_complex():
        old = old.to(new.dtype)
        return new.clamp(old - max_change, old + max_change)
    if isinstance(grouping, NormGrouping) and not grouping.scale:
        max_change = max_change * math.sqrt(grouping.size(old.shape))
    u, rebuild = grouping.polar(new - old)
    # Within the limit, return `new` itself: the norm of a tiny difference rounds to 0, which would return `old`.
    return torch.where(grouping.spread(u <= max_change, new), new, old + rebuild(u.clamp_max(max_change)))


def _prox_quadratic(terms: list[Term], v: Tensor, step: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """The prox of the squares, and the step left for the other terms, whose prox follows it."""
    squares = [(term.elementwise_lam * term.quadratic, term.center) for term in terms if term.quadratic]
    if not squares:
        return v, step
    denominator = 1 + 2 * step * sum(coefficient for coefficient, _ in squares)
    for coefficient, center in squares:
        if center is not None:
            v = v + 2 * step * coefficient * center
    return v / denominator, step / denominator


def _prox_grouped(terms: list[Any], v: Tensor, step: float | Tensor) -> Tensor:
    """Block soft threshold: in closed form with one step per group, by a root search if steps differ by coordinate."""
    grouping = terms[0].grouping
    lam = sum(term.scaled_lam * term.linear for term in terms)
    if isinstance(step, Tensor) and step.ndim > 0 and step.shape == v.shape:
        radius = lam * math.sqrt(grouping.count(v.shape))
        x, s = grouping.view(v), grouping.view(step)
        return _block_soft_threshold(x, s * radius, grouping).reshape(v.shape)
    t = step * lam
    return magnitudes.prox(lambda u: (u - t).clamp_min(0), v, grouping)


def _block_soft_threshold(x: Tensor, r: Tensor, grouping: NormGrouping) -> Tensor:
    """`argmin_v 1/2 sum_i (v_i - x_i)^2 / r_i + ||v||` for each group of a view of a tensor."""
    return x * shrink_factors(x, r, grouping)
