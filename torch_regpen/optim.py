"""RegularizedOptimizer: any torch optimizer, with a penalty applied in its step, without autograd."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import loss as losses
from .metric import Metric, Step, differs_by_coordinate, knows, step_of
from .penalty import Penalty, Sum
from .terms import Term, add_grads_, by_tensor, check_grad, check_prox, decay_, prox_

__all__ = ["RegularizedOptimizer"]

MODES = ("coupled", "decoupled", "dual", "proximal")

Active = list[tuple[list[Term], dict[str, Any]]]  # the terms of each penalized parameter, and its param_group


class RegularizedOptimizer(Optimizer):
    """Steps the wrapped optimizer and applies `lam * Omega(w)` itself, on the parameters that have a gradient.

    It shares `param_groups`, `state` and `defaults` with the optimizer that it wraps, so that schedulers, scalers,
    closures and trainers take it in its place. Each parameter's step size is the `lr` of its own param_group.

    - `"coupled"`: `grad += lam * subgradient`, then the optimizer steps, as with the penalty in the loss. For L2 it is
      `weight_decay=2*lam` of SGD, Adam and the others.
    - `"decoupled"`: `w -= lr * lam * subgradient`, in which no element (group) crosses zero, then the optimizer steps
      on the plain gradient. For L2 it is the decay of AdamW at `weight_decay=2*lam` (Loshchilov and Hutter 2019).
    - `"proximal"`: the optimizer steps on the plain gradient, then `w = prox(w, s*lam)` with `s` the optimizer's own
      step for a unit gradient (`lr`, for plain SGD): exact zeros, and the solution of `"coupled"` (Beck and Teboulle
      2009; Yun, Lozano and Yang 2021).

    Args:
        optimizer: any `torch.optim.Optimizer`, with its parameters.
        penalty: a penalty, or a list of them, which is their sum.
        mode: one of the above.
        metric: for `"proximal"`: `"auto"` takes `s` from the optimizer's state, and `lr` for an optimizer it does not
            know; `"euclidean"` takes `lr`; a callable `(optimizer, parameter, group) -> float or tensor` gives `s`.

    Raises:
        TypeError: not an optimizer, not a penalty.
        ValueError: an unknown mode or metric; the optimizer does not own a penalized parameter; a penalty has no
            gradient, or no prox in closed form, where the mode needs it.
    """

    # GradScaler then unscales the gradients itself, and skips the step, instead of leaving both to a fused optimizer:
    # the penalty never meets the loss scale.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: Optimizer,
        penalty: Penalty | Iterable[Penalty],
        mode: str = "coupled",
        *,
        metric: Metric = "auto",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
        if not callable(metric) and metric not in ("auto", "euclidean"):
            raise ValueError(f"metric must be 'auto', 'euclidean' or a callable, not {metric!r}")
        self.optimizer = optimizer
        self.penalty = _as_penalty(penalty)
        self.mode = mode
        self.metric = metric
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._warned_in_loss = False
        self._check()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer with the penalty; returns what the closure returned, with it where coupled.

        Args:
            closure: reevaluates the model and returns the loss, for optimizers that want it.
        """
        for pre_hook in self._optimizer_step_pre_hooks.values():
            pre_hook(self, (closure,), {})
        active: Active = []

        def after_backward(first: bool = True) -> None:
            active[:] = self._active()
            if self.mode == "coupled":
                self._add_grads(active)
            elif self.mode == "decoupled" and first:
                decay_((terms, Step(group["lr"])) for terms, group in active)

        if closure is None:
            with torch.no_grad():
                after_backward()
            result = self.optimizer.step()
        else:
            result = self.optimizer.step(self._regularized(closure, after_backward))
        if self.mode == "proximal":
            with torch.no_grad():
                prox_(
                    (terms, step_of(self.optimizer, terms[0].tensor, group, self.metric))
                    for terms, group in active
                    if not all(term.off for term in terms)
                )
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, (closure,), {})
        self._warn_if_in_loss()
        return result

    def _regularized(self, closure: Callable[[], Any], after_backward: Callable[[bool], None]) -> Callable[[], Any]:
        first = True

        def regularized() -> Any:
            nonlocal first
            loss = closure()
            with torch.no_grad():
                after_backward(first)
                first = False
                return loss if loss is None or self.mode != "coupled" else loss + self._value()

        return regularized

    def _value(self) -> Tensor | float:
        """The penalty as it enters the objective: against it, where the optimizer maximizes."""
        owners = self._owners()
        parts: dict[bool, list[Term]] = {}
        for term in self.penalty.terms():
            parts.setdefault(bool(owners[id(term.tensor)].get("maximize")), []).append(term)
        return sum(-losses.total(terms) if maximize else losses.total(terms) for maximize, terms in parts.items())

    def _add_grads(self, active: Active) -> None:
        for terms, _ in active:
            if terms[0].tensor.grad.is_sparse:  # type: ignore[union-attr]
                raise ValueError(
                    f"the gradient of {terms[0].name!r} is sparse, and the penalty's is not: use mode='decoupled' or "
                    "mode='proximal', which act on all rows"
                )
        add_grads_(
            (term, -term.lam if group.get("maximize") else term.lam)
            for terms, group in active
            for term in terms
            if not term.off
        )

    def _owners(self) -> dict[int, dict[str, Any]]:
        """The param_group of each parameter that the optimizer owns."""
        return {id(tensor): group for group in self.param_groups for tensor in group["params"]}

    def _owned(self) -> Active:
        """The terms of each penalized parameter, with its param_group.

        Raises:
            ValueError: the optimizer does not own it.
        """
        owners = self._owners()
        work = by_tensor(self.penalty.terms())
        foreign = [terms[0].name for terms in work if id(terms[0].tensor) not in owners]
        if foreign:
            raise ValueError(
                f"the {type(self.optimizer).__name__} does not own these penalized parameters: {', '.join(foreign)}. "
                "Give it penalty.restricted_to(optimizer), which is the same penalty on those that it owns"
            )
        return [(terms, owners[id(terms[0].tensor)]) for terms in work]

    def _active(self) -> Active:
        return [(terms, group) for terms, group in self._owned() if terms[0].tensor.grad is not None]

    def _check(self) -> None:
        owned = self._owned()
        per_coordinate = differs_by_coordinate(self.optimizer, self.metric)
        for terms, group in owned:
            if self.mode == "proximal":
                check_prox(terms, per_coordinate)
                if per_coordinate and terms[0].tensor.is_complex():
                    raise ValueError(
                        f"parameter {terms[0].name!r} is complex, and {type(self.optimizer).__name__} takes other "
                        "steps for its real than for its imaginary part; use metric='euclidean'"
                    )
            else:
                check_grad(terms)
            if self.mode != "coupled" and "lr" not in group:
                raise ValueError(
                    f"the param_groups of {type(self.optimizer).__name__} have no 'lr', which mode={self.mode!r} "
                    "needs; use mode='coupled'"
                )
        decaying = [terms[0].name for terms, group in owned if group.get("weight_decay")]
        if decaying:
            warnings.warn(
                f"{', '.join(decaying)}: penalized here, and by the weight_decay of {type(self.optimizer).__name__} "
                "too (AdamW's default is 0.01); both shrink them. Set weight_decay=0 for them if that is not meant",
                stacklevel=3,
            )
        if self.mode == "proximal" and self.metric == "auto" and not knows(self.optimizer):
            warnings.warn(
                f"the step that {type(self.optimizer).__name__} takes for a unit gradient is not known; the prox takes "
                "its lr. Pass metric='euclidean' to say that this is right, or a callable that returns the step",
                stacklevel=3,
            )

    def _warn_if_in_loss(self) -> None:
        if self._warned_in_loss or not any(part.seen["in_loss"] for part in self.penalty.parts):
            return
        self._warned_in_loss = True
        warnings.warn(
            "this penalty is in the loss and in the optimizer at once, and counts double; take penalty() out of the "
            "loss, or the penalty out of the optimizer",
            stacklevel=3,
        )

    # What follows makes it the optimizer that it wraps, for whoever looks at it.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's own."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's own."""
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's own, loadable with and without the wrapper."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        # What an optimizer has beyond torch.optim's interface, such as the train() of schedule-free ones.
        if name == "optimizer":  # not there yet, while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"RegularizedOptimizer(mode={self.mode!r}\n{self.penalty!r}\n{self.optimizer!r})"


def _as_penalty(penalty: Any) -> Penalty:
    if isinstance(penalty, Penalty):
        return penalty
    parts = list(penalty) if isinstance(penalty, Iterable) else []
    if not parts or not all(isinstance(part, Penalty) for part in parts):
        raise TypeError(f"penalty must be a Penalty or a list of them, not {penalty!r}")
    return parts[0] if len(parts) == 1 else Sum([leaf for part in parts for leaf in part.parts])
