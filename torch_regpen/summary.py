"""The table of what a penalty holds."""

from __future__ import annotations

import torch

from .groups import Elements
from .terms import Term

__all__ = ["summary_table"]

HEADER = ("parameter", "penalty", "shape", "lam", "value", "zeros", "zero groups")


def summary_table(terms: list[Term]) -> str:
    """A row for each term; the numbers of all rows come from the device at once."""
    counts = []
    for term in terms:
        u, _ = term.grouping.polar(term.tensor)
        numbers = (term.value(term.tensor), (term.tensor == 0).sum(), (u == 0).sum())
        counts.append(torch.stack([number.double() for number in numbers]).to(terms[0].tensor.device))
    rows = [HEADER]
    for term, (value, zeros, zero_groups) in zip(terms, torch.stack(counts).tolist() if counts else [], strict=True):
        elementwise = isinstance(term.grouping, Elements)
        rows.append(
            (
                term.name,
                type(term.kind).__name__,
                str(tuple(term.tensor.shape)),
                f"{term.lam:.4g}",
                f"{value:.6g}",
                f"{zeros:.0f}/{term.tensor.numel()}",
                "-" if elementwise else f"{zero_groups:.0f}",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
