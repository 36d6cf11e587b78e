"""The value, gradient and prox of a penalty on a tensor, from functions of the magnitude of each group."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..groups.grouping import Grouping
from ..scalar import Threshold

__all__ = ["grad", "prox", "value"]

Function = Callable[[Tensor], Tensor]


def value(rho: Function, w: Tensor, grouping: Grouping, factor: Threshold = 1.0) -> Tensor:
    """`sum_g n_g * factor_g * rho(u_g)`, where `u_g` is the magnitude and `n_g` the weight of group g."""
    u, _ = grouping.polar(w)
    return grouping.count(w.shape) * (factor * rho(u)).sum()


def grad(rho_grad: Function, w: Tensor, grouping: Grouping, factor: Threshold = 1.0) -> Tensor:
    """`factor_g * rho'(u_g) * w_g / u_g`, or 0 where `u_g` is 0; differentiable."""
    u, rebuild = grouping.polar(w)
    zero = u == 0
    slope = rho_grad(u.masked_fill(zero, 1))  # rho_grad(0) may be infinite, with derivative NaN
    return rebuild((factor * slope).masked_fill(zero, 0)).to(w.dtype)


def prox(rho_prox: Function, w: Tensor, grouping: Grouping) -> Tensor:
    """`w_g * rho_prox(u_g) / u_g`: the prox changes the magnitude of a group and keeps its direction."""
    u, rebuild = grouping.polar(w)
    return rebuild(rho_prox(u)).to(w.dtype)
