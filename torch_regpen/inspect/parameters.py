"""The parameters of a penalty or of a model, where they are used, and which of their units are dead."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..distributed.fsdp import unsharded_to_sharded
from ..groups.grouping import Grouping
from ..ops.zero_groups import zero_groups
from ..penalties.base import Penalty
from ..penalties.lookup import ParameterRef
from ..penalties.rules import Select
from ..penalties.selection import Selection
from ..penalties.units import grouping_of, recurrent_partner

__all__ = ["ParameterUse"]


class ParameterUse(NamedTuple):
    """A parameter and the places where it is used: several, if layers share it.

    Attributes:
        name: its qualified name at the first of these places. If a parameter of another model in a sum has that name,
            an underscore follows.
        tensor: the parameter.
        refs: the places.
    """

    name: str
    tensor: Tensor
    refs: list[ParameterRef]

    @property
    def outputs(self) -> Grouping:
        """A group for each of its output units."""
        return grouping_of("output", self.refs[0], self.tensor.shape)

    def dead(self, grouping: Grouping | None = None) -> Tensor:
        """Whether the weights of each unit are all exactly zero; units are the output units, or the given groups."""
        w, ref = self.tensor, self.refs[0]
        length = ref.length_of(self.name)
        if length is not None:  # weight_norm: a weight whose length is zero is zero
            w = w.masked_fill(length == 0, 0)
        if grouping is not None:
            return zero_groups(w, grouping)
        dead = zero_groups(w, self.outputs)
        other = recurrent_partner(ref)
        # A unit of a recurrent layer is dead if it gets nothing from the input and nothing from the step before.
        return dead if other is None else dead & zero_groups(other, grouping_of("output", ref, other.shape))


def find_parameters(
    source: Penalty | nn.Module, select: Select | None = None, default: Select = "all"
) -> list[ParameterUse]:
    """The parameters of a penalty, or those of a model that `select` chooses, looked up now.

    Args:
        source: the penalty, or the model.
        select: which parameters of a model, as a penalty takes it.
        default: what `select=None` means.

    Raises:
        TypeError: `source` is neither a penalty nor a model.
        ValueError: `select` matches nothing, or is given with a penalty.
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
        places = [place for part in source.parts for place in part.places()]
    else:
        places = [(ref, *found) for ref in Selection(source, select, default=default).refs for found in ref.read()]
    sharded = unsharded_to_sharded()
    found: dict[int, ParameterUse] = {}
    taken: set[str] = set()
    for ref, name, registered in places:
        tensor = sharded.get(id(registered), registered)
        if id(tensor) not in found:
            while name in taken:
                name += "_"
            taken.add(name)
            found[id(tensor)] = ParameterUse(name, tensor, [])
        found[id(tensor)].refs.append(ref)
    return list(found.values())
