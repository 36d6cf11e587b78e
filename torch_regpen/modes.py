"""The modes: what a step does to the penalized parameters beside the wrapped optimizer's own update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import dual, multi_tensor
from . import loss as losses
from .metric import Metric, RootStep, Step, differs_by_coordinate, steps_of
from .multi_tensor import Take
from .prox import Sized, check_prox, decay_, prox_
from .terms import Bundle, Term, add_grad_, check_grad

__all__ = ["MODES", "Mode"]


class Mode(ABC):
    """One way to apply a penalty in a step; all methods get the parameters that have a gradient, without autograd."""

    wants_lr = True

    def __init__(self, optimizer: Optimizer, metric: Metric) -> None:
        self.optimizer = optimizer
        self.metric = metric

    @abstractmethod
    def check(self, bundle: Bundle) -> None:
        """Raise `ValueError` where the penalty on this parameter has not what the mode needs."""

    def before_reevaluation(self, active: list[Bundle]) -> None:  # noqa: B027  most have nothing to do
        """Before a closure evaluates the model again, the parameters having moved."""

    def after_backward(self, active: list[Bundle], first: bool) -> None:  # noqa: B027
        """After the gradients are there, for the first time in the step or again, and before the update."""

    def added_to_loss(self, active: list[Bundle]) -> Tensor | float:
        """What the objective has beyond what a closure returned."""
        return 0.0

    def after_update(self, active: list[Bundle]) -> None:  # noqa: B027
        """After the wrapped optimizer has updated the parameters."""


class Coupled(Mode):
    """`grad += lam * subgradient`."""

    wants_lr = False

    def check(self, bundle: Bundle) -> None:
        check_grad(bundle.terms)

    def after_backward(self, active: list[Bundle], first: bool) -> None:
        active = [bundle for bundle in active if not bundle.off]
        for bundle in active:
            if any(map(attrgetter("is_sparse"), bundle.grads)):
                name = next(terms[0].name for terms in bundle.each if terms[0].tensor.grad.is_sparse)  # type: ignore[union-attr]
                raise ValueError(
                    f"the gradient of {name!r} is sparse, and the penalty's is not: use mode='decoupled' or "
                    "mode='proximal', which act on all rows"
                )
        for bundle in active:
            add_grad_(bundle, ascend=bool(bundle.group.get("maximize")))

    def added_to_loss(self, active: list[Bundle]) -> Tensor | float:
        value: Tensor | float = 0.0
        for maximize in (False, True):
            work = [bundle for bundle in active if bool(bundle.group.get("maximize")) == maximize]
            if work:
                value = value - losses.total(work) if maximize else value + losses.total(work)
        return value


class Decoupled(Mode):
    """`w -= lr * lam * subgradient`, stopping at zero, before the update."""

    def check(self, bundle: Bundle) -> None:
        check_grad(bundle.terms)
        for term in bundle.terms:
            if not term.kind.separable:
                raise ValueError(
                    f"{type(term.kind).__name__} is no sum over elements or groups that could stop at zero; use it in "
                    "the loss, or with mode='coupled'"
                )

    def after_backward(self, active: list[Bundle], first: bool) -> None:
        for bundle in active if first else []:
            decay_(bundle, bundle.group["lr"])


class Proximal(Mode):
    """`w = prox(w, s*lam)` after the update."""

    def check(self, bundle: Bundle) -> None:
        per_coordinate = differs_by_coordinate(self.optimizer, self.metric)
        check_prox(bundle.terms, per_coordinate)
        if per_coordinate and bundle.tensors[0].is_complex():
            raise ValueError(
                f"parameter {bundle.terms[0].name!r} is complex, and {type(self.optimizer).__name__} takes other steps "
                "for its real than for its imaginary part; use metric='euclidean'"
            )

    def steps_of(self, bundle: Bundle) -> list[Step | RootStep]:
        """The optimizer's own step for each tensor, in its metric."""
        steps = steps_of(self.optimizer, bundle.tensors, bundle.group, self.metric)
        if callable(self.metric):
            for terms, step in zip(bundle.each, steps, strict=True):
                if isinstance(step.size, Tensor) and step.size.ndim:
                    check_prox(terms, per_coordinate=True)  # known only now
        return steps

    def multiplier(self, parameter: Tensor, step: Sized, take: Take) -> float | Tensor:
        """What multiplies lambda in the prox that comes after this update, for what `take` takes of a parameter."""
        return step.part(take).size

    def after_update(self, active: list[Bundle]) -> None:
        for bundle in active:
            if bundle.off:
                continue
            steps = self.steps_of(bundle)
            roots = [step for step in steps if isinstance(step, RootStep)]
            if roots and bundle.only_thresholds:
                numerators = torch.stack([step.numerator for step in roots]) * bundle.coefficients[0]
                eps = torch.stack([step.eps for step in roots])
                moments = [step.moment for step in roots]
                multi_tensor.soft_threshold_each_(bundle.tensors, moments, numerators, eps, roots[0].cap)
            else:
                prox_(bundle, steps)


class Dual(Proximal):
    """The optimizer moves latent weights, and `w = prox(latent, S*lam)`; see `dual`."""

    def __init__(self, optimizer: Optimizer, metric: Metric) -> None:
        super().__init__(optimizer, metric)
        self.fingerprints = dual.Fingerprints()
        self.left: dict[int, Tensor] = {}  # the fingerprint of what the last step left in each parameter
        self.moved: dict[int, Tensor] = {}  # the latent weights, while a closure looks at the visible ones

    def __getstate__(self) -> dict[str, Any]:
        # In a copy the same ids may mean other tensors.
        return {**self.__dict__, "fingerprints": dual.Fingerprints(), "left": {}, "moved": {}}

    def before_reevaluation(self, active: list[Bundle]) -> None:
        for terms, parameter in _singly(active):
            self.moved[id(parameter)] = parameter.detach().clone()
            parameter.copy_(dual.visible(terms, self.optimizer.state[parameter]))

    def after_backward(self, active: list[Bundle], first: bool) -> None:
        if not first:
            for _, parameter in _singly(active):
                parameter.copy_(self.moved.pop(id(parameter)))
            return
        keep = differs_by_coordinate(self.optimizer, self.metric)
        state = self.optimizer.state
        twins = [w for bundle in active if not bundle.off for w in bundle.tensors if dual.LATENT in state.get(w, {})]
        for ws in _packed(twins):
            states = [state[w] for w in ws]
            dual.to_latent(ws, states, self._anew(ws, states), keep)

    def _anew(self, ws: list[Tensor], states: list[dict[str, Any]]) -> Tensor:
        """For each whether somebody has changed it since the last step, or it has made none."""
        known = [self.left.get(id(w)) for w in ws]
        if not any(left is None for left in known):
            return self.fingerprints.of(ws) != torch.stack(known)  # type: ignore[arg-type]
        return torch.stack(
            [
                dual.no_steps(state) if left is None else self.fingerprints.of([w])[0] != left
                for w, state, left in zip(ws, states, known, strict=True)
            ]
        )

    def multiplier(self, parameter: Tensor, step: Sized, take: Take) -> float | Tensor:
        so_far: float | Tensor = take(self.optimizer.state[parameter].get(dual.STEPS, 0.0))
        return so_far + super().multiplier(parameter, step, take)

    def after_update(self, active: list[Bundle]) -> None:
        left: list[Tensor] = []
        for bundle in active:
            steps = self.steps_of(bundle)
            states = [self.optimizer.state[parameter] for parameter in bundle.tensors]
            if bundle.off:
                for parameter, state, step in zip(bundle.tensors, states, steps, strict=True):
                    dual.restart(parameter, state, step)
                continue
            dual.to_visible(bundle, states, steps)
            left += bundle.tensors
        for ws in _packed(left):
            self.left.update(zip(map(id, ws), self.fingerprints.of(ws).unbind(), strict=True))
        self.fingerprints = dual.Fingerprints()


def _singly(active: list[Bundle]) -> Iterator[tuple[list[Term], Tensor]]:
    """The terms of each tensor, and the tensor, where they do anything."""
    for bundle in active:
        if not bundle.off:
            yield from zip(bundle.each, bundle.tensors, strict=True)


def _packed(ws: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors that go together, whatever the terms on them."""
    for pack in multi_tensor.packs(ws):
        yield [ws[i] for i in pack]


MODES: dict[str, type[Mode]] = {"coupled": Coupled, "decoupled": Decoupled, "dual": Dual, "proximal": Proximal}
