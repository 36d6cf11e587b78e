"""The table that `Penalty.summary` returns."""

from __future__ import annotations

import math

import torch

from ..groups.grouping import Elements
from ..ops.sharded import ShardedTerms
from ..ops.terms import Term, gathered
from ..ops.zero_groups import zero_groups
from ..utils import format_table

__all__ = ["summary_table"]

HEADER = ("parameter", "penalty", "shape", "lam", "value", "zeros", "zero groups")


def summary_table(terms: list[Term]) -> str:
    """Return a table with a row for each term and a row of totals. All numbers are read from the device at once."""
    counts: list[torch.Tensor] = []
    sizes: list[int] = []
    for term in terms:
        (whole,) = ShardedTerms(gathered([term]), whole=True).terms
        offset = whole.offset(whole.tensor)
        zero = zero_groups(offset, whole.grouping)
        factor = offset.new_ones(()).real if term.multiplier is None else term.multiplier
        numbers = [whole.value(whole.tensor), (offset == 0).sum(), zero.sum(), factor]
        counts.append(
            torch.stack([number.double() for number in numbers]).to(counts[0].device if counts else whole.tensor.device)
        )
        sizes.append(0 if isinstance(term.grouping, Elements) else zero.numel())
    unknown = [[math.nan] * 4] * len(counts)  # on the meta device
    found = unknown if not counts or counts[0].is_meta else torch.stack(counts).tolist()
    rows = [HEADER]
    for term, (value, zeros, groups, factor), size in zip(terms, found, sizes, strict=True):
        rows.append(
            (
                term.name,
                type(term.penalty).__name__,
                str(tuple(term.tensor.shape)),
                f"{term.lam if term.multiplier is None else term.lam * factor:.4g}",
                f"{value:.6g}",
                f"{zeros:.0f}/{term.tensor.numel()}",
                f"{groups:.0f}/{size}" if size else "-",
            )
        )
    elements = {id(term.tensor): (row[1], term.tensor.numel()) for term, row in zip(terms, found, strict=True)}
    zeros, count = (sum(column) for column in zip(*elements.values(), strict=True)) if elements else (0, 0)
    groups = sum(row[2] for row, size in zip(found, sizes, strict=True) if size)
    value = sum(row[0] for row in found)
    total = f"{groups:.0f}/{sum(sizes)}" if any(sizes) else "-"
    rows.append(("total", "", "", "", f"{value:.6g}", f"{zeros:.0f}/{count}", total))
    return format_table(rows)
