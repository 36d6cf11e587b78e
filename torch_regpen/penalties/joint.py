"""The units of `groups.Coupled` among the selected parameters, each set of units as one `Joint`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..distributed.shards import DTensor
from ..groups import Coupled
from ..ops.terms import Joint
from .coupling import UnitSet, coupled_units
from .lookup import ParameterRef, Structure
from .rules import is_weight

__all__ = ["CoupledUnits"]


class CoupledUnits:
    """The units of a model, found anew where its layers were replaced or have changed their shape.

    Args:
        coupled: the model and its example inputs; `left` is filled in.
    """

    def __init__(self, coupled: Coupled) -> None:
        self._coupled = coupled
        self._structure: Structure | None = None
        self._shapes: list[Any] = []
        self._sets: list[UnitSet] = []

    def sets(self) -> list[UnitSet]:
        """All sets of units."""
        model = self._coupled.model
        shapes = [parameter.shape for parameter in model.parameters()]
        if self._structure is None or not self._structure.holds() or shapes != self._shapes:
            self._sets, self._coupled.left = coupled_units(model, self._coupled.example_inputs)
            self._structure, self._shapes = Structure(model), shapes
        return self._sets

    def selected(
        self, selected: list[ParameterRef], every: list[ParameterRef]
    ) -> Iterator[tuple[UnitSet, list[ParameterRef]]]:
        """The sets all of whose weights are selected, with the refs of all their parameters.

        Args:
            selected: where the selected parameters are.
            every: where all parameters of the model are.
        """
        refs = {(ref.owner, ref.key): ref for ref in every}
        chosen = {(ref.owner, ref.key) for ref in selected}
        for units in self.sets():
            places = [(member.module, member.key) for member in units.members]
            missing = [member.key for member, place in zip(units.members, places, strict=True) if place not in refs]
            if missing:
                raise ValueError(
                    f"the units of {units.name!r} have parameters that are not in the penalized module: {missing}. "
                    "Give Coupled the model that the penalty is on"
                )
            weights = [place for place in places if _is_weight(refs[place], place[1])]
            if chosen.issuperset(weights):
                yield units, [refs[place] for place in places]
            elif not chosen.isdisjoint(weights):
                others = ", ".join(refs[place].name for place in weights if place not in chosen)
                self._coupled.left[units.name] = f"its units are also written by {others}, which select leaves out"


def joint_of(units: UnitSet, refs: list[ParameterRef]) -> Joint:
    """The parameters of a set of units, as they are now.

    Raises:
        ValueError: one of them is sharded.
    """
    names, parameters = [], []
    for member, ref in zip(units.members, refs, strict=True):
        parameter: Any = member.module._parameters[member.key]
        if isinstance(parameter, DTensor):
            raise ValueError(f"parameter {ref.name!r} is sharded; Coupled groups take whole tensors")
        names.append(ref.name)
        parameters.append(parameter)
    indices = [member.index.to(p.device) for member, p in zip(units.members, parameters, strict=True)]
    return Joint(parameters, [member.dim for member in units.members], indices, names)


def _is_weight(ref: ParameterRef, key: str) -> bool:
    owner: nn.Module = ref.owner  # type: ignore[assignment]
    parameter: Tensor = owner._parameters[key]  # type: ignore[assignment]
    return is_weight(ref, key, parameter)
