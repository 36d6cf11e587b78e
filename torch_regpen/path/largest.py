"""`lam_max`: the largest useful lambda. At this lambda and above, zero is a stationary point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..distributed.reductions import max_over_ranks
from ..groups.norms import NormGrouping
from ..ops.subdifferential import distance
from ..ops.terms import Term, by_tensor
from ..penalties.base import Penalty, Sum

__all__ = ["check_penalty", "lam_max", "lams_kept"]


def lam_max(penalty: Penalty, loss_fn: Callable[[], Tensor]) -> float:
    """`min {lam : -gradient(0) in lam * subdifferential(Omega)(0)}`: with this lambda, zero is a stationary point.

    The gradient of `loss_fn()` is computed once, with the penalized weights at zero, or at their center. Then the
    weights are restored. Fit the weights without a penalty first: an intercept, and elements whose `weights`, or whose
    multiplier of a `Bound`, are 0. These keep their values, and their gradient is ignored.

    The model must be linear in the penalized weights, since a network of zeros has no gradient. For a network, double
    lambda until training makes all weights zero, as in `examples/choose_lambda.py`.

    Args:
        penalty: the penalty, with the same lambda for all its parameter groups. Its own lambdas are not changed.
        loss_fn: returns the loss without the penalty at the current weights.

    Returns:
        The lambda. It is infinite for L2, which makes no weight zero.

    Raises:
        TypeError: `penalty` is not a penalty on parameters; `loss_fn` does not return a number with a gradient.
        ValueError: the penalty is a sum, or zero is stationary at every lambda (LHalf, L0), or the gradient is not
            finite, or all penalized parameters are frozen.

    Example:
        >>> import torch
        >>> from torch_regpen import L1
        >>> from torch_regpen.path import lam_max
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0], [-4.0]])
        >>> round(lam_max(L1(model, 1.0), lambda: 0.5 * (model(x) - y).square().sum()), 4)
        4.0
    """
    check_penalty(penalty)
    slope = penalty.rho_grad(torch.zeros((), dtype=torch.float64)).item() if penalty.separable else 0.0
    if slope == math.inf:
        raise ValueError(f"{type(penalty).__name__} has an infinite slope at 0: zero is stationary at every lambda")
    work = by_tensor(penalty.terms())
    if not work:
        raise ValueError("the penalized parameters are frozen; set requires_grad=True on them")
    tensors = [terms[0].tensor for terms in work]
    before = [tensor.detach().clone() for tensor in tensors]
    free = [_unpenalized(terms) for terms in work]
    with lams_kept(penalty):
        try:
            with torch.no_grad():
                for terms, tensor, kept in zip(work, tensors, free, strict=True):
                    center = terms[0].center
                    zero = torch.zeros_like(tensor) if center is None else center
                    tensor.copy_(zero if kept is None else torch.where(kept, tensor, zero))
            with torch.enable_grad():
                loss = loss_fn()
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise TypeError(
                        "loss_fn must return the loss as a tensor of one element that depends on the weights, "
                        f"without .item() or no_grad; it returned {loss!r}"
                    )
                grads = torch.autograd.grad(loss, tensors, allow_unused=True)
            pairs = [
                (terms, grad if kept is None else grad.masked_fill(kept, 0))
                for terms, grad, kept in zip(work, grads, free, strict=True)
                if grad is not None
            ]

            def stationary(lam: float) -> bool:
                penalty.lam = lam
                with torch.no_grad():
                    return all(
                        bool(max_over_ranks([(distance(terms, grad), terms[0].tensor)]) == 0) for terms, grad in pairs
                    )

            if stationary(0.0):
                return 0.0
            for terms, grad in pairs:
                if not bool(grad.isfinite().all()):
                    raise ValueError(f"the gradient of the loss for {terms[0].name!r} at zero is not finite")
            return math.inf if slope == 0 else _smallest(stationary)
        finally:
            with torch.no_grad():
                for tensor, old in zip(tensors, before, strict=True):
                    tensor.copy_(old)


def _unpenalized(terms: list[Term]) -> Tensor | None:
    """A mask of the elements whose `weights` are 0, or all if the multiplier of a `Bound` is 0; None without both."""
    weights, multiplier, grouping = terms[0].weights, terms[0].multiplier, terms[0].grouping
    if multiplier is not None and not multiplier:
        return torch.ones_like(terms[0].tensor, dtype=torch.bool)
    if weights is not None and isinstance(grouping, NormGrouping):
        weights = grouping.spread(weights, terms[0].tensor)
    return None if weights is None else weights == 0


@contextmanager
def lams_kept(penalty: Penalty) -> Iterator[None]:
    """Restore the lambda of each parameter group at the end."""
    lams = [group["lam"] for group in penalty.param_groups]
    try:
        yield
    finally:
        for group, lam in zip(penalty.param_groups, lams, strict=True):
            group["lam"] = lam


def check_penalty(penalty: Penalty) -> None:
    """Raise `TypeError` for anything but a penalty on parameters, and `ValueError` for a sum, whose lambdas differ."""
    if not isinstance(penalty, Penalty):
        what = penalty.__name__ if isinstance(penalty, type) else f"a {type(penalty).__name__}"
        raise TypeError(f"penalty must be a penalty on parameters, such as L1(model, lam=1.0), not {what}")
    if isinstance(penalty, Sum):
        raise ValueError("a sum has no lambda of its own: ask for one of its .penalties")


def _smallest(holds: Callable[[float], bool]) -> float:
    """The smallest float at which `holds` is true, by bisection; infinite if there is none. `holds(0)` is false."""
    high = 1.0
    while not holds(high):
        high *= 2
        if high == math.inf:
            return high
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
