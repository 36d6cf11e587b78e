"""Penalty, the base class of all penalties on parameters, and Sum.

A subclass defines a penalty by the scalar functions `rho`, `rho_grad` and `rho_prox`. The base class computes from them
the loss term, the gradient, the proximal map and the distance to stationarity.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.reductions import max_over_ranks
from ..distributed.shards import full_tensor
from ..functional import magnitudes
from ..groups.grouping import Elements, Grouping, working_dtype
from ..ops.batches import TensorBatch
from ..ops.closed_forms import check_prox
from ..ops.gradient import add_grad_, add_grad_and_value_, check_grad
from ..ops.prox import prox_, zero_lengths_
from ..ops.step import Step
from ..ops.subdifferential import distance
from ..ops.terms import Term, by_tensor, gathered
from ..ops.value import check_differentiated, sum_values, total_value
from ..ops.zero_groups import zero_groups
from .cache import TermCache
from .parameters import PenalizedParameters
from .selection import owned_ids
from .summary import summary_table

__all__ = ["Penalty", "Sum"]


class Penalty(PenalizedParameters):
    r"""`lam * Omega(w)` with `Omega(w) = sum_g n_g * rho(||w_g|| / sqrt(n_g))`, over groups g of `n_g` elements.

    Without `groups`, each element is a group: `Omega(w) = sum rho(|w|)`. Add `penalty()` to the loss, or pass the
    penalty to `RegularizedOptimizer`. Write your own penalty as a subclass that defines `rho`, `rho_grad` and, if it
    exists, `rho_prox`. A penalty owns no parameters; it looks up those of a module at each use.

    Units of `lam`: loss per `Omega`. The loss and mode "coupled" add `lam * subgradient` to the gradient, before any
    learning rate. Per step, mode "decoupled" subtracts `lr * lam * subgradient` from the weights; mode "proximal" and
    `prox_(step)` apply the prox with `t = step * lam` (`step` is `lr` for plain SGD); mode "dual" sums `t` over steps.

    Args:
        params: an `nn.Module`; or an iterable of tensors, of `(name, tensor)`, or of parameter groups: dicts
            `{"params": ..., "lam": ..., "select": ..., "exclude": ...}`.
        lam: lambda, 0 or more.
        select: the parameters of a module to penalize. None or "weights": without biases, scales (of norms or layers),
            raw token and position embeddings, and names on the model's `no_weight_decay()` list. "all". A glob on the
            qualified name. A module type. A callable `(name, parameter) -> bool`. A list of these: entries of the same
            form are alternatives, different forms must all match. For bare tensors only "weights" and "all".
        exclude: the selected parameters to leave out, in the same forms.
        groups: None (elements), "output" or "input" (units of a layer), an int (a dimension), "tensor", or a grouping
            from `torch_regpen.groups`.
        scale: if False, a group has magnitude `||w_g||` and counts once.
        center: "initial" (a copy of the present weights) or a state dict: penalize `w - center`. With L2 this is L2-SP
            (Li, Grandvalet and Davoine 2018). It is not saved in `state_dict()`.
        weights: a dict from name to non-negative factors on lambda, one per element or per group (adaptive lasso, Zou
            2006); default 1.

    Raises:
        TypeError: `lam` is not a number; `params` has none of these forms.
        ValueError: `lam` is negative or not finite; nothing is selected; a parameter is in two parameter groups, cannot
            be divided into the groups, is missing from `center`, or has `weights` of the wrong shape.

    Attributes:
        param_groups: a list with one dict per parameter group; its "lam" can be set at any time.

    Example:
        >>> import torch, torch_regpen
        >>> class Quartic(torch_regpen.Penalty):
        ...     def rho(self, u): return u**4
        >>> Quartic([torch.ones(2, 2)], lam=0.5)().item()
        2.0
    """

    #: (a, b) if `rho(u) = a*u + b*u^2`, else None. The prox of a sum of such penalties has a closed form.
    coefficients: tuple[float, float] | None = None
    #: Whether the prox also keeps `w >= 0`.
    positive: bool = False
    #: Whether `Omega` is a sum of `rho` over groups. If False, it is a function of the whole tensor.
    separable: bool = True

    def rho(self, u: Tensor) -> Tensor:
        """`rho(u)` for each magnitude `u >= 0`."""
        raise NotImplementedError(f"{type(self).__name__} does not define rho(u)")

    def rho_grad(self, u: Tensor) -> Tensor:
        """`rho'(u)` for each magnitude; at 0 the right derivative, which may be infinite."""
        raise NotImplementedError(f"{type(self).__name__} does not define rho_grad(u)")

    def rho_prox(self, u: Tensor, t: float | Tensor) -> Tensor:
        """`argmin_{v >= 0} 1/2 (v - u)^2 + t * rho(v)`; `t` is a float or a tensor that broadcasts to `u`."""
        raise NotImplementedError(f"{type(self).__name__} does not define rho_prox(u, t)")

    def omega(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor:
        """`factor * Omega(x)` for one tensor, as a 0-dim tensor."""
        return magnitudes.value(self.rho, x, grouping, factor)

    def omega_grad(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor:
        """The (sub)gradient of `omega`, with the shape of `x`; differentiable."""
        return magnitudes.grad(self.rho_grad, x, grouping, factor)

    def has_grad(self) -> bool:
        """Whether the penalty has a gradient that an optimizer can use."""
        return type(self).rho_grad is not Penalty.rho_grad

    def has_prox(self) -> bool:
        """Whether the penalty has a proximal map."""
        return type(self).rho_prox is not Penalty.rho_prox

    @property
    def parts(self) -> list[Penalty]:
        """The summands of a `Sum`; for any other penalty, a list of itself."""
        return [self]

    def forward(self, input: Any = None) -> Any:
        """Return `sum lam * Omega(w)` over all penalized parameters, a 0-dim tensor to add to the loss.

        The result is float64 if any parameter is, else float32, on the device of the first parameter. It is twice
        differentiable. If all parameters are frozen, it is 0.

        Args:
            input: the output of the previous layer if the penalty is in an `nn.Sequential`; it is returned unchanged.

        Raises:
            RuntimeError: a transform of torch.func differentiates, but not with respect to the parameters.
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
        """`grad += lam * (sub)gradient`, in place and without autograd. Parameters whose `.grad` is None are skipped.

        Call it between `loss.backward()` and `optimizer.step()`; call it before gradient clipping to clip both.

        Args:
            return_value: also return the value of `penalty()`, computed in the same pass over the weights if possible.

        Raises:
            ValueError: the penalty has no gradient (L0, `positive=True`).
        """
        work = self.batches()
        for batch in work:
            check_grad(batch.terms)
        values: list[Tensor] = []
        remaining: list[TensorBatch] = []  # batches whose values need a separate pass
        for batch in work:
            active = batch.with_grads()
            if return_value and active is not None and active.is_local and len(active.tensors) == len(batch.tensors):
                values.append(add_grad_and_value_(active))
                continue
            remaining.append(batch)
            if active is not None:
                add_grad_(active)
        if not return_value:
            return None
        if remaining:
            values.append(total_value(remaining))
        return sum_values(values, work) if values else self()

    @torch.no_grad()
    def prox_(self, step: float | Tensor) -> None:
        """`w = prox(w, step * lam)`, in place and without autograd, for every penalized parameter.

        Frozen parameters are skipped. If all are frozen, as in an averaged model, it acts on all of them.

        Args:
            step: the step size of the gradient step that came before, a number or a 0-dim tensor.

        Raises:
            ValueError: the penalty has no proximal map in closed form.
        """
        work = self.batches(frozen=True)
        for batch in work:
            check_prox(batch.terms)
        for batch in work:
            prox_(batch, [Step(step)] * len(batch.tensors))
            zero_lengths_(batch)

    @torch.no_grad()
    def stationarity(self) -> Tensor:
        """`max dist(-grad, lam * subdifferential(Omega)(w))`, over coordinates or over groups; a 0-dim tensor.

        Call it after `loss.backward()` of the loss without the penalty. It is 0 at a stationary point of loss +
        penalty; its unit is that of the gradient. Parameters whose `.grad` is None are skipped.

        Raises:
            ValueError: the groups of the penalties overlap; there is no closed form then.
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
        """The fraction of the penalized elements that are exactly zero (or at their center): 0-dim, float32.

        Frozen parameters are skipped, unless all are frozen. Without parameters, as before the first forward of a lazy
        model, it is 0. It does not synchronize with the device.
        """
        tensors = [gathered(terms)[0] for terms in by_tensor(self.terms() or self.terms(frozen=True))]
        elements = sum(term.tensor.numel() for term in tensors)
        zeros = [full_tensor((term.offset(term.tensor) == 0).sum()) for term in tensors] or [torch.zeros(())]
        return torch.stack([count.to(zeros[0].device) for count in zeros]).sum().float() / max(elements, 1)

    @torch.no_grad()
    def zero_groups(self) -> dict[str, list[int]]:
        """Return a dict from the name of each grouped parameter to the indices of its groups that are entirely zero.

        With `groups="input"` these are the input features that no unit uses; with "output", the dead neurons. The
        groups are numbered in their order in the tensor. It synchronizes with the device.
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
        """A table with the shape, lambda, value, exact zeros and zero groups of each parameter, and the totals.

        If there is a center, elements that equal their center count as zero. It synchronizes with the device.
        """
        return summary_table(self.terms() or self.terms(frozen=True))

    def __add__(self, other: Penalty) -> Sum:
        if not isinstance(other, Penalty):
            return NotImplemented
        return Sum([self, other])

    def __radd__(self, other: object) -> Penalty:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum() starts from 0

    def __mul__(self, factor: float) -> Penalty:
        """A copy of the penalty, on the same parameters, with each lambda multiplied by `factor`."""
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
            return NotImplemented
        scaled = self._shallow_copy()
        scaled.param_groups = [group.scaled(float(factor)) for group in self.param_groups]
        scaled.seen = {"in_loss": False}
        return scaled

    __rmul__ = __mul__

    def __prepare_scriptable__(self) -> Any:
        raise TypeError(
            "a model that contains a penalty cannot be scripted: take the penalty out of the model first, or use "
            "torch.compile or torch.export"
        )


class Sum(Penalty):
    """The sum `p + q + ...` of penalties, each with its own parameters and lambda.

    Attributes:
        penalties: the summands; read and set `lam` on these.

    Example:
        >>> import torch
        >>> from torch_regpen import L1, L2
        >>> w = torch.ones(2, 2)
        >>> (L1([w], lam=0.5) + L2([w], lam=0.25))().item()
        3.0
    """

    def __init__(self, penalties: Iterable[Penalty]) -> None:
        nn.Module.__init__(self)
        self._cache = TermCache()
        self._selections = []
        self.penalties = nn.ModuleList(part for penalty in penalties for part in penalty.parts)

    get_extra_state = nn.Module.get_extra_state  # each summand saves its own

    @property
    def parts(self) -> list[Penalty]:
        """The summands."""
        return list(self.penalties)  # type: ignore[arg-type]

    @property
    def lam(self) -> float:
        """Not defined for a sum: read and set it on `penalties`."""
        raise AttributeError  # Python then calls __getattr__, which raises with a message

    @lam.setter
    def lam(self, lam: float) -> None:
        raise AttributeError("a Sum has no lam of its own; set it on one of its .penalties")

    def __getattr__(self, name: str) -> Any:
        if name == "lam":
            raise AttributeError("a Sum has no lam of its own; read it on one of its .penalties")
        return super().__getattr__(name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of all summands."""
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
        """The same sum, with shared lambdas, on the parameters that `optimizer` owns.

        Raises:
            ValueError: it owns none of them.
        """
        owned = owned_ids(optimizer)
        parts = [part for part in self.parts if any(id(term.tensor) in owned for term in part.terms(frozen=True))]
        if not parts:
            raise ValueError(f"{type(optimizer).__name__} owns none of the parameters of {self!r}")
        return Sum(part.restricted_to(optimizer) for part in parts)

    def extra_repr(self) -> str:
        """Empty: the repr shows the summands."""
        return ""
