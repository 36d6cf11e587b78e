"""RegularizedOptimizer: any torch optimizer, with penalties applied in its step, without autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ops.batches import JointBatch, TensorBatch
from ..ops.chunks import Slicer
from ..ops.prox import zero_lengths_
from ..ops.terms import Term, by_tensor, gathered, sliced
from ..penalties.base import Penalty, Sum
from ..penalties.selection import owned_ids
from ..utils import warn
from . import dual_averaging
from .applied import AppliedPenalty
from .delegation import WrappingOptimizer
from .frozen_zeros import OWN, SURVIVORS, FrozenZeros
from .hooks import hooked, updated
from .modes import MODES, Proximal
from .step_size import Metric

__all__ = ["RegularizedOptimizer"]

Active = list[tuple[AppliedPenalty, list[TensorBatch]]]  # each penalty with its parameters that have a gradient


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
        penalty: a penalty; a list of them, which is their sum; or a list of `(penalty, mode)` pairs, each of which the
            same step applies in its own mode.
        mode: one of the above, for each penalty without one of its own.
        metric: for `"proximal"` and `"dual"`: `"auto"` takes `s` from the optimizer's state, and `lr` for an optimizer
            that it does not know; `"euclidean"` takes `lr`; a callable `(optimizer, parameter, group)` returns `s`, a
            number or a tensor.

    Attributes:
        penalty: all penalties, as a sum where there are several.
        zeroing_penalty: those in the proximal or the dual mode, which make zeros by a proximal map; else None.

    Raises:
        TypeError: not an optimizer, not a penalty.
        ValueError: an unknown mode or metric; the same penalty twice; the optimizer does not own a penalized parameter;
            a penalty has no gradient, or no prox in closed form, where the mode needs it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_regpen import L1, L2, RegularizedOptimizer
        >>> model = nn.Linear(4, 2)
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
        >>> penalties = [(L2(model, 0.05), "decoupled"), (L1(model, 1e-4), "proximal")]  # AdamW with exact zeros
        >>> optimizer = RegularizedOptimizer(adamw, penalties)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    # GradScaler then unscales the gradients itself, and skips the step, instead of leaving both to a fused optimizer:
    # the penalty never meets the loss scale.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: Optimizer,
        penalty: Penalty | Iterable[Penalty | tuple[Penalty, str]],
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
        if not callable(metric) and metric not in ("auto", "euclidean"):
            raise ValueError(f"metric must be 'auto', 'euclidean' or a callable, not {metric!r}")
        by_mode = _by_mode(penalty, mode)
        super().__init__(optimizer)
        self.penalty = _sum([part for parts in by_mode.values() for part in parts])
        self.mode = mode if len(by_mode) > 1 else next(iter(by_mode))
        self.metric = metric
        self._warned_in_loss = False
        self._applied = [AppliedPenalty(_sum(parts), name, optimizer, metric) for name, parts in by_mode.items()]
        self._zeros = FrozenZeros(optimizer)
        zeroing = [applied for applied in self._applied if applied.makes_zeros]
        _check_overlap(zeroing)
        self.zeroing_penalty = _sum([applied.penalty for applied in zeroing]) if zeroing else None
        for part in self.penalty.parts:
            part.seen["in_loss"] = False  # a loss that it was in before has nothing to do with this optimizer

    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer with the penalty; returns what the closure returned, with it where coupled.

        Args:
            closure: reevaluates the model and returns the loss, for optimizers that want it.
        """
        active: Active = []
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

        The weights that survive are then fitted without its bias (debiasing). Of several modes, the proximal and the
        dual one end, and the others go on. Around a center, the elements at their center stay there. The optimizer's
        state is zeroed with the weights; the gaps of the dual mode wait. A parameter that is zero everywhere and was
        not stepped yet, such as a LoRA matrix before training, is left free. Called again, it holds the zeros that have
        come since. It travels in `state_dict()`.
        """
        owned = owned_ids(self)
        for applied in self._freezable():
            for terms in by_tensor(applied.penalty.terms(frozen=True)):
                if all(id(parameter) in owned for _, parameter in terms[0].named_parameters):
                    self._zeros.freeze(terms)
        self._zeros.start()

    def unfreeze_zeros(self) -> None:
        """Undo `freeze_zeros`: all weights may move, and the penalty is on."""
        self._zeros.thaw()

    def reset_gaps(self) -> None:
        """Begin the average of the dual mode anew at the weights as they are; else the gaps go on, as momentum does."""
        dual_averaging.reset(list(self.state.values()))

    @property
    def zeros_are_frozen(self) -> bool:
        """Whether `freeze_zeros` has been called, here or before the checkpoint that was loaded."""
        return self._zeros.on

    @property
    def averages(self) -> bool:
        """Whether a penalty is in the dual mode."""
        return any(applied.name == "dual" for applied in self._applied)

    def before_prox(
        self, sample: Callable[[list[Term]], Slicer] = lambda terms: lambda x: x
    ) -> Iterator[tuple[list[Term], float | Tensor | None]]:
        """What the proximal map is about to see, for a hook between the update and the map that sets lambda.

        Args:
            sample: returns, for the terms of a tensor, what takes a part of it and of each tensor beside it.

        Yields:
            The terms on the sample of each tensor that the map will move, and what will multiply lambda there; None
            where a tensor has no gradient or its zeros are frozen.
        """
        for applied in self._applied:
            if not isinstance(applied.mode, Proximal):
                continue
            for batch in applied.batches():
                active = None if self._zeros.on else batch.with_grads()
                if active is not None:
                    yield from applied.mode.before_prox(active, sample)
                moved = set() if active is None else {id(terms) for terms in active.each}
                for terms in batch.each:
                    if id(terms) not in moved:
                        terms = gathered(terms)
                        yield sliced(terms, sample(terms)), None

    def _regularized(self, closure: Callable[[], Any], active: Active) -> Callable[[], Any]:
        first = True

        def regularized() -> Any:
            nonlocal first
            if not first:
                with torch.no_grad():
                    self._zeros.hold(self._frozen(active))
            loss = closure()
            self._after_backward(active, first)
            first = False
            with torch.no_grad():
                if loss is not None:
                    for applied, batches in self._shrinking(active):
                        loss = loss + applied.mode.added_to_loss(batches)
            return loss

        return regularized

    @torch.no_grad()
    def _after_backward(self, active: Active, first: bool = True) -> None:
        active[:] = [
            (applied, [batch for every in applied.batches() if (batch := every.with_grads()) is not None])
            for applied in self._applied
        ]
        self._zeros.silence(self._frozen(active))
        for applied, batches in self._shrinking(active):
            applied.mode.after_backward(batches, first)

    @torch.no_grad()
    def _after_update(self, active: Active) -> None:
        for applied, batches in self._shrinking(active):
            applied.mode.after_update(batches)
        self._zeros.note([batch for _, batches in active for batch in batches])
        self._zeros.hold(self._frozen(active))
        for _, batches in active:
            for batch in batches:
                zero_lengths_(batch)

    def _freezable(self) -> list[AppliedPenalty]:
        """The penalties whose zeros `freeze_zeros` holds, and which it ends."""
        return [applied for applied in self._applied if applied.makes_zeros] or self._applied

    def _frozen(self, active: Active) -> list[TensorBatch]:
        """The parameters whose zeros are held."""
        if not self._zeros.on:
            return []
        return [batch for applied, batches in active if applied in self._freezable() for batch in batches]

    def _shrinking(self, active: Active) -> Active:
        """The penalties that are on."""
        if not self._zeros.on:
            return active
        return [(applied, batches) for applied, batches in active if applied not in self._freezable()]

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
        dual_averaging.drop_others(list(self.state.values()), keep=self.averages)

    def __repr__(self) -> str:
        modes = ", ".join(repr(applied.name) for applied in self._applied)
        return f"RegularizedOptimizer(mode={modes}\n{self.penalty!r}\n{self.optimizer!r})"


def _by_mode(penalty: Any, default: str) -> dict[str, list[Penalty]]:
    """The penalties of each mode, in the order in which a step applies the modes."""
    given = [penalty] if isinstance(penalty, Penalty) else list(penalty) if isinstance(penalty, Iterable) else []
    found: dict[str, list[Penalty]] = {mode: [] for mode in MODES}
    for entry in given:
        part, mode = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, default)
        if not isinstance(part, Penalty):
            raise TypeError(
                "penalty must be a Penalty or a list of them, or of (penalty, mode) pairs; given is a "
                f"{type(part).__name__}"
            )
        if not isinstance(mode, str) or mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, sorted(MODES)))}, not {mode!r}")
        found[mode].append(part)
    parts = [leaf for penalties in found.values() for part in penalties for leaf in part.parts]
    if not parts:
        raise TypeError(f"penalty must be a Penalty or a list of them, not {penalty!r}")
    twice = next((part for i, part in enumerate(parts) if any(part is other for other in parts[:i])), None)
    if twice is not None:
        raise ValueError(f"the same penalty is given twice, and would count double: {twice!r}")
    if default not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, sorted(MODES)))}, not {default!r}")
    return {mode: penalties for mode, penalties in found.items() if penalties}


def _sum(penalties: list[Penalty]) -> Penalty:
    return penalties[0] if len(penalties) == 1 else Sum(penalties)


def _check_overlap(zeroing: list[AppliedPenalty]) -> None:
    """Raise `ValueError` where two proximal maps would act on the same parameter, one after the other."""
    seen: set[int] = set()
    for batch in (batch for applied in zeroing for batch in applied.batches()):
        names = [name for terms in batch.each for name, w in terms[0].named_parameters if id(w) in seen]
        if names:
            what = "units that span it and others" if isinstance(batch, JointBatch) else "another mode or grouping"
            raise ValueError(
                f"parameter {names[0]!r} is in two proximal maps, one over {what}, and the prox of their sum is not "
                "known in closed form; use SparseGroupLasso, or another mode for one of them"
            )
        seen |= {id(w) for w in batch.tensors}
