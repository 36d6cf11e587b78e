"""The modes: what a step does to the penalized parameters beside the wrapped optimizer's own update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from . import dual
from . import loss as losses
from .metric import Metric, Step, differs_by_coordinate, step_of
from .terms import Term, add_grads_, check_grad, check_prox, decay_, prox_

__all__ = ["MODES", "Mode", "Owned"]


class Owned(NamedTuple):
    """A penalized parameter: the terms on it, and the param_group of the optimizer that owns it."""

    terms: list[Term]
    group: dict[str, Any]

    @property
    def parameter(self) -> Tensor:
        """The parameter itself."""
        return self.terms[0].tensor

    @property
    def name(self) -> str:
        """Its qualified name."""
        return self.terms[0].name

    @property
    def off(self) -> bool:
        """Whether the penalty does nothing to it at the present lambda."""
        return all(term.off for term in self.terms)


class Mode(ABC):
    """One way to apply a penalty in a step; all methods get the parameters that have a gradient, without autograd."""

    wants_lr = True

    def __init__(self, optimizer: Optimizer, metric: Metric) -> None:
        self.optimizer = optimizer
        self.metric = metric

    @abstractmethod
    def check(self, owned: Owned) -> None:
        """Raise `ValueError` where the penalty on this parameter has not what the mode needs."""

    def before_reevaluation(self, active: list[Owned]) -> None:  # noqa: B027  most have nothing to do
        """Before a closure evaluates the model again, the parameters having moved."""

    def after_backward(self, active: list[Owned], first: bool) -> None:  # noqa: B027
        """After the gradients are there, for the first time in the step or again, and before the update."""

    def added_to_loss(self, active: list[Owned]) -> Tensor | float:
        """What the objective has beyond what a closure returned."""
        return 0.0

    def after_update(self, active: list[Owned]) -> None:  # noqa: B027
        """After the wrapped optimizer has updated the parameters."""


class Coupled(Mode):
    """`grad += lam * subgradient`."""

    wants_lr = False

    def check(self, owned: Owned) -> None:
        check_grad(owned.terms)

    def after_backward(self, active: list[Owned], first: bool) -> None:
        for owned in active:
            if owned.parameter.grad.is_sparse and not owned.off:  # type: ignore[union-attr]
                raise ValueError(
                    f"the gradient of {owned.name!r} is sparse, and the penalty's is not: use mode='decoupled' or "
                    "mode='proximal', which act on all rows"
                )
        add_grads_(
            (term, -term.lam if owned.group.get("maximize") else term.lam)
            for owned in active
            for term in owned.terms
            if not term.off
        )

    def added_to_loss(self, active: list[Owned]) -> Tensor | float:
        minimized = [term for owned in active if not owned.group.get("maximize") for term in owned.terms]
        maximized = [term for owned in active if owned.group.get("maximize") for term in owned.terms]
        value: Tensor | float = losses.total(minimized) if minimized else 0.0
        return value - losses.total(maximized) if maximized else value


class Decoupled(Mode):
    """`w -= lr * lam * subgradient`, stopping at zero, before the update."""

    def check(self, owned: Owned) -> None:
        check_grad(owned.terms)
        for term in owned.terms:
            if not term.kind.separable:
                raise ValueError(
                    f"{type(term.kind).__name__} is no sum over elements or groups that could stop at zero; use it in "
                    "the loss, or with mode='coupled'"
                )

    def after_backward(self, active: list[Owned], first: bool) -> None:
        if first:
            decay_((owned.terms, Step(owned.group["lr"])) for owned in active)


class Proximal(Mode):
    """`w = prox(w, s*lam)` after the update."""

    def check(self, owned: Owned) -> None:
        per_coordinate = differs_by_coordinate(self.optimizer, self.metric)
        check_prox(owned.terms, per_coordinate)
        if per_coordinate and owned.parameter.is_complex():
            raise ValueError(
                f"parameter {owned.name!r} is complex, and {type(self.optimizer).__name__} takes other steps for its "
                "real than for its imaginary part; use metric='euclidean'"
            )

    def step_of(self, owned: Owned) -> Step:
        """The optimizer's own step, in its metric."""
        step = step_of(self.optimizer, owned.parameter, owned.group, self.metric)
        if callable(self.metric) and isinstance(step.size, Tensor) and step.size.ndim:
            check_prox(owned.terms, per_coordinate=True)  # known only now
        return step

    def prox_step(self, owned: Owned) -> float | Tensor:
        """What multiplies lambda in the prox that comes after this update."""
        return self.step_of(owned).size

    def after_update(self, active: list[Owned]) -> None:
        prox_((owned.terms, self.step_of(owned)) for owned in active if not owned.off)


class Dual(Proximal):
    """The optimizer moves latent weights, and `w = prox(latent, S*lam)`; see `dual`."""

    def __init__(self, optimizer: Optimizer, metric: Metric) -> None:
        super().__init__(optimizer, metric)
        self.left: dict[int, Tensor] = {}  # the fingerprint of what the last step left in each parameter
        self.moved: dict[int, Tensor] = {}  # the latent weights, while a closure looks at the visible ones

    def before_reevaluation(self, active: list[Owned]) -> None:
        for owned in active:
            if not owned.off:
                self.moved[id(owned.parameter)] = owned.parameter.detach().clone()
                owned.parameter.copy_(dual.visible(owned.terms, self.optimizer.state[owned.parameter]))

    def after_backward(self, active: list[Owned], first: bool) -> None:
        for owned in active:
            if owned.off:
                continue
            key = id(owned.parameter)
            if first:
                dual.to_latent(owned.parameter, self.optimizer.state.get(owned.parameter, {}), self.left.get(key))
            else:
                owned.parameter.copy_(self.moved.pop(key))

    def prox_step(self, owned: Owned) -> float | Tensor:
        size: float | Tensor = self.optimizer.state[owned.parameter].get(dual.STEPS, 0.0) + super().prox_step(owned)
        return size

    def after_update(self, active: list[Owned]) -> None:
        for owned in active:
            state = self.optimizer.state[owned.parameter]
            if owned.off:
                dual.forget(state)
                continue
            dual.to_visible(owned.terms, state, self.step_of(owned))
            self.left[id(owned.parameter)] = dual.fingerprint(owned.parameter)


MODES: dict[str, type[Mode]] = {"coupled": Coupled, "decoupled": Decoupled, "dual": Dual, "proximal": Proximal}
