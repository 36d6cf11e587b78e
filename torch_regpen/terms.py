"""What a penalty does to one tensor, and the bundles of tensors to which it does the same.

A `Term` is `lam * factor * sum_g weights_g * n_g * rho(u_g)` on one tensor, `u_g` the magnitudes of its groups. Value
and gradient of terms add up, here; their proximal map (`prox`) and the distance to their subdifferential
(`stationarity`) do not, so those take all terms of a tensor at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import multi_tensor
from .groups import Elements, Grouping, NormGrouping
from .multi_tensor import Take
from .sharding import local, on_parts

if TYPE_CHECKING:
    from .penalty import Penalty


@dataclass(slots=True, eq=False)
class Term:
    """One scalar function over the groups of one tensor.

    Attributes:
        name: the parameter's qualified name.
        tensor: the parameter.
        kind: knows `rho`, `rho_grad` and `rho_prox`.
        grouping: takes the tensor apart into magnitudes.
        group: the param_group of the penalty, which holds `lam`.
        factor: multiplies lambda.
        weights: non-negative factors on lambda that broadcast to the magnitudes, or None for 1.
        center: the point from which the tensor is measured, or None for the origin.
        length: where weight_norm takes a weight apart, and the tensor is the directions: the parameter of the lengths.
    """

    name: str
    tensor: Tensor
    kind: Penalty
    grouping: Grouping
    group: dict[str, Any]
    factor: float = 1.0
    weights: Tensor | None = None
    center: Tensor | None = None
    length: Tensor | None = None

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
        """`scaled_lam`, one for each element where it differs by group."""
        if self.weights is not None and isinstance(self.grouping, NormGrouping):
            return self.grouping.spread(self.lam * self.weights, self.tensor)
        return self.scaled_lam

    @property
    def off(self) -> bool:
        """Whether the term does nothing at the present lambda."""
        return self.lam == 0 and not self.kind.positive

    @property
    def linear(self) -> float:
        """`a` of `rho(u) = a*u + b*u^2`, 0 for other kinds."""
        return self.kind.coefficients[0] if self.kind.coefficients else 0.0

    @property
    def quadratic(self) -> float:
        """`b` of `rho(u) = a*u + b*u^2`, 0 for other kinds."""
        return self.kind.coefficients[1] if self.kind.coefficients else 0.0

    @property
    def grouped(self) -> bool:
        """Whether its groups matter to a prox; a sum of squared norms is a sum of squares, whatever the groups."""
        return not isinstance(self.grouping, Elements) and (self.kind.coefficients is None or self.linear > 0)

    @property
    def plain(self) -> bool:
        """Whether it is `lam * (a*|w| + b*w^2)`, elementwise, on real numbers."""
        return (
            self.kind.coefficients is not None
            and not self.grouped
            and self.weights is None
            and self.center is None
            and not self.tensor.is_complex()
        )

    def offset(self, w: Tensor) -> Tensor:
        """`w - center`."""
        return w if self.center is None else w - self.center

    def value(self, w: Tensor) -> Tensor:
        """The term at `w`, a 0-dim tensor."""
        return self.kind.omega(self.offset(w), self.grouping, self.scaled_lam)

    def grad(self, w: Tensor) -> Tensor:
        """The (sub)gradient of the term at `w`, differentiable."""
        if self.plain:
            if not self.linear:
                return w * (2 * self.lam * self.quadratic)
            sign = w.sign() * (self.lam * self.linear)
            return sign + w * (2 * self.lam * self.quadratic) if self.quadratic else sign
        return self.kind.omega_grad(self.offset(w), self.grouping, self.scaled_lam)


def by_tensor(terms: Iterable[Term]) -> list[list[Term]]:
    """The terms of each tensor, in the order in which the tensors first occur."""
    found: dict[int, list[Term]] = {}
    for term in terms:
        found.setdefault(id(term.tensor), []).append(term)
    return list(found.values())


def coefficients(terms: list[Term]) -> tuple[float, float]:
    """`linear` and `quadratic` of plain terms of one tensor: together they are `linear*|w| + quadratic*w^2`."""
    return sum(term.lam * term.linear for term in terms), sum(term.lam * term.quadratic for term in terms)


@dataclass(slots=True, eq=False)
class Bundle:
    """What an operation takes at once: a tensor and all terms on it; or a pack of tensors with the same plain terms.

    Attributes:
        each: the terms of each tensor.
        tensors: the tensors.
        group: the param_group of the optimizer that owns them, where an optimizer asks.
        grads: their gradients, in what `with_grads` returns.
    """

    each: list[list[Term]]
    tensors: list[Tensor]
    group: dict[str, Any]
    grads: list[Tensor] = field(default_factory=list)

    @property
    def terms(self) -> list[Term]:
        """The terms of the first tensor; those of the others differ in the tensor only."""
        return self.each[0]

    @property
    def plain(self) -> bool:
        """Whether the terms are `linear*|w| + quadratic*w^2` together."""
        return all(term.plain for term in self.terms)

    @property
    def coefficients(self) -> tuple[float, float]:
        """`linear` and `quadratic`."""
        return coefficients(self.terms)

    @property
    def shrinks(self) -> bool:
        """Whether its prox is a soft threshold, and division: what whole lists of tensors share."""
        return self.plain and not any(term.kind.positive for term in self.terms)

    @property
    def only_thresholds(self) -> bool:
        """Whether its prox is a soft threshold and nothing else."""
        return self.shrinks and self.coefficients[1] == 0

    @property
    def sums_here(self) -> bool:
        """Whether its value is a sum over elements that are all on this rank."""
        return self.plain and local(self.tensors[0]) is self.tensors[0]

    @property
    def off(self) -> bool:
        """Whether the terms do nothing at the present lambda."""
        return all(term.off for term in self.terms)

    @property
    def normalized(self) -> list[list[Term]]:
        """The terms of those tensors that are the directions of weights under weight_norm; these are never packed."""
        return self.each if self.terms[0].length is not None else []

    def part(self, indices: list[int]) -> Bundle:
        """Those of its tensors."""
        if len(indices) == len(self.tensors):
            return self
        return Bundle([self.each[i] for i in indices], [self.tensors[i] for i in indices], self.group)

    def with_grads(self) -> Bundle | None:
        """Those of its tensors that have a gradient, and the gradients; None if there are none."""
        grads = list(map(attrgetter("grad"), self.tensors))
        if not any(grad is None for grad in grads):
            return Bundle(self.each, self.tensors, self.group, grads)
        each = [terms for terms, grad in zip(self.each, grads, strict=True) if grad is not None]
        tensors = [terms[0].tensor for terms in each]
        return Bundle(each, tensors, self.group, [grad for grad in grads if grad is not None]) if each else None


def bundles(terms: Iterable[Term], owners: dict[int, dict[str, Any]] | None = None) -> list[Bundle]:
    """The terms by tensor, in as few bundles as can be.

    Args:
        terms: of any tensors.
        owners: the param_group that owns each tensor, by the tensor's id.
    """
    alike: dict[Any, Bundle] = {}
    for of_tensor in by_tensor(terms):
        w = of_tensor[0].tensor
        group = owners[id(w)] if owners is not None else {}
        key: Any = id(w)
        if all(term.plain and term.length is None for term in of_tensor):
            key = (owners and id(group), *((id(term.kind), id(term.group), term.factor) for term in of_tensor))
        bundle = alike.setdefault(key, Bundle([], [], group))
        bundle.each.append(of_tensor)
        bundle.tensors.append(w)
    return [bundle.part(indices) for bundle in alike.values() for indices in multi_tensor.packs(bundle.tensors)]


def add_grad_(bundle: Bundle, *, ascend: bool = False) -> None:
    """`grad += (sub)gradient` on each tensor, `-=` to `ascend`."""
    if bundle.off:
        return
    sign = -1 if ascend else 1
    if bundle.plain:
        linear, quadratic = bundle.coefficients
        multi_tensor.add_(bundle.grads, bundle.tensors, sign * linear, sign * quadratic)
    else:
        bundle.grads[0].add_(_grad([term for term in bundle.terms if not term.off]), alpha=sign)


def add_grad_and_value_(bundle: Bundle) -> Tensor:
    """`add_grad_` where `sums_here`, and the value from the same pass."""
    return multi_tensor.add_with_total_(bundle.grads, bundle.tensors, *bundle.coefficients)


@on_parts
def _grad(terms: list[Term]) -> Tensor:
    first, *rest = (term.grad(term.tensor) for term in terms)
    return sum(rest, start=first)


def pieces(terms: list[Term], times: int = 1) -> Iterator[tuple[list[Term], Take]]:
    """The terms of one tensor, on pieces of it that fit the cache, where it can be cut between their groups.

    Args:
        terms: all on one tensor.
        times: how much larger than usual the pieces may be.

    Yields:
        The terms on a piece, and what takes the same piece of anything beside the tensor.
    """
    if not terms:
        return
    w = terms[0].tensor
    for take in multi_tensor.cuts(w, separable(terms), times):
        piece = take(w)
        yield (terms if piece is w else taken(terms, take)), take


def taken(terms: list[Term], take: Take) -> list[Term]:
    """The terms of one tensor on what `take` takes of it."""
    tensor = take(terms[0].tensor)
    return [replace(t, tensor=tensor, weights=take(t.weights), center=take(t.center)) for t in terms]


def separable(terms: list[Term]) -> list[int]:
    """The dimensions along which their tensor can be cut between groups."""
    ndim = terms[0].tensor.ndim
    return [dim for dim in range(ndim) if all(term.grouping.separates(dim, ndim) for term in terms)]


def check_grad(terms: list[Term]) -> None:
    """Raise `ValueError` where a kind has no gradient."""
    for term in terms:
        if not term.kind.has_grad():
            raise ValueError(
                f"{type(term.kind).__name__} has no gradient that could lead anywhere; use mode='proximal' or 'dual'"
            )
        if term.kind.positive:
            raise ValueError(
                f"{type(term.kind).__name__}(positive=True) keeps weights from becoming negative by its prox, which a "
                "gradient cannot do; use mode='proximal' or 'dual'"
            )
