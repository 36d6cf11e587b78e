"""Which parameters are meant: of a model, of a list of tensors."""

from __future__ import annotations

import copy
import difflib
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter

from .lookup import Slot, Structure, all_slots, refuse_flattened, spellings, tensor_slot
from .units import MULTIPLYING, is_attention_projection, transformers_conv1d
from .warn import warn

__all__ = ["Params", "Select", "Selection", "is_weight", "owned_ids"]

Form = str | type[nn.Module] | Callable[[str, Tensor], bool]
Select = Form | list[Any] | tuple[Any, ...]
Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
WORDS = ("weights", "all", "attention")
ALLOWED = (
    "'weights', 'all', a glob on parameter names, a module type, a callable (name, parameter) -> bool, or a list or "
    "tuple of these"
)

NORM = re.compile(r"norm(?!al(?!iz))", re.IGNORECASE)  # of a class: RMSNorm, LayerNorm2d, not NormalHead
BIAS = re.compile(r"(^|_)bias(es)?(_|\d|$)")
TOKEN = re.compile(r"(^|_)tokens?(_|\d|$)")
POSITION = re.compile(r"(^|_)(pos|position|positional)(_?(emb|embed|embedding|enc|encoding)s?)?(_|$)")


def is_weight(slot: Slot, key: str, tensor: Tensor) -> bool:
    """Whether a careful engineer's list of decayed parameters holds it: no bias, norm scale, token or layer scale.

    Args:
        slot: where the parameter stands.
        key: its own name: in its module, or in the parametrization of one.
        tensor: the parameter.
    """
    if slot.undecayed or getattr(tensor, "_no_weight_decay", False) or BIAS.search(slot.key):
        return False
    owner = slot.owner
    if isinstance(owner, nn.Embedding) and len(slot.ancestors) > 1 and _says_norm(slot.ancestors[-2], ""):
        return False  # the scales of a norm, one for each class
    if isinstance(owner, MULTIPLYING + transformers_conv1d()) and "weight" in slot.key:
        if slot.under_weight_norm():  # the directions are the weight, the lengths their scales
            return key == "original1" or slot.key.endswith("_v")
        return key in (slot.key, "original") or _is_matrix(tensor)
    if owner is not None and _says_norm(owner, slot.name.removesuffix(slot.key).strip(".").rpartition(".")[2]):
        return False
    return _is_matrix(tensor) and not TOKEN.search(slot.key) and not POSITION.search(slot.key)


def _says_norm(module: nn.Module, name: str) -> bool:
    """Whether a module is a normalization layer: by its type, or as the name of its class, or its own, says."""
    return isinstance(module, NORMALIZATIONS) or bool(NORM.search(type(module).__name__) or NORM.search(name))


def _is_matrix(tensor: Tensor) -> bool:
    """Whether it has 2 dimensions or more of size above 1."""
    return sum(size > 1 for size in tensor.shape) > 1


class Rule:
    """What a `select` or an `exclude` means: entries of one form are alternatives, different forms must all hold.

    Args:
        given: a form, or a list or tuple of them.
        argument: what the user calls it.

    Raises:
        TypeError: it is none of the forms.
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
        return self  # it never changes

    def __reduce__(self) -> Any:
        # A lambda cannot be pickled, and is needed only where layers are added later.
        entries = [entry if not callable(entry) or _can_be_pickled(entry) else _lost for entry in _flat(self.given)]
        return Rule, (entries, "select")

    @staticmethod
    def _by_word(word: str, slot: Slot, key: str, name: str, tensor: Tensor) -> bool:
        if word == "all":
            return True
        if not is_weight(slot, key, tensor):
            return False
        # Whoever gives a single linear layer means that layer.
        single = len(slot.ancestors) == 1 and isinstance(slot.owner, (nn.Linear, *transformers_conv1d()))
        return word == "weights" or single or is_attention_projection(slot)

    def matches(self, slot: Slot, key: str, name: str, tensor: Tensor) -> bool:
        """Whether a parameter is meant."""
        return bool(self.conditions) and all(
            any(holds(entry, slot, key, name, tensor) for entry in entries) for entries, holds in self.conditions
        )


def _can_be_pickled(function: Any) -> bool:
    try:
        pickle.dumps(function)
    except Exception:  # whatever it holds says so in its own way
        return False
    return True


def _lost(name: str, parameter: Tensor) -> bool:
    raise ValueError(
        f"parameter {name!r} came after the penalty was pickled, and the function that chose among the parameters "
        "could not be pickled; build the penalty anew"
    )


def _flat(given: Any) -> Iterator[Any]:
    if isinstance(given, list | tuple):
        for entry in given:
            yield from _flat(entry)
    else:
        yield given


def _by_glob(glob: str, slot: Slot, key: str, name: str, tensor: Tensor) -> bool:
    return any(fnmatchcase(spelling, glob) for called in (name, slot.name) for spelling in spellings(called))


def _by_type(kind: type[nn.Module], slot: Slot, key: str, name: str, tensor: Tensor) -> bool:
    return any(isinstance(module, kind) for module in slot.ancestors)


def _by_function(function: Callable[[str, Tensor], bool], slot: Slot, key: str, name: str, tensor: Tensor) -> bool:
    return any(function(spellings(called)[-1], tensor) for called in dict.fromkeys((name, slot.name)))


class Selection:
    """The parameters that `params`, `select` and `exclude` mean, at least one; of a model, as it is now.

    Args:
        params: a module, a tensor, or an iterable of tensors or of (name, tensor).
        select: what is meant, see `Rule`; None means `default` of a module, and all of what is given as tensors.
        exclude: what of it is not, see `Rule`.
        default: what None means.

    Attributes:
        slots: where the parameters stand.

    Raises:
        TypeError: `params` is neither a module nor an iterable of tensors or of (name, tensor).
        ValueError: nothing is selected; a choice by name or type among tensors; a tensor that is no leaf or of
            integers.
    """

    def __init__(
        self, params: Params, select: Select | None, exclude: Select | None = None, default: Select = "weights"
    ) -> None:
        self.root = params if isinstance(params, nn.Module) else None
        self.optimizer: torch.optim.Optimizer | None = None
        if not isinstance(params, nn.Module):
            self.slots = _of_tensors(params, select, exclude)
            return
        _refuse_scripted(params)
        self.select = Rule(default if select is None else select, "select")
        self.exclude = None if exclude is None else Rule(exclude, "exclude")
        self._every: list[Slot] = []
        self.slots = []
        self._read()
        if not self.slots:
            raise ValueError(self._nothing_selected())
        if self.exclude is not None and not self._excluded():
            warn(f"exclude={exclude!r} matches none of the parameters of {type(params).__name__}")

    def refresh(self) -> None:
        """Look again where modules were added, replaced or taken away, or lazy parameters have got a shape.

        Raises:
            ValueError: nothing is left of the selection.
        """
        if self.root is None or torch.compiler.is_compiling():
            return
        if any(slot.judged is None for slot in self.slots):
            self._judge()
        if self._structure.holds():
            return
        had_some = bool(self.slots)
        self._read()
        if had_some and not self.slots:
            raise ValueError(
                f"none of the penalized parameters is left in the {type(self.root).__name__}, whose layers were "
                "replaced; build the penalty anew"
            )

    def restricted_to(self, optimizer: torch.optim.Optimizer) -> Selection:
        """Those that an optimizer owns, which may be none."""
        self.refresh()
        restricted = copy.copy(self)
        restricted.optimizer = optimizer
        owned = owned_ids(optimizer)
        restricted.slots = [slot for slot in self.slots if _holds_any(slot, owned)]
        return restricted

    def _read(self) -> None:
        root: Any = self.root
        known = {(slot.owner, slot.key): slot for slot in self._every}
        every = []
        weights = {slot.name: slot.weights for slot in self._every}
        for slot in all_slots(root):
            old = known.pop((slot.owner, slot.key), slot)
            old.name, old.ancestors = slot.name, slot.ancestors
            old.weights = old.weights or weights.get(slot.name, {})  # these go by the name, whatever the layer
            every.append(old)
        modules = set(root.modules())
        # Where a parameter is gone from a module that is still there, to look it up is an error that says so.
        gone = [slot for slot in known.values() if slot in self.slots and slot.owner in modules]
        self._every = every + gone
        self._structure = Structure(root)
        self._judge()

    def _judge(self) -> None:
        """Choose among the slots. What was judged stays so: a parameter that took its place may have lost its marks."""
        excluded = self._excluded()
        owned = None if self.optimizer is None else owned_ids(self.optimizer)
        slots = []
        for slot in self._every:
            if slot.is_gone():
                slots.append(slot)
                continue
            tensors = list(slot.tensors())
            for _, name, tensor in tensors:
                refuse_flattened(name, tensor)
            if any(isinstance(tensor, UninitializedParameter) for *_, tensor in tensors):
                slots.append(slot)
                continue
            keys = {key for key, *_ in tensors}
            new = slot.judged != keys
            if new:
                slot.judged = keys
                slot.selected = {
                    key
                    for key, name, tensor in tensors
                    if id(tensor) not in excluded and self.select.matches(slot, key, name, tensor)
                }
            if slot.selected and (owned is None or slot in self.slots or _holds_any(slot, owned)):
                slots.append(slot)
        self.slots = slots

    def _excluded(self) -> set[int]:
        """The ids of the parameters that are taken off, under whichever of their names."""
        if self.exclude is None:
            return set()
        return {
            id(tensor)
            for slot in self._every
            if not slot.is_gone()
            for key, name, tensor in slot.tensors()
            if not isinstance(tensor, UninitializedParameter) and self.exclude.matches(slot, key, name, tensor)
        }

    def _nothing_selected(self) -> str:
        kind = type(self.root).__name__
        names = [spellings(slot.name)[-1] for slot in self._every]
        if not names:
            return f"no parameters to penalize: {kind} has none"
        near = [
            name
            for glob in self.select.globs
            for name in difflib.get_close_matches(glob.replace("*", ""), names, n=3, cutoff=0.3)
        ]
        shown = list(dict.fromkeys(near)) or names
        more = ", ..." if len(shown) > 8 else ""
        less = "" if self.exclude is None else f", less exclude={self.exclude.given!r},"
        return (
            f"select={self.select.given!r}{less} matches none of the {len(names)} parameters of {kind}; "
            f"{'near matches' if near else 'its parameters are'}: {', '.join(shown[:8])}{more}"
        )


def owned_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters that an optimizer has now."""
    return {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}


def _holds_any(slot: Slot, ids: set[int]) -> bool:
    return any(id(tensor) in ids for *_, tensor in slot.tensors())


def _refuse_scripted(root: nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in root.modules()):
        raise TypeError(
            f"{type(root).__name__} is scripted, and a scripted module does not say what its layers are. Give the "
            "penalty the module that was scripted: the two share their parameters"
        )


def _of_tensors(params: Any, select: Select | None, exclude: Select | None) -> list[Slot]:
    if isinstance(params, Tensor):
        params = [params]
    slots = [_of_tensor(i, entry) for i, entry in enumerate(params)]
    if not slots:
        raise ValueError("no parameters to penalize: the iterable is empty (a generator that was used up?)")
    if select not in (None, "all", "weights") or exclude is not None:
        given = f"select={select!r}" if exclude is None else f"exclude={exclude!r}"
        raise ValueError(
            f"{given} beside tensors: it chooses among a module's parameters. Give the module; or, beside tensors, "
            "select='weights' or 'all', or only the tensors that you mean"
        )
    flat = [slot.name for slot in slots if not _is_matrix(slot.tensor)]  # type: ignore[arg-type]
    if select is None and flat and len(slots) > 1:
        warn(
            f"biases and norm scales seem to be among the {len(slots)} tensors: {', '.join(flat[:4])}"
            f"{', ...' if len(flat) > 4 else ''} have fewer than 2 dimensions above 1, and are penalized like the "
            "rest. Give the module, which leaves them out; or say select='all', or select='weights' for the others"
        )
    if select == "weights":
        slots = [slot for slot in slots if is_weight(slot, slot.key, slot.tensor)]  # type: ignore[arg-type]
        if not slots:
            raise ValueError("select='weights' leaves none of the tensors: all have fewer than 2 dimensions above 1")
    return slots


def _of_tensor(index: int, entry: object) -> Slot:
    name, tensor = entry if isinstance(entry, tuple) and len(entry) == 2 else (str(index), entry)
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise TypeError(
            f"entry {index} of the parameters is {entry!r}; allowed are a module, an iterable of tensors, of "
            "(name, tensor), or of dicts with a 'params'"
        )
    if not tensor.is_leaf:
        raise ValueError(
            f"tensor {name!r} is no leaf: it was computed from others, and an update of it would be lost. Give the "
            "parameters that it was computed from"
        )
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}; a penalty needs floating point or complex")
    return tensor_slot(name, tensor)
