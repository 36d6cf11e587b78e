"""The rules that `select` and `exclude` describe."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .lookup import ParameterRef, spellings
from .units import MULTIPLYING, is_attention_projection, transformers_conv1d

Form = str | type[nn.Module] | Callable[[str, Tensor], bool]


Select = Form | list[Any] | tuple[Any, ...]


Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


WORDS = ("weights", "all", "attention")


ALLOWED = (
    "'weights', 'all', a glob on parameter names, a module type, a callable (name, parameter) -> bool, or a list or "
    "tuple of these"
)


NORM = re.compile(r"norm(?!al(?!iz))", re.IGNORECASE)  # in class names: RMSNorm, LayerNorm2d, not NormalHead


BIAS = re.compile(r"(^|_)bias(es)?(_|\d|$)")


TOKEN = re.compile(r"(^|_)tokens?(_|\d|$)")


POSITION = re.compile(r"(^|_)(pos|position|positional)(_?(emb|embed|embedding|enc|encoding)s?)?(_|$)")


def is_weight(ref: ParameterRef, key: str, tensor: Tensor) -> bool:
    """Whether a parameter is a weight that is usually decayed: not a bias, norm or layer scale, or raw embedding.

    Args:
        ref: the location of the parameter.
        key: its name in its module, or in the parametrization of its module.
        tensor: the parameter.
    """
    if ref.undecayed or getattr(tensor, "_no_weight_decay", False) or BIAS.search(ref.key):
        return False
    owner = ref.owner
    if isinstance(owner, nn.Embedding) and len(ref.ancestors) > 1 and _says_norm(ref.ancestors[-2], ""):
        return False  # the scales of a conditional norm, one row per class
    if isinstance(owner, MULTIPLYING + transformers_conv1d()) and "weight" in ref.key:
        if ref.under_weight_norm():  # weight_norm: penalize the directions, not the lengths
            return key == "original1" or ref.key.endswith("_v")
        return key in (ref.key, "original") or _is_matrix(tensor)
    if owner is not None and _says_norm(owner, ref.name.removesuffix(ref.key).strip(".").rpartition(".")[2]):
        return False
    return _is_matrix(tensor) and not TOKEN.search(ref.key) and not POSITION.search(ref.key)


def _says_norm(module: nn.Module, name: str) -> bool:
    """Whether a module is a normalization layer, by its type, the name of its class, or its own name."""
    return isinstance(module, NORMALIZATIONS) or bool(NORM.search(type(module).__name__) or NORM.search(name))


def _is_matrix(tensor: Tensor) -> bool:
    """Whether at least 2 dimensions have a size above 1."""
    return sum(size > 1 for size in tensor.shape) > 1


class Rule:
    """The condition that `select` or `exclude` describes.

    The forms are "weights", "all" or "attention"; a glob on parameter names; a module type; and a callable. Entries of
    the same form are alternatives; entries of different forms must all match.

    Args:
        given: an entry, or a list or tuple of entries.
        argument: the name of the argument, for error messages.

    Raises:
        TypeError: an entry has none of these forms.
    """

    def __init__(self, given: Select, argument: str) -> None:
        self.given = given
        self.globs: list[str] = []
        words: list[str] = []
        types: list[type[nn.Module]] = []
        functions: list[Callable[[str, Tensor], bool]] = []
        for entry in _flat(given):
            if isinstance(entry, str):
                (words if entry in WORDS else self.globs).append(entry)
            elif isinstance(entry, type) and issubclass(entry, nn.Module):
                types.append(entry)
            elif callable(entry) and not isinstance(entry, type | nn.Module):
                functions.append(entry)
            else:
                raise TypeError(f"{argument}={given!r}: allowed are {ALLOWED}")
        forms: list[tuple[list[Any], Callable[..., bool]]] = [
            (words, self._by_word),
            (self.globs, _by_glob),
            (types, _by_type),
            (functions, _by_function),
        ]
        self.conditions = [(e, holds) for e, holds in forms if e]

    def __deepcopy__(self, memo: dict[int, Any]) -> Rule:
        return self  # immutable

    def __reduce__(self) -> Any:
        # Functions that cannot be pickled (lambdas) are needed only if layers are added later.
        entries = [entry if not callable(entry) or _can_be_pickled(entry) else _lost for entry in _flat(self.given)]
        return Rule, (entries, "select")

    @staticmethod
    def _by_word(word: str, ref: ParameterRef, key: str, name: str, tensor: Tensor) -> bool:
        if word == "all":
            return True
        if not is_weight(ref, key, tensor):
            return False
        # For "attention": a penalty on a single linear layer means that layer.
        single = len(ref.ancestors) == 1 and isinstance(ref.owner, (nn.Linear, *transformers_conv1d()))
        return word == "weights" or single or is_attention_projection(ref)

    def matches(self, ref: ParameterRef, key: str, name: str, tensor: Tensor) -> bool:
        """Whether the rule matches a parameter.

        Args:
            ref: the location of the parameter.
            key: its name in its module, or in the parametrization of its module.
            name: its qualified name.
            tensor: the parameter.
        """
        return bool(self.conditions) and all(
            any(holds(entry, ref, key, name, tensor) for entry in entries) for entries, holds in self.conditions
        )


def _can_be_pickled(function: Any) -> bool:
    try:
        pickle.dumps(function)
    except Exception:  # objects raise different types of errors
        return False
    return True


def _lost(name: str, parameter: Tensor) -> bool:
    raise ValueError(
        f"parameter {name!r} was added after the penalty was pickled, and the function that selects parameters "
        "could not be pickled; build a new penalty"
    )


def _flat(given: Any) -> Iterator[Any]:
    if isinstance(given, list | tuple):
        for entry in given:
            yield from _flat(entry)
    else:
        yield given


def _by_glob(glob: str, ref: ParameterRef, key: str, name: str, tensor: Tensor) -> bool:
    return any(fnmatchcase(spelling, glob) for called in (name, ref.name) for spelling in spellings(called))


def _by_type(kind: type[nn.Module], ref: ParameterRef, key: str, name: str, tensor: Tensor) -> bool:
    return any(isinstance(module, kind) for module in ref.ancestors)


def _by_function(
    function: Callable[[str, Tensor], bool], ref: ParameterRef, key: str, name: str, tensor: Tensor
) -> bool:
    return any(function(spellings(called)[-1], tensor) for called in dict.fromkeys((name, ref.name)))
