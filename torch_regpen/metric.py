"""The metric of an optimizer: the step `s` that it takes, at rest, for a unit gradient.

A gradient step `w - s*g` followed by `prox(w, s*lam)` stands still exactly where `-g` is a subgradient of `lam*Omega`.
With momentum `s` is not `lr`, and with Adam it differs by coordinate (ProxGen: Yun, Lozano and Yang 2021).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from .groups import largest, working_dtype
from .multi_tensor import Take
from .prox import Step

__all__ = ["Metric", "RootStep", "Step", "differs_by_coordinate", "sets_its_own_step", "steps_of", "why_not"]

Metric = str | Callable[[Optimizer, Tensor, dict[str, Any]], float | Tensor]


class RootStep(NamedTuple):
    """`numerator / (sqrt(moment) + eps)` for each element: a step not yet computed.

    Attributes:
        moment: the second moment, of the parameter's shape.
        numerator: 0-dim.
        eps: 0-dim, not 0.
        cap: as of `Step`.
    """

    moment: Tensor
    numerator: Tensor
    eps: Tensor
    cap: float | Tensor

    @property
    def by_element(self) -> bool:
        """Whether there is one for each element."""
        return True

    def part(self, take: Take) -> RootStep:
        """The step of what `take` takes of the parameter."""
        return self._replace(moment=take(self.moment))

    @property
    def size(self) -> Tensor:
        """The step of each element."""
        return torch.div(self.numerator, self.moment.sqrt().add_(self.eps))

    @property
    def unseen(self) -> Tensor:
        """For each element whether it has had no gradient yet."""
        return self.moment == 0


class _Biased(NamedTuple):
    """`lr / (sqrt(moment / (1 - beta^updates)) + eps)`, which becomes a `RootStep`."""

    moment: Tensor
    lr: float | Tensor
    eps: float
    cap: float | Tensor
    beta: float | Tensor
    updates: Tensor

    @staticmethod
    def corrected(steps: Sequence[_Biased]) -> list[RootStep]:
        """Of those that differ in moment and updates only, all at once.

        Before the first update the numerator is 0, and eps not quite: no 0/0.
        """
        moment, lr, eps, _, beta, _ = steps[0]
        # exp(n*log(beta)): inductor computes beta^n for each element anew, and this once.
        log = beta.log() if isinstance(beta, Tensor) else math.log(beta or sys.float_info.min)
        updates = torch.stack([step.updates for step in steps]).to(working_dtype(moment.dtype))
        root = (1 - (log * updates).exp()).sqrt()
        root = root.to(moment.device, non_blocking=True)
        quotients = zip((root * lr).unbind(), (root * eps + torch.finfo(root.dtype).tiny).unbind(), strict=True)
        return [RootStep(step.moment, *quotient, step.cap) for step, quotient in zip(steps, quotients, strict=True)]


def steps_of(
    optimizer: Optimizer, parameters: Sequence[Tensor], group: dict[str, Any], metric: Metric
) -> list[Step | RootStep]:
    """The step that `optimizer`, which has just updated them, takes for a unit gradient of each of some parameters."""
    if callable(metric):
        return [Step(metric(optimizer, parameter, group)) for parameter in parameters]
    rule = _rule(optimizer) if metric == "auto" else None
    if rule is None or rule is _sgd:  # one for all
        step = Step(group["lr"]) if rule is None else _sgd(parameters[0], {}, group)
        return [step] * len(parameters)
    steps = [rule(parameter, optimizer.state.get(parameter, {}), group) for parameter in parameters]
    return _Biased.corrected(steps) if rule is _adam else steps  # type: ignore[arg-type, return-value]


def why_not(optimizer: Optimizer) -> str | None:
    """Why the step of this kind of optimizer is not known; None where it is."""
    if _rule(optimizer) is not None:
        return None
    return next((why for kind, why in WITHOUT.items() if isinstance(optimizer, kind)), "takes an unknown step")


def sets_its_own_step(optimizer: Optimizer) -> bool:
    """Whether it is one of those that find their step size themselves, at lr=1: Prodigy, D-Adaptation."""
    return _rule(optimizer) is None and any("d" in group for group in optimizer.param_groups)


def differs_by_coordinate(optimizer: Optimizer, metric: Metric) -> bool:
    """Whether the steps of `optimizer` are known to differ by coordinate."""
    return metric == "auto" and _rule(optimizer) not in (None, _sgd, _asgd)


State = dict[str, Any]
Group = dict[str, Any]


def _sgd(parameter: Tensor, state: State, group: Group) -> Step:
    if not group["momentum"]:
        return Step(group["lr"])
    return Step(group["lr"] * (1 - group["dampening"]) / (1 - group["momentum"]))


def _asgd(parameter: Tensor, state: State, group: Group) -> Step:
    # state["eta"] is that of the next step already
    lr, lambd = group["lr"], group["lambd"]
    return Step(lr / (1 + lambd * lr * (state["step"] - 1)) ** group["alpha"])


def _adam(parameter: Tensor, state: State, group: Group) -> _Biased:
    moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return _Biased(moment, group["lr"], group["eps"], _cap(group), group["betas"][1], state["step"])


def _sparse_adam(parameter: Tensor, state: State, group: Group) -> Step:
    return _normalised(state["exp_avg_sq"], group["lr"] * _correction(state, group), group)


def _radam(parameter: Tensor, state: State, group: Group) -> Step:
    beta, step = group["betas"][1], _updates(state)
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * step * beta**step / (1 - beta**step)
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    adaptive = _normalised(state["exp_avg_sq"], group["lr"] * _correction(state, group), group)
    factor = rectified.clamp_min(0).sqrt()
    return adaptive._replace(size=torch.where(length > 5, adaptive.size * factor, group["lr"]))


def _adamax(parameter: Tensor, state: State, group: Group) -> Step:
    size = state["exp_inf"].reciprocal().mul_(group["lr"])  # it holds eps where others hold 0
    return Step(size, _cap(group), state["exp_inf"] <= group["eps"])


def _adagrad(parameter: Tensor, state: State, group: Group) -> Step:
    lr = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
    return _normalised(state["sum"], lr, group)


def _rmsprop(parameter: Tensor, state: State, group: Group) -> Step:
    v, momentum = state["square_avg"], group["momentum"]
    if not group["centered"]:
        return _normalised(v, group["lr"], group, momentum)
    variance = (v - state["grad_avg"].square()).clamp_min_(0)
    step = _normalised(variance, group["lr"], group, momentum)
    # A gradient that has become constant has next to no variance: then it moves a coordinate by far more than lr.
    grad: Any = parameter.grad
    moved: Tensor = step.size * grad
    cap = (10 * largest(moved.abs())).clamp_min(10 * group["lr"] / (1 - momentum))
    return Step(step.size, cap, v == 0)


def _adadelta(parameter: Tensor, state: State, group: Group) -> Step:
    eps, v = group["eps"], state["square_avg"]
    # the moment of the updates is that of the next step already; at rest the two are the same
    size = ((state["acc_delta"] + eps) / (v + eps)).sqrt_().mul_(group["lr"])
    return Step(size, _cap(group), v == 0)


def _adafactor(parameter: Tensor, state: State, group: Group) -> Step:
    smallest, least_scale = group["eps"]
    smallest = torch.finfo(parameter.dtype).eps if smallest is None else smallest
    if parameter.ndim > 1:
        row, column = state["row_var"], state["col_var"]
        v = (row @ column) / row.mean(dim=-2, keepdim=True).clamp_min(smallest)
    else:
        v = state["variance"].clone()
    unseen = v == 0
    size = v.clamp_min_(smallest**2).rsqrt_()
    rms = torch.linalg.vector_norm(size * parameter.grad) / parameter.numel() ** 0.5
    scale = torch.linalg.vector_norm(parameter) / parameter.numel() ** 0.5
    lr = torch.minimum(state["step"] ** -0.5, torch.as_tensor(group["lr"])) * scale.clamp_min(least_scale)
    return Step(size.mul_(lr / (rms / group["d"]).clamp_min(1)), 10 * lr, unseen)


def _updates(state: State) -> Tensor:
    """How many there were, in float64: powers of the decay rates close to 1 take it."""
    return torch.as_tensor(state["step"], dtype=torch.float64)  # SparseAdam's is an int


def _correction(state: State, group: Group) -> Tensor:
    """The root of the bias correction of the second moment, 0 before the first step."""
    root: Tensor = (1 - group["betas"][1] ** _updates(state)) ** 0.5
    return root


def _normalised(moment: Tensor, lr: Any, group: Group, momentum: float = 0.0) -> Step:
    """`lr / (sqrt(moment) + eps)` for each coordinate; no 0/0 before the first step."""
    denominator = moment.sqrt().add_(group["eps"]).clamp_min_(torch.finfo(moment.dtype).tiny)
    return Step(denominator.reciprocal_().mul_(lr / (1 - momentum)), _cap(group, momentum), moment == 0)


def _cap(group: Group, momentum: float = 0.0) -> float | Tensor:
    """Ten times as far as the optimizer itself moves a coordinate: no fixed point is touched, no dead one wiped out."""
    cap: float | Tensor = 10 * group["lr"] / (1 - momentum)
    return cap


RULES: dict[type[Optimizer], Callable[[Tensor, State, Group], Step | _Biased]] = {
    optim.SGD: _sgd,
    optim.ASGD: _asgd,
    optim.Adam: _adam,
    optim.AdamW: _adam,
    optim.NAdam: _adam,
    optim.SparseAdam: _sparse_adam,
    optim.RAdam: _radam,
    optim.Adamax: _adamax,
    optim.Adagrad: _adagrad,
    optim.RMSprop: _rmsprop,
    optim.Adadelta: _adadelta,
    optim.Adafactor: _adafactor,
}

WITHOUT: dict[type[Optimizer], str] = {
    optim.Rprop: "steps by the sign of the gradient, whatever its size",
    optim.LBFGS: "steps in the metric of its approximate Hessian",
}
if hasattr(optim, "Muon"):  # since torch 2.9
    WITHOUT[optim.Muon] = "makes the gradient of a matrix orthogonal, whatever its size"


def _rule(optimizer: Optimizer) -> Callable[[Tensor, State, Group], Step | _Biased] | None:
    return next((RULES[kind] for kind in type(optimizer).__mro__ if kind in RULES), None)
