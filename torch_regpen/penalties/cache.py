"""What a penalty has found."""

from __future__ import annotations

import itertools
from operator import attrgetter, eq, is_
from typing import Any

from ..ops.batches import TensorBatch
from ..ops.terms import Term


class TermCache:
    """What a penalty found, while it would find the same: to look takes longer than a step on small tensors."""

    ASKED = attrgetter("requires_grad"), attrgetter("dtype"), attrgetter("device")

    def __init__(self) -> None:
        self.terms: list[Term] = []
        self.batches: list[TensorBatch] = []
        self._cache_key: list[Any] | None = None

    def fill(self, terms: list[Term], cache_key: list[Any], places: list[tuple[dict[str, Any], str]]) -> None:
        """Keep what was found.

        Args:
            terms: what was found.
            cache_key: what that depends on, beside the parameters.
            places: where the parameters are.
        """
        self.terms, self.batches = terms, []
        self._cache_key = cache_key
        self._dicts = [parameters for parameters, _ in places]
        self._keys = [key for _, key in places]
        self._parameters = list(map(dict.get, self._dicts, self._keys))
        self._known = [list(map(get, self._parameters)) for get in self.ASKED]

    def holds(self, cache_key: list[Any]) -> bool:
        """Whether the same parameters are in the same places, and are to be judged as they were."""
        if self._cache_key is None or len(cache_key) != len(self._cache_key):
            return False
        now = list(map(dict.get, self._dicts, self._keys))
        return (
            all(map(is_, cache_key, self._cache_key))
            and all(map(is_, now, self._parameters))
            and all(all(map(eq, map(get, now), known)) for get, known in zip(self.ASKED, self._known, strict=True))
            and not any(map(hasattr, now, itertools.repeat("ds_id")))
        )

    def __reduce__(self) -> Any:
        return TermCache, ()  # a copy of a penalty looks for itself
