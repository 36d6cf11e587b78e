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

from .elementwise import (
    elastic_net_grad,
    elastic_net_prox,
    elastic_net_value,
    l0_grad,
    l0_prox,
    l0_value,
    l1_grad,
    l1_prox,
    l1_value,
    l2_grad,
    l2_prox,
    l2_value,
    l_half_grad,
    l_half_prox,
    l_half_value,
    log_sum_grad,
    log_sum_prox,
    log_sum_value,
    mcp_grad,
    mcp_prox,
    mcp_value,
    scad_grad,
    scad_prox,
    scad_value,
    soft_threshold,
)
from .grouped import (
    group_lasso_grad,
    group_lasso_prox,
    group_lasso_value,
    nuclear_norm_grad,
    nuclear_norm_prox,
    nuclear_norm_value,
    sparse_group_lasso_grad,
    sparse_group_lasso_prox,
    sparse_group_lasso_value,
)

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
