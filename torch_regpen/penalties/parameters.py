"""The penalized parameters of a model, and the term (groups, center, lambda) of each."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..distributed.fsdp import unsharded_to_sharded
from ..groups import NM, Coupled, Grouping, Groups, Heads
from ..ops.batches import TensorBatch, batches
from ..ops.terms import Term, by_tensor
from ..scalar import ScalarL0
from ..utils import first_names
from .cache import TermCache
from .centers import center_sums, check_center, checked_weights, entries_by_parameter, stored_for, take_centers
from .joint import CoupledUnits
from .lookup import ParameterRef
from .param_groups import ParamGroup, as_param_groups, checked_lam
from .rules import Params, Select
from .selection import Selection
from .units import grouping_of

__all__ = ["PenalizedParameters"]

Self = TypeVar("Self", bound="PenalizedParameters")


class PenalizedParameters(nn.Module):
    """Base class of `Penalty`, which explains the arguments: which parameters are penalized, how, and by how much.

    Attributes:
        param_groups: a list with one dict per parameter group; its "lam" can be set at any time.
    """

    compiled = False

    def __init__(
        self,
        params: Params,
        lam: float,
        *,
        select: Select | None = None,
        exclude: Select | None = None,
        groups: Groups | None = None,
        scale: bool = True,
        center: Literal["initial"] | Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(groups, NM) and not isinstance(self, ScalarL0):
            raise ValueError(f"groups={groups} is for L0 alone, not for {type(self).__name__}")
        self.groups = groups
        self.scale = scale
        self.param_groups: list[dict[str, Any]] = []
        self._selections: list[Selection] = []
        self.multipliers: dict[str, Tensor] = {}  # by name, factors on lambda that a schedule sets
        self.seen = {"in_loss": False}  # set in backward; RegularizedOptimizer uses it to warn about double counting
        default, default_select = checked_lam(lam), "attention" if isinstance(groups, Heads) else "weights"
        for group in as_param_groups(params):
            self.param_groups.append(ParamGroup(group, lam=group.get("lam", default)))
            chosen = group.get("select", select), group.get("exclude", exclude)
            self._selections.append(Selection(group["params"], *chosen, default=default_select))
        self._units = None if not isinstance(groups, Coupled) else CoupledUnits(groups)
        if self._units is not None and (center is not None or weights is not None):
            raise ValueError("groups=Coupled(...) does not support center or weights")
        self._centered = False
        self._cache = TermCache()
        self.terms(frozen=True)  # raises if a parameter cannot be divided into its groups
        if self._units is not None:
            self._units.warn_about_parts()
        if center is not None:
            take_centers(self._refs(), center)
            self._centered = True
        if weights is not None:
            for ref, name, tensor, entry in entries_by_parameter(self._refs(), weights, "weights"):
                if entry is not None:
                    ref.weights[name] = checked_weights(name, tensor, self._grouping(ref, name, tensor), entry)

    @property
    def lam(self) -> float:
        """Lambda of the first parameter group. Setting it sets the lambda of all parameter groups."""
        return float(self.param_groups[0]["lam"])

    @lam.setter
    def lam(self, lam: float) -> None:
        for group in self.param_groups:
            group["lam"] = lam

    def terms(self, *, frozen: bool = False) -> list[Term]:
        """The terms of the current parameters. A shared parameter occurs once.

        Args:
            frozen: include the terms of frozen parameters.

        Raises:
            ValueError: a parameter is in two parameter groups, cannot be divided into its groups, or is gone.
        """
        for selection in self._selections:
            selection.refresh()
        if frozen or torch.compiler.is_compiling():
            return self._find_terms(self, frozen)
        if not self._cache.is_valid(key := self._cache_key()):
            locations = self._locations()
            if locations is None:
                return self._find_terms(self, frozen)
            self._cache.fill(self._find_terms(self._shallow_copy(), frozen), key, locations)
        return self._cache.terms

    def batches(self, *, frozen: bool = False) -> list[TensorBatch]:
        """The terms, in as few batches as possible.

        Args:
            frozen: if all parameters are frozen, as in an averaged model, return their batches.
        """
        terms = self.terms() or self.terms(frozen=frozen)
        if self._cache.terms is terms:
            self._cache.batches = self._cache.batches or batches(terms)
        return self._cache.batches if self._cache.terms is terms else batches(terms)

    def compile(self) -> None:
        """Run operations on large tensors as kernels of torch.compile; see `compile` of `RegularizedOptimizer`."""
        for part in self.modules():
            if isinstance(part, PenalizedParameters):
                part.compiled = True

    def factors(self, grouping: Grouping) -> list[tuple[Grouping, float]]:
        """The groupings on which `rho` acts, each with its share of lambda; SparseGroupLasso has two."""
        return [(grouping, 1.0)]

    def named_parameters_penalized(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, parameter)` for each penalized parameter: shared ones once, frozen ones not at all.

        Example:
            >>> import torch, torch_regpen
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.LayerNorm(2))
            >>> [name for name, _ in torch_regpen.L1(model, lam=0.1).named_parameters_penalized()]
            ['0.weight']
        """
        for terms in by_tensor(self.terms()):
            yield from terms[0].named_parameters

    def places(self) -> Iterator[tuple[ParameterRef, str, Tensor]]:
        """Yield each place where a parameter is used, its name there, and the parameter; frozen ones too."""
        for selection in self._selections:
            selection.refresh()
        for ref in self._refs():
            here = ref.read() if self._units is None else ((name, tensor) for _, name, tensor in ref.tensors())
            yield from ((ref, name, tensor) for name, tensor in here)

    def restricted_to(self: Self, optimizer: torch.optim.Optimizer) -> Self:
        """The same penalty, with shared lambdas, on the parameters that `optimizer` owns.

        Raises:
            ValueError: it owns none of them.
        """
        restricted = self._shallow_copy()
        restricted._selections = [selection.restricted_to(optimizer) for selection in self._selections]
        if not any(selection.refs for selection in restricted._selections):
            raise ValueError(f"{type(optimizer).__name__} owns none of the parameters of {self!r}")
        return restricted

    def extra_repr(self) -> str:
        """The text inside the parentheses of the repr."""
        names = [name for name, _ in self.named_parameters_penalized()]
        lams = ", ".join(f"{group['lam']:g}" for group in self.param_groups)
        groups = "" if self.groups is None else f"groups={self.groups!r}, "
        return f"lam={lams}, {groups}{len(names)} parameters: {first_names(names)}"

    def get_extra_state(self) -> Tensor:
        """The lambda of each parameter group in float64, followed by a checksum of the center if there is one."""
        lams = torch.tensor([group["lam"] for group in self.param_groups], dtype=torch.float64)
        return torch.cat([lams, center_sums(self._refs())]) if self._centered else lams

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the lambdas from a state dict; raise ValueError if its groups or its center differ."""
        groups = len(self.param_groups)
        if self._centered and len(state) == groups + 2:
            check_center(state[groups:].cpu(), self._refs())
            state = state[:groups]
        if len(state) != groups:
            raise ValueError(f"the state dict has lambdas for {len(state)} groups, the penalty has {groups}")
        for group, lam in zip(self.param_groups, state.tolist(), strict=True):
            group["lam"] = lam

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint saved before the penalty was part of the model has no lambda; it loads in strict mode too.
        if f"{prefix}_extra_state" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _refs(self) -> list[ParameterRef]:
        return [ref for selection in self._selections for ref in self._refs_of(selection)]

    def _refs_of(self, selection: Selection) -> list[ParameterRef]:
        return selection.refs if self._units is None else self._units.refs(selection)

    def _cache_key(self) -> list[Any]:
        """What the terms depend on besides the parameters: all attributes, and what is selected."""
        attributes = [value for name, value in vars(self).items() if name != "_cache"]  # the cache would hold itself
        return [*attributes, *self.param_groups, *map(attrgetter("refs"), self._selections)]

    def _locations(self) -> list[tuple[dict[str, Any], str]] | None:
        """The dict and key that hold each parameter; None if the terms depend on more and cannot be cached."""
        if type(self).factors is not PenalizedParameters.factors or unsharded_to_sharded():
            return None
        locations: list[Any] = [ref.location() for ref in self._refs()]
        return None if None in locations else locations

    def _shallow_copy(self: Self) -> Self:
        """A copy that shares everything but the cache. Cached terms refer to it, to avoid a reference cycle."""
        shallow = copy.copy(self)
        shallow._cache = TermCache()
        return shallow

    def _find_terms(self, penalty: Any, frozen: bool) -> list[Term]:
        if self._units is not None:
            return self._joint_terms(penalty, self._units, frozen)
        seen: dict[int, int] = {}  # from the id of a parameter to the index of its parameter group
        named: dict[str, int] = {}  # from the distinct name of a parameter to its id
        found = []
        sharded = unsharded_to_sharded()
        for index, (group, selection) in enumerate(zip(self.param_groups, self._selections, strict=True)):
            for ref in selection.refs:
                for name, tensor in ref.read():
                    tensor = sharded.get(id(tensor), tensor)
                    if id(tensor) in seen:
                        if seen[id(tensor)] != index:
                            raise ValueError(
                                f"parameter {name!r} is in groups {seen[id(tensor)]} and {index}; put it in one only"
                            )
                        continue
                    distinct = name  # underscores tell apart parameters of the same name in two modules
                    while named.setdefault(distinct, id(tensor)) != id(tensor):
                        distinct += "_"
                    if not ref.frozen(name, tensor) or frozen:  # the call notes the registered parameter
                        seen[id(tensor)] = index
                        found += self._terms_of(penalty, ref, name, distinct, tensor, group)
        return found

    def _joint_terms(self, penalty: Any, units: CoupledUnits, frozen: bool) -> list[Term]:
        """The terms of groups that span tensors: one matrix, with a row for each unit, per set of units."""
        multipliers = self.multipliers
        found = [
            Term(name, joint.placeholder, penalty, part, group, factor, joint=joint, multiplier=multipliers.get(name))
            for group, selection in zip(self.param_groups, self._selections, strict=True)
            for name, joint in units.joints(selection, frozen)
            for part, factor in self.factors(units.grouping(self.scale))
        ]
        if not found and frozen:
            units.refuse_nothing(self._selections)
        return found

    def _terms_of(
        self, penalty: Any, ref: ParameterRef, name: str, distinct: str, tensor: Tensor, group: dict[str, Any]
    ) -> list[Term]:
        grouping = self._grouping(ref, name, tensor)
        weights = stored_for(ref, ref.weights, name, tensor)
        center = stored_for(ref, ref.centers, name, tensor)
        if self._centered and (center is None or center.shape != tensor.shape):
            raise ValueError(f"parameter {name!r} was added after the penalty copied its center; build a new penalty")
        if weights is not None and weights.shape != grouping.magnitudes_shape(tensor.shape):
            raise ValueError(
                f"the shape of parameter {name!r} has changed to {tuple(tensor.shape)} since the penalty copied its "
                "weights; build a new penalty"
            )
        length, multiplier = ref.length_of(name), self.multipliers.get(distinct)
        return [
            Term(distinct, tensor, penalty, part, group, factor, weights, center, length, None, multiplier)
            for part, factor in self.factors(grouping)
        ]

    def _grouping(self, ref: ParameterRef, name: str, tensor: Tensor) -> Grouping:
        try:
            grouping = grouping_of(self.groups, ref, tensor.shape, self.scale)
            grouping.check(tensor.shape)
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from None
        return grouping
