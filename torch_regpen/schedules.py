"""Lambda over time: call `step()` after `optimizer.step()`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .groups import Elements
from .optim import RegularizedOptimizer
from .penalty import Penalty
from .prox import prox
from .sharding import everywhere
from .terms import Term, by_tensor

__all__ = ["CosineRamp", "LamScheduler", "LinearRamp", "TargetSparsity"]


# What TargetSparsity needs, found by trial on small networks under SGD with momentum and Adam: the part of a first
# guess from which lambda starts, and the most by which its logarithm changes from one reading to the next. Of the
# feedback: the start, the gain on the error, the damping by its trend, and the most that changes.
START = 0.1
FASTEST = math.log2(1.2)
FEEDBACK_START = 1e-4
GAIN = 0.1
DAMPING = 1.0
FEEDBACK_FASTEST = math.log(3.0)


class LamScheduler:
    """`lam = base * fn(step)`, as torch's LambdaLR: `fn(0)` at once, then one step further at each `step()`.

    Each parameter group's, and each part of a sum's, own lambda is its base.

    Args:
        penalty: a penalty, or a sum of them.
        fn: the factor as a function of the number of steps taken.
    """

    def __init__(self, penalty: Penalty, fn: Callable[[int], float]) -> None:
        self.penalty = penalty
        self.fn = fn
        self.base = [float(group["lam"]) for group in penalty.param_groups]
        self.last_step = 0
        self._set()

    def step(self) -> None:
        """One step further."""
        self.last_step += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """The base lambdas and the number of steps taken; not `fn`."""
        return {"base": list(self.base), "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that was saved, and set lambda as it was there."""
        if len(state_dict["base"]) != len(self.base):
            raise ValueError(
                f"the state has lambdas for {len(state_dict['base'])} groups, the penalty has {len(self.base)}"
            )
        self.base = list(state_dict["base"])
        self.last_step = state_dict["last_step"]
        self._set()

    def _set(self) -> None:
        _scale(self.penalty, self.base, self.fn(self.last_step))


class LinearRamp(LamScheduler):
    """`lam = base * min(step/steps, 1)`: from 0 to the penalty's lambda in a line."""

    def __init__(self, penalty: Penalty, steps: int) -> None:
        steps = _checked_count("steps", steps)
        super().__init__(penalty, partial(_linear, steps))


class CosineRamp(LamScheduler):
    """`lam = base * (1 - cos(pi * min(step/steps, 1))) / 2`: from 0 to the penalty's lambda, flat at both ends."""

    def __init__(self, penalty: Penalty, steps: int) -> None:
        steps = _checked_count("steps", steps)
        super().__init__(penalty, partial(_cosine, steps))


def _linear(steps: int, step: int) -> float:
    return min(step / steps, 1.0)


def _cosine(steps: int, step: int) -> float:
    return (1 - math.cos(math.pi * _linear(steps, step))) / 2


def _scale(penalty: Penalty, base: list[float], factor: float) -> None:
    for group, lam in zip(penalty.param_groups, base, strict=True):
        group["lam"] = lam * factor


def _checked_count(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more, not {value!r}")
    return value


def _cubic(x: float) -> float:
    return 1.0 - (1.0 - x) ** 3


class TargetSparsity:
    """Steers lambda so that the fraction `target` of the elements is exactly zero after `steps` steps, and holds it.

    Of a penalty over groups it is the fraction of groups. The fraction follows `target * ramp(step/steps)`. The
    proportions between the lambdas of groups and of the parts of a sum stay; how large they are to begin with makes no
    difference, but for a penalty that is given without its optimizer.

    Given a `RegularizedOptimizer` in the proximal or the dual mode, lambda is read off the weights between the
    optimizer's update and the prox: it is the one at which the wanted fraction of them will be zero. In the dual mode
    that is all. In the proximal mode, where lambda also says how fast all other weights shrink, it changes by no more
    than a fifth from one reading to the next.

    Given a penalty alone, the fraction is measured, and lambda corrected by the error and its trend: that works with
    any loop that makes zeros, takes longer, and hits less exactly.

    Args:
        penalty: the optimizer that has the penalty, or a penalty. Its lambdas must be more than 0.
        target: the fraction, from 0 to less than 1.
        steps: the number of steps after which it is reached.
        every: how many steps pass between two readings, each of which waits for the device and costs ten proximal maps
            or more; a 300th of `steps` unless told otherwise.
        ramp: from [0, 1] to [0, 1]; `1 - (1 - x)^3` unless told otherwise (Zhu and Gupta 2017).

    Raises:
        ValueError: `target`, `steps` or `every` out of range; a lambda of 0; a penalty that zeroes nothing.
    """

    def __init__(
        self,
        penalty: Penalty | RegularizedOptimizer,
        target: float,
        *,
        steps: int,
        every: int | None = None,
        ramp: Callable[[float], float] = _cubic,
    ) -> None:
        if not 0 <= target < 1:
            raise ValueError(f"target must be a fraction from 0 to less than 1, not {target}")
        self.optimizer = penalty if isinstance(penalty, RegularizedOptimizer) and penalty.moves_by_prox else None
        self.penalty = penalty.penalty if isinstance(penalty, RegularizedOptimizer) else penalty
        self.target = target
        self.steps = _checked_count("steps", steps)
        self.every = max(steps // 300, 1) if every is None else _checked_count("every", every)
        self.ramp = ramp
        self.base = [float(group["lam"]) for group in self.penalty.param_groups]
        if not all(self.base):
            raise ValueError("every lambda must be more than 0, to be scaled; set a small one")
        if not any(_zeroes(term) for term in self.penalty.terms()):
            raise ValueError(f"{self.penalty!r} zeroes nothing; L2 only shrinks")
        self.last_step = 0
        self.factor = FEEDBACK_START
        self.sparsity = 0.0
        self._set()
        self._attach()

    def _attach(self) -> None:
        if self.optimizer is not None:
            self.optimizer.optimizer.register_step_post_hook(self._read_off)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()  # hooks do not come along with a copy of the optimizer

    def step(self) -> None:
        """One step further, after `optimizer.step()`."""
        self.last_step += 1
        if self.optimizer is None and self.last_step % self.every == 0:
            self._feed_back()
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on."""
        return {name: getattr(self, name) for name in ("base", "last_step", "factor", "sparsity")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that was saved, and set lambda as it was there."""
        for name in ("base", "last_step", "factor", "sparsity"):
            setattr(self, name, state_dict[name])
        self._set()

    def _set(self) -> None:
        _scale(self.penalty, self.base, self.factor)
        step = self.last_step + 1
        self._due = step % self.every == 0 or step == self.steps

    def _wanted(self, step: int) -> float:
        return self.target * self.ramp(min(step / self.steps, 1.0))

    @torch.no_grad()
    def _feed_back(self) -> None:
        work = by_tensor(term for term in self.penalty.terms() if _zeroes(term))
        measured = _zero_fraction([(terms, terms[0].tensor) for terms in work]).item()
        wanted, now = self._wanted(self.last_step + self.every), self._wanted(self.last_step)
        error = _logit(wanted) - _logit(measured)
        trend = (_logit(measured) - _logit(self.sparsity)) - (_logit(wanted) - _logit(now))
        change = GAIN * error - DAMPING * trend
        self.factor *= math.exp(min(max(change, -FEEDBACK_FASTEST), FEEDBACK_FASTEST))
        self.sparsity = measured

    @torch.no_grad()
    def _read_off(self, *_: Any) -> None:
        """Find the factor at which the prox that is about to come leaves the wanted fraction of zeros."""
        if not self._due or self.optimizer is None:
            return
        self._due = False
        work = [(terms, step) for terms, step in self.optimizer.before_prox() if any(map(_zeroes, terms))]
        _scale(self.penalty, self.base, 1.0)
        if self.last_step < self.every and self.optimizer.mode != "dual":
            # To begin with, all that is known is the gradient: at zero, it is what lambda holds the weights against.
            descents = [(_at_zero(terms, step), step) for terms, step in work if step is not None]
            self.factor = START * 2 ** _bisect(descents, self.target, -40, 40)
        wanted = self._wanted(self.last_step + 1)
        if self.optimizer.mode == "dual":
            log2 = _bisect(work, wanted, -40, 40)
        else:
            log2 = _bisect(work, wanted, math.log2(self.factor) - FASTEST, math.log2(self.factor) + FASTEST)
        self.factor = 2**log2
        _scale(self.penalty, self.base, self.factor)


def _bisect(work: list[tuple[list[Term], Any]], wanted: float, low: float, high: float) -> float:
    """The least `x` in an interval at which a prox with `2^x` times the steps leaves the wanted fraction of zeros.

    All but the result stays on the device. Where there is none it is the upper end.
    """
    width, left = high - low, torch.tensor(low)
    for _ in range(20 if width > 1 else 8):  # lambda to a ten-thousandth, or to a thousandth
        width /= 2
        factor = (left + width).exp2()
        after = ((terms, terms[0].tensor if step is None else prox(terms, step * factor)) for terms, step in work)
        left = torch.where(_zero_fraction(after) < wanted, left + width, left)
    return left.item() + width


def _at_zero(terms: list[Term], step: float | Tensor) -> list[Term]:
    """The terms, as if the update had found the tensor at zero."""
    grad: Any = terms[0].tensor.grad
    moved = step * (grad.to_dense() if grad.is_sparse else grad)
    return [replace(term, tensor=moved, center=None) for term in terms]


def _zeroes(term: Term) -> bool:
    """Whether a term can make zeros."""
    return term.linear > 0 or term.kind.coefficients is None


def _zero_fraction(tensors: Iterable[tuple[list[Term], Tensor]]) -> Tensor:
    """The fraction of exact zeros among the elements (groups, for terms over groups) of all tensors, 0-dim."""
    zeros, count = torch.zeros(()), 0
    for terms, w in tensors:
        grouping = next((term.grouping for term in terms if term.grouped), Elements())
        u, _ = grouping.polar(everywhere(w))
        zeros = zeros.to(u.device) + (u == 0).sum()
        count += u.numel()
    return zeros / max(count, 1)


def _logit(fraction: float) -> float:
    return math.log((fraction + 0.002) / (1 - fraction + 0.002))
