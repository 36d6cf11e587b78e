"""Penalties on the weights of any PyTorch model: in the loss, in the optimizer, with exact zeros."""

from typing import TYPE_CHECKING

from . import functional, groups
from .optim import RegularizedOptimizer
from .penalties.activity import ActivityPenalty
from .penalties.base import Penalty, Sum
from .penalties.convex import L1, L2, ElasticNet, GroupLasso, NuclearNorm, SparseGroupLasso
from .penalties.nonconvex import L0, MCP, SCAD, LHalf, LogSum
from .penalties.orthogonal import Orthogonal

if TYPE_CHECKING:
    from .compare.run import compare  # a module that can be called, which type checkers cannot follow
else:
    from . import compare

__all__ = [
    "L0",
    "L1",
    "L2",
    "MCP",
    "SCAD",
    "ActivityPenalty",
    "ElasticNet",
    "GroupLasso",
    "LHalf",
    "LogSum",
    "NuclearNorm",
    "Orthogonal",
    "Penalty",
    "RegularizedOptimizer",
    "SparseGroupLasso",
    "Sum",
    "compare",
    "functional",
    "groups",
]
