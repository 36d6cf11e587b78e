"""Lambda as a function of the number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ..penalties.activity import ActivityPenalty
from ..penalties.base import Penalty
from ..utils import checked_count

__all__ = ["CosineRamp", "LamScheduler", "LinearRamp", "check_state", "number_from", "scale_lambdas"]


class LamScheduler:
    """`lam = base * fn(step)`, like torch's LambdaLR: it applies `fn(0)` at once, and each `step()` adds 1 to `step`.

    The base is the lambda that the user has set, for each parameter group and each part of a sum. This holds even if
    another schedule has already changed the lambda of the penalty.

    Args:
        penalty: a penalty, or a sum of them.
        fn: the factor as a function of the number of steps taken.

    Raises:
        TypeError: `penalty` is not a penalty; `fn` is not a function, or does not return a number.
        ValueError: a lambda is 0; `fn` returns a negative or infinite number.

    Example:
        >>> import torch
        >>> from torch_regpen import L1
        >>> from torch_regpen.schedules import LamScheduler
        >>> penalty = L1([torch.ones(2)], lam=0.1)
        >>> schedule = LamScheduler(penalty, lambda step: 0.5**step)
        >>> schedule.step()
        >>> penalty.lam
        0.05
    """

    def __init__(self, penalty: Penalty | ActivityPenalty, fn: Callable[[int], float]) -> None:
        if not isinstance(penalty, Penalty | ActivityPenalty):
            hint = "; pass its .penalty" if isinstance(getattr(penalty, "penalty", None), Penalty) else ""
            raise TypeError(f"penalty must be a penalty or a sum of penalties, not a {type(penalty).__name__}{hint}")
        if not callable(fn):
            raise TypeError(f"fn must be a function of the number of steps, such as lambda step: 0.5, not {fn!r}")
        self.penalty = penalty
        self.fn = fn
        self.base = list(map(_base, penalty.param_groups))
        self.last_step = 0
        self._set()

    def step(self) -> None:
        """Add 1 to the number of steps, and set lambda."""
        self.last_step += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """The base lambdas and the number of steps taken, without `fn`."""
        return {"base": list(self.base), "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, and set lambda accordingly.

        Raises:
            ValueError: it belongs to another kind of schedule, or to a penalty with another number of groups.
        """
        check_state(self, state_dict)
        self.base = list(state_dict["base"])
        self.last_step = state_dict["last_step"]
        self._set()

    def _set(self) -> None:
        scale_lambdas(self.penalty, self.base, number_from("fn", self.fn, self.last_step))
        for group, base in zip(self.penalty.param_groups, self.base, strict=True):
            group["scheduled"] = base, group["lam"]


class LinearRamp(LamScheduler):
    """`lam = base * min(step/steps, 1)`: linear from 0 to the penalty's lambda.

    Args:
        penalty: a penalty, or a sum of them.
        steps: the number of steps until lambda is that of the penalty, 1 or more.

    Raises:
        TypeError: `penalty` is not a penalty.
        ValueError: a lambda is 0; `steps` is not a whole number of 1 or more.

    Example:
        >>> import torch
        >>> from torch_regpen import L1
        >>> from torch_regpen.schedules import LinearRamp
        >>> penalty = L1([torch.ones(2)], lam=1.0)
        >>> schedule = LinearRamp(penalty, steps=4)
        >>> [round(penalty.lam, 3) for _ in range(6) if schedule.step() is None]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    def __init__(self, penalty: Penalty | ActivityPenalty, steps: int) -> None:
        steps = checked_count("steps", steps)
        super().__init__(penalty, partial(_linear, steps))


class CosineRamp(LamScheduler):
    """`lam = base * (1 - cos(pi * min(step/steps, 1))) / 2`: from 0 to the penalty's lambda, flat at both ends.

    Args:
        penalty: a penalty, or a sum of them.
        steps: the number of steps until lambda is that of the penalty, 1 or more.

    Raises:
        TypeError: `penalty` is not a penalty.
        ValueError: a lambda is 0; `steps` is not a whole number of 1 or more.

    Example:
        >>> import torch
        >>> from torch_regpen import L1
        >>> from torch_regpen.schedules import CosineRamp
        >>> penalty = L1([torch.ones(2)], lam=1.0)
        >>> schedule = CosineRamp(penalty, steps=4)
        >>> [round(penalty.lam, 3) for _ in range(6) if schedule.step() is None]
        [0.146, 0.5, 0.854, 1.0, 1.0, 1.0]
    """

    def __init__(self, penalty: Penalty | ActivityPenalty, steps: int) -> None:
        steps = checked_count("steps", steps)
        super().__init__(penalty, partial(_cosine, steps))


def check_state(schedule: Any, state_dict: dict[str, Any]) -> None:
    """Raise `ValueError` if a state belongs to another kind of schedule, or to another number of lambdas."""
    own = schedule.state_dict()
    if state_dict.keys() != own.keys():
        raise ValueError(
            f"the state has {sorted(state_dict)}, but that of a {type(schedule).__name__} has {sorted(own)}; load the "
            "state of such a schedule"
        )
    found, wanted = (len(state.get("base", [])) for state in (state_dict, own))
    if found != wanted:
        raise ValueError(f"the state has lambdas for {found} groups, the penalty has {wanted}")


def _base(group: dict[str, Any]) -> float:
    """The lambda that the user has set, even if another schedule has changed it since."""
    base, scheduled = group.get("scheduled", (0.0, None))
    lam = float(base if group["lam"] == scheduled else group["lam"])
    if lam == 0:
        raise ValueError(
            "the base lambda of the schedule is 0, so every lambda that it sets would be 0; construct the penalty with "
            "the lambda that the schedule should scale, and load a checkpoint afterwards"
        )
    return lam


def _linear(steps: int, step: int) -> float:
    return min(step / steps, 1.0)


def _cosine(steps: int, step: int) -> float:
    return (1 - math.cos(math.pi * _linear(steps, step))) / 2


def scale_lambdas(penalty: Penalty | ActivityPenalty, base: list[float], factor: float) -> None:
    """Set the lambda of each parameter group to its base times a factor."""
    for group, lam in zip(penalty.param_groups, base, strict=True):
        group["lam"] = lam * factor


def number_from(name: str, fn: Callable[[Any], float], x: float) -> float:
    """Return `fn(x)`, or raise `TypeError` if it is not a number."""
    value = fn(x)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must return a number, but {name}({x:g}) is {value!r}") from None
