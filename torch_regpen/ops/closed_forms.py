"""Which proximal maps are known in closed form."""

from __future__ import annotations

from ..groups.grouping import Elements
from ..groups.singular_values import SingularValues
from .terms import Term


def check_prox(terms: list[Term], per_coordinate: bool = False) -> None:
    """Raise `ValueError` if the prox of the sum of these terms of one tensor is not known in closed form.

    It is known for a single penalty of any kind, and for sums of L1, L2 and elastic nets over elements and over groups
    of one grouping.
    """
    for term in terms:
        if not term.penalty.has_prox():
            raise ValueError(
                f"{type(term.penalty).__name__} has no proximal map in closed form; use it in the loss, or with "
                "mode='coupled' or 'decoupled'"
            )
    names = " + ".join(type(term.penalty).__name__ for term in terms)
    where = f"{names} on parameter {terms[0].name!r}"
    ways_out = "use mode='coupled' or 'decoupled', or one of them in the loss"
    if not all(term.penalty.has_grad() and not term.penalty.positive for term in terms):
        ways_out = "give each its own mode, as in [(L0(model, lam), 'proximal'), (L2(model, lam), 'decoupled')]"
    if any(term.penalty.coefficients is None for term in terms):
        if len(terms) > 1:
            raise ValueError(f"the prox of {where} is not known in closed form; {ways_out}")
        if per_coordinate and not isinstance(terms[0].grouping, Elements):
            raise ValueError(
                f"the prox of {where} over groups is not known if the step differs by coordinate; "
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
                f"the prox of {where} over singular values is not known if the step differs by coordinate; "
                "use metric='euclidean'"
            )
        if elements or any(term.penalty.positive for term in terms):
            raise ValueError(
                f"the prox of {where}, over elements and singular values, is not known in closed form; {ways_out}"
            )
    centers = {id(term.center) for term in terms if term.penalty.coefficients != (0.0, 1.0)}
    positive = any(term.penalty.positive for term in terms)
    if len(centers) > 1 or (positive and grouped and centers != {id(None)}):
        raise ValueError(f"the prox of {where}, around different centers, is not known in closed form; {ways_out}")
