"""Record which elements of a tensor are zero, in one bit each, and count the changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..distributed.reductions import reduce_shards
from ..distributed.shards import local
from .histogram import flat_view

__all__ = ["ZeroBits", "count_flipped", "zero_bits"]

CHUNK = 1 << 20  # elements, a multiple of 8: the largest temporary has one byte for each


class ZeroBits(NamedTuple):
    """Which elements of this rank's shard of a tensor are zero.

    Attributes:
        layout: the shape, strides and device of the shard. Only bits of the same layout can be compared.
        bits: eight elements in each byte, in memory order; a bit is set if the element is not zero.
    """

    layout: tuple[object, ...]
    bits: Tensor


def zero_bits(w: Tensor) -> ZeroBits:
    """The zeros of `w`, in 1/32 of the memory of float32 weights, on its device."""
    w = local(w)
    flat = flat_view(w)
    powers = _powers(flat)
    bits = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        nonzero = flat[start : start + CHUNK].bool()
        eights = pad(nonzero, (0, -len(nonzero) % 8)).view(-1, 8)
        bits[start // 8 :][: len(eights)] = (eights * powers).sum(1, dtype=torch.uint8)
    return ZeroBits((w.shape, w.stride(), w.device), bits)


def count_flipped(old: ZeroBits, new: ZeroBits, w: Tensor) -> Tensor:
    """The number of elements of `w` that are zero in only one of the two, over all ranks; a 0-dim tensor."""
    powers, count = _powers(new.bits), torch.zeros((), dtype=torch.int64, device=new.bits.device)
    for before, after in zip(old.bits.split(CHUNK // 8), new.bits.split(CHUNK // 8), strict=True):
        count += ((before ^ after)[:, None] & powers).bool().sum()
    return reduce_shards(count, w, "sum")


def _powers(like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.uint8, device=like.device) << torch.arange(
        8, dtype=torch.uint8, device=like.device
    )
