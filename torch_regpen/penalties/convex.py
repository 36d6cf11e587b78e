"""The convex kinds: L1, L2, the elastic net, and their products with groups and singular values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from ..groups.grouping import Elements, Grouping
from ..groups.names import Groups
from ..groups.singular_values import SingularValues
from ..scalar import ScalarElasticNet
from .base import Penalty
from .rules import Params, Select

__all__ = ["L1", "L2", "ElasticNet", "GroupLasso", "NuclearNorm", "SparseGroupLasso"]

Center = Literal["initial"] | Mapping[str, Tensor] | None


class ElasticNet(ScalarElasticNet, Penalty):
    """`lam * (r * sum |w| + (1 - r) * sum w^2)`, with `r = l1_ratio` (Zou and Hastie 2005).

    scikit-learn's ElasticNet has `alpha = lam*(r + 2*(1-r))` and `l1_ratio = lam*r/alpha`, on its loss `SSE/(2n)`.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`.
        l1_ratio: the share of L1, from 0 to 1.
        positive: the prox also keeps `w >= 0`, at `lam=0` too.

    Raises:
        ValueError: `l1_ratio` is not from 0 to 1; and as `Penalty`.

    Example:
        >>> penalty = ElasticNet(nn.Linear(2, 2), lam=0.1, l1_ratio=0.9)
    """

    def __init__(
        self,
        params: Params,
        lam: float,
        *,
        select: Select | None = None,
        exclude: Select | None = None,
        groups: Groups | None = None,
        scale: bool = True,
        center: Center = None,
        weights: Mapping[str, Tensor] | None = None,
        l1_ratio: float = 0.5,
        positive: bool = False,
    ) -> None:
        if not 0 <= l1_ratio <= 1:
            raise ValueError(f"l1_ratio must be from 0 to 1, not {l1_ratio}")
        self.l1_ratio = float(l1_ratio)
        self.positive = positive
        Penalty.__init__(
            self,
            params,
            lam,
            select=select,
            exclude=exclude,
            groups=groups,
            scale=scale,
            center=center,
            weights=weights,
        )

    @property
    def coefficients(self) -> tuple[float, float]:  # type: ignore[override]
        """`(r, 1 - r)`."""
        return self.l1_ratio, 1 - self.l1_ratio


class L1(ScalarElasticNet, Penalty):
    """`lam * sum |w|`: subtracts a constant, so that weights that do not matter become exactly 0 (Tibshirani 1996).

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`; over groups it is the group lasso.
        positive: the prox also keeps `w >= 0`, at `lam=0` too.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> penalty = L1(model, lam=0.1)
        >>> loss = model(torch.ones(1, 2)).square().mean() + penalty()
    """

    coefficients = (1.0, 0.0)

    def __init__(
        self,
        params: Params,
        lam: float,
        *,
        select: Select | None = None,
        exclude: Select | None = None,
        groups: Groups | None = None,
        scale: bool = True,
        center: Center = None,
        weights: Mapping[str, Tensor] | None = None,
        positive: bool = False,
    ) -> None:
        self.positive = positive
        Penalty.__init__(
            self,
            params,
            lam,
            select=select,
            exclude=exclude,
            groups=groups,
            scale=scale,
            center=center,
            weights=weights,
        )


class L2(ScalarElasticNet, Penalty):
    """`lam * sum w^2`, without a factor 1/2: `weight_decay` is `2*lam`. It shrinks all weights and zeroes none.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`; groups do not change a sum of
            squares.

    Example:
        >>> penalty = L2(nn.Linear(2, 2), lam=0.01)
    """

    coefficients = (0.0, 1.0)
    __init__ = Penalty.__init__

    @classmethod
    def from_weight_decay(cls, params: Params, weight_decay: float, *, select: Select | None = "all") -> L2:
        """The L2 that equals torch.optim's `weight_decay`: `lam = weight_decay/2`, biases and norms included.

        Args:
            params: see `Penalty`.
            weight_decay: as it was given to the optimizer, whose own must then be 0.
            select: see `Penalty`.
        """
        penalty: L2 = cls(params, weight_decay / 2, select=select)
        return penalty


class GroupLasso(L1):
    """`lam * sum_g sqrt(n_g) * ||w_g||`, `n_g` the size of group g: whole groups become exactly 0 (Yuan and Lin 2006).

    Args:
        params, lam, select, exclude, scale, center, weights, positive: see `Penalty` and `L1`.
        groups: `"output"` (a neuron's incoming weights, a filter), `"input"`, a dimension, `"tensor"`, or one of
            `torch_regpen.groups`.

    Example:
        >>> penalty = GroupLasso(nn.Linear(4, 3), lam=0.1)  # 3 groups of 4 weights
    """

    def __init__(
        self,
        params: Params,
        lam: float,
        *,
        select: Select | None = None,
        exclude: Select | None = None,
        groups: Groups = "output",
        scale: bool = True,
        center: Center = None,
        weights: Mapping[str, Tensor] | None = None,
        positive: bool = False,
    ) -> None:
        super().__init__(
            params,
            lam,
            select=select,
            exclude=exclude,
            groups=groups,
            scale=scale,
            center=center,
            weights=weights,
            positive=positive,
        )


class NuclearNorm(L1):
    """`lam *` the sum of the singular values of each tensor, flattened to dim 0 by the rest: low rank (Fazel 2002).

    Each use takes a singular value decomposition of each tensor, see `torch_regpen.groups.SingularValues`.

    Args:
        params, lam, select, exclude, center, positive: see `Penalty` and `L1`. With `positive` it has no known prox.

    Example:
        >>> penalty = NuclearNorm(nn.Linear(4, 3), lam=0.1)
    """

    def __init__(
        self,
        params: Params,
        lam: float,
        *,
        select: Select | None = None,
        exclude: Select | None = None,
        center: Center = None,
        weights: Mapping[str, Tensor] | None = None,
        positive: bool = False,
    ) -> None:
        super().__init__(
            params,
            lam,
            select=select,
            exclude=exclude,
            groups=SingularValues(),
            center=center,
            weights=weights,
            positive=positive,
        )


class SparseGroupLasso(ElasticNet):
    """`lam * (r * sum |w| + (1 - r) * sum_g sqrt(n_g) * ||w_g||)`: zeros within groups, and whole groups (Simon 2013).

    Args:
        params, lam, select, exclude, scale, center, positive: see `Penalty` and `L1`. It takes no `weights`: give them
            to `L1` or `GroupLasso`, and add the two.
        l1_ratio: `r`, the share of L1, from 0 to 1.
        groups: see `GroupLasso`.

    Example:
        >>> penalty = SparseGroupLasso(nn.Linear(4, 3), lam=0.1, l1_ratio=0.3)
    """

    coefficients = (1.0, 0.0)

    def __init__(
        self,
        params: Params,
        lam: float,
        *,
        select: Select | None = None,
        exclude: Select | None = None,
        groups: Groups = "output",
        scale: bool = True,
        center: Center = None,
        l1_ratio: float = 0.5,
        positive: bool = False,
    ) -> None:
        super().__init__(
            params,
            lam,
            select=select,
            exclude=exclude,
            groups=groups,
            scale=scale,
            center=center,
            l1_ratio=l1_ratio,
            positive=positive,
        )

    def factors(self, grouping: Grouping) -> list[tuple[Grouping, float]]:
        return [(Elements(), self.l1_ratio), (grouping, 1 - self.l1_ratio)]
