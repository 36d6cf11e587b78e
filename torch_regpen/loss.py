"""The penalty as a differentiable term of the loss: an autograd node for each large tensor or many small ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import multi_tensor, sharding
from .groups import working_dtype
from .terms import Term, by_tensor, check_grad

__all__ = ["total"]

LARGE = 1 << 16  # elements from which a tensor has a node of its own, so that its gradient is freed before the next


def total(terms: list[Term]) -> Tensor:
    """The sum of the terms, at least one: 0-dim, float64 where any tensor is, else float32, on the first device."""
    parts = [sharding.Part(of_tensor) for of_tensor in by_tensor(terms)]
    sums = [_value(bundle) for bundle in _bundles([part.terms for part in parts if part.along is None])]
    if cut := [part for part in parts if part.along is not None]:
        with _no_autocast(terms[0].tensor):
            value, known = sharding.total(cut, lambda some: _Value.forward(by_tensor(some), *_tensors(by_tensor(some))))
        sums += [value, *(_GradientOnly.apply(bundle, *_tensors(bundle)) for bundle in _bundles(by_tensor(known)))]  # type: ignore[no-untyped-call]
    dtypes = {working_dtype(term.tensor.dtype) for term in terms}
    device = terms[0].tensor.device
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    sums = [s.to(device, dtype) for s in sums]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


Bundle = list[list[Term]]  # the terms of each of some tensors


def _tensors(bundle: Bundle) -> list[Tensor]:
    return [terms[0].tensor for terms in bundle]


def _value(bundle: Bundle) -> Tensor:
    ws = _tensors(bundle)
    if not torch.compiler.is_compiling():
        return _EagerValue.apply(bundle, *ws)  # type: ignore[no-any-return, no-untyped-call]
    if not torch.is_grad_enabled() or not any(w.requires_grad for w in ws):
        return _Value.forward(bundle, *ws)  # what apply does then, but for torch.compile, which counts the arguments
    for terms in bundle:
        _mark(terms)
    return _Value.apply(bundle, *ws)  # type: ignore[no-any-return, no-untyped-call]


def _bundles(tensors: Bundle) -> Iterator[Bundle]:
    small: dict[tuple[torch.device, torch.dtype], Bundle] = {}
    for of_tensor in tensors:
        tensor = of_tensor[0].tensor
        if tensor.numel() >= LARGE:
            yield [of_tensor]
        else:
            small.setdefault((tensor.device, working_dtype(tensor.dtype)), []).append(of_tensor)
    yield from small.values()


class _Value(torch.autograd.Function):
    """The sum of the terms at the tensors given beside them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bundle: Bundle, *ws: Tensor) -> Tensor:
        with _no_autocast(ws[0]):
            sums = []
            plain: dict[tuple[float, float], list[Tensor]] = {}
            for terms, w in zip(bundle, ws, strict=True):
                for term in terms:
                    if term.plain:
                        plain.setdefault((term.lam * term.linear, term.lam * term.quadratic), []).append(w)
                    else:
                        sums.append(term.value(w))
            sums += [multi_tensor.total(tensors, *coefficients) for coefficients, tensors in plain.items()]
            return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.bundle, *ws = inputs
        ctx.save_for_backward(*ws)
        ctx.save_for_forward(*ws)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, *(_grad(terms, w, g) for terms, w in zip(ctx.bundle, ctx.saved_tensors, strict=True))


class _EagerValue(_Value):
    """The same with what torch.compile does not trace: forward mode, and a backward that leaves a mark."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        for terms in ctx.bundle:
            _mark(terms)
        return _Value.backward(ctx, g)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        products = [
            (_widest_grad(terms, w).conj() * tangent).real.sum()
            for terms, w, tangent in zip(ctx.bundle, ctx.saved_tensors, tangents, strict=True)
            if tangent is not None
        ]
        return torch.stack(products).sum()


class _GradientOnly(_EagerValue):
    """Zero, with the gradient of the terms: of sharded tensors, whose value is summed over the ranks beside it."""

    @staticmethod
    def forward(bundle: Bundle, *ws: Tensor) -> Tensor:
        return torch.zeros((), dtype=working_dtype(ws[0].dtype), device=ws[0].device)


def _mark(terms: list[Term]) -> None:
    for term in terms:
        term.kind.seen["in_loss"] = True


def _grad(terms: list[Term], w: Tensor, g: Tensor) -> Tensor:
    """`g * gradient of the terms`, rounded to the dtype of `w` at the end: `g` may be a loss scale."""
    with _no_autocast(w):
        return (_widest_grad(terms, w) * g).to(w.dtype)


def _widest_grad(terms: list[Term], w: Tensor) -> Tensor:
    """The gradient of the terms of one tensor, in the dtype in which they are computed."""
    check_grad(terms)
    x = w.to(torch.promote_types(w.dtype, working_dtype(w.dtype)))
    first, *rest = (term.grad(x) for term in terms)
    return sum(rest, start=first)


def _no_autocast(w: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off, where the device of `w` has it."""
    kind = w.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
