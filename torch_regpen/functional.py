"""Each penalty as three functions of a tensor: its value, its (sub)gradient and its proximal map.

`Omega(w)` denotes a penalty without lambda. For each penalty NAME:

- `NAME_value(w)` returns `Omega(w)`, a 0-dim tensor: float64 if `w` is in double precision, else float32.
- `NAME_grad(w)` returns a (sub)gradient of `Omega`, with the shape and dtype of `w`; 0 where `w` (or its group) is 0.
- `NAME_prox(w, t)` returns `argmin_v 1/2 ||v - w||^2 + t * Omega(v)`, with the shape and dtype of `w`. If there are two
  minimizers (at a jump of a non-convex penalty), it returns the one with the smaller modulus.

Arguments:
    w: a real or complex tensor of any shape. `|w|` is the modulus. Half-precision tensors are computed in float32 and
        the result is rounded. NaN stays NaN.
    t: the step size times lambda, 0 or more: a float or a 0-dim tensor.
    groups: `"output"` (dimension 0), `"input"` (dimension 1), `"tensor"`, an int (that dimension), or a grouping from
        `torch_regpen.groups`. A tensor that cannot be divided into these groups raises `ValueError`.
    knee, eps: in units of the weights, more than 0; other values raise `ValueError`.

Example:
    >>> import torch, torch_regpen.functional as F
    >>> w = torch.tensor([3.0, -0.5])
    >>> F.l1_value(w), F.l1_grad(w), F.l1_prox(w, t=1.0)
    (tensor(3.5000), tensor([ 1., -1.]), tensor([2., 0.]))

Sources: Tibshirani 1996 (L1), Zou and Hastie 2005 (elastic net), Yuan and Lin 2006 (group lasso), Parikh, Boyd 2014.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .groups.grouping import Elements, Grouping, working_dtype
from .groups.names import Groups, resolve
from .groups.nm import NM
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


def soft_threshold(w: Tensor, t: Threshold) -> Tensor:
    """`sign(w) * max(|w| - t, 0)`, elementwise: the proximal map of `t * sum |w|` (Donoho and Johnstone 1994).

    Args:
        w: a tensor of any shape; for complex tensors `sign(w)` is `w/|w|`.
        t: the threshold, 0 or more, in units of `w`: a float, or a tensor that broadcasts to `w`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.soft_threshold(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 2., -1.,  0.])
    """
    if w.is_complex():
        return prox(lambda u: L1.rho_prox(u, t), w, Elements())
    x = w.to(working_dtype(w.dtype))
    return (x - torch.clamp(x, -t, t)).to(w.dtype)  # type: ignore[arg-type]  # both numbers, or both tensors


def l1_value(w: Tensor) -> Tensor:
    """`sum |w|`."""
    return elastic_net_value(w, 1.0)


def l1_grad(w: Tensor) -> Tensor:
    """`sign(w)`, 0 at 0."""
    return elastic_net_grad(w, 1.0)


def l1_prox(w: Tensor, t: Threshold) -> Tensor:
    """`sign(w) * max(|w| - t, 0)`; same as `soft_threshold`."""
    return soft_threshold(w, t)


def l2_value(w: Tensor) -> Tensor:
    """`sum |w|^2`, without a factor 1/2."""
    return elastic_net_value(w, 0.0)


def l2_grad(w: Tensor) -> Tensor:
    """`2*w`."""
    return elastic_net_grad(w, 0.0)


def l2_prox(w: Tensor, t: Threshold) -> Tensor:
    """`w / (1 + 2*t)`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l2_prox(torch.tensor([3.0, -2.0]), t=0.5)
        tensor([ 1.5000, -1.0000])
    """
    return elastic_net_prox(w, t, 0.0)


def elastic_net_value(w: Tensor, l1_ratio: float) -> Tensor:
    """`r * sum |w| + (1 - r) * sum |w|^2`, where `r = l1_ratio`, from 0 to 1."""
    return value(ScalarElasticNet(l1_ratio, 1 - l1_ratio).rho, w, Elements())


def elastic_net_grad(w: Tensor, l1_ratio: float) -> Tensor:
    """`r * sign(w) + 2 * (1 - r) * w`, where `r = l1_ratio`."""
    return grad(ScalarElasticNet(l1_ratio, 1 - l1_ratio).rho_grad, w, Elements())


def elastic_net_prox(w: Tensor, t: Threshold, l1_ratio: float) -> Tensor:
    """`soft_threshold(w, t*r) / (1 + 2*t*(1 - r))`, where `r = l1_ratio`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.elastic_net_prox(torch.tensor([3.0, 0.5]), t=1.0, l1_ratio=0.5)
        tensor([1.2500, 0.0000])
    """
    return prox(lambda u: ScalarElasticNet(l1_ratio, 1 - l1_ratio).rho_prox(u, t), w, Elements())


def mcp_value(w: Tensor, knee: float) -> Tensor:
    """`sum rho(|w|)`, where `rho(u) = u - u^2/(2*knee)` up to `u = knee`, then `knee/2` (Zhang 2010)."""
    return value(ScalarMCP(knee).rho, w, Elements())


def mcp_grad(w: Tensor, knee: float) -> Tensor:
    """`sign(w) * max(1 - |w|/knee, 0)`."""
    return grad(ScalarMCP(knee).rho_grad, w, Elements())


def mcp_prox(w: Tensor, t: Threshold, knee: float) -> Tensor:
    """Firm threshold if `t < knee`, else hard threshold at `sqrt(t*knee)`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.mcp_prox(torch.tensor([0.25, 1.0, 3.0]), t=0.5, knee=2.0)
        tensor([0.0000, 0.6667, 3.0000])
    """
    return prox(lambda u: ScalarMCP(knee).rho_prox(u, t), w, Elements())


def scad_value(w: Tensor, knee: float, a: float = 3.7) -> Tensor:
    """`sum rho(|w|)`; the slope of `rho` is 1 up to `knee/a`, then linear down to 0 at `knee` (Fan and Li 2001)."""
    return value(ScalarSCAD(knee, a).rho, w, Elements())


def scad_grad(w: Tensor, knee: float, a: float = 3.7) -> Tensor:
    """`sign(w) * rho'(|w|)`; for `rho` see `scad_value`."""
    return grad(ScalarSCAD(knee, a).rho_grad, w, Elements())


def scad_prox(w: Tensor, t: Threshold, knee: float, a: float = 3.7) -> Tensor:
    """Soft threshold for small `|w|`, `w` itself above the knee, the best of the pieces of `rho` between.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.scad_prox(torch.tensor([0.25, 1.0, 5.0]), t=0.5, knee=4.0)
        tensor([0.0000, 0.5000, 5.0000])
    """
    return prox(lambda u: ScalarSCAD(knee, a).rho_prox(u, t), w, Elements())


def log_sum_value(w: Tensor, eps: float) -> Tensor:
    """`sum eps*log(1 + |w|/eps)` (Candes, Wakin and Boyd 2008)."""
    return value(ScalarLogSum(eps).rho, w, Elements())


def log_sum_grad(w: Tensor, eps: float) -> Tensor:
    """`sign(w) / (1 + |w|/eps)`."""
    return grad(ScalarLogSum(eps).rho_grad, w, Elements())


def log_sum_prox(w: Tensor, t: Threshold, eps: float) -> Tensor:
    """`sign(w)` times the larger root of `(v - |w|)*(v + eps) + t*eps = 0` if its objective is below that of 0, else 0.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.log_sum_prox(torch.tensor([0.25, 3.0]), t=0.5, eps=1.0)
        tensor([0.0000, 2.8708])
    """
    return prox(lambda u: ScalarLogSum(eps).rho_prox(u, t), w, Elements())


def l_half_value(w: Tensor) -> Tensor:
    """`sum |w|^0.5` (Xu, Chang, Xu and Zhang 2012)."""
    return value(ScalarLHalf().rho, w, Elements())


def l_half_grad(w: Tensor) -> Tensor:
    """`0.5 * sign(w) * |w|^-0.5`, or 0 at 0, where it would be infinite."""
    return grad(ScalarLHalf().rho_grad, w, Elements())


def l_half_prox(w: Tensor, t: Threshold) -> Tensor:
    """Half threshold: 0 if `|w| <= 1.5 * t^(2/3)`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l_half_prox(torch.tensor([1.0, 3.0]), t=1.0)
        tensor([0.0000, 2.6955])
    """
    return prox(lambda u: ScalarLHalf().rho_prox(u, t), w, Elements())


def l0_value(w: Tensor) -> Tensor:
    """The number of nonzero elements."""
    return value(ScalarL0().rho, w, Elements())


def l0_grad(w: Tensor) -> Tensor:
    """0 everywhere, so gradient descent ignores L0."""
    return grad(ScalarL0().rho_grad, w, Elements())


def l0_prox(w: Tensor, t: Threshold) -> Tensor:
    """Hard threshold: 0 if `|w| <= sqrt(2*t)`, else `w` (Blumensath and Davies 2008).

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l0_prox(torch.tensor([0.5, 3.0]), t=0.5)
        tensor([0., 3.])
    """
    return prox(lambda u: ScalarL0().rho_prox(u, t), w, Elements())


def group_lasso_value(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sum_g sqrt(n_g) * ||w_g||`, where `n_g` is the size of group g."""
    return value(lambda u: u, w, _grouping(w, groups))


def group_lasso_grad(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sqrt(n_g) * w_g / ||w_g||` for each group, or 0 for a zero group."""
    return grad(torch.ones_like, w, _grouping(w, groups))


def group_lasso_prox(w: Tensor, t: Threshold, groups: Groups = "output") -> Tensor:
    """Block soft threshold: `w_g * max(1 - t*sqrt(n_g)/||w_g||, 0)` for each group.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.group_lasso_prox(torch.tensor([[2.0] * 4, [0.5] * 4]), t=1.0)[:, 0]
        tensor([1., 0.])
    """
    return prox(lambda u: L1.rho_prox(u, t), w, _grouping(w, groups))


def sparse_group_lasso_value(w: Tensor, l1_ratio: float, groups: Groups = "output") -> Tensor:
    """`r * sum |w| + (1 - r) * sum_g sqrt(n_g) * ||w_g||`, where `r = l1_ratio` (Simon, Friedman et al. 2013)."""
    return l1_ratio * l1_value(w) + (1 - l1_ratio) * group_lasso_value(w, groups)


def sparse_group_lasso_grad(w: Tensor, l1_ratio: float, groups: Groups = "output") -> Tensor:
    """`r * sign(w) + (1 - r) * sqrt(n_g) * w_g / ||w_g||`, or 0 for a zero group."""
    return l1_ratio * l1_grad(w) + (1 - l1_ratio) * group_lasso_grad(w, groups)


def sparse_group_lasso_prox(w: Tensor, t: Threshold, l1_ratio: float, groups: Groups = "output") -> Tensor:
    """Soft threshold of the elements by `t*r`, then block soft threshold of the groups by `t*(1 - r)`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.sparse_group_lasso_prox(torch.tensor([[3.0, 0.5]]), t=1.0, l1_ratio=0.5)
        tensor([[1.7929, 0.0000]])
    """
    return group_lasso_prox(soft_threshold(w, t * l1_ratio), t * (1 - l1_ratio), groups)


def nuclear_norm_value(w: Tensor) -> Tensor:
    """The sum of the singular values of `w`, viewed as a matrix with `w.shape[0]` rows (Fazel 2002)."""
    return value(lambda u: u, w, _grouping(w, SingularValues()))


def nuclear_norm_grad(w: Tensor) -> Tensor:
    """`U @ Vh`, with the singular vectors of the nonzero singular values."""
    return grad(torch.ones_like, w, _grouping(w, SingularValues()))


def nuclear_norm_prox(w: Tensor, t: Threshold) -> Tensor:
    """Soft threshold of the singular values by `t` (Cai, Candes and Shen 2010).

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.nuclear_norm_prox(torch.diag(torch.tensor([3.0, 0.5])), t=1.0).diag()
        tensor([2., 0.])
    """
    return prox(lambda u: L1.rho_prox(u, t), w, _grouping(w, SingularValues()))


def _grouping(w: Tensor, groups: Groups) -> Grouping:
    grouping = resolve(groups)
    if isinstance(grouping, NM):
        raise ValueError(f"groups={grouping} is for L0 alone, as a penalty: L0(params, lam, groups={grouping})")
    grouping.check(w.shape)
    return grouping
