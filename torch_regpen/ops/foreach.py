"""Fused operations on lists of tensors, in cache-sized chunks, without a copy of all tensors.

Each function takes the tensors of one pack (see `chunks.batch_indices`): a large tensor, which is processed in chunks,
or several small ones. Nothing synchronizes with the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..groups.grouping import working_dtype
from .chunks import (
    Scalar,
    buffer_like,
    half_chunks,
    joined,
    joined_wide,
    local_shards,
    split_like,
    spread_scalars,
    zip_chunks,
)
from .step import quotient

__all__ = [
    "add_",
    "add_with_total_",
    "gradients",
    "mul_",
    "soft_threshold_",
    "soft_threshold_each_",
    "summed",
    "threshold_latent_",
    "threshold_latent_each_",
    "total",
]


ROW = 1 << 9  # the number of elements that a float32 norm sums directly without losing accuracy


def total(ws: Sequence[Tensor], linear: float, quadratic: float) -> Tensor:
    """`sum (linear*|w| + quadratic*w^2)` over all elements, 0-dim, accumulated in float32 or float64."""
    values = []
    buffer = None
    for (some,) in zip_chunks(ws, times=2):
        x = joined_wide(some)
        if quadratic:
            values.append(quadratic * _sum_of_squares(x))
        if linear or not quadratic:
            buffer = buffer_like(x, buffer)
            values.append(linear * torch.abs(x, out=buffer).sum())
    return summed(values)


def gradients(ws: Sequence[Tensor], linear: Tensor | None, quadratic: Tensor | None) -> list[Tensor]:
    """`linear * sign(w) + 2 * quadratic * w`, without temporaries. A factor is 0-dim or None, but not both are None."""
    if linear is None:
        return list(torch._foreach_mul(ws, 2 * quadratic))  # type: ignore[operator, call-overload]
    signs = list(torch._foreach_sign(list(ws)))
    torch._foreach_mul_(signs, linear)
    if quadratic is not None:
        for sign, w in zip(signs, ws, strict=True):
            sign.addcmul_(w, 2 * quadratic)
    return signs


def add_(grads: Sequence[Tensor], ws: Sequence[Tensor], linear: float, quadratic: float) -> None:
    """`grad += linear * sign(w) + 2 * quadratic * w`."""
    if not linear:
        _add_(local_shards(grads), local_shards(ws), 2 * quadratic)
        return
    for some_ws, some_grads, signs in _with_signs(ws, grads):
        _add_(some_grads, signs, linear)
        if quadratic:
            _add_(some_grads, some_ws, 2 * quadratic)


def add_with_total_(grads: Sequence[Tensor], ws: Sequence[Tensor], linear: float, quadratic: float) -> Tensor:
    """`add_` and `total` in one pass; returns the total."""
    values = []
    if linear or not quadratic:
        for some_ws, some_grads, signs in _with_signs(ws, grads):
            _add_(some_grads, signs, linear)
            torch._foreach_mul_(signs, some_ws)  # |w|
            values.append(linear * joined_wide(signs).sum())
    if quadratic:
        for some_ws, some_grads in zip_chunks(ws, grads):
            values.append(quadratic * _sum_of_squares(joined_wide(some_ws)))
            _add_(some_grads, some_ws, 2 * quadratic)
    return summed(values)


def mul_(ws: Sequence[Tensor], factor: Scalar) -> None:
    """`w *= factor`."""
    if torch.compiler.is_compiling():
        factor = _variable(factor, ws[0])
    elif not isinstance(factor, Tensor) and ws[0].device.type == "cpu":
        # A Python number would be rounded to half precision with such weights, and is slower on small tensors.
        factor = torch.tensor(factor, dtype=torch.float64, device="cpu")
    torch._foreach_mul_(local_shards(ws), factor)


def soft_threshold_(ws: Sequence[Tensor], t: Scalar) -> None:
    """`w = sign(w) * max(|w| - t, 0)`."""
    if _shrinks_in_place(ws, t):
        for w in local_shards(ws):
            torch._C._nn.softshrink(w, t, out=w)  # type: ignore[call-arg, arg-type]
    else:
        for (some,) in zip_chunks(ws):
            _soft_threshold_(some, t)


def threshold_latent_(ws: Sequence[Tensor], gaps: Sequence[Tensor], ts: Tensor) -> None:
    """With `z = w + gap`: `w = sign(z) * max(|z| - t, 0)` and `gap = z - w`; `ts` has one `t` for each tensor."""
    ws, gaps = local_shards(ws), local_shards(gaps)
    (t,) = spread_scalars(ws, ts)
    for some_ws, some_gaps in zip_chunks(ws, gaps):
        _threshold_latent_(some_ws, some_gaps, t)


def threshold_latent_each_(
    ws: Sequence[Tensor],
    gaps: Sequence[Tensor],
    sums: Sequence[Tensor],
    moments: Sequence[Tensor],
    numerators: Tensor,
    eps: Tensor,
    max_change: Scalar,
    lam: float,
) -> None:
    """`sum += min(numerator / (sqrt(moment) + eps), max_change / lam)`, then `threshold_latent_` with `t = sum * lam`.

    If the moment of an element is 0, its gap and sum are set to 0.

    Args:
        ws: the tensors.
        gaps: tensors of the same shapes.
        sums: tensors of the same shapes.
        moments: tensors of the same shapes.
        numerators: one number for each tensor, or 0-dim.
        eps: likewise; not 0 if the numerator is 0.
        max_change: the largest amount that one step adds to a threshold.
        lam: more than 0.
    """
    ws, gaps, sums, moments = (local_shards(xs) for xs in (ws, gaps, sums, moments))
    factor = _variable(lam, ws[0]) if torch.compiler.is_compiling() else lam
    most, buffer = max_change / factor, None
    for run in half_chunks(ws):
        some = ws[run]
        numerator, e = spread_scalars(some, *(x[run] if x.ndim else x for x in (numerators, eps)))
        for piece in zip_chunks(some, gaps[run], sums[run], moments[run]):
            some_ws, some_gaps, some_sums, some_moments = piece
            s, moment = joined(some_sums), joined_wide(some_moments)
            buffer = buffer_like(moment, buffer)  # the only temporary, since new memory costs more than a square root
            size = torch.sqrt(moment, out=buffer).add_(e).clamp_min_(quotient(numerator, most))
            s.addcdiv_(numerator, size)
            _threshold_latent_(some_ws, some_gaps, torch.mul(s, factor, out=size))
            seen = torch.sign(moment, out=size)
            torch._foreach_mul_(some_gaps, split_like(seen, some_gaps))
            s.mul_(seen)
            if len(some_sums) > 1:
                torch._foreach_copy_(some_sums, split_like(s, some_sums))


def soft_threshold_each_(
    ws: Sequence[Tensor], moments: Sequence[Tensor], numerators: Tensor, eps: Tensor, max_change: Scalar
) -> None:
    """`w = sign(w) * max(|w| - t, 0)` with `t = min(numerator / (sqrt(moment) + eps), max_change)` for each element.

    Args:
        ws: the tensors.
        moments: tensors of the same shapes.
        numerators: one number for each tensor, or 0-dim.
        eps: likewise; not 0 if the numerator is 0.
        max_change: the largest threshold.
    """
    ws, buffer = local_shards(ws), None
    for run in half_chunks(ws):
        some = ws[run]
        numerator, e = spread_scalars(some, *(x[run] if x.ndim else x for x in (numerators, eps)))
        for some_ws, some_moments in zip_chunks(some, moments[run]):
            moment = joined_wide(some_moments)
            buffer = buffer_like(moment, buffer)
            t = torch.sqrt(moment, out=buffer).add_(e)
            _soft_threshold_(some_ws, torch.div(numerator, t, out=t).clamp_max_(max_change))


def _with_signs(
    ws: Sequence[Tensor], grads: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """`zip_chunks`, with the signs of each piece of `ws`, in memory that the next piece reuses."""
    buffer = None
    for some_ws, some_grads in zip_chunks(ws, grads, times=2):  # the only temporary is one buffer
        if len(some_ws) > 1 or torch.compiler.is_compiling():
            yield some_ws, some_grads, list(torch._foreach_sign(some_ws))
            continue
        buffer = buffer_like(some_ws[0], buffer)
        yield some_ws, some_grads, [torch.sign(some_ws[0], out=buffer)]


def _add_(xs: list[Tensor], ys: list[Tensor], alpha: float) -> None:
    if torch.compiler.is_compiling():
        torch._foreach_add_(xs, torch._foreach_mul(ys, _variable(alpha, ys[0])))
    elif len(xs) == 1:
        xs[0].add_(ys[0], alpha=alpha)
    else:
        torch._foreach_add_(xs, ys, alpha=alpha)


def _variable(x: Scalar, like: Tensor) -> Tensor:
    """A number as a tensor, which may change; torch.compile would compile again for each value of a number."""
    return x * like.new_ones((), dtype=working_dtype(like.dtype))


def _sum_of_squares(x: Tensor) -> Tensor:
    """The sum of squares, from norms of rows that are short enough for float32, without a temporary."""
    rows = x.numel() // ROW
    if not rows or not x.is_contiguous():
        return x.square().sum()
    flat = x.view(-1)
    squares: Tensor = torch.linalg.vector_norm(flat[: rows * ROW].view(rows, ROW), dim=1).square().sum()
    if rows * ROW < len(flat):
        squares = squares + flat[rows * ROW :].square().sum()
    return squares


def summed(values: list[Tensor]) -> Tensor:
    """The sum of 0-dim tensors, at least one."""
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def _shrinks_in_place(ws: Sequence[Tensor], t: Scalar) -> bool:
    """Whether to use softshrink, which needs no temporary.

    In half precision it rounds the threshold; compiled, it turns NaN into 0; on CUDA, it needs a launch per tensor.
    """
    exact = ws[0].dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
    return exact and not isinstance(t, Tensor) and (len(ws) == 1 or not ws[0].is_cuda)


def _soft_threshold_(some: list[Tensor], t: Scalar) -> None:
    """`soft_threshold_` for one piece; a tensor of thresholds for each element is overwritten."""
    w = joined(some)
    x = w.to(working_dtype(w.dtype))
    if torch.compiler.is_compiling():
        t = _variable(t, x)
    if isinstance(t, Tensor):  # clamp needs a tensor for -t too, and is slow with a 0-dim one
        clamped = torch.minimum(x, t).clamp_min_(t.neg_() if t.ndim else -t)
    else:
        clamped = torch.clamp(x, -t, t)
    if x is w:
        torch._foreach_sub_(some, split_like(clamped, some))
    else:
        torch._foreach_copy_(some, split_like(x.sub_(clamped), some))


def _threshold_latent_(ws: list[Tensor], gaps: list[Tensor], t: Tensor) -> None:
    """`threshold_latent_` for one piece; a tensor of thresholds for each element is overwritten."""
    in_place = len(ws) == 1 and ws[0].dtype == gaps[0].dtype and not torch.compiler.is_compiling()
    z = ws[0].add_(gaps[0]) if in_place else joined_wide(ws) + joined_wide(gaps)
    gap = torch.minimum(z, t, out=gaps[0] if in_place else None).clamp_min_(t.neg_() if t.ndim else -t)
    if in_place:
        z.sub_(gap)
        return
    torch._foreach_copy_(ws, split_like(z - gap, ws))
    if ws[0].dtype != gap.dtype:  # the gap includes the rounding error of the weights
        torch.sub(z, joined(ws), out=gap)
    torch._foreach_copy_(gaps, split_like(gap, gaps))
