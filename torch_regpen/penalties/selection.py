"""Select the parameters to penalize, from a model or from a list of tensors."""

from __future__ import annotations

import copy
import difflib
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..utils import first_names, warn
from .lookup import ParameterRef, Structure, all_refs, refuse_flattened, spellings, tensor_ref
from .rules import Params, Rule, Select, _is_matrix, is_weight

__all__ = ["Selection", "owned_ids"]


class Selection:
    """The parameters that `params`, `select` and `exclude` choose, at least one. It follows changes of the model.

    Args:
        params: a module, a tensor, or an iterable of tensors or of (name, tensor).
        select: the parameters to choose, see `Rule`. None means `default` for a module, and all of given tensors.
        exclude: the parameters to leave out, see `Rule`.
        default: the rule for a module if `select` is None.

    Attributes:
        refs: the locations of the selected parameters.

    Raises:
        TypeError: `params` is neither a module nor an iterable of tensors or of (name, tensor).
        ValueError: nothing is selected; `select` or `exclude` chooses by name or type among given tensors; a tensor is
            not a leaf, or has an integer dtype.
    """

    def __init__(
        self, params: Params, select: Select | None, exclude: Select | None = None, default: Select = "weights"
    ) -> None:
        self.root = params if isinstance(params, nn.Module) else None
        self.optimizer: torch.optim.Optimizer | None = None
        if not isinstance(params, nn.Module):
            self.refs = _of_tensors(params, select, exclude)
            return
        _refuse_scripted(params)
        self.select = Rule(default if select is None else select, "select")
        self.exclude = None if exclude is None else Rule(exclude, "exclude")
        self._every: list[ParameterRef] = []
        self.refs = []
        self._read()
        if not self.refs:
            raise ValueError(self._nothing_selected())
        if self.exclude is not None and not self._excluded():
            warn(f"exclude={exclude!r} matches none of the parameters of {type(params).__name__}")

    @property
    def every(self) -> list[ParameterRef]:
        """The locations of all parameters of the model, selected or not; for given tensors, `refs`."""
        return self.refs if self.root is None else self._every

    def refresh(self) -> None:
        """Select again if modules were added, replaced or removed, or if lazy parameters were initialized.

        Raises:
            ValueError: no selected parameter is left.
        """
        if self.root is None or torch.compiler.is_compiling():
            return
        if None in map(attrgetter("evaluated"), self.refs):
            self._select()
        if self._structure.holds():
            return
        had_some = bool(self.refs)
        self._read()
        if had_some and not self.refs:
            raise ValueError(
                f"{type(self.root).__name__} has none of the penalized parameters any more, because its layers were "
                "replaced; build a new penalty"
            )

    def restricted_to(self, optimizer: torch.optim.Optimizer) -> Selection:
        """The selected parameters that `optimizer` owns; there may be none."""
        self.refresh()
        restricted = copy.copy(self)
        restricted.optimizer = optimizer
        owned = owned_ids(optimizer)
        restricted.refs = [ref for ref in self.refs if _holds_any(ref, owned)]
        return restricted

    def _read(self) -> None:
        root: Any = self.root
        known = {(ref.owner, ref.key): ref for ref in self._every}
        every = []
        weights = {ref.name: ref.weights for ref in self._every}
        for ref in all_refs(root):
            old = known.pop((ref.owner, ref.key), ref)
            old.name, old.ancestors = ref.name, ref.ancestors
            old.weights = old.weights or weights.get(ref.name, {})  # kept if the layer was replaced
            every.append(old)
        modules = set(root.modules())
        # If a selected parameter is gone but its module is still there, reading it raises an error that says so.
        gone = [ref for ref in known.values() if ref in self.refs and ref.owner in modules]
        self._every = every + gone
        self._structure = Structure(root)
        self._select()

    def _select(self) -> None:
        """Apply the rules to new locations. Others keep their result: a replaced parameter may lack attributes."""
        excluded = self._excluded()
        owned = None if self.optimizer is None else owned_ids(self.optimizer)
        refs = []
        for ref in self._every:
            if ref.is_gone():
                refs.append(ref)
                continue
            tensors = list(ref.tensors())
            for _, name, tensor in tensors:
                refuse_flattened(name, tensor)
            if any(isinstance(tensor, UninitializedParameter) for *_, tensor in tensors):
                refs.append(ref)
                continue
            keys = {key for key, *_ in tensors}
            new = ref.evaluated != keys
            if new:
                ref.evaluated = keys
                ref.selected = {
                    key
                    for key, name, tensor in tensors
                    if id(tensor) not in excluded and self.select.matches(ref, key, name, tensor)
                }
            if ref.selected and (owned is None or ref in self.refs or _holds_any(ref, owned)):
                refs.append(ref)
        self.refs = refs

    def _excluded(self) -> set[int]:
        """The ids of the parameters that `exclude` matches by any of their names."""
        if self.exclude is None:
            return set()
        return {
            id(tensor)
            for ref in self._every
            if not ref.is_gone()
            for key, name, tensor in ref.tensors()
            if not isinstance(tensor, UninitializedParameter) and self.exclude.matches(ref, key, name, tensor)
        }

    def _nothing_selected(self) -> str:
        kind = type(self.root).__name__
        names = [spellings(ref.name)[-1] for ref in self._every]
        if not names:
            return f"no parameters to penalize: {kind} has none"
        near = [
            name
            for glob in self.select.globs
            for name in difflib.get_close_matches(glob.replace("*", ""), names, n=3, cutoff=0.3)
        ]
        shown = list(dict.fromkeys(near)) or names
        less = "" if self.exclude is None else f" without exclude={self.exclude.given!r}"
        return (
            f"select={self.select.given!r}{less} matches none of the {len(names)} parameters of {kind}; "
            f"{'near matches' if near else 'its parameters are'}: {first_names(shown, most=8)}"
        )


def owned_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters in the param_groups of an optimizer."""
    return {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}


def _holds_any(ref: ParameterRef, ids: set[int]) -> bool:
    return any(id(tensor) in ids for *_, tensor in ref.tensors())


def _refuse_scripted(root: nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in root.modules()):
        raise TypeError(
            f"{type(root).__name__} is scripted, and the layers of a scripted module cannot be identified. Pass "
            "the module that was scripted: the two share their parameters"
        )


def _of_tensors(params: Any, select: Select | None, exclude: Select | None) -> list[ParameterRef]:
    if isinstance(params, Tensor):
        params = [params]
    refs = [_of_tensor(i, entry) for i, entry in enumerate(params)]
    if not refs:
        raise ValueError("no parameters to penalize: the iterable is empty (is it a generator that was already used?)")
    if select not in (None, "all", "weights") or exclude is not None:
        given = f"select={select!r}" if exclude is None else f"exclude={exclude!r}"
        raise ValueError(
            f"{given} with tensors: it can only choose among the parameters of a module. Pass the module; or, with "
            "tensors, select='weights' or 'all', or only the tensors to penalize"
        )
    flat = [ref.name for ref in refs if not _is_matrix(ref.tensor)]  # type: ignore[arg-type]
    if select is None and flat and len(refs) > 1:
        warn(
            f"biases or norm scales seem to be among the {len(refs)} tensors, and are penalized too. These have fewer "
            f"than 2 dimensions of size above 1: {first_names(flat)}. Give the module or select='weights' to leave "
            "them out, or select='all' to silence this warning"
        )
    if select == "weights":
        refs = [ref for ref in refs if is_weight(ref, ref.key, ref.tensor)]  # type: ignore[arg-type]
        if not refs:
            raise ValueError(
                "select='weights' leaves none of the tensors: all have fewer than 2 dimensions of size above 1"
            )
    return refs


def _of_tensor(index: int, entry: object) -> ParameterRef:
    name, tensor = entry if isinstance(entry, tuple) and len(entry) == 2 else (str(index), entry)
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise TypeError(
            f"entry {index} of params is {entry!r}; params must be a module, or an iterable of tensors, of "
            "(name, tensor), or of dicts with a 'params'"
        )
    if not tensor.is_leaf:
        raise ValueError(
            f"tensor {name!r} is not a leaf: it was computed from other tensors, so an update of it would be lost. "
            "Pass the parameters from which it was computed"
        )
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}; it must be floating point or complex")
    return tensor_ref(name, tensor)
