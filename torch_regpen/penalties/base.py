"""Penalty: a scalar function of magnitudes on the parameters of a model, times lambda; and sums of penalties.

The loss term, the gradient, the proximal map and the distance to stationarity are written here once, for every kind. A
kind is a subclass that gives `rho`, `rho_grad` and `rho_prox`.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..distributed.reductions import max_over_ranks
from ..distributed.shards import full_tensor
from ..groups import Elements, Grouping
from ..groups.grouping import working_dtype
from ..ops.batches import TensorBatch
from ..ops.gradient import add_grad_, add_grad_and_value_, check_grad
from ..ops.prox import check_prox, prox_, zero_lengths_
from ..ops.step import Step
from ..ops.subdifferential import distance
from ..ops.terms import Term, by_tensor, gathered
from ..ops.value import check_differentiated, sum_values, total_value
from ..ops.zero_groups import zero_groups
from .cache import TermCache
from .param_groups import ParamGroup
from .parameters import PenalizedParameters
from .selection import owned_ids
from .summary import summary_table

__all__ = ["Penalty", "Sum"]


class Penalty(PenalizedParameters):
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
    def parts(self) -> list[Penalty]:
        """The penalties of which this one is the sum; of any but a sum, itself."""
        return [self]

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
        distances = []
        for terms in by_tensor(self.terms()):
            parameters = [parameter for _, parameter in terms[0].named_parameters]
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if len(grads) == len(parameters) and terms[0].tensor.numel():
                grad = grads[0] if terms[0].joint is None else terms[0].joint.gather(grads)
                distances.append((distance(gathered(terms), grad), parameters[0]))
        return max_over_ranks(distances) if distances else torch.zeros((), dtype=torch.float32)

    @torch.no_grad()
    def sparsity(self) -> Tensor:
        """The fraction of the penalized elements that are exactly zero, or at their center; 0-dim, float32.

        Frozen parameters are left out, unless all are. The value stays on the device.
        """
        tensors = [gathered(terms)[0] for terms in by_tensor(self.terms() or self.terms(frozen=True))]
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
                (term,) = gathered([term])
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
        scaled = self._shallow_copy()
        scaled.param_groups = [ParamGroup(group, group["lam"] * float(factor)) for group in self.param_groups]
        scaled.seen = {"in_loss": False}
        return scaled

    __rmul__ = __mul__

    def __prepare_scriptable__(self) -> Any:
        raise TypeError(
            "a model that has a penalty as a part cannot be scripted: take the penalty out of it first, or use "
            "torch.compile or torch.export"
        )


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

    def _locations(self) -> list[tuple[dict[str, Any], str]] | None:
        return []

    def __mul__(self, factor: float) -> Penalty:
        return Sum(part * factor for part in self.parts)

    __rmul__ = __mul__

    def _find_terms(self, penalty: Any, frozen: bool) -> list[Term]:
        return [term for part in self.parts for term in part.terms(frozen=frozen)]

    def restricted_to(self, optimizer: torch.optim.Optimizer) -> Sum:
        """The same sum, lambdas shared, on those of its parameters that `optimizer` owns."""
        owned = owned_ids(optimizer)
        parts = [part for part in self.parts if any(id(term.tensor) in owned for term in part.terms(frozen=True))]
        if not parts:
            raise ValueError(f"{type(optimizer).__name__} owns none of the parameters of {self!r}")
        return Sum(part.restricted_to(optimizer) for part in parts)

    def extra_repr(self) -> str:
        """Nothing beside its parts."""
        return ""
