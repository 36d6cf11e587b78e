"""The sign of the update that an optimizer is about to make, if its state determines it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, optim
from torch.optim import Optimizer

from ..ops.batches import TensorBatch
from ..ops.decay import Combination
from ..ops.step import on_device_of

__all__ = ["next_updates"]


def next_updates(optimizer: Optimizer, batch: TensorBatch) -> list[Combination] | None:
    """For each tensor of a batch, a combination of tensors with the sign of its next update `u`, in `w -= u`.

    None if the state does not determine the sign: for optimizers other than SGD, Adam and AdamW (a subclass may have a
    different step); if the optimizer has a weight_decay, which is part of the update; for complex parameters and sparse
    gradients.
    """
    rule = RULES.get(type(optimizer))
    groups = getattr(batch, "owners", None) or [batch.group] * len(batch.tensors)
    if rule is None or any(group["weight_decay"] for group in groups):
        return None
    if any(w.is_complex() for w in batch.tensors) or any(grad.is_sparse for grad in batch.grads):
        return None
    found = []
    for w, grad, group in zip(batch.tensors, batch.grads, groups, strict=True):
        sign = -1 if group["maximize"] else 1
        combination = rule(sign, grad, optimizer.state.get(w, {}), group)
        moves = _sign(on_device_of(w, group["lr"]))
        found.append([(moves * factor, x) for factor, x in combination])
    return found


def _sgd(sign: int, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Combination:
    momentum, buffer = group["momentum"], state.get("momentum_buffer")
    if not momentum or buffer is None:  # in the first step, the buffer becomes the gradient
        return [(sign, grad)]
    fresh, kept = 1 - group["dampening"], momentum
    if group["nesterov"]:
        fresh, kept = 1 + momentum * fresh, momentum * kept
    return [(sign * fresh, grad), (kept, buffer)]


def _adam(sign: int, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Combination:
    beta, mean = group["betas"][0], state.get("exp_avg")
    return [(sign, grad)] + ([] if mean is None else [(beta / (1 - beta), mean)])


def _sign(lr: float | Tensor) -> float | Tensor:
    """1, or 0 if lr is 0 (at the start of a warmup), because the update is then 0."""
    return lr.sign() if isinstance(lr, Tensor) else float(lr > 0)


RULES = {optim.SGD: _sgd, optim.Adam: _adam, optim.AdamW: _adam}
