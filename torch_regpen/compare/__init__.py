"""Penalties and weight_decay side by side: `compare(...)`, which this module is too."""

from .results import Comparison, Difference, Trial
from .run import compare

__all__ = ["Comparison", "Difference", "Trial", "compare"]
