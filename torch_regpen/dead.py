"""Where in a model the weights stand, and which of their units are dead."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from . import sharding
from .groups import Grouping
from .lookup import Slot
from .penalty import Penalty
from .selection import Select, Selection
from .units import grouping_of, recurrent_partner
from .zeros import zero_groups

__all__ = ["Place", "places"]


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
