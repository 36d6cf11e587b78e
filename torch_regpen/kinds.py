"""The kinds of penalty: each a scalar function `rho` of magnitudes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import functional as F
from .groups import Grouping
from .penalty import Penalty
from .selection import Params

__all__ = ["L1", "L2", "ElasticNet", "GroupLasso"]


class ElasticNet(Penalty):
    """`lam * (r * sum |w| + (1 - r) * sum w^2)`, with `r = l1_ratio` (Zou and Hastie 2005).

    scikit-learn's ElasticNet is `alpha = lam*(r + 2*(1-r))`, its `l1_ratio = lam*r/alpha`, on its loss `SSE/(2n)`.

    Args:
        params, lam, select, groups: see `Penalty`.
        l1_ratio: the share of L1, from 0 to 1.

    Raises:
        ValueError: `l1_ratio` is not from 0 to 1; and as `Penalty`.
    """

    def __init__(self, params: Params, lam: float, *, l1_ratio: float = 0.5, **kw: Any) -> None:
        if not 0 <= l1_ratio <= 1:
            raise ValueError(f"l1_ratio must be from 0 (all L2) to 1 (all L1), not {l1_ratio}")
        self.l1_ratio = float(l1_ratio)
        super().__init__(params, lam, **kw)

    @property
    def coefficients(self) -> tuple[float, float]:  # type: ignore[override]
        """`(r, 1 - r)`."""
        return self.l1_ratio, 1 - self.l1_ratio

    def rho(self, u: Tensor) -> Tensor:
        """`r*u + (1-r)*u^2`."""
        linear, quadratic = self.coefficients
        return linear * u + quadratic * u.square()

    def rho_grad(self, u: Tensor) -> Tensor:
        """`r + 2*(1-r)*u`."""
        linear, quadratic = self.coefficients
        return linear + 2 * quadratic * u

    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor:
        """`max(u - t*r, 0) / (1 + 2*t*(1-r))`."""
        return F.elastic_net_rho_prox(u, t, *self.coefficients)


class L1(ElasticNet):
    """`lam * sum |w|`: subtracts a constant, so that weights that do not matter become exactly 0 (Tibshirani 1996).

    Args:
        params, lam, select, groups: see `Penalty`; over groups it is the group lasso.
    """

    def __init__(self, params: Params, lam: float, **kw: Any) -> None:
        super().__init__(params, lam, l1_ratio=1.0, **kw)


class L2(ElasticNet):
    """`lam * sum w^2`, without a 1/2: `weight_decay` is `2*lam`. It shrinks in proportion, and zeroes nothing.

    Args:
        params, lam, select, groups: see `Penalty`; groups make no difference to a sum of squares.
    """

    def __init__(self, params: Params, lam: float, **kw: Any) -> None:
        super().__init__(params, lam, l1_ratio=0.0, **kw)

    @classmethod
    def from_weight_decay(cls, params: Params, weight_decay: float, *, select: Any = "all") -> L2:
        """The L2 that equals torch.optim's `weight_decay`: `lam = weight_decay/2`, biases and norms included.

        Args:
            params: see `Penalty`.
            weight_decay: as given to the optimizer, whose own is then to be 0.
            select: see `Penalty`; tensors given as such are all taken, and `select` is left at its default.
        """
        from_module = isinstance(params, nn.Module)
        return cls(params, weight_decay / 2, select=select if from_module or select != "all" else None)


class GroupLasso(L1):
    """`lam * sum_g sqrt(n_g) * ||w_g||`, `n_g` the size of group g: whole groups become exactly 0 (Yuan and Lin 2006).

    Args:
        params, lam, select: see `Penalty`.
        groups: `"output"` (a neuron's incoming weights, a filter), `"input"`, or a dimension.
    """

    def __init__(self, params: Params, lam: float, *, groups: str | int | Grouping = "output", **kw: Any) -> None:
        super().__init__(params, lam, groups=groups, **kw)
