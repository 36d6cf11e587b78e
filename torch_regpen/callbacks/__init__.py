"""Callbacks for trainers: they steer a schedule, log the weights and freeze zeros, without a line in the user's loop.

Each is imported when it is asked for, so that nobody needs the framework of the other.
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
