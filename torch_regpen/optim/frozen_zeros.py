"""Zeros that hold: weights that are exactly zero are kept there, while the others are fitted without the penalty."""

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
from .dual_averaging import GAP, STEPS

__all__ = ["OWN", "SURVIVORS", "FrozenZeros"]

FROZEN = "zeros_frozen"  # in a param_group: its zeros are frozen
SURVIVORS = "survivors"  # in the state of a parameter: a mask, False where it is held; or 0-dim, for all of it
STEPPED = "stepped"  # in the state of a zero parameter for which the optimizer keeps nothing: training made it so
OWN = (GAP, STEPS, SURVIVORS)  # the tensors that the package keeps in the state of a parameter


class ByTensor(WeakTensorKeyDictionary):
    """What is kept for tensors, as long as they live; a copy has it for the copies of the tensors."""

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
    """Which elements of the penalized parameters are held at zero; around a center, at their center.

    A mask lies in the optimizer's state of its parameter, and until there is one, here: what an optimizer finds there
    before its first step, it takes for its own.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._early = _by_tensor()
        self._stepped = _by_tensor()
        self._noted: list[list[Tensor]] = []
        self._compiled = False  # whether a compiled step ran, which cannot note what it has stepped

    @property
    def on(self) -> bool:
        """Whether zeros are frozen."""
        return any(FROZEN in group for group in self._optimizer.param_groups)

    def start(self) -> None:
        """From now on, zeros are held."""
        for group in self._optimizer.param_groups:
            group[FROZEN] = True

    def freeze(self, terms: list[Term]) -> None:
        """Hold the zeros of a parameter, or those of the units that span several; state is zeroed with them.

        What is zero everywhere and was not stepped yet is left free.
        """
        for w, survivors in _survivors_of(terms):
            if not self._was_stepped(w):
                local(survivors).logical_or_(max_over_ranks([(largest(local(survivors)), w)]) == 0)
            state = self._optimizer.state.get(w, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == w.shape and name not in (*OWN, "step"):
                    local(value).masked_fill_(~local(survivors), 0)
            if state:
                state[SURVIVORS] = survivors
            else:
                self._early[w] = survivors

    def thaw(self) -> None:
        """Hold none."""
        for group in self._optimizer.param_groups:
            group.pop(FROZEN, None)
        for state in self._optimizer.state.values():
            state.pop(SURVIVORS, None)
        self._early.clear()

    def silence(self, active: list[TensorBatch]) -> None:
        """Zero the gradient of what is held, which would otherwise go on moving momentum and moments."""
        for terms in (terms for batch in active if FROZEN in batch.group for terms in batch.each):
            for _, w in terms[0].named_parameters:
                if self._survivors(w) is None:  # it was frozen before its first step, and comes from a checkpoint
                    self.freeze(terms)
                survivors = self._survivors(w)
                if survivors is not None and w.grad is not None and not w.grad.is_sparse:
                    local(w.grad).masked_fill_(~local(survivors), 0)

    def hold(self, active: list[TensorBatch]) -> None:
        """Put back what an update has moved all the same."""
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
        """Remember which parameters have been in a step, and put the masks that wait for it into their states."""
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
        """Leave word in the optimizer's state, for a checkpoint, that training has made a parameter zero everywhere."""
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
    """Each parameter of the terms, and where it is not at zero, or at its center."""
    joint, length = terms[0].joint, terms[0].length
    if joint is not None:  # a bias may be zero in a unit that is not
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
    if length is not None:  # under weight_norm a zero weight is one of length 0
        survivors = survivors & (length.detach() != 0)
    yield w, survivors


def all_zero(parameter: Tensor) -> bool:
    """Whether a parameter is zero everywhere, on every rank; reads it back from the device."""
    return bool(max_over_ranks([(largest(local(parameter.detach()).abs()), parameter)]) == 0)


def _center(terms: list[Term]) -> Tensor | None:
    """The point at which the terms of a parameter make zeros; None for the origin."""
    return next((term.center for term in terms if term.linear or term.penalty.coefficients is None), None)
