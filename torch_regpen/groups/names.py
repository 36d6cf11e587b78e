"""Turn the argument `groups` of a penalty into a grouping."""

from __future__ import annotations

from dataclasses import replace

from .coupled import Coupled
from .grouping import Elements, Grouping
from .layouts import Slices, WholeTensor
from .norms import NormGrouping

Groups = str | int | Grouping | Coupled


NAMES = "'output', 'input' and 'tensor'"


def resolve(groups: Groups | None, scale: bool = True) -> Grouping:
    """Return the grouping that `groups` means for a bare tensor, or for a weight with the layout of `nn.Linear`.

    Args:
        groups: None (elements), `"output"` (dimension 0), `"input"` (dimension 1), `"tensor"` (one group), an int (that
            dimension), or a `Grouping`.
        scale: see `NormGrouping`.

    Raises:
        ValueError: `groups` is an unknown name.
        TypeError: `groups` has another type, or is `Coupled`, which needs a model.

    Example:
        >>> from torch_regpen.groups import resolve
        >>> resolve("input")
        Slices(scale=True, dim=1)
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
        raise TypeError("Coupled groups span several tensors of a model; pass them to a penalty on that model")
    if isinstance(groups, str):
        raise ValueError(f"unknown groups={groups!r}: the names are {NAMES}; an int is a dimension")
    raise TypeError(
        f"groups must be None, one of {NAMES}, an int or a Grouping from torch_regpen.groups, but got {groups!r}"
    )
