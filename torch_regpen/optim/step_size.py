"""The metric of an optimizer: the step `s` that it takes, at rest, for a unit gradient.

A gradient step `w - s*g` followed by `prox(w, s*lam)` has a fixed point exactly where `-g` is a subgradient of
`lam*Omega`. With momentum `s` is not `lr`; with Adam it differs by coordinate (ProxGen: Yun, Lozano and Yang 2021).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from ..groups.grouping import largest, working_dtype
from ..ops.step import Step, on_device_of

__all__ = [
    "Metric",
    "check_momentum",
    "differs_by_coordinate",
    "has_small_steps",
    "sets_its_own_step",
    "steps_of",
    "unsupported_reason",
]

Metric = str | Callable[[Optimizer, Tensor, dict[str, Any]], float | Tensor]


def steps_of(optimizer: Optimizer, parameters: Sequence[Tensor], group: dict[str, Any], metric: Metric) -> list[Step]:
    """The step of `optimizer` for a unit gradient of each parameter, right after it has updated them."""
    if callable(metric):
        return [Step(on_device_of(parameter, metric(optimizer, parameter, group))) for parameter in parameters]
    if isinstance(group.get("lr"), Tensor):
        group = {**group, "lr": on_device_of(parameters[0], group["lr"])}
    rule = _rule(optimizer) if metric == "auto" else None
    if rule is None or rule is _sgd:  # the same step for all
        step = Step(group["lr"]) if rule is None else _sgd(parameters[0], {}, group)
        return [step] * len(parameters)
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    if rule is _adam:
        return _adam_steps(states, group)
    return [rule(parameter, state, group) for parameter, state in zip(parameters, states, strict=True)]


def unsupported_reason(optimizer: Optimizer) -> str | None:
    """Why the step of this kind of optimizer is not known; None if it is known."""
    if _rule(optimizer) is not None:
        return None
    return next((why for kind, why in WITHOUT.items() if isinstance(optimizer, kind)), "takes an unknown step")


def sets_its_own_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer finds its own step size, at lr=1, as Prodigy and D-Adaptation do."""
    return _rule(optimizer) is None and any("d" in group for group in optimizer.param_groups)


def differs_by_coordinate(optimizer: Optimizer, metric: Metric) -> bool:
    """Whether the steps of `optimizer` are known to differ by coordinate."""
    return metric == "auto" and _rule(optimizer) not in (None, _sgd, _asgd)


def has_small_steps(optimizer: Optimizer, metric: Metric) -> bool:
    """Whether a step needs little memory beyond the optimizer's own state, so that many can be held at once."""
    return metric == "auto" and _rule(optimizer) is _adam


def check_momentum(optimizer: Optimizer, group: dict[str, Any], metric: Metric) -> None:
    """Raise `ValueError` if the momentum of a param_group is 1 or more, so that its updates never come to rest."""
    if metric == "auto" and _rule(optimizer) in (_sgd, _rmsprop):
        _one_minus(group["momentum"])


State = dict[str, Any]
Group = dict[str, Any]


def _sgd(parameter: Tensor, state: State, group: Group) -> Step:
    if not group["momentum"]:
        return Step(group["lr"])
    return Step(group["lr"] * (1 - group["dampening"]) / _one_minus(group["momentum"]))


def _asgd(parameter: Tensor, state: State, group: Group) -> Step:
    # state["eta"] already belongs to the next step
    lr, lambd = group["lr"], group["lambd"]
    return Step(lr / (1 + lambd * lr * (state["step"] - 1)) ** group["alpha"])


def _adam(parameter: Tensor, state: State, group: Group) -> Step:
    return _adam_steps([state], group)[0]


def _adam_steps(states: Sequence[State], group: Group) -> list[Step]:
    """`lr / (sqrt(moment / (1 - beta^updates)) + eps)` for several parameters; their bias corrections in one pass.

    Before the first update the numerator is 0, and eps is slightly above 0 to avoid 0/0.
    """
    name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    moments, beta = [state[name] for state in states], group["betas"][1]
    # exp(n*log(beta)), because inductor would compute beta^n again for each element.
    log = beta.log() if isinstance(beta, Tensor) else math.log(beta or sys.float_info.min)
    updates = torch.stack([state["step"] for state in states]).to(working_dtype(moments[0].dtype))
    root: Any = on_device_of(moments[0], (1 - (log * updates).exp()).sqrt())
    numerators, eps = root * group["lr"], root * group["eps"] + torch.finfo(root.dtype).tiny
    if _all_equal(updates):  # the steps share their numbers, which then need not be repeated for each element
        numerators, eps = ([x[0]] * len(states) for x in (numerators, eps))
    max_change = _max_change(group)
    return [Step(n, max_change, moment=moment, eps=e) for n, moment, e in zip(numerators, moments, eps, strict=True)]


def _all_equal(x: Tensor) -> bool:
    """Whether all elements are known to be equal; False on other devices, to avoid synchronization."""
    known = type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return known and torch.equal(x, x[:1].expand_as(x))


def _sparse_adam(parameter: Tensor, state: State, group: Group) -> Step:
    return _normalised(state["exp_avg_sq"], group["lr"] * _correction(state, group), group)


def _radam(parameter: Tensor, state: State, group: Group) -> Step:
    beta, step = group["betas"][1], _updates(state)
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * step * beta**step / (1 - beta**step)
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    adaptive = _normalised(state["exp_avg_sq"], group["lr"] * _correction(state, group), group)
    factor = rectified.clamp_min(0).sqrt()
    return replace(adaptive, numerator=torch.where(length > 5, adaptive.size * factor, group["lr"]))


def _adamax(parameter: Tensor, state: State, group: Group) -> Step:
    size = state["exp_inf"].reciprocal().mul_(group["lr"])  # exp_inf is at least eps, never 0
    return Step(size, _max_change(group), state["exp_inf"] <= group["eps"])


def _adagrad(parameter: Tensor, state: State, group: Group) -> Step:
    lr = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
    return _normalised(state["sum"], lr, group)


def _rmsprop(parameter: Tensor, state: State, group: Group) -> Step:
    v, momentum = state["square_avg"], group["momentum"]
    if not group["centered"]:
        return _normalised(v, group["lr"], group, momentum)
    variance = (v - state["grad_avg"].square()).clamp_min_(0)
    step = _normalised(variance, group["lr"], group, momentum)
    # A gradient that has become constant has almost no variance, and moves a coordinate by far more than lr.
    grad: Any = parameter.grad
    moved: Tensor = step.size * grad
    max_change = (10 * largest(moved.abs())).clamp_min(10 * group["lr"] / _one_minus(momentum))
    return Step(step.size, max_change, v == 0)


def _adadelta(parameter: Tensor, state: State, group: Group) -> Step:
    eps, v = group["eps"], state["square_avg"]
    # acc_delta already belongs to the next step; at a fixed point the two are equal
    size = ((state["acc_delta"] + eps) / (v + eps)).sqrt_().mul_(group["lr"])
    return Step(size, _max_change(group), v == 0)


def _adafactor(parameter: Any, state: State, group: Group) -> Step:
    smallest, least_scale = group["eps"]
    smallest = torch.finfo(parameter.dtype).eps if smallest is None else smallest
    if parameter.ndim > 1:
        row, column = state["row_var"], state["col_var"]
        v = (row @ column) / row.mean(dim=-2, keepdim=True).clamp_min(smallest)
    else:
        v = state["variance"].clone()
    unseen = v == 0
    size = v.clamp_min_(smallest**2).rsqrt_()
    u: Any = size * (-parameter.grad if group["maximize"] else parameter.grad)
    rms = _rms(u)
    lr = torch.minimum(state["step"] ** -0.5, torch.as_tensor(group["lr"]))
    clip = (rms / group["d"]).clamp_min(1).reciprocal()
    decay = 1 - group["lr"] * group["weight_decay"]
    lr = lr * _rms_before(parameter, u, rms, lr * clip, decay).clamp_min(least_scale)
    # v has rank one. If it is far below the squared gradient, the optimizer moves an element by far more than lr.
    max_change = 10 * lr * (clip * largest(u.abs())).clamp_min(1)
    return Step(size.mul_(lr * clip), max_change, unseen)


def _rms(x: Tensor) -> Tensor:
    rms: Tensor = torch.linalg.vector_norm(x) / x.numel() ** 0.5
    return rms


def _rms_before(w: Tensor, u: Tensor, rms: Tensor, factor: Tensor, decay: Any) -> Tensor:
    """The root mean square `r` of a parameter before an update that made it `w = decay * before - factor * r * u`.

    It is the root of `|decay * r|^2 = mean((w + factor * r * u)^2)`. With the root mean square of `w` instead, the
    prox and the update would take different steps, and the fixed point would not be the optimum.
    """
    along = factor * (w * u).mean()
    rest = (decay**2 - (factor * rms).square()).clamp_min(torch.finfo(rms.dtype).tiny)
    before: Tensor = (along + (along.square() + rest * _rms(w).square()).sqrt()) / rest
    return before


def _updates(state: State) -> Tensor:
    """The number of updates, in float64, which powers of decay rates close to 1 need."""
    return torch.as_tensor(state["step"], dtype=torch.float64)  # an int for SparseAdam


def _correction(state: State, group: Group) -> Tensor:
    """The square root of the bias correction of the second moment; 0 before the first step."""
    root: Tensor = (1 - group["betas"][1] ** _updates(state)) ** 0.5
    return root


def _normalised(moment: Tensor, lr: Any, group: Group, momentum: float = 0.0) -> Step:
    """`lr / (sqrt(moment) + eps)` for each coordinate; no 0/0 before the first step."""
    denominator = moment.sqrt().add_(group["eps"]).clamp_min_(torch.finfo(moment.dtype).tiny)
    return Step(denominator.reciprocal_().mul_(lr / _one_minus(momentum)), _max_change(group, momentum), moment == 0)


def _one_minus(momentum: float) -> float:
    if momentum >= 1:
        raise ValueError(
            f"with momentum={momentum:g} updates grow without bound, so modes 'proximal' and 'dual' have no step "
            "lr/(1 - momentum); use a momentum below 1, metric='euclidean' (the step is lr), or mode='coupled'"
        )
    return 1 - momentum


def _max_change(group: Group, momentum: float = 0.0) -> float | Tensor:
    """Ten times the optimizer's usual step, so that fixed points stay, and a tiny moment zeroes no weight at once."""
    max_change: float | Tensor = 10 * group["lr"] / _one_minus(momentum)
    return max_change


RULES: dict[type[Optimizer], Callable[[Tensor, State, Group], Step]] = {
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


def _rule(optimizer: Optimizer) -> Callable[[Tensor, State, Group], Step] | None:
    return next((RULES[kind] for kind in type(optimizer).__mro__ if kind in RULES), None)
