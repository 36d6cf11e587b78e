"""The dual mode: regularized dual averaging (RDA, Xiao 2010). The gap is the amount the penalty took from a weight.

After each update of the visible weights `w`: `latent = w + d`, `S += s`, `w = prox(latent, S*lam)`, `d = latent - w`.
The gap `d` and the sum of the steps `S` are in the optimizer's state for the parameter, in float32 or float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import local
from ..groups.grouping import Elements, working_dtype
from ..groups.nm import NM
from ..ops import compiled_groups
from ..ops.batches import JointBatch, TensorBatch, as_one_tensor
from ..ops.chunks import buffer_like, split_like
from ..ops.group_chunks import group_chunks, has_group_views, is_group_lasso
from ..ops.prox import clip_change, prox
from ..ops.root_search import shrink_factors
from ..ops.sharded import on_local_shards
from ..ops.step import Step, adaptive, quotient
from ..ops.terms import Term, chunked_terms

__all__ = ["GAP", "STEPS", "average_", "counted", "drop_others", "latent_terms", "make_gaps", "reset"]

GAP = "gap"
STEPS = "gap_steps"

State = dict[str, Any]


def make_gaps(parameters: Sequence[Tensor], states: Sequence[State], steps: Sequence[Step]) -> None:
    """Add a gap of 0 and a step sum of 0 to each state that lacks them; cast or move those that it has."""
    dtype, device = None, None
    for parameter, state, step in zip(parameters, states, steps, strict=True):
        if parameter.dtype is not dtype or parameter.device != device:  # once for tensors of the same kind
            dtype, device = parameter.dtype, parameter.device
            real = working_dtype(dtype)
            wide = torch.promote_types(dtype, real)
        if GAP not in state:
            state[GAP] = torch.zeros_like(parameter, dtype=wide)
            state[STEPS] = torch.zeros((), dtype=real, device=device)
        gap = state[GAP]
        if gap.dtype is not wide or gap.device != device:  # the model was cast or moved
            state[GAP], state[STEPS] = gap.to(device, wide), state[STEPS].to(device, real)
        if step.by_element:
            _spread_steps(parameter, state)


def _spread_steps(parameter: Tensor, state: State) -> None:
    """Give each element its own sum."""
    if not state[STEPS].ndim:
        state[STEPS] = torch.zeros_like(parameter, dtype=working_dtype(parameter.dtype)) + state[STEPS]


def reset(states: Sequence[State]) -> None:
    """Restart the average from the visible weights."""
    kept = [local(state[name]) for state in states for name in (GAP, STEPS) if name in state]
    if kept:
        torch._foreach_zero_(kept)


def drop_others(states: Sequence[State], keep: bool) -> None:
    """Drop the entries of earlier versions from loaded states and, unless `keep`, the gaps and the sums."""
    names = ("latent", "latent_steps") if keep else ("latent", "latent_steps", GAP, STEPS)
    dropped = {name for state in states for name in names if state.pop(name, None) is not None}
    if "latent" in dropped and keep:
        warnings.warn(
            "the state comes from an earlier version, which stored latent weights instead of gaps; they are dropped, "
            "and dual averaging restarts from the current weights",
            stacklevel=3,
        )


def average_(batch: TensorBatch, states: Sequence[State], steps: Sequence[Step]) -> None:
    """One step of the average, in place, after the optimizer's update: changes weights, gaps and sums."""
    if isinstance(batch, JointBatch):
        gathered, gathered_states, gathered_steps = matrix(batch, states, steps)
        average_(gathered, gathered_states, gathered_steps)
        batch.scatter_(gathered.tensors[0])
        batch.joint.scatter_([state[GAP] for state in states], gathered_states[0][GAP])
        if gathered_states[0][STEPS].ndim:
            batch.joint.scatter_([state[STEPS] for state in states], gathered_states[0][STEPS])
        else:
            torch._foreach_copy_([state[STEPS] for state in states], [gathered_states[0][STEPS]] * len(states))
        return
    sums = [state[STEPS] for state in states]
    if scalars := [(s, step.size) for s, step in zip(sums, steps, strict=True) if not s.ndim]:
        torch._foreach_add_(*map(list, zip(*scalars, strict=True)))
    gaps = [state[GAP] for state in states]
    if batch.is_soft_threshold and len(scalars) == len(sums):
        batch.operations.threshold_latent_(batch.tensors, gaps, torch.stack(sums) * batch.coefficients[0])
    elif batch.is_soft_threshold and (fused := adaptive(steps)) is not None:
        batch.operations.threshold_latent_each_(batch.tensors, gaps, sums, *fused, batch.coefficients[0])
    else:
        flat, flat_steps = as_one_tensor(batch, steps) if len(scalars) in (0, len(sums)) else (batch, list(steps))
        if flat is batch:
            for terms, gap, s, step in zip(batch.each, gaps, sums, steps, strict=True):
                _average_tensor_(batch, terms, gap, s, step, stepped=not s.ndim)
            return
        (state,) = joined_states(batch, states)
        _average_tensor_(flat, flat.terms, state[GAP], state[STEPS], flat_steps[0], stepped=bool(scalars))
        torch._foreach_copy_(batch.tensors, split_like(flat.tensors[0], batch.tensors))
        torch._foreach_copy_(gaps, split_like(state[GAP], gaps))
        if not scalars:
            torch._foreach_copy_(sums, split_like(state[STEPS], sums))


def _average_tensor_(
    batch: TensorBatch, terms: list[Term], gap: Tensor, sums: Tensor, step: Step, *, stepped: bool
) -> None:
    """`average_` for one tensor of a batch.

    Args:
        batch: the batch.
        terms: the terms of the tensor.
        gap: its gap.
        sums: its sum of steps: 0-dim, a number for each group, or one for each element.
        step: its step.
        stepped: whether `sums` includes the step already, which is then the same number for all elements of a group.
    """
    terms = [term for term in terms if not term.inactive]
    if stepped:
        done = (batch.compiled and compiled_groups.scale_groups_(terms, gap, sums)) or _scale_groups_(terms, gap, sums)
    else:
        done = batch.compiled and compiled_groups.average_groups_(terms, gap, sums, step)
        done = done or _average_groups_(terms, gap, sums, step)
    if done:
        return
    for some, take in chunked_terms(terms):
        part = step.sliced(take)
        if not stepped:
            take(sums).add_(counted(some, part))
        _average_(some, take(gap), take(sums), part)


def _average_groups_(terms: list[Term], gap: Tensor, sums: Tensor, step: Step) -> bool:
    """`average_` in place for a group lasso with a step for each element; returns False if it does not apply."""
    fused = adaptive([step])
    if fused is None or step.max_change is None or not is_group_lasso(terms, gap, sums, *fused[0]):
        return False
    (moment,), numerator, eps, max_change = fused
    most = quotient(numerator, max_change)
    buffers: list[Tensor | None] = [None, None, None]
    for part in group_chunks(terms[0], gap, sums, moment):
        w, d, s, m = part.views
        buffers = [buffer_like(w, buffer) for buffer in buffers]
        # Each element adds min(numerator / (sqrt(m) + eps), max_change / slope) to its sum. The slope of the penalty is
        # radius * |w| / norm, or lam in a group of zeros.
        norm = part.grouping.norm(w)
        zero = norm == 0
        slopes = torch.mul(w, (most * part.radius / norm).masked_fill_(zero, 0), out=buffers[0]).abs_()
        size = torch.sqrt(m, out=buffers[1]).add_(eps)
        s.addcdiv_(numerator, torch.maximum(size, slopes, out=size).clamp_min_(zero * (most * part.lam)))
        latent = w.add_(d)
        r = torch.mul(s, part.radius, out=buffers[2])
        factors = shrink_factors(latent, r, part.grouping, (size, slopes))
        torch.addcmul(latent, latent, factors, value=-1, out=d)
        if part.grouping.all_known(m > 0):
            latent.sub_(d)
            continue
        # An element that has had no gradient yet shrinks by at most max_change; its gap and sum stay 0.
        seen = torch.sign(m, out=size)
        latent.sub_(torch.where(m > 0, d, d.clamp(-max_change, max_change)))  # type: ignore[arg-type]
        d.mul_(seen)
        s.mul_(seen)
    return True


def _scale_groups_(terms: list[Term], gap: Tensor, sums: Tensor) -> bool:
    """`average_` in place for a term over groups whose step is in `sums`; returns False if it does not apply."""
    if not has_group_views(terms, gap) or terms[0].tensor.dtype != gap.dtype:
        return False
    for part in group_chunks(terms[0], gap):
        w, d = part.views
        u = part.grouping.norm(w.add_(d)).div_(math.sqrt(part.count))
        factors = terms[0].penalty.rho_prox(u, sums * part.lam) / u.masked_fill(u == 0, math.inf)
        torch.addcmul(w, w, factors, value=-1, out=d)
        w.mul_(factors)
    return True


def joined_states(batch: TensorBatch, states: Sequence[State]) -> list[State]:
    """The gaps and sums of several tensors as those of `batch.joined()`."""
    gaps, sums = ([state[name] for state in states] for name in (GAP, STEPS))
    if all(s.ndim for s in sums):
        return [{GAP: batch.join(gaps), STEPS: batch.join(sums)}]
    if any(s.ndim for s in sums):
        return [{GAP: batch.join(gaps), STEPS: batch.join([s.expand_as(w) for s, w in zip(sums, gaps, strict=True)])}]
    (spread,) = batch.repeat(torch.stack(sums))
    return [{GAP: batch.join(gaps), STEPS: spread}]


def matrix(
    batch: JointBatch, states: Sequence[State], steps: Sequence[Step]
) -> tuple[TensorBatch, list[State], list[Step]]:
    """The matrix of the groups of a batch, its gaps and sums, and its step."""
    step = batch.step(steps)
    if step.by_element or any(state[STEPS].ndim for state in states):
        for w, state in zip(batch.tensors, states, strict=True):
            _spread_steps(w, state)
        sums = batch.joint.gather([state[STEPS] for state in states])
    else:  # the tensors were stepped together, so their sums are equal
        sums = states[0][STEPS].clone()
    return batch.matrix(), [{GAP: batch.joint.gather([state[GAP] for state in states]), STEPS: sums}], [step]


def _average_(terms: list[Term], gap: Tensor, sums: Tensor, step: Step) -> None:
    """`average_` for a piece of a tensor, after the step was added to `sums`."""
    w = terms[0].tensor
    latent = w + gap
    new = prox([replace(term, tensor=latent) for term in terms], sums)
    unseen = step.unseen
    if unseen is not None:
        new = torch.where(unseen, _limited(terms, latent, new, step.max_change), new)
    w.copy_(new)
    gap.copy_(latent - w)
    if unseen is not None:
        local(gap).masked_fill_(local(unseen), 0)
        local(sums).masked_fill_(local(unseen), 0)


def _limited(terms: list[Term], old: Tensor, new: Tensor, max_change: float | Tensor | None) -> Tensor:
    if isinstance(terms[0].grouping, NM):
        return new
    new = clip_change(old, new, max_change, Elements())
    return new.clamp_min(0) if any(term.penalty.positive for term in terms) else new


def counted(terms: list[Term], step: Step) -> float | Tensor:
    """The amount that a step adds to the sum: `s`, limited so that no weight shrinks by more than `max_change`."""
    return step.size if step.max_change is None else _counted(terms, step.size, step.max_change)


@on_local_shards
def _counted(terms: list[Term], size: Tensor, max_change: float | Tensor) -> Tensor:
    first, *rest = map(_slope, terms)
    slope = sum(rest, start=first).clamp_min(torch.finfo(size.dtype).tiny)
    return torch.minimum(size, max_change / slope)


def _slope(term: Term) -> Tensor:
    """The amount by which a unit step would shrink each element."""
    x = term.offset(term.tensor)
    at_zero = term.elementwise_lam * x.new_ones((), dtype=working_dtype(x.dtype))
    if term.penalty.coefficients is None:  # its slope is largest at zero, or unbounded
        return at_zero
    if not term.grouped:
        slope = term.linear * at_zero
        return slope + 2 * term.quadratic * at_zero * x.abs().to(at_zero.dtype) if term.quadratic else slope
    grouping: Any = term.grouping  # not singular values: check_prox refuses them if steps differ by coordinate
    u, rebuild = grouping.polar(x)
    slope = rebuild(term.scaled_lam * term.penalty.rho_grad(u)).abs_()
    return torch.where(grouping.spread(u == 0, x), term.linear * at_zero, slope)


def latent_terms(terms: list[Term], gap: Tensor) -> list[Term]:
    """The terms at the latent weights."""
    latent = terms[0].tensor + gap
    return [replace(term, tensor=latent) for term in terms]
