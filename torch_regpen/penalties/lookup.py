"""The locations of parameters in a model: each parameter is looked up by module and name at each use.

Moving, casting, sharding, parametrizing and loading with `assign=True` may replace a parameter, but keep its name.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from fnmatch import translate
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

__all__ = ["ParameterRef", "Structure", "all_refs", "refuse_flattened", "spellings", "tensor_ref"]


class ParameterRef:
    """The location of a parameter: a module (the owner) and a name in it; or a tensor that the user passed directly.

    A parametrized weight is one location with several parameters, each with its own key.

    Attributes:
        name: the qualified name, without the additions of parametrizations.
        owner: the module that holds the parameter; None for a bare tensor.
        key: the name in the owner.
        ancestors: the modules from the root down to the owner.
        undecayed: whether an ancestor lists it in `no_weight_decay()`.
        evaluated: the keys to which the selection rules were applied; None before they were applied.
        selected: the keys that the rules selected.
        warned: whether the user was warned that the order of its heads is a guess.
    """

    def __init__(
        self,
        name: str,
        key: str,
        ancestors: tuple[nn.Module, ...] = (),
        *,
        undecayed: bool = False,
        tensor: Tensor | None = None,
    ) -> None:
        self.name = name
        self.key = key
        self.ancestors = ancestors
        self.owner = ancestors[-1] if ancestors else None
        self.undecayed = undecayed
        self.tensor = tensor
        # A bare tensor without requires_grad is penalized; a parameter without it is frozen.
        self.can_freeze = tensor is None or isinstance(tensor, nn.Parameter) or tensor.requires_grad
        self.evaluated: set[str] | None = None if tensor is None else {key}
        self.warned = False
        self.selected: set[str] = set() if tensor is None else {key}
        self.registered: dict[str, weakref.ref[Tensor]] = {}  # the last registered parameters, by name
        self.was_frozen: dict[str, bool] = {}  # whether these were frozen, in case they no longer exist
        self.centers: dict[str, Tensor] = {}  # the center and the weights of each parameter, by name
        self.weights: dict[str, Tensor] = {}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the qualified name and the tensor of each selected parameter here, frozen ones included.

        A lazy parameter yields nothing; a parametrized weight may yield several parameters.

        Raises:
            ValueError: the parameter is gone from its module, or was flattened by FSDP1 or ZeRO-3.
        """
        for key, name, tensor in self.tensors():
            if isinstance(tensor, UninitializedParameter):
                continue
            refuse_flattened(name, tensor)
            if key in self.selected or (self.evaluated is not None and key not in self.evaluated):
                yield name, tensor

    def location(self) -> tuple[dict[str, Any], str] | None:
        """The dict and the key that hold the parameter, to check cheaply whether it is still the same.

        None if that check is not enough: the parameter is lazy, parametrized or replaced by `functional_call`.
        """
        if self.owner is None:
            return self.__dict__, "tensor"
        parameters, key = self.owner._parameters, self._registered_key()
        parameter = parameters.get(key)
        simple = isinstance(parameter, nn.Parameter) and not isinstance(parameter, UninitializedParameter)
        return (parameters, key) if simple and self.evaluated is not None else None

    def is_gone(self) -> bool:
        """Whether the parameter was removed from its owner."""
        if self.owner is None or self.owner._parameters.get(self._registered_key()) is not None:
            return False
        return not parametrize.is_parametrized(self.owner, self.key)

    def _registered_key(self) -> str:
        """The present name in the owner: torch.nn.utils.prune and spectral_norm append `_orig`, and remove it again."""
        parameters: dict[str, Any] = self.owner._parameters  # type: ignore[union-attr]
        other = self.key.removesuffix("_orig") if self.key.endswith("_orig") else f"{self.key}_orig"
        return other if parameters.get(self.key) is None and parameters.get(other) is not None else self.key

    def frozen(self, name: str, tensor: Tensor) -> bool:
        """Whether the registered parameter is frozen, even while torch.func replaces it with another tensor."""
        if self.owner is None:
            return self.can_freeze and not tensor.requires_grad
        if isinstance(tensor, nn.Parameter):
            if not torch.compiler.is_compiling():
                self.registered[name] = weakref.ref(tensor)
                self.was_frozen[name] = not tensor.requires_grad
            return not tensor.requires_grad
        parameter = self.registered[name]() if name in self.registered else None
        return self.was_frozen.get(name, False) if parameter is None else not parameter.requires_grad

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the key, the qualified name and the tensor of every parameter here, lazy ones included."""
        if self.tensor is not None:
            yield self.key, self.name, self.tensor
            return
        parameter = self.owner._parameters.get(self._registered_key())  # type: ignore[union-attr]
        if parameter is not None:
            yield self.key, self.name, parameter
            return
        if self.is_gone():
            raise ValueError(
                f"parameter {self.name!r} is gone from its {type(self.owner).__name__}. If FSDP1 or another wrapper "
                "flattened it, a penalty on it would be silently wrong: shard with fully_shard (FSDP2) instead. If it "
                "was replaced on purpose, build a new penalty"
            )
        originals = self.owner.parametrizations[self.key]  # type: ignore[union-attr,index]
        prefix = self.name[: len(self.name) - len(self.key)]
        for key, original in originals._parameters.items():  # type: ignore[union-attr]
            if original is not None:
                yield key, f"{prefix}parametrizations.{self.key}.{key}", original

    def under_weight_norm(self) -> bool:
        """Whether weight_norm splits the weight here into directions and lengths."""
        owner: Any = self.owner
        if self.key.endswith(("_v", "_g")):  # torch.nn.utils.weight_norm
            return owner is not None and {self.key[:-1] + "v", self.key[:-1] + "g"} <= set(owner._parameters)
        parametrized = owner is not None and parametrize.is_parametrized(owner, self.key)
        return bool(parametrized and isinstance(owner.parametrizations[self.key][0], _WeightNorm))

    def length_of(self, name: str) -> Tensor | None:
        """Under weight_norm, the lengths that belong to the directions `name`; else None."""
        owner: Any = self.owner
        if owner is None or not name.endswith(("_v", ".original1")) or not self.under_weight_norm():
            return None
        old = name.endswith("_v")
        length: Tensor = owner._parameters[self.key[:-1] + "g"] if old else owner.parametrizations[self.key].original0
        return length

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied, but the parameters can.
        alive = {name: parameter for name, last in self.registered.items() if (parameter := last()) is not None}
        was_frozen = {**self.was_frozen, **{name: not parameter.requires_grad for name, parameter in alive.items()}}
        return {**self.__dict__, "registered": alive, "was_frozen": was_frozen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.registered = {name: weakref.ref(parameter) for name, parameter in state["registered"].items()}


class Structure:
    """A record of the modules of a model, to check cheaply whether a layer was added, replaced or removed.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._dicts: list[dict[str, Any]] = [d for m in modules for d in (m._modules, m._parameters)]
        self._lengths = list(map(len, self._dicts))
        edges = [(m._modules, key, child) for m in modules for key, child in m._modules.items()]
        self._parents = [parent for parent, _, _ in edges]
        self._keys = [key for _, key, _ in edges]
        self._children = [child for _, _, child in edges]

    def holds(self) -> bool:
        """Whether all modules are the same as before, each with the same number of parameters."""
        now = map(dict.get, self._parents, self._keys)
        return list(map(len, self._dicts)) == self._lengths and all(map(is_, now, self._children))


def all_refs(root: nn.Module) -> Iterator[ParameterRef]:
    """Yield a location for each parameter of a model. Shared modules are visited once."""
    yield from _refs_below((root,), "", [], set())


def _refs_below(
    ancestors: tuple[nn.Module, ...], prefix: str, undecayed: list[re.Pattern[str]], seen: set[nn.Module]
) -> Iterator[ParameterRef]:
    owner = ancestors[-1]
    seen.add(owner)
    undecayed = undecayed + _own_list(owner, prefix)
    keys = [key for key, parameter in owner._parameters.items() if parameter is not None]
    if parametrize.is_parametrized(owner):
        keys += owner.parametrizations.keys()  # type: ignore[union-attr,operator]
    for key in keys:
        name = prefix + key
        listed = any(pattern.match(name) for pattern in undecayed)
        yield ParameterRef(name, key, ancestors, undecayed=listed)
    for key, child in owner._modules.items():
        # The parameters of a parametrization belong to the location in the parametrized module.
        if child is None or child in seen or (key == "parametrizations" and parametrize.is_parametrized(owner)):
            continue
        yield from _refs_below((*ancestors, child), f"{prefix}{key}.", undecayed, seen)


def tensor_ref(name: str, tensor: Tensor) -> ParameterRef:
    """The location of a bare tensor."""
    return ParameterRef(name, name.rpartition(".")[2], tensor=tensor)


def spellings(name: str) -> list[str]:
    """The names of a parameter: as given and, if different, without the prefixes of DDP and torch.compile."""
    plain = re.sub(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)\.", r"\1", name)
    while plain.startswith("module."):
        plain = plain.removeprefix("module.")
    return [name] if plain == name else [name, plain]


def refuse_flattened(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` for a parameter that a wrapper has flattened."""
    if getattr(tensor, "_fsdp_flattened", False):
        wrapper = "FSDP1"
    elif hasattr(tensor, "ds_id"):
        wrapper = "DeepSpeed ZeRO-3"
    else:
        return
    raise ValueError(
        f"parameter {name!r} was flattened by {wrapper}: its shape is lost, its elements are scattered over ranks, and "
        "a penalty on it would be silently wrong. Shard with torch.distributed.fsdp.fully_shard (FSDP2) instead"
    )


def _own_list(module: nn.Module, prefix: str) -> list[re.Pattern[str]]:
    """Patterns from `no_weight_decay()` (names or globs) and `no_weight_decay_keywords()` (parts of names)."""
    patterns: list[str] = []
    for method, form in (("no_weight_decay", "{}"), ("no_weight_decay_keywords", "*{}*")):
        listed = getattr(module, method, None)
        if callable(listed):
            patterns += [form.format(name) for name in listed()]
    return [re.compile(re.escape(prefix) + translate(pattern)) for pattern in patterns]
