"""The penalty as a differentiable term of the loss: an autograd node for each large tensor or pack of small ones.

A node for all would write all gradients before the first is freed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import full_tensor
from ..groups.grouping import working_dtype
from . import foreach
from .batches import JointBatch, TensorBatch, batches
from .gradient import check_grad
from .sharded import ShardedTerms, total_over_ranks
from .terms import Term

__all__ = ["check_differentiated"]


def check_differentiated(work: Iterable[TensorBatch]) -> None:
    """Raise `RuntimeError` where torch.func differentiates, and none of the tensors is what it differentiates by.

    The penalty would be a constant, and its gradient be missing.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    functorch: Any = torch._C._functorch
    differentiating = {functorch.TransformType.Grad, functorch.TransformType.Jvp}
    if not any(interpreter.key() in differentiating for interpreter in functorch.get_interpreter_stack() or ()):
        return
    if not any(functorch.is_functorch_wrapped_tensor(w) for batch in work for w in batch.tensors):
        raise RuntimeError(
            "penalty() was called under a transform of torch.func that differentiates other tensors than the "
            "penalized parameters, and would be a constant. Make the penalty a part of the module that functional_call "
            "calls, and call it in that module's forward"
        )


def total_value(work: Iterable[TensorBatch]) -> Tensor:
    """The sum of the terms, at least one: 0-dim, float64 where any tensor is, else float32, on the first device."""
    work = list(work)
    here, cut = _split_sharded(work)
    if torch.compiler.is_compiling():
        _ = [term.lam for batch in here for term in batch.terms]  # first read in one node, no other could read it
    sums = [_value(batch) for batch in here]
    if cut:
        with _no_autocast(work[0].tensors[0]):
            value, known = total_over_ranks(
                cut, lambda terms: foreach.summed([_forward(b, b.tensors) for b in batches(terms)])
            )
        sums += [value, *(_GradientOnly.apply(b, *b.tensors) for b in batches(known))]
    return sum_values(sums, work)


def sum_values(sums: list[Tensor], work: list[TensorBatch]) -> Tensor:
    """The sum of sums of the terms, as `total` has it."""
    dtypes = {working_dtype(dtype) for dtype in {w.dtype for batch in work for w in batch.tensors}}
    device, dtype = work[0].tensors[0].device, torch.float64 if torch.float64 in dtypes else torch.float32
    return foreach.summed([s.to(device, dtype) for s in sums])


def _split_sharded(work: list[TensorBatch]) -> tuple[list[TensorBatch], list[ShardedTerms]]:
    """What this rank has the whole of, and the parts of tensors that are cut."""
    here, cut = [], []
    for batch in work:
        if isinstance(batch, JointBatch):
            here.append(batch.matrix())
            continue
        if batch.is_local:
            here.append(batch)
            continue
        for sharded in map(ShardedTerms, batch.each):
            if sharded.along is None:
                here += batches(sharded.terms)
            else:
                cut.append(sharded)
    return here, cut


def _value(batch: TensorBatch) -> Tensor:
    ws = batch.tensors
    if not torch.compiler.is_compiling():
        function = _EagerValue if torch._C._are_functorch_transforms_active() else _FastValue
        return function.apply(batch, *ws)  # type: ignore[no-any-return]
    differentiable = torch.is_grad_enabled() and any(w.requires_grad for w in ws)
    if differentiable:
        _mark(batch)
        check_grad(batch.terms)
    if batch.elementwise or not differentiable:
        return _Value.forward(batch, *ws)  # the compiler differentiates it as well
    return _Value.apply(batch, *ws)  # type: ignore[no-any-return]


class _Value(torch.autograd.Function):
    """The sum of the terms at the tensors given beside them."""

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
    """The same with what torch.compile does not trace: forward mode, and a backward that leaves a mark."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        _mark(ctx.batch)
        check_grad(ctx.batch.terms)
        g = full_tensor(g)  # the loss that it was added to may be a DTensor
        ws = ctx.saved_tensors
        differentiated = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        batched = torch._C._functorch.is_legacy_batchedtensor(g)
        if differentiated or batched or not ctx.batch.elementwise or ws[0].dtype != working_dtype(ws[0].dtype):
            return None, *_grads(ctx.batch, ws, g)
        linear, quadratic = ctx.batch.coefficients
        factors = g * linear if linear or not quadratic else None, g * quadratic if quadratic else None
        return None, *foreach.gradients(ws, *factors)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        products = [
            (_widest_grad(terms, w).conj() * tangent).real.sum()
            for terms, w, tangent in zip(ctx.batch.each, ctx.saved_tensors, tangents, strict=True)
            if tangent is not None
        ]
        return torch.stack(products).sum()


class _FastValue(_EagerValue):
    """The same without transforms of torch.func: for a `setup_context`, torch inspects a signature at each call."""

    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, batch: TensorBatch, *ws: Tensor) -> Tensor:  # type: ignore[override]
        value = _Value.forward(batch, *ws)
        _Value.setup_context(ctx, (batch, *ws), value)
        return value


class _GradientOnly(_EagerValue):
    """Zero, with the gradient of the terms: of sharded tensors, whose value is summed over the ranks beside it."""

    @staticmethod
    def forward(batch: TensorBatch, *ws: Tensor) -> Tensor:
        return torch.zeros((), dtype=working_dtype(ws[0].dtype), device=ws[0].device)


def _forward(batch: TensorBatch, ws: Iterable[Tensor]) -> Tensor:
    if batch.elementwise:
        return foreach.total(list(ws), *batch.coefficients)
    return foreach.summed([term.value(w) for terms, w in zip(batch.each, ws, strict=True) for term in terms])


def _mark(batch: TensorBatch) -> None:
    for term in batch.terms:
        term.penalty.seen["in_loss"] = True


def _grads(batch: TensorBatch, ws: Iterable[Tensor], g: Tensor) -> list[Tensor]:
    """`g * gradient of the terms`, rounded to the dtype of `w` at the end: `g` may be a loss scale."""
    with _no_autocast(g):
        return [(_widest_grad(terms, w) * g).to(w.dtype) for terms, w in zip(batch.each, ws, strict=True)]


def _widest_grad(terms: list[Term], w: Tensor) -> Tensor:
    """The gradient of the terms of one tensor, in the dtype in which they are computed."""
    check_grad(terms)
    x = w.to(torch.promote_types(w.dtype, working_dtype(w.dtype)))
    first, *rest = (term.grad(x) for term in terms)
    return sum(rest, start=first)


def _no_autocast(w: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off, where it is on for the device of `w`."""
    kind = w.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()
