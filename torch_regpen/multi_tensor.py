"""One operation over many tensors at once, in pieces that fit the cache, with no copy of them all.

Large tensors go through in chunks, small ones are packed together; nothing here reads a value back from the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .functional import soft_threshold
from .groups import working_dtype
from .sharding import local

__all__ = ["add_", "add_sign_", "mul_", "soft_threshold_", "total"]

CPU_CHUNK = 1 << 18  # elements: 1 MiB of float32, within the second-level cache
CUDA_CHUNK = 1 << 24  # elements: enough to keep the device busy, 64 MiB of float32


def total(ws: Sequence[Tensor], linear: float, quadratic: float) -> Tensor:
    """`sum (linear*|w| + quadratic*w^2)` over all elements, 0-dim, accumulated in float32 at least."""
    sums = []
    for piece in _pieces(ws):
        x = _joined(piece)
        x = x.to(working_dtype(x.dtype))
        if linear or not quadratic:
            sums.append(linear * x.abs().sum())
        if quadratic:
            sums.append(quadratic * x.square().sum())
    return torch.stack(sums).sum()


def add_(grads: Sequence[Tensor], ws: Sequence[Tensor], alpha: float) -> None:
    """`grad += alpha * w`."""
    torch._foreach_add_([local(g) for g in grads], [local(w) for w in ws], alpha=alpha)


def add_sign_(grads: Sequence[Tensor], ws: Sequence[Tensor], alpha: float) -> None:
    """`grad += alpha * sign(w)`."""
    for g, w in zip(grads, ws, strict=True):
        local(g).add_(local(w).sign(), alpha=alpha)


def mul_(ws: Sequence[Tensor], factor: float | Tensor) -> None:
    """`w *= factor`, a number or a 0-dim tensor."""
    torch._foreach_mul_([local(w) for w in ws], factor)


def soft_threshold_(ws: Sequence[Tensor], t: float | Tensor) -> None:
    """`w = sign(w) * max(|w| - t, 0)`, `t` a number or a 0-dim tensor."""
    for w in ws:
        x = local(w)
        if isinstance(t, Tensor):
            x.copy_(soft_threshold(x, t))
        else:
            torch.ops.aten.softshrink.out(x, t, out=x)


def _pieces(ws: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Flat pieces of at most a chunk: one chunk of a large tensor, or several small tensors of one kind."""
    packs: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    packed: dict[tuple[torch.device, torch.dtype], int] = {}
    for w in ws:
        flat = local(w).reshape(-1)
        chunk = CUDA_CHUNK if flat.is_cuda else CPU_CHUNK
        if flat.numel() * 2 > chunk:
            for part in flat.split(chunk):
                yield [part]
            continue
        kind = (flat.device, flat.dtype)
        if packed.get(kind, 0) + flat.numel() > chunk:
            yield packs.pop(kind)
            packed[kind] = 0
        packs.setdefault(kind, []).append(flat)
        packed[kind] = packed.get(kind, 0) + flat.numel()
    yield from packs.values()


def _joined(piece: list[Tensor]) -> Tensor:
    return piece[0] if len(piece) == 1 else torch.cat(piece)
