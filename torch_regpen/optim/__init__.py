"""RegularizedOptimizer, the optimizer that applies penalties in its step."""

from .wrapper import RegularizedOptimizer

__all__ = ["RegularizedOptimizer"]
