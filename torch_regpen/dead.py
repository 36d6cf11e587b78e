"""Which groups of weights are zero throughout, and where in a model the weights stand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import sharding
from .groups import Grouping, NormGrouping, Slices, WholeTensor, working_dtype
from .lookup import Slot
from .penalty import Penalty
from .selection import Select, Selection
from .sharding import DTensor, Partial
from .units import grouping_of, recurrent_partner

__all__ = ["Place", "places", "zero_groups"]

ORDERED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8)


class Place(NamedTuple):
    """A parameter and where it stands: in several slots, if layers share it.

    Attributes:
        name: its qualified name in the first of them; of a second model in a sum, with an underscore if it is taken.
        tensor: the parameter.
        slots: where it stands.
    """

    name: str
    tensor: Tensor
    slots: list[Slot]

    @property
    def outputs(self) -> Grouping:
        """A group for each of its output units."""
        return grouping_of("output", self.slots[0], self.tensor.shape)

    def dead(self, grouping: Grouping | None = None) -> Tensor:
        """A bool for each unit: whether its weights are all exactly zero. Units are the output units, or `grouping`."""
        w, slot = self.tensor, self.slots[0]
        length = slot.length_of(self.name)
        if length is not None:  # weight_norm: where the length is zero, the weight is
            w = w.masked_fill(length == 0, 0)
        if grouping is not None:
            return zero_groups(w, grouping)
        dead = zero_groups(w, self.outputs)
        other = recurrent_partner(slot)
        # A unit of a recurrent layer lives on what comes from the input, or from the step before.
        return dead if other is None else dead & zero_groups(other, grouping_of("output", slot, other.shape))


def places(source: Penalty | nn.Module, select: Select | None = None, default: Select = "all") -> list[Place]:
    """The parameters of a penalty, or those of a model that `select` means, where they stand now.

    Args:
        source: the penalty, or the model.
        select: as a penalty takes it.
        default: what None means.

    Raises:
        TypeError: `source` is neither.
        ValueError: `select` matches nothing, or is given beside a penalty.
    """
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"given a {type(source).__name__}; allowed are a penalty (of several, the sum p + q) and an nn.Module"
        )
    if isinstance(source, Penalty):
        if select is not None:
            raise ValueError(
                f"select={select!r} beside a penalty: it chooses among a model's parameters, and a penalty has chosen. "
                "Give the model, or a penalty on those that you mean"
            )
        selections = [selection for part in source.parts for selection in part._selections]
    else:
        selections = [Selection(source, select, default=default)]
    slots = []
    for selection in selections:
        selection.refresh()
        slots += selection.slots
    stand_ins = sharding.stand_ins()
    found: dict[int, Place] = {}
    taken: set[str] = set()
    for slot in slots:
        for name, standing in slot.read():
            tensor = stand_ins.get(id(standing), standing)
            if id(tensor) not in found:
                while name in taken:
                    name += "_"
                taken.add(name)
                found[id(tensor)] = Place(name, tensor, [])
            found[id(tensor)].slots.append(slot)
    return list(found.values())


@torch.no_grad()
def zero_groups(w: Tensor, grouping: Grouping) -> Tensor:
    """Whether each group is exactly zero: a bool for each, in their order; of a sharded tensor on every rank for all.

    Norms would not do: the squares of small numbers are zero too.
    """
    if not isinstance(w, DTensor):
        return ~_alive(w, grouping).flatten().bool()
    if not isinstance(grouping, Slices | WholeTensor):
        return zero_groups(w.full_tensor(), grouping)
    inside = grouping.dims(w.ndim)
    placements = [
        placement if placement.is_replicate() or placement.dim % w.ndim not in inside else Partial("max")  # type: ignore[attr-defined]
        for placement in w.placements
    ]
    shape = grouping.magnitudes_shape(w.shape)
    stride = torch.empty(shape, device="meta").stride()
    flags = _alive(w.to_local(), grouping)
    whole = DTensor.from_local(flags, w.device_mesh, placements, run_check=False, shape=shape, stride=stride)
    return ~whole.full_tensor().flatten().bool()


def _alive(w: Tensor, grouping: Grouping) -> Tensor:
    """1 where a group has an element that is not zero, else 0, in a shape that broadcasts to the view of the groups."""
    if not isinstance(grouping, NormGrouping):
        return (grouping.polar(w)[0] != 0).float()
    x = grouping.view(w)
    dims = grouping.dims(x.ndim)
    if x.is_complex() or x.dtype not in ORDERED:
        x = (x.abs() if x.is_complex() else x).to(working_dtype(x.dtype))
    if not x.numel():
        return torch.zeros(grouping.magnitudes_shape(w.shape), device=w.device)
    # By far the fastest of what is exact and makes no copy, if the first dimension goes first and by itself.
    lowest = highest = x
    for reduced in filter(None, (dims[:1], dims[1:]) if 0 in dims else (dims,)):
        lowest, highest = lowest.amin(reduced, keepdim=True), highest.amax(reduced, keepdim=True)
    return ((lowest != 0) | (highest != 0)).float()
