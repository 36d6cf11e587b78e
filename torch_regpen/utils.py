"""Helpers for all modules: optional packages, warnings, progress bars, lists of names and tables."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

__all__ = ["checked_count", "first_names", "format_table", "modes_kept", "require", "warn", "with_progress_bar"]

Item = TypeVar("Item")


@contextmanager
def require(why: str, extra: str) -> Iterator[None]:
    """Wrap the import of an optional package.

    Args:
        why: what the package is needed for.
        extra: the extra of torch_regpen that installs it.

    Raises:
        ImportError: the import failed. The message has `why` and the command that installs the package.

    Example:
        >>> from torch_regpen.utils import require
        >>> with require("reading needs nothing", "examples"):
        ...     import nothing_of_that_name
        Traceback (most recent call last):
        ImportError: reading needs nothing: pip install "torch_regpen[examples]"
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{why}: pip install "torch_regpen[{extra}]"') from error


def with_progress_bar(items: Iterable[Item], name: str, total: int, done: int = 0) -> Iterator[Item]:
    """Iterate over the items, and show a progress bar with the time left.

    Args:
        items: the items.
        name: the label of the bar.
        total: the number of items, including those done before.
        done: the number of items done before, in an earlier run.

    Raises:
        ImportError: tqdm is missing.
    """
    with require("progress=True needs tqdm", "examples"):
        from tqdm import tqdm
    return iter(tqdm(items, desc=name, total=total, initial=done))


def checked_count(name: str, value: int) -> int:
    """Return `value`, or raise `ValueError` if it is not a whole number of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more, not {value!r}")
    return value


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of each module at the end."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def warn(message: str) -> None:
    """Issue a `UserWarning` that points to the innermost line outside this package, which is the user's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_internal(module: str) -> bool:
    """Whether a module belongs to this package, or holds torch's decorators, such as no_grad."""
    return module.split(".")[0] == __package__ or module == "torch.utils._contextlib"


def first_names(names: Iterable[str], most: int = 4, separator: str = ", ") -> str:
    """Join the first names, and count the others, so that a message about a large model stays short.

    Args:
        names: the names.
        most: the number of names to show.
        separator: the text between two names.

    Example:
        >>> from torch_regpen.utils import first_names
        >>> first_names(["0.weight", "2.weight", "4.weight"], most=2)
        '0.weight, 2.weight and 1 other'
    """
    names = list(names)
    others = len(names) - most
    shown = separator.join(names[:most])
    return shown if others < 1 else f"{shown} and {others} other{'s' * (others > 1)}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as lines of text with aligned columns.

    Example:
        >>> from torch_regpen.utils import format_table
        >>> print(format_table([["name", "zeros"], ["weight", "3"]]))
        name    zeros
        weight  3
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
