"""Where parameters stand in a model: looked up at each use by owner and name, not held as tensors.

Moving, casting, sharding, loading with `assign=True` and parametrizing replace the tensor, and the name stays.
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
    """The place of one parameter: an owner and a name in it, or a tensor that the user gave as such.

    Attributes:
        name: its plain qualified name: without what parametrizations add to it.
        owner: the module that it belongs to, None for a tensor given as such.
        key: its name in the owner.
        ancestors: the modules from the root down to the owner.
        undecayed: whether a model on the way lists it among the parameters that do not decay.
        judged: the keys of the parameters that stood here when it was chosen or not; None while it is to be judged.
        selected: those of them that are meant; a parametrized weight has several.
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
        # A tensor that never had a gradient is meant as it is; a parameter without one is frozen.
        self.can_freeze = tensor is None or isinstance(tensor, nn.Parameter) or tensor.requires_grad
        self.judged: set[str] | None = None if tensor is None else {key}
        self.told = False  # that what a unit is here is a guess
        self.selected: set[str] = set() if tensor is None else {key}
        self.registered: dict[str, weakref.ref[Tensor]] = {}  # the parameters that last stood here, by name,
        self.was_frozen: dict[str, bool] = {}  # and what is left of them where they are gone
        self.centers: dict[str, Tensor] = {}  # what a penalty keeps for the parameters here, by name
        self.weights: dict[str, Tensor] = {}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that stand here now and are selected, with their qualified names, frozen ones included.

        More than one where the parameter is parametrized by several; none while it is lazy.

        Raises:
            ValueError: the parameter is gone from its module, or flattened into another.
        """
        for key, name, tensor in self.tensors():
            if isinstance(tensor, UninitializedParameter):
                continue
            refuse_flattened(name, tensor)
            if key in self.selected or (self.judged is not None and key not in self.judged):
                yield name, tensor

    def location(self) -> tuple[dict[str, Any], str] | None:
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
        return (parameters, self.key) if simple and self.judged is not None else None

    def is_gone(self) -> bool:
        """Whether the parameter was taken from its owner."""
        if self.owner is None or self.owner._parameters.get(self.key) is not None:
            return False
        return not parametrize.is_parametrized(self.owner, self.key)

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

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """All that stands here now, lazy parameters included: the key, the qualified name, the tensor."""
        if self.tensor is not None:
            yield self.key, self.name, self.tensor
            return
        parameter = self.owner._parameters.get(self.key)  # type: ignore[union-attr]
        if parameter is not None:
            yield self.key, self.name, parameter
            return
        if self.is_gone():
            raise ValueError(
                f"parameter {self.name!r} is gone from its {type(self.owner).__name__}. If FSDP1 or another wrapper "
                "flattened it, a penalty on it would be silently wrong: shard with fully_shard (FSDP2) instead; if it "
                "was replaced on purpose, build the penalty anew"
            )
        originals = self.owner.parametrizations[self.key]  # type: ignore[union-attr,index]
        prefix = self.name[: len(self.name) - len(self.key)]
        for key, original in originals._parameters.items():  # type: ignore[union-attr]
            if original is not None:
                yield key, f"{prefix}parametrizations.{self.key}.{key}", original

    def under_weight_norm(self) -> bool:
        """Whether weight_norm takes a weight apart here, into directions and their lengths."""
        owner: Any = self.owner
        if self.key.endswith(("_v", "_g")):  # torch.nn.utils.weight_norm
            return owner is not None and {self.key[:-1] + "v", self.key[:-1] + "g"} <= set(owner._parameters)
        parametrized = owner is not None and parametrize.is_parametrized(owner, self.key)
        return bool(parametrized and isinstance(owner.parametrizations[self.key][0], _WeightNorm))

    def length_of(self, name: str) -> Tensor | None:
        """The lengths beside the directions `name`, where weight_norm takes a weight apart; else None."""
        owner: Any = self.owner
        if owner is None or not name.endswith(("_v", ".original1")) or not self.under_weight_norm():
            return None
        old = name.endswith("_v")
        length: Tensor = owner._parameters[self.key[:-1] + "g"] if old else owner.parametrizations[self.key].original0
        return length

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied; what they refer to can.
        alive = {name: parameter for name, last in self.registered.items() if (parameter := last()) is not None}
        was_frozen = {**self.was_frozen, **{name: not parameter.requires_grad for name, parameter in alive.items()}}
        return {**self.__dict__, "registered": alive, "was_frozen": was_frozen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.registered = {name: weakref.ref(parameter) for name, parameter in state["registered"].items()}


class Structure:
    """Which modules a model has, to see cheaply whether a layer was added, replaced or taken away.

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
        """Whether the same modules are in the same places, each with as many parameters as before."""
        now = map(dict.get, self._parents, self._keys)
        return list(map(len, self._dicts)) == self._lengths and all(map(is_, now, self._children))


def all_refs(root: nn.Module) -> Iterator[ParameterRef]:
    """A ref for each parameter of a model, those of shared modules once; of the parametrized ones, one together."""
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
        # The parameters of a parametrization are reached from the module that it parametrizes.
        if child is None or child in seen or (key == "parametrizations" and parametrize.is_parametrized(owner)):
            continue
        yield from _refs_below((*ancestors, child), f"{prefix}{key}.", undecayed, seen)


def tensor_ref(name: str, tensor: Tensor) -> ParameterRef:
    """The ref of a tensor that was given as such."""
    return ParameterRef(name, name.rpartition(".")[2], tensor=tensor)


def spellings(name: str) -> list[str]:
    """The names by which a parameter can be called: as it is, and without the prefixes that wrappers add."""
    plain = re.sub(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)\.", r"\1", name)
    while plain.startswith("module."):
        plain = plain.removeprefix("module.")
    return [name] if plain == name else [name, plain]


def refuse_flattened(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` for a parameter whose shape another wrapper has taken away."""
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


def _own_list(module: nn.Module, prefix: str) -> list[re.Pattern[str]]:
    """The parameters that a model says should not decay, as timm's models do: names or globs, and parts of names."""
    patterns: list[str] = []
    for method, form in (("no_weight_decay", "{}"), ("no_weight_decay_keywords", "*{}*")):
        listed = getattr(module, method, None)
        if callable(listed):
            patterns += [form.format(name) for name in listed()]
    return [re.compile(re.escape(prefix) + translate(pattern)) for pattern in patterns]
