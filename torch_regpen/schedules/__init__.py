"""Schedules of lambda: call `step()` after `optimizer.step()`."""

from .bound import Bound
from .ramps import CosineRamp, LamScheduler, LinearRamp
from .target_sparsity import TargetSparsity

__all__ = ["Bound", "CosineRamp", "LamScheduler", "LinearRamp", "TargetSparsity"]
