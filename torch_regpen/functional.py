r"""The penalties on tensors alone: value, (sub)gradient and proximal map.

For each kind, with `Omega` its function without lambda:

- `NAME_value(w)` is `Omega(w)`, a 0-dim tensor: float64 for double precision, else float32;
- `NAME_grad(w)` is a (sub)gradient of it, of the shape and dtype of `w`, zero where `w` (or its group) is zero;
- `NAME_prox(w, t)` is `argmin_v 1/2 ||v - w||^2 + t * Omega(v)`, of the shape and dtype of `w`.

`t >= 0` is the step size times lambda: a float or a 0-dim tensor. All are computed in float32 at least, so that half
precision neither overflows nor loses small thresholds before the result is rounded; a complex `w` is taken by modulus;
NaN stays NaN. `groups` is `"output"` (dim 0), `"input"` (dim 1) or the dimension along which the groups lie.

Sources: Tibshirani 1996 (L1), Zou and Hastie 2005 (elastic net), Yuan and Lin 2006 (group lasso), Parikh and Boyd 2014
(proximal maps).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .groups import Elements, Grouping, resolve, working_dtype

__all__ = [
    "elastic_net_grad",
    "elastic_net_prox",
    "elastic_net_value",
    "group_lasso_grad",
    "group_lasso_prox",
    "group_lasso_value",
    "l1_grad",
    "l1_prox",
    "l1_value",
    "l2_grad",
    "l2_prox",
    "l2_value",
    "soft_threshold",
]

Threshold = float | Tensor
Groups = str | int | Grouping
Scalar = Callable[[Tensor], Tensor]


# The family: a scalar function rho of magnitudes, times a grouping.


def value(rho: Scalar, w: Tensor, grouping: Grouping, factor: Threshold = 1.0) -> Tensor:
    """`sum_g n_g * factor_g * rho(u_g)`, with `u_g` the magnitudes of `w` and `n_g` how often each counts."""
    u, _ = grouping.polar(w)
    return grouping.count(w.shape) * (factor * rho(u)).sum()


def grad(rho_grad: Scalar, w: Tensor, grouping: Grouping, factor: Threshold = 1.0) -> Tensor:
    """`factor_g * rho'(u_g) * w_g / u_g`, and 0 where `u_g` is 0. It is differentiable."""
    u, rebuild = grouping.polar(w)
    return rebuild((factor * rho_grad(u)).masked_fill(u == 0, 0)).to(w.dtype)


def prox(rho_prox: Scalar, w: Tensor, grouping: Grouping) -> Tensor:
    """`w_g * rho_prox(u_g) / u_g`: along the ray through each group."""
    u, rebuild = grouping.polar(w)
    return rebuild(rho_prox(u)).to(w.dtype)


def soft_threshold(w: Tensor, t: Threshold) -> Tensor:
    """`sign(w) * max(|w| - t, 0)`, elementwise: the proximal map of `t * sum |w|` (Donoho and Johnstone 1994).

    Args:
        w: any shape; complex is shrunk by modulus.
        t: the threshold, 0 or more: a float, or a tensor that broadcasts to `w`.
    """
    if w.is_complex():
        return prox(lambda u: elastic_net_rho_prox(u, t, 1.0, 0.0), w, Elements())
    x = w.to(working_dtype(w.dtype))
    return (x - torch.clamp(x, -t, t)).to(w.dtype)  # type: ignore[arg-type]  # both numbers, or both tensors


def elastic_net_rho_prox(u: Tensor, t: Threshold, linear: float, quadratic: float) -> Tensor:
    """`max(u - t*linear, 0) / (1 + 2*t*quadratic)`: the prox of `linear*u + quadratic*u^2` over `u >= 0`."""
    return (u - t * linear).clamp_min(0) / (1 + 2 * t * quadratic)


def l1_value(w: Tensor) -> Tensor:
    """`sum |w|`."""
    return elastic_net_value(w, 1.0)


def l1_grad(w: Tensor) -> Tensor:
    """`sign(w)`, 0 at 0."""
    return elastic_net_grad(w, 1.0)


def l1_prox(w: Tensor, t: Threshold) -> Tensor:
    """`sign(w) * max(|w| - t, 0)`: `soft_threshold`."""
    return soft_threshold(w, t)


def l2_value(w: Tensor) -> Tensor:
    """`sum w^2`, without the 1/2 that `weight_decay` has."""
    return elastic_net_value(w, 0.0)


def l2_grad(w: Tensor) -> Tensor:
    """`2*w`."""
    return elastic_net_grad(w, 0.0)


def l2_prox(w: Tensor, t: Threshold) -> Tensor:
    """`w / (1 + 2*t)`."""
    return elastic_net_prox(w, t, 0.0)


def elastic_net_value(w: Tensor, l1_ratio: float) -> Tensor:
    """`r * sum |w| + (1 - r) * sum w^2`, with `r = l1_ratio`."""
    return value(lambda u: l1_ratio * u + (1 - l1_ratio) * u.square(), w, Elements())


def elastic_net_grad(w: Tensor, l1_ratio: float) -> Tensor:
    """`r * sign(w) + 2 * (1 - r) * w`, with `r = l1_ratio`."""
    return grad(lambda u: l1_ratio + 2 * (1 - l1_ratio) * u, w, Elements())


def elastic_net_prox(w: Tensor, t: Threshold, l1_ratio: float) -> Tensor:
    """`soft_threshold(w, t*r) / (1 + 2*t*(1 - r))`, with `r = l1_ratio`."""
    return prox(lambda u: elastic_net_rho_prox(u, t, l1_ratio, 1 - l1_ratio), w, Elements())


def group_lasso_value(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sum_g sqrt(n_g) * ||w_g||`, with `n_g` the size of group g."""
    return value(lambda u: u, w, _grouping(w, groups))


def group_lasso_grad(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sqrt(n_g) * w_g / ||w_g||` for each group, 0 for a zero group."""
    return grad(torch.ones_like, w, _grouping(w, groups))


def group_lasso_prox(w: Tensor, t: Threshold, groups: Groups = "output") -> Tensor:
    """`w_g * max(1 - t*sqrt(n_g)/||w_g||, 0)` for each group: the block soft threshold."""
    return prox(lambda u: elastic_net_rho_prox(u, t, 1.0, 0.0), w, _grouping(w, groups))


def _grouping(w: Tensor, groups: Groups) -> Grouping:
    grouping = resolve(groups)
    grouping.check(w.shape)
    return grouping
