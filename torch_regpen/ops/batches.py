"""Batches of tensors to which a penalty does the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor

from ..distributed.shards import local
from .chunks import batch_indices
from .terms import Term, by_tensor, coefficients

__all__ = ["TensorBatch", "batches"]


@dataclass(slots=True, eq=False)
class TensorBatch:
    """One tensor with all its terms, or several tensors with the same elementwise terms, processed together.

    Attributes:
        each: the terms of each tensor.
        tensors: the tensors.
        group: the param_group of the optimizer that owns them, where an optimizer asks.
        grads: their gradients; empty but in what `with_grads` returns.
    """

    each: list[list[Term]]
    tensors: list[Tensor]
    group: dict[str, Any]
    grads: list[Tensor] = field(default_factory=list)

    @property
    def terms(self) -> list[Term]:
        """The terms of the first tensor. Those of the others differ only in the tensor."""
        return self.each[0]

    @property
    def elementwise(self) -> bool:
        """Whether the sum of the terms is `a*|w| + b*w^2` for each element."""
        return all(term.elementwise for term in self.terms)

    @property
    def coefficients(self) -> tuple[float, float]:
        """`(a, b)`, lambda included."""
        return coefficients(self.terms)

    @property
    def has_fused_prox(self) -> bool:
        """Whether the prox is a soft threshold and a division, which act on whole lists of tensors."""
        return self.elementwise and not any(term.penalty.positive for term in self.terms)

    @property
    def is_soft_threshold(self) -> bool:
        """Whether the prox is a soft threshold and nothing else."""
        return self.has_fused_prox and self.coefficients[1] == 0

    @property
    def is_local(self) -> bool:
        """Whether the value is a sum over elements that are all on this rank."""
        return self.elementwise and local(self.tensors[0]) is self.tensors[0]

    @property
    def inactive(self) -> bool:
        """Whether the terms do nothing at the present lambda."""
        return all(term.inactive for term in self.terms)

    @property
    def normalized(self) -> list[list[Term]]:
        """The terms of each tensor that holds the directions of a weight under weight_norm."""
        return self.each if self.terms[0].length is not None else []

    def subset(self, indices: list[int]) -> TensorBatch:
        """The batch of some of its tensors."""
        if len(indices) == len(self.tensors):
            return self
        return TensorBatch([self.each[i] for i in indices], [self.tensors[i] for i in indices], self.group)

    def with_grads(self) -> TensorBatch | None:
        """The batch of those of its tensors that have a gradient, with the gradients; None if there are none."""
        grads = list(map(attrgetter("grad"), self.tensors))
        if not any(grad is None for grad in grads):
            return TensorBatch(self.each, self.tensors, self.group, grads)
        each = [terms for terms, grad in zip(self.each, grads, strict=True) if grad is not None]
        tensors = [terms[0].tensor for terms in each]
        return TensorBatch(each, tensors, self.group, [grad for grad in grads if grad is not None]) if each else None


def batches(terms: Iterable[Term], owners: dict[int, dict[str, Any]] | None = None) -> list[TensorBatch]:
    """All terms, in as few batches as possible.

    Args:
        terms: on any tensors.
        owners: the param_group that owns each tensor, by the id of the tensor.
    """
    alike: dict[Any, TensorBatch] = {}
    for of_tensor in by_tensor(terms):
        w = of_tensor[0].tensor
        group = owners[id(w)] if owners is not None else {}
        key: Any = id(w)
        if all(term.elementwise and term.length is None for term in of_tensor):
            key = (owners and id(group), *((id(term.penalty), id(term.group), term.factor) for term in of_tensor))
        batch = alike.setdefault(key, TensorBatch([], [], group))
        batch.each.append(of_tensor)
        batch.tensors.append(w)
    return [batch.subset(indices) for batch in alike.values() for indices in batch_indices(batch.tensors)]
