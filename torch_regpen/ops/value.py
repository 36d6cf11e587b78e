"""The penalty as a differentiable term of the loss, with one autograd node for each batch of tensors.

With a single node for all batches, all gradients would exist at once, which needs more memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import full_tensor
from ..groups.grouping import working_dtype
from . import foreach
from .batches import JointBatch, TensorBatch, batches
from .gradient import check_grad
from .sharded import ShardedTerms, total_over_ranks
from .terms import Term, chunked_terms, gathered

__all__ = ["check_differentiated", "mean_omega", "sum_values", "total_value"]


def check_differentiated(work: Iterable[TensorBatch]) -> None:
    """Raise `RuntimeError` if torch.func differentiates, but not with respect to the penalized tensors.

    The penalty would then be a constant, and its gradient would be silently missing.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    functorch: Any = torch._C._functorch
    differentiating = {functorch.TransformType.Grad, functorch.TransformType.Jvp}
    if not any(interpreter.key() in differentiating for interpreter in functorch.get_interpreter_stack() or ()):
        return
    if not any(functorch.is_functorch_wrapped_tensor(w) for batch in work for w in batch.tensors):
        raise RuntimeError(
            "penalty() was called under a transform of torch.func that does not differentiate with respect to the "
            "penalized parameters, so it would be a constant. Make the penalty a part of the module that "
            "functional_call calls, and call it in the forward of that module"
        )


def total_value(work: Iterable[TensorBatch]) -> Tensor:
    """The sum of at least one term: a 0-dim tensor, float64 if any tensor is, else float32, on the first device."""
    work = list(work)
    local_batches, sharded_terms = _split_sharded(work)
    if torch.compiler.is_compiling():
        # If lam were first read inside one autograd node, Dynamo could not read it in the others.
        _ = [term.lam for batch in local_batches for term in batch.terms]
    sums = [_value(batch) for batch in local_batches]
    if sharded_terms:
        with _no_autocast(work[0].tensors[0]):
            value, known = total_over_ranks(
                sharded_terms, lambda terms: foreach.summed([_forward(b, b.tensors) for b in batches(terms)])
            )
        sums += [value, *(_GradientOnly.apply(b, *b.tensors) for b in batches(known))]
    return sum_values(sums, work)


def sum_values(sums: list[Tensor], work: list[TensorBatch]) -> Tensor:
    """Add up partial sums, with the dtype and device of `total_value`."""
    dtypes = {working_dtype(dtype) for dtype in {w.dtype for batch in work for w in batch.tensors}}
    device, dtype = work[0].tensors[0].device, torch.float64 if torch.float64 in dtypes else torch.float32
    return foreach.summed([s.to(device, dtype) for s in sums])


@torch.no_grad()
def mean_omega(terms: list[Term]) -> Tensor:
    """`Omega(w) / n` of one penalty on a tensor (or units) of `n` elements, over all ranks; 0-dim."""
    terms = gathered(terms)

    def total(of: list[Term]) -> Tensor:
        return foreach.summed([some[0].omega() for term in of for some, _ in chunked_terms([term])])

    sharded = ShardedTerms(terms)
    value = total(sharded.terms) if sharded.along is None else total_over_ranks([sharded], total)[0]
    return value / max(terms[0].tensor.numel(), 1)


def _split_sharded(work: list[TensorBatch]) -> tuple[list[TensorBatch], list[ShardedTerms]]:
    """Split into batches that this rank can sum alone, and sharded terms, which need sums over ranks."""
    local_batches: list[TensorBatch] = []
    sharded_terms: list[ShardedTerms] = []
    for batch in work:
        if isinstance(batch, JointBatch):
            local_batches.append(batch.matrix())
            continue
        if batch.is_local:
            local_batches.append(batch)
            continue
        for sharded in map(ShardedTerms, batch.each):
            if sharded.along is None:
                local_batches.append(replace(batch, each=[sharded.terms], tensors=[sharded.terms[0].tensor]))
            else:
                sharded_terms.append(sharded)
    return local_batches, sharded_terms


def _value(batch: TensorBatch) -> Tensor:
    ws = batch.tensors
    if not torch.compiler.is_compiling():
        function = _EagerValue if torch._C._are_functorch_transforms_active() else _FastValue
        return function.apply(batch, *ws)  # type: ignore[no-any-return]
    differentiable = torch.is_grad_enabled() and any(w.requires_grad for w in ws)
    if differentiable:
        _mark_seen(batch)
        check_grad(batch.terms)
    if batch.elementwise or not differentiable:
        return _Value.forward(batch, *ws)  # the compiler differentiates this itself
    return _Value.apply(batch, *ws)  # type: ignore[no-any-return]


class _Value(torch.autograd.Function):
    """The sum of the terms of a batch, at the tensors `ws`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(batch: TensorBatch, *ws: Tensor) -> Tensor:
        with _no_autocast(ws[0]):
            return _forward(batch, ws)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.batch, *ws = inputs
        ctx.save_for_backward(*ws)
        ctx.save_for_forward(*ws)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, *_grads(ctx.batch, ctx.saved_tensors, g)


class _EagerValue(_Value):
    """`_Value` with parts that torch.compile does not trace: forward-mode AD, and a backward that sets `seen`."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        _mark_seen(ctx.batch)
        check_grad(ctx.batch.terms)
        g = full_tensor(g)  # a DTensor if the loss is one
        ws = ctx.saved_tensors
        differentiated = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        batched = torch._C._functorch.is_legacy_batchedtensor(g)
        if differentiated or batched or not ctx.batch.elementwise or ws[0].dtype != working_dtype(ws[0].dtype):
            return None, *_grads(ctx.batch, ws, g)
        linear, quadratic = ctx.batch.coefficients
        factors = g * linear if linear or not quadratic else None, g * quadratic if quadratic else None
        return None, *ctx.batch.operations.gradients(ws, *factors)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        products = [
            (_widest_grad(terms, w).conj() * tangent).real.sum()
            for terms, w, tangent in zip(ctx.batch.each, ctx.saved_tensors, tangents, strict=True)
            if tangent is not None
        ]
        return torch.stack(products).sum()


class _FastValue(_EagerValue):
    """`_EagerValue` outside torch.func, without `setup_context`, which makes torch inspect a signature per call."""

    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, batch: TensorBatch, *ws: Tensor) -> Tensor:  # type: ignore[override]
        value = _Value.forward(batch, *ws)
        _Value.setup_context(ctx, (batch, *ws), value)
        return value


class _GradientOnly(_EagerValue):
    """Value 0 with the gradient of the terms, for sharded tensors. Their value is summed over ranks separately."""

    @staticmethod
    def forward(batch: TensorBatch, *ws: Tensor) -> Tensor:
        return torch.zeros((), dtype=working_dtype(ws[0].dtype), device=ws[0].device)


def _forward(batch: TensorBatch, ws: Iterable[Tensor]) -> Tensor:
    if batch.elementwise:
        return batch.operations.total(list(ws), *batch.coefficients)  # type: ignore[no-any-return]
    return foreach.summed([term.value(w) for terms, w in zip(batch.each, ws, strict=True) for term in terms])


def _mark_seen(batch: TensorBatch) -> None:
    for term in batch.terms:
        term.penalty.seen["in_loss"] = True


def _grads(batch: TensorBatch, ws: Iterable[Tensor], g: Tensor) -> list[Tensor]:
    """`g` times the gradient of the terms, rounded to the dtype of `w` last, because `g` may contain a loss scale."""
    with _no_autocast(g):
        return [(_widest_grad(terms, w) * g).to(w.dtype) for terms, w in zip(batch.each, ws, strict=True)]


def _widest_grad(terms: list[Term], w: Tensor) -> Tensor:
    """The gradient of the terms of one tensor, in the working dtype (not rounded to half precision)."""
    check_grad(terms)
    x = w.to(torch.promote_types(w.dtype, working_dtype(w.dtype)))
    first, *rest = (term.grad(x) for term in terms)
    return sum(rest, start=first)


def _no_autocast(w: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast for the device of `w`."""
    kind = w.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()
