"""The modes: what a step does to the penalized parameters besides the wrapped optimizer's own update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ops.batches import JointBatch, TensorBatch, as_one_tensor
from ..ops.chunks import Slicer
from ..ops.closed_forms import check_prox
from ..ops.decay import Combination, decay_, decay_where_inward_
from ..ops.gradient import add_grad_, check_grad
from ..ops.prox import prox_
from ..ops.step import Step, adaptive, on_device_of, same_number
from ..ops.terms import Term, sliced
from ..ops.value import total_value
from . import dual_averaging
from .decay_rate import Decay
from .next_update import next_updates
from .step_size import Metric, check_momentum, differs_by_coordinate, has_small_steps, steps_of

__all__ = ["MODES", "Mode"]


class Mode(ABC):
    """One way to apply a penalty in a step. Its methods receive the parameters that have a gradient."""

    wants_lr = True

    def __init__(self, optimizer: Optimizer, metric: Metric, decay: Decay) -> None:
        self.optimizer = optimizer
        self.metric = metric
        self.decay = decay

    @abstractmethod
    def check(self, batch: TensorBatch) -> None:
        """Raise `ValueError` if the penalty on this parameter lacks what the mode needs."""

    def after_backward(self, active: list[TensorBatch]) -> None:  # noqa: B027  most have nothing to do
        """Called before the update, each time after gradients were computed."""

    def before_update(self, active: list[TensorBatch]) -> None:  # noqa: B027
        """Called once per step, right before the optimizer updates the parameters."""

    def added_to_loss(self, active: list[TensorBatch]) -> Tensor | float:
        """The value to add to the loss that a closure returned."""
        return 0.0

    def after_update(self, active: list[TensorBatch]) -> None:  # noqa: B027
        """Called after the wrapped optimizer has updated the parameters."""


class Coupled(Mode):
    """`grad += lam * subgradient`."""

    wants_lr = False

    def __init__(self, optimizer: Optimizer, metric: Metric, decay: Decay) -> None:
        super().__init__(optimizer, metric, decay)
        self._added: list[tuple[list[Tensor], list[Tensor]]] = []  # tensors, and the gradients that were changed

    def check(self, batch: TensorBatch) -> None:
        check_grad(batch.terms)
        if hasattr(self.optimizer, "noise_multiplier"):
            raise ValueError(self._overwrites())

    def after_backward(self, active: list[TensorBatch]) -> None:
        self._added = []
        active = [batch for batch in active if not batch.inactive]
        for batch in active:
            grads = batch.grads
            if any(getattr(w, "grad_sample", None) is not None for w in batch.tensors):
                raise ValueError(self._overwrites())
            if any(map(attrgetter("is_sparse"), grads)):
                name = next(
                    name
                    for terms in batch.each
                    for name, w in terms[0].named_parameters
                    if w.grad is not None and w.grad.is_sparse
                )
                raise ValueError(
                    f"the gradient of {name!r} is sparse, but the gradient of the penalty is not; use mode='decoupled' "
                    "or mode='proximal', which act on all rows"
                )
            self._added.append((batch.tensors, grads))
        with torch.no_grad():
            for batch in active:
                add_grad_(batch, ascend=bool(batch.group.get("maximize")))

    def after_update(self, active: list[TensorBatch]) -> None:
        added, self._added = self._added, []
        for tensors, grads in added:
            if any(w.grad is not grad and w.grad is not None for w, grad in zip(tensors, grads, strict=True)):
                raise RuntimeError(self._overwrites())

    def _overwrites(self) -> str:
        return (
            f"{type(self.optimizer).__name__} replaces .grad in its step, as optimizers for differential privacy do, "
            "so the gradient of the penalty is lost; use mode='decoupled' or mode='proximal'"
        )

    def added_to_loss(self, active: list[TensorBatch]) -> Tensor | float:
        value: Tensor | float = 0.0
        for maximize in (False, True):
            work = [batch for batch in active if bool(batch.group.get("maximize")) == maximize]
            if work:
                value = value - total_value(work) if maximize else value + total_value(work)
        return value


class Decoupled(Mode):
    """`w -= rate * lam * subgradient`, stopping at zero, right before the update; the rate is `lr` by default.

    If a hook raises before the update, nothing is decayed. As in torch's AdamW, the decay is not undone if the update
    itself raises, since that would need a copy of the weights.

    With `cautious`, the sign of the update comes from the state of the optimizer. If the state does not determine it,
    the mode copies the weights and decays after the update.
    """

    def __init__(self, optimizer: Optimizer, metric: Metric, decay: Decay) -> None:
        super().__init__(optimizer, metric, decay)
        self.wants_lr = not callable(decay.rate)
        self._waiting: list[tuple[TensorBatch, float | Tensor, list[Tensor]]] = []  # batch, rate, old weights
        decay.record_initial_lrs(optimizer)

    def check(self, batch: TensorBatch) -> None:
        check_grad(batch.terms)
        for term in batch.terms:
            if not term.penalty.separable:
                raise ValueError(
                    f"{type(term.penalty).__name__} is not a sum over elements or groups, so none of them can stop at "
                    "zero; use it in the loss, or with mode='coupled'"
                )

    @torch.no_grad()
    def before_update(self, active: list[TensorBatch]) -> None:
        self._waiting = []
        rates: dict[int, float | Tensor] = {}
        for batch in active:
            rate = self._rate_of(batch, rates)
            if not self.decay.cautious:
                decay_(batch, rate)
                continue
            updates = None if batch.inactive else next_updates(self.optimizer, batch)
            if updates is not None:
                decay_where_inward_(batch, rate, updates)
            elif not batch.inactive:
                self._waiting.append((batch, rate, [w.clone() for w in batch.tensors]))

    def after_update(self, active: list[TensorBatch]) -> None:
        waiting, self._waiting = self._waiting, []
        for batch, rate, before in waiting:
            after = [w.clone() for w in batch.tensors]
            updates: list[Combination] = [[(1.0, old), (-1.0, new)] for old, new in zip(before, after, strict=True)]
            for w, old in zip(batch.tensors, before, strict=True):
                w.copy_(old)
            decay_where_inward_(batch, rate, updates)
            for w, old, new in zip(batch.tensors, before, after, strict=True):
                w.sub_(old).add_(new)

    def _rate_of(self, batch: TensorBatch, rates: dict[int, float | Tensor]) -> float | Tensor:
        """The rate of a batch; `rates` caches the rates by the id of the param_group.

        If the tensors of a joint batch have different rates, the result is a tensor of the shape of their matrix.
        """
        owners = batch.owners if isinstance(batch, JointBatch) else [batch.group]
        for group in owners:
            if id(group) not in rates:
                rates[id(group)] = self.decay.factor(self.optimizer, group)
        each = [on_device_of(batch.tensors[0], rates[id(group)]) for group in owners]
        if not isinstance(batch, JointBatch) or all(same_number(rate, each[0]) for rate in each):
            return each[0]
        return batch.spread(each)


class Proximal(Mode):
    """`w = prox(w, s*lam)` after the update."""

    def check(self, batch: TensorBatch) -> None:
        if batch.group.get("line_search_fn"):
            raise ValueError(
                f"the line search of {type(self.optimizer).__name__} sees only the loss, and its curvature estimate is "
                "wrong after a prox; use mode='coupled', which gives it loss + penalty"
            )
        for group in batch.owners if isinstance(batch, JointBatch) else [batch.group]:
            check_momentum(self.optimizer, group, self.metric)
        per_coordinate = differs_by_coordinate(self.optimizer, self.metric)
        check_prox(batch.terms, per_coordinate)
        if per_coordinate and batch.tensors[0].is_complex():
            raise ValueError(
                f"parameter {batch.terms[0].name!r} is complex, and {type(self.optimizer).__name__} takes different "
                "steps for its real and imaginary parts; use metric='euclidean'"
            )

    def steps_of(self, batch: TensorBatch) -> list[Step]:
        """The optimizer's own step for each tensor, in its metric."""
        if isinstance(batch, JointBatch):
            return _steps_of_each(self.optimizer, batch, self.metric)
        steps = steps_of(self.optimizer, batch.tensors, batch.group, self.metric)
        if callable(self.metric):
            for terms, step in zip(batch.each, steps, strict=True):
                if isinstance(step.size, Tensor) and step.size.ndim:
                    check_prox(terms, per_coordinate=True)  # known only now
        return steps

    def with_steps(self, active: list[TensorBatch]) -> Iterator[tuple[TensorBatch, list[Step]]]:
        """Yield each batch with its steps. If steps need little memory, several batches share one call."""
        if not has_small_steps(self.optimizer, self.metric):
            yield from ((batch, self.steps_of(batch)) for batch in active)
            return
        for key, some in groupby(active, key=_owner):
            alike = list(some)
            if key is None:  # the tensors of a joint batch may be in several param_groups
                yield from ((batch, self.steps_of(batch)) for batch in alike)
                continue
            tensors = [w for batch in alike for w in batch.tensors]
            steps = iter(steps_of(self.optimizer, tensors, alike[0].group, self.metric))
            for batch in alike:
                yield batch, list(islice(steps, len(batch.tensors)))

    def before_prox(
        self, active: list[TensorBatch], sample: Callable[[list[Term]], Slicer]
    ) -> Iterator[tuple[list[Term], float | Tensor]]:
        """Yield, for each tensor, the terms that the prox after this update will see and the factor on lambda.

        Args:
            active: the tensors, which the optimizer has updated.
            sample: see `RegularizedOptimizer.before_prox`.
        """
        for batch, steps in self.with_steps(active):
            flat, flat_steps = as_one_tensor(batch, steps)
            for terms, step in zip(flat.each, flat_steps, strict=True):
                take = sample(terms)
                yield sliced(terms, take), step.sliced(take).size

    def after_update(self, active: list[TensorBatch]) -> None:
        for batch, steps in self.with_steps([batch for batch in active if not batch.inactive]):
            fused = adaptive(steps) if batch.is_soft_threshold else None
            if fused is not None:
                moments, numerators, eps, max_change = fused
                batch.operations.soft_threshold_each_(
                    batch.tensors, moments, numerators * batch.coefficients[0], eps, max_change
                )
            else:
                prox_(batch, steps)


class Dual(Proximal):
    """Dual averaging: `w = prox(latent, S*lam)`; see `dual_averaging`."""

    def before_prox(
        self, active: list[TensorBatch], sample: Callable[[list[Term]], Slicer]
    ) -> Iterator[tuple[list[Term], float | Tensor]]:
        """See `Proximal`. The terms are at the latent weights, and the factor is the sum of all steps."""
        for batch, steps in self.with_steps(active):
            states = self._states_of(batch, steps)
            if isinstance(batch, JointBatch):
                flat, states, steps = dual_averaging.matrix(batch, states, steps)
            else:
                flat, steps = as_one_tensor(batch, steps)
                states = states if flat is batch else dual_averaging.joined_states(batch, states)
            for terms, state, step in zip(flat.each, states, steps, strict=True):
                take = sample(terms)
                some = sliced(terms, take)
                sums = take(state[dual_averaging.STEPS]) + dual_averaging.counted(some, step.sliced(take))
                yield dual_averaging.latent_terms(some, take(state[dual_averaging.GAP])), sums

    def after_update(self, active: list[TensorBatch]) -> None:
        for batch, steps in self.with_steps(active):
            states = self._states_of(batch, steps)
            if batch.inactive:
                dual_averaging.reset(states)
            else:
                dual_averaging.average_(batch, states, steps)

    def _states_of(self, batch: TensorBatch, steps: list[Step]) -> list[dict[str, Any]]:
        # Create gaps even at lambda 0 (before a ramp): a distributed checkpoint loads only into existing state.
        states: list[dict[str, Any]] = [self.optimizer.state[w] for w in batch.tensors]
        dual_averaging.make_gaps(batch.tensors, states, steps)
        return states


def _owner(batch: TensorBatch) -> tuple[Any, ...] | None:
    """A key, equal for batches whose steps can be computed in one call; None for a joint batch."""
    return None if isinstance(batch, JointBatch) else (id(batch.group), batch.tensors[0].dtype, batch.tensors[0].device)


def _steps_of_each(optimizer: Optimizer, batch: JointBatch, metric: Metric) -> list[Step]:
    """The steps of tensors that several param_groups may own."""
    steps: dict[int, Step] = {}
    for group in {id(owner): owner for owner in batch.owners}.values():
        owned = [w for w, owner in zip(batch.tensors, batch.owners, strict=True) if owner is group]
        steps.update(zip(map(id, owned), steps_of(optimizer, owned, group, metric), strict=True))
    return [steps[id(w)] for w in batch.tensors]


# In the order in which a step applies the modes.
MODES: dict[str, type[Mode]] = {"coupled": Coupled, "decoupled": Decoupled, "proximal": Proximal, "dual": Dual}
