"""Centers, and factors on lambda."""

from __future__ import annotations

from torch import Tensor

from ..distributed.shards import shard_like
from ..groups.grouping import Elements, Grouping
from ..groups.singular_values import SingularValues
from .lookup import ParameterRef


def _beside(ref: ParameterRef, kept: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor | None:
    """What is kept for a parameter, moved to where it is now; by its plain name if it was parametrized since.

    Raises:
        ValueError: another parameter has taken the place of the one for which it was kept.
    """
    key = ref.name if name not in kept and (name == ref.name or name.endswith(".original")) else name
    if kept and key not in kept:
        raise ValueError(
            f"parameter {name!r} was not there when the penalty took its center or weights; build the penalty anew"
        )
    if key not in kept:
        return None
    kept[key] = shard_like(kept[key], parameter)
    return kept[key]


def _center_of(name: str, parameter: Tensor, entry: Tensor | None) -> Tensor:
    """A copy of the center of a parameter."""
    if entry is None:
        raise ValueError(f"center has nothing for parameter {name!r}")
    if entry.shape != parameter.shape:
        raise ValueError(f"center for {name!r} has shape {tuple(entry.shape)}, the parameter {tuple(parameter.shape)}")
    return entry.detach().to(parameter.device, copy=True)


def _weights_of(name: str, parameter: Tensor, grouping: Grouping, entry: Tensor) -> Tensor:
    """A copy of the factors for a parameter, in a shape that broadcasts to its magnitudes."""
    if isinstance(grouping, SingularValues):
        raise ValueError(f"weights for {name!r}: singular values take none")
    shape = grouping.magnitudes_shape(parameter.shape)
    wanted = tuple(shape) if isinstance(grouping, Elements) else (shape.numel(),)
    if tuple(entry.shape) != wanted:
        raise ValueError(f"weights for {name!r} have shape {tuple(entry.shape)}; allowed is {wanted}")
    if not bool((entry >= 0).all() & entry.isfinite().all()):
        raise ValueError(f"weights for {name!r} must be 0 or more and finite")
    return entry.detach().to(parameter.device, copy=True).reshape(shape)
