"""The parameters of a penalty or a model, the places where they are used, and their dead units."""

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
    """A parameter and the places where it is used. It has several if layers share it.

    Attributes:
        name: its qualified name at the first place, with an underscore added if a parameter of another model in a sum
            has the same name.
        tensor: the parameter.
        refs: the places.
    """

    name: str
    tensor: Tensor
    refs: list[ParameterRef]

    @property
    def outputs(self) -> Grouping:
        """The grouping with one group for each output unit."""
        return grouping_of("output", self.refs[0], self.tensor.shape)

    def dead(self, grouping: Grouping | None = None) -> Tensor:
        """Whether the weights of each output unit, or of each given group, are all exactly zero."""
        w, ref = self.tensor, self.refs[0]
        length = ref.length_of(self.name)
        if length is not None:  # weight_norm: a weight whose length is zero is zero
            w = w.masked_fill(length == 0, 0)
        if grouping is not None:
            return zero_groups(w, grouping)
        dead = zero_groups(w, self.outputs)
        other = recurrent_partner(ref)
        # A unit of a recurrent layer is dead if its weights for the input and for the previous step are all zero.
        return dead if other is None else dead & zero_groups(other, grouping_of("output", ref, other.shape))


def find_parameters(
    source: Penalty | nn.Module, select: Select | None = None, default: Select = "all"
) -> list[ParameterUse]:
    """The current parameters of a penalty, or those of a model that `select` chooses.

    Args:
        source: the penalty, or the model.
        select: the parameters of a model, in the forms of a penalty's `select`.
        default: the meaning of `select=None`.

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
                f"select={select!r} with a penalty: select chooses among a model's parameters, but a penalty has "
                "already chosen. Give the model, or a penalty on the parameters that you mean"
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
