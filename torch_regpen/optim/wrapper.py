"""RegularizedOptimizer: wraps any torch optimizer and applies penalties in its step, without autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ops.batches import JointBatch
from ..ops.chunks import Slicer
from ..ops.prox import zero_lengths_
from ..ops.terms import Term, by_tensor
from ..penalties.base import Penalty, Sum
from ..penalties.selection import owned_ids
from ..utils import warn
from . import dual_averaging
from .applied import Active, AppliedPenalty
from .decay_rate import Decay, Rate, kept_initial_lrs
from .delegation import WrappingOptimizer
from .frozen_zeros import FrozenZeros, restore_own_state
from .hooks import hooked, updated
from .modes import MODES
from .step_size import Metric

__all__ = ["RegularizedOptimizer"]


class RegularizedOptimizer(WrappingOptimizer):
    """An optimizer that wraps another: `step()` also applies `lam * Omega(w)` to each parameter that has a gradient.

    It shares `param_groups`, `state` and `defaults` with the wrapped optimizer, so schedulers, GradScaler, closures and
    trainers accept it. Below, `lr` is that of the param_group of each parameter. The modes are:

    - "coupled": `grad += lam * subgradient`, then the optimizer steps. It equals the penalty in the loss; for L2 it
      equals `weight_decay=2*lam` of SGD and Adam.
    - "decoupled": `w -= rate * lam * subgradient`, stopping at zero, then the optimizer steps on the loss alone. With
      `rate="lr"`, L2 equals `weight_decay=2*lam` of AdamW (Loshchilov and Hutter 2019).
    - "proximal": the optimizer steps, then `w = prox(w, s*lam)`, where `s` is the step that the optimizer takes for a
      unit gradient (`lr` for plain SGD). It makes exact zeros (Beck and Teboulle 2009; Yun, Lozano and Yang 2021).
    - "dual": dual averaging (RDA, Xiao 2010). For each weight, the state holds its gap `d`, the amount that the penalty
      has subtracted so far, and the sum `S` of all steps `s`. The optimizer steps, then `latent = w + d`, `S += s`,
      `w = prox(latent, S*lam)`, `d = latent - w`. Zeros can become nonzero again; large weights have little bias.

    For convex penalties, "coupled", "proximal" and "dual" have the same fixed points: loss + penalty is stationary.

    Half-precision weights lose updates below 0.4% (bfloat16) or 0.05% (float16) of a weight to rounding. Use "dual",
    which keeps `S` in float32, or autocast with float32 weights.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        penalty: a penalty, a list of penalties (their sum), or a list of `(penalty, mode)` pairs; see `Penalty` for the
            units of `lam`.
        mode: the mode of each penalty given without one.
        metric: the step `s` of "proximal" and "dual". "auto" computes it from the state of optimizers in torch.optim,
            and uses `lr` for others, with a warning. "euclidean" uses `lr`. A callable
            `(optimizer, parameter, group)` returns a number or a tensor of the parameter's shape.
        rate: the factor on `lam` in mode "decoupled". "lr" (torch's AdamW). "schedule": `lr/initial_lr`, so that `lam`
            is per step and only the schedule changes it (AdamW as published). "corrected": `lr^2/initial_lr` (Defazio
            2025). Or a callable `(optimizer, group) -> float or 0-dim tensor`. LR schedulers write `initial_lr` into
            the param_group (OneCycleLR and CyclicLR write their lowest lr); without them it is the lr at construction.
        cautious: in mode "decoupled", shrink an element only if the update `u` of the optimizer (`w -= u`) does not
            point away from zero: `u*w >= 0` (Chen et al. 2025). The update is then computed from the weights before
            the decay. This copies the weights, except for SGD, Adam and AdamW without a weight_decay of their own.
        compile: run the operations on large tensors as kernels of torch.compile. Each takes up to 10 seconds to
            compile. On CUDA, a step of a group lasso in Adam's metric is 1.5 to 4.5 times as fast with it. Without a
            C++ compiler (on CUDA, Triton), it warns and does not compile.

    Attributes:
        penalty: the penalty, or the sum of all penalties.
        zeroing_penalty: the sum of the penalties in mode "proximal" or "dual"; None if there are none.

    Raises:
        TypeError: `optimizer` is not an optimizer, or is already wrapped; `penalty` is not a penalty; `cautious` or
            `compile` is not a bool.
        ValueError: unknown `mode`, `metric` or `rate`; a `rate` or `cautious` without a penalty in mode "decoupled"; a
            penalty given twice, on parameters that the optimizer does not own, or without the gradient or the proximal
            map that its mode needs.

    Example:
        >>> import torch, torch_regpen as rp
        >>> model = torch.nn.Linear(4, 2)
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
        >>> pairs = [(rp.L2(model, lam=0.05), "decoupled"), (rp.L1(model, lam=1e-4), "proximal")]
        >>> optimizer = rp.RegularizedOptimizer(adamw, pairs)  # AdamW with exact zeros
    """

    # With False, GradScaler unscales the gradients (or skips the step) before step(), even for fused optimizers, so the
    # penalty is never added to scaled gradients.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: Optimizer,
        penalty: Penalty | Iterable[Penalty | tuple[Penalty, str]],
        mode: str = "coupled",
        *,
        metric: Metric = "auto",
        rate: Rate = "lr",
        cautious: bool = False,
        compile: bool = False,
    ) -> None:
        _check_optimizer(optimizer)
        if not callable(metric) and metric not in ("auto", "euclidean"):
            raise ValueError(f"metric must be 'auto', 'euclidean' or a callable, not {metric!r}")
        by_mode = _by_mode(penalty, mode)
        decay = Decay(rate, cautious)
        decay.check_mode([*by_mode])
        super().__init__(optimizer)
        self.penalty = _sum([part for parts in by_mode.values() for part in parts])
        self.mode = mode if len(by_mode) > 1 else next(iter(by_mode))
        self.metric = metric
        self._warned_in_loss = False
        self._applied = [
            AppliedPenalty(_sum(parts), name, optimizer, metric, decay, compile) for name, parts in by_mode.items()
        ]
        self._zeros = FrozenZeros(optimizer)
        zeroing = [applied for applied in self._applied if applied.makes_zeros]
        _check_overlap(zeroing)
        self.zeroing_penalty = _sum([applied.penalty for applied in zeroing]) if zeroing else None
        for part in self.penalty.parts:
            part.seen["in_loss"] = False  # ignore losses from before this optimizer existed

    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer and apply the penalties; return its result.

        Args:
            closure: reevaluates the model and returns the loss. Penalties in mode "coupled" are added to this loss, so
                line searches see the penalized objective.
        """
        active = Active()
        finish = partial(self._after_update, active)
        if closure is None:
            self._after_backward(active)
            result = updated(self.optimizer, start=partial(self._before_update, active), finish=finish)
        else:
            result = updated(self.optimizer, self._regularized(closure, active), finish=finish)
        self._warned_in_loss = self._warned_in_loss or _warn_if_in_loss(self.penalty)
        return result

    @torch.no_grad()
    def freeze_zeros(self) -> None:
        """Hold the exact zeros of the penalized parameters and turn the penalty off.

        Further steps then fit the nonzero weights without the bias of the penalty (debiasing). If penalties have
        different modes, only those in mode "proximal" or "dual" are turned off. With a center, elements at their center
        are held. The optimizer state of held elements is set to 0; the gaps of mode "dual" are kept for later. A
        parameter that is entirely zero and was not updated yet, such as a LoRA matrix before training, is not held.
        Another call also holds zeros that have appeared since. Frozen zeros are saved in `state_dict()`.

        Example:
            >>> import torch, torch_regpen as rp
            >>> w = torch.tensor([[0.0, 1.0]], requires_grad=True)
            >>> optimizer = rp.RegularizedOptimizer(torch.optim.SGD([w], lr=0.5), rp.L1([w], lam=0.1), "proximal")
            >>> optimizer.freeze_zeros()
            >>> w.sum().backward()
            >>> optimizer.step()
            >>> w.tolist()
            [[0.0, 0.5]]
        """
        owned = owned_ids(self)
        work = [terms for applied in self._freezable() for terms in by_tensor(applied.penalty.terms(frozen=True))]
        self._zeros.start([w for w in work if all(id(parameter) in owned for _, parameter in w[0].named_parameters)])

    def unfreeze_zeros(self) -> None:
        """Undo `freeze_zeros`: all weights may change, and the penalty is on again."""
        self._zeros.thaw()

    def reset_gaps(self) -> None:
        """Restart dual averaging (mode "dual") from the current weights: discard all gaps and sums of steps."""
        dual_averaging.reset(list(self.state.values()))

    @property
    def zeros_are_frozen(self) -> bool:
        """Whether zeros are frozen, by a call of `freeze_zeros` or by a loaded checkpoint."""
        return self._zeros.on

    @property
    def averages(self) -> bool:
        """Whether a penalty is in mode "dual"."""
        return any(applied.name == "dual" for applied in self._applied)

    def before_prox(
        self, sample: Callable[[list[Term]], Slicer] = lambda terms: lambda x: x
    ) -> Iterator[tuple[list[Term], float | Tensor | None]]:
        """Yield the input of the coming proximal map, for a step hook that sets lambda right before it.

        Args:
            sample: a function of the terms of a tensor. It returns a function that takes a part of this tensor and of
                other tensors of its shape.

        Yields:
            The terms on a sample of each tensor, and the factor that the map will apply to lambda. The factor is None
            if the map will not change the tensor, because it has no gradient or its zeros are frozen.
        """
        for applied in self._applied:
            yield from applied.before_prox(sample, frozen=self._zeros.on)

    def _regularized(self, closure: Callable[[], Any], active: Active) -> Callable[[], Any]:
        first = True

        def regularized() -> Any:
            nonlocal first
            if not first:
                with torch.no_grad():
                    self._zeros.hold(active.frozen)
            loss = closure()
            self._after_backward(active)
            if first:
                self._before_update(active)
            first = False
            with torch.no_grad():
                if loss is not None:
                    for mode, batches in active.shrinking:
                        loss = loss + mode.added_to_loss(batches)
            return loss

        return regularized

    def _after_backward(self, active: Active) -> None:
        active.batches, active.shrinking, active.frozen = [], [], []
        freezable = self._freezable() if self._zeros.on else []
        for applied in self._applied:
            batches = [batch for every in applied.batches() if (batch := every.with_grads()) is not None]
            active.batches += batches
            if applied in freezable:
                active.frozen += batches
            else:
                active.shrinking.append((applied.mode, batches))
        if active.frozen:
            with torch.no_grad():
                self._zeros.silence(active.frozen)
        for mode, batches in active.shrinking:
            mode.after_backward(batches)

    def _before_update(self, active: Active) -> None:
        for mode, batches in active.shrinking:
            mode.before_update(batches)

    @torch.no_grad()
    def _after_update(self, active: Active) -> None:
        for mode, batches in active.shrinking:
            mode.after_update(batches)
        self._zeros.note(active.batches)
        self._zeros.hold(active.frozen)
        for batch in active.batches:
            zero_lengths_(batch)

    def _freezable(self) -> list[AppliedPenalty]:
        """The penalties that `freeze_zeros` turns off, and whose zeros it holds."""
        return [applied for applied in self._applied if applied.makes_zeros] or self._applied

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the wrapped optimizer, which it can load with or without this wrapper."""
        self._zeros.mark_stepped()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the wrapped optimizer, including gaps, sums of steps and frozen zeros if it has them."""
        with kept_initial_lrs(self.optimizer):
            self.optimizer.load_state_dict(state_dict)
        self._zeros = FrozenZeros(self.optimizer)
        restore_own_state(self.optimizer, state_dict)
        dual_averaging.drop_others(list(self.state.values()), keep=self.averages)

    def __repr__(self) -> str:
        modes = ", ".join(repr(applied.name) for applied in self._applied)
        return f"RegularizedOptimizer(mode={modes}\n{self.penalty!r}\n{self.optimizer!r})"


def _warn_if_in_loss(penalty: Penalty) -> bool:
    if not any(part.seen["in_loss"] for part in penalty.parts):
        return False
    warn(
        "this penalty is in the loss and in the optimizer, so it counts double; remove penalty() from the "
        "loss, or the penalty from the optimizer"
    )
    return True


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, RegularizedOptimizer):
        raise TypeError(
            "optimizer is a RegularizedOptimizer already; wrap its .optimizer once, with a list of all penalties"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")


def _by_mode(penalty: Any, default: str) -> dict[str, list[Penalty]]:
    """Group the penalties by mode, in the order in which a step applies the modes."""
    given = [penalty] if isinstance(penalty, Penalty) else list(penalty) if isinstance(penalty, Iterable) else []
    found: dict[str, list[Penalty]] = {mode: [] for mode in MODES}
    for entry in given:
        part, mode = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, default)
        if not isinstance(part, Penalty):
            raise TypeError(
                f"penalty must be a Penalty or a list of them, or of (penalty, mode) pairs; got a {type(part).__name__}"
            )
        _check_mode(mode)
        found[mode].append(part)
    parts = [leaf for penalties in found.values() for part in penalties for leaf in part.parts]
    if not parts:
        raise TypeError(f"penalty must be a Penalty or a list of them, not {penalty!r}")
    twice = next((part for i, part in enumerate(parts) if any(part is other for other in parts[:i])), None)
    if twice is not None:
        raise ValueError(f"the same penalty is given twice and would count double: {twice!r}")
    _check_mode(default)
    return {mode: penalties for mode, penalties in found.items() if penalties}


def _check_mode(mode: str) -> None:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, sorted(MODES)))}, not {mode!r}")


def _sum(penalties: list[Penalty]) -> Penalty:
    return penalties[0] if len(penalties) == 1 else Sum(penalties)


def _check_overlap(zeroing: list[AppliedPenalty]) -> None:
    """Raise `ValueError` if two proximal maps would be applied to the same parameter, one after the other."""
    seen: set[int] = set()
    for batch in (batch for applied in zeroing for batch in applied.batches()):
        names = [name for terms in batch.each for name, w in terms[0].named_parameters if id(w) in seen]
        if names:
            what = "units that span several tensors" if isinstance(batch, JointBatch) else "another mode or grouping"
            raise ValueError(
                f"parameter {names[0]!r} is in two proximal maps, one with {what}, and the prox of their sum has no "
                "closed form; use SparseGroupLasso, or another mode for one of them"
            )
        seen |= {id(w) for w in batch.tensors}
