"""A bound on the size of the weights instead of a fixed lambda."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..groups.grouping import working_dtype
from ..ops.terms import Term, by_tensor
from ..ops.value import mean_omega
from ..optim.wrapper import RegularizedOptimizer
from ..penalties.base import Penalty
from ..utils import first_names
from .ramps import check_state

__all__ = ["Bound"]

MEASURED = ("initial", "warmup", "inflection")

# For "inflection", as in pytorch_cpr: the growth of a tensor is read every INTERVAL steps from a moving average with
# decay KEPT; growth by less than the fraction LEAST of the average does not count.
INTERVAL, KEPT, LEAST = 200, 0.99, 0.01


class Bound:
    """Keeps the mean `Omega(w)/n` of each penalized tensor of `n` elements at or below a bound, by adapting lambda.

    Each tensor has a Lagrange multiplier `m`, at first 0. Its lambda is `lam * m`, so `lam=1` is the usual choice. Each
    `step()` updates it by the violation: `m = max(0, m + rate * (Omega(w)/n - bound))` (constrained parameter
    regularization, CPR: Franke, Hefenbrock, Koehler and Hutter 2024). At the constrained optimum `lam * m` is the dual
    variable of the constraint `Omega(w) <= n * bound`. Nothing is read back from the device.

    CPR as published is `L2` or `L1` in mode "decoupled" with `rate=lambda *_: 1.0` in the `RegularizedOptimizer`; its
    AdamCPR decays after the update, but this mode before the next update.

    Call `step()` after each step of the optimizer. Multipliers of parameters without a gradient do not change, unless
    no parameter has one. While zeros are frozen, multipliers of penalties that are turned off do not change. If you
    stop calling `step()`, the penalties keep their multipliers; `penalty.multipliers = {}` removes them. A penalty has
    one Bound: a new one replaces the multipliers, and the old one can no longer step.

    Args:
        optimizer: a `RegularizedOptimizer` without mode "dual".
        bound: the largest mean, in units of `Omega` per element (`w^2` for L2, `|w|` for L1): a number, 0 or more.
            "initial": the mean at construction, times `factor`. "warmup": the mean after `warmup` steps, times
            `factor`. "inflection": the mean, times `factor`, when the growth of the tensor begins to slow down. This is
            checked every 200 steps, from step 800 after the warmup.
        factor: the factor on a measured bound, more than 0.
        warmup: the number of steps before the multipliers begin to change.
        rate: the step size of the multipliers, more than 0.

    Attributes:
        multipliers: a dict from the name of each tensor to its multiplier, a 0-dim tensor; for a sum, a list of dicts.

    Raises:
        TypeError: `optimizer` is not a `RegularizedOptimizer`; an argument is not a number.
        ValueError: a penalty is in mode "dual"; a lambda is 0; an argument is out of range; `bound="warmup"` without
            `warmup`; a number with a `factor`; "initial" where the penalty of a tensor is 0.

    Example:
        >>> import torch, torch_regpen as rp
        >>> from torch_regpen.schedules import Bound
        >>> w = torch.ones(2, 2, requires_grad=True)
        >>> optimizer = rp.RegularizedOptimizer(torch.optim.SGD([w], lr=0.1), rp.L2([w], lam=1.0), "decoupled")
        >>> bound = Bound(optimizer, "initial", factor=0.25)
        >>> for _ in range(200):
        ...     w.grad = torch.zeros_like(w)
        ...     optimizer.step()
        ...     bound.step()
        >>> bool(w.square().mean() <= 0.25)
        True
    """

    def __init__(
        self,
        optimizer: RegularizedOptimizer,
        bound: float | str,
        *,
        factor: float = 1.0,
        warmup: int = 0,
        rate: float = 1.0,
    ) -> None:
        if not isinstance(optimizer, RegularizedOptimizer):
            raise TypeError(
                f"optimizer must be a RegularizedOptimizer, not {type(optimizer).__name__}: use "
                "RegularizedOptimizer(optimizer, penalty, 'decoupled')"
            )
        if optimizer.averages:
            raise ValueError(
                "mode='dual' multiplies lambda by the sum of all steps, so a multiplier cannot hold a bound; use "
                "mode='decoupled', 'coupled' or 'proximal'"
            )
        if bound not in MEASURED if isinstance(bound, str) else _checked_number("bound", bound) < 0:
            raise ValueError(f"bound must be a number, 0 or more, or one of {MEASURED}, not {bound!r}")
        if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 0:
            raise ValueError(f"warmup must be a whole number of steps, 0 or more, not {warmup!r}")
        if bound == "warmup" and warmup == 0:
            raise ValueError("bound='warmup' is measured after warmup steps; give warmup=, 1 or more")
        for name, value in (("factor", factor), ("rate", rate)):
            if _checked_number(name, value) <= 0:
                raise ValueError(f"{name} must be more than 0, not {value!r}")
        if not isinstance(bound, str) and factor != 1:
            raise ValueError(f"factor={factor:g} is a factor on a measured bound; give bound={factor * bound:g}")
        if not all(group["lam"] for group in optimizer.penalty.param_groups):
            raise ValueError("every lambda must be more than 0, because it is multiplied; lam=1 is the usual choice")
        self.optimizer = optimizer
        self.bound = bound
        self.factor = float(factor)
        self.warmup = warmup
        self.rate = float(rate)
        self.last_step = 0
        self._state: list[dict[str, dict[str, Tensor]]] = [{} for _ in optimizer.penalty.parts]
        # Multipliers of an earlier Bound are replaced.
        self._attached = [part.multipliers for part in optimizer.penalty.parts]
        self._attach(frozen=True)
        if bound == "initial":
            self._refuse_zero_bounds()

    def _refuse_zero_bounds(self) -> None:
        bounds = [(name, state["bound"]) for states in self._state for name, state in states.items()]
        zero = dict.fromkeys(repr(name) for name, value in bounds if not value.is_meta and value == 0)
        if zero:
            raise ValueError(
                f"the penalty of {first_names(zero)} is 0 at construction, and bound='initial' would hold it at 0; "
                "give a number, use bound='warmup', or leave these parameters out with exclude="
            )

    @property
    def multipliers(self) -> Any:
        """A dict from the name of each tensor to its multiplier, a 0-dim tensor; for a sum, a list of dicts."""
        found = [{name: state["multiplier"] for name, state in states.items()} for states in self._state]
        return found[0] if len(found) == 1 else found

    @torch.no_grad()
    def step(self) -> None:
        """Update the multipliers; call it after `optimizer.step()`.

        Raises:
            RuntimeError: a Bound that was constructed later has replaced the multipliers.
        """
        self.last_step += 1
        self._attach()
        if self.last_step < self.warmup or (self.last_step == self.warmup and self.bound != "warmup"):
            return
        active = list(self._active())
        if not active:
            return
        values = [mean_omega(terms) for _, terms in active]
        states = [state for state, _ in active]
        bounds = [state["bound"] for state in states]
        if self.last_step == self.warmup:
            torch._foreach_copy_(bounds, torch._foreach_mul(values, self.factor))
            return
        changes = torch._foreach_sub(values, bounds)
        torch._foreach_mul_(changes, self.rate)
        multipliers = [state["multiplier"] for state in states]
        torch._foreach_add_(multipliers, changes)
        torch._foreach_clamp_min_(multipliers, 0.0)
        if self.bound == "inflection":
            for state, value in zip(states, values, strict=True):
                self._find_inflection(state, value)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the multiplier and the bound of each tensor."""
        states = [
            {name: {key: x.clone() for key, x in state.items()} for name, state in states.items()}
            for states in self._state
        ]
        return {"last_step": self.last_step, "tensors": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state.

        Raises:
            ValueError: it belongs to other penalties or tensors, or to another kind of bound or schedule.
        """
        check_state(self, state_dict)
        self._attach(frozen=True)
        saved = state_dict["tensors"]
        if [set(states) for states in saved] != [set(states) for states in self._state]:
            found, wanted = ([first_names(sorted(states)) for states in each] for each in (saved, self._state))
            raise ValueError(f"the state has multipliers for {found}, but the penalties have {wanted}")
        for kept, others in zip(self._state, saved, strict=True):
            if any(others[name].keys() != state.keys() for name, state in kept.items()):
                raise ValueError(
                    f"the state does not belong to bound={self.bound!r}; load it into a Bound like the saved one"
                )
        self.last_step = state_dict["last_step"]
        for states, others in zip(self._state, saved, strict=True):
            for name, state in states.items():
                for key, x in others[name].items():
                    state[key].copy_(x)

    def _attach(self, frozen: bool = False) -> None:
        """Give each current tensor of the penalties its multiplier."""
        for i, (part, states) in enumerate(zip(self.optimizer.penalty.parts, self._state, strict=True)):
            attached = part.multipliers
            if attached and attached is not self._attached[i]:
                raise RuntimeError(
                    "another Bound has replaced the multipliers of this one: a penalty has one Bound. Call step() of "
                    "the newer one only"
                )
            for terms in by_tensor(part.terms(frozen=frozen)):
                w = terms[0].named_parameters[0][1]
                state = states.get(terms[0].name)
                if state is None:
                    states[terms[0].name] = self._new_state(terms, w)
                elif state["multiplier"].device != w.device:
                    states[terms[0].name] = {key: x.to(w.device) for key, x in state.items()}
            if attached.keys() != states.keys() or any(
                attached[name] is not state["multiplier"] for name, state in states.items()
            ):
                part.multipliers = {name: state["multiplier"] for name, state in states.items()}
            self._attached[i] = part.multipliers

    def _new_state(self, terms: list[Term], w: Tensor) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=working_dtype(w.dtype), device=w.device)
        if not isinstance(self.bound, str):
            bound = zero + self.bound
        elif self.bound == "initial" or (self.bound == "warmup" and self.last_step > self.warmup):
            bound = (mean_omega(terms) * self.factor).to(zero)
        else:
            bound = zero + math.inf
        state = {"multiplier": zero, "bound": bound}
        if self.bound == "inflection":
            state.update({key: zero.clone() for key in ("average", "previous", "growth")})
        return state

    def _active(self) -> Iterator[tuple[dict[str, Tensor], list[Term]]]:
        """Yield the state and the terms of each tensor that the last step of the optimizer penalized."""
        off: list[Penalty] = []
        if self.optimizer.zeros_are_frozen:
            off = (self.optimizer.zeroing_penalty or self.optimizer.penalty).parts
        found = [
            (states[terms[0].name], terms, all(p.grad is not None for _, p in terms[0].named_parameters))
            for part, states in zip(self.optimizer.penalty.parts, self._state, strict=True)
            if all(part is not other for other in off)
            for terms in by_tensor(part.terms())
        ]
        zeroed = not any(has_grad for _, _, has_grad in found)  # zero_grad() came before step()
        yield from ((state, terms) for state, terms, has_grad in found if has_grad or zeroed)

    def _find_inflection(self, state: dict[str, Tensor], value: Tensor) -> None:
        """Set the bound once the growth of the average is less than it was, but still counts."""
        steps = self.last_step - self.warmup
        average, previous, growth = state["average"], state["previous"], state["growth"]
        average.copy_(value if steps < INTERVAL else average.lerp(value.to(average), 1 - KEPT))
        if steps <= INTERVAL or steps % INTERVAL:
            return
        now = (average - previous) / average
        previous.copy_(average)
        if steps > 3 * INTERVAL:
            found = (growth > now) & (now > LEAST) & state["bound"].isinf()
            state["bound"].copy_(torch.where(found, value * self.factor, state["bound"]))
        if steps > 2 * INTERVAL:
            growth.copy_(now)


def _checked_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        allowed = f", or one of {MEASURED}" if name == "bound" else ""
        raise TypeError(f"{name} must be a number{allowed}, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value!r}")
    return float(value)
