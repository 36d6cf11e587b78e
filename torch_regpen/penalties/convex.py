"""Convex penalties: L1, L2, the elastic net, and L1 on groups and on singular values."""

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


class _Convex(ScalarElasticNet, Penalty):  # type: ignore[misc]
    """`rho(u) = a*u + b*u^2`, with `(a, b)` in `coefficients`."""

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


class ElasticNet(_Convex):
    """`lam * (r * sum |w| + (1 - r) * sum |w|^2)`, where `r = l1_ratio` (Zou and Hastie 2005).

    scikit-learn's ElasticNet with `alpha = lam*(r + 2*(1 - r))` and `l1_ratio = lam*r/alpha` is the same penalty, added
    to the loss `SSE/(2n)`.

    Args:
        params, lam, select, exclude, groups, scale, center, weights: see `Penalty`.
        l1_ratio: the share `r` of L1, from 0 to 1.
        positive: if True, the prox also keeps `w >= 0`, even with `lam=0`.

    Raises:
        ValueError: `l1_ratio` is not between 0 and 1; see also `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import ElasticNet
        >>> w = torch.tensor([[3.0, -1.0]], requires_grad=True)
        >>> ElasticNet([w], lam=0.5, l1_ratio=0.5)().item()  # 0.5 * (0.5 * 4 + 0.5 * 10)
        3.5
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
            raise ValueError(f"l1_ratio must be between 0 and 1, but got {l1_ratio}")
        self.l1_ratio = float(l1_ratio)
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

    @property
    def coefficients(self) -> tuple[float, float]:  # type: ignore[override]
        """`(r, 1 - r)`."""
        return self.l1_ratio, 1 - self.l1_ratio


class L1(_Convex):
    """`lam * sum |w|` (Tibshirani 1996). The proximal map makes weights that do not matter exactly 0.

    Args:
        params, lam, select, exclude, scale, center, weights: see `Penalty`.
        groups: see `Penalty`; with groups this is the group lasso.
        positive: if True, the prox also keeps `w >= 0`, even with `lam=0`.

    Raises:
        TypeError, ValueError: see `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import L1
        >>> w = torch.tensor([[3.0, -1.0]], requires_grad=True)
        >>> L1([w], lam=0.5)().item()
        2.0
    """

    coefficients = (1.0, 0.0)


class L2(_Convex):
    """`lam * sum |w|^2`, without a factor 1/2: it equals `weight_decay=2*lam`. It shrinks weights, but not to zero.

    Args:
        params, lam, select, exclude, scale, center, weights: see `Penalty`.
        groups: see `Penalty`; groups do not change the sum of squares, but `weights` are then one per group.
        positive: see `L1`.

    Raises:
        TypeError, ValueError: see `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import L2
        >>> w = torch.tensor([[3.0, -1.0]], requires_grad=True)
        >>> L2([w], lam=0.5)().item()
        5.0
    """

    coefficients = (0.0, 1.0)

    @classmethod
    def from_weight_decay(cls, params: Params, weight_decay: float, *, select: Select | None = "all") -> L2:
        """Return the L2 with `lam = weight_decay/2`, which equals torch.optim's `weight_decay`.

        Args:
            params: see `Penalty`.
            weight_decay: the value for torch.optim; set the optimizer's own weight_decay to 0.
            select: see `Penalty`; the default includes biases and norm scales, as torch.optim does.

        Raises:
            TypeError, ValueError: see `Penalty`.

        Example:
            >>> import torch
            >>> from torch_regpen import L2
            >>> L2.from_weight_decay(torch.nn.Linear(2, 2), weight_decay=0.5).lam
            0.25
        """
        penalty: L2 = cls(params, weight_decay / 2, select=select)
        return penalty


class GroupLasso(L1):
    """`lam * sum_g sqrt(n_g) * ||w_g||`, where group g has `n_g` elements (Yuan and Lin 2006). It zeroes whole groups.

    Args:
        params, lam, select, exclude, scale, center, weights, positive: see `Penalty` and `L1`.
        groups: "output" (one group per output unit: the incoming weights of a neuron, a filter), "input" (one per input
            unit), an int (a dimension), "tensor", or a grouping from `torch_regpen.groups`.

    Raises:
        TypeError, ValueError: see `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import GroupLasso
        >>> w = torch.ones(3, 4, requires_grad=True)  # 3 groups of 4 weights
        >>> GroupLasso([w], lam=0.5)().item()  # 0.5 * 3 * sqrt(4) * 2
        6.0
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
    """`lam * sum_i sigma_i`, over the singular values of each tensor (Fazel 2002). The prox reduces the rank.

    A tensor counts as a matrix with `w.shape[0]` rows. Each use computes the singular value decomposition of every
    tensor; see `torch_regpen.groups.SingularValues` for its cost.

    Args:
        params, lam, select, exclude, center: see `Penalty`.
        weights: not supported.
        positive: see `L1`; with `positive=True` there is no prox in closed form.

    Raises:
        ValueError: a tensor has fewer than 2 dimensions; `weights` are given; see also `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import NuclearNorm
        >>> w = torch.diag(torch.tensor([3.0, 2.0]))
        >>> NuclearNorm([w], lam=0.5)().item()
        2.5
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
    """`lam * (r * sum |w| + (1 - r) * sum_g sqrt(n_g) * ||w_g||)`, where `r = l1_ratio` (Simon, Friedman et al. 2013).

    It zeroes whole groups, and elements within the other groups.

    Args:
        params, lam, select, exclude, scale, center, positive: see `Penalty` and `L1`.
        weights: not supported; add an `L1` and a `GroupLasso` with weights instead.
        l1_ratio: the share `r` of L1, from 0 to 1.
        groups: see `GroupLasso`.

    Raises:
        ValueError: `l1_ratio` is not between 0 and 1; `weights` are given; see also `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import SparseGroupLasso
        >>> w = torch.ones(3, 4, requires_grad=True)
        >>> SparseGroupLasso([w], lam=0.5, l1_ratio=0.5)().item()  # 0.5 * (0.5 * 12 + 0.5 * 12)
        6.0
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
        weights: None = None,
        l1_ratio: float = 0.5,
        positive: bool = False,
    ) -> None:
        if weights is not None:
            raise ValueError("SparseGroupLasso takes no weights: give them to L1 or GroupLasso, and add the two")
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
