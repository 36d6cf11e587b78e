"""The center and the factors on lambda (`weights`) of each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import full_tensor, shard_like
from ..groups import NM, Elements, Grouping, SingularValues
from ..utils import first_names
from .lookup import ParameterRef, spellings

__all__ = ["center_sums", "check_center", "checked_center", "checked_weights", "entries_by_parameter", "stored_for"]


def entries_by_parameter(
    refs: Iterable[ParameterRef], given: Mapping[str, Tensor], argument: str
) -> Iterator[tuple[ParameterRef, str, Tensor, Tensor | None]]:
    """Yield each parameter with the entry of `given` under any of its names, or None. Shared parameters occur once.

    Args:
        refs: the locations of the parameters.
        given: the argument of the user, a dict from name to tensor.
        argument: the name of that argument: "center" or "weights".

    Raises:
        TypeError: `given` is not a mapping.
        ValueError: `weights` has a name that is not among the parameters.
    """
    if not isinstance(given, Mapping):
        allowed = "'initial' or a state dict" if argument == "center" else "a dict of name to tensor"
        raise TypeError(f"{argument} must be {allowed}, but got {given!r}")
    found: dict[int, tuple[ParameterRef, str, Tensor]] = {}
    names: dict[int, list[str]] = {}  # a shared parameter has several names
    for ref in refs:
        for name, tensor in ref.read():
            found.setdefault(id(tensor), (ref, name, tensor))
            names.setdefault(id(tensor), []).extend([*spellings(name), *spellings(ref.name)])
    known = {name for called in names.values() for name in called}
    unknown = sorted(key for key in given if known.isdisjoint(spellings(key)))
    if unknown and argument == "weights":
        shown = first_names(map(repr, unknown))
        raise ValueError(f"weights has names that are not among the penalized parameters: {shown}")
    given = {**{spellings(key)[-1]: entry for key, entry in given.items()}, **given}
    for key, (ref, name, tensor) in found.items():
        yield ref, name, tensor, next((given[called] for called in names[key] if called in given), None)


def checked_center(name: str, parameter: Tensor, entry: Tensor | None) -> Tensor:
    """Return a copy of the center of a parameter.

    Raises:
        ValueError: it is missing or has another shape.
    """
    if entry is None:
        raise ValueError(f"center has nothing for parameter {name!r}")
    if entry.shape != parameter.shape:
        raise ValueError(f"center for {name!r} has shape {tuple(entry.shape)}, but must have {tuple(parameter.shape)}")
    return entry.detach().to(parameter.device, copy=True)


def take_centers(refs: list[ParameterRef], center: Any) -> None:
    """Store a copy of the center of each parameter: its weights now (`"initial"`), or its entry in a state dict."""
    if isinstance(center, str) and center == "initial":
        for ref in refs:
            for name, tensor in ref.read():
                ref.centers[name] = checked_center(name, tensor, tensor)
        return
    for ref, name, tensor, entry in entries_by_parameter(refs, center, "center"):
        ref.centers[name] = checked_center(name, tensor, entry)


def checked_weights(name: str, parameter: Tensor, grouping: Grouping, entry: Tensor) -> Tensor:
    """Return a copy of the factors on lambda of a parameter, in the shape of its magnitudes.

    Raises:
        ValueError: they have the wrong shape, are negative or not finite, or the groups do not support them.
    """
    if isinstance(grouping, SingularValues | NM):
        what = "singular values" if isinstance(grouping, SingularValues) else f"groups={grouping}"
        raise ValueError(f"weights for {name!r} are not supported with {what}")
    shape = grouping.magnitudes_shape(parameter.shape)
    wanted = tuple(shape) if isinstance(grouping, Elements) else (shape.numel(),)
    if tuple(entry.shape) != wanted:
        raise ValueError(f"weights for {name!r} have shape {tuple(entry.shape)}, but must have {wanted}")
    if not bool((entry >= 0).all() & entry.isfinite().all()):
        raise ValueError(f"weights for {name!r} must be 0 or more and finite")
    return entry.detach().to(parameter.device, copy=True).reshape(shape)


def stored_for(ref: ParameterRef, stored: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor | None:
    """Return the stored tensor of a parameter, moved to its device and sharded like it; None if nothing is stored.

    If the parameter was parametrized later, the tensor is found by the name that the parameter had before.

    Args:
        ref: the location of the parameter.
        stored: the centers or the weights at this location, by name.
        name: the qualified name of the parameter.
        parameter: the parameter.

    Raises:
        ValueError: something is stored, but for another parameter.
    """
    key = ref.name if name not in stored and (name == ref.name or name.endswith(".original")) else name
    if stored and key not in stored:
        raise ValueError(
            f"parameter {name!r} was added after the penalty copied its center or weights; build a new penalty"
        )
    if key not in stored:
        return None
    stored[key] = shard_like(stored[key], parameter)
    return stored[key]


def center_sums(refs: Iterable[ParameterRef]) -> Tensor:
    """The sum and the norm of all centers, in float64, as a checksum."""
    sums = torch.zeros(2, dtype=torch.float64)
    for center in (center for ref in refs for center in ref.centers.values()):
        x: Any = full_tensor(center.detach().abs() if center.is_complex() else center.detach()).double()
        sums += torch.stack([x.sum(), x.square().sum()]).cpu()
    sums[1] = sums[1].sqrt()
    return sums


def check_center(saved: Tensor, refs: Iterable[ParameterRef]) -> None:
    """Raise `ValueError` if the checksum of a saved center differs from that of the centers at `refs`."""
    now = center_sums(refs)
    if not torch.allclose(saved, now, rtol=0, atol=1e-6 * max(float(now[1]), 1e-30)):
        raise ValueError(
            "the penalty was saved with a different center: center='initial' means the weights when the penalty was "
            "constructed, not the weights loaded later. Pass the state dict of the original weights as center="
        )
