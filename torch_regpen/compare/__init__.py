"""Penalties and weight_decay side by side on a model of yours: `torch_regpen.compare(...)`.

The name `torch_regpen.compare` is this module and the function `compare` in it: the module can be called.
"""

import sys
from types import ModuleType
from typing import Any

from .results import Comparison, Difference, Trial
from .run import compare

__all__ = ["Comparison", "Difference", "Trial", "compare"]


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Comparison:
        return compare(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
