"""What a penalty does to one tensor, and what several penalties do to it together.

A `Term` is `lam * factor * sum_g weights_g * n_g * rho(u_g)` on one tensor, `u_g` the magnitudes of its groups. Value
and gradient of terms add up; their proximal map and the distance to their subdifferential do not, so those take all
terms of a tensor at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import functional as F
from . import multi_tensor
from .groups import Elements, Grouping, NormGrouping, SingularValues, largest, working_dtype
from .sharding import Part, local, on_parts

if TYPE_CHECKING:
    from .penalty import Penalty

NEWTON_STEPS = 16

Take = multi_tensor.Take


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
    """

    name: str
    tensor: Tensor
    kind: Penalty
    grouping: Grouping
    group: dict[str, Any]
    factor: float = 1.0
    weights: Tensor | None = None
    center: Tensor | None = None

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
        if all(term.plain for term in of_tensor):
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


class Step(NamedTuple):
    """What an optimizer does to a parameter for a unit gradient.

    Attributes:
        size: the step: a number, a 0-dim tensor, or a tensor of the parameter's shape.
        cap: the most that one step may shrink an element, where the optimizer normalises its steps; else None.
    """

    size: float | Tensor
    cap: float | Tensor | None = None

    def part(self, take: Take) -> Step:
        """The step of what `take` takes of the parameter."""
        return self._replace(size=take(self.size))


class Sized(Protocol):
    """A `Step`, or what will be one when it is looked at."""

    @property
    def size(self) -> float | Tensor: ...
    @property
    def cap(self) -> float | Tensor | None: ...
    def part(self, take: Take) -> Sized: ...


def one_step(steps: Sequence[Sized]) -> bool:
    """Whether they are the same step, a scalar without a cap."""
    return steps[0].cap is None and _scalar(steps[0].size) and all(step is steps[0] for step in steps)


def prox_(bundle: Bundle, steps: Sequence[Sized]) -> None:
    """The proximal map of the terms of each tensor, in place, with its own step; see `prox`."""
    step = steps[0]
    if bundle.shrinks and one_step(steps):
        linear, quadratic = bundle.coefficients
        if linear:
            multi_tensor.soft_threshold_(bundle.tensors, step.size * linear)
        if quadratic:
            multi_tensor.mul_(bundle.tensors, 1 / (1 + step.size * (2 * quadratic)))
        return
    for terms, step in zip(bundle.each, steps, strict=True):
        terms = [term for term in terms if not term.off]
        if _prox_along_rays_(terms, step):
            continue
        for some, take in pieces(terms):
            part = step.part(take)
            some[0].tensor.copy_(prox(some, part.size, part.cap))


def _prox_along_rays_(terms: list[Term], step: Sized) -> bool:
    """The proximal map of a single term over groups in place, where that takes no copy; whether it does."""
    if len(terms) != 1 or step.cap is not None or not _scalar(step.size):
        return False
    (term,) = terms
    w, grouping = term.tensor, term.grouping
    if not isinstance(grouping, NormGrouping) or term.center is not None or term.kind.positive:
        return False
    if torch.compiler.is_compiling() or local(w) is not w:
        return False
    if not torch._C._is_alias_of(grouping.view(w), w):  # type: ignore[attr-defined]
        return False
    rows = [dim for dim in _separable(terms) if dim == 0]  # along another dimension a norm reads memory in order uncut
    for take in multi_tensor.cuts(w, rows, times=8):
        t = step.size * take(term.scaled_lam)
        grouping.scale_(take(w), partial(term.kind.rho_prox, t=t))
    return True


def decay_(bundle: Bundle, step: float | Tensor) -> None:
    """The decoupled subgradient step of the terms of each tensor, in place; see `decayed`."""
    if bundle.shrinks:
        linear, quadratic = bundle.coefficients
        if quadratic:
            factor = 1 - step * (2 * quadratic)
            multi_tensor.mul_(bundle.tensors, factor.clamp_min(0) if isinstance(factor, Tensor) else max(factor, 0.0))
        if linear:
            multi_tensor.soft_threshold_(bundle.tensors, step * linear)
        return
    for terms in bundle.each:
        for some, _ in pieces([term for term in terms if not term.off]):
            some[0].tensor.copy_(decayed(some, step))


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
    for take in multi_tensor.cuts(w, _separable(terms), times):
        piece = take(w)
        if piece is w:
            yield terms, take
        else:
            yield [replace(t, tensor=piece, weights=take(t.weights), center=take(t.center)) for t in terms], take


def _separable(terms: list[Term]) -> list[int]:
    """The dimensions along which their tensor can be cut between groups."""
    ndim = terms[0].tensor.ndim
    return [dim for dim in range(ndim) if all(term.grouping.separates(dim, ndim) for term in terms)]


def _scalar(x: float | Tensor) -> bool:
    return not isinstance(x, Tensor) or x.ndim == 0


def check_grad(terms: list[Term]) -> None:
    """Raise `ValueError` where a kind has no gradient."""
    for term in terms:
        if not term.kind.has_grad():
            raise ValueError(
                f"{type(term.kind).__name__} has no gradient that could lead anywhere; use mode='proximal' or 'dual'"
            )


def check_prox(terms: list[Term], per_coordinate: bool = False) -> None:
    """Raise `ValueError` where the prox of the sum of these terms of one tensor is not known in closed form.

    Known are: any single kind; and sums of L1, L2 and elastic nets over elements and over groups of one grouping.
    """
    for term in terms:
        if not term.kind.has_prox():
            raise ValueError(
                f"{type(term.kind).__name__} has no proximal map in closed form; use it in the loss, or with "
                "mode='coupled' or 'decoupled'"
            )
    names = " + ".join(type(term.kind).__name__ for term in terms)
    where = f"{names} on parameter {terms[0].name!r}"
    ways_out = "use mode='coupled' or 'decoupled', or one of them in the loss"
    if any(term.kind.coefficients is None for term in terms):
        if len(terms) > 1:
            raise ValueError(f"the prox of {where} is not known in closed form; {ways_out}")
        if per_coordinate and not isinstance(terms[0].grouping, Elements):
            raise ValueError(
                f"the prox of {where} over groups is not known where the step differs by coordinate; "
                "use metric='euclidean'"
            )
        return
    grouped = [term for term in terms if term.grouped]
    elements = [term for term in terms if term.linear and not term.grouped]
    if len({term.grouping for term in grouped}) > 1:
        raise ValueError(f"the prox of {where}, over groups that overlap, is not known in closed form; {ways_out}")
    if any(isinstance(term.grouping, SingularValues) for term in grouped):
        if per_coordinate:
            raise ValueError(
                f"the prox of {where} over singular values is not known where the step differs by coordinate; "
                "use metric='euclidean'"
            )
        if elements or any(term.kind.positive for term in terms):
            raise ValueError(
                f"the prox of {where}, over elements and singular values, is not known in closed form; {ways_out}"
            )
    centers = {id(term.center) for term in terms if term.kind.coefficients != (0.0, 1.0)}
    positive = any(term.kind.positive for term in terms)
    if len(centers) > 1 or (positive and grouped and centers != {id(None)}):
        raise ValueError(f"the prox of {where}, around different centers, is not known in closed form; {ways_out}")


@on_parts
def prox(terms: list[Term], step: float | Tensor, cap: float | Tensor | None = None) -> Tensor:
    """`argmin_v 1/2 sum_i (v_i - w_i)^2 / step_i + (the terms at v)`: the proximal map of all terms of one tensor.

    Args:
        terms: all on one tensor; `check_prox` has passed.
        step: a number, or a tensor of steps that is 0-dim or of the shape of the parameter.
        cap: no element shrinks by more than this, nor the norm of a group by more than this times `sqrt(size)`.
    """
    w = terms[0].tensor
    if len(terms) == 1 and terms[0].kind.coefficients is None:
        term = terms[0]
        t = step * term.scaled_lam
        x = term.offset(w)
        v = limit(x, F.prox(lambda u: term.kind.rho_prox(u, t), x, term.grouping), cap, term.grouping)
        return v if term.center is None else v + term.center
    v = w.to(torch.promote_types(w.dtype, working_dtype(w.dtype)))
    v, step = _prox_quadratic(terms, v, step)
    linear = [term for term in terms if term.linear]
    grouped = [term for term in linear if term.grouped]
    center = linear[0].center if linear else None
    if center is not None:
        v = v - center
    thresholds = [term.scaled_lam * term.linear for term in linear if not term.grouped]
    if thresholds:
        v = F.soft_threshold(v, step * sum(thresholds))
    if center is not None and not grouped:
        v, center = v + center, None
    x = w if center is None else w - center
    if any(term.kind.positive for term in terms):
        x, v = x.clamp_min(0), v.clamp_min(0)
    v = limit(x, v, cap, Elements())
    if grouped:
        v = limit(x, _prox_grouped(grouped, v, step), cap, grouped[0].grouping)
    return v if center is None else v + center


@on_parts
def decayed(terms: list[Term], step: float | Tensor) -> Tensor:
    """`w - step * (subgradient of the terms)`, in which no element (group) crosses zero: it stops there."""
    w = terms[0].tensor
    if len(terms) == 1:
        term = terms[0]
        t = step * term.scaled_lam
        v = F.prox(lambda u: _descend(u, t, term.kind), term.offset(w), term.grouping)
        return v if term.center is None else v + term.center
    v = w - step * sum(term.grad(w) for term in terms)
    if any(term.center is not None for term in terms):
        return v
    crossed = (v.sgn() * w.sgn().conj()).real < 0  # of v * w itself, tiny numbers would lose the sign
    return v.masked_fill(crossed, 0)


def _descend(u: Tensor, t: float | Tensor, kind: Penalty) -> Tensor:
    return (u - t * kind.rho_grad(u).masked_fill(u == 0, 0)).clamp_min(0)


def distance(terms: list[Term], grad: Tensor) -> Tensor:
    """The largest distance of `-grad` to the subdifferential of the terms of one tensor, over coordinates or groups.

    Of a sharded tensor it is the largest on this rank.

    Raises:
        ValueError: it is not known in closed form, for groups that overlap.
    """
    part = Part(terms)
    terms = part.terms
    w = terms[0].tensor
    if grad.is_sparse:
        grad = grad.to_dense()
    wide = torch.promote_types(w.dtype, working_dtype(w.dtype))
    residual = -part.take(grad).to(wide)
    slack: Tensor | float = 0.0  # what the elements that are zero can absorb
    slope: Tensor | float = 0.0  # what the groups that are zero can absorb, for each of their elements
    for term in terms:
        residual = residual - term.grad(w.to(wide))
        if not term.kind.separable:
            continue
        zero = torch.zeros((), dtype=working_dtype(w.dtype), device=w.device)
        lam = term.scaled_lam if term.grouped else term.elementwise_lam
        at_zero = (term.kind.rho_grad(zero) * lam).nan_to_num(0.0, math.inf)  # at lam=0 it absorbs nothing
        if term.grouped:
            slope = slope + at_zero
        else:
            slack = slack + torch.where(term.offset(w) == 0, at_zero, 0)
    if any(term.kind.positive for term in terms):
        residual = torch.where(w == 0, residual.clamp_min(0), residual)
    residual = F.soft_threshold(residual, slack)
    grouped = [term for term in terms if term.grouped]
    if not grouped:
        return largest(residual.abs())
    if len({(term.grouping, id(term.center)) for term in grouped}) > 1:
        raise ValueError(
            f"the distance to the subdifferential of penalties over groups that overlap, on parameter "
            f"{terms[0].name!r}, is not known in closed form"
        )
    grouping: Any = grouped[0].grouping
    farthest: Tensor = grouping.excess(grouped[0].offset(w), residual, slope)
    return farthest


def limit(old: Tensor, new: Tensor, cap: float | Tensor | None, grouping: Any) -> Tensor:
    """`new`, moved back towards `old` where an element moved by more than `cap` or a group by `cap * sqrt(size)`."""
    if cap is None:
        return new
    if isinstance(grouping, Elements) and not new.is_complex():
        old = old.to(new.dtype)
        return new.clamp(old - cap, old + cap)
    if isinstance(grouping, NormGrouping) and not grouping.scale:
        cap = cap * math.sqrt(grouping.size(old.shape))
    u, rebuild = grouping.polar(new - old)
    # What did not move too far is `new` itself: where the norm of a difference of 1e-23 is 0, it would stay `old`.
    return torch.where(grouping.spread(u <= cap, new), new, old + rebuild(u.clamp_max(cap)))


def _prox_quadratic(terms: list[Term], v: Tensor, step: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """The prox of the squares, and the step left for the other terms, whose prox follows it."""
    squares = [(term.elementwise_lam * term.quadratic, term.center) for term in terms if term.quadratic]
    if not squares:
        return v, step
    denominator = 1 + 2 * step * sum(coefficient for coefficient, _ in squares)
    for coefficient, center in squares:
        if center is not None:
            v = v + 2 * step * coefficient * center
    return v / denominator, step / denominator


def _prox_grouped(terms: list[Any], v: Tensor, step: float | Tensor) -> Tensor:
    """Block soft threshold: closed form for one step, a root search for each group where steps differ by coordinate."""
    grouping = terms[0].grouping
    lam = sum(term.scaled_lam * term.linear for term in terms)
    if isinstance(step, Tensor) and step.ndim > 0:
        radius = lam * math.sqrt(grouping.count(v.shape))
        x, s = grouping.view(v), grouping.view(step)
        return _block_soft_threshold(x, s * radius, grouping).reshape(v.shape)
    t = step * lam
    return F.prox(lambda u: (u - t).clamp_min(0), v, grouping)


def _block_soft_threshold(x: Tensor, r: Tensor, grouping: NormGrouping) -> Tensor:
    """`argmin_v 1/2 sum_i (v_i - x_i)^2 / r_i + ||v||` for each group of a view of a tensor.

    `v_i = x_i * theta / (theta + r_i)` where `theta = ||v||` solves `f(theta) = sum_i (x_i / (theta + r_i))^2 = 1`, and
    `v = 0` where `f(0) <= 1`. `1/sqrt(f)` is concave (a power mean of lines), so Newton's method for it climbs to the
    root from any start below it; `||x|| - max r` is one, and so is each `|x_i| - r_i`: from there on no quotient
    exceeds 1.
    """
    tiny = torch.finfo(r.dtype).tiny
    r = r.clamp_min(tiny)
    modulus = x.abs()
    at_zero, norm = grouping.totals((modulus / r).square_(), modulus.square())
    theta = torch.maximum(norm.sqrt() - grouping.largest(r), grouping.largest(modulus - r)).clamp_min(0)
    dead, accuracy = at_zero <= 1, math.sqrt(torch.finfo(r.dtype).eps)
    for _ in range(NEWTON_STEPS):
        inverse = (theta + r).reciprocal_()
        squares = (modulus * inverse).square_()
        f, slope = grouping.totals(squares, inverse.mul_(squares))
        change = (f * (f.sqrt() - 1) / slope).masked_fill_(dead, 0)
        theta = theta + change
        if grouping.all_known(change <= accuracy * theta):  # then the next one would be rounding
            break
    theta = torch.where(dead, 0, theta)
    return x * (theta / (theta + r))
