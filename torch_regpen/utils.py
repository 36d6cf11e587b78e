"""Packages that not everybody has installed, imported where they are used."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["format_table", "require", "warn", "with_progress_bar"]

Item = TypeVar("Item")


@contextmanager
def require(why: str, extra: str) -> Iterator[None]:
    """Around an import: where it fails, the error says what for, and which extra brings the package."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{why}: pip install "torch_regpen[{extra}]"') from error


def with_progress_bar(items: Iterable[Item], name: str, total: int, done: int = 0) -> Iterator[Item]:
    """The items, with a bar of those that are done and the time that is left.

    Args:
        items: what is iterated over.
        name: shown beside the bar.
        total: the number of items, with those that were done before.
        done: the number of items that were done before.

    Raises:
        ImportError: tqdm is missing.
    """
    with require("progress=True needs tqdm", "examples"):
        from tqdm import tqdm
    return iter(tqdm(items, desc=name, total=total, initial=done))


def warn(message: str) -> None:
    """Warn (`UserWarning`) at the innermost line outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, the columns below each other."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
