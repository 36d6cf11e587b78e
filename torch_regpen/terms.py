"""What a penalty does to one tensor, and what several penalties do to it together.

A `Term` is `lam * factor * sum_g weights_g * n_g * rho(u_g)` on one tensor, `u_g` the magnitudes of its groups. Value
and gradient of terms add up; their proximal map and the distance to their subdifferential do not, so those take all
terms of a tensor at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import functional as F
from . import multi_tensor
from .groups import Elements, Grouping, NormGrouping, SingularValues, largest, working_dtype
from .sharding import Part, on_parts

if TYPE_CHECKING:
    from .penalty import Penalty

NEWTON_STEPS = 16


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
        """Whether it is `lam * (a*|w| + b*w^2)`, elementwise, on real numbers: what whole lists of tensors share."""
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


def add_grads_(weighted: Iterable[tuple[Term, float]]) -> None:
    """`grad += alpha * (sub)gradient of Omega`, for each term and its `alpha`: lambda times factor, or its negative."""
    signs: dict[float, list[Tensor]] = {}
    squares: dict[float, list[Tensor]] = {}
    for term, alpha in weighted:
        w = term.tensor
        if not term.plain:
            w.grad.add_(_grad([term]), alpha=math.copysign(1.0, alpha))  # type: ignore[union-attr]
            continue
        if term.linear:
            signs.setdefault(alpha * term.linear, []).append(w)
        if term.quadratic:
            squares.setdefault(2 * (alpha * term.quadratic), []).append(w)
    for alpha, ws in squares.items():
        multi_tensor.add_([w.grad for w in ws], ws, alpha)  # type: ignore[misc]
    for alpha, ws in signs.items():
        multi_tensor.add_sign_([w.grad for w in ws], ws, alpha)  # type: ignore[misc]


@on_parts
def _grad(terms: list[Term]) -> Tensor:
    (term,) = terms
    return term.grad(term.tensor)


Step = tuple[float | Tensor, float | Tensor | None]  # a step and the cap on what it may do, see `prox`


def prox_(work: Iterable[tuple[list[Term], Step]]) -> None:
    """The proximal map of the terms of each tensor, in place; see `prox`."""
    for pool in _pools(work, prox):
        if pool.linear:
            multi_tensor.soft_threshold_(pool.ws, pool.step * pool.linear)
        if pool.quadratic:
            multi_tensor.mul_(pool.ws, 1 / (1 + pool.step * (2 * pool.quadratic)))


def decay_(work: Iterable[tuple[list[Term], Step]]) -> None:
    """The decoupled subgradient step of the terms of each tensor, in place; see `decayed`."""
    for pool in _pools(work, decayed):
        if pool.quadratic:
            factor = 1 - pool.step * (2 * pool.quadratic)
            multi_tensor.mul_(pool.ws, factor.clamp_min(0) if isinstance(factor, Tensor) else max(factor, 0.0))
        if pool.linear:
            multi_tensor.soft_threshold_(pool.ws, pool.step * pool.linear)


@dataclass(slots=True)
class _Pool:
    """Tensors on which the same `linear*|w| + quadratic*w^2` acts with the same step."""

    step: float | Tensor
    linear: float
    quadratic: float
    ws: list[Tensor] = field(default_factory=list)


def _pools(
    work: Iterable[tuple[list[Term], Step]], otherwise: Callable[[list[Term], float | Tensor, Any], Tensor]
) -> Iterable[_Pool]:
    """The tensors that can be done many at a time; `otherwise` does those that cannot, here and now."""
    pools: dict[tuple[Any, float, float], _Pool] = {}
    for terms, (step, cap) in work:
        terms = [term for term in terms if not term.off]
        if not terms:
            continue
        scalar = not isinstance(step, Tensor) or step.ndim == 0
        if scalar and cap is None and all(term.plain and not term.kind.positive for term in terms):
            linear = sum(term.lam * term.linear for term in terms)
            quadratic = sum(term.lam * term.quadratic for term in terms)
            key = (id(step) if isinstance(step, Tensor) else step, linear, quadratic)
            pools.setdefault(key, _Pool(step, linear, quadratic)).ws.append(terms[0].tensor)
        else:
            terms[0].tensor.copy_(otherwise(terms, step, cap))
    return pools.values()


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
    v = limit(w if center is None else w - center, v, cap, Elements())
    if any(term.kind.positive for term in terms):
        v = v.clamp_min(0)
    if grouped:
        v = _prox_grouped(grouped, v, step, cap)
    return v if center is None else v + center


@on_parts
def decayed(terms: list[Term], step: float | Tensor, cap: None = None) -> Tensor:
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
        at_zero = (term.kind.rho_grad(zero) * term.scaled_lam).nan_to_num(0.0, math.inf)  # at lam=0 it absorbs nothing
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


def limit(old: Tensor, new: Tensor, cap: float | Tensor | None, grouping: Grouping) -> Tensor:
    """`new`, moved back towards `old` where an element moved by more than `cap` or a group by `cap * sqrt(size)`."""
    if cap is None:
        return new
    if isinstance(grouping, NormGrouping) and not grouping.scale:
        cap = cap * math.sqrt(grouping.size(old.shape))
    u, rebuild = grouping.polar(new - old)
    return old + rebuild(u.clamp_max(cap))


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


def _prox_grouped(terms: list[Any], v: Tensor, step: float | Tensor, cap: float | Tensor | None) -> Tensor:
    """Block soft threshold: closed form for one step, a root search for each group where steps differ by coordinate."""
    grouping = terms[0].grouping
    lam = sum(term.scaled_lam * term.linear for term in terms)
    if isinstance(step, Tensor) and step.ndim > 0:
        radius = lam * math.sqrt(grouping.count(v.shape))
        x, s = grouping.view(v), grouping.view(step)
        shrunk = _block_soft_threshold(x, s * radius, grouping).reshape(v.shape)
    else:
        t = step * lam
        shrunk = F.prox(lambda u: (u - t).clamp_min(0), v, grouping)
    return limit(v, shrunk, cap, grouping)


def _block_soft_threshold(x: Tensor, r: Tensor, grouping: NormGrouping) -> Tensor:
    """`argmin_v 1/2 sum_i (v_i - x_i)^2 / r_i + ||v||` for each group of a view of a tensor.

    `v_i = x_i * theta / (theta + r_i)` where `theta = ||v||` solves `f(theta) = sum_i (x_i / (theta + r_i))^2 = 1`, and
    `v = 0` where `f(0) <= 1`. `1/sqrt(f)` is concave (a power mean of lines), so Newton's method for it climbs to the
    root from any start below it; `||x|| - max r` is one, and so is each `|x_i| - r_i`: from there on no quotient
    exceeds 1.
    """
    tiny = torch.finfo(r.dtype).tiny
    r = r.clamp_min(tiny)
    at_zero, norm = grouping.totals((x / r).abs().square(), x.abs().square())
    theta = torch.maximum(norm.sqrt() - grouping.largest(r), grouping.largest(x.abs() - r)).clamp_min(0)
    for _ in range(NEWTON_STEPS):
        inverse = 1 / (theta + r)
        squares = (x * inverse).abs().square()
        f, slope = grouping.totals(squares, squares * inverse)
        theta = theta + f * (f.sqrt() - 1) / slope
    theta = torch.where(at_zero <= 1, 0, theta)
    return x * (theta / (theta + r))
