"""Choose lambda: `lam_max`, the largest useful lambda, and `regularization_path`, with cross-validation."""

from .largest import lam_max
from .run import regularization_path
from .solutions import Path

__all__ = ["Path", "lam_max", "regularization_path"]
