"""A penalty together with the mode in which an optimizer applies it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..ops.batches import TensorBatch, batches
from ..ops.chunks import Slicer
from ..ops.terms import Term, gathered, sliced
from ..penalties.base import Penalty
from ..penalties.units import warn_before_norms
from ..utils import first_names, warn
from .decay_rate import Decay
from .modes import MODES, Mode, Proximal
from .step_size import Metric, differs_by_coordinate, sets_its_own_step, unsupported_reason

__all__ = ["Active", "AppliedPenalty"]


class AppliedPenalty:
    """A penalty, the mode that applies it, and its parameters in batches by the param_groups of the optimizer.

    Args:
        penalty: the penalty.
        mode: the name of the mode.
        optimizer: the wrapped optimizer.
        metric: see `RegularizedOptimizer`.
        decay: `rate` and `cautious` of `RegularizedOptimizer`.
        compile: see `RegularizedOptimizer`.

    Raises:
        TypeError: `compile` is not a bool.
        ValueError: the optimizer does not own all penalized parameters; the penalty or the optimizer does not support
            the mode.
    """

    def __init__(
        self, penalty: Penalty, mode: str, optimizer: Optimizer, metric: Metric, decay: Decay, compile: bool
    ) -> None:
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be True or False, not {compile!r}")
        self.penalty = penalty
        self.name = mode
        self.mode = MODES[mode](optimizer, metric, decay)
        self._optimizer = optimizer
        self._compile = compile
        self._known: list[Any] = []  # the terms, param_groups and parameters from which the batches were made
        self._batches: list[TensorBatch] = []
        for batch in self.batches():
            self.mode.check(batch)
            if self.mode.wants_lr and batch.group.get("lr") is None:
                raise ValueError(
                    f"the param_groups of {type(optimizer).__name__} have no 'lr', which mode={mode!r} needs; use "
                    "mode='coupled'"
                )
        if not self._warn_about_decay():
            self._warn_about_adaptive_l2(metric)
        self._warn_about_steps(metric)
        self._warn_about_norms()

    @property
    def makes_zeros(self) -> bool:
        """Whether the mode makes exact zeros by a proximal map."""
        return isinstance(self.mode, Proximal)

    def batches(self) -> list[TensorBatch]:
        """The penalized parameters in batches. The parameters of a batch share a param_group, except in a `JointBatch`.

        Raises:
            ValueError: the optimizer does not own all of them.
        """
        terms = self.penalty.terms()
        known = [terms, *(x for group in self._optimizer.param_groups for x in (group, *group["params"]))]
        if len(known) == len(self._known) and all(map(operator.is_, known, self._known)):
            return self._batches
        owners = {id(tensor): group for group in self._optimizer.param_groups for tensor in group["params"]}
        foreign = dict.fromkeys(
            name for term in terms for name, parameter in term.named_parameters if id(parameter) not in owners
        )
        if foreign:
            raise ValueError(
                f"{type(self._optimizer).__name__} does not own these penalized parameters: {first_names(foreign)}. "
                "Pass penalty.restricted_to(optimizer), which is the same penalty on the parameters that it owns"
            )
        self._known, self._batches = known, batches(terms, owners, compiled=self._compile)
        return self._batches

    def before_prox(
        self, sample: Callable[[list[Term]], Slicer], frozen: bool
    ) -> Iterator[tuple[list[Term], float | Tensor | None]]:
        """See `RegularizedOptimizer.before_prox`. A mode without a proximal map yields nothing."""
        if not isinstance(self.mode, Proximal):
            return
        every = self.batches()
        having = [] if frozen else [some for batch in every if (some := batch.with_grads()) is not None]
        yield from self.mode.before_prox(having, sample)
        moved = {id(terms) for batch in having for terms in batch.each}
        for terms in (terms for batch in every for terms in batch.each if id(terms) not in moved):
            whole = gathered(terms)
            yield sliced(whole, sample(whole)), None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": [], "_batches": []}  # a copy collects its parameters again

    def _warn_about_decay(self) -> bool:
        decaying = [
            terms[0].name
            for batch in self.batches()
            if batch.group.get("weight_decay")
            for terms in batch.each
            if any(term.quadratic for term in terms)
        ]
        if decaying:
            warn(
                f"an L2 penalty and the weight_decay of {type(self._optimizer).__name__} (AdamW's default is 0.01) "
                f"both shrink {first_names(decaying)}. Set weight_decay=0 if this is not intended"
            )
        return bool(decaying)

    def _warn_about_steps(self, metric: Metric) -> None:
        name = type(self._optimizer).__name__
        reason = unsupported_reason(self._optimizer)
        if self.makes_zeros and metric == "auto" and reason is not None:
            warn(
                f"{name} {reason}: its step for a unit gradient is not known, so the prox takes its lr. Pass "
                "metric='euclidean' to confirm this, or a callable metric that returns the step"
            )
        uses_lr = self.name == "decoupled" and self.mode.decay.rate in ("lr", "corrected")
        if uses_lr and sets_its_own_step(self._optimizer):
            warn(
                f"{name} sets its own step size, which differs from its lr, but mode='decoupled' uses lr * lam. Use "
                "rate='schedule', mode='coupled', or mode='proximal' with a callable metric that returns the step"
            )

    def _warn_about_norms(self) -> None:
        parts = [part for part in self.penalty.parts if part.groups in ("output", 0)] if self.makes_zeros else []
        warn_before_norms(
            (place for part in parts for place in part.places()),
            "It divides by the scale of each filter, so a zero filter has a very large gradient and returns as a huge "
            "weight. Use groups=Coupled(model, example_inputs, scale=False), which groups a filter with its scale in "
            "the norm",
        )

    def _warn_about_adaptive_l2(self, metric: Metric) -> None:
        name = type(self._optimizer).__name__
        if self.makes_zeros and differs_by_coordinate(self._optimizer, metric):
            terms = self.penalty.terms()
            squares = [term for term in terms if term.quadratic and not term.linear]
            if squares and len(squares) < len(terms):
                warn(
                    f"L2 in mode={self.name!r} has the effect of L2 in the loss under {name}. The weight decay of "
                    "AdamW is much weaker at the same lambda; to get it, give the L2 its own mode: "
                    "[(L2(model, lam), 'decoupled'), ...]"
                )


@dataclass(slots=True)
class Active:
    """The parameters that have a gradient in a step.

    Attributes:
        batches: all batches.
        shrinking: the modes that `freeze_zeros` has not turned off, each with its parameters.
        frozen: the batches whose zeros are held.
    """

    batches: list[TensorBatch] = field(default_factory=list)
    shrinking: list[tuple[Mode, list[TensorBatch]]] = field(default_factory=list)
    frozen: list[TensorBatch] = field(default_factory=list)
