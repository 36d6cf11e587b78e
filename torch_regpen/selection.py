"""Which parameters are meant: of a model, of a list of tensors, of dicts as torch.optim takes them.

A parameter of a module is remembered as its owner and its name there, not as a tensor, and looked up at each use:
moving, casting, sharding, loading with `assign=True` and parametrizing replace the tensor, and the name stays.
"""

from __future__ import annotations

import difflib
import re
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

__all__ = ["Params", "Select", "Slot", "select_slots"]

Select = str | list[str] | tuple[str, ...] | Callable[[str, Tensor], bool]
Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Slot:
    """The place of one parameter: an owner and a name in it, or a tensor that the user gave as such.

    Attributes:
        name: its plain qualified name: without what parametrizations add to it.
        owner: the module that it belongs to, None for a tensor given as such.
    """

    def __init__(self, name: str, owner: nn.Module | None, key: str, tensor: Tensor | None = None) -> None:
        self.name = name
        self.owner = owner
        self.key = key
        self.tensor = tensor
        # A tensor that never had a gradient is meant as it is; a parameter without one is frozen.
        self.can_freeze = tensor is None or isinstance(tensor, nn.Parameter) or tensor.requires_grad
        self.select: Select | None = None  # what still has to judge a lazy parameter, once it has a shape
        self.registered: dict[str, weakref.ref[Tensor]] = {}  # the parameters that last stood here, by name,
        self.was_frozen: dict[str, bool] = {}  # and what is left of them where they are gone
        self.centers: dict[str, Tensor] = {}  # what a penalty keeps for the parameters here, by name
        self.weights: dict[str, Tensor] = {}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that stand here now, with their qualified names, frozen ones included; none while it is lazy.

        More than one where the parameter is parametrized by several (weight_norm has two).

        Raises:
            ValueError: the parameter is gone from its module, or flattened into another.
        """
        for name, tensor in self.tensors():
            if isinstance(tensor, UninitializedParameter):
                continue
            _refuse_flattened(name, tensor)
            if self.select is None or self.matches(self.select, name, tensor):
                yield name, tensor

    def place(self) -> tuple[dict[str, Any], str] | None:
        """The dict and the key by which the parameter is found, for as long as the same parameter is there.

        None where more has to be looked at: where it has weights or a center, and while it is lazy, parametrized, or
        replaced for a functional call.
        """
        if self.weights or self.centers:
            return None
        if self.owner is None:
            return self.__dict__, "tensor"
        parameters = self.owner._parameters
        parameter = parameters.get(self.key)
        simple = isinstance(parameter, nn.Parameter) and not isinstance(parameter, UninitializedParameter)
        return (parameters, self.key) if simple and self.select is None else None

    def matches(self, select: Select, name: str, tensor: Tensor) -> bool:
        """Whether `select` means the parameter `tensor`, which stands here under the qualified `name`."""
        if callable(select):
            return any(select(spellings(called)[-1], tensor) for called in dict.fromkeys((name, self.name)))
        if select == "all":
            return True
        if select == "weights":
            return tensor.ndim >= 2 and not isinstance(self.owner, NORMALIZATIONS)
        patterns = [select] if isinstance(select, str) else select
        names = [*spellings(name), *spellings(self.name)]
        return any(fnmatchcase(spelling, pattern) for pattern in patterns for spelling in names)

    def frozen(self, name: str, tensor: Tensor) -> bool:
        """Whether the registered parameter is frozen, even where functorch has put another tensor in its place."""
        if self.owner is None:
            return self.can_freeze and not tensor.requires_grad
        if isinstance(tensor, nn.Parameter):
            if not torch.compiler.is_compiling():
                self.registered[name] = weakref.ref(tensor)
                self.was_frozen[name] = not tensor.requires_grad
            return not tensor.requires_grad
        parameter = self.registered[name]() if name in self.registered else None
        return self.was_frozen.get(name, False) if parameter is None else not parameter.requires_grad

    def unit_dims(self, ndim: int) -> tuple[int, int]:
        """The dimensions along which the output and the input units of a parameter here lie."""
        return (1, 0) if ndim > 1 and isinstance(self.owner, _transposed_modules()) else (0, 1)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that stands here now, lazy parameters included."""
        if self.tensor is not None:
            yield self.name, self.tensor
            return
        parameter = self.owner._parameters.get(self.key)  # type: ignore[union-attr]
        if parameter is not None:
            yield self.name, parameter
            return
        if not parametrize.is_parametrized(self.owner, self.key):  # type: ignore[arg-type]
            raise ValueError(
                f"parameter {self.name!r} is gone from its {type(self.owner).__name__}. If FSDP1 or another wrapper "
                "flattened it, a penalty on it would be silently wrong: shard with fully_shard (FSDP2) instead; if it "
                "was replaced on purpose, build the penalty anew"
            )
        originals = self.owner.parametrizations[self.key]  # type: ignore[union-attr,index]
        prefix = self.name[: len(self.name) - len(self.key)]
        for key, original in originals._parameters.items():  # type: ignore[union-attr]
            if original is not None:
                yield f"{prefix}parametrizations.{self.key}.{key}", original

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied; what they refer to can.
        alive = {name: parameter for name, last in self.registered.items() if (parameter := last()) is not None}
        was_frozen = {**self.was_frozen, **{name: not parameter.requires_grad for name, parameter in alive.items()}}
        return {**self.__dict__, "registered": alive, "was_frozen": was_frozen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.registered = {name: weakref.ref(parameter) for name, parameter in state["registered"].items()}


def select_slots(params: Params, select: Select | None) -> list[Slot]:
    """The slots that `params` and `select` mean, at least one.

    Raises:
        TypeError: `params` is neither a module nor an iterable of tensors or of (name, tensor).
        ValueError: nothing is selected; `select` beside tensors; a tensor that is no leaf or of integers.
    """
    if isinstance(params, nn.Module):
        return _of_module(params, "weights" if select is None else select)
    if isinstance(params, Tensor):
        params = [params]
    slots = [_of_tensor(i, entry) for i, entry in enumerate(params)]
    if not slots:
        raise ValueError("no parameters to penalize: the iterable is empty (a generator that was used up?)")
    if select is not None:
        raise ValueError(
            f"select={select!r} beside tensors: it chooses among a module's parameters by name; tensors given as such "
            "are all taken. Give the module, or the tensors that you mean"
        )
    return slots


def spellings(name: str) -> list[str]:
    """The names by which a parameter can be called: as it is, and without the prefixes that wrappers add."""
    plain = re.sub(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)\.", r"\1", name)
    while plain.startswith("module."):
        plain = plain.removeprefix("module.")
    return [name] if plain == name else [name, plain]


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
    return Slot(name, None, "", tensor)


def _of_module(module: nn.Module, select: Select) -> list[Slot]:
    if not callable(select) and not (isinstance(select, Collection) and all(isinstance(p, str) for p in select)):
        raise TypeError(
            f"select={select!r}: allowed are 'weights', 'all', a glob or a list of globs on parameter names, or a "
            "callable (name, parameter) -> bool"
        )
    slots = list(_all_slots(module))
    chosen = []
    for slot in slots:
        lazy = any(isinstance(tensor, UninitializedParameter) for _, tensor in slot.tensors())
        taken = [slot.matches(select, name, tensor) for name, tensor in slot.read()]
        if lazy or (any(taken) and not all(taken)):
            slot.select = select
        if lazy or any(taken):
            chosen.append(slot)
    if not chosen:
        raise ValueError(_nothing_selected(module, select, slots))
    return chosen


def _all_slots(module: nn.Module) -> Iterator[Slot]:
    for prefix, owner in module.named_modules():
        if isinstance(owner, parametrize.ParametrizationList):
            continue  # its originals are reached from the module that they parametrize
        keys = [key for key, parameter in owner._parameters.items() if parameter is not None]
        if parametrize.is_parametrized(owner):
            keys += owner.parametrizations.keys()
        for key in keys:
            yield Slot(f"{prefix}.{key}" if prefix else key, owner, key)


def _nothing_selected(module: nn.Module, select: Select, slots: list[Slot]) -> str:
    names = [spellings(slot.name)[-1] for slot in slots]
    if not names:
        return f"no parameters to penalize: {type(module).__name__} has none"
    patterns = [select] if isinstance(select, str) else [] if callable(select) else list(select)
    near = [n for p in patterns for n in difflib.get_close_matches(p.replace("*", ""), names, n=3, cutoff=0.3)]
    shown = list(dict.fromkeys(near)) or names
    more = ", ..." if len(shown) > 8 else ""
    return (
        f"select={select!r} matches none of the {len(names)} parameters of {type(module).__name__}; "
        f"{'near matches' if near else 'its parameters are'}: {', '.join(shown[:8])}{more}"
    )


def _refuse_flattened(name: str, tensor: Tensor) -> None:
    if getattr(tensor, "_fsdp_flattened", False):
        wrapper = "FSDP1"
    elif hasattr(tensor, "ds_id"):
        wrapper = "DeepSpeed ZeRO-3"
    else:
        return
    raise ValueError(
        f"parameter {name!r} is flattened by {wrapper}: its elements are scattered over ranks without their shape, and "
        "a penalty on it would be silently wrong. Shard with torch.distributed.fsdp.fully_shard (FSDP2) instead"
    )


def _transposed_modules() -> tuple[type[nn.Module], ...]:
    """The modules whose weights have their input units along dim 0 and their output units along dim 1."""
    transformers = sys.modules.get("transformers.pytorch_utils")  # known only to those who imported it
    return (_ConvTransposeNd,) if transformers is None else (_ConvTransposeNd, transformers.Conv1D)
