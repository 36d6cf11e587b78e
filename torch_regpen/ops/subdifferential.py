"""The distance of the negative gradient to the subdifferential: zero at a stationary point."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..functional import soft_threshold
from ..groups.grouping import largest, working_dtype
from .sharded import ShardedTerms
from .terms import Term

__all__ = ["distance"]


def distance(terms: list[Term], grad: Tensor) -> Tensor:
    """The largest distance, over coordinates or groups, of `-grad` to the subdifferential of the sum of the terms.

    For a sharded tensor, it is the largest on this rank.

    Args:
        terms: all terms of one tensor.
        grad: the gradient of the loss without the penalty.

    Raises:
        ValueError: groups overlap; there is no closed form then.
    """
    part = ShardedTerms(terms)
    terms = part.terms
    w = terms[0].tensor
    if grad.is_sparse:
        grad = grad.to_dense()
    wide = torch.promote_types(w.dtype, working_dtype(w.dtype))
    residual = -part.take(grad).to(wide)
    slack: Tensor | float = 0.0  # for elements that are 0: the slope at 0, half the width of the subdifferential
    slope: Tensor | float = 0.0  # the slope at 0 of the penalties on groups
    for term in terms:
        residual = residual - term.grad(w.to(wide))
        if not term.penalty.separable:
            continue
        zero = torch.zeros((), dtype=working_dtype(w.dtype), device=w.device)
        lam = term.scaled_lam if term.grouped else term.elementwise_lam
        at_zero = (term.penalty.rho_grad(zero) * lam).nan_to_num(0.0, math.inf)  # inf * 0 at lam=0 is 0 here
        if term.grouped:
            slope = slope + at_zero
        else:
            slack = slack + torch.where(term.offset(w) == 0, at_zero, 0)
    if any(term.penalty.positive for term in terms):
        residual = torch.where(w == 0, residual.clamp_min(0), residual)
    residual = soft_threshold(residual, slack)
    grouped = [term for term in terms if term.grouped]
    if not grouped:
        return largest(residual.abs())
    if len({(term.grouping, id(term.center)) for term in grouped}) > 1:
        raise ValueError(
            f"the penalties on parameter {terms[0].name!r} have groups that overlap, for which the distance to the "
            "subdifferential has no closed form"
        )
    grouping: Any = grouped[0].grouping
    farthest: Tensor = grouping.excess(grouped[0].offset(w), residual, slope)
    return farthest
