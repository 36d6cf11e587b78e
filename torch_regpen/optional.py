"""Packages that not everybody has installed, imported where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["needed", "with_progress_bar"]


@contextmanager
def needed(why: str, extra: str) -> Iterator[None]:
    """Around an import: where it fails, the error says what for, and which extra brings the package."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{why}: pip install "torch_regpen[{extra}]"') from error


def with_progress_bar(jobs: list[Any], name: str) -> Iterable[Any]:
    """The jobs, with a bar that shows how many are done."""
    with needed("progress=True needs tqdm", "examples"):
        from tqdm import tqdm
    return tqdm(jobs, desc=name)  # type: ignore[no-any-return]
