"""The options of mode "decoupled": the factor on lambda (`rate`), and which elements shrink (`cautious`)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Decay", "Rate", "kept_initial_lrs"]

Rate = str | Callable[[Optimizer, dict[str, Any]], float | Tensor]

RATES = ("lr", "schedule", "corrected")
INITIAL = "decay_initial_lr"  # param_group key for the lr at construction, used if no scheduler wrote initial_lr


@dataclass(frozen=True)
class Decay:
    """The options of mode "decoupled"; see `RegularizedOptimizer`.

    Raises:
        TypeError: `cautious` is not a bool.
        ValueError: unknown `rate`.
    """

    rate: Rate = "lr"
    cautious: bool = False

    def __post_init__(self) -> None:
        if not callable(self.rate) and self.rate not in RATES:
            raise ValueError(f"rate must be 'lr', 'schedule', 'corrected' or a callable, not {self.rate!r}")
        if not isinstance(self.cautious, bool):
            raise TypeError(f"cautious must be True or False, not {self.cautious!r}")

    def check_mode(self, modes: list[str]) -> None:
        """Raise `ValueError` if an option is set, but no penalty is in mode "decoupled"."""
        if "decoupled" not in modes and self != Decay():
            option = "cautious=True" if self.rate == "lr" else f"rate={self.rate!r}"
            raise ValueError(
                f"{option} is an option of mode 'decoupled', but the modes are {', '.join(map(repr, modes))}; leave it "
                "out, or use mode='decoupled' or a pair (penalty, 'decoupled')"
            )

    def record_initial_lrs(self, optimizer: Optimizer) -> None:
        """If the rate needs it, record the lr of each param_group without an "initial_lr" from a scheduler."""
        if self.rate in ("schedule", "corrected"):
            for group in optimizer.param_groups:
                if group.get("lr") is not None:
                    _initial_lr(group)

    def factor(self, optimizer: Optimizer, group: dict[str, Any]) -> float | Tensor:
        """The factor on lambda in this step, for the parameters of a param_group.

        Raises:
            TypeError: the callable returned neither a number nor a tensor.
            ValueError: it returned a negative or infinite number, or a tensor that is not 0-dim; the initial lr is 0.
        """
        if callable(self.rate):
            return _checked(self.rate(optimizer, group))
        lr: float | Tensor = group["lr"]
        if self.rate == "lr":
            return lr
        initial = _initial_lr(group)
        if not isinstance(lr, Tensor) and lr == 0:
            return 0.0
        if not isinstance(initial, Tensor) and initial == 0:
            raise ValueError(
                f"rate={self.rate!r} divides by the initial lr of the param_group, which is 0 (its lr is {lr:g} now); "
                "set group['initial_lr'] to the lr that the schedule scales, or pass a callable rate"
            )
        relative = lr / initial
        return relative if self.rate == "schedule" else lr * relative


@contextmanager
def kept_initial_lrs(optimizer: Optimizer) -> Iterator[None]:
    """Keep the recorded initial lrs while a state dict that may lack them is loaded."""
    recorded = [group.get(INITIAL) for group in optimizer.param_groups]
    yield
    for group, initial in zip(optimizer.param_groups, recorded, strict=True):
        if initial is not None:
            group.setdefault(INITIAL, initial)


def _initial_lr(group: dict[str, Any]) -> float | Tensor:
    """The "initial_lr" that a scheduler wrote, else the recorded lr, else (in a param_group added later) the lr."""
    if "initial_lr" in group:
        return group["initial_lr"]  # type: ignore[no-any-return]
    if INITIAL not in group:
        lr = group["lr"]
        group[INITIAL] = lr.clone() if isinstance(lr, Tensor) else lr  # schedulers change a tensor in place
    return group[INITIAL]  # type: ignore[no-any-return]


def _checked(rate: Any) -> float | Tensor:
    if isinstance(rate, Tensor):
        if rate.numel() != 1 or rate.ndim:
            raise ValueError(f"rate must return a number or a 0-dim tensor, not a tensor of shape {tuple(rate.shape)}")
        return rate
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(f"rate must return a number or a 0-dim tensor, not {rate!r}")
    value = float(rate)
    if not 0 <= value < math.inf:
        raise ValueError(f"rate must return a finite number of 0 or more, not {value}")
    return value
