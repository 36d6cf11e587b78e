"""The optimizer that applies a penalty in its step."""

from .wrapper import RegularizedOptimizer

__all__ = ["RegularizedOptimizer"]
