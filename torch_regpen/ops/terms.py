"""Terms: what a penalty is on one tensor.

A `Term` is `lam * factor * sum_g weights_g * n_g * rho(u_g)` on one tensor, with `u_g` the magnitudes of its groups.
The values and the gradients of several terms on a tensor add up. Their proximal maps and their subdifferentials do not,
so the functions for those take all terms of a tensor at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..groups.grouping import Elements, Grouping
from ..groups.names import Groups
from ..groups.norms import NormGrouping
from .chunks import Slicer, slicers

__all__ = [
    "Joint",
    "Term",
    "TermPenalty",
    "by_tensor",
    "chunked_terms",
    "coefficients",
    "gathered",
    "separable_dims",
    "sliced",
]


class TermPenalty(Protocol):
    """What a term asks of its penalty; see `torch_regpen.Penalty`."""

    positive: bool
    separable: bool
    groups: Groups | None
    seen: dict[str, bool]

    @property
    def coefficients(self) -> tuple[float, float] | None: ...
    def rho(self, u: Tensor) -> Tensor: ...
    def rho_grad(self, u: Tensor) -> Tensor: ...
    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor: ...
    def omega(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor: ...
    def omega_grad(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor: ...
    def has_grad(self) -> bool: ...
    def has_prox(self) -> bool: ...


@dataclass(eq=False)
class Joint:
    """Groups that span several tensors: group i has the slices `index[i]` of each.

    Args:
        parameters: the tensors.
        dims: the dimension of each along which its slices lie.
        indices: for each tensor the slices of each group: `(groups, slices of this tensor in a group)`.
        names: the qualified names of the tensors.
    """

    parameters: list[Tensor]
    dims: list[int]
    indices: list[Tensor]
    names: list[str]

    def __post_init__(self) -> None:
        # Terms hold this in the place of the matrix, which is gathered when an operation needs it.
        sizes = [
            w.numel() // max(w.shape[dim], 1) * index.shape[1]
            for w, dim, index in zip(self.parameters, self.dims, self.indices, strict=True)
        ]
        dtype = functools.reduce(torch.promote_types, [w.dtype for w in self.parameters])
        self.placeholder = torch.empty(len(self.indices[0]), sum(sizes), dtype=dtype, device="meta")
        self._sizes = sizes

    def gather(self, xs: Sequence[Tensor]) -> Tensor:
        """The matrix of tensors like the parameters: a row for each group; differentiable."""
        rows = [
            x.index_select(dim, index.flatten()).movedim(dim, 0).reshape(len(index), -1)
            for x, dim, index in zip(xs, self.dims, self.indices, strict=True)
        ]
        return torch.cat(rows, dim=1)

    def scatter_(self, xs: Sequence[Tensor], matrix: Tensor) -> None:
        """Write a matrix that was gathered back into the tensors."""
        for x, dim, index, slices in self._slices(xs, matrix):
            x.index_copy_(dim, index, slices)

    def add_(self, xs: Sequence[Tensor], matrix: Tensor, alpha: float) -> None:
        """Add `alpha` times a matrix to the tensors."""
        for x, dim, index, slices in self._slices(xs, matrix):
            x.index_add_(dim, index, slices, alpha=alpha)

    def _slices(self, xs: Sequence[Tensor], matrix: Tensor) -> Iterator[tuple[Tensor, int, Tensor, Tensor]]:
        parts = matrix.split(self._sizes, dim=1)
        for x, dim, index, part in zip(xs, self.dims, self.indices, parts, strict=True):
            slices = part.reshape(index.numel(), *x.movedim(dim, 0).shape[1:]).movedim(0, dim)
            yield x, dim, index.flatten(), slices.to(x.dtype)


@dataclass(slots=True, eq=False)
class Term:
    """One scalar penalty over the groups of one tensor.

    Attributes:
        name: the parameter's qualified name.
        tensor: the parameter.
        penalty: gives `rho`, `rho_grad` and `rho_prox`.
        grouping: maps the tensor to magnitudes.
        group: the param_group of the penalty, which holds `lam`.
        factor: multiplies lambda.
        weights: non-negative factors on lambda that broadcast to the magnitudes, or None for 1.
        center: the point from which the tensor is measured, or None for the origin.
        length: under weight_norm, where the tensor holds the directions: the parameter that holds their lengths.
        joint: where the groups span several tensors, which; `tensor` is then a placeholder of their matrix.
    """

    name: str
    tensor: Tensor
    penalty: TermPenalty
    grouping: Grouping
    group: dict[str, Any]
    factor: float = 1.0
    weights: Tensor | None = None
    center: Tensor | None = None
    length: Tensor | None = None
    joint: Joint | None = None

    @property
    def lam(self) -> float:
        """Lambda times the term's factor."""
        return float(self.group["lam"] * self.factor)

    @property
    def scaled_lam(self) -> float | Tensor:
        """Lambda times the term's factor and weights."""
        return self.lam if self.weights is None else self.lam * self.weights

    @property
    def elementwise_lam(self) -> float | Tensor:
        """`scaled_lam`; where it differs by group, one number for each element."""
        if self.weights is not None and isinstance(self.grouping, NormGrouping):
            return self.grouping.spread(self.lam * self.weights, self.tensor)
        return self.scaled_lam

    @property
    def inactive(self) -> bool:
        """Whether the term does nothing at the present lambda."""
        return self.lam == 0 and not self.penalty.positive

    @property
    def linear(self) -> float:
        """`a` of `rho(u) = a*u + b*u^2`; 0 for other kinds."""
        return self.penalty.coefficients[0] if self.penalty.coefficients else 0.0

    @property
    def quadratic(self) -> float:
        """`b` of `rho(u) = a*u + b*u^2`; 0 for other kinds."""
        return self.penalty.coefficients[1] if self.penalty.coefficients else 0.0

    @property
    def grouped(self) -> bool:
        """Whether the groups matter to the prox. They do not for L2: a sum of squared norms is a sum of squares."""
        return not isinstance(self.grouping, Elements) and (self.penalty.coefficients is None or self.linear > 0)

    @property
    def elementwise(self) -> bool:
        """Whether the term is `lam * (a*|w| + b*w^2)` for each element, on real numbers."""
        return (
            self.penalty.coefficients is not None
            and not self.grouped
            and self.weights is None
            and self.center is None
            and not self.tensor.is_complex()
        )

    @property
    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The parameter, or those that its groups span, by name."""
        if self.joint is None:
            return [(self.name, self.tensor)]
        return list(zip(self.joint.names, self.joint.parameters, strict=True))

    def offset(self, w: Tensor) -> Tensor:
        """`w - center`."""
        return w if self.center is None else w - self.center

    def value(self, w: Tensor) -> Tensor:
        """The value of the term at `w`, a 0-dim tensor."""
        return self.penalty.omega(self.offset(w), self.grouping, self.scaled_lam)

    def grad(self, w: Tensor) -> Tensor:
        """The (sub)gradient of the term at `w`; differentiable."""
        if self.elementwise:
            if not self.linear:
                return w * (2 * self.lam * self.quadratic)
            sign = w.sign() * (self.lam * self.linear)
            return sign + w * (2 * self.lam * self.quadratic) if self.quadratic else sign
        return self.penalty.omega_grad(self.offset(w), self.grouping, self.scaled_lam)


def by_tensor(terms: Iterable[Term]) -> list[list[Term]]:
    """The terms of each tensor, in the order in which the tensors first occur."""
    found: dict[int, list[Term]] = {}
    for term in terms:
        found.setdefault(id(term.tensor), []).append(term)
    return list(found.values())


def gathered(terms: list[Term]) -> list[Term]:
    """The terms of one tensor; of terms whose groups span several, the terms on the matrix of these groups."""
    joint = terms[0].joint
    if joint is None:
        return terms
    matrix = joint.gather(joint.parameters)
    return [replace(term, tensor=matrix, joint=None) for term in terms]


def coefficients(terms: list[Term]) -> tuple[float, float]:
    """`(a, b)` of elementwise terms on one tensor, whose sum is `a*|w| + b*w^2`; lambda included."""
    return sum(term.lam * term.linear for term in terms), sum(term.lam * term.quadratic for term in terms)


def chunked_terms(terms: list[Term], times: int = 1) -> Iterator[tuple[list[Term], Slicer]]:
    """The terms of one tensor on chunks of it that fit the cache, where it can be cut between its groups.

    Args:
        terms: all on one tensor.
        times: how many times larger than usual a chunk may be.

    Yields:
        The terms on a chunk, and what takes the same chunk of a tensor beside it.
    """
    if not terms:
        return
    w = terms[0].tensor
    for take in slicers(w, separable_dims(terms), times):
        yield (terms if take(w) is w else sliced(terms, take)), take


def sliced(terms: list[Term], take: Slicer) -> list[Term]:
    """The terms of one tensor, on the slice of it that `take` takes."""
    tensor = take(terms[0].tensor)
    return [replace(t, tensor=tensor, weights=take(t.weights), center=take(t.center)) for t in terms]


def separable_dims(terms: list[Term]) -> list[int]:
    """The dimensions along which their tensor can be cut between groups."""
    ndim = terms[0].tensor.ndim
    return [dim for dim in range(ndim) if all(term.grouping.separates(dim, ndim) for term in terms)]
