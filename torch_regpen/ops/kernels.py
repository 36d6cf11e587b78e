"""Functions of tensors that torch.compile turns into one pass over memory each; see `compiled`.

Their arguments are plain tensors, not penalties or groupings, so one compilation serves all models and all lambdas.
Elementwise functions take 1-d tensors. Functions on groups take matrices with a group in each row, and columns with one
element for each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups.grouping import working_dtype
from ..groups.layouts import Slices
from .root_search import TensorSums, root


def total(w: Tensor, linear: Tensor, quadratic: Tensor | None) -> Tensor:
    """`sum (linear*|w| + quadratic*w^2)`, accumulated in float64 on a CPU, because float32 would lose digits."""
    x = _wide(w)
    terms = linear * x.abs() if quadratic is None else linear * x.abs() + quadratic * x.square()
    return terms.sum(dtype=torch.float64 if w.device.type == "cpu" else x.dtype).to(x.dtype)


def gradient(w: Tensor, linear: Tensor, quadratic: Tensor | None) -> Tensor:
    """`linear * sign(w) + quadratic * w`. `quadratic` is None, not 0, because 0 times infinity is NaN."""
    return linear * w.sign() if quadratic is None else linear * w.sign() + quadratic * w


def add_gradient_(grad: Tensor, w: Tensor, linear: Tensor, quadratic: Tensor | None) -> None:
    """`grad += linear * sign(w) + quadratic * w`."""
    grad.copy_(_wide(grad) + gradient(_wide(w), linear, quadratic))


def soft_threshold_each_(w: Tensor, moment: Tensor, numerator: Tensor, eps: Tensor, max_change: Tensor) -> None:
    """`w = sign(w) * max(|w| - t, 0)` with `t = min(numerator / (sqrt(moment) + eps), max_change)`."""
    x = _wide(w)
    t = torch.minimum(_quotient(moment, numerator, eps), max_change)
    w.copy_(x - torch.clamp(x, -t, t))


def threshold_latent_(w: Tensor, gap: Tensor, t: Tensor) -> None:
    """With `z = w + gap`: `w = sign(z) * max(|z| - t, 0)` and `gap = z - w`."""
    new, new_gap = _thresholded(w, gap, t)
    gap.copy_(new_gap)
    w.copy_(new)


def threshold_latent_each_(
    w: Tensor,
    gap: Tensor,
    sums: Tensor,
    moment: Tensor,
    numerator: Tensor,
    eps: Tensor,
    most: Tensor,
    lam: Tensor,
) -> None:
    """`sums += min(numerator / (sqrt(moment) + eps), most)`, then `threshold_latent_` with `t = sums * lam`.

    If the moment of an element is 0, its gap and sum are set to 0.
    """
    s = sums + torch.minimum(_quotient(moment, numerator, eps), most)
    new, new_gap = _thresholded(w, gap, s * lam)
    seen = moment != 0
    gap.copy_(torch.where(seen, new_gap, 0))
    sums.copy_(torch.where(seen, s, 0))
    w.copy_(new)


def _thresholded(w: Tensor, gap: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    z = _wide(w) + gap
    change = torch.clamp(z, -t, t)
    new = (z - change).to(w.dtype)
    return new, change if w.dtype == gap.dtype else z - new  # the gap includes rounding errors


def norm(x: Tensor) -> Tensor:
    """The norm of each row."""
    return x.square().sum(1, keepdim=True).sqrt()


def latent_norm(w: Tensor, gap: Tensor) -> Tensor:
    """The norm of each row of `w + gap`."""
    return norm(w + gap)


def scale_latent_(w: Tensor, gap: Tensor, factors: Tensor) -> None:
    """With `z = w + gap`: `w = z * factors` and `gap = z - w`."""
    z = w + gap
    v = z * factors
    gap.copy_(z - v)
    w.copy_(v)


def weighted(x: Tensor, r: Tensor, moment: Tensor | None, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of each row of `x`, and `sum r * x^2`. With a moment, `r / (sqrt(moment) + eps)` replaces `r`."""
    r, squares = _radii(r, moment, eps), x.square()
    return squares.sum(1, keepdim=True).sqrt(), (squares * r).sum(1, keepdim=True)


def at_zero(x: Tensor, r: Tensor, moment: Tensor | None, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    """`sum (x / r)^2` and `max(|x| - r)` of each row; see `weighted`."""
    r, modulus = _radii(r, moment, eps).clamp_min(torch.finfo(x.dtype).tiny), x.abs()
    return (modulus / r).square().sum(1, keepdim=True), (modulus - r).amax(1, keepdim=True)


def powers(x: Tensor, r: Tensor, moment: Tensor | None, eps: Tensor | None, theta: Tensor) -> tuple[Tensor, Tensor]:
    """`sum (x / (theta + r))^2` and `sum (x / (theta + r))^2 / (theta + r)` of each row; see `weighted`."""
    distance = _radii(r, moment, eps) + theta
    squares = (x / distance).square()
    return squares.sum(1, keepdim=True), (squares / distance).sum(1, keepdim=True)


def change_norm(x: Tensor, r: Tensor, moment: Tensor | None, eps: Tensor | None, theta: Tensor) -> Tensor:
    """The norm of each row of `x * theta / (theta + r) - x`; see `weighted`."""
    r = _radii(r, moment, eps)
    return norm(x - x * (theta / (r + theta)))


def shrink_(x: Tensor, r: Tensor, moment: Tensor | None, eps: Tensor | None, theta: Tensor, factor: Tensor) -> None:
    """Add `factor` of the change of `x` to `x * theta / (theta + r)`; see `weighted`."""
    r = _radii(r, moment, eps)
    x.copy_(x + factor * (x * (theta / (r + theta)) - x))


def add_steps_(
    w: Tensor,
    gap: Tensor,
    sums: Tensor,
    moment: Tensor,
    numerator: Tensor,
    eps: Tensor,
    slope: Tensor,
    least: Tensor,
    radius: Tensor,
) -> None:
    """`sums += numerator / max(sqrt(moment) + eps, slope * |w|, least)`, `w += gap`, `gap = sums * radius`."""
    size = torch.maximum(torch.maximum(moment.sqrt() + eps, slope * w.abs()), least)
    s, latent = sums + numerator / size, w + gap
    sums.copy_(s)
    w.copy_(latent)
    gap.copy_(s * radius)


def shrink_latent_(w: Tensor, r: Tensor, sums: Tensor, moment: Tensor, theta: Tensor, max_change: Tensor) -> None:
    """`w *= theta / (theta + r)`, and `r` becomes the gap, the amount subtracted from `w`.

    If the moment of an element is 0, it changes by at most `max_change`, and its gap and sum are set to 0.
    """
    change, seen = w - w * (theta / (theta + r)), moment > 0
    w.copy_(w - torch.where(seen, change, torch.clamp(change, -max_change, max_change)))
    r.copy_(torch.where(seen, change, 0))
    sums.copy_(torch.where(seen, sums, 0))


def shrink_all_(x: Tensor, r: Tensor, moment: Tensor, eps: Tensor, most: Tensor) -> None:
    """The whole prox of a group lasso: `shrink_` with the root of each row, which changes by at most `most` in norm.

    It takes all Newton steps, also where fewer would do. On a GPU that costs less than a kernel for each step.
    """
    theta = _root(x, _radii(r, moment, eps))
    change = change_norm(x, r, moment, eps, theta).clamp_min(torch.finfo(x.dtype).tiny)  # 0 where lr is 0
    shrink_(x, r, moment, eps, theta, (most / change).clamp_max(1))


def average_all_(
    w: Tensor,
    gap: Tensor,
    sums: Tensor,
    moment: Tensor,
    numerator: Tensor,
    eps: Tensor,
    slope: Tensor,
    least: Tensor,
    radius: Tensor,
    max_change: Tensor,
) -> None:
    """A whole step of dual averaging: `add_steps_`, then `shrink_latent_` with the root of each row."""
    add_steps_(w, gap, sums, moment, numerator, eps, slope, least, radius)
    shrink_latent_(w, gap, sums, moment, _root(w, gap), max_change)


def _root(x: Tensor, r: Tensor) -> Tensor:
    rows = Slices(0)
    return root(TensorSums(x, r, rows), rows)


def _radii(r: Tensor, moment: Tensor | None, eps: Tensor | None) -> Tensor:
    return r if moment is None or eps is None else _quotient(moment, r, eps)


def _quotient(moment: Tensor, numerator: Tensor, eps: Tensor) -> Tensor:
    return numerator / (_wide(moment).sqrt() + eps)


def _wide(x: Tensor) -> Tensor:
    return x.to(working_dtype(x.dtype))
