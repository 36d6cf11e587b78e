"""WeightLogger: what a penalty does to the weights, on TensorBoard.

Nothing here imports TensorBoard: the writer that the user brings does. The weights are counted where they lie, in one
pass, and all numbers come back in one transfer for each logging step.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .distributed.shards import DTensor, full_tensor
from .groups.grouping import Elements, Grouping
from .inspect.histogram import histogram, histogram_counts
from .inspect.parameters import find_parameters
from .ops.zero_groups import zero_groups
from .penalties.base import Penalty
from .penalties.rules import Select

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["WeightLogger"]


class WeightLogger:
    """Writes histograms and exact zeros of the penalized weights, and the penalty itself, to TensorBoard.

    Call `step()` after each `optimizer.step()`. At step 0 and each `every` steps it writes

    - for each penalized parameter (of a bare model: for all), `weights/NAME`, a histogram of its finite elements;
      `sparsity/NAME`, the fraction of its elements that are exactly zero, from 0 to 1; `dead_groups/NAME`, the fraction
      of its groups that are zero throughout (the groups of the penalty, of a sum the first that has any; else, of
      parameters with 2 dimensions or more, the output units: neurons, filters, rows of an embedding); and, where there
      are any, `nonfinite/NAME`, how many elements are NaN or infinite. Of a penalty with a center, what is exactly at
      its center counts as zero;
    - over all these parameters, `sparsity/total`, and `norm/l1` and `norm/l2` of the finite elements;
    - of a penalty, `penalty/value`, what `penalty()` returns, and `penalty/lam`; if it has several parameter groups or
      is a sum, `penalty/lam/0`, `penalty/lam/1`, ..., in their order; `penalty/ratio`, if `step()` gets the loss; and
      `penalty/stationarity`, if it gets that.

    The bins are symmetric about zero and logarithmic in `|w|`, 8 for each factor of 2, down to the smallest number
    there is; exact zeros have a bin of their own, of width 0, and the first and last bin end where the weights end.
    Complex weights go by modulus. (TensorBoard draws every histogram in 30 bins of equal width, whatever is written:
    there, small weights lie with the zeros. What is exactly zero shows in `sparsity/NAME`.)

    To resume a run, pass the step, `logger.step(global_step)`, and open the writer with `purge_step=global_step`. For
    several writers, make a logger for each.

    `penalty.stationarity()` is about the gradient of the plain loss at the present weights, which after
    `optimizer.step()` is gone: `.grad` is that of the weights before, often of one batch, and holds the penalty's part
    if that is in the loss or coupled. So take it right after `backward()` of the plain loss, of all data if you can,
    and hand it to `step()`.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar` and `add_histogram_raw`;
            None on ranks that do not write (with sharded parameters every rank must call `step()`).
        penalty_or_model: the penalty whose parameters are meant, or a model.
        every: the number of steps from one logging step to the next, 1 or more.
        select: which parameters of a model, as a penalty takes it: `"weights"`, `"all"`, a glob or a list of globs on
            the qualified name, or a callable `(name, parameter) -> bool`; None means all.

    Raises:
        TypeError: an argument is none of these.
        ValueError: `every` is less than 1; `select` matches nothing, or is given beside a penalty.

    Example:
        >>> logger = WeightLogger(SummaryWriter("runs/l1"), penalty, every=100)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     (loss + penalty()).backward()
        ...     optimizer.step()
        ...     logger.step(loss=loss)
    """

    def __init__(
        self,
        writer: SummaryWriter | None,
        penalty_or_model: Penalty | nn.Module,
        *,
        every: int = 1,
        select: Select | None = None,
    ) -> None:
        if writer is not None and not (hasattr(writer, "add_scalar") and hasattr(writer, "add_histogram_raw")):
            raise TypeError(
                f"writer is a {type(writer).__name__}; allowed are a torch.utils.tensorboard.SummaryWriter (it needs "
                'TensorBoard: pip install "torch_regpen[tensorboard]"), anything else with add_scalar and '
                "add_histogram_raw, and None on ranks that do not write"
            )
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every={every!r} is a {type(every).__name__}; allowed is an int, 1 or more")
        if every < 1:
            raise ValueError(f"every={every}; allowed is an int, 1 or more")
        self.writer = writer
        self.source = penalty_or_model
        self.every = every
        self.select = select
        self._next = 0
        self._meant()  # raises where there is something wrong with the source or with select

    @torch.no_grad()
    def step(
        self,
        global_step: int | None = None,
        *,
        loss: float | Tensor | None = None,
        stationarity: float | Tensor | None = None,
    ) -> None:
        """Write, if `global_step` is a multiple of `every`.

        Args:
            global_step: the number of this step, as after resuming from a checkpoint; None: one more than the last, and
                0 at first.
            loss: the loss of this step without the penalty, a number or a tensor with one element; then `penalty/ratio`
                is written too, the penalty's value divided by it.
            stationarity: what `penalty.stationarity()` gave; then `penalty/stationarity` is written too.

        Raises:
            TypeError: `global_step` is no whole number.
            ValueError: `loss` or `stationarity` has several elements, or is given where there is no penalty.
        """
        step = self._next if global_step is None else operator.index(global_step)
        self._next = step + 1
        if step % self.every:
            return
        rows: dict[str, Tensor] = {}
        lams = []
        # Every rank takes part in the penalty and in the tallies of sharded parameters: there are collectives in them.
        if isinstance(self.source, Penalty):
            rows["penalty/value"] = self.source().reshape(1)
            lams = [float(group["lam"]) for group in self.source.param_groups]
        for name, number in {"loss": loss, "stationarity": stationarity}.items():
            if number is not None:
                rows[name] = self._checked(name, number)
        meant = self._meant()
        for name, (w, groups, center) in meant.items():
            if self.writer is not None or isinstance(w, DTensor):
                rows[f"weights/{name}"] = histogram_counts(w)
                offset = w if center is None else w - center
                if center is not None:
                    rows[f"zeros/{name}"] = full_tensor((offset == 0).sum()).reshape(1)
                if groups is not None and w.numel():
                    rows[f"dead_groups/{name}"] = zero_groups(offset, groups).float().mean().reshape(1)
        if self.writer is not None and meant:
            like = rows[f"weights/{name}"]
            numbers = torch.cat([row.to(like) for row in rows.values()]).cpu()  # the one transfer
            split = numbers.split_with_sizes([len(row) for row in rows.values()])
            named = {name: w for name, (w, *_) in meant.items()}
            _write(self.writer, step, lams, named, dict(zip(rows, split, strict=True)))

    def _checked(self, name: str, number: float | Tensor) -> Tensor:
        """A number about the penalty, as a tensor with one dimension."""
        if not isinstance(self.source, Penalty):
            raise ValueError(f"{name}= is about a penalty; this logger has a bare model: leave it out")
        number = torch.as_tensor(number)
        if number.numel() != 1:
            raise ValueError(
                f"{name} has shape {tuple(number.shape)}; allowed is a number, or a tensor with one element"
            )
        return number.reshape(1)

    def _meant(self) -> dict[str, tuple[Tensor, Grouping | None, Tensor | None]]:
        """The parameters that are meant now, by their names on the board, the groups that may be dead, and the center.

        Frozen parameters are not, unless all are, as those of an averaged model.
        """
        found: dict[str, tuple[Tensor, Grouping | None, Tensor | None]] = {
            place.name: (place.tensor, place.outputs if place.tensor.ndim > 1 else None, None)
            for place in find_parameters(self.source, self.select)
        }
        if not isinstance(self.source, Penalty):
            return found
        groups: dict[int, Grouping | None] = {}
        centers: dict[int, Tensor | None] = {}
        for term in self.source.terms() or self.source.terms(frozen=True):
            if groups.get(id(term.tensor)) is None:
                groups[id(term.tensor)] = None if isinstance(term.grouping, Elements) else term.grouping
            centers[id(term.tensor)] = term.center
        return {
            name: (w, groups[id(w)] or outputs, centers[id(w)])
            for name, (w, outputs, _) in found.items()
            if id(w) in groups
        }


def _write(
    writer: SummaryWriter, step: int, lams: list[float], named: dict[str, Tensor], numbers: dict[str, Tensor]
) -> None:
    """Write the numbers of one step, by their tags; of the parameters, by name, they are the tallies."""
    scalars: dict[str, float] = {}
    if lams:
        value = numbers["penalty/value"]
        scalars["penalty/value"] = value.item()
        scalars |= {f"penalty/lam/{i}" if len(lams) > 1 else "penalty/lam": lam for i, lam in enumerate(lams)}
        if "loss" in numbers:
            scalars["penalty/ratio"] = (value / numbers["loss"]).item()
        if "stationarity" in numbers:
            scalars["penalty/stationarity"] = numbers["stationarity"].item()
    zeros = elements = l1 = squares = 0.0
    for name, w in named.items():
        row = numbers[f"weights/{name}"]
        counts, (total, modulus, square, highest, negated) = row[:-5], row[-5:].tolist()
        nonfinite = counts[len(counts) // 2].item()
        zero = numbers.get(f"zeros/{name}", counts[:1]).item()
        if w.numel():
            scalars[f"sparsity/{name}"] = zero / w.numel()
        if f"dead_groups/{name}" in numbers:
            scalars[f"dead_groups/{name}"] = numbers[f"dead_groups/{name}"].item()
        if nonfinite:
            scalars[f"nonfinite/{name}"] = nonfinite
        zeros, elements = zeros + zero, elements + w.numel()
        l1, squares = l1 + modulus, squares + square
        if w.numel() > nonfinite:
            limits, bins = histogram(counts, w.dtype)
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
