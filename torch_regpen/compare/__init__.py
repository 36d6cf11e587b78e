"""Train a model with several penalties, and compare them with `weight_decay`: `torch_regpen.compare(...)`.

The name `torch_regpen.compare` is both this module and its function `compare`: the module can be called.
"""

import sys
from inspect import signature
from types import ModuleType
from typing import Any

from .results import Comparison
from .run import compare
from .trials import Difference, Failure, Trial

__all__ = ["Comparison", "Difference", "Failure", "Trial", "compare"]

__signature__ = signature(compare)  # what help() and editors show for the module


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Comparison:
        return compare(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
