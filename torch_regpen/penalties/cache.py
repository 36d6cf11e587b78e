"""A cache for the terms of a penalty."""

from __future__ import annotations

import itertools
from operator import attrgetter, is_
from typing import Any

from ..ops.batches import TensorBatch
from ..ops.terms import Term

__all__ = ["TermCache"]


class TermCache:
    """Cached terms, valid while the parameters and the settings behind them are unchanged.

    Finding the terms takes longer than a step on small tensors; checking the cache takes a few microseconds.
    """

    WATCHED = attrgetter("requires_grad", "dtype", "device", "shape")

    def __init__(self) -> None:
        self.terms: list[Term] = []
        self.batches: list[TensorBatch] = []
        self._key: list[Any] | None = None

    def fill(self, terms: list[Term], key: list[Any], locations: list[tuple[dict[str, Any], str]]) -> None:
        """Store terms.

        Args:
            terms: the terms.
            key: the settings on which the terms depend; they are compared by identity.
            locations: for each parameter, the dict that holds it and its key in this dict.
        """
        self.terms, self.batches = terms, []
        self._key = key
        self._dicts = [parameters for parameters, _ in locations]
        self._names = [name for _, name in locations]
        self._parameters = list(map(dict.get, self._dicts, self._names))
        self._known = list(map(self.WATCHED, self._parameters))

    def is_valid(self, key: list[Any]) -> bool:
        """Whether the settings, the parameters and their `WATCHED` attributes are unchanged."""
        if self._key is None or len(key) != len(self._key):
            return False
        now = list(map(dict.get, self._dicts, self._names))
        return (
            all(map(is_, key, self._key))
            and all(map(is_, now, self._parameters))
            and list(map(self.WATCHED, now)) == self._known
            and not any(map(hasattr, now, itertools.repeat("ds_id")))  # flattened by DeepSpeed
        )

    def __reduce__(self) -> Any:
        return TermCache, ()  # a copy of a penalty starts with an empty cache
