"""Penalties on the weights of any PyTorch model: in the loss, in the optimizer, with exact zeros."""

from . import functional, groups
from .extra import ActivityPenalty, Orthogonal
from .kinds import (
    L0,
    L1,
    L2,
    MCP,
    SCAD,
    ElasticNet,
    GroupLasso,
    LHalf,
    LogSum,
    NuclearNorm,
    SparseGroupLasso,
)
from .optim import RegularizedOptimizer
from .penalty import Penalty, Sum

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
    "functional",
    "groups",
]
