"""The step of mode "decoupled"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.shards import local
from ..functional import magnitudes, soft_threshold
from . import foreach
from .batches import JointBatch, TensorBatch
from .chunks import Scalar, joined, split_like, zip_chunks
from .sharded import on_local_shards
from .step import is_scalar
from .terms import Term, TermPenalty, chunked_terms

__all__ = ["Combination", "decay_", "decay_where_inward_"]

Combination = list[tuple[Scalar, Tensor]]  # a sum of tensors, each with its coefficient


def decay_(batch: TensorBatch, step: Scalar) -> None:
    """The decoupled subgradient step of the terms of each tensor, in place; see `decayed`.

    Args:
        batch: the tensors.
        step: the step size; for a joint batch, it may be a tensor of the shape of the matrix.
    """
    if isinstance(batch, JointBatch):
        matrix = batch.matrix()
        decay_(matrix, step)
        batch.scatter_(matrix.tensors[0])
        return
    if batch.has_fused_prox and is_scalar(step):
        linear, quadratic = batch.coefficients
        if quadratic:
            foreach.mul_(batch.tensors, _shrink_factor(step, quadratic))
        if linear:
            foreach.soft_threshold_(batch.tensors, step * linear)
        return
    for terms in batch.each:
        terms = [term for term in terms if not term.inactive]
        if _pull_to_center_(terms, step):
            continue
        for some, take in chunked_terms(terms):
            some[0].tensor.copy_(decayed(some, take(step)))


def _pull_to_center_(terms: list[Term], step: Scalar) -> bool:
    """`decayed` of a single L2 around a center, in place; returns False, and does nothing, for other terms."""
    if len(terms) != 1 or isinstance(step, Tensor) or not terms[0].uniform_offset:
        return False
    term = terms[0]
    if term.center is None or term.center.dtype != term.tensor.dtype or term.linear or not term.quadratic:
        return False
    local(term.tensor).lerp_(local(term.center), 1 - _shrink_factor(step, term.lam * term.quadratic))
    return True


def decay_where_inward_(batch: TensorBatch, step: Scalar, updates: Sequence[Combination]) -> None:
    """`decay_` of the elements whose update does not point away from zero (from the center): `u * w >= 0`.

    Args:
        batch: the tensors.
        step: the step size; see `decay_`.
        updates: for each tensor, a combination with the sign of its update `u`, in `w -= u`.
    """
    if isinstance(batch, JointBatch):
        totals = [_combined([factor for factor, _ in update], [x for _, x in update]) for update in updates]
        matrix = batch.matrix()
        decay_where_inward_(matrix, step, [[(1.0, batch.joint.gather(totals))]])
        batch.scatter_(matrix.tensors[0])
        return
    if batch.has_fused_prox and is_scalar(step) and len({len(update) for update in updates}) == 1:
        linear, quadratic = batch.coefficients
        factors = [factor for factor, _ in updates[0]]  # the same for all tensors of a param_group in the same state
        columns = [[update[i][1] for update in updates] for i in range(len(factors))]
        for ws, *parts in zip_chunks(batch.tensors, *columns):
            w = joined(ws)
            inward = _combined(factors, [joined(part) for part in parts]).mul_(w.sign()).sign_().add_(1).clamp_max_(1)
            v = w * _shrink_factor(step, quadratic) if quadratic else w
            v = soft_threshold(v, step * linear) if linear else v
            # At 0 and 1, lerp returns exactly w and v; where() takes ten times as long on a random mask.
            x = w.lerp_(v, inward.to(w.dtype))
            if len(ws) > 1:
                torch._foreach_copy_(ws, split_like(x, ws))
        return
    for terms, update in zip(batch.each, updates, strict=True):
        factors = [factor for factor, _ in update]
        for some, take in chunked_terms([term for term in terms if not term.inactive]):
            some[0].tensor.copy_(decayed(some, take(step), factors, *(take(x) for _, x in update)))


@on_local_shards
def decayed(terms: list[Term], step: Scalar, factors: Sequence[Scalar] = (), *tensors: Tensor) -> Tensor:
    """`w - step * (subgradient of the terms)`, but an element (group) that would cross zero stops there.

    With several terms, or a step for each element, each element stops separately.

    If `factors` and `tensors` of an update are given, elements whose update points away from the center do not change.
    """
    w = terms[0].tensor
    outward = None
    if factors:
        total = _combined(factors, tensors)
        outward = [~_inward(total, term.offset(w)) for term in terms]
    if len(terms) == 1 and is_scalar(step):
        term = terms[0]
        t = step * term.scaled_lam
        v = magnitudes.prox(lambda u: _descend(u, t, term.penalty), term.offset(w), term.grouping)
        v = v if term.center is None else v + term.center
        return v if outward is None else torch.where(outward[0], w, v)
    grads = [term.grad(w) for term in terms]
    if outward is not None:
        grads = [grad.masked_fill(away, 0) for grad, away in zip(grads, outward, strict=True)]
    v = w - step * sum(grads)
    if any(term.center is not None for term in terms):
        return v
    crossed = (v.sgn() * w.sgn().conj()).real < 0  # v * w would underflow for tiny numbers
    return v.masked_fill(crossed, 0)


def _descend(u: Tensor, t: Scalar, penalty: TermPenalty) -> Tensor:
    return (u - t * penalty.rho_grad(u).masked_fill(u == 0, 0)).clamp_min(0)


def _shrink_factor(step: Scalar, quadratic: float) -> Scalar:
    factor = 1 - step * (2 * quadratic)
    return factor.clamp_min(0) if isinstance(factor, Tensor) else max(factor, 0.0)


def _combined(factors: Sequence[Scalar], tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0] * factors[0]
    for factor, x in zip(factors[1:], tensors[1:], strict=True):
        total = total.addcmul_(x, factor) if isinstance(factor, Tensor) else total.add_(x, alpha=factor)
    return total


def _inward(update: Tensor, offset: Tensor) -> Tensor:
    """Whether `update * offset >= 0`. It uses the sign of the offset, because tiny products would underflow to 0."""
    return (update * offset.sgn().conj()).real >= 0
