"""One operation over many tensors at once, in pieces that fit the cache, with no copy of them all.

`packs` says which tensors go together: large ones alone, in chunks, and small ones in packs. All else here takes the
tensors of one pack. Nothing reads a value back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .groups import working_dtype
from .sharding import local

__all__ = [
    "add_",
    "add_with_total_",
    "corresponding",
    "cuts",
    "gradients",
    "joined",
    "mul_",
    "packs",
    "sizes",
    "soft_threshold_",
    "soft_threshold_each_",
    "summed",
    "threshold_latent_",
    "threshold_latent_each_",
    "total",
]


@dataclass(frozen=True)
class Sizes:
    """In elements.

    Attributes:
        small: the most of a tensor that goes together with others.
        pack: the most of these together.
        chunk: of the pieces of larger ones.
    """

    small: int
    pack: int
    chunk: int


# A chunk of float32 and what is computed beside it are within the second-level cache; temporaries of twice the size go
# back to the system each time, and new ones cost more than what is done to them.
CPU = Sizes(small=1 << 17, pack=1 << 18, chunk=1 << 17)
CUDA = Sizes(small=1 << 21, pack=1 << 24, chunk=1 << 24)  # enough to keep the device busy

ROW = 1 << 9  # elements that a norm in float32 may sum one after the other

Scalar = float | Tensor  # a number or a 0-dim tensor
Take = Callable[[Any], Any]


def packs(ws: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the tensors that go together: one large tensor, or small ones of one type, dtype and device."""
    if torch.compiler.is_compiling():  # the compiler makes its own
        return [[i] for i in range(len(ws))]
    found: list[list[int]] = []
    open_packs: dict[Any, list[int]] = {}
    room: dict[Any, int] = {}
    for i, w in enumerate(ws):
        size, limits = w.numel(), sizes(w)
        kind = (type(w), w.dtype, w.device)
        if not 0 < size <= limits.small:
            found.append([i])
        elif size <= room.get(kind, 0):
            open_packs[kind].append(i)
            room[kind] -= size
        else:
            open_packs[kind] = [i]
            room[kind] = limits.pack - size
            found.append(open_packs[kind])
    return found


def cuts(w: Tensor, dims: Sequence[int], times: int = 1) -> Iterator[Take]:
    """For each piece of a tensor what takes it, and the same of a tensor beside it; of all else, it takes the whole.

    Args:
        w: the tensor.
        dims: along which it may be cut.
        times: how much larger than usual the pieces may be, where next to nothing is written beside them.
    """
    chunk = times * sizes(w).chunk
    if not dims or w.numel() <= chunk or local(w) is not w or torch.compiler.is_compiling():
        yield lambda x: x
        return
    dim = max(dims, key=w.size)
    length = max(1, chunk * w.shape[dim] // w.numel())
    for start in range(0, w.shape[dim], length):
        yield partial(_narrow, dim, start, length, w.shape[dim])


def _narrow(dim: int, start: int, length: int, whole: int, x: Any) -> Any:
    if not isinstance(x, Tensor) or x.ndim <= dim or x.shape[dim] != whole:
        return x
    return x.narrow(dim, start, min(length, whole - start))


def total(ws: Sequence[Tensor], linear: float, quadratic: float) -> Tensor:
    """`sum (linear*|w| + quadratic*w^2)` over all elements, 0-dim, accumulated in float32 at least."""
    values = []
    buffer = None
    for (some,) in corresponding(ws, times=2):
        x = _wide(some)
        if quadratic:
            values.append(quadratic * _sum_of_squares(x))
        if linear or not quadratic:
            buffer = _like(x, buffer)
            values.append(linear * torch.abs(x, out=buffer).sum())
    return summed(values)


def gradients(ws: Sequence[Tensor], linear: Tensor | None, quadratic: Tensor | None) -> list[Tensor]:
    """`linear * sign(w) + 2 * quadratic * w` in new tensors and no others; the factors 0-dim or None, not both None."""
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
        _add_(_local(grads), _local(ws), 2 * quadratic)
        return
    for some_ws, some_grads, signs in _with_signs(ws, grads):
        _add_(some_grads, signs, linear)
        if quadratic:
            _add_(some_grads, some_ws, 2 * quadratic)


def add_with_total_(grads: Sequence[Tensor], ws: Sequence[Tensor], linear: float, quadratic: float) -> Tensor:
    """`add_`, and `total` of the same from one pass."""
    values = []
    if linear or not quadratic:
        for some_ws, some_grads, signs in _with_signs(ws, grads):
            _add_(some_grads, signs, linear)
            torch._foreach_mul_(signs, some_ws)  # |w|
            values.append(linear * _wide(signs).sum())
    if quadratic:
        for some_ws, some_grads in corresponding(ws, grads):
            values.append(quadratic * _sum_of_squares(_wide(some_ws)))
            _add_(some_grads, some_ws, 2 * quadratic)
    return summed(values)


def mul_(ws: Sequence[Tensor], factor: Scalar) -> None:
    """`w *= factor`."""
    if torch.compiler.is_compiling():
        factor = _variable(factor, ws[0])
    elif not isinstance(factor, Tensor) and len(ws) > 1 and ws[0].device.type == "cpu":
        # As exact; a number takes twice as long on small tensors.
        factor = torch.tensor(factor, dtype=torch.float64, device="cpu")
    torch._foreach_mul_(_local(ws), factor)


def soft_threshold_(ws: Sequence[Tensor], t: Scalar) -> None:
    """`w = sign(w) * max(|w| - t, 0)`."""
    if _shrinks_in_place(ws, t):
        for w in _local(ws):
            torch._C._nn.softshrink(w, t, out=w)  # type: ignore[call-arg, arg-type]
    else:
        for (some,) in corresponding(ws):
            _soft_threshold_(some, t)


def threshold_latent_(ws: Sequence[Tensor], gaps: Sequence[Tensor], ts: Tensor) -> None:
    """With `z = w + gap`: `w = sign(z) * max(|z| - t, 0)` and `gap = z - w`, an element of `ts` for each tensor."""
    ws, gaps = _local(ws), _local(gaps)
    t = ts[0] if len(ws) == 1 else _spread(ts, ws)
    for some_ws, some_gaps in corresponding(ws, gaps):
        _threshold_latent_(some_ws, some_gaps, t)


def threshold_latent_each_(
    ws: Sequence[Tensor],
    gaps: Sequence[Tensor],
    sums: Sequence[Tensor],
    moments: Sequence[Tensor],
    numerators: Tensor,
    eps: Tensor,
    cap: Scalar,
    lam: float,
) -> None:
    """`sum += min(numerator / (sqrt(moment) + eps), cap / lam)`, then `threshold_latent_` with `t = sum * lam`.

    Where the moment is 0, gap and sum are 0 in the end.

    Args:
        ws: the tensors.
        gaps: of their shapes.
        sums: of their shapes.
        moments: of their shapes.
        numerators: an element for each tensor.
        eps: an element for each tensor, not 0 where the numerator is.
        cap: the most that one step adds to a threshold.
        lam: more than 0.
    """
    ws, gaps, sums, moments = (_local(xs) for xs in (ws, gaps, sums, moments))
    factor = _variable(lam, ws[0]) if torch.compiler.is_compiling() else lam
    most, buffer = cap / factor, None
    for run in _runs(ws):
        some = ws[run]
        numerator, e = (x[run][0] if len(some) == 1 else _spread(x[run], some) for x in (numerators, eps))
        for piece in corresponding(some, gaps[run], sums[run], moments[run]):
            some_ws, some_gaps, some_sums, some_moments = piece
            s, moment = joined(some_sums), _wide(some_moments)
            buffer = _like(moment, buffer)  # the only temporary: memory that is new to the system costs more than sqrt
            size = torch.sqrt(moment, out=buffer).add_(e)
            s.add_(torch.div(numerator, size, out=size).clamp_max_(most))
            t = torch.mul(s, factor, out=size)
            _threshold_latent_(some_ws, some_gaps, t)
            seen = torch.sign(moment, out=size)
            torch._foreach_mul_(some_gaps, _parted(seen, some_gaps))
            s.mul_(seen)
            if len(some_sums) > 1:
                torch._foreach_copy_(some_sums, _parted(s, some_sums))


def soft_threshold_each_(
    ws: Sequence[Tensor], moments: Sequence[Tensor], numerators: Tensor, eps: Tensor, cap: Scalar
) -> None:
    """`w = sign(w) * max(|w| - t, 0)` with `t = min(numerator / (sqrt(moment) + eps), cap)` for each element.

    Args:
        ws: the tensors.
        moments: of their shapes.
        numerators: an element for each tensor.
        eps: an element for each tensor, not 0 where the numerator is.
        cap: the largest threshold.
    """
    ws = _local(ws)
    for run in _runs(ws):
        some = ws[run]
        numerator, e = (x[run][0] if len(some) == 1 else _spread(x[run], some) for x in (numerators, eps))
        for some_ws, some_moments in corresponding(some, moments[run]):
            t = _wide(some_moments).sqrt().add_(e)
            _soft_threshold_(some_ws, torch.div(numerator, t, out=t).clamp_max_(cap))


def _runs(ws: Sequence[Tensor]) -> Iterator[slice]:
    """Parts of a pack of half a chunk each, where several temporaries of their size have to fit the cache."""
    start = size = 0
    for i, w in enumerate(ws):
        if i > start and size + w.numel() > sizes(w).chunk // 2:
            yield slice(start, i)
            start, size = i, 0
        size += w.numel()
    yield slice(start, len(ws))


def _spread(xs: Tensor, ws: Sequence[Tensor]) -> Tensor:
    """An element for each tensor of a pack, as one for each of theirs, `joined`."""
    return joined([x.expand_as(w) for x, w in zip(xs.unbind(), ws, strict=True)])


def _with_signs(
    ws: Sequence[Tensor], grads: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """`corresponding`, and the signs of the first, in memory that the next piece uses again."""
    buffer = None
    for some_ws, some_grads in corresponding(ws, grads, times=2):  # one buffer is all that is written beside them
        if len(some_ws) > 1 or torch.compiler.is_compiling():
            yield some_ws, some_grads, list(torch._foreach_sign(some_ws))
            continue
        buffer = _like(some_ws[0], buffer)
        yield some_ws, some_grads, [torch.sign(some_ws[0], out=buffer)]


def _like(x: Tensor, buffer: Tensor | None) -> Tensor | None:
    """Memory to write to for each piece anew, where that is known to be possible; None for what torch allocates."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if buffer is not None and buffer.is_contiguous() and x.is_contiguous() and x.numel() <= buffer.numel():
        return buffer.view(-1)[: x.numel()].view(x.shape)
    return buffer if buffer is not None and buffer.shape == x.shape else torch.empty_like(x)


def _add_(xs: list[Tensor], ys: list[Tensor], alpha: float) -> None:
    if torch.compiler.is_compiling():
        torch._foreach_add_(xs, torch._foreach_mul(ys, _variable(alpha, ys[0])))
    elif len(xs) == 1:
        xs[0].add_(ys[0], alpha=alpha)
    else:
        torch._foreach_add_(xs, ys, alpha=alpha)


def _variable(x: Scalar, like: Tensor) -> Tensor:
    """A number as torch.compile can take it as one that may change; an argument it would compile in, each anew."""
    return x * like.new_ones((), dtype=working_dtype(like.dtype))


def _sum_of_squares(x: Tensor) -> Tensor:
    """By norms of rows that are short enough for float32: no temporary."""
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
    """Whether softshrink, which writes no temporary, is right and best.

    In half precision it rounds the threshold, compiled it turns NaN into 0; on CUDA small tensors need fewer launches.
    """
    exact = ws[0].dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
    return exact and not isinstance(t, Tensor) and (len(ws) == 1 or not ws[0].is_cuda)


def _soft_threshold_(some: list[Tensor], t: Scalar) -> None:
    """`soft_threshold_` of one piece; thresholds for each element are used up."""
    w = joined(some)
    x = w.to(working_dtype(w.dtype))
    if torch.compiler.is_compiling():
        t = _variable(t, x)
    if isinstance(t, Tensor):  # clamp would take a tensor for -t, and read a single element for each of x
        clamped = torch.minimum(x, t).clamp_min_(t.neg_() if t.ndim else -t)
    else:
        clamped = torch.clamp(x, -t, t)
    if x is w:
        torch._foreach_sub_(some, _parted(clamped, some))
    else:
        torch._foreach_copy_(some, _parted(x.sub_(clamped), some))


def _threshold_latent_(ws: list[Tensor], gaps: list[Tensor], t: Tensor) -> None:
    """`threshold_latent_` of one piece; thresholds for each element are used up."""
    in_place = len(ws) == 1 and ws[0].dtype == gaps[0].dtype and not torch.compiler.is_compiling()
    z = ws[0].add_(gaps[0]) if in_place else _wide(ws) + _wide(gaps)
    gap = torch.minimum(z, t, out=gaps[0]) if in_place else torch.minimum(z, t)
    gap.clamp_min_(t.neg_() if t.ndim else -t)
    if in_place:
        z.sub_(gap)
        return
    torch._foreach_copy_(ws, _parted(z - gap, ws))
    if ws[0].dtype != gap.dtype:  # what rounding takes from the weights is not lost
        torch.sub(z, joined(ws), out=gap)
    torch._foreach_copy_(gaps, _parted(gap, gaps))


def corresponding(*lists: Sequence[Tensor], times: int = 1) -> Iterator[tuple[list[Tensor], ...]]:
    """Corresponding pieces of lists of tensors of the same shapes: chunks of single ones, or all of a pack."""
    parts = tuple(map(_local, lists))
    if len(parts[0]) > 1 or torch.compiler.is_compiling():
        yield parts
    else:
        for chunks in _chunks(*(x for (x,) in parts), times=times):
            yield tuple([chunk] for chunk in chunks)


def _chunks(w: Tensor, *others: Tensor, times: int) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike, whatever their strides: along dim 0, if its rows fit a chunk."""
    size, chunk = w.numel(), times * sizes(w).chunk
    if size <= chunk:
        return iter([(w, *others)])
    if all(x.is_contiguous() for x in (w, *others)):
        return zip(*(x.view(-1).split(chunk) for x in (w, *others)), strict=True)
    dim = 0 if size // len(w) <= chunk else max(range(w.ndim), key=w.size)
    rows = max(1, chunk * w.shape[dim] // size)
    return zip(*(x.split(rows, dim) for x in (w, *others)), strict=True)


def sizes(w: Tensor) -> Sizes:
    """How tensors are put together and cut on the device of `w`."""
    return CUDA if w.is_cuda else CPU


def _local(ws: Sequence[Tensor]) -> list[Tensor]:
    """The parts of the tensors of a pack that lie on this rank."""
    return list(map(local, ws)) if local(ws[0]) is not ws[0] else list(ws)


def joined(some: Sequence[Tensor]) -> Tensor:
    """A tensor as it is, or several as one."""
    if len(some) == 1:
        return some[0]
    if torch._C._are_functorch_transforms_active():  # which know no more than this
        return torch.cat([x.reshape(-1) for x in some])
    return _flatten_dense_tensors(some)  # type: ignore[no-any-return]


def _wide(some: Sequence[Tensor]) -> Tensor:
    """`joined`, in float32 at least."""
    x = joined(some)
    return x.to(working_dtype(x.dtype))


def _parted(x: Tensor, some: list[Tensor]) -> list[Tensor]:
    """Takes apart again what `joined` put together."""
    return [x] if len(some) == 1 else list(_unflatten_dense_tensors(x, some))
