"""Batches of tensors that are processed together because they have the same terms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import local
from ..groups.grouping import working_dtype
from ..groups.layouts import Slices
from . import compiled, foreach
from .chunks import batch_indices, joined, spread_scalars
from .step import Step, adaptive, same_number
from .terms import Joint, Term, by_tensor, coefficients, gathered

__all__ = ["JointBatch", "TensorBatch", "as_one_tensor", "batches"]

GRAD = attrgetter("grad")


@dataclass(eq=False)
class TensorBatch:
    """One tensor with all its terms, or several tensors that can be joined since they have the same terms.

    Attributes:
        each: the terms of each tensor.
        tensors: the tensors.
        group: the param_group of the optimizer that owns the tensors; empty outside an optimizer.
        compiled: whether operations go through torch.compile where they can.
        row_length: the size of a group, if the joined tensors are a matrix with a group in each row; None if they are a
            flat tensor.
    """

    each: list[list[Term]]
    tensors: list[Tensor]
    group: dict[str, Any]
    compiled: bool = field(default=False, kw_only=True)
    row_length: int | None = field(default=None, kw_only=True)

    @property
    def terms(self) -> list[Term]:
        """The terms of the first tensor. The terms of the other tensors differ from these only in the tensor."""
        return self.each[0]

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of the tensors. Each tensor must have one."""
        return list(map(GRAD, self.tensors))

    @property
    def elementwise(self) -> bool:
        """Whether the sum of the terms on each tensor is `sum (a*|w| + b*w^2)`."""
        return all(term.elementwise for term in self.terms)

    @property
    def coefficients(self) -> tuple[float, float]:
        """`(a, b)` in `sum (a*|w| + b*w^2)`, lambda included."""
        return coefficients(self.terms)

    @property
    def has_fused_prox(self) -> bool:
        """Whether the prox is a soft threshold and a division, which have fused operations on lists of tensors."""
        return self.elementwise and not any(term.penalty.positive for term in self.terms)

    @property
    def is_soft_threshold(self) -> bool:
        """Whether the prox is a soft threshold and nothing else."""
        return self.has_fused_prox and self.coefficients[1] == 0

    @property
    def is_local(self) -> bool:
        """Whether the value is a sum over elements and all elements are on this rank."""
        return self.elementwise and local(self.tensors[0]) is self.tensors[0]

    @property
    def operations(self) -> ModuleType:
        """The module with the operations on the tensors: `compiled`, or `foreach`, which has the same functions."""
        return compiled if self.compiled else foreach

    @property
    def inactive(self) -> bool:
        """Whether all terms are inactive at the current lambda."""
        return all(term.inactive for term in self.terms)

    @property
    def normalized(self) -> list[list[Term]]:
        """The terms of each tensor that holds directions under weight_norm."""
        return self.each if self.terms[0].length is not None else []

    def subset(self, indices: list[int]) -> TensorBatch:
        """The batch of the tensors at some indices."""
        if len(indices) == len(self.tensors):
            return self
        return replace(self, each=[self.each[i] for i in indices], tensors=[self.tensors[i] for i in indices])

    def joined(self) -> TensorBatch:
        """The batch of a single tensor, a copy of the tensors."""
        w = self.join(self.tensors)
        terms = [replace(term, tensor=w) for term in self.terms]
        if self.row_length is not None:
            terms = [replace(t, grouping=Slices(0, scale=t.grouping.scale)) if t.grouped else t for t in terms]  # type: ignore[attr-defined]
        return TensorBatch([terms], [w], self.group, compiled=self.compiled)

    def join(self, xs: Sequence[Tensor]) -> Tensor:
        """Copy tensors shaped like those of the batch into a flat tensor, or into a matrix with a group in each row."""
        flat = joined(xs)
        return flat if self.row_length is None else flat.view(-1, self.row_length)

    def repeat(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """Repeat one number per tensor for each element of the flat tensor, or for each row of the matrix.

        Args:
            xs: each has one number per tensor, or is 0-dim and returned unchanged.
        """
        if self.row_length is None:
            return spread_scalars(self.tensors, *xs)
        rows = [w.new_empty(w.numel() // self.row_length) for w in self.tensors]  # only their shapes matter
        return tuple(x[:, None] if x.ndim else x for x in spread_scalars(rows, *xs))

    def with_grads(self) -> TensorBatch | None:
        """The batch of the tensors that have a gradient; None if no tensor has one."""
        having = [i for i, grad in enumerate(map(GRAD, self.tensors)) if grad is not None]
        return self.subset(having) if having else None


@dataclass(eq=False)
class JointBatch(TensorBatch):
    """Several tensors with groups that span them (see `Joint`).

    An operation works on `matrix()` as on a single tensor, then calls `scatter_` to write the result back.

    Attributes:
        joint: the slices of the tensors that form the groups.
        owners: for each tensor, the param_group of the optimizer that owns it; empty dicts outside an optimizer.
    """

    joint: Joint = field(kw_only=True)
    owners: list[dict[str, Any]] = field(kw_only=True)

    def with_grads(self) -> JointBatch | None:
        """The batch itself; None unless all tensors have a gradient."""
        return None if any(grad is None for grad in map(GRAD, self.tensors)) else self

    def matrix(self) -> TensorBatch:
        """The batch of the gathered matrix, a copy of the weights; differentiable."""
        terms = gathered(self.terms)
        return TensorBatch([terms], [terms[0].tensor], self.group, compiled=self.compiled)

    def scatter_(self, matrix: Tensor) -> None:
        """Write the matrix back into the tensors."""
        self.joint.scatter_(self.tensors, matrix)

    def step(self, steps: Sequence[Step]) -> Step:
        """Combine the steps of the tensors into the step of the matrix.

        Raises:
            ValueError: the steps differ between tensors, and the penalty has no prox for different steps.
        """
        first = steps[0]
        changes = [step.max_change for step in steps if step.max_change is not None]
        max_change = None if not changes else _largest(changes)
        if not any(step.by_element for step in steps):
            if all(same_number(step.numerator, first.numerator) for step in steps):
                return first
            if any(term.penalty.coefficients is None for term in self.terms):
                raise ValueError(
                    f"the tensors of the units of {self.terms[0].name!r} have different learning rates; the prox of "
                    f"{type(self.terms[0].penalty).__name__} over groups has no closed form if steps differ by "
                    "coordinate; use the same learning rate for them: a number, or the same tensor"
                )
        unseen = None
        if any(step.unseen is not None for step in steps):
            masks = [
                torch.zeros_like(w, dtype=torch.bool) if step.unseen is None else step.unseen
                for step, w in zip(steps, self.tensors, strict=True)
            ]
            unseen = self.joint.gather(masks)
        return Step(self.spread([step.size for step in steps]), max_change, unseen)

    def spread(self, sizes: Sequence[float | Tensor]) -> Tensor:
        """Gather one size for each tensor (a number, a 0-dim tensor, or a tensor of its shape) into a matrix."""
        return self.joint.gather([_expanded(size, w) for size, w in zip(sizes, self.tensors, strict=True)])


def batches(
    terms: Iterable[Term], owners: dict[int, dict[str, Any]] | None = None, *, compiled: bool = False
) -> list[TensorBatch]:
    """Divide terms into as few batches as possible.

    Args:
        terms: terms on any tensors.
        owners: a dict from the id of each tensor to the param_group of the optimizer that owns it.
        compiled: see `TensorBatch`; the terms of compiled penalties are compiled in any case.
    """
    alike: dict[Any, TensorBatch] = {}
    for of_tensor in by_tensor(terms):
        w, joint = of_tensor[0].tensor, of_tensor[0].joint
        kernels = compiled or any(term.penalty.compiled for term in of_tensor)
        if joint is not None:
            groups = [owners[id(parameter)] if owners is not None else {} for parameter in joint.parameters]
            alike[id(w)] = JointBatch(
                [of_tensor], joint.parameters, groups[0], joint=joint, owners=groups, compiled=kernels
            )
            continue
        group = owners[id(w)] if owners is not None else {}
        lengths = {term.row_length for term in of_tensor if not term.uniform}
        row_length = next(iter(lengths), None)
        key: Any = id(w)
        if lengths <= {row_length} - {None} and all(term.length is None for term in of_tensor):
            same = ((id(term.penalty), id(term.group), term.factor) for term in of_tensor)
            key = (owners and id(group), row_length, *same)
        batch = alike.setdefault(key, TensorBatch([], [], group, compiled=kernels, row_length=row_length))
        batch.each.append(of_tensor)
        batch.tensors.append(w)
    found: list[TensorBatch] = []
    for batch in alike.values():
        if isinstance(batch, JointBatch):
            found.append(batch)
        else:
            grouped = batch.row_length is not None
            found += [batch.subset(indices) for indices in batch_indices(batch.tensors, grouped)]
    return found


def _expanded(size: float | Tensor, w: Tensor) -> Tensor:
    real = working_dtype(w.dtype)
    if isinstance(size, Tensor) and size.ndim:
        return size
    return torch.zeros_like(w, dtype=real) + size


def _largest(changes: list[float | Tensor]) -> float | Tensor:
    like = next((change for change in changes if isinstance(change, Tensor)), None)
    if like is None:
        return max(changes)
    return torch.stack([torch.as_tensor(change, dtype=like.dtype, device=like.device) for change in changes]).amax()


def as_one_tensor(batch: TensorBatch, steps: Sequence[Step]) -> tuple[TensorBatch, list[Step]]:
    """Copy a batch of several tensors into a batch of one tensor, with its step; return other batches unchanged."""
    if isinstance(batch, JointBatch):
        return batch.matrix(), [batch.step(steps)]
    single = len(batch.tensors) == 1 or local(batch.tensors[0]) is not batch.tensors[0]
    step = None if single else _joined_step(batch, steps)
    return (batch, list(steps)) if step is None else (batch.joined(), [step])


def _joined_step(batch: TensorBatch, steps: Sequence[Step]) -> Step | None:
    """The step of the joined tensors; None for groups if each tensor has a number of its own as its step."""
    if not any(step.by_element for step in steps):
        if all(step is steps[0] for step in steps):
            return steps[0]
        if batch.row_length is not None:
            return None
    if (fused := adaptive(steps)) is not None:
        moments, numerators, eps, max_change = fused
        numerators, eps = batch.repeat(numerators, eps)
        return Step(numerators, max_change, moment=batch.join(moments), eps=eps)
    sizes = [_expanded(step.size, w) for step, w in zip(steps, batch.tensors, strict=True)]
    unseen = [step.unseen for step in steps if step.unseen is not None]
    most: list[Any] = [step.max_change for step in steps]
    max_change = most[0]
    if not all(same_number(x, max_change) for x in most):
        (max_change,) = batch.repeat(torch.stack(most))
    return Step(batch.join(sizes), max_change, batch.join(unseen) if len(unseen) == len(steps) else None)
