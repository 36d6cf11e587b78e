"""The numbers of a tensor that a histogram needs, counted where it lies, in one pass and without a copy of it."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ..distributed.reductions import reduce_shards
from ..distributed.shards import local
from ..groups.grouping import working_dtype

__all__ = ["histogram"]

CPU_CHUNK = 1 << 17  # elements: 512 KiB of float32, within the second-level cache
GPU_CHUNK = 1 << 22  # elements: enough to keep the device busy
OCTAVE_BITS = 3  # 2**3 bins for each factor of 2: about as fine as TensorBoard draws the largest weights


def histogram_counts(w: Tensor) -> Tensor:
    """All numbers that are wanted of `w`, over all ranks, on its device: the counts of the bins, and five more.

    The bins: exact zeros; `w > 0` by size; NaN and infinities; `w < 0` by size. The others, of the finite elements:
    sum, l1 norm, sum of squares, the largest, the largest of their negatives.
    """
    real, integer, shift = _layout(w.dtype)
    flat = local(w)
    flat = flat.permute(sorted(range(flat.ndim), key=flat.stride, reverse=True)).reshape(-1)  # channels_last: no copy
    wide = torch.float32 if flat.device.type == "mps" else torch.float64  # there is no float64 on MPS
    bins = 1 << (8 * real.itemsize - shift)
    counts = torch.zeros(bins, dtype=torch.int64, device=flat.device)
    sums = torch.zeros(3, dtype=wide, device=flat.device)
    tops = torch.full((2,), -math.inf, dtype=wide, device=flat.device)
    one = torch.ones((), dtype=torch.int64, device=flat.device)
    chunk = GPU_CHUNK if flat.is_cuda else CPU_CHUNK
    for start in range(0, flat.numel(), chunk):
        x = flat[start : start + chunk]
        # Adding 0.0 turns -0.0 into 0.0, so that afterwards -0.0 can stand for what is not finite.
        x = (x.abs() if x.is_complex() else x).to(real) + 0.0
        x.nan_to_num_(-0.0, -0.0, -0.0)
        # The leading bits of a float, sign, exponent and some of the mantissa, are the number of its bin; rounded up,
        # so that only zeros are in the first.
        index = x.view(integer).add((1 << shift) - 1).bitwise_right_shift_(shift).bitwise_and_(bins - 1)
        counts.index_add_(0, index, one.expand(len(index)))  # bincount would wait for a GPU
        lowest, highest = x.aminmax()
        x = x.to(wide)  # squares of large weights overflow float32
        total, squares = x.sum(), x.dot(x)
        sums += torch.stack([total, x.abs_().sum(), squares])
        tops = torch.maximum(tops, torch.stack([highest, -lowest]))
    counts, sums, tops = reduce_shards(counts, w, "sum"), reduce_shards(sums, w, "sum"), reduce_shards(tops, w, "max")
    return torch.cat([counts.to(wide), sums, tops])


def _layout(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, int]:
    """The dtype in which a weight is counted, the integer of its width, and by how much its bits are shifted."""
    real = working_dtype(dtype)
    return (real, torch.int64, 52 - OCTAVE_BITS) if real == torch.float64 else (real, torch.int32, 23 - OCTAVE_BITS)


def histogram(counts: Tensor, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The upper limits and the counts of the bins, from the lowest up; of neighbouring empty bins only the last."""
    zero_and_positive, negative = counts.chunk(2)
    counts = torch.cat([negative[1:].flip(0), zero_and_positive])
    kept = counts > 0
    kept[:-1] |= kept[1:].clone()  # an empty bin before a full one tells where that begins
    return _limits(working_dtype(dtype))[kept].tolist(), counts[kept].tolist()


@cache
def _limits(dtype: torch.dtype) -> Tensor:
    """The upper limits of all bins, from the lowest up."""
    real, integer, shift = _layout(dtype)
    numbers = torch.arange(1 << (8 * real.itemsize - shift - 1), dtype=integer, device="cpu")
    edges = (numbers << shift).view(real).double()
    return torch.cat([-edges[:-1].flip(0), edges])
