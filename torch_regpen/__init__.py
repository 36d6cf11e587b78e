"""Weight penalties for PyTorch models: add them to the loss, or let the optimizer apply them and get exact zeros.

Example:
    >>> import torch, torch_regpen
    >>> model = torch.nn.Linear(4, 2)
    >>> penalty = torch_regpen.L1(model, lam=1e-3)
    >>> loss = model(torch.ones(1, 4)).square().mean() + penalty()  # in the loss, or in the optimizer:
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> optimizer = torch_regpen.RegularizedOptimizer(sgd, penalty, "proximal")
"""

from typing import TYPE_CHECKING

from . import functional, groups
from .optim import RegularizedOptimizer
from .penalties.activity import ActivityPenalty
from .penalties.base import Penalty, Sum
from .penalties.convex import L1, L2, ElasticNet, GroupLasso, NuclearNorm, SparseGroupLasso
from .penalties.nonconvex import L0, MCP, SCAD, LHalf, LogSum
from .penalties.orthogonal import Orthogonal
from .schedules import TargetSparsity
from .tensorboard import WeightLogger

__version__ = "0.1.0"

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
    "TargetSparsity",
    "WeightLogger",
    "__version__",
    "compare",
    "functional",
    "groups",
]
