"""The modes: what a step does to the penalized parameters beside the wrapped optimizer's own update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
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
from .terms import Bundle, Term, add_grad_, check_grad, taken

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

    def after_backward(self, active: list[Bundle], first: bool) -> None:  # noqa: B027  most have nothing to do
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
        if hasattr(self.optimizer, "noise_multiplier"):
            raise ValueError(self._overwrites())

    def after_backward(self, active: list[Bundle], first: bool) -> None:
        active = [bundle for bundle in active if not bundle.off]
        for bundle in active:
            if any(getattr(w, "grad_sample", None) is not None for w in bundle.tensors):
                raise ValueError(self._overwrites())
            if any(map(attrgetter("is_sparse"), bundle.grads)):
                name = next(terms[0].name for terms in bundle.each if terms[0].tensor.grad.is_sparse)  # type: ignore[union-attr]
                raise ValueError(
                    f"the gradient of {name!r} is sparse, and the penalty's is not: use mode='decoupled' or "
                    "mode='proximal', which act on all rows"
                )
        for bundle in active:
            add_grad_(bundle, ascend=bool(bundle.group.get("maximize")))

    def after_update(self, active: list[Bundle]) -> None:
        for bundle in active:
            for w, grad in zip(bundle.tensors, bundle.grads, strict=True):
                if not bundle.off and w.grad is not grad and w.grad is not None:
                    raise RuntimeError(self._overwrites())

    def _overwrites(self) -> str:
        return (
            f"{type(self.optimizer).__name__} puts other gradients in the place of .grad in its step, as those of "
            "differential privacy do, and the penalty's is lost: use mode='decoupled' or mode='proximal'"
        )

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
        if bundle.group.get("line_search_fn"):
            raise ValueError(
                f"the line search of {type(self.optimizer).__name__} descends the loss alone, and what it knows of the "
                "curvature is wrong after a prox: use mode='coupled', which gives it loss + penalty"
            )
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

    def before_prox(
        self, bundle: Bundle, sample: Callable[[list[Term]], Take]
    ) -> Iterator[tuple[list[Term], float | Tensor]]:
        """For each tensor the terms at what the prox after this update will see, and what will multiply lambda.

        Args:
            bundle: the tensors, which the update has moved.
            sample: for the terms of a tensor, what takes a part of it and of each tensor beside it.
        """
        for terms, step in zip(bundle.each, self.steps_of(bundle), strict=True):
            take = sample(terms)
            yield taken(terms, take), step.part(take).size

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
    """Dual averaging: `w = prox(latent, S*lam)`; see `dual`."""

    def before_prox(
        self, bundle: Bundle, sample: Callable[[list[Term]], Take]
    ) -> Iterator[tuple[list[Term], float | Tensor]]:
        """See `Proximal`: the terms are at the latent weights, and the sum of all steps multiplies lambda."""
        for terms, step in zip(bundle.each, self.steps_of(bundle), strict=True):
            state = self._state_of(terms[0].tensor, step)
            take = sample(terms)
            some = taken(terms, take)
            sums = take(state[dual.STEPS]) + dual.counted(some, step.part(take))
            yield dual.latent_terms(some, take(state[dual.GAP])), sums

    def after_update(self, active: list[Bundle]) -> None:
        for bundle in active:
            steps = self.steps_of(bundle)
            states = list(map(self._state_of, bundle.tensors, steps))
            if bundle.off:
                dual.reset(states)
            else:
                dual.average_(bundle, states, steps)

    def _state_of(self, parameter: Tensor, step: Sized) -> dict[str, Any]:
        # At lambda 0, as before a ramp, there is a gap too: a distributed checkpoint is loaded into what is there.
        state: dict[str, Any] = self.optimizer.state[parameter]
        dual.make_gap(parameter, state, step)
        return state


MODES: dict[str, type[Mode]] = {"coupled": Coupled, "decoupled": Decoupled, "dual": Dual, "proximal": Proximal}
