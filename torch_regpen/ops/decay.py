"""The decoupled step."""

from __future__ import annotations

from torch import Tensor

from .. import functional as F
from . import foreach
from .batches import JointBatch, TensorBatch
from .sharded import on_local_shards
from .terms import Term, TermPenalty, chunked_terms


def decay_(batch: TensorBatch, step: float | Tensor) -> None:
    """The decoupled subgradient step of the terms of each tensor, in place; see `decayed`."""
    if isinstance(batch, JointBatch):
        matrix = batch.matrix()
        decay_(matrix, step)
        batch.scatter_(matrix.tensors[0])
        return
    if batch.has_fused_prox:
        linear, quadratic = batch.coefficients
        if quadratic:
            factor = 1 - step * (2 * quadratic)
            foreach.mul_(batch.tensors, factor.clamp_min(0) if isinstance(factor, Tensor) else max(factor, 0.0))
        if linear:
            foreach.soft_threshold_(batch.tensors, step * linear)
        return
    for terms in batch.each:
        for some, _ in chunked_terms([term for term in terms if not term.inactive]):
            some[0].tensor.copy_(decayed(some, step))


@on_local_shards
def decayed(terms: list[Term], step: float | Tensor) -> Tensor:
    """`w - step * (subgradient of the terms)`, in which no element (group) crosses zero: it stops there."""
    w = terms[0].tensor
    if len(terms) == 1:
        term = terms[0]
        t = step * term.scaled_lam
        v = F.prox(lambda u: _descend(u, t, term.penalty), term.offset(w), term.grouping)
        return v if term.center is None else v + term.center
    v = w - step * sum(term.grad(w) for term in terms)
    if any(term.center is not None for term in terms):
        return v
    crossed = (v.sgn() * w.sgn().conj()).real < 0  # of v * w itself, tiny numbers would lose the sign
    return v.masked_fill(crossed, 0)


def _descend(u: Tensor, t: float | Tensor, penalty: TermPenalty) -> Tensor:
    return (u - t * penalty.rho_grad(u).masked_fill(u == 0, 0)).clamp_min(0)
