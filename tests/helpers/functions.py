"""The functions of torch_regpen.functional by kind, at the shapes of `kinds`."""

from helpers.kinds import EPS, KNEE, RATIO, A
from torch_regpen import functional as F

FUNCTIONAL = {
    "L1": (F.l1_value, F.l1_grad, F.l1_prox, {}),
    "L2": (F.l2_value, F.l2_grad, F.l2_prox, {}),
    "ElasticNet": (F.elastic_net_value, F.elastic_net_grad, F.elastic_net_prox, {"l1_ratio": RATIO}),
    "GroupLasso": (F.group_lasso_value, F.group_lasso_grad, F.group_lasso_prox, {}),
    "MCP": (F.mcp_value, F.mcp_grad, F.mcp_prox, {"knee": KNEE}),
    "SCAD": (F.scad_value, F.scad_grad, F.scad_prox, {"knee": KNEE, "a": A}),
    "LogSum": (F.log_sum_value, F.log_sum_grad, F.log_sum_prox, {"eps": EPS}),
    "LHalf": (F.l_half_value, F.l_half_grad, F.l_half_prox, {}),
    "L0": (F.l0_value, F.l0_grad, F.l0_prox, {}),
}


def value(kind, w):
    function, _, _, shape = FUNCTIONAL[kind]
    return function(w, **shape)


def grad(kind, w):
    _, function, _, shape = FUNCTIONAL[kind]
    return function(w, **shape)


def prox(kind, w, t):
    _, _, function, shape = FUNCTIONAL[kind]
    return function(w, t, **shape)
