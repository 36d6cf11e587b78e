"""The units of `groups.Coupled` whose weights are selected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..distributed.shards import DTensor
from ..groups import Coupled, Grouping, Slices
from ..ops.terms import Joint
from ..utils import first_names, warn
from .coupling import UnitSet, coupled_units
from .lookup import ParameterRef, Structure
from .rules import is_weight
from .selection import Selection, owned_ids

__all__ = ["CoupledUnits"]

LEFT_OUT = "select leaves out"


class CoupledUnits:
    """The units of a model. They are found again after a layer is replaced or changes its shape.

    A set of units is a list of parameters with the same units, such as a layer, its norm and their biases.

    Args:
        coupled: the model and its example inputs. Its attribute `left` is set.
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

    def grouping(self, scale: bool) -> Grouping:
        """A group for each row of the matrix of a set of units."""
        return Slices(0, scale=scale and self._coupled.scale)

    def joints(self, selection: Selection, frozen: bool) -> Iterator[tuple[str, Joint]]:
        """The name and the tensors of each set of units whose weights are all selected.

        Args:
            selection: the selected parameters. If it is restricted to an optimizer, the optimizer must own all tensors.
            frozen: include sets with frozen parameters.
        """
        owned = None if selection.optimizer is None else owned_ids(selection.optimizer)
        for units, refs in self._selected(selection):
            joint = joint_of(units, refs)
            if not frozen and not all(parameter.requires_grad for parameter in joint.parameters):
                continue
            if owned is None or owned.issuperset(map(id, joint.parameters)):
                yield units.name, joint

    def refs(self, selection: Selection) -> list[ParameterRef]:
        """The locations of all parameters of these sets."""
        return list(dict.fromkeys(ref for _, refs in self._selected(selection) for ref in refs))

    def warn_about_parts(self) -> None:
        """Warn if some units are not penalized because only a part of their weights is selected."""
        partly = [f"{name}: {reason}" for name, reason in self._coupled.left.items() if reason.endswith(LEFT_OUT)]
        if partly:
            shown = first_names(partly, separator="; ")
            warn(f"some units are not penalized because only a part of their weights is selected: {shown}")

    def refuse_nothing(self, selections: list[Selection]) -> None:
        """Raise `ValueError`, because no units are selected; not for a penalty restricted to an optimizer."""
        if not any(selection.optimizer for selection in selections):
            reasons = [f"{name}: {reason}" for name, reason in self._coupled.left.items()]
            raise ValueError(
                f"no unit of {type(self._coupled.model).__name__} can be penalized. The layers, with the reasons: "
                + first_names(reasons, most=8, separator="; ")
            )

    def _selected(self, selection: Selection) -> Iterator[tuple[UnitSet, list[ParameterRef]]]:
        """The sets of units whose weights are all selected, with the locations of their parameters.

        Raises:
            ValueError: a parameter of the units is not in the penalized module.
        """
        refs = {(ref.owner, ref.key): ref for ref in selection.every}
        chosen = {(ref.owner, ref.key) for ref in selection.refs}
        for units in self.sets():
            places = [(member.module, member.key) for member in units.members]
            missing = [key for module, key in places if (module, key) not in refs]
            if missing:
                raise ValueError(
                    f"the units of {units.name!r} have parameters that are not in the penalized module: "
                    f"{first_names(missing)}. Give Coupled the model that the penalty is on"
                )
            weights = [place for place in places if _is_weight(refs[place], place[1])]
            if chosen.issuperset(weights):
                yield units, [refs[place] for place in places]
            elif not chosen.isdisjoint(weights):
                others = first_names(refs[place].name for place in weights if place not in chosen)
                self._coupled.left[units.name] = f"its units are also written by {others}, which {LEFT_OUT}"


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
