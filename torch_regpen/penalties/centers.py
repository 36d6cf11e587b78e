"""What a penalty keeps for each parameter beside its lambda: a center, and factors on lambda."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import full_tensor, shard_like
from ..groups import Elements, Grouping, SingularValues
from .lookup import ParameterRef, spellings

__all__ = ["center_sums", "checked_center", "checked_weights", "entries_by_parameter", "stored_for"]


def entries_by_parameter(
    refs: Iterable[ParameterRef], given: Mapping[str, Tensor], argument: str
) -> Iterator[tuple[ParameterRef, str, Tensor, Tensor | None]]:
    """Each parameter, shared ones once, and what `given` has for it under any of its names, else None.

    Args:
        refs: where the parameters are.
        given: what the user gave, by name.
        argument: the name of the argument.

    Raises:
        TypeError: `given` is no mapping.
        ValueError: `weights` for a parameter that the penalty does not hold.
    """
    if not isinstance(given, Mapping):
        allowed = "'initial' or a state dict" if argument == "center" else "a dict of name to tensor"
        raise TypeError(f"{argument} must be {allowed}, not {given!r}")
    found: dict[int, tuple[ParameterRef, str, Tensor]] = {}
    names: dict[int, list[str]] = {}  # a shared parameter has several
    for ref in refs:
        for name, tensor in ref.read():
            found.setdefault(id(tensor), (ref, name, tensor))
            names.setdefault(id(tensor), []).extend([*spellings(name), *spellings(ref.name)])
    known = {name for called in names.values() for name in called}
    unknown = sorted(key for key in given if known.isdisjoint(spellings(key)))
    if unknown and argument == "weights":
        raise ValueError(f"weights has {unknown}, which the penalty does not hold")
    given = {**{spellings(key)[-1]: entry for key, entry in given.items()}, **given}
    for key, (ref, name, tensor) in found.items():
        yield ref, name, tensor, next((given[called] for called in names[key] if called in given), None)


def checked_center(name: str, parameter: Tensor, entry: Tensor | None) -> Tensor:
    """A copy of the center of a parameter.

    Raises:
        ValueError: there is none, or it has another shape.
    """
    if entry is None:
        raise ValueError(f"center has nothing for parameter {name!r}")
    if entry.shape != parameter.shape:
        raise ValueError(f"center for {name!r} has shape {tuple(entry.shape)}, the parameter {tuple(parameter.shape)}")
    return entry.detach().to(parameter.device, copy=True)


def checked_weights(name: str, parameter: Tensor, grouping: Grouping, entry: Tensor) -> Tensor:
    """A copy of the factors on lambda of a parameter, in a shape that broadcasts to its magnitudes.

    Raises:
        ValueError: they have another shape, are negative or not finite, or are for singular values.
    """
    if isinstance(grouping, SingularValues):
        raise ValueError(f"weights for {name!r}: singular values take none")
    shape = grouping.magnitudes_shape(parameter.shape)
    wanted = tuple(shape) if isinstance(grouping, Elements) else (shape.numel(),)
    if tuple(entry.shape) != wanted:
        raise ValueError(f"weights for {name!r} have shape {tuple(entry.shape)}; allowed is {wanted}")
    if not bool((entry >= 0).all() & entry.isfinite().all()):
        raise ValueError(f"weights for {name!r} must be 0 or more and finite")
    return entry.detach().to(parameter.device, copy=True).reshape(shape)


def stored_for(ref: ParameterRef, stored: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor | None:
    """What is stored for a parameter, moved to its device and sharded like it; None where nothing is stored.

    A parameter that was parametrized since is found by its plain name.

    Raises:
        ValueError: another parameter has taken the place of the one for which it was stored.
    """
    key = ref.name if name not in stored and (name == ref.name or name.endswith(".original")) else name
    if stored and key not in stored:
        raise ValueError(
            f"parameter {name!r} was not there when the penalty took its center or weights; build the penalty anew"
        )
    if key not in stored:
        return None
    stored[key] = shard_like(stored[key], parameter)
    return stored[key]


def center_sums(refs: Iterable[ParameterRef]) -> Tensor:
    """The sum and the norm of all centers, in float64: a checksum that tells one center from another."""
    sums = torch.zeros(2, dtype=torch.float64)
    for center in (center for ref in refs for center in ref.centers.values()):
        x: Any = full_tensor(center.detach().abs() if center.is_complex() else center.detach()).double()
        sums += torch.stack([x.sum(), x.square().sum()]).cpu()
    sums[1] = sums[1].sqrt()
    return sums
