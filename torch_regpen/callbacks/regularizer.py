"""The base of the callbacks: it attaches to the optimizer and acts after each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.utils.hooks import RemovableHandle

from ..inspect.optimizers import find_regularized
from ..optim.wrapper import RegularizedOptimizer
from ..tensorboard import WeightLogger

__all__ = ["Logger", "Regularizer", "Schedule", "ScheduleLike"]


@runtime_checkable
class ScheduleLike(Protocol):
    """The methods of a schedule that a callback uses; all schedules of `torch_regpen.schedules` have them."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


Schedule = ScheduleLike | Callable[[RegularizedOptimizer], ScheduleLike]
Logger = WeightLogger | Callable[[RegularizedOptimizer], WeightLogger]


class Regularizer:
    """Steps a schedule, freezes zeros and logs, after each step of a `RegularizedOptimizer`.

    It counts in a step hook of the optimizer. Batches whose gradients are only accumulated do not count, nor do steps
    that a GradScaler skips.

    Args:
        optimizer: the optimizer to follow; None means the only `RegularizedOptimizer` of the trainer.
        schedule: a schedule of lambda, or a callable that makes it from the optimizer when the training begins.
        logger: a `WeightLogger`, or a callable that makes it from the optimizer.
        freeze_at: the number of steps after which zeros are frozen, 0 or more.

    Raises:
        TypeError: an argument is none of these.
        ValueError: `freeze_at` is negative.
    """

    HOW = ""  # for error messages: how to give the trainer an optimizer

    def __init__(
        self,
        optimizer: object | None = None,
        schedule: Schedule | None = None,
        logger: Logger | None = None,
        freeze_at: int | None = None,
    ) -> None:
        if optimizer is not None and find_regularized(optimizer) is None:
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; allowed are a RegularizedOptimizer, and None for the one "
                "that the trainer has"
            )
        if schedule is not None and not _is_schedule(schedule) and not callable(schedule):
            raise TypeError(
                f"schedule is a {type(schedule).__name__}; allowed are a schedule of torch_regpen.schedules, anything "
                "else with step, state_dict and load_state_dict, and a callable that makes one from the optimizer"
            )
        if logger is not None and not _is_logger(logger) and not callable(logger):
            raise TypeError(
                f"logger is a {type(logger).__name__}; allowed are a WeightLogger, and a callable that makes one from "
                "the optimizer"
            )
        if freeze_at is not None and (not isinstance(freeze_at, int) or isinstance(freeze_at, bool)):
            raise TypeError(f"freeze_at={freeze_at!r} is a {type(freeze_at).__name__}; allowed is an int, 0 or more")
        if freeze_at is not None and freeze_at < 0:
            raise ValueError(f"freeze_at={freeze_at}; allowed is an int, 0 or more")
        self.steps = 0
        self.freeze_at = freeze_at
        self._given = optimizer, schedule, logger
        self._optimizer: RegularizedOptimizer | None = None
        self._schedule: ScheduleLike | None = None
        self._logger: WeightLogger | None = None
        self._lams: list[float] | None = None  # the lambdas from which the schedule was made
        self._handle: RemovableHandle | None = None
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, the state of the schedule, and the lambdas from which it was made."""
        if self._loaded is not None:
            return self._loaded
        schedule = None if self._schedule is None else self._schedule.state_dict()
        return {"steps": self.steps, "schedule": schedule, "lams": self._lams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state. It is applied when the training begins, because the optimizer may not exist before."""
        self._loaded = dict(state_dict)

    def _attach(self, optimizers: Sequence[object]) -> None:
        """Begin or continue a training."""
        self._detach()
        optimizer = self._find(optimizers)
        if self._optimizer is not optimizer:
            if self._schedule is not None and self._loaded is None:  # a second training: new optimizer, same count
                self._loaded = self.state_dict()
            self._optimizer = optimizer
            self._logger = _made(self._given[2], optimizer, _is_logger, "logger")
            self._make_schedule(optimizer)
        if self._loaded is not None:
            self._restore(self._loaded)
            self._loaded = None
        self._freeze()
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _detach(self) -> None:
        """End a training."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _find(self, optimizers: Sequence[object]) -> RegularizedOptimizer:
        found = [regularized for regularized in map(find_regularized, optimizers) if regularized is not None]
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "no optimizer"
        if not found:
            raise ValueError(f"the trainer has {names}, and no RegularizedOptimizer: {self.HOW}")
        if self._given[0] is None:
            if len(found) > 1:
                raise ValueError(
                    f"the trainer has {len(found)} RegularizedOptimizers; make a callback for each, as in "
                    f"{type(self).__name__}(optimizer=...)"
                )
            return found[0]
        given = find_regularized(self._given[0])
        if given is None or not any(given is one for one in found):
            raise ValueError(f"the given optimizer is not one that the trainer has: {self.HOW}")
        return given

    def _make_schedule(self, optimizer: RegularizedOptimizer) -> None:
        groups = optimizer.penalty.param_groups
        lams = (self._loaded or {}).get("lams")
        if lams is None:
            lams = [float(group["lam"]) for group in groups]
        elif not _is_schedule(self._given[1]):
            # The model's checkpoint holds lambdas in the middle of a ramp; the schedule needs those before the ramp.
            for group, lam in zip(groups, lams, strict=True):
                group["lam"] = lam
        self._lams = lams
        self._schedule = _made(self._given[1], optimizer, _is_schedule, "schedule")
        steered = getattr(self._schedule, "optimizer", None)
        if steered is not None and find_regularized(steered) is not optimizer:
            raise ValueError(
                f"the {type(self._schedule).__name__} was made for an optimizer that the trainer does not use; give a "
                "callable that makes it, as in schedule=lambda optimizer: TargetSparsity(optimizer, ...)"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if state["schedule"] is None:
            return
        if self._schedule is None:
            raise ValueError(
                f"the checkpoint holds the state of a schedule, and this {type(self).__name__} has none: give it the "
                "schedule that it was saved with"
            )
        self._schedule.load_state_dict(state["schedule"])

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        if self._schedule is not None:
            self._schedule.step()
        self._freeze()
        if self._logger is not None:
            self._logger.step(self.steps)

    def _freeze(self) -> None:
        optimizer = self._optimizer
        if optimizer is None or self.freeze_at is None or self.steps < self.freeze_at:
            return
        if not optimizer.zeros_are_frozen:
            optimizer.freeze_zeros()


def _is_schedule(given: object) -> bool:
    """Whether it is a schedule. A class of schedules is not one, but a callable that makes one."""
    return isinstance(given, ScheduleLike) and not isinstance(given, type)


def _is_logger(given: object) -> bool:
    return isinstance(given, WeightLogger)


def _made(given: Any, optimizer: RegularizedOptimizer, is_one: Callable[[object], bool], kind: str) -> Any:
    """The given object, or the result of the given callable."""
    if given is None or is_one(given):
        return given
    made = given(optimizer)
    if not is_one(made):
        raise TypeError(f"the callable for the {kind} returned a {type(made).__name__}, which is not a {kind}")
    return made
