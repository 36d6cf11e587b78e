"""The dual mode: regularized dual averaging (RDA, Xiao 2010), by the gap that the penalty keeps each weight at.

`latent = w + d`, `S += s`, `w = prox(latent, S*lam)`, `d = latent - w` after each update of the visible weights `w`.
The gap `d` and the sum of the steps `S` lie in the optimizer's state of the parameter, in float32 at least.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import multi_tensor
from .groups import Elements, working_dtype
from .metric import RootStep
from .prox import Sized, limit, prox, scale_, scales_in_place
from .sharding import local, on_parts
from .terms import Bundle, Term, pieces

__all__ = ["GAP", "STEPS", "average_", "counted", "drop_others", "latent_terms", "make_gap", "reset"]

GAP = "gap"
STEPS = "gap_steps"

State = dict[str, Any]


def make_gap(parameter: Tensor, state: State, step: Sized) -> None:
    """Put a gap of 0 and no steps into the state of a parameter, where there are none that fit."""
    real = working_dtype(parameter.dtype)
    if GAP not in state:
        state[GAP] = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, real))
        state[STEPS] = torch.zeros((), dtype=real, device=parameter.device)
    for name, dtype in ((GAP, torch.promote_types(parameter.dtype, real)), (STEPS, real)):
        if state[name].dtype != dtype or state[name].device != parameter.device:  # of a model that was cast, or moved
            state[name] = state[name].to(parameter.device, dtype)
    if step.by_element and not state[STEPS].ndim:
        state[STEPS] = torch.zeros_like(parameter, dtype=real) + state[STEPS]


def reset(states: Sequence[State]) -> None:
    """Begin the average anew at the visible weights."""
    kept = [local(state[name]) for state in states for name in (GAP, STEPS) if name in state]
    if kept:
        torch._foreach_zero_(kept)


def drop_others(states: Sequence[State], keep: bool) -> None:
    """Drop from loaded states what does not go on: of earlier versions, and the gaps where the mode is another."""
    names = ("latent", "latent_steps") if keep else ("latent", "latent_steps", GAP, STEPS)
    dropped = {name for state in states for name in names if state.pop(name, None) is not None}
    if "latent" in dropped and keep:
        warnings.warn(
            "the state is of an earlier version, which kept latent weights in place of gaps: they are dropped, and the "
            "average of the dual mode begins anew at the weights as they are",
            stacklevel=3,
        )


def average_(bundle: Bundle, states: Sequence[State], steps: Sequence[Sized]) -> None:
    """One step of the average, in place: of the weights, which the optimizer has moved, the gaps and the sums."""
    sums = [state[STEPS] for state in states]
    if scalars := [(s, step.size) for s, step in zip(sums, steps, strict=True) if not s.ndim]:
        torch._foreach_add_(*map(list, zip(*scalars, strict=True)))
    gaps = [state[GAP] for state in states]
    if bundle.only_thresholds and len(scalars) == len(sums):
        multi_tensor.threshold_latent_(bundle.tensors, gaps, torch.stack(sums) * bundle.coefficients[0])
    elif bundle.only_thresholds and (roots := [step for step in steps if isinstance(step, RootStep)]):
        multi_tensor.threshold_latent_each_(
            bundle.tensors,
            gaps,
            sums,
            [step.moment for step in roots],
            torch.stack([step.numerator for step in roots]),
            torch.stack([step.eps for step in roots]),
            roots[0].cap,
            bundle.coefficients[0],
        )
    else:
        for terms, gap, s, step in zip(bundle.each, gaps, sums, steps, strict=True):
            for some, take in pieces([term for term in terms if not term.off]):
                _average_(some, take(gap), take(s), step.part(take))


def _average_(terms: list[Term], gap: Tensor, sums: Tensor, step: Sized) -> None:
    """`average_` of a piece of a tensor."""
    w = terms[0].tensor
    if not sums.ndim and w.dtype == gap.dtype and scales_in_place(terms):
        w.copy_(gap.add_(w))
        scale_(terms[0], w, sums * terms[0].scaled_lam)
        gap.sub_(w)
        return
    if sums.ndim:
        sums.add_(counted(terms, step))
    latent = w + gap
    new = prox([replace(term, tensor=latent) for term in terms], sums)
    unseen = step.unseen
    if unseen is not None:
        new = torch.where(unseen, _limited(terms, latent, new, step.cap), new)
    w.copy_(new)
    gap.copy_(latent - w)
    if unseen is not None:
        local(gap).masked_fill_(local(unseen), 0)
        local(sums).masked_fill_(local(unseen), 0)


def _limited(terms: list[Term], old: Tensor, new: Tensor, cap: float | Tensor | None) -> Tensor:
    new = limit(old, new, cap, Elements())
    return new.clamp_min(0) if any(term.kind.positive for term in terms) else new


def counted(terms: list[Term], step: Sized) -> float | Tensor:
    """What a step adds to the sum: `s`, but no more than shrinks a weight by the cap of the step."""
    return step.size if step.cap is None else _counted(terms, step.size, step.cap)


@on_parts
def _counted(terms: list[Term], size: Tensor, cap: float | Tensor) -> Tensor:
    slope: Any = sum(_slope(term) for term in terms)
    return torch.minimum(size, cap / slope.clamp_min(torch.finfo(size.dtype).tiny))


def _slope(term: Term) -> Tensor:
    """By how much a unit step would shrink each element."""
    x = term.offset(term.tensor)
    at_zero = term.elementwise_lam * x.new_ones((), dtype=working_dtype(x.dtype))
    if term.kind.coefficients is None:  # its slope is largest at zero, or has no bound
        return at_zero.expand_as(x)
    if not term.linear:
        return 2 * term.quadratic * at_zero * x.abs()
    grouping: Any = term.grouping  # no singular values: those are refused where steps differ by coordinate
    zero = grouping.spread(term.grouping.polar(x)[0] == 0, x)
    return torch.where(zero, term.linear * at_zero, term.grad(term.tensor).abs())


def latent_terms(terms: list[Term], gap: Tensor) -> list[Term]:
    """The terms, at the latent weights."""
    latent = terms[0].tensor + gap
    return [replace(term, tensor=latent) for term in terms]
