"""Penalties on the weights of any PyTorch model: in the loss, in the optimizer, with exact zeros."""

from . import functional
from .kinds import L1, L2, ElasticNet, GroupLasso
from .optim import RegularizedOptimizer
from .penalty import Penalty, Sum

__all__ = ["L1", "L2", "ElasticNet", "GroupLasso", "Penalty", "RegularizedOptimizer", "Sum", "functional"]
