"""Frozen zeros: hold exact zeros at zero while the other weights are trained without the penalty."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from ..distributed.reductions import max_over_ranks
from ..distributed.shards import local
from ..groups import Elements
from ..groups.grouping import largest
from ..ops.batches import TensorBatch
from ..ops.terms import Term
from ..utils import first_names, warn
from .dual_averaging import GAP, STEPS

__all__ = ["FrozenZeros", "restore_own_state"]

FROZEN = "zeros_frozen"  # key in a param_group whose zeros are frozen
SURVIVORS = "survivors"  # key in the state of a parameter: a mask, False for elements that are held at zero
STEPPED = "stepped"  # key in the state of a zero parameter without other state: training made it zero
OWN = (GAP, STEPS, SURVIVORS)  # the tensors that this package adds to the state of a parameter
COUNTERS = ("step", "mu_product", "eta", "mu")  # 0-dim state of optimizers, not of an element of a 0-dim parameter


class ByTensor(WeakTensorKeyDictionary):
    """A dict with tensors as weak keys. In a deep copy or a pickle, the keys are the copied tensors."""

    def __deepcopy__(self, memo: dict[int, Any]) -> MutableMapping[Tensor, Any]:
        return _by_tensor(copy.deepcopy(self.__reduce__()[1][0], memo))

    def __reduce__(self) -> Any:
        items: Iterable[tuple[Tensor, Any]] = self.items()  # type: ignore[no-untyped-call]
        return _by_tensor, (list(items),)


def _by_tensor(items: Iterable[tuple[Tensor, Any]] = ()) -> MutableMapping[Tensor, Any]:
    found: MutableMapping[Tensor, Any] = ByTensor()
    found.update(items)
    return found


class FrozenZeros:
    """Masks of the elements of penalized parameters that are held at zero (with a center, at their center).

    The mask of a parameter is in its optimizer state. Before the first step it is stored here instead, because many
    optimizers initialize the state of a parameter only if it is empty.

    Args:
        optimizer: the wrapped optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._early = _by_tensor()
        self._stepped = _by_tensor()
        self._noted: list[list[Tensor]] = []
        self._compiled = False  # whether a compiled step ran; it cannot record the parameters it updated

    @property
    def on(self) -> bool:
        """Whether zeros are currently frozen."""
        return any(FROZEN in group for group in self._optimizer.param_groups)

    def start(self, work: list[list[Term]]) -> None:
        """Freeze the zeros of all terms of each tensor in `work`; warn about tensors that are entirely zero."""
        for terms in work:
            self.freeze(terms)
        for group in self._optimizer.param_groups:
            group[FROZEN] = True
        names = self._entirely_held(work)
        if names:
            warn(
                f"all penalized weights of {first_names(names)} are zero and stay zero, so nothing passes through "
                "them. To avoid this, call unfreeze_zeros() and lower lambda or the target, or exclude these "
                "parameters. If a BatchNorm follows them, clip gradients by value (torch.nn.utils.clip_grad_value_)"
            )

    def _entirely_held(self, work: list[list[Term]]) -> list[str]:
        """The names of the parameters whose elements are all held. It synchronizes with the device once."""
        parameters = [(name, w, self._survivors(w)) for terms in work for name, w in terms[0].named_parameters]
        held = [(name, w, mask) for name, w, mask in parameters if mask is not None and w.numel() and not mask.is_meta]
        alive = [max_over_ranks([(largest(local(mask)), w)]) for _, w, mask in held]
        flags = torch.stack([some.to(alive[0].device) for some in alive]).tolist() if alive else []
        return [repr(name) for (name, _, _), some in zip(held, flags, strict=True) if not some]

    def freeze(self, terms: list[Term]) -> None:
        """Hold the zeros of the parameters of some terms, and set their optimizer state to zero.

        A parameter that is entirely zero and was not updated yet is not held.

        Args:
            terms: all terms of one tensor, or of groups that span several tensors.
        """
        for w, survivors in _survivors_of(terms):
            if not self._was_stepped(w):
                local(survivors).logical_or_(max_over_ranks([(largest(local(survivors)), w)]) == 0)
            state = self._optimizer.state.get(w, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == w.shape and name not in (*OWN, *COUNTERS):
                    local(value).masked_fill_(~local(survivors), 0)
            if state:
                state[SURVIVORS] = survivors
            else:
                self._early[w] = survivors

    def thaw(self) -> None:
        """Release all held elements."""
        for group in self._optimizer.param_groups:
            group.pop(FROZEN, None)
        for state in self._optimizer.state.values():
            state.pop(SURVIVORS, None)
        self._early.clear()

    def silence(self, active: list[TensorBatch]) -> None:
        """Set the gradient of held elements to zero, so that momentum and second moments stay zero."""
        for terms in (terms for batch in active if FROZEN in batch.group for terms in batch.each):
            for _, w in terms[0].named_parameters:
                if self._survivors(w) is None:  # frozen before its first step, and then loaded from a checkpoint
                    self.freeze(terms)
                survivors = self._survivors(w)
                if survivors is not None and w.grad is not None and not w.grad.is_sparse:
                    local(w.grad).masked_fill_(~local(survivors), 0)

    def hold(self, active: list[TensorBatch]) -> None:
        """Reset held elements that an update has changed."""
        for terms in (terms for batch in active for terms in batch.each):
            center = _center(terms)
            for _, w in terms[0].named_parameters:
                survivors = self._survivors(w)
                if survivors is None:
                    continue
                if center is None:
                    local(w).masked_fill_(~local(survivors), 0)
                else:
                    local(w).copy_(torch.where(local(survivors), local(w), local(center)))

    def note(self, active: list[TensorBatch]) -> None:
        """Record which parameters were updated, and move the masks stored here to their optimizer state."""
        if torch.compiler.is_compiling():
            self._compiled = True
            return
        now = [batch.tensors for batch in active]
        if len(now) != len(self._noted) or not all(map(operator.is_, now, self._noted)) or self._early:
            self._noted = now
            for w in (w for tensors in now for w in tensors):
                self._stepped[w] = True
                if w in self._early:
                    self._optimizer.state[w][SURVIVORS] = self._early.pop(w)

    def mark_stepped(self) -> None:
        """Record in the optimizer state, for a checkpoint, which parameters training has made entirely zero."""
        for w in (w for group in self._optimizer.param_groups for w in group["params"] if w in self._stepped):
            if not self._optimizer.state.get(w) and all_zero(w):
                self._optimizer.state[w][STEPPED] = True

    def _was_stepped(self, w: Tensor) -> bool:
        state = self._optimizer.state.get(w, {})
        return self._compiled or w in self._stepped or bool(state.get("step", bool(state)))

    def _survivors(self, w: Tensor) -> Tensor | None:
        state = self._optimizer.state.get(w, {})
        survivors: Tensor | None = state[SURVIVORS] if SURVIVORS in state else self._early.get(w)
        return survivors if survivors is None else survivors.to(w.device)


def _survivors_of(terms: list[Term]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter of the terms with a mask of its nonzero elements (those not at their center)."""
    joint, length = terms[0].joint, terms[0].length
    if joint is not None:  # a zero bias in a nonzero unit is not held
        matrix = joint.gather(joint.parameters)
        alive = (matrix != 0).any(dim=1, keepdim=True).expand_as(matrix)
        if any(isinstance(term.grouping, Elements) for term in terms):
            alive = alive & (matrix != 0)
        masks = [torch.ones_like(w, dtype=torch.bool) for w in joint.parameters]
        joint.scatter_(masks, alive)
        yield from zip(joint.parameters, masks, strict=True)
        return
    w, center = terms[0].tensor, _center(terms)
    survivors = w.detach() != (0 if center is None else center)
    if length is not None:  # under weight_norm, a weight of length 0 is zero
        survivors = survivors & (length.detach() != 0)
    yield w, survivors


def all_zero(parameter: Tensor) -> bool:
    """Whether a parameter is entirely zero, on every rank. It synchronizes with the device."""
    return bool(max_over_ranks([(largest(local(parameter.detach()).abs()), parameter)]) == 0)


def _center(terms: list[Term]) -> Tensor | None:
    """The center at which the terms of a parameter hold elements; None for zero."""
    return next((term.center for term in terms if term.linear or term.penalty.coefficients is None), None)


def restore_own_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load gaps, sums of steps and masks in their own dtypes, since torch.optim casts them to the parameter's."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for key, tensor in zip(keys, tensors, strict=True):
        saved = state_dict["state"].get(key, {})
        for name in OWN:
            if name in saved:
                dtype = torch.bool if name == SURVIVORS else saved[name].dtype
                optimizer.state[tensor][name] = saved[name].to(tensor.device, dtype, copy=True)
