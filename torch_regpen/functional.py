r"""The penalties on tensors alone: value, (sub)gradient and proximal map.

For each kind, with `Omega` its function without lambda:

- `NAME_value(w)` is `Omega(w)`, a 0-dim tensor: float64 for double precision, else float32;
- `NAME_grad(w)` is a (sub)gradient of it, of the shape and dtype of `w`, zero where `w` (or its group) is zero;
- `NAME_prox(w, t)` is `argmin_v 1/2 ||v - w||^2 + t * Omega(v)`, of the shape and dtype of `w`.

`t >= 0` is the step size times lambda: a float or a 0-dim tensor. All are computed in float32 at least, so that half
precision neither overflows nor loses small thresholds before the result is rounded; a complex `w` is taken by modulus;
NaN stays NaN. `groups` is `"output"` (dim 0), `"input"` (dim 1), `"tensor"`, a dimension, or one of
`torch_regpen.groups`. Where a non-convex prox jumps, both ends of the jump are minimisers; it takes the smaller one.

Sources: Tibshirani 1996 (L1), Zou and Hastie 2005 (elastic net), Yuan and Lin 2006 (group lasso), Parikh and Boyd 2014
(proximal maps).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .groups import Elements, Grouping, Groups, SingularValues, resolve, working_dtype

__all__ = [
    "elastic_net_grad",
    "elastic_net_prox",
    "elastic_net_value",
    "group_lasso_grad",
    "group_lasso_prox",
    "group_lasso_value",
    "l0_grad",
    "l0_prox",
    "l0_value",
    "l1_grad",
    "l1_prox",
    "l1_value",
    "l2_grad",
    "l2_prox",
    "l2_value",
    "l_half_grad",
    "l_half_prox",
    "l_half_value",
    "log_sum_grad",
    "log_sum_prox",
    "log_sum_value",
    "mcp_grad",
    "mcp_prox",
    "mcp_value",
    "nuclear_norm_grad",
    "nuclear_norm_prox",
    "nuclear_norm_value",
    "scad_grad",
    "scad_prox",
    "scad_value",
    "soft_threshold",
    "sparse_group_lasso_grad",
    "sparse_group_lasso_prox",
    "sparse_group_lasso_value",
]

Threshold = float | Tensor
Scalar = Callable[[Tensor], Tensor]


# The family: a scalar function rho of magnitudes, times a grouping.


def value(rho: Scalar, w: Tensor, grouping: Grouping, factor: Threshold = 1.0) -> Tensor:
    """`sum_g n_g * factor_g * rho(u_g)`, with `u_g` the magnitudes of `w` and `n_g` how often each counts."""
    u, _ = grouping.polar(w)
    return grouping.count(w.shape) * (factor * rho(u)).sum()


def grad(rho_grad: Scalar, w: Tensor, grouping: Grouping, factor: Threshold = 1.0) -> Tensor:
    """`factor_g * rho'(u_g) * w_g / u_g`, and 0 where `u_g` is 0. It is differentiable."""
    u, rebuild = grouping.polar(w)
    zero = u == 0
    slope = rho_grad(u.masked_fill(zero, 1))  # at 0 it may be infinite, and then its derivative is NaN
    return rebuild((factor * slope).masked_fill(zero, 0)).to(w.dtype)


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


# rho(u), its derivative (at 0 the right one) and its prox over v >= 0, on magnitudes u >= 0.


def elastic_net_rho(u: Tensor, linear: float, quadratic: float) -> Tensor:
    """`linear*u + quadratic*u^2`; a coefficient of 0 takes no part, for 0 times infinity is NaN."""
    if not quadratic:
        return linear * u
    return linear * u + quadratic * u.square() if linear else quadratic * u.square()


def elastic_net_rho_grad(u: Tensor, linear: float, quadratic: float) -> Tensor:
    """`linear + 2*quadratic*u`."""
    return linear + 2 * quadratic * u


def elastic_net_rho_prox(u: Tensor, t: Threshold, linear: float, quadratic: float) -> Tensor:
    """`max(u - t*linear, 0) / (1 + 2*t*quadratic)`."""
    shrunk = (u - t * linear).clamp_min(0) if linear else u
    return shrunk / (1 + 2 * t * quadratic) if quadratic else shrunk


def mcp_rho(u: Tensor, knee: float) -> Tensor:
    """`u - u^2/(2*knee)` up to the knee, then `knee/2`."""
    u = u.clamp_max(knee)
    return u - u.square() / (2 * knee)


def mcp_rho_grad(u: Tensor, knee: float) -> Tensor:
    """`1 - u/knee` up to the knee, then 0."""
    return (1 - u / knee).clamp_min(0)


def mcp_rho_prox(u: Tensor, t: Threshold, knee: float) -> Tensor:
    """Firm threshold for `t < knee`; for larger `t` a hard threshold at `sqrt(t*knee)`, 0 at the jump itself."""
    t = _beside(t, u)
    firm = torch.where(u <= knee, _ratio((u - t).clamp_min(0), 1 - t / knee).clamp_max(knee), u)
    hard = u.masked_fill(u <= (t * knee).sqrt(), 0)
    return torch.where(t < knee, firm, hard)


def scad_rho(u: Tensor, knee: float, a: float) -> Tensor:
    """With `k = knee/a`: `u` up to k; `(2*knee*u - u^2 - k^2) / (2*(a-1)*k)` up to the knee; then `k*(a+1)/2`."""
    k = knee / a
    u = u.clamp_max(knee)
    return torch.where(u <= k, u, (2 * knee * u - u.square() - k * k) / (2 * (a - 1) * k))


def scad_rho_grad(u: Tensor, knee: float, a: float) -> Tensor:
    """1 up to `k = knee/a`, falling in a line to 0 at the knee."""
    return ((knee - u) / ((a - 1) * knee / a)).clamp(0, 1)


def scad_rho_prox(u: Tensor, t: Threshold, knee: float, a: float) -> Tensor:
    """With `k = knee/a`: soft threshold up to `k + t`, `u` beyond the knee, a line between, for `t < (a-1)*k`.

    For larger `t` the line falls, and the prox jumps from the soft threshold to `u`: at `((a+1)*k + t) / 2`, or from 0
    at `sqrt((a+1)*k*t)`, where it takes the lower end.
    """
    t = _beside(t, u)
    k = knee / a
    slope = t / ((a - 1) * k)
    soft = (u - t).clamp_min(0)
    line = _ratio(u - slope * knee, 1 - slope).clamp(k, knee)
    jump = torch.where(t < (a + 1) * k, ((a + 1) * k + t) / 2, ((a + 1) * k * t).sqrt())
    continuous = torch.where(u <= k + t, soft, torch.where(u <= knee, line, u))
    return torch.where(slope < 1, continuous, torch.where(u <= jump, soft, u))


def log_sum_rho(u: Tensor, eps: float) -> Tensor:
    """`eps*log(1 + u/eps)`."""
    return eps * (u / eps).log1p()


def log_sum_rho_grad(u: Tensor, eps: float) -> Tensor:
    """`1 / (1 + u/eps)`."""
    return 1 / (1 + u / eps)


def log_sum_rho_prox(u: Tensor, t: Threshold, eps: float) -> Tensor:
    """The larger root of `(v - u)*(v + eps) + t*eps = 0` where it exists and beats 0; for `t <= eps` no jump."""
    total = u + eps
    root = total * (1 - 4 * (eps / total) * (t / total)).clamp_min(0).sqrt()  # without squares that overflow
    # (u - eps + root) / 2, without the cancellation where u < eps
    v = torch.where(u < eps, 2 * eps * (u - t) / (eps - u + root), (u - eps + root) / 2).clamp_min(0)
    return v.masked_fill(0.5 * v - u + t * log_sum_rho(v, eps) / v >= 0, 0)


def l_half_rho(u: Tensor) -> Tensor:
    """`u^0.5`, with gradient 0 at 0."""
    zero = u == 0
    return u.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def l_half_rho_grad(u: Tensor) -> Tensor:
    """`0.5 * u^-0.5`, infinite at 0."""
    return 0.5 * u.rsqrt()


def l_half_rho_prox(u: Tensor, t: Threshold) -> Tensor:
    """Half threshold: the largest root of `s^3 - u*s + t/2 = 0`, squared, above `1.5 * t^(2/3)`; 0 up to there."""
    t = _beside(t, u)
    threshold = 1.5 * t.pow(2 / 3)
    angle = (-(threshold / u).pow(1.5) / math.sqrt(2)).clamp(-1, 1).acos() / 3
    return (4 / 3 * u * angle.cos().square()).masked_fill(u <= threshold, 0)


def l0_rho(u: Tensor) -> Tensor:
    """1 where `u > 0`."""
    return torch.where(u.isnan(), u, (u != 0).to(u.dtype))


def l0_rho_grad(u: Tensor) -> Tensor:
    """0, and infinite at 0: no gradient leads there, and every gradient is a subgradient there."""
    return torch.where(u == 0, torch.inf, 0 * u)


def l0_rho_prox(u: Tensor, t: Threshold) -> Tensor:
    """Hard threshold at `sqrt(2*t)`, 0 at the jump itself."""
    return u.masked_fill(u <= (2 * _beside(t, u)).sqrt(), 0)


def _beside(t: Threshold, u: Tensor) -> Tensor:
    """`t` as a tensor of the dtype and on the device of `u`, which nobody waits for."""
    return torch.as_tensor(t, dtype=u.dtype).to(u.device, non_blocking=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny)


# The kinds on elements, and the known products with groups.


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
    return value(lambda u: elastic_net_rho(u, l1_ratio, 1 - l1_ratio), w, Elements())


def elastic_net_grad(w: Tensor, l1_ratio: float) -> Tensor:
    """`r * sign(w) + 2 * (1 - r) * w`, with `r = l1_ratio`."""
    return grad(lambda u: elastic_net_rho_grad(u, l1_ratio, 1 - l1_ratio), w, Elements())


def elastic_net_prox(w: Tensor, t: Threshold, l1_ratio: float) -> Tensor:
    """`soft_threshold(w, t*r) / (1 + 2*t*(1 - r))`, with `r = l1_ratio`."""
    return prox(lambda u: elastic_net_rho_prox(u, t, l1_ratio, 1 - l1_ratio), w, Elements())


def mcp_value(w: Tensor, knee: float) -> Tensor:
    """`sum rho(|w|)`, `rho(u) = u - u^2/(2*knee)` up to the knee, then `knee/2` (Zhang 2010)."""
    return value(lambda u: mcp_rho(u, knee), w, Elements())


def mcp_grad(w: Tensor, knee: float) -> Tensor:
    """`sign(w) * max(1 - |w|/knee, 0)`, 0 at 0."""
    return grad(lambda u: mcp_rho_grad(u, knee), w, Elements())


def mcp_prox(w: Tensor, t: Threshold, knee: float) -> Tensor:
    """Firm threshold for `t < knee`, else a hard threshold at `sqrt(t*knee)`."""
    return prox(lambda u: mcp_rho_prox(u, t, knee), w, Elements())


def scad_value(w: Tensor, knee: float, a: float = 3.7) -> Tensor:
    """`sum rho(|w|)`, `rho'` 1 up to `knee/a`, falling in a line to 0 at the knee (Fan and Li 2001)."""
    return value(lambda u: scad_rho(u, knee, a), w, Elements())


def scad_grad(w: Tensor, knee: float, a: float = 3.7) -> Tensor:
    """`sign(w) * rho'(|w|)`, 0 at 0."""
    return grad(lambda u: scad_rho_grad(u, knee, a), w, Elements())


def scad_prox(w: Tensor, t: Threshold, knee: float, a: float = 3.7) -> Tensor:
    """Soft threshold for small `|w|`, `w` itself beyond the knee, the best of the pieces between."""
    return prox(lambda u: scad_rho_prox(u, t, knee, a), w, Elements())


def log_sum_value(w: Tensor, eps: float) -> Tensor:
    """`sum eps*log(1 + |w|/eps)` (Candes, Wakin and Boyd 2008)."""
    return value(lambda u: log_sum_rho(u, eps), w, Elements())


def log_sum_grad(w: Tensor, eps: float) -> Tensor:
    """`sign(w) / (1 + |w|/eps)`, 0 at 0."""
    return grad(lambda u: log_sum_rho_grad(u, eps), w, Elements())


def log_sum_prox(w: Tensor, t: Threshold, eps: float) -> Tensor:
    """The larger root of `(|v| - |w|)*(|v| + eps) + t*eps = 0` with the sign of `w`, where it beats 0."""
    return prox(lambda u: log_sum_rho_prox(u, t, eps), w, Elements())


def l_half_value(w: Tensor) -> Tensor:
    """`sum |w|^0.5` (Xu, Chang, Xu and Zhang 2012)."""
    return value(l_half_rho, w, Elements())


def l_half_grad(w: Tensor) -> Tensor:
    """`0.5 * sign(w) * |w|^-0.5`, 0 at 0."""
    return grad(l_half_rho_grad, w, Elements())


def l_half_prox(w: Tensor, t: Threshold) -> Tensor:
    """Half threshold: 0 up to `|w| = 1.5 * t^(2/3)`."""
    return prox(lambda u: l_half_rho_prox(u, t), w, Elements())


def l0_value(w: Tensor) -> Tensor:
    """The number of elements that are not zero."""
    return value(l0_rho, w, Elements())


def l0_grad(w: Tensor) -> Tensor:
    """0 everywhere: nothing to descend."""
    return grad(l0_rho_grad, w, Elements())


def l0_prox(w: Tensor, t: Threshold) -> Tensor:
    """Hard threshold: 0 up to `|w| = sqrt(2*t)`, `w` itself above (Blumensath and Davies 2008)."""
    return prox(lambda u: l0_rho_prox(u, t), w, Elements())


def group_lasso_value(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sum_g sqrt(n_g) * ||w_g||`, with `n_g` the size of group g."""
    return value(lambda u: u, w, _grouping(w, groups))


def group_lasso_grad(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sqrt(n_g) * w_g / ||w_g||` for each group, 0 for a zero group."""
    return grad(torch.ones_like, w, _grouping(w, groups))


def group_lasso_prox(w: Tensor, t: Threshold, groups: Groups = "output") -> Tensor:
    """`w_g * max(1 - t*sqrt(n_g)/||w_g||, 0)` for each group: the block soft threshold."""
    return prox(lambda u: elastic_net_rho_prox(u, t, 1.0, 0.0), w, _grouping(w, groups))


def sparse_group_lasso_value(w: Tensor, l1_ratio: float, groups: Groups = "output") -> Tensor:
    """`r * sum |w| + (1 - r) * sum_g sqrt(n_g) * ||w_g||`, with `r = l1_ratio` (Simon, Friedman et al. 2013)."""
    return l1_ratio * l1_value(w) + (1 - l1_ratio) * group_lasso_value(w, groups)


def sparse_group_lasso_grad(w: Tensor, l1_ratio: float, groups: Groups = "output") -> Tensor:
    """`r * sign(w) + (1 - r) * sqrt(n_g) * w_g / ||w_g||`, 0 for a zero group."""
    return l1_ratio * l1_grad(w) + (1 - l1_ratio) * group_lasso_grad(w, groups)


def sparse_group_lasso_prox(w: Tensor, t: Threshold, l1_ratio: float, groups: Groups = "output") -> Tensor:
    """The soft threshold of the elements, then of the groups."""
    return group_lasso_prox(soft_threshold(w, t * l1_ratio), t * (1 - l1_ratio), groups)


def nuclear_norm_value(w: Tensor) -> Tensor:
    """The sum of the singular values of `w`, flattened to dim 0 by the rest (Fazel 2002)."""
    return value(lambda u: u, w, _grouping(w, SingularValues()))


def nuclear_norm_grad(w: Tensor) -> Tensor:
    """`U @ Vh` over the singular values that are not zero."""
    return grad(torch.ones_like, w, _grouping(w, SingularValues()))


def nuclear_norm_prox(w: Tensor, t: Threshold) -> Tensor:
    """The soft threshold of the singular values (Cai, Candes and Shen 2010)."""
    return prox(lambda u: elastic_net_rho_prox(u, t, 1.0, 0.0), w, _grouping(w, SingularValues()))


def _grouping(w: Tensor, groups: Groups) -> Grouping:
    grouping = resolve(groups)
    grouping.check(w.shape)
    return grouping
