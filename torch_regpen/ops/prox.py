"""The proximal map of all terms of one tensor together, and the decoupled step, in place and for batches of tensors.

Known in closed form are those of any single kind, and of sums of L1, L2 and elastic nets over elements and over groups
of one grouping; `check_prox` says so before training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..distributed.shards import local
from ..groups.grouping import Elements, working_dtype
from ..groups.norms import NormGrouping
from ..groups.singular_values import SingularValues
from . import foreach
from .batches import JointBatch, TensorBatch
from .chunks import slicers
from .sharded import on_local_shards
from .step import Step, is_scalar
from .terms import Term, chunked_terms, separable_dims

__all__ = ["check_prox", "one_step", "prox", "prox_", "scale_", "scales_in_place", "zero_lengths_"]

NEWTON_STEPS = 16  # of the root search; 13 were the most that any of 800,000 groups, made to be hard, needed


def one_step(steps: Sequence[Step]) -> bool:
    """Whether they are the same step, a scalar without a max_change."""
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
    for terms, step in zip(batch.each, steps, strict=True):
        terms = [term for term in terms if not term.inactive]
        if _prox_along_rays_(terms, step):
            continue
        for some, take in chunked_terms(terms):
            part = step.sliced(take)
            some[0].tensor.copy_(prox(some, part.size, part.max_change))


def _prox_along_rays_(terms: list[Term], step: Step) -> bool:
    """The proximal map of a single term over groups in place, where that takes no copy; whether it does."""
    if step.max_change is not None or not is_scalar(step.size) or not scales_in_place(terms):
        return False
    (term,) = terms
    w = term.tensor
    rows = [
        dim for dim in separable_dims(terms) if dim == 0
    ]  # along another dimension a norm reads memory in order uncut
    for take in slicers(w, rows, times=8):
        scale_(term, take(w), step.size * take(term.scaled_lam))
    return True


def scales_in_place(terms: list[Term]) -> bool:
    """Whether their prox with a scalar step is `scale_`: of a single term over groups, of which a tensor is a view."""
    if len(terms) != 1 or torch.compiler.is_compiling():
        return False
    w, grouping = terms[0].tensor, terms[0].grouping
    if not isinstance(grouping, NormGrouping) or terms[0].center is not None or terms[0].penalty.positive:
        return False
    return local(w) is w and torch._C._is_alias_of(grouping.view(w), w)  # type: ignore[attr-defined]


def scale_(term: Term, w: Tensor, t: float | Tensor) -> None:
    """The proximal map of a term over groups, in place of `w`."""
    grouping: Any = term.grouping
    grouping.scale_(w, partial(term.penalty.rho_prox, t=t))


def zero_lengths_(batch: TensorBatch) -> None:
    """Where the directions of a weight under weight_norm have become zero, make the length zero in their place.

    The weight is `length * direction / ||direction||`, which is 0/0 at a direction of zero. A short one is left.
    """
    for terms in batch.normalized:
        direction, length = terms[0].tensor, terms[0].length
        dims = [dim for dim in range(direction.ndim) if length.ndim == 0 or length.shape[dim] == 1]  # type: ignore[union-attr]
        zero = direction.abs().amax(dims, keepdim=True).reshape(length.shape) == 0  # type: ignore[union-attr]
        length.masked_fill_(zero, 0)  # type: ignore[union-attr]
        direction.masked_fill_(zero, torch.finfo(direction.dtype).tiny ** 0.25)


def check_prox(terms: list[Term], per_coordinate: bool = False) -> None:
    """Raise `ValueError` where the prox of the sum of these terms of one tensor is not known in closed form.

    Known are: any single kind; and sums of L1, L2 and elastic nets over elements and over groups of one grouping.
    """
    for term in terms:
        if not term.penalty.has_prox():
            raise ValueError(
                f"{type(term.penalty).__name__} has no proximal map in closed form; use it in the loss, or with "
                "mode='coupled' or 'decoupled'"
            )
    names = " + ".join(type(term.penalty).__name__ for term in terms)
    where = f"{names} on parameter {terms[0].name!r}"
    ways_out = "use mode='coupled' or 'decoupled', or one of them in the loss"
    if any(term.penalty.coefficients is None for term in terms):
        if len(terms) > 1:
            raise ValueError(f"the prox of {where} is not known in closed form; {ways_out}")
        if per_coordinate and not isinstance(terms[0].grouping, Elements):
            raise ValueError(
                f"the prox of {where} over groups is not known where the step differs by coordinate; "
                "use metric='euclidean'"
            )
        return
    grouped = [term for term in terms if term.grouped]
    elements = [term for term in terms if term.linear and not term.grouped]
    if len({term.grouping for term in grouped}) > 1:
        raise ValueError(f"the prox of {where}, over groups that overlap, is not known in closed form; {ways_out}")
    if any(isinstance(term.grouping, SingularValues) for term in grouped):
        if per_coordinate:
            raise ValueError(
                f"the prox of {where} over singular values is not known where the step differs by coordinate; "
                "use metric='euclidean'"
            )
        if elements or any(term.penalty.positive for term in terms):
            raise ValueError(
                f"the prox of {where}, over elements and singular values, is not known in closed form; {ways_out}"
            )
    centers = {id(term.center) for term in terms if term.penalty.coefficients != (0.0, 1.0)}
    positive = any(term.penalty.positive for term in terms)
    if len(centers) > 1 or (positive and grouped and centers != {id(None)}):
        raise ValueError(f"the prox of {where}, around different centers, is not known in closed form; {ways_out}")


@on_local_shards
def prox(terms: list[Term], step: float | Tensor, max_change: float | Tensor | None = None) -> Tensor:
    """`argmin_v 1/2 sum_i (v_i - w_i)^2 / step_i + (the terms at v)`: the proximal map of all terms of one tensor.

    Args:
        terms: all on one tensor; `check_prox` has passed.
        step: a number, or a tensor of steps that is 0-dim or of the shape of the parameter.
        max_change: no element shrinks by more than this, nor the norm of a group by more than this times `sqrt(size)`.
    """
    w = terms[0].tensor
    if len(terms) == 1 and terms[0].penalty.coefficients is None:
        term = terms[0]
        t = step * term.scaled_lam
        x = term.offset(w)
        v = clip_change(x, F.prox(lambda u: term.penalty.rho_prox(u, t), x, term.grouping), max_change, term.grouping)
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
        v = F.soft_threshold(v, step * sum(thresholds))
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
    """`new`, moved back towards `old` where it changed too much.

    That is where an element changed by more than `max_change`, or a group by more than `max_change * sqrt(size)`.
    """
    if max_change is None:
        return new
    if isinstance(grouping, Elements) and not new.is_complex():
        old = old.to(new.dtype)
        return new.clamp(old - max_change, old + max_change)
    if isinstance(grouping, NormGrouping) and not grouping.scale:
        max_change = max_change * math.sqrt(grouping.size(old.shape))
    u, rebuild = grouping.polar(new - old)
    # What did not move too far is `new` itself: where the norm of a difference of 1e-23 is 0, it would stay `old`.
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
    """Block soft threshold: closed form for one step, a root search for each group where steps differ by coordinate."""
    grouping = terms[0].grouping
    lam = sum(term.scaled_lam * term.linear for term in terms)
    if isinstance(step, Tensor) and step.ndim > 0:
        radius = lam * math.sqrt(grouping.count(v.shape))
        x, s = grouping.view(v), grouping.view(step)
        return _block_soft_threshold(x, s * radius, grouping).reshape(v.shape)
    t = step * lam
    return F.prox(lambda u: (u - t).clamp_min(0), v, grouping)


def _block_soft_threshold(x: Tensor, r: Tensor, grouping: NormGrouping) -> Tensor:
    """`argmin_v 1/2 sum_i (v_i - x_i)^2 / r_i + ||v||` for each group of a view of a tensor.

    `v_i = x_i * theta / (theta + r_i)` where `theta = ||v||` solves `f(theta) = sum_i (x_i / (theta + r_i))^2 = 1`, and
    `v = 0` where `f(0) <= 1`. `1/sqrt(f)` is concave (a power mean of lines), so Newton's method for it climbs to the
    root from any start below it; `||x|| - max r` is one, and so is each `|x_i| - r_i`: from there on no quotient
    exceeds 1.
    """
    tiny = torch.finfo(r.dtype).tiny
    r = r.clamp_min(tiny)
    modulus = x.abs()
    at_zero, norm = grouping.totals((modulus / r).square_(), modulus.square())
    theta = torch.maximum(norm.sqrt() - grouping.largest(r), grouping.largest(modulus - r)).clamp_min(0)
    dead, accuracy = at_zero <= 1, math.sqrt(torch.finfo(r.dtype).eps)
    for _ in range(NEWTON_STEPS):
        inverse = (theta + r).reciprocal_()
        squares = (modulus * inverse).square_()
        f, slope = grouping.totals(squares, inverse.mul_(squares))
        change = (f * (f.sqrt() - 1) / slope).masked_fill_(dead, 0)
        theta = theta + change
        if grouping.all_known(change <= accuracy * theta):  # then the next one would be rounding
            break
    theta = torch.where(dead, 0, theta)
    return x * (theta / (theta + r))
