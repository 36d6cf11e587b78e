"""Add the (sub)gradient of a penalty to `.grad`, in place and without autograd."""

from __future__ import annotations

from torch import Tensor

from . import foreach
from .batches import JointBatch, TensorBatch
from .sharded import on_local_shards
from .terms import Term

__all__ = ["add_grad_", "add_grad_and_value_", "check_grad"]


def check_grad(terms: list[Term]) -> None:
    """Raise `ValueError` if a penalty has no gradient that an optimizer can use."""
    for term in terms:
        name = type(term.penalty).__name__
        if not term.penalty.has_grad():
            raise ValueError(f"{name} has no gradient that an optimizer can use; use mode='proximal' or 'dual'")
        if term.penalty.positive:
            raise ValueError(
                f"{name}(positive=True) keeps weights non-negative with its prox, which a gradient cannot do; use "
                "mode='proximal' or 'dual'"
            )


def add_grad_(batch: TensorBatch, *, ascend: bool = False) -> None:
    """`grad += (sub)gradient` for each tensor; `grad -= (sub)gradient` if `ascend` (the optimizer maximizes)."""
    if batch.inactive:
        return
    sign = -1 if ascend else 1
    if isinstance(batch, JointBatch):
        active = [term for term in batch.matrix().terms if not term.inactive]
        batch.joint.add_(batch.grads, _grad(active), sign)
    elif batch.elementwise:
        linear, quadratic = batch.coefficients
        batch.operations.add_(batch.grads, batch.tensors, sign * linear, sign * quadratic)
    else:
        for terms, grad in zip(batch.each, batch.grads, strict=True):
            grad.add_(_grad([term for term in terms if not term.inactive]), alpha=sign)


def add_grad_and_value_(batch: TensorBatch) -> Tensor:
    """`add_grad_` for a batch that `is_local`; returns the value, computed in the same pass over the weights."""
    return foreach.add_with_total_(batch.grads, batch.tensors, *batch.coefficients)


@on_local_shards
def _grad(terms: list[Term]) -> Tensor:
    first, *rest = (term.grad(term.tensor) for term in terms)
    return sum(rest, start=first)
