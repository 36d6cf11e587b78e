"""TargetSparsity: adapts lambda so that a given fraction of the weights becomes zero."""

from __future__ import annotations

import math
import numbers
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..groups import NM
from ..ops.terms import Term, by_tensor
from ..ops.thresholds import makes_zeros, sampled, stride_for, zero_factors
from ..optim.step_size import differs_by_coordinate
from ..optim.wrapper import RegularizedOptimizer
from ..penalties.base import Penalty
from ..penalties.units import warn_before_norms
from ..utils import checked_count
from .ramps import check_state, number_from, scale_lambdas

__all__ = ["TargetSparsity"]

# READINGS: the usual number of readings in a ramp, with at most MOST steps between two.
# ELEMENTS, GROUPS: the least size of the sample in a reading; its error is 0.3 or 0.8 percentage points of zeros.
# NONZEROS: the least number of nonzeros in the sample; the error in the number of nonzeros is then 3%.
# CLOSE: the distance from the target that counts as reached.
# MANY: above this target, nonzeros change fast between readings, and filters before a BatchNorm become entirely zero.
# RECENT: after a restart, the gap between two readings is at most 1/RECENT of the steps since.
# ROUNDING: a margin for the rounding errors of a prox or a ramp.
READINGS, MOST = 100, 20
ELEMENTS, GROUPS, NONZEROS = 1 << 15, 1 << 12, 1000
CLOSE = 0.005
MANY = 0.9
RECENT = 10
ROUNDING = 1e-4

# In the proximal mode, lambda starts at START times the lambda that shrinks the weights to the target in one ramp. It
# may change by the factor FASTEST in 1/CHANGES of the ramp, which needs LEAST_STEPS steps and LEAST_READINGS readings.
# These numbers were found by trial, on small networks with SGD and Adam.
START = 0.01
FASTEST, CHANGES = 1.2, 300
LEAST_STEPS, LEAST_READINGS = 100, 30


def _cubic(x: float) -> float:
    return 1.0 - (1.0 - x) ** 3


class TargetSparsity:
    """Adapts lambda so that the fraction `target` of the elements is exactly zero after `steps` steps, and stays so.

    For a penalty over groups, the target is a fraction of the groups; with a center, of elements at their center. The
    wanted fraction follows `target * ramp(step/steps)`. Every `every` steps, a reading takes the weights between the
    optimizer's update and the prox, and finds the lambda at which this prox makes the wanted fraction zero. The ratios
    between the lambdas of parameter groups and of the parts of a sum are kept; their absolute size has no effect.

    In the dual mode that is all. In the proximal mode lambda also sets how fast all other weights shrink. There it
    starts far below the value that would shrink them to zero in the ramp, and each reading changes it by a limited
    factor.

    A filter of zeros before a BatchNorm has a gradient 1/sqrt(eps) times as large as usual. Under SGD it may return as
    a huge weight and spoil the network. Clipping gradients by value prevents this:
    `torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)`. Targets above 0.9 warn about it.

    Elements without a gradient cannot become zero. If the others are fewer than `target` needs, it warns once and
    applies the target to the other elements only.

    Args:
        optimizer: a `RegularizedOptimizer` in the proximal or the dual mode. The lambdas of its penalty must be more
            than 0.
        target: the fraction, from 0 to less than 1.
        steps: the number of steps after which the target is reached. The proximal mode needs at least 100.
        every: the number of steps between two readings, which synchronize with the device; by default `steps // 100`,
            but from 1 to 20, and 1 in the dual mode for more than 90% of single weights. There is also a reading in the
            first step and one after `steps` steps.
        ramp: a function from [0, 1] to [0, 1]; by default `1 - (1 - x)^3` (Zhu and Gupta 2017).
        freeze: call `optimizer.freeze_zeros()` once the target is reached. While zeros are frozen, lambda is constant.

    Raises:
        TypeError: `optimizer` is not a `RegularizedOptimizer`; `target` is not a number; `ramp` is not a function, or
            does not return a number.
        ValueError: it is in another mode; `target`, `steps`, `every` or `ramp` is out of range; a lambda is 0; the
            penalty zeroes nothing, has N:M groups, which fix the fraction, or has the multipliers of a `Bound`.

    Example:
        >>> import torch
        >>> from torch_regpen import L1, RegularizedOptimizer, TargetSparsity
        >>> w = torch.linspace(0, 1, 100).requires_grad_()
        >>> optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=0.1), L1([w], lam=1.0), "dual")
        >>> schedule = TargetSparsity(optimizer, 0.8, steps=20)
        >>> for _ in range(20):
        ...     w.grad = torch.zeros(100)
        ...     _ = optimizer.step(), schedule.step()
        >>> optimizer.penalty.sparsity()
        tensor(0.8000)
    """

    _STATE = ("base", "factor", "last_step", "last_reading", "next_reading", "restart", "froze")

    def __init__(
        self,
        optimizer: RegularizedOptimizer,
        target: float,
        *,
        steps: int,
        every: int | None = None,
        ramp: Callable[[float], float] = _cubic,
        freeze: bool = False,
    ) -> None:
        if not isinstance(optimizer, RegularizedOptimizer):
            raise TypeError(
                f"optimizer must be a RegularizedOptimizer, not {type(optimizer).__name__}: lambda is read off the "
                "weights in its step; use RegularizedOptimizer(optimizer, penalty, 'dual')"
            )
        penalty = optimizer.zeroing_penalty
        if penalty is None:
            raise ValueError(
                f"the optimizer is in the {optimizer.mode!r} mode, where no lambda makes a given number of zeros; use "
                "mode='dual' or 'proximal'"
            )
        if not isinstance(target, float | numbers.Real):
            raise TypeError(f"target must be a number, a fraction from 0 to less than 1, not {target!r}")
        if not 0 <= target < 1:
            raise ValueError(f"target must be a fraction from 0 to less than 1, not {target}")
        fixed = {str(term.grouping) for term in penalty.terms() if isinstance(term.grouping, NM)}
        if fixed:
            raise ValueError(f"no lambda steers the fraction of zeros of groups={fixed.pop()}: it is 1 - n/m at once")
        if not any(makes_zeros(term) for term in penalty.terms()):
            raise ValueError(f"{penalty!r} zeroes nothing; L2 only shrinks")
        self.optimizer = optimizer
        self._penalty = penalty
        self._check_multipliers()
        self._strided: tuple[list[Term], int] = [], 1  # the terms, and the stride at which they are read
        self.target = target
        self.steps = checked_count("steps", steps)
        usual = _usual_gap(penalty, optimizer.averages, target, self.steps)
        self.every = usual if every is None else checked_count("every", every)
        if not callable(ramp):
            raise TypeError(f"ramp must be a function from [0, 1] to [0, 1], not {ramp!r}")
        self.ramp = ramp
        self._ramp(1.0)
        self.freeze = freeze
        lams = [float(group["lam"]) for group in penalty.param_groups]
        if not all(lams):
            raise ValueError("every lambda must be more than 0, to be scaled; set a small one")
        self.factor = max(lams)
        self.base = [lam / self.factor for lam in lams]
        self.last_step = 0
        self.last_reading = 0  # the step of the last reading
        self.next_reading = 1
        self.restart = -RECENT * self.every  # the last step with frozen zeros
        self.froze = False
        self._reached = self._warned = False
        self._warn_if_short()
        self._warn_about_norms()
        self._attach()

    def _check_multipliers(self) -> None:
        if any(part.multipliers for part in self._penalty.parts):
            raise ValueError(
                "lambda is multiplied by the multipliers of a Bound, and two schedules cannot steer it; use one of "
                "them. penalty.multipliers = {} removes what a former Bound left"
            )

    def _warn_if_short(self) -> None:
        if not self.optimizer.averages and (self.steps < LEAST_STEPS or self.steps < LEAST_READINGS * self.every):
            warnings.warn(
                f"with steps={self.steps} and every={self.every} the proximal mode may miss the target: lambda has to "
                f"change slowly there. Use mode='dual', or at least {LEAST_STEPS} steps and {LEAST_READINGS} readings",
                stacklevel=3,
            )

    def _warn_about_norms(self) -> None:
        if self.target <= MANY or differs_by_coordinate(self.optimizer.optimizer, self.optimizer.metric):
            return  # Adam's step is never much larger than lr
        parts = [part for part in self._penalty.parts if part.groups is None]
        warn_before_norms(
            (place for part in parts for place in part.places()),
            "A filter of zeros before it has a gradient 1/sqrt(eps) times as large as usual; it may return as a huge "
            "weight and spoil the network. Unless the training already clips gradients by value, clip them before "
            "optimizer.step(), for instance with torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)",
        )

    def _attach(self) -> None:
        # A weak reference: the hook does not keep a replaced schedule alive.
        read = weakref.WeakMethod(self._read)

        def hook(*_: Any) -> None:
            method = read()
            if method is not None:
                method()

        self.optimizer.optimizer.register_step_post_hook(hook)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_strided": ([], 1)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()  # a copy of the optimizer has no hooks

    def step(self) -> None:
        """Count a step, and freeze zeros if due; call it after `optimizer.step()`."""
        self._check_multipliers()
        self.last_step += 1
        if self.freeze and not self.froze and self._reached:
            self.optimizer.freeze_zeros()
            self.froze = True

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, without `target`, `steps` and other arguments."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, and set lambda accordingly.

        Raises:
            ValueError: it belongs to another kind of schedule, or to a penalty with another number of groups.
        """
        check_state(self, state_dict)
        for name in self._STATE:
            setattr(self, name, state_dict[name])
        self._set(self.factor)

    def _set(self, factor: float) -> None:
        self.factor = factor
        scale_lambdas(self._penalty, self.base, factor)

    @torch.no_grad()
    def _read(self) -> None:
        """After the update and before the prox: find the lambda at which the prox makes the wanted fraction zero."""
        step = self.last_step + 1
        if self.optimizer.zeros_are_frozen:
            self.restart, self.next_reading = step, step + 1
        if step < self.next_reading:
            return
        self._set(self.factor)
        factors = self._zero_factors()
        count = self._count(factors)
        proximal = not self.optimizer.averages
        starts = proximal and not self.last_reading
        wanted = self.target * (1.0 if starts else self._ramp(min(step / self.steps, 1.0)))
        change = _between(factors, round(wanted * count))
        if change is None:
            return  # lambda has no effect, for instance because lr is 0; read again in the next step
        if starts:
            change *= START / self.steps
        elif proximal:
            most = FASTEST ** (CHANGES * (step - max(self.last_reading, self.restart)) / self.steps)
            change = min(max(change, 1 / most), most)
        self._set(self.factor * change)
        zeros = int((factors <= change).sum())
        self._reached = step >= self.steps and zeros >= round(self.target * count) - CLOSE * count
        self.last_reading, self.next_reading = step, self._after(step)

    def _ramp(self, x: float) -> float:
        fraction = number_from("ramp", self.ramp, x)
        if not -ROUNDING <= fraction <= 1 + ROUNDING:
            raise ValueError(f"ramp must be from [0, 1] to [0, 1], but ramp({x:g}) is {fraction:g}")
        return min(max(fraction, 0.0), 1.0)

    def _after(self, step: int) -> int:
        """The step of the next reading."""
        if self.freeze and not self.froze and step >= self.steps:
            return step + 1
        regular = (step // self.every + 1) * self.every
        if step < self.steps:
            regular = min(regular, self.steps)
        # The sum of steps in the dual mode has restarted with the zeros, and grows fast to begin with.
        return min(regular, step + max((step - self.restart) // RECENT, 1))

    def _zero_factors(self) -> Tensor:
        """`zero_factors` of a sample, on the CPU."""
        terms = self._penalty.terms()
        if terms is not self._strided[0]:
            least = int(NONZEROS / (1 - self.target))
            self._strided = terms, stride_for(by_tensor(terms), max(ELEMENTS, least), max(GROUPS, least))
        stride = self._strided[1]
        take = partial(sampled, stride=stride, start=self.last_step)
        work = ((terms, step) for terms, step in self.optimizer.before_prox(take) if any(map(makes_zeros, terms)))
        return zero_factors(work).cpu()

    def _count(self, factors: Tensor) -> int:
        """The number of factors that the target refers to: all, or if it cannot be reached, the finite ones."""
        count = len(factors)
        finite = factors < math.inf
        reachable = int(finite.sum())
        if self.target * count <= reachable or not (finite & (factors > 0)).any():
            return count
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the target {self.target:g} cannot be reached: only {reachable / count:.3g} of the penalized elements "
                f"(groups) have a gradient or are already zero. {self.target:g} of these will be zero, which is "
                f"{self.target * reachable / count:.3g} of all. Leave the others out of the penalty, or train them",
                stacklevel=2,
            )
        return reachable


def _usual_gap(penalty: Penalty, averages: bool, target: float, steps: int) -> int:
    """The number of steps between two readings by default."""
    if averages and target > MANY and all(part.groups is None for part in penalty.parts):
        return 1  # few weights are left, and in a few steps many others would join them
    return min(max(steps // READINGS, 1), MOST)


def _between(factors: Tensor, count: int) -> float | None:
    """The least factor, up to rounding, that reaches `count` of the factors and no more.

    If more than `count` of them are 0, it is below the smallest positive one. None if there is no such factor.
    """
    # Finding two order statistics takes a tenth of the time of sorting.
    low = float(factors.kthvalue(count).values) if count else 0.0
    high = float(factors.kthvalue(count + 1).values) if count < len(factors) else math.inf
    if high == 0:
        positive = factors[factors > 0]
        high = float(positive.min()) if len(positive) else math.inf
    if low == math.inf or (low == 0 and high == math.inf):
        return None
    return min(low * (1 + ROUNDING), (low + high) / 2) if low else high / 2
