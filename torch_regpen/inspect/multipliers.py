"""The factor on lambda in the last prox of a RegularizedOptimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from ..distributed.shards import local
from ..optim.dual_averaging import STEPS
from ..optim.step_size import steps_of, unsupported_reason
from ..optim.wrapper import RegularizedOptimizer

__all__ = ["multipliers"]

SAMPLE = 1 << 15  # the size of the sample of a parameter for the median


def multipliers(optimizer: RegularizedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter with the factor on lambda in the last prox, as the median over a sample of its elements.

    The factor is the optimizer's own step for a unit gradient, or in the dual mode the sum of all steps. Parameters
    without a gradient are left out. Nothing is yielded if no penalty has a prox, or if zeros are frozen.
    """
    if optimizer.zeroing_penalty is None or optimizer.zeros_are_frozen:
        return
    moved = {id(w) for _, w in optimizer.zeroing_penalty.named_parameters_penalized()}
    wrapped = optimizer.optimizer
    has_state = optimizer.metric == "auto" and not isinstance(wrapped, SGD) and unsupported_reason(wrapped) is None
    for group in optimizer.param_groups:
        for w in (w for w in group["params"] if id(w) in moved):
            state = optimizer.state.get(w, {})
            size = state.get(STEPS)
            if size is None and w.grad is not None and (state or not has_state):
                (step,) = steps_of(wrapped, [w], group, optimizer.metric)
                size = step.sliced(_sample).size
            if isinstance(size, Tensor):
                yield w, _sample(size).median().reshape(1)
            elif size is not None:
                yield w, torch.full((1,), size, device=w.device)


def _sample(x: Any) -> Any:
    """At most `2 * SAMPLE` elements of this rank's shard of a tensor, equally spaced."""
    return local(x).reshape(-1)[:: max(x.numel() // SAMPLE, 1)] if isinstance(x, Tensor) and x.ndim else x
