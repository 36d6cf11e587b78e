"""The units of `groups.Coupled` whose weights are selected."""

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
    """The units of a model. They are found again if a layer was replaced or has changed its shape.

    A set of units is a list of parameters that have their units in common, such as a layer, its norm and their biases.

    Args:
        coupled: the model and its example inputs. The attribute `left` is written.
    """

    def __init__(self, coupled: Coupled) -> None:
        self._coupled = coupled
        self._structure: Structure | None = None
        self._shapes: list[Any] = []
        self._sets: list[UnitSet] = []

    def sets(self) -> list[UnitSet]:
        """All sets of units of the model."""
        model = self._coupled.model
        shapes = [parameter.shape for parameter in model.parameters()]
        if self._structure is None or not self._structure.holds() or shapes != self._shapes:
            self._sets, self._coupled.left = coupled_units(model, self._coupled.example_inputs)
            self._structure, self._shapes = Structure(model), shapes
        return self._sets

    def selected(
        self, selected: list[ParameterRef], every: list[ParameterRef]
    ) -> Iterator[tuple[UnitSet, list[ParameterRef]]]:
        """Yield each set of units whose weights are all selected, with the locations of its parameters.

        Args:
            selected: the locations of the selected parameters.
            every: the locations of all parameters of the model.

        Raises:
            ValueError: a parameter of the units is not in the penalized module.
        """
        refs = {(ref.owner, ref.key): ref for ref in every}
        chosen = {(ref.owner, ref.key) for ref in selected}
        for units in self.sets():
            places = [(member.module, member.key) for member in units.members]
            missing = [member.key for member, place in zip(units.members, places, strict=True) if place not in refs]
            if missing:
                raise ValueError(
                    f"the units of {units.name!r} have parameters that are not in the penalized module: {missing}. "
                    "Pass the same model to Coupled and to the penalty"
                )
            weights = [place for place in places if _is_weight(refs[place], place[1])]
            if chosen.issuperset(weights):
                yield units, [refs[place] for place in places]
            elif not chosen.isdisjoint(weights):
                others = ", ".join(refs[place].name for place in weights if place not in chosen)
                self._coupled.left[units.name] = f"its units are also written by {others}, which select leaves out"


def joint_of(units: UnitSet, refs: list[ParameterRef]) -> Joint:
    """The current parameters of a set of units, as a `Joint`.

    Raises:
        ValueError: a parameter is sharded.
    """
    names, parameters = [], []
    for member, ref in zip(units.members, refs, strict=True):
        parameter: Any = member.module._parameters[member.key]
        if isinstance(parameter, DTensor):
            raise ValueError(f"parameter {ref.name!r} is sharded; Coupled groups do not support sharded parameters")
        names.append(ref.name)
        parameters.append(parameter)
    indices = [member.index.to(p.device) for member, p in zip(units.members, parameters, strict=True)]
    return Joint(parameters, [member.dim for member in units.members], indices, names)


def _is_weight(ref: ParameterRef, key: str) -> bool:
    owner: nn.Module = ref.owner  # type: ignore[assignment]
    parameter: Tensor = owner._parameters[key]  # type: ignore[assignment]
    return is_weight(ref, key, parameter)
