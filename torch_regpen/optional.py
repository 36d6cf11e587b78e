"""Packages that not everybody has installed, imported where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needed"]


@contextmanager
def needed(why: str, extra: str) -> Iterator[None]:
    """Around an import: where it fails, the error says what for, and which extra brings the package."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{why}: pip install "torch_regpen[{extra}]"') from error
