"""The histogram and the sums of a tensor, computed on its device in one pass without copying it."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.reductions import reduce_shards
from ..distributed.shards import local
from ..groups.grouping import working_dtype

__all__ = ["Counts", "flat_view", "histogram", "histogram_counts"]

CPU_CHUNK = 1 << 17  # elements: 512 KiB of float32, within the second-level cache
GPU_CHUNK = 1 << 22  # elements: enough to keep the device busy
OCTAVE_BITS = 3  # 2**3 bins for each factor of 2: about as fine as TensorBoard draws the largest weights
SUMS = 5  # the number of sums after the bins in a row of `histogram_counts`


def histogram_counts(w: Tensor) -> Tensor:
    """The counts of the bins of `w` and five sums, over all ranks, as one row on its device; see `Counts`."""
    real, integer, shift = _layout(w.dtype)
    flat = flat_view(local(w))
    wide = torch.float32 if flat.device.type == "mps" else torch.float64  # there is no float64 on MPS
    bins = 1 << (8 * real.itemsize - shift)
    counts = torch.zeros(bins, dtype=torch.int64, device=flat.device)
    sums = torch.zeros(3, dtype=wide, device=flat.device)
    tops = torch.full((2,), -math.inf, dtype=wide, device=flat.device)
    one = torch.ones((), dtype=torch.int64, device=flat.device)
    chunk = GPU_CHUNK if flat.is_cuda else CPU_CHUNK
    for start in range(0, flat.numel(), chunk):
        x = flat[start : start + chunk]
        # Adding 0.0 turns -0.0 into 0.0, so that -0.0 can then represent NaN and infinities.
        x = (x.abs() if x.is_complex() else x).to(real) + 0.0
        x.nan_to_num_(-0.0, -0.0, -0.0)
        # The leading bits of a float (sign, exponent, part of the mantissa) are the number of its bin. They are rounded
        # up, so only zeros are in the first bin.
        index = x.view(integer).add((1 << shift) - 1).bitwise_right_shift_(shift).bitwise_and_(bins - 1)
        counts.index_add_(0, index, one.expand(len(index)))  # bincount would wait for a GPU
        lowest, highest = x.aminmax()
        x = x.to(wide)  # squares of large weights overflow float32
        total, squares = x.sum(), x.dot(x)
        sums += torch.stack([total, x.abs_().sum(), squares])
        tops = torch.maximum(tops, torch.stack([highest, -lowest]))
    counts, sums, tops = reduce_shards(counts, w, "sum"), reduce_shards(sums, w, "sum"), reduce_shards(tops, w, "max")
    return torch.cat([counts.to(wide), sums, tops])


class Counts(NamedTuple):
    """A row of `histogram_counts`, on the CPU.

    Attributes:
        bins: the counts of exact zeros, of `w > 0` by size, of NaN and infinities, and of `w < 0` by size.
        sums: the sum, the l1 norm, the sum of squares, the largest element, and the largest negated element. Elements
            that are not finite count as 0.
        dtype: the dtype of the tensor.
    """

    bins: Tensor
    sums: list[float]
    dtype: torch.dtype

    @classmethod
    def of(cls, row: Tensor, dtype: torch.dtype) -> Counts:
        """The parts of a row."""
        return cls(row[:-SUMS], row[-SUMS:].tolist(), dtype)

    @property
    def zeros(self) -> float:
        """The number of elements that are exactly zero."""
        return self.bins[0].item()

    @property
    def nonfinite(self) -> float:
        """The number of elements that are NaN or infinite."""
        return self.bins[len(self.bins) // 2].item()

    def without_zeros(self) -> Counts:
        """The counts of the nonzero elements. The sums do not change."""
        bins = self.bins.clone()
        bins[0] = 0
        return self._replace(bins=bins)

    def histogram(self) -> dict[str, Any] | None:
        """The arguments of `SummaryWriter.add_histogram_raw` for the finite elements; None if there are none."""
        count = self.bins.sum().item() - self.nonfinite
        if not count:
            return None
        total, _, squares, highest, negated = self.sums
        limits, counts = histogram(self.bins, self.dtype)
        # Elements that are not finite, or were left out, counted as 0; then the bins limit the range of the others.
        limits[0], limits[-1] = max(-negated, limits[0]), min(highest, limits[-1])
        return {
            **{"min": limits[0], "max": limits[-1], "num": count, "sum": total, "sum_squares": squares},
            **{"bucket_limits": limits, "bucket_counts": counts},
        }


def flat_view(w: Tensor) -> Tensor:
    """The elements of `w` in memory order, so that channels_last is not copied."""
    return w.permute(sorted(range(w.ndim), key=w.stride, reverse=True)).reshape(-1)


def histogram(counts: Tensor, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The upper limits and counts of the bins, in ascending order; of adjacent empty bins, only the last."""
    zero_and_positive, negative = counts.chunk(2)
    counts = torch.cat([negative[1:].flip(0), zero_and_positive])
    kept = counts > 0
    kept[:-1] |= kept[1:].clone()  # the limit of an empty bin is where the next bin begins
    return _limits(working_dtype(dtype))[kept].tolist(), counts[kept].tolist()


def _layout(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, int]:
    """The dtype in which a weight is counted, the integer dtype of the same width, and the shift of its bits."""
    real = working_dtype(dtype)
    return (real, torch.int64, 52 - OCTAVE_BITS) if real == torch.float64 else (real, torch.int32, 23 - OCTAVE_BITS)


@cache
def _limits(dtype: torch.dtype) -> Tensor:
    """The upper limits of all bins, in ascending order."""
    real, integer, shift = _layout(dtype)
    numbers = torch.arange(1 << (8 * real.itemsize - shift - 1), dtype=integer, device="cpu")
    edges = (numbers << shift).view(real).double()
    return torch.cat([-edges[:-1].flip(0), edges])
