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

from collections.abc import Callable

import torch
from torch import Tensor

from .groups.grouping import Elements, Grouping, working_dtype
from .groups.names import Groups, resolve
from .groups.singular_values import SingularValues
from .scalar import ScalarElasticNet, ScalarL0, ScalarLHalf, ScalarLogSum, ScalarMCP, ScalarSCAD, Threshold

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

Function = Callable[[Tensor], Tensor]

L1 = ScalarElasticNet(1.0, 0.0)


# The family: a scalar function rho of magnitudes, times a grouping.


def value(rho: Function, w: Tensor, grouping: Grouping, factor: Threshold = 1.0) -> Tensor:
    """`sum_g n_g * factor_g * rho(u_g)`, with `u_g` the magnitudes of `w` and `n_g` how often each counts."""
    u, _ = grouping.polar(w)
    return grouping.count(w.shape) * (factor * rho(u)).sum()


def grad(rho_grad: Function, w: Tensor, grouping: Grouping, factor: Threshold = 1.0) -> Tensor:
    """`factor_g * rho'(u_g) * w_g / u_g`, and 0 where `u_g` is 0. It is differentiable."""
    u, rebuild = grouping.polar(w)
    zero = u == 0
    slope = rho_grad(u.masked_fill(zero, 1))  # at 0 it may be infinite, and then its derivative is NaN
    return rebuild((factor * slope).masked_fill(zero, 0)).to(w.dtype)


def prox(rho_prox: Function, w: Tensor, grouping: Grouping) -> Tensor:
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
        return prox(lambda u: L1.rho_prox(u, t), w, Elements())
    x = w.to(working_dtype(w.dtype))
    return (x - torch.clamp(x, -t, t)).to(w.dtype)  # type: ignore[arg-type]  # both numbers, or both tensors


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
    return value(ScalarElasticNet(l1_ratio, 1 - l1_ratio).rho, w, Elements())


def elastic_net_grad(w: Tensor, l1_ratio: float) -> Tensor:
    """`r * sign(w) + 2 * (1 - r) * w`, with `r = l1_ratio`."""
    return grad(ScalarElasticNet(l1_ratio, 1 - l1_ratio).rho_grad, w, Elements())


def elastic_net_prox(w: Tensor, t: Threshold, l1_ratio: float) -> Tensor:
    """`soft_threshold(w, t*r) / (1 + 2*t*(1 - r))`, with `r = l1_ratio`."""
    return prox(lambda u: ScalarElasticNet(l1_ratio, 1 - l1_ratio).rho_prox(u, t), w, Elements())


def mcp_value(w: Tensor, knee: float) -> Tensor:
    """`sum rho(|w|)`, `rho(u) = u - u^2/(2*knee)` up to the knee, then `knee/2` (Zhang 2010)."""
    return value(ScalarMCP(knee).rho, w, Elements())


def mcp_grad(w: Tensor, knee: float) -> Tensor:
    """`sign(w) * max(1 - |w|/knee, 0)`, 0 at 0."""
    return grad(ScalarMCP(knee).rho_grad, w, Elements())


def mcp_prox(w: Tensor, t: Threshold, knee: float) -> Tensor:
    """Firm threshold for `t < knee`, else a hard threshold at `sqrt(t*knee)`."""
    return prox(lambda u: ScalarMCP(knee).rho_prox(u, t), w, Elements())


def scad_value(w: Tensor, knee: float, a: float = 3.7) -> Tensor:
    """`sum rho(|w|)`, `rho'` 1 up to `knee/a`, falling in a line to 0 at the knee (Fan and Li 2001)."""
    return value(ScalarSCAD(knee, a).rho, w, Elements())


def scad_grad(w: Tensor, knee: float, a: float = 3.7) -> Tensor:
    """`sign(w) * rho'(|w|)`, 0 at 0."""
    return grad(ScalarSCAD(knee, a).rho_grad, w, Elements())


def scad_prox(w: Tensor, t: Threshold, knee: float, a: float = 3.7) -> Tensor:
    """Soft threshold for small `|w|`, `w` itself beyond the knee, the best of the pieces between."""
    return prox(lambda u: ScalarSCAD(knee, a).rho_prox(u, t), w, Elements())


def log_sum_value(w: Tensor, eps: float) -> Tensor:
    """`sum eps*log(1 + |w|/eps)` (Candes, Wakin and Boyd 2008)."""
    return value(ScalarLogSum(eps).rho, w, Elements())


def log_sum_grad(w: Tensor, eps: float) -> Tensor:
    """`sign(w) / (1 + |w|/eps)`, 0 at 0."""
    return grad(ScalarLogSum(eps).rho_grad, w, Elements())


def log_sum_prox(w: Tensor, t: Threshold, eps: float) -> Tensor:
    """The larger root of `(|v| - |w|)*(|v| + eps) + t*eps = 0` with the sign of `w`, where it beats 0."""
    return prox(lambda u: ScalarLogSum(eps).rho_prox(u, t), w, Elements())


def l_half_value(w: Tensor) -> Tensor:
    """`sum |w|^0.5` (Xu, Chang, Xu and Zhang 2012)."""
    return value(ScalarLHalf().rho, w, Elements())


def l_half_grad(w: Tensor) -> Tensor:
    """`0.5 * sign(w) * |w|^-0.5`, 0 at 0."""
    return grad(ScalarLHalf().rho_grad, w, Elements())


def l_half_prox(w: Tensor, t: Threshold) -> Tensor:
    """Half threshold: 0 up to `|w| = 1.5 * t^(2/3)`."""
    return prox(lambda u: ScalarLHalf().rho_prox(u, t), w, Elements())


def l0_value(w: Tensor) -> Tensor:
    """The number of elements that are not zero."""
    return value(ScalarL0().rho, w, Elements())


def l0_grad(w: Tensor) -> Tensor:
    """0 everywhere: nothing to descend."""
    return grad(ScalarL0().rho_grad, w, Elements())


def l0_prox(w: Tensor, t: Threshold) -> Tensor:
    """Hard threshold: 0 up to `|w| = sqrt(2*t)`, `w` itself above (Blumensath and Davies 2008)."""
    return prox(lambda u: ScalarL0().rho_prox(u, t), w, Elements())


def group_lasso_value(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sum_g sqrt(n_g) * ||w_g||`, with `n_g` the size of group g."""
    return value(lambda u: u, w, _grouping(w, groups))


def group_lasso_grad(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sqrt(n_g) * w_g / ||w_g||` for each group, 0 for a zero group."""
    return grad(torch.ones_like, w, _grouping(w, groups))


def group_lasso_prox(w: Tensor, t: Threshold, groups: Groups = "output") -> Tensor:
    """`w_g * max(1 - t*sqrt(n_g)/||w_g||, 0)` for each group: the block soft threshold."""
    return prox(lambda u: L1.rho_prox(u, t), w, _grouping(w, groups))


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
    return prox(lambda u: L1.rho_prox(u, t), w, _grouping(w, SingularValues()))


def _grouping(w: Tensor, groups: Groups) -> Grouping:
    grouping = resolve(groups)
    grouping.check(w.shape)
    return grouping
