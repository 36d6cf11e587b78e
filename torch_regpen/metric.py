"""The metric of an optimizer: the step `s` that it takes, at rest, for a unit gradient.

A gradient step `w - s*g` followed by `prox(w, s*lam)` stands still exactly where `-g` is a subgradient of `lam*Omega`.
With momentum `s` is not `lr`, and with Adam it differs by coordinate (ProxGen: Yun, Lozano and Yang 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

__all__ = ["Metric", "Step", "differs_by_coordinate", "step_of", "why_not"]

Metric = str | Callable[[Optimizer, Tensor, dict[str, Any]], float | Tensor]


class Step(NamedTuple):
    """What an optimizer does to a parameter for a unit gradient.

    Attributes:
        size: the step: a number, a 0-dim tensor, or a tensor of the parameter's shape.
        cap: the most that one step may shrink an element, where the optimizer normalises its steps; else None.
    """

    size: float | Tensor
    cap: float | Tensor | None = None


def step_of(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any], metric: Metric) -> Step:
    """The step that `optimizer`, which has just updated `parameter`, takes for a unit gradient."""
    if callable(metric):
        return Step(metric(optimizer, parameter, group))
    rule = _rule(optimizer) if metric == "auto" else None
    return Step(group["lr"]) if rule is None else rule(parameter, optimizer.state.get(parameter, {}), group)


def why_not(optimizer: Optimizer) -> str | None:
    """Why the step of this kind of optimizer is not known; None where it is."""
    if _rule(optimizer) is not None:
        return None
    return next((why for kind, why in WITHOUT.items() if isinstance(optimizer, kind)), "takes an unknown step")


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


def _adam(parameter: Tensor, state: State, group: Group) -> Step:
    v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    root = _correction(state, group)
    return _normalised(v.sqrt().add_(group["eps"] * root), group["lr"] * root, group)


def _nadam(parameter: Tensor, state: State, group: Group) -> Step:
    root = _correction(state, group)
    return _normalised(state["exp_avg_sq"].sqrt().add_(group["eps"] * root), group["lr"] * root, group)


def _sparse_adam(parameter: Tensor, state: State, group: Group) -> Step:
    return _normalised(state["exp_avg_sq"].sqrt().add_(group["eps"]), group["lr"] * _correction(state, group), group)


def _radam(parameter: Tensor, state: State, group: Group) -> Step:
    beta, step = group["betas"][1], state["step"]
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * step * beta**step / (1 - beta**step)
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    root = _correction(state, group)
    adaptive = _normalised(state["exp_avg_sq"].sqrt().add_(group["eps"]), group["lr"] * root, group)
    factor = rectified.clamp_min(0).sqrt()
    return adaptive._replace(size=torch.where(length > 5, adaptive.size * factor, group["lr"]))


def _adamax(parameter: Tensor, state: State, group: Group) -> Step:
    return _normalised(state["exp_inf"].clone(), group["lr"], group)


def _adagrad(parameter: Tensor, state: State, group: Group) -> Step:
    lr = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
    return _normalised(state["sum"].sqrt().add_(group["eps"]), lr, group)


def _rmsprop(parameter: Tensor, state: State, group: Group) -> Step:
    v = state["square_avg"]
    if group["centered"]:
        v = (v - state["grad_avg"].square()).clamp_min_(0)
    return _normalised(v.sqrt().add_(group["eps"]), group["lr"], group, group["momentum"])


def _adadelta(parameter: Tensor, state: State, group: Group) -> Step:
    eps = group["eps"]
    # the moment of the updates is that of the next step already; at rest the two are the same
    size = ((state["acc_delta"] + eps) / (state["square_avg"] + eps)).sqrt_().mul_(group["lr"])
    return Step(size, _cap(group))


def _adafactor(parameter: Tensor, state: State, group: Group) -> Step:
    smallest, least_scale = group["eps"]
    smallest = torch.finfo(parameter.dtype).eps if smallest is None else smallest
    if parameter.ndim > 1:
        row, column = state["row_var"], state["col_var"]
        v = (row @ column) / row.mean(dim=-2, keepdim=True).clamp_min(smallest)
    else:
        v = state["variance"].clone()
    size = v.clamp_min_(smallest**2).rsqrt_()
    rms = torch.linalg.vector_norm(size * parameter.grad) / parameter.numel() ** 0.5
    scale = torch.linalg.vector_norm(parameter) / parameter.numel() ** 0.5
    lr = torch.minimum(state["step"] ** -0.5, torch.as_tensor(group["lr"])) * scale.clamp_min(least_scale)
    return Step(size.mul_(lr / (rms / group["d"]).clamp_min(1)), 10 * lr)


def _correction(state: State, group: Group) -> Any:
    """The root of the bias correction of the second moment, 0 before the first step."""
    return (1 - group["betas"][1] ** state["step"]) ** 0.5


def _normalised(denominator: Tensor, lr: Any, group: Group, momentum: float = 0.0) -> Step:
    """`lr / denominator` for each coordinate, written into the denominator; no 0/0 before the first step."""
    size = denominator.clamp_min_(torch.finfo(denominator.dtype).tiny).reciprocal_().mul_(lr / (1 - momentum))
    return Step(size, _cap(group, momentum))


def _cap(group: Group, momentum: float = 0.0) -> float | Tensor:
    """Ten times as far as the optimizer itself moves a coordinate: no fixed point is touched, no dead one wiped out."""
    cap: float | Tensor = 10 * group["lr"] / (1 - momentum)
    return cap


RULES: dict[type[Optimizer], Callable[[Tensor, State, Group], Step]] = {
    optim.SGD: _sgd,
    optim.ASGD: _asgd,
    optim.Adam: _adam,  # and AdamW
    optim.NAdam: _nadam,
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
    optim.Muon: "makes the gradient of a matrix orthogonal, whatever its size",
    optim.LBFGS: "steps in the metric of its approximate Hessian",
}


def _rule(optimizer: Optimizer) -> Callable[[Tensor, State, Group], Step] | None:
    return next((RULES[kind] for kind in type(optimizer).__mro__ if kind in RULES), None)
