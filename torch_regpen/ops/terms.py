"""Terms: one penalty on one tensor.

A `Term` is `lam * factor * sum_g weights_g * n_g * rho(u_g)`, where `u_g` is the magnitude and `n_g` the size of group
g of the tensor. To sum several terms on a tensor, add their values and gradients. Proximal maps and subdifferentials do
not add up, so the functions that compute them take all terms of a tensor at once.
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
    """The part of `torch_regpen.Penalty` that terms use."""

    compiled: bool
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
    """Groups that span several tensors: group g consists of the slices `indices[i][g]` of each tensor i.

    The groups are the rows of a matrix, which `gather` builds from the tensors and `scatter_` writes back.

    Args:
        parameters: the tensors.
        dims: for each tensor, the dimension along which its slices are taken.
        indices: for each tensor, the indices of its slices, in the shape `(groups, slices per group)`.
        names: the qualified names of the tensors.
    """

    parameters: list[Tensor]
    dims: list[int]
    indices: list[Tensor]
    names: list[str]

    def __post_init__(self) -> None:
        # Terms hold this placeholder (shape and dtype only); each operation gathers the matrix when it needs it.
        sizes = [
            w.numel() // max(w.shape[dim], 1) * index.shape[1]
            for w, dim, index in zip(self.parameters, self.dims, self.indices, strict=True)
        ]
        dtype = functools.reduce(torch.promote_types, [w.dtype for w in self.parameters])
        self.placeholder = torch.empty(len(self.indices[0]), sum(sizes), dtype=dtype, device="meta")
        self._sizes = sizes

    def gather(self, xs: Sequence[Tensor]) -> Tensor:
        """Return a matrix with one row for each group, from tensors `xs` shaped like the parameters; differentiable."""
        rows = [
            x.index_select(dim, index.flatten()).movedim(dim, 0).reshape(len(index), -1)
            for x, dim, index in zip(xs, self.dims, self.indices, strict=True)
        ]
        return torch.cat(rows, dim=1)

    def scatter_(self, xs: Sequence[Tensor], matrix: Tensor) -> None:
        """Write a gathered matrix back into the tensors `xs`."""
        for x, dim, index, slices in self._slices(xs, matrix):
            x.index_copy_(dim, index, slices)

    def add_(self, xs: Sequence[Tensor], matrix: Tensor, alpha: float) -> None:
        """Add `alpha` times a gathered matrix to the tensors `xs`."""
        for x, dim, index, slices in self._slices(xs, matrix):
            x.index_add_(dim, index, slices, alpha=alpha)

    def _slices(self, xs: Sequence[Tensor], matrix: Tensor) -> Iterator[tuple[Tensor, int, Tensor, Tensor]]:
        parts = matrix.split(self._sizes, dim=1)
        for x, dim, index, part in zip(xs, self.dims, self.indices, parts, strict=True):
            slices = part.reshape(index.numel(), *x.movedim(dim, 0).shape[1:]).movedim(0, dim)
            yield x, dim, index.flatten(), slices.to(x.dtype)


@dataclass(slots=True, eq=False)
class Term:
    """One scalar penalty on the groups of one tensor.

    Attributes:
        name: the qualified name of the parameter.
        tensor: the parameter; if `joint` is set, the placeholder of its matrix.
        penalty: defines `rho`, `rho_grad` and `rho_prox`.
        grouping: maps the tensor to magnitudes.
        group: the param_group of the penalty, which holds "lam".
        factor: a factor on lambda.
        weights: non-negative factors on lambda that broadcast to the magnitudes, or None for 1.
        multiplier: a non-negative factor on lambda, a 0-dim tensor that a schedule may change; None for 1.
        center: the penalty is on `tensor - center`; None for 0.
        length: the parameter that holds the lengths under weight_norm, if `tensor` holds the directions; else None.
        joint: the tensors and their slices if the groups span several tensors; else None.
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
    multiplier: Tensor | None = None

    @property
    def lam(self) -> float:
        """Lambda times the term's factor."""
        return float(self.group["lam"] * self.factor)

    @property
    def scaled_lam(self) -> float | Tensor:
        """Lambda times the term's factor, weights and multiplier."""
        lam = self.lam if self.weights is None else self.lam * self.weights
        return lam if self.multiplier is None else self.multiplier.to(self.tensor.device) * lam

    @property
    def elementwise_lam(self) -> float | Tensor:
        """`scaled_lam`, expanded from one number per group to one per element if it differs between groups."""
        if self.weights is not None and isinstance(self.grouping, NormGrouping):
            lam: Any = self.scaled_lam
            return self.grouping.spread(lam, self.tensor)
        return self.scaled_lam

    @property
    def inactive(self) -> bool:
        """Whether lambda is 0, so that the term has no effect."""
        return self.lam == 0 and not self.penalty.positive

    @property
    def linear(self) -> float:
        """`a` in `rho(u) = a*u + b*u^2`; 0 if `rho` has another form."""
        return self.penalty.coefficients[0] if self.penalty.coefficients else 0.0

    @property
    def quadratic(self) -> float:
        """`b` in `rho(u) = a*u + b*u^2`; 0 if `rho` has another form."""
        return self.penalty.coefficients[1] if self.penalty.coefficients else 0.0

    @property
    def grouped(self) -> bool:
        """Whether the prox depends on the groups. That of L2 does not: a sum of squared norms is a sum of squares."""
        return not isinstance(self.grouping, Elements) and (self.penalty.coefficients is None or self.linear > 0)

    @property
    def elementwise(self) -> bool:
        """Whether the term is `lam * sum (a*|w| + b*w^2)` over the elements of a real tensor."""
        return self.penalty.coefficients is not None and self.uniform

    @property
    def uniform(self) -> bool:
        """Whether the term treats all elements of a real tensor alike, so that tensors can be joined into one."""
        return self.center is None and self.uniform_offset

    @property
    def uniform_offset(self) -> bool:
        """Whether the term treats all elements of `tensor - center` alike, for a real tensor."""
        return not self.grouped and self._unweighted

    @property
    def row_length(self) -> int | None:
        """The size of a group if the term treats all rows of a reshaped real tensor alike; None if it does not."""
        if torch.compiler.is_compiling() or not isinstance(self.grouping, NormGrouping):
            return None
        if self.center is not None or not self._unweighted:
            return None
        return self.grouping.row_length(self.tensor.shape)

    @property
    def _unweighted(self) -> bool:
        factors = self.weights is not None or self.multiplier is not None
        return self.penalty.separable and not factors and not self.tensor.is_complex()

    @property
    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The name and the tensor of the parameter, or of each parameter that the groups span."""
        if self.joint is None:
            return [(self.name, self.tensor)]
        return list(zip(self.joint.names, self.joint.parameters, strict=True))

    def offset(self, w: Tensor) -> Tensor:
        """`w - center`, or `w` if there is no center."""
        return w if self.center is None else w - self.center

    def value(self, w: Tensor) -> Tensor:
        """The value of the term at `w`, a 0-dim tensor."""
        return self.penalty.omega(self.offset(w), self.grouping, self.scaled_lam)

    def omega(self) -> Tensor:
        """The value of the term without lambda and multiplier, a 0-dim tensor."""
        factor = self.factor if self.weights is None else self.factor * self.weights
        return self.penalty.omega(self.offset(self.tensor), self.grouping, factor)

    def grad(self, w: Tensor) -> Tensor:
        """The (sub)gradient of the term at `w`; differentiable."""
        x = self.offset(w)
        if self.penalty.coefficients is not None and self.uniform_offset:
            if not self.linear:
                return x * (2 * self.lam * self.quadratic)
            sign = x.sign() * (self.lam * self.linear)
            return sign + x * (2 * self.lam * self.quadratic) if self.quadratic else sign
        return self.penalty.omega_grad(x, self.grouping, self.scaled_lam)


def by_tensor(terms: Iterable[Term]) -> list[list[Term]]:
    """Group the terms by tensor, in the order in which the tensors first occur."""
    found: dict[int, list[Term]] = {}
    for term in terms:
        found.setdefault(id(term.tensor), []).append(term)
    return list(found.values())


def gathered(terms: list[Term]) -> list[Term]:
    """Replace the placeholder of terms whose groups span several tensors by the gathered matrix."""
    joint = terms[0].joint
    if joint is None:
        return terms
    matrix = joint.gather(joint.parameters)
    return [replace(term, tensor=matrix, joint=None) for term in terms]


def coefficients(terms: list[Term]) -> tuple[float, float]:
    """`(a, b)` such that the sum of some elementwise terms on one tensor is `sum (a*|w| + b*w^2)`; lambda included."""
    linear = quadratic = 0.0
    for term in terms:
        lam = term.lam
        linear += lam * term.linear
        quadratic += lam * term.quadratic
    return linear, quadratic


def chunked_terms(terms: list[Term], times: int = 1) -> Iterator[tuple[list[Term], Slicer]]:
    """Split the terms of one tensor into terms on chunks of it that fit into the cache. No group is divided.

    Args:
        terms: terms that are all on the same tensor.
        times: a factor on the usual chunk size.

    Yields:
        The terms on a chunk, and a function that takes the same chunk of another tensor of that shape.
    """
    if not terms:
        return
    w = terms[0].tensor
    for take in slicers(w, separable_dims(terms), times):
        yield (terms if take(w) is w else sliced(terms, take)), take


def sliced(terms: list[Term], take: Slicer) -> list[Term]:
    """The terms of one tensor, restricted to the slice that `take` returns."""
    tensor = take(terms[0].tensor)
    return [replace(t, tensor=tensor, weights=take(t.weights), center=take(t.center)) for t in terms]


def separable_dims(terms: list[Term]) -> list[int]:
    """The dimensions along which the tensor of the terms can be divided without dividing a group."""
    ndim = terms[0].tensor.ndim
    return [dim for dim in range(ndim) if all(term.grouping.separates(dim, ndim) for term in terms)]
