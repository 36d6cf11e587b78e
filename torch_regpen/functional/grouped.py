"""Penalties on groups of elements, and on singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups.grouping import Grouping
from ..groups.names import Groups, resolve
from ..groups.nm import NM
from ..groups.singular_values import SingularValues
from ..scalar import ScalarElasticNet, Threshold
from .elementwise import l1_grad, l1_value, soft_threshold
from .magnitudes import grad, prox, value

__all__ = [
    "group_lasso_grad",
    "group_lasso_prox",
    "group_lasso_value",
    "nuclear_norm_grad",
    "nuclear_norm_prox",
    "nuclear_norm_value",
    "sparse_group_lasso_grad",
    "sparse_group_lasso_prox",
    "sparse_group_lasso_value",
]

L1 = ScalarElasticNet(1.0, 0.0)


def group_lasso_value(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sum_g sqrt(n_g) * ||w_g||`, where `n_g` is the size of group g.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.group_lasso_value(torch.tensor([[2.0] * 4, [0.5] * 4]))
        tensor(10.)
    """
    return value(lambda u: u, w, _grouping(w, groups))


def group_lasso_grad(w: Tensor, groups: Groups = "output") -> Tensor:
    """`sqrt(n_g) * w_g / ||w_g||` for each group, or 0 for a zero group.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.group_lasso_grad(torch.tensor([[2.0] * 4, [0.0] * 4]))[:, 0]
        tensor([1., 0.])
    """
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
    """`r * sum |w| + (1 - r) * sum_g sqrt(n_g) * ||w_g||`, where `r = l1_ratio` (Simon, Friedman et al. 2013).

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.sparse_group_lasso_value(torch.tensor([[3.0, 4.0]]), l1_ratio=0.5)
        tensor(7.0355)
    """
    return l1_ratio * l1_value(w) + (1 - l1_ratio) * group_lasso_value(w, groups)


def sparse_group_lasso_grad(w: Tensor, l1_ratio: float, groups: Groups = "output") -> Tensor:
    """`r * sign(w) + (1 - r) * sqrt(n_g) * w_g / ||w_g||`, or 0 for a zero group.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.sparse_group_lasso_grad(torch.tensor([[3.0, 4.0]]), l1_ratio=0.5)
        tensor([[0.9243, 1.0657]])
    """
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
    """The sum of the singular values of `w`, viewed as a matrix with `w.shape[0]` rows (Fazel 2002).

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.nuclear_norm_value(torch.diag(torch.tensor([3.0, 0.5])))
        tensor(3.5000)
    """
    return value(lambda u: u, w, _grouping(w, SingularValues()))


def nuclear_norm_grad(w: Tensor) -> Tensor:
    """`U @ Vh`, with the singular vectors of the nonzero singular values.

    Example:
        >>> import torch, torch_regpen.functional as F
        >>> F.nuclear_norm_grad(torch.diag(torch.tensor([3.0, 0.5])))
        tensor([[1., 0.],
                [0., 1.]])
    """
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
