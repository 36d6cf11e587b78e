"""Penalties on single elements."""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups.grouping import Elements, working_dtype
from ..scalar import ScalarElasticNet, ScalarL0, ScalarLHalf, ScalarLogSum, ScalarMCP, ScalarSCAD, Threshold
from .magnitudes import grad, prox, value

__all__ = [
    "elastic_net_grad",
    "elastic_net_prox",
    "elastic_net_value",
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
    "scad_grad",
    "scad_prox",
    "scad_value",
    "soft_threshold",
]


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
        return prox(lambda u: ScalarElasticNet(1.0, 0.0).rho_prox(u, t), w, Elements())
    x = w.to(working_dtype(w.dtype))
    return (x - torch.clamp(x, -t, t)).to(w.dtype)  # type: ignore[arg-type]  # both numbers, or both tensors


def l1_value(w: Tensor) -> Tensor:
    """`sum |w|`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l1_value(torch.tensor([3.0, -0.5]))
        tensor(3.5000)
    """
    return elastic_net_value(w, 1.0)


def l1_grad(w: Tensor) -> Tensor:
    """`sign(w)`, 0 at 0.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l1_grad(torch.tensor([3.0, 0.0, -0.5]))
        tensor([ 1.,  0., -1.])
    """
    return elastic_net_grad(w, 1.0)


def l1_prox(w: Tensor, t: Threshold) -> Tensor:
    """`sign(w) * max(|w| - t, 0)`; same as `soft_threshold`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l1_prox(torch.tensor([3.0, -0.5]), t=1.0)
        tensor([2., 0.])
    """
    return soft_threshold(w, t)


def l2_value(w: Tensor) -> Tensor:
    """`sum |w|^2`, without a factor 1/2.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l2_value(torch.tensor([3.0, -2.0]))
        tensor(13.)
    """
    return elastic_net_value(w, 0.0)


def l2_grad(w: Tensor) -> Tensor:
    """`2*w`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l2_grad(torch.tensor([3.0, -2.0]))
        tensor([ 6., -4.])
    """
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
    """`r * sum |w| + (1 - r) * sum |w|^2`, where `r = l1_ratio`, from 0 to 1.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.elastic_net_value(torch.tensor([3.0, 0.5]), l1_ratio=0.5)
        tensor(6.3750)
    """
    return value(ScalarElasticNet(l1_ratio, 1 - l1_ratio).rho, w, Elements())


def elastic_net_grad(w: Tensor, l1_ratio: float) -> Tensor:
    """`r * sign(w) + 2 * (1 - r) * w`, where `r = l1_ratio`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.elastic_net_grad(torch.tensor([3.0, 0.5]), l1_ratio=0.5)
        tensor([3.5000, 1.0000])
    """
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
    """`sum rho(|w|)`, where `rho(u) = u - u^2/(2*knee)` up to `u = knee`, then `knee/2` (Zhang 2010).

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.mcp_value(torch.tensor([1.0, 3.0]), knee=2.0)
        tensor(1.7500)
    """
    return value(ScalarMCP(knee).rho, w, Elements())


def mcp_grad(w: Tensor, knee: float) -> Tensor:
    """`sign(w) * max(1 - |w|/knee, 0)`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.mcp_grad(torch.tensor([1.0, 3.0]), knee=2.0)
        tensor([0.5000, 0.0000])
    """
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
    """`sum rho(|w|)`; the slope of `rho` is 1 up to `knee/a`, then linear down to 0 at `knee` (Fan and Li 2001).

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.scad_value(torch.tensor([1.0, 5.0]), knee=4.0)
        tensor(3.5405)
    """
    return value(ScalarSCAD(knee, a).rho, w, Elements())


def scad_grad(w: Tensor, knee: float, a: float = 3.7) -> Tensor:
    """`sign(w) * rho'(|w|)`; for `rho` see `scad_value`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.scad_grad(torch.tensor([1.0, 5.0]), knee=4.0)
        tensor([1., 0.])
    """
    return grad(ScalarSCAD(knee, a).rho_grad, w, Elements())


def scad_prox(w: Tensor, t: Threshold, knee: float, a: float = 3.7) -> Tensor:
    """Soft threshold for small `|w|`, `w` itself above the knee, and the best piece of `rho` in between.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.scad_prox(torch.tensor([0.25, 1.0, 5.0]), t=0.5, knee=4.0)
        tensor([0.0000, 0.5000, 5.0000])
    """
    return prox(lambda u: ScalarSCAD(knee, a).rho_prox(u, t), w, Elements())


def log_sum_value(w: Tensor, eps: float) -> Tensor:
    """`sum eps*log(1 + |w|/eps)` (Candes, Wakin and Boyd 2008).

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.log_sum_value(torch.tensor([1.0, 3.0]), eps=1.0)
        tensor(2.0794)
    """
    return value(ScalarLogSum(eps).rho, w, Elements())


def log_sum_grad(w: Tensor, eps: float) -> Tensor:
    """`sign(w) / (1 + |w|/eps)`.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.log_sum_grad(torch.tensor([1.0, 3.0]), eps=1.0)
        tensor([0.5000, 0.2500])
    """
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
    """`sum |w|^0.5` (Xu, Chang, Xu and Zhang 2012).

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l_half_value(torch.tensor([4.0, 9.0]))
        tensor(5.)
    """
    return value(ScalarLHalf().rho, w, Elements())


def l_half_grad(w: Tensor) -> Tensor:
    """`0.5 * sign(w) * |w|^-0.5`, or 0 at 0, where it would be infinite.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l_half_grad(torch.tensor([0.0, 4.0]))
        tensor([0.0000, 0.2500])
    """
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
    """The number of nonzero elements.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l0_value(torch.tensor([0.0, 3.0, -0.5]))
        tensor(2.)
    """
    return value(ScalarL0().rho, w, Elements())


def l0_grad(w: Tensor) -> Tensor:
    """0 everywhere, so gradient descent ignores L0.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l0_grad(torch.tensor([0.0, 3.0]))
        tensor([0., 0.])
    """
    return grad(ScalarL0().rho_grad, w, Elements())


def l0_prox(w: Tensor, t: Threshold) -> Tensor:
    """Hard threshold: 0 if `|w| <= sqrt(2*t)`, else `w` (Blumensath and Davies 2008).

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.l0_prox(torch.tensor([0.5, 3.0]), t=0.5)
        tensor([0., 3.])
    """
    return prox(lambda u: ScalarL0().rho_prox(u, t), w, Elements())
