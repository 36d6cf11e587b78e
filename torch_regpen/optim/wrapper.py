"""RegularizedOptimizer: any torch optimizer, with a penalty applied in its step, without autograd."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ops.batches import TensorBatch, batches
from ..ops.chunks import Slicer
from ..ops.prox import zero_lengths_
from ..ops.terms import Term, by_tensor, sliced
from ..penalties.base import Penalty, Sum
from ..penalties.selection import owned_ids
from ..utils import warn
from . import dual_averaging
from .delegation import WrappingOptimizer
from .frozen_zeros import OWN, SURVIVORS, FrozenZeros
from .hooks import hooked, updated
from .modes import MODES, Proximal
from .step_size import Metric, sets_its_own_step, unsupported_reason

__all__ = ["RegularizedOptimizer"]


class RegularizedOptimizer(WrappingOptimizer):
    """Steps the wrapped optimizer and applies `lam * Omega(w)` itself, on the parameters that have a gradient.

    It shares `param_groups`, `state` and `defaults` with the optimizer that it wraps, so that schedulers, scalers,
    closures and trainers take it in its place. Each parameter's step size is the `lr` of its own param_group.

    - `"coupled"`: `grad += lam * subgradient`, then the optimizer steps, as with the penalty in the loss. For L2 it is
      `weight_decay=2*lam` of SGD, Adam and the others.
    - `"decoupled"`: `w -= lr * lam * subgradient`, in which no element (group) crosses zero, then the optimizer steps
      on the plain gradient. For L2 it is the decay of AdamW at `weight_decay=2*lam` (Loshchilov and Hutter 2019).
    - `"dual"`: regularized dual averaging (Xiao 2010). Beside each penalized parameter lies its gap `d`, what the
      penalty has taken from it so far. The optimizer steps on the visible weights `w`; then `latent = w + d`,
      `S += s`, `w = prox(latent, S*lam)`, `d = latent - w`. Weights that were zero can come back with all that they
      have gathered, and survivors carry little bias. For convex kinds its fixed points are those of loss + penalty.
    - `"proximal"`: the optimizer steps on the plain gradient, then `w = prox(w, s*lam)` with `s` the optimizer's own
      step for a unit gradient (`lr`, for plain SGD): exact zeros, and the solution of `"coupled"` (Beck and Teboulle
      2009; Yun, Lozano and Yang 2021).

    Half-precision weights are shrunk in float32 and rounded back: a step of less than half a unit in the last place
    (0.2 to 0.4% of a weight in bfloat16, 0.02 to 0.05% in float16) changes nothing. The way out is `"dual"`, which
    keeps `S` in float32, where small steps add up; or weights in float32, under autocast.

    Args:
        optimizer: any `torch.optim.Optimizer`, with its parameters.
        penalty: a penalty, or a list of them, which is their sum.
        mode: one of the above.
        metric: for `"proximal"` and `"dual"`: `"auto"` takes `s` from the optimizer's state, and `lr` for an optimizer
            that it does not know; `"euclidean"` takes `lr`; a callable `(optimizer, parameter, group)` returns `s`, a
            number or a tensor.

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
        if isinstance(optimizer, RegularizedOptimizer):
            raise TypeError(
                "optimizer is a RegularizedOptimizer already; wrap its optimizer once, with a list of all penalties"
            )
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
        if not callable(metric) and metric not in ("auto", "euclidean"):
            raise ValueError(f"metric must be 'auto', 'euclidean' or a callable, not {metric!r}")
        super().__init__(optimizer)
        self.penalty = _as_penalty(penalty)
        self.mode = mode
        self.metric = metric
        self._warned_in_loss = False
        self._mode = MODES[mode](optimizer, metric)
        self._zeros = FrozenZeros(optimizer)
        self._known: list[Any] = []  # what `_batches` was made of
        self._batches: list[TensorBatch] = []
        self._check()
        for part in self.penalty.parts:
            part.seen["in_loss"] = False  # a loss that it was in before has nothing to do with this optimizer

    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer with the penalty; returns what the closure returned, with it where coupled.

        Args:
            closure: reevaluates the model and returns the loss, for optimizers that want it.
        """
        active: list[TensorBatch] = []
        finish = partial(self._after_update, active)
        if closure is None:
            self._after_backward(active)
            result = updated(self.optimizer, finish=finish)
        else:
            result = updated(self.optimizer, self._regularized(closure, active), finish=finish)
        self._warn_if_in_loss()
        return result

    @torch.no_grad()
    def freeze_zeros(self) -> None:
        """End the shrinking: exact zeros of the penalized parameters stay zero, and the penalty is off.

        The weights that survive are then fitted without its bias (debiasing). Around a center, the elements at their
        center stay there. The optimizer's state is zeroed with the weights; the gaps of the dual mode wait. A parameter
        that is zero everywhere and was not stepped yet, such as a LoRA matrix before training, is left free. Called
        again, it holds the zeros that have come since. It travels in `state_dict()`.
        """
        owned = owned_ids(self)
        penalized = by_tensor(self.penalty.terms(frozen=True))
        self._zeros.freeze(terms for terms in penalized if id(terms[0].tensor) in owned)

    def reset_gaps(self) -> None:
        """Begin the average of the dual mode anew at the weights as they are; else the gaps go on, as momentum does."""
        dual_averaging.reset(list(self.state.values()))

    def unfreeze_zeros(self) -> None:
        """Slicer `freeze_zeros` back: all weights may move, and the penalty is on."""
        self._zeros.thaw()

    @property
    def zeros_are_frozen(self) -> bool:
        """Whether `freeze_zeros` has been called, here or before the checkpoint that was loaded."""
        return self._zeros.on

    @property
    def moves_by_prox(self) -> bool:
        """Whether its mode makes zeros by a prox: the proximal and the dual one."""
        return isinstance(self._mode, Proximal)

    def before_prox(
        self, sample: Callable[[list[Term]], Slicer] = lambda terms: lambda x: x
    ) -> Iterator[tuple[list[Term], float | Tensor | None]]:
        """For whoever steers lambda: what the prox is about to see, in a hook after the wrapped optimizer's step.

        Args:
            sample: for the terms of a parameter, what takes a part of it and of each tensor beside it.

        Yields:
            The terms of each penalized parameter, which the update has moved already, and what will multiply lambda in
            its prox; None where there will be none. Both are those of the sample.
        """
        for owned in self._owned():
            seen: dict[int, tuple[list[Term], float | Tensor]] = {}
            active = None if self._zeros.on else owned.with_grads()
            if active is not None and isinstance(self._mode, Proximal):
                seen = dict(zip(map(id, active.tensors), self._mode.before_prox(active, sample), strict=True))
            for terms, parameter in zip(owned.each, owned.tensors, strict=True):
                yield seen[id(parameter)] if id(parameter) in seen else (sliced(terms, sample(terms)), None)

    def _regularized(self, closure: Callable[[], Any], active: list[TensorBatch]) -> Callable[[], Any]:
        first = True

        def regularized() -> Any:
            nonlocal first
            if not first:
                with torch.no_grad():
                    self._zeros.hold(active)
            loss = closure()
            self._after_backward(active, first)
            first = False
            with torch.no_grad():
                return loss if loss is None else loss + self._mode.added_to_loss(self._penalized(active))

        return regularized

    @torch.no_grad()
    def _after_backward(self, active: list[TensorBatch], first: bool = True) -> None:
        active[:] = [batch for owned in self._owned() if (batch := owned.with_grads()) is not None]
        self._zeros.silence(active)
        self._mode.after_backward(self._penalized(active), first)

    @torch.no_grad()
    def _after_update(self, active: list[TensorBatch]) -> None:
        self._mode.after_update(self._penalized(active))
        self._zeros.note(active)
        self._zeros.hold(active)
        for batch in active:
            zero_lengths_(batch)

    def _penalized(self, active: list[TensorBatch]) -> list[TensorBatch]:
        return [] if self._zeros.on else active

    def _owned(self) -> list[TensorBatch]:
        """The penalized parameters, in batches of one param_group each.

        Raises:
            ValueError: the optimizer does not own one of them.
        """
        terms = self.penalty.terms()
        known = [terms, *(x for group in self.param_groups for x in (group, *group["params"]))]
        if len(known) == len(self._known) and all(map(operator.is_, known, self._known)):
            return self._batches
        owners = {id(tensor): group for group in self.param_groups for tensor in group["params"]}
        foreign = dict.fromkeys(term.name for term in terms if id(term.tensor) not in owners)
        if foreign:
            raise ValueError(
                f"the {type(self.optimizer).__name__} does not own these penalized parameters: {', '.join(foreign)}. "
                "Give it penalty.restricted_to(optimizer), which is the same penalty on those that it owns"
            )
        self._known, self._batches = known, batches(terms, owners)
        return self._batches

    def _check(self) -> None:
        name = type(self.optimizer).__name__
        every = self._owned()
        for batch in every:
            self._mode.check(batch)
            if self._mode.wants_lr and batch.group.get("lr") is None:
                raise ValueError(
                    f"the param_groups of {name} have no 'lr', which mode={self.mode!r} needs; use mode='coupled'"
                )
        decaying = [
            terms[0].name
            for batch in every
            if batch.group.get("weight_decay")
            for terms in batch.each
            if any(term.quadratic for term in terms)
        ]
        if decaying:
            warn(
                f"{', '.join(decaying)}: penalized by an L2 here, and by the weight_decay of {name} too (AdamW's "
                "default is 0.01): both are L2, and both shrink them. Set weight_decay=0 for them if that is not meant"
            )
        why = unsupported_reason(self.optimizer)
        if self.moves_by_prox and self.metric == "auto" and why is not None:
            warn(
                f"{name} {why}: the step that it takes for a unit gradient is not known, and the prox takes its lr. "
                "Pass metric='euclidean' to say that this is right, or a callable that returns the step"
            )
        if self.mode == "decoupled" and sets_its_own_step(self.optimizer):
            warn(
                f"{name} sets its own step size, which its lr is not: mode='decoupled' takes lr * lam, whatever that "
                "step is. Use mode='coupled', or mode='proximal' with a callable metric that returns the step"
            )

    def _warn_if_in_loss(self) -> None:
        if self._warned_in_loss or not any(part.seen["in_loss"] for part in self.penalty.parts):
            return
        self._warned_in_loss = True
        warn(
            "this penalty is in the loss and in the optimizer at once, and counts double; take penalty() out of the "
            "loss, or the penalty out of the optimizer"
        )

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's own, loadable with and without the wrapper."""
        self._zeros.mark_stepped()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the wrapped optimizer's; gaps, sums of steps (in float32 at least) and frozen zeros come back too."""
        self.optimizer.load_state_dict(state_dict)
        self._zeros = FrozenZeros(self.optimizer)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for key, tensor in zip(keys, tensors, strict=True):
            saved = state_dict["state"].get(key, {})
            for name in OWN:  # torch.optim has cast them to the dtype of the parameter
                if name in saved:
                    dtype = torch.bool if name == SURVIVORS else saved[name].dtype
                    self.state[tensor][name] = saved[name].to(tensor.device, dtype, copy=True)
        dual_averaging.drop_others(list(self.state.values()), keep=self.mode == "dual")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": [], "_batches": []}  # a copy finds its parameters itself

    def __repr__(self) -> str:
        return f"RegularizedOptimizer(mode={self.mode!r}\n{self.penalty!r}\n{self.optimizer!r})"


def _as_penalty(penalty: Any) -> Penalty:
    if isinstance(penalty, Penalty):
        return penalty
    parts = list(penalty) if isinstance(penalty, Iterable) else []
    if not parts or not all(isinstance(part, Penalty) for part in parts):
        raise TypeError(f"penalty must be a Penalty or a list of them, not {penalty!r}")
    return parts[0] if len(parts) == 1 else Sum([leaf for part in parts for leaf in part.parts])
