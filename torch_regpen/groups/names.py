"""What a user's `groups` means."""

from __future__ import annotations

from dataclasses import replace

from .coupled import Coupled
from .grouping import Elements, Grouping
from .layouts import Slices, WholeTensor
from .norms import NormGrouping

Groups = str | int | Grouping | Coupled


NAMES = "'output', 'input' and 'tensor'"


def resolve(groups: Groups | None, scale: bool = True) -> Grouping:
    """The grouping that a user's `groups` means for a tensor without a module, or with the layout of a Linear.

    Raises:
        ValueError: an unknown name.
        TypeError: anything but None, a name, an int or a `Grouping`.
    """
    if groups is None:
        return Elements()
    if isinstance(groups, Grouping):
        return groups if scale or not isinstance(groups, NormGrouping) else replace(groups, scale=False)
    if isinstance(groups, int) and not isinstance(groups, bool):
        return Slices(groups, scale=scale)
    if groups == "output":
        return Slices(0, scale=scale)
    if groups == "input":
        return Slices(1, scale=scale)
    if groups == "tensor":
        return WholeTensor(scale=scale)
    if isinstance(groups, Coupled):
        raise TypeError("the groups of Coupled span tensors of a model; give them to a penalty on that model")
    if isinstance(groups, str):
        raise ValueError(f"groups={groups!r}: the names are {NAMES}; an int names a dimension")
    raise TypeError(f"groups must be None, one of {NAMES}, an int or a Grouping of torch_regpen.groups, not {groups!r}")
