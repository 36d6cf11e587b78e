"""The smallest factor on lambda at which a proximal map makes an element (group) zero, for all of them at once.

Every proximal map of this library makes an element (group) zero if lambda is large enough. The lambda for a wanted
fraction of zeros is a quantile of these smallest lambdas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import full_tensor
from ..groups.grouping import Elements, working_dtype
from .chunks import Slicer
from .step import quotient
from .terms import Term, TermPenalty, separable_dims

__all__ = ["makes_zeros", "sampled", "stride_for", "zero_factors"]

Steps = float | Tensor

# The table of the thresholds of a penalty has ROWS magnitudes, which span OCTAVES factors of 2. Each is found by a grid
# search.
ROWS, OCTAVES = 256, 18
LARGEST, CANDIDATES, ROUNDS = 125.0, 16, 6  # log2 of the largest threshold in float32; 16^6 candidates
NEWTON_STEPS = 8


def makes_zeros(term: Term) -> bool:
    """Whether the term can make zeros; L2 cannot."""
    return term.linear > 0 or term.penalty.coefficients is None


def stride_for(work: Iterable[list[Term]], elements: int, groups: int) -> int:
    """The stride at which `sampled` takes about this number of elements, or groups, from all tensors together.

    For elements, the stride has no common factor with the sizes of the inner dimensions, if there is such a number
    within a factor of 2. A sample then covers all columns and all positions in a filter.
    """
    work = [terms for terms in work if any(map(makes_zeros, terms))]
    counts = [_count(terms) for terms in work]
    by_group = any(map(_grouped, work))
    if None in counts:
        return 1
    stride = max(sum(counts) // (groups if by_group else elements), 1)  # type: ignore[arg-type]
    if by_group:
        return stride
    inner = math.lcm(*(size for terms in work for size in _in_memory(terms[0].tensor)[1] if size))
    nearest = chain(range(stride, stride // 2 - 1, -1), range(stride + 1, 2 * stride))
    return next((near for near in nearest if near and math.gcd(near, inner) == 1), stride)


def _in_memory(w: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions in memory order, and the sizes of all but the first of them."""
    order = sorted(range(w.ndim), key=w.stride, reverse=True)
    return order, [w.shape[dim] for dim in order[1:]]


def _count(terms: list[Term]) -> int | None:
    """The number of elements (groups) of their tensor; None if they cannot be sampled."""
    w = terms[0].tensor
    if not _grouped(terms):
        return w.numel()
    dim = _cut_along(terms)
    return None if dim is None else w.shape[dim]


def _grouped(terms: list[Term]) -> bool:
    return any(term.grouped for term in terms)


def _cut_along(terms: list[Term]) -> int | None:
    """The dimension along which the groups of a tensor lie."""
    return max(separable_dims(terms), key=terms[0].tensor.size, default=None)


def sampled(terms: list[Term], stride: int, start: int) -> Slicer:
    """A function that takes every `stride`-th element (group) of the tensor of the terms, or of a tensor like it.

    It gathers a sharded tensor.
    """
    w = terms[0].tensor
    if not _grouped(terms):
        order, _ = _in_memory(w)  # the operations on it are views
        return partial(_take_elements, order, w.shape, stride, start % stride)
    dim = _cut_along(terms)
    return full_tensor if dim is None else partial(_take_groups, dim, w.shape[dim], stride, start % stride)


def _take_elements(order: list[int], shape: torch.Size, stride: int, start: int, x: Any) -> Any:
    if not isinstance(x, Tensor) or x.shape != shape:
        return x
    return full_tensor(x).permute(order).reshape(-1)[start::stride]


def _take_groups(dim: int, length: int, stride: int, start: int, x: Any) -> Any:
    if not isinstance(x, Tensor) or x.ndim <= dim or x.shape[dim] != length:
        return x
    return full_tensor(x).movedim(dim, 0)[start::stride].movedim(0, dim)


def zero_factors(work: Iterable[tuple[list[Term], Steps | None]]) -> Tensor:
    """The smallest factor on lambda at which the proximal map zeroes each element (group), for all tensors in one.

    It is 0 for an element that is already zero, and infinite for one that no lambda makes zero.

    Args:
        work: the terms of each tensor, and the step that multiplies lambda in its proximal map: a number, a tensor that
            is 0-dim or of the tensor's shape, or None if there is no proximal map.
    """
    alike: dict[Any, tuple[TermPenalty | None, list[Tensor], list[Steps]]] = {}
    for terms, step in work:
        penalty, u, m = _magnitudes([term for term in terms if makes_zeros(term)], 0.0 if step is None else step)
        key = penalty, u.dtype, u.device, m if not isinstance(m, Tensor) else None
        _, us, ms = alike.setdefault(key, (penalty, [], []))
        us.append(u.reshape(-1))
        ms.append(m.expand(u.shape).reshape(-1) if isinstance(m, Tensor) else m)
    factors = []
    for penalty, us, ms in alike.values():
        u = torch.cat(us).abs()
        u = u.to(working_dtype(u.dtype))
        m = torch.cat(ms) if isinstance(ms[0], Tensor) else ms[0]  # type: ignore[arg-type]
        factors.append(quotient(u if penalty is None else _thresholds(penalty, u), m))
    return torch.cat([x.to(factors[0].device) for x in factors]) if factors else torch.zeros(0)


def _magnitudes(terms: list[Term], step: Steps) -> tuple[TermPenalty | None, Tensor, Steps]:
    """The magnitudes `u` of one tensor, up to sign, and a multiplier `m` of lambda: zero where `threshold(u) <= m`.

    The penalty defines the threshold; if it is None, the threshold is `u`.
    """
    term = terms[0]
    x = term.offset(term.tensor)
    if any(some.penalty.positive for some in terms):
        x = x.clamp_min(0)
    if term.penalty.coefficients is None:
        u = x if isinstance(term.grouping, Elements) else term.grouping.polar(x)[0]
        return term.penalty, u, step * term.scaled_lam
    elements = [some.scaled_lam * some.linear for some in terms if not some.grouped]
    groups = [some.scaled_lam * some.linear for some in terms if some.grouped]
    if not groups:
        return None, x, step * sum(elements)
    grouping: Any = next(some.grouping for some in terms if some.grouped)
    if not elements and (not isinstance(step, Tensor) or step.ndim == 0):
        return None, grouping.polar(x)[0], step * sum(groups)
    # Divide each element by its step: in these units all steps are 1.
    slopes = quotient(x.to(working_dtype(x.dtype)), step)
    if not elements:
        return None, grouping.polar(slopes)[0], sum(groups)
    return None, _root(slopes.abs(), sum(elements), sum(groups), grouping), 1.0


def _root(slopes: Tensor, elements: Steps, groups: Steps, grouping: Any) -> Tensor:
    """The root `f` of `rms(max(slopes - f*elements, 0)) = f*groups`, for each group.

    The left side minus the right is convex and decreasing, so Newton's method climbs to the root from 0.
    """
    u, _ = grouping.polar(slopes)
    f = torch.zeros_like(u)
    for _ in range(NEWTON_STEPS):
        left = (slopes - grouping.spread(f, slopes) * elements).clamp_min(0)
        rms, rebuild = grouping.polar(left)
        direction = rebuild(torch.ones_like(rms))  # left / rms
        slope = (direction * elements * (left > 0)).reshape(grouping.view(slopes).shape)
        (total,) = grouping.totals(slope)
        falls = total / grouping.count(slopes.shape) + groups
        f = f + quotient((rms - f * groups).clamp_min(0), falls)
    return f


def _thresholds(penalty: TermPenalty, u: Tensor) -> Tensor:
    """The smallest `t` at which `rho_prox(u, t)` is 0, interpolated on log scales in a table over `u`."""
    largest = u.max() if u.numel() else u.new_ones(())
    largest = torch.where(largest.isfinite() & (largest > 0), largest, 1)
    spacing = OCTAVES / (ROWS - 1)
    rows = torch.arange(ROWS, device=u.device, dtype=u.dtype)[:, None]
    at = (largest * (-spacing * rows).exp2()).expand(-1, CANDIDATES).contiguous()
    low, width = torch.full_like(rows, -LARGEST), 2 * LARGEST
    for _ in range(ROUNDS):
        width /= CANDIDATES
        steps = torch.arange(CANDIDATES, device=u.device, dtype=u.dtype) * width
        alive = (penalty.rho_prox(at, (low + steps).exp2()) > 0).sum(1, keepdim=True)
        low = low + (alive - 1).clamp_min(0) * width
    table = low[:, 0] + width / 2
    place = (largest / u).log2() / spacing
    row = place.nan_to_num(0, 0, 0).clamp(0, ROWS - 2).long()
    first = table[row]
    return (first + (place - row) * (table[row + 1] - first)).exp2()
