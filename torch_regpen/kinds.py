"""The kinds of penalty: each a scalar function `rho` of magnitudes; and the known names of known products."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from . import functional as F
from .groups import Elements, Grouping, Groups, SingularValues
from .penalty import Penalty
from .selection import Params, Select

__all__ = [
    "L0",
    "L1",
    "L2",
    "MCP",
    "SCAD",
    "ElasticNet",
    "GroupLasso",
    "LHalf",
    "LogSum",
    "NuclearNorm",
    "SparseGroupLasso",
]


class ElasticNet(Penalty):
    """`lam * (r * sum |w| + (1 - r) * sum w^2)`, with `r = l1_ratio` (Zou and Hastie 2005).

    scikit-learn's ElasticNet is `alpha = lam*(r + 2*(1-r))`, its `l1_ratio = lam*r/alpha`, on its loss `SSE/(2n)`.

    Args:
        params, lam, select and the rest: see `Penalty`.
        l1_ratio: the share of L1, from 0 to 1.
        positive: the prox also keeps `w >= 0`, at `lam=0` too.

    Raises:
        ValueError: `l1_ratio` is not from 0 to 1; and as `Penalty`.
    """

    def __init__(self, params: Params, lam: float, *, l1_ratio: float = 0.5, positive: bool = False, **kw: Any) -> None:
        self.l1_ratio = _share("l1_ratio", l1_ratio)
        self.positive = positive
        super().__init__(params, lam, **kw)

    @property
    def coefficients(self) -> tuple[float, float]:  # type: ignore[override]
        """`(r, 1 - r)`."""
        return self.l1_ratio, 1 - self.l1_ratio

    def rho(self, u: Tensor) -> Tensor:
        """`r*u + (1-r)*u^2`."""
        return F.elastic_net_rho(u, *self.coefficients)

    def rho_grad(self, u: Tensor) -> Tensor:
        """`r + 2*(1-r)*u`."""
        return F.elastic_net_rho_grad(u, *self.coefficients)

    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor:
        """`max(u - t*r, 0) / (1 + 2*t*(1-r))`."""
        return F.elastic_net_rho_prox(u, t, *self.coefficients)


class L1(ElasticNet):
    """`lam * sum |w|`: subtracts a constant, so that weights that do not matter become exactly 0 (Tibshirani 1996).

    Args:
        params, lam, select and the rest: see `Penalty`; over groups it is the group lasso.
        positive: the prox also keeps `w >= 0`, at `lam=0` too.
    """

    def __init__(self, params: Params, lam: float, **kw: Any) -> None:
        super().__init__(params, lam, l1_ratio=1.0, **kw)


class L2(ElasticNet):
    """`lam * sum w^2`, without a 1/2: `weight_decay` is `2*lam`. It shrinks in proportion, and zeroes nothing.

    Args:
        params, lam, select and the rest: see `Penalty`; groups make no difference to a sum of squares.
    """

    def __init__(self, params: Params, lam: float, **kw: Any) -> None:
        super().__init__(params, lam, l1_ratio=0.0, **kw)

    @classmethod
    def from_weight_decay(cls, params: Params, weight_decay: float, *, select: Select | None = "all") -> L2:
        """The L2 that equals torch.optim's `weight_decay`: `lam = weight_decay/2`, biases and norms included.

        Args:
            params: see `Penalty`.
            weight_decay: as given to the optimizer, whose own is then to be 0.
            select: see `Penalty`.
        """
        return cls(params, weight_decay / 2, select=select)


class MCP(Penalty):
    """`lam * sum rho(|w|)`, `rho(u) = u - u^2/(2*knee)` up to the knee, then `knee/2` (Zhang 2010).

    L1 near zero, flat from the knee on: large weights carry no bias. In the usual notation MCP(lambda, gamma),
    `knee = gamma*lambda`.

    Args:
        params, lam, select and the rest: see `Penalty`; `lam` is the slope at zero.
        knee: in units of the weights, more than 0. Where a step times lambda exceeds it, the prox is a hard threshold.
    """

    def __init__(self, params: Params, lam: float, *, knee: float = 0.1, **kw: Any) -> None:
        self.knee = _more_than("knee", knee, 0)
        super().__init__(params, lam, **kw)

    def rho(self, u: Tensor) -> Tensor:
        """`u - u^2/(2*knee)` up to the knee, then `knee/2`."""
        return F.mcp_rho(u, self.knee)

    def rho_grad(self, u: Tensor) -> Tensor:
        """`1 - u/knee` up to the knee, then 0."""
        return F.mcp_rho_grad(u, self.knee)

    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor:
        """Firm threshold, or hard threshold for `t >= knee`."""
        return F.mcp_rho_prox(u, t, self.knee)


class SCAD(Penalty):
    """`lam * sum rho(|w|)`, `rho` L1 up to `knee/a`, its slope falling to 0 at the knee (Fan and Li 2001).

    In the usual notation SCAD(lambda, a), `knee = a*lambda`.

    Args:
        params, lam, select and the rest: see `Penalty`; `lam` is the slope at zero.
        knee: in units of the weights, more than 0: from there on `rho` is flat.
        a: more than 1; the slope begins to fall at `knee/a`.
    """

    def __init__(self, params: Params, lam: float, *, knee: float = 0.1, a: float = 3.7, **kw: Any) -> None:
        self.knee = _more_than("knee", knee, 0)
        self.a = _more_than("a", a, 1)
        super().__init__(params, lam, **kw)

    def rho(self, u: Tensor) -> Tensor:
        """With `k = knee/a`: `u` up to k; `(2*knee*u - u^2 - k^2)/(2*(a-1)*k)` up to the knee; then `k*(a+1)/2`."""
        return F.scad_rho(u, self.knee, self.a)

    def rho_grad(self, u: Tensor) -> Tensor:
        """1 up to `knee/a`, falling in a line to 0 at the knee."""
        return F.scad_rho_grad(u, self.knee, self.a)

    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor:
        """The best of the minimisers on the three pieces."""
        return F.scad_rho_prox(u, t, self.knee, self.a)


class LogSum(Penalty):
    """`lam * sum eps*log(1 + |w|/eps)` (Candes, Wakin and Boyd 2008).

    In the usual notation `alpha*log(1 + |w|/eps)`: `lam = alpha/eps`.

    Args:
        params, lam, select and the rest: see `Penalty`; `lam` is the slope at zero.
        eps: in units of the weights, more than 0: the size at which the slope has fallen to a half.
    """

    def __init__(self, params: Params, lam: float, *, eps: float = 0.05, **kw: Any) -> None:
        self.eps = _more_than("eps", eps, 0)
        super().__init__(params, lam, **kw)

    def rho(self, u: Tensor) -> Tensor:
        """`eps*log(1 + u/eps)`."""
        return F.log_sum_rho(u, self.eps)

    def rho_grad(self, u: Tensor) -> Tensor:
        """`1 / (1 + u/eps)`."""
        return F.log_sum_rho_grad(u, self.eps)

    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor:
        """The larger root of the stationarity condition where it beats 0; it jumps for `t > eps`."""
        return F.log_sum_rho_prox(u, t, self.eps)


class LHalf(Penalty):
    """`lam * sum |w|^0.5` (Xu, Chang, Xu and Zhang 2012).

    Its gradient is infinite at 0 and taken as 0 there; it never lets go of a zero but by a jump of the prox.

    Args:
        params, lam, select and the rest: see `Penalty`.
    """

    def rho(self, u: Tensor) -> Tensor:
        """`u^0.5`."""
        return F.l_half_rho(u)

    def rho_grad(self, u: Tensor) -> Tensor:
        """`0.5 * u^-0.5`, infinite at 0."""
        return F.l_half_rho_grad(u)

    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor:
        """Half threshold: 0 up to `u = 1.5 * t^(2/3)`."""
        return F.l_half_rho_prox(u, t)


class L0(Penalty):
    """`lam *` the number of weights that are not zero, or of elements in groups that are not (Blumensath, Davies 2008).

    It has no gradient to descend: for the proximal and the dual mode, where it is a hard threshold at `sqrt(2*t)`.

    Args:
        params, lam, select and the rest: see `Penalty`.
    """

    def rho(self, u: Tensor) -> Tensor:
        """1 where `u > 0`."""
        return F.l0_rho(u)

    def rho_grad(self, u: Tensor) -> Tensor:
        """0, and infinite at 0; for the audit only."""
        return F.l0_rho_grad(u)

    def has_grad(self) -> bool:
        return False

    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor:
        """Hard threshold at `sqrt(2*t)`."""
        return F.l0_rho_prox(u, t)


class GroupLasso(L1):
    """`lam * sum_g sqrt(n_g) * ||w_g||`, `n_g` the size of group g: whole groups become exactly 0 (Yuan and Lin 2006).

    Args:
        params, lam, select and the rest: see `Penalty`.
        groups: `"output"` (a neuron's incoming weights, a filter), `"input"`, a dimension, `"tensor"`, or one of
            `torch_regpen.groups`.
    """

    def __init__(self, params: Params, lam: float, *, groups: Groups = "output", **kw: Any) -> None:
        super().__init__(params, lam, groups=groups, **kw)


class NuclearNorm(L1):
    """`lam *` the sum of the singular values of each tensor, flattened to dim 0 by the rest: low rank (Fazel 2002).

    Each use costs a singular value decomposition of each tensor, see `torch_regpen.groups.SingularValues`.

    Args:
        params, lam, select and the rest: see `Penalty`.
    """

    def __init__(self, params: Params, lam: float, **kw: Any) -> None:
        super().__init__(params, lam, groups=SingularValues(), **kw)


class SparseGroupLasso(ElasticNet):
    """`lam * (r * sum |w| + (1 - r) * sum_g sqrt(n_g) * ||w_g||)`: zeros within groups, and whole groups (Simon 2013).

    Args:
        params, lam, select and the rest: see `Penalty`; it takes no `weights`.
        l1_ratio: `r`, the share of L1, from 0 to 1.
        groups: see `GroupLasso`.
    """

    coefficients = (1.0, 0.0)

    def __init__(self, params: Params, lam: float, *, groups: Groups = "output", **kw: Any) -> None:
        if kw.get("weights") is not None:
            raise ValueError("SparseGroupLasso takes no weights: give them to L1 or GroupLasso, and add the two")
        super().__init__(params, lam, groups=groups, **kw)

    def factors(self, grouping: Grouping) -> list[tuple[Grouping, float]]:
        return [(Elements(), self.l1_ratio), (grouping, 1 - self.l1_ratio)]


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, not {value}")
    return float(value)


def _more_than(name: str, value: float, bound: float) -> float:
    if not bound < value < math.inf:
        raise ValueError(f"{name} must be more than {bound} and finite, not {value}")
    return float(value)
