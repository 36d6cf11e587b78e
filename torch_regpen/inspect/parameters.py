"""Where in a model the weights stand, and which of their units are dead."""

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
    """A parameter and where it stands: in several refs, if layers share it.

    Attributes:
        name: its qualified name in the first of them; of a second model in a sum, with an underscore if it is taken.
        tensor: the parameter.
        refs: where it stands.
    """

    name: str
    tensor: Tensor
    refs: list[ParameterRef]

    @property
    def outputs(self) -> Grouping:
        """A group for each of its output units."""
        return grouping_of("output", self.refs[0], self.tensor.shape)

    def dead(self, grouping: Grouping | None = None) -> Tensor:
        """A bool for each unit: whether its weights are all exactly zero. Units are the output units, or `grouping`."""
        w, ref = self.tensor, self.refs[0]
        length = ref.length_of(self.name)
        if length is not None:  # weight_norm: where the length is zero, the weight is
            w = w.masked_fill(length == 0, 0)
        if grouping is not None:
            return zero_groups(w, grouping)
        dead = zero_groups(w, self.outputs)
        other = recurrent_partner(ref)
        # A unit of a recurrent layer lives on what comes from the input, or from the step before.
        return dead if other is None else dead & zero_groups(other, grouping_of("output", ref, other.shape))


def find_parameters(
    source: Penalty | nn.Module, select: Select | None = None, default: Select = "all"
) -> list[ParameterUse]:
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
    refs = []
    for selection in selections:
        selection.refresh()
        refs += selection.refs
    stand_ins = unsharded_to_sharded()
    found: dict[int, ParameterUse] = {}
    taken: set[str] = set()
    for ref in refs:
        for name, standing in ref.read():
            tensor = stand_ins.get(id(standing), standing)
            if id(tensor) not in found:
                while name in taken:
                    name += "_"
                taken.add(name)
                found[id(tensor)] = ParameterUse(name, tensor, [])
            found[id(tensor)].refs.append(ref)
    return list(found.values())
