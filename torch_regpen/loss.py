"""The penalty as a differentiable term of the loss: an autograd node for each large tensor or many small ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import multi_tensor
from .groups import working_dtype
from .terms import Term

__all__ = ["total"]

LARGE = 1 << 16  # elements from which a tensor has a node of its own, so that its gradient is freed before the next


def total(terms: list[Term]) -> Tensor:
    """The sum of the terms, at least one: 0-dim, float64 where any tensor is, else float32, on the first device."""
    dtypes = {working_dtype(term.tensor.dtype) for term in terms}
    sums = [_Value.apply(bundle, *[term.tensor for term in bundle]) for bundle in _bundles(terms)]  # type: ignore[no-untyped-call]
    device = terms[0].tensor.device
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    sums = [s.to(device, dtype) for s in sums]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _bundles(terms: list[Term]) -> Iterator[list[Term]]:
    small: dict[tuple[torch.device, torch.dtype], list[Term]] = {}
    for term in terms:
        if term.tensor.numel() >= LARGE:
            yield [term]
        else:
            small.setdefault((term.tensor.device, working_dtype(term.tensor.dtype)), []).append(term)
    yield from small.values()


class _Value(torch.autograd.Function):
    """The sum of the terms at the tensors given beside them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(terms: list[Term], *ws: Tensor) -> Tensor:
        with torch.autocast(ws[0].device.type, enabled=False):
            sums = []
            plain: dict[tuple[float, float], list[Tensor]] = {}
            for term, w in zip(terms, ws, strict=True):
                if term.plain and not isinstance(w, DTensor):
                    plain.setdefault((term.lam * term.linear, term.lam * term.quadratic), []).append(w)
                else:
                    value = term.value(w)
                    sums.append(value.full_tensor() if isinstance(value, DTensor) else value)
            sums += [multi_tensor.total(tensors, *coefficients) for coefficients, tensors in plain.items()]
            return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.terms, *ws = inputs
        ctx.save_for_backward(*ws)
        ctx.save_for_forward(*ws)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        grads = []
        for term, w in zip(ctx.terms, ctx.saved_tensors, strict=True):
            term.kind.seen["in_loss"] = True
            grads.append(_grad(term, w, g))
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        products = [
            (term.grad(w) * tangent).real.sum()
            for term, w, tangent in zip(ctx.terms, ctx.saved_tensors, tangents, strict=True)
            if tangent is not None
        ]
        return torch.stack(products).sum()


def _grad(term: Term, w: Tensor, g: Tensor) -> Tensor:
    """`g * gradient of the term`, in the dtype of `w`."""
    return (term.grad(w) * g).to(w.dtype)
