"""Callbacks for trainers: they step a schedule, log the weights and freeze zeros.

Each is imported on first use, so that only its own framework must be installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..utils import require

if TYPE_CHECKING:
    from .huggingface import TrainerRegularizer
    from .lightning import LightningRegularizer

__all__ = ["LightningRegularizer", "TrainerRegularizer"]


def __getattr__(name: str) -> Any:
    if name == "LightningRegularizer":
        with require("LightningRegularizer needs Lightning", "stack"):
            from .lightning import LightningRegularizer
        return LightningRegularizer
    if name == "TrainerRegularizer":
        with require("TrainerRegularizer needs the Trainer of transformers", "stack"):
            from .huggingface import TrainerRegularizer
        return TrainerRegularizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
