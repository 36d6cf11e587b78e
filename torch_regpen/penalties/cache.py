"""The terms that a penalty has found, for as long as it would find the same."""

from __future__ import annotations

import itertools
from operator import attrgetter, eq, is_
from typing import Any

from ..ops.batches import TensorBatch
from ..ops.terms import Term

__all__ = ["TermCache"]


class TermCache:
    """Cached terms, valid while the parameters and the settings behind them are unchanged.

    Finding the terms takes longer than a step on small tensors. To check that they are still valid takes a few
    microseconds.
    """

    WATCHED = attrgetter("requires_grad"), attrgetter("dtype"), attrgetter("device")

    def __init__(self) -> None:
        self.terms: list[Term] = []
        self.batches: list[TensorBatch] = []
        self._key: list[Any] | None = None

    def fill(self, terms: list[Term], key: list[Any], locations: list[tuple[dict[str, Any], str]]) -> None:
        """Store terms.

        Args:
            terms: what was found.
            key: the settings that the terms depend on; they are compared by identity.
            locations: the dict and the key in it under which each parameter is found.
        """
        self.terms, self.batches = terms, []
        self._key = key
        self._dicts = [parameters for parameters, _ in locations]
        self._names = [name for _, name in locations]
        self._parameters = list(map(dict.get, self._dicts, self._names))
        self._known = [list(map(get, self._parameters)) for get in self.WATCHED]

    def is_valid(self, key: list[Any]) -> bool:
        """Whether the settings, the parameters and what was watched of them are unchanged."""
        if self._key is None or len(key) != len(self._key):
            return False
        now = list(map(dict.get, self._dicts, self._names))
        return (
            all(map(is_, key, self._key))
            and all(map(is_, now, self._parameters))
            and all(all(map(eq, map(get, now), known)) for get, known in zip(self.WATCHED, self._known, strict=True))
            and not any(map(hasattr, now, itertools.repeat("ds_id")))  # DeepSpeed has flattened it
        )

    def __reduce__(self) -> Any:
        return TermCache, ()  # a copy of a penalty finds its terms itself
