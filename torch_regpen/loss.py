"""The penalty as a differentiable term of the loss: an autograd node for each large tensor or pack of small ones.

A node for all would write all gradients before the first is freed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import multi_tensor, sharding
from .groups import working_dtype
from .terms import Bundle, Term, bundles, check_grad

__all__ = ["check_differentiated", "together", "total"]


def check_differentiated(work: Iterable[Bundle]) -> None:
    """Raise `RuntimeError` where torch.func differentiates, and none of the tensors is what it differentiates by.

    The penalty would be a constant, and its gradient be missing.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    functorch: Any = torch._C._functorch
    differentiating = {functorch.TransformType.Grad, functorch.TransformType.Jvp}
    if not any(interpreter.key() in differentiating for interpreter in functorch.get_interpreter_stack() or ()):
        return
    if not any(functorch.is_functorch_wrapped_tensor(w) for bundle in work for w in bundle.tensors):
        raise RuntimeError(
            "penalty() was called under a transform of torch.func that differentiates other tensors than the "
            "penalized parameters, and would be a constant. Make the penalty a part of the module that functional_call "
            "calls, and call it in that module's forward"
        )


def total(work: Iterable[Bundle]) -> Tensor:
    """The sum of the terms, at least one: 0-dim, float64 where any tensor is, else float32, on the first device."""
    work = list(work)
    here, cut = _by_place(work)
    if torch.compiler.is_compiling():
        _ = [term.lam for bundle in here for term in bundle.terms]  # first read in one node, no other could read it
    sums = [_value(bundle) for bundle in here]
    if cut:
        with _no_autocast(work[0].tensors[0]):
            value, known = sharding.total(
                cut, lambda terms: multi_tensor.summed([_forward(b, b.tensors) for b in bundles(terms)])
            )
        sums += [value, *(_GradientOnly.apply(b, *b.tensors) for b in bundles(known))]
    return together(sums, work)


def together(sums: list[Tensor], work: list[Bundle]) -> Tensor:
    """The sum of sums of the terms, as `total` has it."""
    dtypes = {working_dtype(dtype) for dtype in {w.dtype for bundle in work for w in bundle.tensors}}
    device, dtype = work[0].tensors[0].device, torch.float64 if torch.float64 in dtypes else torch.float32
    return multi_tensor.summed([s.to(device, dtype) for s in sums])


def _by_place(work: list[Bundle]) -> tuple[list[Bundle], list[sharding.Part]]:
    """What this rank has the whole of, and the parts of tensors that are cut."""
    here, cut = [], []
    for bundle in work:
        if bundle.sums_here:
            here.append(bundle)
            continue
        for part in map(sharding.Part, bundle.each):
            if part.along is None:
                here += bundles(part.terms)
            else:
                cut.append(part)
    return here, cut


def _value(bundle: Bundle) -> Tensor:
    ws = bundle.tensors
    if not torch.compiler.is_compiling():
        function = _EagerValue if torch._C._are_functorch_transforms_active() else _PlainValue
        return function.apply(bundle, *ws)  # type: ignore[no-any-return]
    differentiable = torch.is_grad_enabled() and any(w.requires_grad for w in ws)
    if differentiable:
        _mark(bundle)
        check_grad(bundle.terms)
    if bundle.plain or not differentiable:
        return _Value.forward(bundle, *ws)  # the compiler differentiates it as well
    return _Value.apply(bundle, *ws)  # type: ignore[no-any-return]


class _Value(torch.autograd.Function):
    """The sum of the terms at the tensors given beside them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bundle: Bundle, *ws: Tensor) -> Tensor:
        with _no_autocast(ws[0]):
            return _forward(bundle, ws)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.bundle, *ws = inputs
        ctx.save_for_backward(*ws)
        ctx.save_for_forward(*ws)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, *_grads(ctx.bundle, ctx.saved_tensors, g)


class _EagerValue(_Value):
    """The same with what torch.compile does not trace: forward mode, and a backward that leaves a mark."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        _mark(ctx.bundle)
        check_grad(ctx.bundle.terms)
        g = sharding.everywhere(g)  # the loss that it was added to may be a DTensor
        ws = ctx.saved_tensors
        differentiated = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        batched = torch._C._functorch.is_legacy_batchedtensor(g)
        if differentiated or batched or not ctx.bundle.plain or ws[0].dtype != working_dtype(ws[0].dtype):
            return None, *_grads(ctx.bundle, ws, g)
        linear, quadratic = ctx.bundle.coefficients
        factors = g * linear if linear or not quadratic else None, g * quadratic if quadratic else None
        return None, *multi_tensor.gradients(ws, *factors)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        products = [
            (_widest_grad(terms, w).conj() * tangent).real.sum()
            for terms, w, tangent in zip(ctx.bundle.each, ctx.saved_tensors, tangents, strict=True)
            if tangent is not None
        ]
        return torch.stack(products).sum()


class _PlainValue(_EagerValue):
    """The same without transforms of torch.func: for a `setup_context`, torch inspects a signature at each call."""

    setup_context = staticmethod(torch.autograd.Function.setup_context)

    @staticmethod
    def forward(ctx: Any, bundle: Bundle, *ws: Tensor) -> Tensor:  # type: ignore[override]
        value = _Value.forward(bundle, *ws)
        _Value.setup_context(ctx, (bundle, *ws), value)
        return value


class _GradientOnly(_EagerValue):
    """Zero, with the gradient of the terms: of sharded tensors, whose value is summed over the ranks beside it."""

    @staticmethod
    def forward(bundle: Bundle, *ws: Tensor) -> Tensor:
        return torch.zeros((), dtype=working_dtype(ws[0].dtype), device=ws[0].device)


def _forward(bundle: Bundle, ws: Iterable[Tensor]) -> Tensor:
    if bundle.plain:
        return multi_tensor.total(list(ws), *bundle.coefficients)
    return multi_tensor.summed([term.value(w) for terms, w in zip(bundle.each, ws, strict=True) for term in terms])


def _mark(bundle: Bundle) -> None:
    for term in bundle.terms:
        term.kind.seen["in_loss"] = True


def _grads(bundle: Bundle, ws: Iterable[Tensor], g: Tensor) -> list[Tensor]:
    """`g * gradient of the terms`, rounded to the dtype of `w` at the end: `g` may be a loss scale."""
    with _no_autocast(g):
        return [(_widest_grad(terms, w) * g).to(w.dtype) for terms, w in zip(bundle.each, ws, strict=True)]


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
