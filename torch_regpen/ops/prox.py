"""The proximal map of all terms of one tensor together, in place and for batches of tensors.

It is known in closed form for any single kind, and for sums of L1, L2 and elastic nets over elements and over groups of
one grouping; `closed_forms.check_prox` raises where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..distributed.shards import local
from ..groups.grouping import Elements, working_dtype
from ..groups.layouts import Slices
from ..groups.nm import NM
from ..groups.norms import NormGrouping
from . import foreach
from .batches import JointBatch, TensorBatch
from .chunks import buffer_like, sizes, slicers
from .sharded import on_local_shards
from .step import Step, is_scalar
from .terms import Term, chunked_terms, separable_dims

__all__ = [
    "GroupChunk",
    "clip_change",
    "group_chunks",
    "has_group_views",
    "is_group_lasso",
    "one_step",
    "prox",
    "prox_",
    "shrink_factors",
    "zero_lengths_",
]

NEWTON_STEPS = 16  # of the root search; 13 were the most that any of 800,000 groups, made to be hard, needed


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
    for terms, step in zip(batch.each, steps, strict=True):
        terms = [term for term in terms if not term.inactive]
        if _prox_along_rays_(terms, step) or _shrink_groups_(terms, step):
            continue
        for some, take in chunked_terms(terms):
            part = step.sliced(take)
            some[0].tensor.copy_(prox(some, part.size, part.max_change))


def _prox_along_rays_(terms: list[Term], step: Step) -> bool:
    """Apply the proximal map of a single term over groups in place; returns False where it would need a copy."""
    if step.max_change is not None or not is_scalar(step.size) or not scales_in_place(terms):
        return False
    (term,) = terms
    w = term.tensor
    rows = [dim for dim in separable_dims(terms) if dim == 0]  # across rows, a norm is read in the order of memory
    for take in slicers(w, rows, times=8):
        scale_(term, take(w), step.size * take(term.scaled_lam))
    return True


def _shrink_groups_(terms: list[Term], step: Step) -> bool:
    """Apply the prox of a group lasso with a step for each element in place; returns False where it does not apply."""
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
            change.mul_((most / part.grouping.norm(change)).clamp_max_(1))
        x.sub_(change)
    return True


def is_group_lasso(terms: list[Term], *beside: Tensor) -> bool:
    """Whether they are a single group lasso in full precision, of which the tensor and those beside it are views."""
    if not has_group_views(terms, *beside):
        return False
    w = terms[0].tensor
    return terms[0].linear > 0 and not terms[0].quadratic and w.dtype == working_dtype(w.dtype)


@dataclass(slots=True, eq=False)
class GroupChunk:
    """Whole groups of one tensor with one term, and the same part of tensors beside it, in views.

    Attributes:
        views: of the tensor, and of those beside it.
        grouping: the groups of the views.
        lam: lambda with the factors of the term, a number or one for each group.
        size: the number of elements of a group.
        count: how often a group counts: `size`, or once.
    """

    views: list[Tensor]
    grouping: NormGrouping
    lam: Any
    size: int
    count: int

    @property
    def radius(self) -> Any:
        """What multiplies the norm of a group in the penalty: `lam * sqrt(count)`."""
        return self.lam * math.sqrt(self.count)


def group_chunks(term: Term, *beside: Tensor) -> Iterator[GroupChunk]:
    """A term over groups in chunks that fit the cache; `has_group_views` holds."""
    grouping: Any = term.grouping
    views = [grouping.view(x) for x in (term.tensor, *beside)]
    shape, dims, lam = views[0].shape, grouping.dims(views[0].ndim), term.scaled_lam
    size = math.prod(shape[dim] for dim in dims)
    count = size if grouping.scale else 1
    if len(dims) > 1 and dims[0] == 1 and len(dims) == len(shape) - 1 and all(x.is_contiguous() for x in views):
        views, grouping, dims = [x.flatten(1) for x in views], Slices(0), [1]
        lam = lam.flatten(1) if isinstance(lam, Tensor) else lam
    kept = [dim for dim in range(views[0].ndim) if dim not in dims]
    if not kept:
        yield GroupChunk(views, grouping, lam, size, count)
        return
    dim = max(kept, key=views[0].size)
    chunks = -(-views[0].numel() // sizes(views[0]).group_chunk) or 1
    length = max(1, -(-views[0].shape[dim] // chunks))
    for start in range(0, views[0].shape[dim], length):
        some = [x.narrow(dim, start, min(length, x.shape[dim] - start)) for x in views]
        part = lam
        if isinstance(lam, Tensor) and lam.ndim > dim and lam.shape[dim] > 1:
            part = lam.narrow(dim, start, some[0].shape[dim])
        yield GroupChunk(some, grouping, part, size, count)


def has_group_views(terms: list[Term], *beside: Tensor) -> bool:
    """Whether they are a single term over groups, of which the tensor and those beside it are views."""
    if not scales_in_place(terms):
        return False
    grouping: Any = terms[0].grouping
    return all(torch._C._is_alias_of(grouping.view(x), x) for x in beside)  # type: ignore[attr-defined]


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
        if isinstance(term.grouping, NM):
            v = term.grouping.project(x, t)
        else:
            v = F.prox(lambda u: term.penalty.rho_prox(u, t), x, term.grouping)
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
    """`argmin_v 1/2 sum_i (v_i - x_i)^2 / r_i + ||v||` for each group of a view of a tensor."""
    return x * shrink_factors(x, r, grouping)


def shrink_factors(
    x: Tensor, r: Tensor, grouping: NormGrouping, buffers: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    """`v / x` of the minimiser `v` of `1/2 sum_i (v_i - x_i)^2 / r_i + ||v||`, for each group of a view of a tensor.

    `v_i = x_i * theta / (theta + r_i)` where `theta = ||v||` solves `f(theta) = sum_i (x_i / (theta + r_i))^2 = 1`, and
    `v = 0` where `f(0) <= 1`. `1/sqrt(f)` is concave (a power mean of lines), so Newton's method for it climbs to the
    root from any start below it. With the means weighted by `x_i^2`, `||x||` is the power mean of order -2 of
    `theta + r_i`, so it is at most their arithmetic mean. Hence the first-order solution
    `||x|| - sum_i r_i x_i^2 / ||x||^2` is such a start, and a group where it is positive is not zero.

    Args:
        x: a view of a tensor in which groups lie along whole dimensions.
        r: of its shape, 0 or more.
        grouping: the groups of the view.
        buffers: memory of the shape of `x` for temporaries, or None for new memory. The result is in the first.
    """
    distance, squares = buffers
    norm = grouping.norm(x)
    (weighted,) = grouping.totals(torch.mul(x, r, out=squares).mul_(x))
    theta = norm - weighted / norm / norm
    tiny, dead = torch.finfo(r.dtype).tiny, None
    smallest = tiny ** (1 / 3)  # of a norm whose cube does not lose digits
    # Far from zero no quotient overflows. Elsewhere each `|x_i| - r_i` is a start too, from which none exceeds 1.
    if not grouping.all_known(theta.sub(norm, alpha=0.01) > smallest):
        r = r.clamp_min(tiny)
        modulus = x.abs()
        (at_zero,) = grouping.totals((modulus / r).square_())
        dead = at_zero <= 1
        theta = torch.maximum(theta.masked_fill(norm <= smallest, 0), grouping.largest(modulus.sub_(r)))
        theta = theta.clamp_min(0).masked_fill(dead, 0)
    accuracy = math.sqrt(torch.finfo(r.dtype).eps)
    for _ in range(NEWTON_STEPS):
        distance = torch.add(r, theta, out=distance)
        squares = torch.div(x, distance, out=squares).square_()
        f, slope = grouping.totals(squares, torch.div(squares, distance, out=distance))
        change = f * (f.sqrt() - 1) / slope
        if dead is not None:
            change = change.masked_fill(dead, 0)
        theta = theta + change
        if grouping.all_known(change.abs() <= accuracy * theta):  # the next change would be rounding
            break
    distance = torch.add(r, theta, out=distance)
    return torch.div(theta, distance, out=distance)
