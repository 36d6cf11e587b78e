"""The metric of an optimizer: the step `s` that it takes, at rest, for a unit gradient.

A gradient step `w - s*g` followed by `prox(w, s*lam)` stands still exactly where `-g` is a subgradient of `lam*Omega`.
With momentum `s` is not `lr`, and with Adam it differs by coordinate (ProxGen: Yun, Lozano and Yang 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

__all__ = ["Metric", "Step", "differs_by_coordinate", "knows", "step_of"]

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
    return Step(group["lr"]) if rule is None else rule(optimizer.state[parameter], group)


def knows(optimizer: Optimizer) -> bool:
    """Whether the metric of this kind of optimizer is known."""
    return _rule(optimizer) is not None


def differs_by_coordinate(optimizer: Optimizer, metric: Metric) -> bool:
    """Whether the steps of `optimizer` are known to differ by coordinate."""
    return metric == "auto" and _rule(optimizer) not in (None, _sgd)


def _sgd(state: dict[str, Any], group: dict[str, Any]) -> Step:
    if not group["momentum"]:
        return Step(group["lr"])
    return Step(group["lr"] * (1 - group["dampening"]) / (1 - group["momentum"]))


def _adam(state: dict[str, Any], group: dict[str, Any]) -> Step:
    v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return _normalised(v, 1 - group["betas"][1] ** state["step"], group)


def _normalised(v: Tensor, correction: Tensor, group: dict[str, Any]) -> Step:
    """`lr / (sqrt(v / correction) + eps)`, 0 before the first step, where the correction is 0."""
    root = correction.sqrt()
    size = (v.sqrt() + group["eps"] * root).clamp_min_(torch.finfo(v.dtype).tiny)
    return Step(size.reciprocal_().mul_(group["lr"] * root), _cap(group))


def _cap(group: dict[str, Any], momentum: float = 0.0) -> float | Tensor:
    """Ten times as far as the optimizer itself moves a coordinate: no fixed point is touched, no dead one wiped out."""
    cap: float | Tensor = 10 * group["lr"] / (1 - momentum)
    return cap


RULES: dict[type[Optimizer], Callable[[dict[str, Any], dict[str, Any]], Step]] = {SGD: _sgd, Adam: _adam}


def _rule(optimizer: Optimizer) -> Callable[[dict[str, Any], dict[str, Any]], Step] | None:
    return next((RULES[kind] for kind in type(optimizer).__mro__ if kind in RULES), None)
