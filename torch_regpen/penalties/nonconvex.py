"""Non-convex penalties, which shrink large weights little or not at all: MCP, SCAD, log-sum, L1/2 and L0."""

from __future__ import annotations

from typing import Any

from ..scalar import ScalarL0, ScalarLHalf, ScalarLogSum, ScalarMCP, ScalarSCAD
from .base import Penalty
from .rules import Params

__all__ = ["L0", "MCP", "SCAD", "LHalf", "LogSum"]


class MCP(ScalarMCP, Penalty):
    """`lam * sum rho(|w|)`, where `rho(u) = u - u^2/(2*knee)` up to `u = knee`, then `knee/2` (Zhang 2010).

    It is close to L1 near zero and constant above the knee, so large weights are not biased. In the usual notation
    MCP(lambda, gamma), `knee = gamma*lambda`.

    Args:
        params, select, exclude, groups, scale, center, weights: see `Penalty`.
        lam: lambda, the slope of the penalty at zero.
        knee: the magnitude above which the penalty is constant, in units of the weights; more than 0. If the step size
            times `lam` is at least `knee`, the prox is a hard threshold.

    Raises:
        ValueError: `knee` is not positive and finite; see also `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import MCP
        >>> w = torch.tensor([[0.25, -4.0]], requires_grad=True)
        >>> MCP([w], lam=0.5, knee=2.0)().item()
        0.6171875
    """

    def __init__(self, params: Params, lam: float, *, knee: float = 0.1, **kw: Any) -> None:
        ScalarMCP.__init__(self, knee)
        Penalty.__init__(self, params, lam, **kw)


class SCAD(ScalarSCAD, Penalty):
    """`lam * sum rho(|w|)`; the slope of `rho` is 1 up to `knee/a`, then linear down to 0 at `knee` (Fan and Li 2001).

    It is L1 near zero and constant above the knee. In the usual notation SCAD(lambda, a), `knee = a*lambda`.

    Args:
        params, select, exclude, groups, scale, center, weights: see `Penalty`.
        lam: lambda, the slope of the penalty at zero.
        knee: the magnitude above which the penalty is constant, in units of the weights; more than 0.
        a: the slope begins to fall at `knee/a`; more than 1.

    Raises:
        ValueError: `knee` or `a` is out of range; see also `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import SCAD
        >>> w = torch.tensor([[0.25, -4.0]], requires_grad=True)
        >>> SCAD([w], lam=0.5, knee=2.0, a=4.0)().item()
        0.75
    """

    def __init__(self, params: Params, lam: float, *, knee: float = 0.1, a: float = 3.7, **kw: Any) -> None:
        ScalarSCAD.__init__(self, knee, a)
        Penalty.__init__(self, params, lam, **kw)


class LogSum(ScalarLogSum, Penalty):
    """`lam * sum eps*log(1 + |w|/eps)` (Candes, Wakin and Boyd 2008).

    In the usual notation `alpha*log(1 + |w|/eps)`, `lam = alpha/eps`.

    Args:
        params, select, exclude, groups, scale, center, weights: see `Penalty`.
        lam: lambda, the slope of the penalty at zero.
        eps: the magnitude at which the slope has fallen to 1/2, in units of the weights; more than 0.

    Raises:
        ValueError: `eps` is not positive and finite; see also `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import LogSum
        >>> w = torch.tensor([[0.25, -4.0]], requires_grad=True)
        >>> round(LogSum([w], lam=0.5, eps=1.0)().item(), 4)
        0.9163
    """

    def __init__(self, params: Params, lam: float, *, eps: float = 0.05, **kw: Any) -> None:
        ScalarLogSum.__init__(self, eps)
        Penalty.__init__(self, params, lam, **kw)


class LHalf(ScalarLHalf, Penalty):
    """`lam * sum |w|^0.5` (Xu, Chang, Xu and Zhang 2012).

    The gradient would be infinite at 0 and is defined as 0 there. In the proximal modes, a weight leaves zero only by a
    jump of the prox.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`.

    Raises:
        TypeError, ValueError: see `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import LHalf
        >>> w = torch.tensor([[0.25, -4.0]], requires_grad=True)
        >>> LHalf([w], lam=0.5)().item()
        1.25
    """


class L0(ScalarL0, Penalty):
    """`lam *` the number of nonzero weights, or of elements in nonzero groups (Blumensath and Davies 2008).

    It has no useful gradient: use it in mode "proximal" or "dual". Its prox is a hard threshold at `sqrt(2*t)`, where
    `t` is the step size times `lam`.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`.

    Raises:
        TypeError, ValueError: see `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import L0
        >>> w = torch.tensor([[0.25, -4.0]], requires_grad=True)
        >>> L0([w], lam=0.5)().item()
        1.0
    """

    def has_grad(self) -> bool:
        return False
