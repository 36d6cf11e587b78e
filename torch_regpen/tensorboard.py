"""WeightLogger: what a penalty does to the weights, on TensorBoard.

Nothing here imports TensorBoard: the writer that the user brings does. The weights are counted where they lie, in one
pass, and all numbers come back in one transfer for each logging step.
"""

from __future__ import annotations

import math
import operator
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parameter import is_lazy

from .groups import working_dtype
from .penalty import Penalty
from .sharding import local

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["WeightLogger"]

CPU_CHUNK = 1 << 18  # elements: 1 MiB of float32, within the second-level cache
GPU_CHUNK = 1 << 22  # elements: enough to keep the device busy
OCTAVE_BITS = 3  # 2**3 bins for each factor of 2: about as fine as TensorBoard draws the largest weights


class WeightLogger:
    """Writes histograms and exact zeros of the penalized weights, and the penalty itself, to TensorBoard.

    Call `step()` after each `optimizer.step()`. At step 0 and each `every` steps it writes

    - for each penalized parameter (of a bare model: for all), `weights/NAME`, a histogram of its finite elements;
      `sparsity/NAME`, the fraction of its elements that are exactly zero, from 0 to 1; and, where there are any,
      `nonfinite/NAME`, how many are NaN or infinite;
    - over all these parameters, `sparsity/total`, and `norm/l1` and `norm/l2` of the finite elements;
    - of a penalty, `penalty/value`, what `penalty()` returns, and `penalty/lam`; if it has several parameter groups or
      is a sum, `penalty/lam/0`, `penalty/lam/1`, ..., in their order.

    The bins are symmetric about zero and logarithmic in `|w|`, 8 for each factor of 2, down to the smallest number
    there is; exact zeros have a bin of their own, of width 0, and the first and last bin end where the weights end.
    Complex weights go by modulus. (TensorBoard draws every histogram in 30 bins of equal width, whatever is written:
    there, small weights lie with the zeros. What is exactly zero shows in `sparsity/NAME`.)

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar` and `add_histogram_raw`;
            None on ranks that do not write (with sharded parameters every rank must call `step()`).
        penalty_or_model: the penalty whose parameters are meant, or a model, of which all are.
        every: the number of steps from one logging step to the next, 1 or more.

    Raises:
        TypeError: an argument is none of these.
        ValueError: `every` is less than 1.

    Example:
        >>> logger = WeightLogger(SummaryWriter("runs/l1"), penalty, every=100)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     (criterion(model(x), y) + penalty()).backward()
        ...     optimizer.step()
        ...     logger.step()
    """

    def __init__(self, writer: SummaryWriter | None, penalty_or_model: Penalty | nn.Module, *, every: int = 1) -> None:
        if writer is not None and not (hasattr(writer, "add_scalar") and hasattr(writer, "add_histogram_raw")):
            raise TypeError(
                f"writer is a {type(writer).__name__}; allowed are a torch.utils.tensorboard.SummaryWriter (it needs "
                'TensorBoard: pip install "torch_regpen[tensorboard]"), anything else with add_scalar and '
                "add_histogram_raw, and None on ranks that do not write"
            )
        if not isinstance(penalty_or_model, nn.Module):
            raise TypeError(
                f"penalty_or_model is a {type(penalty_or_model).__name__}; allowed are a penalty (of several, the sum "
                "p + q) and an nn.Module"
            )
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every={every!r} is a {type(every).__name__}; allowed is an int, 1 or more")
        if every < 1:
            raise ValueError(f"every={every}; allowed is an int, 1 or more")
        self.writer = writer
        self.source = penalty_or_model
        self.every = every
        self._next = 0

    @torch.no_grad()
    def step(self, global_step: int | None = None) -> None:
        """Write, if `global_step` is a multiple of `every`.

        Args:
            global_step: the number of this step, as after resuming from a checkpoint; None: one more than the last, and
                0 at first.
        """
        step = self._next if global_step is None else operator.index(global_step)
        self._next = step + 1
        if step % self.every:
            return
        named = self._named_parameters()
        # Every rank takes part in the penalty and in the tallies of sharded parameters: there are collectives in them.
        rows = [self.source().reshape(1)] if isinstance(self.source, Penalty) else []
        rows += [_tally(w) for w in named.values() if self.writer is not None or isinstance(w, DTensor)]
        if self.writer is not None and rows:
            numbers = torch.cat([row.to(rows[-1]) for row in rows]).cpu()  # the one transfer
            _write(self.writer, step, self.source, named, list(numbers.split_with_sizes([len(row) for row in rows])))

    def _named_parameters(self) -> dict[str, Tensor]:
        """The parameters that are meant now, by the names that they have on the board."""
        source = self.source
        pairs = source.named_parameters_penalized() if isinstance(source, Penalty) else source.named_parameters()
        named: dict[str, Tensor] = {}
        for name, w in pairs:
            while name in named:  # a sum may hold parameters of two models
                name += "_"
            if not is_lazy(w):
                named[name] = w
        return named


def _tally(w: Tensor) -> Tensor:
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
        sums += torch.stack([x.sum(), x.abs().sum(), x.dot(x)])
        tops = torch.maximum(tops, torch.stack([highest, -lowest]))
    if isinstance(w, DTensor):
        counts, sums, tops = _reduce(counts, w, "sum"), _reduce(sums, w, "sum"), _reduce(tops, w, "max")
    return torch.cat([counts.to(wide), sums, tops])


def _layout(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, int]:
    """The dtype in which a weight is counted, the integer of its width, and by how much its bits are shifted."""
    real = working_dtype(dtype)
    return (real, torch.int64, 52 - OCTAVE_BITS) if real == torch.float64 else (real, torch.int32, 23 - OCTAVE_BITS)


def _reduce(x: Tensor, like: DTensor, op: str) -> Tensor:
    """`x` of each rank, reduced over the ranks that hold different shards of `like`."""
    placements = [Replicate() if placement.is_replicate() else Partial(op) for placement in like.placements]
    return DTensor.from_local(x, like.device_mesh, placements, run_check=False).full_tensor()


def _write(writer: SummaryWriter, step: int, source: nn.Module, named: dict[str, Tensor], rows: list[Tensor]) -> None:
    """Write the numbers of one step: `rows` are the value of a penalty, of a bare model not, and each one's tally."""
    scalars: dict[str, float] = {}
    if isinstance(source, Penalty):
        scalars["penalty/value"] = rows.pop(0).item()
        lams = [float(group["lam"]) for group in source.param_groups]
        scalars |= {f"penalty/lam/{i}" if len(lams) > 1 else "penalty/lam": lam for i, lam in enumerate(lams)}
    zeros = elements = l1 = squares = 0.0
    for (name, w), row in zip(named.items(), rows, strict=True):
        counts, (total, modulus, square, highest, negated) = row[:-5], row[-5:].tolist()
        nonfinite = counts[len(counts) // 2].item()
        if w.numel():
            scalars[f"sparsity/{name}"] = counts[0].item() / w.numel()
        if nonfinite:
            scalars[f"nonfinite/{name}"] = nonfinite
        zeros, elements = zeros + counts[0].item(), elements + w.numel()
        l1, squares = l1 + modulus, squares + square
        if w.numel() > nonfinite:
            limits, bins = _histogram(counts, w.dtype)
            # What is not finite was a 0 among them: then the bins tell where they end without it.
            limits[0], limits[-1] = max(-negated, limits[0]), min(highest, limits[-1])
            writer.add_histogram_raw(
                f"weights/{name}",
                min=limits[0],
                max=limits[-1],
                num=w.numel() - nonfinite,
                sum=total,
                sum_squares=square,
                bucket_limits=limits,
                bucket_counts=bins,
                global_step=step,
            )
    if elements:
        scalars["sparsity/total"] = zeros / elements
    scalars |= {"norm/l1": l1, "norm/l2": math.sqrt(squares)}
    for tag, number in scalars.items():
        writer.add_scalar(tag, number, step)


def _histogram(counts: Tensor, dtype: torch.dtype) -> tuple[list[float], list[float]]:
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
