"""Penalty: which parameters, which scalar function of which magnitudes, which lambda.

Loss term, gradient, proximal map and audit are written here once, for every kind; a kind is a subclass that gives
`rho`, `rho_grad` and `rho_prox`.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import functional as F
from ..distributed.fsdp import unsharded_to_sharded
from ..distributed.reductions import max_over_ranks
from ..distributed.shards import full_tensor
from ..groups.grouping import Elements, Grouping, working_dtype
from ..groups.layouts import Heads
from ..groups.names import Groups
from ..ops.batches import TensorBatch, batches
from ..ops.gradient import add_grad_, add_grad_and_value_, check_grad
from ..ops.prox import check_prox, prox_, zero_lengths_
from ..ops.step import Step
from ..ops.subdifferential import distance
from ..ops.terms import Term, by_tensor
from ..ops.value import check_differentiated, sum_values, total_value
from ..ops.zero_groups import zero_groups
from .cache import TermCache
from .centers import _beside, _center_of, _weights_of
from .lookup import ParameterRef, spellings
from .param_groups import ParamGroup, _as_groups, checked_lam
from .rules import Params, Select
from .selection import Selection, owned_ids
from .summary import summary_table
from .units import grouping_of

__all__ = ["Penalty", "Sum"]


class Penalty(nn.Module):
    r"""`lam * Omega(w)` with `Omega(w) = sum_g n_g * rho(||w_g|| / sqrt(n_g))`, on chosen parameters of a model.

    Call it for the loss term, `loss = criterion(model(x), y) + penalty()`, or give it to a `RegularizedOptimizer`. It
    owns no parameter and looks those of a module up at each use.

    To write a kind of your own, subclass and give `rho(u)` and `rho_grad(u)`, and `rho_prox(u, t)` where it exists, on
    a tensor `u >= 0` of magnitudes; keyword arguments of its own go to its `__init__`, the rest to
    `super().__init__(params, lam, **kw)`.

    Args:
        params: an `nn.Module`; or an iterable of tensors, or of `(name, tensor)`; or of dicts
            `{"params": ..., "lam": ..., "select": ..., "exclude": ...}`, as torch.optim's parameter groups are.
        lam: lambda, 0 or more: the factor on `Omega`, each step anew, never multiplied by a learning rate in the loss.
        select: which parameters of a module. None or `"weights"`: what the layers multiply with; no bias, no scale of a
            norm or of a layer, no token or position embedding held as a raw parameter, nothing on the model's own
            `no_weight_decay()` list. `"all"`; a glob on the qualified name; a module type: all parameters of such
            modules; a callable `(name, parameter) -> bool`. In a list or tuple, entries of one form are alternatives,
            and different forms must all hold: `("weights", nn.Linear, "encoder.*")`. Beside tensors given as such, only
            `"weights"` (by shape and name) and `"all"`.
        exclude: which of them not, in the same forms; a shared parameter is left out under all its names.
        groups: None (each element), `"output"` or `"input"` (the weights into or out of a unit), a dimension,
            `"tensor"`, or one of `torch_regpen.groups`.
        scale: False takes the norm of a group in place of its root mean square and counts each group once.
        center: `"initial"` (the weights as they are now) or a state dict: the penalty is then on `w - center`; L2 so is
            L2-SP, for fine-tuning (Li, Grandvalet and Davoine 2018). Not part of `state_dict()`.
        weights: a dict of name to non-negative factors on lambda, of the parameter's shape, or one for each group (the
            adaptive lasso, Zou 2006); a missing name counts 1.

    Raises:
        TypeError: `lam` is not a number; `params` is not one of the above.
        ValueError: `lam` is negative or not finite; nothing is selected; a parameter is in two groups, does not divide
            into the groups, is missing from `center`, or has `weights` of another shape.

    Attributes:
        param_groups: a list with a dict for each group of parameters; set its `"lam"` at any time.
    """

    #: (a, b) where `rho(u) = a*u + b*u^2`; sums of such kinds have a prox in closed form.
    coefficients: tuple[float, float] | None = None
    #: Whether the prox also keeps `w >= 0`.
    positive: bool = False
    #: Whether it is a scalar function times a grouping, and not a function of the whole tensor.
    separable: bool = True

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
        self.groups = groups
        self.scale = scale
        self.param_groups: list[dict[str, Any]] = []
        self._selections: list[Selection] = []
        self.seen = {"in_loss": False}  # whether autograd went through it; an optimizer that has it looks, and warns
        default, meant = checked_lam(lam), "attention" if isinstance(groups, Heads) else "weights"
        for group in _as_groups(params):
            self.param_groups.append(ParamGroup(group, lam=group.get("lam", default)))
            chosen = group.get("select", select), group.get("exclude", exclude)
            self._selections.append(Selection(group["params"], *chosen, default=meant))
        self._centered = False
        self._cache = TermCache()
        self.terms(frozen=True)  # raises where a parameter cannot be penalized so
        if center is not None:
            for ref, name, tensor, _, entry in self._entries("center", center):
                ref.centers[name] = _center_of(name, tensor, entry)
            self._centered = True
        if weights is not None:
            for ref, name, tensor, grouping, entry in self._entries("weights", weights):
                if entry is not None:
                    ref.weights[name] = _weights_of(name, tensor, grouping, entry)

    def rho(self, u: Tensor) -> Tensor:
        """`rho(u)`, elementwise, for magnitudes `u >= 0`."""
        raise NotImplementedError(f"{type(self).__name__} gives no rho(u)")

    def rho_grad(self, u: Tensor) -> Tensor:
        """`rho'(u)`; at 0 the right derivative, which may be infinite."""
        raise NotImplementedError(f"{type(self).__name__} gives no rho_grad(u)")

    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor:
        """`argmin_{v >= 0} 1/2 (v - u)^2 + t * rho(v)`; `t` is a float or a tensor that broadcasts."""
        raise NotImplementedError(f"{type(self).__name__} gives no rho_prox(u, t)")

    def omega(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor:
        """`factor * Omega(x)` of one tensor, 0-dim."""
        return F.value(self.rho, x, grouping, factor)

    def omega_grad(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor:
        """Its (sub)gradient, differentiable."""
        return F.grad(self.rho_grad, x, grouping, factor)

    def has_grad(self) -> bool:
        """Whether the kind has a gradient to descend."""
        return type(self).rho_grad is not Penalty.rho_grad

    def has_prox(self) -> bool:
        """Whether the kind has a proximal map."""
        return type(self).rho_prox is not Penalty.rho_prox

    @property
    def lam(self) -> float:
        """Lambda: of all groups where they agree, else of the first; setting it sets all."""
        return float(self.param_groups[0]["lam"])

    @lam.setter
    def lam(self, lam: float) -> None:
        for group in self.param_groups:
            group["lam"] = lam

    @property
    def parts(self) -> list[Penalty]:
        """The penalties of which this one is the sum; of any but a sum, itself."""
        return [self]

    def terms(self, *, frozen: bool = False) -> list[Term]:
        """What the penalty does to each of its parameters now, shared ones once; frozen ones are left out.

        Raises:
            ValueError: a parameter is in two groups, does not fit the groups of its elements, or is gone.
        """
        for selection in self._selections:
            selection.refresh()
        if frozen or torch.compiler.is_compiling():
            return self._find(self, frozen)
        cache_key = self._cache_key()
        if not self._cache.holds(cache_key):
            places = self._locations()
            if places is None:
                return self._find(self, frozen)
            self._cache.fill(self._find(self._as_it_is(), frozen), cache_key, places)
        return self._cache.terms

    def batches(self, *, frozen: bool = False) -> list[TensorBatch]:
        """The terms, in the batches that operations take at once.

        Args:
            frozen: whether the frozen parameters are meant where there are no others, as in an averaged model.
        """
        terms = self.terms()
        if not terms and frozen:
            return batches(self.terms(frozen=True))
        if self._cache.terms is not terms:
            return batches(terms)
        self._cache.batches = self._cache.batches or batches(terms)
        return self._cache.batches

    def _cache_key(self) -> list[Any]:
        """What `terms` depends on, beside the parameters: the penalty's attributes, and what is selected."""
        attributes = (value for name, value in vars(self).items() if name != "_cache")
        return [*attributes, *self.param_groups, *(selection.refs for selection in self._selections)]

    def _locations(self) -> list[tuple[dict[str, Any], str]] | None:
        """Where the parameters are found; None where `terms` depends on more than what is there."""
        if type(self).factors is not Penalty.factors or unsharded_to_sharded():
            return None
        places = [ref.location() for selection in self._selections for ref in selection.refs]
        return None if None in places else places  # type: ignore[return-value]

    def _as_it_is(self) -> Penalty:
        """A shallow copy, for the terms that it keeps: with the penalty itself they would be a reference cycle."""
        kind = copy.copy(self)
        kind._cache = TermCache()
        return kind

    def _find(self, kind: Penalty, frozen: bool) -> list[Term]:
        seen: dict[int, int] = {}  # the index of the group that each is in
        found = []
        stand_ins = unsharded_to_sharded()
        for index, (group, selection) in enumerate(zip(self.param_groups, self._selections, strict=True)):
            for ref in selection.refs:
                for name, tensor in ref.read():
                    tensor = stand_ins.get(id(tensor), tensor)
                    if id(tensor) in seen:
                        _refuse_overlap(name, seen[id(tensor)], index)
                        continue
                    if ref.frozen(name, tensor) and not frozen:
                        continue
                    seen[id(tensor)] = index
                    grouping = self._grouping(ref, name, tensor)
                    weights = _beside(ref, ref.weights, name, tensor)
                    center = _beside(ref, ref.centers, name, tensor)
                    if self._centered and (center is None or center.shape != tensor.shape):
                        raise ValueError(
                            f"parameter {name!r} was not there when the penalty took its center; build the penalty anew"
                        )
                    if weights is not None and weights.shape != grouping.magnitudes_shape(tensor.shape):
                        raise ValueError(
                            f"parameter {name!r} has changed its shape to {tuple(tensor.shape)} since the penalty took "
                            "its weights; build the penalty anew"
                        )
                    length = ref.length_of(name)
                    for part, factor in self.factors(grouping):
                        found.append(Term(name, tensor, kind, part, group, factor, weights, center, length))
        return found

    def factors(self, grouping: Grouping) -> list[tuple[Grouping, float]]:
        """The groupings on which `rho` acts, with their shares of lambda: one, but for mixtures."""
        return [(grouping, 1.0)]

    def _grouping(self, ref: ParameterRef, name: str, tensor: Tensor) -> Grouping:
        try:
            grouping = grouping_of(self.groups, ref, tensor.shape, self.scale)
            grouping.check(tensor.shape)
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from None
        return grouping

    def named_parameters_penalized(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, parameter)` of each parameter that is penalized now: shared ones once, frozen ones not."""
        for terms in by_tensor(self.terms()):
            yield terms[0].name, terms[0].tensor

    def forward(self, input: Any = None) -> Any:
        """`sum lam * Omega(w)` over all penalized parameters, a 0-dim tensor to add to the loss.

        It is float64 where any parameter is, else float32, on the first parameter's device; differentiable, twice too.
        It is 0 where all parameters are frozen.

        Args:
            input: of a layer before it, where the penalty is a member of an `nn.Sequential`: it is returned as it is.

        Raises:
            RuntimeError: under a transform of torch.func that differentiates other tensors than the penalized ones.
        """
        if input is not None:
            return input
        work = self.batches()
        if work:
            check_differentiated(work)
            return total_value(work)
        frozen = self.terms(frozen=True)
        dtypes = {working_dtype(term.tensor.dtype) for term in frozen}
        device = frozen[0].tensor.device if frozen else None
        return torch.zeros((), device=device, dtype=torch.float64 if torch.float64 in dtypes else torch.float32)

    @torch.no_grad()
    def add_grad_(self, *, return_value: bool = False) -> Tensor | None:
        """`grad += lam * (sub)gradient`, in place, without autograd; a parameter whose `.grad` is None is passed over.

        Call it between `loss.backward()` and `optimizer.step()`, before clipping if the penalty is to be clipped too.

        Args:
            return_value: returns what `penalty()` does, if it can from the same pass over the weights.
        """
        work = self.batches()
        for batch in work:
            check_grad(batch.terms)
        values: list[Tensor] = []
        left: list[TensorBatch] = []  # whose value takes a pass of its own
        for batch in work:
            active = batch.with_grads()
            if return_value and active is not None and active.is_local and len(active.tensors) == len(batch.tensors):
                values.append(add_grad_and_value_(active))
                continue
            left.append(batch)
            if active is not None:
                add_grad_(active)
        if not return_value:
            return None
        if left:
            values.append(total_value(left))
        return sum_values(values, work) if values else self()

    @torch.no_grad()
    def prox_(self, step: float | Tensor) -> None:
        """`w = prox(w, step * lam)`, in place and without autograd, for every penalized parameter.

        Frozen parameters are left alone, unless all are, as those of an averaged model: then all are meant.

        Args:
            step: the step size, a number or a 0-dim tensor, that the plain gradient step before it had.

        Raises:
            ValueError: the prox is not known in closed form.
        """
        work = self.batches(frozen=True)
        for batch in work:
            check_prox(batch.terms)
        for batch in work:
            prox_(batch, [Step(step)] * len(batch.tensors))
            zero_lengths_(batch)

    @torch.no_grad()
    def stationarity(self) -> Tensor:
        """`max dist(-grad, lam * subdifferential(Omega)(w))` over coordinates, or groups for group penalties; 0-dim.

        Call it after `loss.backward()` of the plain loss: it is 0 at a stationary point of loss + penalty, in units of
        the gradient. Parameters without `.grad` are passed over.
        """
        distances = [
            (distance(terms, terms[0].tensor.grad), terms[0].tensor)
            for terms in by_tensor(self.terms())
            if terms[0].tensor.grad is not None and terms[0].tensor.numel()
        ]
        return max_over_ranks(distances) if distances else torch.zeros((), dtype=torch.float32)

    def restricted_to(self, optimizer: torch.optim.Optimizer) -> Penalty:
        """The same penalty, lambda shared, on those of its parameters that `optimizer` owns.

        Raises:
            ValueError: it owns none of them.
        """
        restricted = self._as_it_is()
        restricted._selections = [selection.restricted_to(optimizer) for selection in self._selections]
        if not any(selection.refs for selection in restricted._selections):
            raise ValueError(f"{type(optimizer).__name__} owns none of the parameters of {self!r}")
        return restricted

    @torch.no_grad()
    def sparsity(self) -> Tensor:
        """The fraction of the penalized elements that are exactly zero, or at their center; 0-dim, float32.

        Frozen parameters are left out, unless all are. The value stays on the device.
        """
        tensors = [terms[0] for terms in by_tensor(self.terms() or self.terms(frozen=True))]
        elements = sum(term.tensor.numel() for term in tensors)
        zeros = [full_tensor((term.offset(term.tensor) == 0).sum()) for term in tensors]
        return torch.stack([count.to(zeros[0].device) for count in zeros]).sum().float() / max(elements, 1)

    @torch.no_grad()
    def zero_groups(self) -> dict[str, list[int]]:
        """For each parameter over groups, by name, the indices of the groups that are zero throughout.

        Groups are what `groups` says: the features that no unit reads (`"input"`), neurons, heads, blocks. Their
        indices count along the groups, in the order in which they lie in the tensor; it reads them from the device.
        """
        found: dict[str, list[int]] = {}
        for term in self.terms() or self.terms(frozen=True):
            if not isinstance(term.grouping, Elements):
                zero = zero_groups(term.offset(term.tensor), term.grouping)
                found[term.name] = zero.nonzero().flatten().tolist()
        return found

    @torch.no_grad()
    def summary(self) -> str:
        """A table, a row per parameter: name, shape, lam, value, elements exactly zero, whole groups that are zero.

        The last row has the totals. Around a center, what is at its center counts as zero.
        """
        return summary_table(self.terms() or self.terms(frozen=True))

    def __add__(self, other: Penalty) -> Sum:
        if not isinstance(other, Penalty):
            return NotImplemented
        return Sum([self, other])

    def __radd__(self, other: object) -> Penalty:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # where sum() of penalties begins

    def __mul__(self, factor: float) -> Penalty:
        """The same penalty with its lambdas multiplied by a number; they are its own from then on."""
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
            return NotImplemented
        scaled = self._as_it_is()
        scaled.param_groups = [ParamGroup(group, group["lam"] * float(factor)) for group in self.param_groups]
        scaled.seen = {"in_loss": False}
        return scaled

    __rmul__ = __mul__

    def __prepare_scriptable__(self) -> Any:
        raise TypeError(
            "a model that has a penalty as a part cannot be scripted: take the penalty out of it first, or use "
            "torch.compile or torch.export"
        )

    def extra_repr(self) -> str:
        """What stands between the brackets of its repr."""
        names = [name for name, _ in self.named_parameters_penalized()]
        lams = ", ".join(f"{group['lam']:g}" for group in self.param_groups)
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        groups = "" if self.groups is None else f"groups={self.groups!r}, "
        return f"lam={lams}, {groups}{len(names)} parameters: {shown}"

    def get_extra_state(self) -> Tensor:
        """The lambdas of its groups, in float64; of a penalty with a center, also what tells that from others."""
        lams = torch.tensor([group["lam"] for group in self.param_groups], dtype=torch.float64)
        return torch.cat([lams, self._center_sums()]) if self._centered else lams

    def set_extra_state(self, state: Tensor) -> None:
        """Slicer the lambdas from a state dict.

        Raises:
            ValueError: it has lambdas for another number of groups; it was saved with another center.
        """
        groups = len(self.param_groups)
        if self._centered and len(state) == groups + 2:
            saved, now = state[groups:].cpu(), self._center_sums()
            if not torch.allclose(saved, now, rtol=0, atol=1e-6 * max(float(now[1]), 1e-30)):
                raise ValueError(
                    "the penalty was saved with another center than it has now: center='initial' means the weights at "
                    "its construction, not those that are loaded later. Give center= the state dict that it began from"
                )
            state = state[:groups]
        lams = state.tolist()
        if len(lams) != groups:
            raise ValueError(f"the state has lambdas for {len(lams)} groups, the penalty has {groups}")
        for group, lam in zip(self.param_groups, lams, strict=True):
            group["lam"] = lam

    def _center_sums(self) -> Tensor:
        """The sum and the norm of the centers, in float64."""
        centers = [c for selection in self._selections for ref in selection.refs for c in ref.centers.values()]
        sums = torch.zeros(2, dtype=torch.float64)
        for center in centers:
            x = full_tensor(center.detach().abs() if center.is_complex() else center.detach()).double()
            sums += torch.stack([x.sum(), x.square().sum()]).cpu()
        sums[1] = sums[1].sqrt()
        return sums

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint from before the penalty was part of the model has no lambda, and loads all the same.
        if f"{prefix}_extra_state" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _entries(self, what: str, given: Any) -> Iterator[tuple[ParameterRef, str, Tensor, Grouping, Tensor | None]]:
        """The parameters, each where it stands, and what `given` has for it by name."""
        initial = what == "center" and given == "initial"
        if not initial and not isinstance(given, Mapping):
            raise TypeError(f"{what} must be a dict of name to tensor, not {given!r}")
        found: dict[int, tuple[ParameterRef, str, Tensor]] = {}
        names: dict[int, list[str]] = {}  # all by which a parameter can be called, shared ones by several
        for ref in (ref for selection in self._selections for ref in selection.refs):
            for name, tensor in ref.read():
                found.setdefault(id(tensor), (ref, name, tensor))
                names.setdefault(id(tensor), []).extend([*spellings(name), *spellings(ref.name)])
        if not initial:
            known = set().union(*names.values())
            unknown = sorted(key for key in given if known.isdisjoint(spellings(key)))
            if unknown and what == "weights":
                raise ValueError(f"weights has {unknown}, which the penalty does not hold")
            given = {**{spellings(key)[-1]: entry for key, entry in given.items()}, **given}
        for key, (ref, name, tensor) in found.items():
            entry = tensor if initial else next((given[called] for called in names[key] if called in given), None)
            yield ref, name, tensor, self._grouping(ref, name, tensor), entry


class Sum(Penalty):
    """`p + q + ...`: the sum of penalties, each with its own parameters and lambda.

    Attributes:
        penalties: its parts, on which `lam` is read and set.
    """

    def __init__(self, penalties: Iterable[Penalty]) -> None:
        nn.Module.__init__(self)
        self._cache = TermCache()
        self._selections = []
        self.penalties = nn.ModuleList(part for penalty in penalties for part in penalty.parts)

    get_extra_state = nn.Module.get_extra_state  # each part has its own

    @property
    def parts(self) -> list[Penalty]:
        """The penalties of which it is the sum."""
        return list(self.penalties)  # type: ignore[arg-type]

    @property
    def lam(self) -> float:
        """A sum has none: read and set it on `penalties`."""
        raise AttributeError  # python then asks __getattr__, which says why

    @lam.setter
    def lam(self, lam: float) -> None:
        raise AttributeError("a sum has no lam of its own; set it on one of its .penalties")

    def __getattr__(self, name: str) -> Any:
        if name == "lam":
            raise AttributeError("a sum has no lam of its own; read it on one of its .penalties")
        return super().__getattr__(name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def _cache_key(self) -> list[Any]:
        return [part.terms() for part in self.parts]

    def _locations(self) -> list[tuple[dict[str, Any], str]]:
        return []

    def __mul__(self, factor: float) -> Penalty:
        return Sum(part * factor for part in self.parts)

    __rmul__ = __mul__

    def _find(self, kind: Penalty, frozen: bool) -> list[Term]:
        return [term for part in self.parts for term in part.terms(frozen=frozen)]

    def restricted_to(self, optimizer: torch.optim.Optimizer) -> Penalty:
        """The same sum, lambdas shared, on those of its parameters that `optimizer` owns."""
        owned = owned_ids(optimizer)
        parts = [part for part in self.parts if any(id(term.tensor) in owned for term in part.terms(frozen=True))]
        if not parts:
            raise ValueError(f"{type(optimizer).__name__} owns none of the parameters of {self!r}")
        return Sum(part.restricted_to(optimizer) for part in parts)

    def extra_repr(self) -> str:
        """Nothing beside its parts."""
        return ""


def _refuse_overlap(name: str, first: int, second: int) -> None:
    if first != second:
        raise ValueError(f"parameter {name!r} is in groups {first} and {second}; it can have one lambda")
