"""The non-convex kinds, which shrink large weights little or not at all: MCP, SCAD, log-sum, L1/2 and L0."""

from __future__ import annotations

from typing import Any

from ..scalar import ScalarL0, ScalarLHalf, ScalarLogSum, ScalarMCP, ScalarSCAD
from .base import Penalty
from .rules import Params

__all__ = ["L0", "MCP", "SCAD", "LHalf", "LogSum"]


class MCP(ScalarMCP, Penalty):
    """`lam * sum rho(|w|)`, `rho(u) = u - u^2/(2*knee)` up to the knee, then `knee/2` (Zhang 2010).

    It is L1 near zero and flat from the knee on, so that large weights carry no bias. In the usual notation
    MCP(lambda, gamma), `knee = gamma*lambda`.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`; `lam` is the slope at zero.
        knee: in units of the weights, more than 0. Where a step times lambda exceeds it, the prox is a hard threshold.

    Example:
        >>> penalty = MCP(nn.Linear(2, 2), lam=0.1, knee=0.2)
    """

    def __init__(self, params: Params, lam: float, *, knee: float = 0.1, **kw: Any) -> None:
        ScalarMCP.__init__(self, knee)
        Penalty.__init__(self, params, lam, **kw)


class SCAD(ScalarSCAD, Penalty):
    """`lam * sum rho(|w|)`, `rho` L1 up to `knee/a`, its slope falling to 0 at the knee (Fan and Li 2001).

    In the usual notation SCAD(lambda, a), `knee = a*lambda`.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`; `lam` is the slope at zero.
        knee: in units of the weights, more than 0: from there on `rho` is flat.
        a: more than 1; the slope begins to fall at `knee/a`.

    Example:
        >>> penalty = SCAD(nn.Linear(2, 2), lam=0.1, knee=0.2)
    """

    def __init__(self, params: Params, lam: float, *, knee: float = 0.1, a: float = 3.7, **kw: Any) -> None:
        ScalarSCAD.__init__(self, knee, a)
        Penalty.__init__(self, params, lam, **kw)


class LogSum(ScalarLogSum, Penalty):
    """`lam * sum eps*log(1 + |w|/eps)` (Candes, Wakin and Boyd 2008).

    In the usual notation `alpha*log(1 + |w|/eps)`, `lam = alpha/eps`.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`; `lam` is the slope at zero.
        eps: in units of the weights, more than 0: the size at which the slope has fallen to a half.

    Example:
        >>> penalty = LogSum(nn.Linear(2, 2), lam=0.1, eps=0.05)
    """

    def __init__(self, params: Params, lam: float, *, eps: float = 0.05, **kw: Any) -> None:
        ScalarLogSum.__init__(self, eps)
        Penalty.__init__(self, params, lam, **kw)


class LHalf(ScalarLHalf, Penalty):
    """`lam * sum |w|^0.5` (Xu, Chang, Xu and Zhang 2012).

    The gradient is infinite at 0 and is taken as 0 there. A weight leaves zero only by a jump of the prox.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`.

    Example:
        >>> penalty = LHalf(nn.Linear(2, 2), lam=0.1)
    """


class L0(ScalarL0, Penalty):
    """`lam *` the number of weights that are not zero, or of elements in groups that are not (Blumensath, Davies 2008).

    It has no gradient to descend. In the proximal and the dual mode it is a hard threshold at `sqrt(2*t)`.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`.

    Example:
        >>> penalty = L0(nn.Linear(2, 2), lam=0.1)
    """

    def has_grad(self) -> bool:
        return False
