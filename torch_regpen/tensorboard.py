"""WeightLogger: logs the effect of a penalty on the weights to TensorBoard.

The weights are counted on their device in one pass, and each logging step transfers all numbers at once. This module
does not import TensorBoard; the user's writer does.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed.shards import DTensor
from .groups.grouping import Elements, Grouping
from .inspect.charts import layout
from .inspect.histogram import Counts, histogram_counts
from .inspect.multipliers import multipliers
from .inspect.optimizers import find_regularized
from .inspect.parameters import find_parameters
from .inspect.zero_bits import ZeroBits, count_flipped, zero_bits
from .ops.zero_groups import zero_groups
from .optim.wrapper import RegularizedOptimizer
from .penalties.activity import ActivityPenalty
from .penalties.base import Penalty
from .penalties.rules import Select

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["WeightLogger"]


class Logged(NamedTuple):
    """A logged parameter: the tensor, the groups that may be dead, and the center of its penalty."""

    tensor: Tensor
    groups: Grouping | None
    center: Tensor | None


class WeightLogger:
    """Writes histograms and exact zeros of the penalized weights, and the penalty itself, to TensorBoard.

    Call `step()` after each `optimizer.step()`, before the gradients are cleared. At step 0 and every `every` steps it
    writes, for each penalized parameter (for a bare model: for each parameter),

    - `weights/NAME`: a histogram of the finite elements, and `nonzero/NAME`: a histogram of the nonzero ones;
    - `sparsity/NAME`: the fraction of its elements that are exactly zero, from 0 to 1;
    - `flipped/NAME`: the fraction of elements that became zero or nonzero since the last logging step (the last zeros
      are stored on the device, one bit for each element);
    - `dead_groups/NAME`: the fraction of its groups that are entirely zero. These are the groups of the penalty (in a
      sum, of the first part that has groups), or else, for 2 dimensions or more, the output units;
    - `multiplier/NAME`, given a `RegularizedOptimizer` with a prox: the median, over a sample, of the factor on lambda
      in the last prox: the optimizer's own step for a unit gradient, or in mode "dual" the sum of all steps so far;
    - `nonfinite/NAME`: the number of NaN and infinite elements, if there are any.

    Over all these parameters it writes `sparsity/total` (also `all/sparsity`, which TensorBoard shows first),
    `flipped/total`, and `norm/l1` and `norm/l2` of the finite elements. For a penalty it writes `penalty/value`, the
    result of `penalty()`, and `penalty/lam`; with several parameter groups or parts, `penalty/lam/0`, `penalty/lam/1`,
    ... For an `ActivityPenalty` it also writes `penalty/activity`, the value divided by lambda, unless lambda is 0.

    With a center, an element at its center counts as zero, and `nonzero/NAME` shows the differences from the center.
    Complex weights are counted by modulus. The bins are symmetric about zero and logarithmic, 8 for each factor of 2;
    exact zeros have a bin of width 0. (TensorBoard draws every histogram in 30 bins of equal width.) The page "Custom
    Scalars" shows all parameters in one chart. To use your own layout, call `writer.add_custom_scalars` before.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar` and `add_histogram_raw`;
            None on ranks that do not write (with sharded parameters every rank must call `step()`).
        penalty_or_model: the penalty whose parameters are logged, a `RegularizedOptimizer` with such a penalty, an
            `ActivityPenalty`, or a model.
        every: the number of steps from one logging step to the next, 1 or more.
        select: the parameters of a model to log, in the forms of a penalty's `select`; None means all.

    Raises:
        TypeError: an argument is none of these.
        ValueError: `every` is less than 1; `select` matches nothing, or is given with a penalty.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from torch_regpen import L1, WeightLogger
        >>> model = torch.nn.Linear(10, 1)
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     logger = WeightLogger(writer, L1(model, 0.1), every=10)
        ...     for _ in range(100):
        ...         logger.step()  # after optimizer.step()
    """

    def __init__(
        self,
        writer: SummaryWriter | None,
        penalty_or_model: Penalty | RegularizedOptimizer | ActivityPenalty | nn.Module,
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
        self.optimizer = find_regularized(penalty_or_model) if isinstance(penalty_or_model, Optimizer) else None
        if self.optimizer is None and isinstance(penalty_or_model, Optimizer):
            raise TypeError(
                f"a {type(penalty_or_model).__name__} holds no penalty; allowed are a RegularizedOptimizer, a penalty "
                "and a model"
            )
        self.writer = writer
        self.source: Any = penalty_or_model if self.optimizer is None else self.optimizer.penalty
        self._has_penalty = isinstance(self.source, Penalty | ActivityPenalty)
        self.every = every
        self.select = select
        self._next = 0
        self._zeros: dict[str, ZeroBits] = {}
        self._has_layout = False
        self._logged()  # raises if something is wrong with the source or with select

    @torch.no_grad()
    def step(
        self,
        global_step: int | None = None,
        *,
        loss: float | Tensor | None = None,
        stationarity: float | Tensor | None = None,
    ) -> None:
        """Write, if `global_step` is a multiple of `every`.

        To resume a run, pass `global_step`, and open the writer with `purge_step=global_step`. `penalty.stationarity()`
        needs the gradient of the plain loss at the current weights, if possible over all data. Call it right after
        `backward()`, because `optimizer.step()` changes the weights and may add the penalty to `.grad`.

        Args:
            global_step: the number of this step. None means one more than the last, starting from 0.
            loss: the loss of this step without the penalty, a number or a tensor with one element. If given,
                `penalty/ratio` is written too: the value of the penalty divided by the loss.
            stationarity: the result of `penalty.stationarity()`. If given, `penalty/stationarity` is written too.

        Raises:
            TypeError: `global_step` is not an integer.
            ValueError: `loss` or `stationarity` has several elements, or is given without a penalty.
        """
        step = self._next if global_step is None else operator.index(global_step)
        self._next = step + 1
        if step % self.every:
            return
        logged = self._logged()
        rows = self._rows(logged, loss, stationarity)
        if self.writer is None or not rows:
            return
        like = next((row for tag, row in rows.items() if tag.startswith("weights/")), next(iter(rows.values())))
        numbers = torch.cat([row.to(like) for row in rows.values()]).cpu()  # the only transfer
        split = numbers.split_with_sizes([len(row) for row in rows.values()])
        self._write(self.writer, step, logged, dict(zip(rows, split, strict=True)))

    def _rows(
        self, logged: dict[str, Logged], loss: float | Tensor | None, stationarity: float | Tensor | None
    ) -> dict[str, Tensor]:
        """All numbers of a logging step, on their devices: one-dimensional tensors by tag."""
        # Every rank computes the penalty and the counts of sharded parameters, because these use collectives.
        rows = self._penalty_rows(loss, stationarity)
        for name, parameter in logged.items():
            if self.writer is not None or isinstance(parameter.tensor, DTensor):
                rows |= self._parameter_rows(name, *parameter)
        if self.writer is not None and self.optimizer is not None:
            names = {id(parameter.tensor): name for name, parameter in logged.items()}
            for w, row in multipliers(self.optimizer):
                if id(w) in names:
                    rows[f"multiplier/{names[id(w)]}"] = row
        return rows

    def _penalty_rows(self, loss: float | Tensor | None, stationarity: float | Tensor | None) -> dict[str, Tensor]:
        """The numbers about the penalty, each as a tensor with one element; empty without a penalty."""
        given = {"penalty/loss": loss, "penalty/stationarity": stationarity}
        numbers = {tag: torch.as_tensor(number) for tag, number in given.items() if number is not None}
        for tag, number in numbers.items():
            name = tag.split("/")[1]
            if not self._has_penalty:
                raise ValueError(f"{name}= needs a penalty, and this logger has a bare model; leave it out")
            if number.numel() != 1:
                raise ValueError(
                    f"{name} has shape {tuple(number.shape)}; allowed is a number, or a tensor with one element"
                )
        if not self._has_penalty:
            return {}
        return {tag: number.reshape(1) for tag, number in {"penalty/value": self.source(), **numbers}.items()}

    def _parameter_rows(
        self, name: str, w: Tensor, groups: Grouping | None, center: Tensor | None
    ) -> dict[str, Tensor]:
        """The numbers about a parameter."""
        rows = {f"weights/{name}": histogram_counts(w)}
        if center is not None:
            w = w - center
            rows[f"nonzero/{name}"] = histogram_counts(w)
        if groups is not None and w.numel():
            rows[f"dead_groups/{name}"] = zero_groups(w, groups).float().mean().reshape(1)
        old, new = self._zeros.get(name), zero_bits(w)
        if old is not None and old.layout == new.layout:
            rows[f"flipped/{name}"] = count_flipped(old, new, w).reshape(1)
        self._zeros[name] = new
        return rows

    def _write(self, writer: SummaryWriter, step: int, logged: dict[str, Logged], numbers: dict[str, Tensor]) -> None:
        """Write the numbers of a logging step, which are now on the CPU."""
        if not self._has_layout and hasattr(writer, "add_custom_scalars"):
            writer.add_custom_scalars(layout(bool(logged), self._has_penalty))
            self._has_layout = True
        weights = {name: Counts.of(numbers[f"weights/{name}"], w.dtype) for name, (w, *_) in logged.items()}
        nonzero = {
            name: Counts.of(numbers[tag], w.dtype) if (tag := f"nonzero/{name}") in numbers else weights[name]
            for name, (w, *_) in logged.items()
        }
        scalars = _weight_scalars(numbers, logged, weights, nonzero)
        if self._has_penalty:
            scalars |= _penalty_scalars(numbers, self.source)
        for tag, number in scalars.items():
            writer.add_scalar(tag, number, step)
        for name in logged:
            for kind, counts in (("weights", weights[name]), ("nonzero", nonzero[name].without_zeros())):
                histogram = counts.histogram()
                if histogram is not None:
                    writer.add_histogram_raw(f"{kind}/{name}", **histogram, global_step=step)

    def _logged(self) -> dict[str, Logged]:
        """The parameters to log now, by their names on the board.

        Frozen parameters are left out, unless all are frozen, as in an averaged model.
        """
        if isinstance(self.source, ActivityPenalty):
            return {}
        found = {
            use.name: Logged(use.tensor, use.outputs if use.tensor.ndim > 1 else None, None)
            for use in find_parameters(self.source, self.select)
        }
        if not isinstance(self.source, Penalty):
            return found
        groups: dict[int, Grouping | None] = {}
        centers: dict[int, Tensor | None] = {}
        for term in self.source.terms() or self.source.terms(frozen=True):
            spanned = term.joint is not None  # then the units of each tensor are its output units
            for _, parameter in term.named_parameters:
                if groups.get(id(parameter)) is None:
                    groups[id(parameter)] = None if spanned or isinstance(term.grouping, Elements) else term.grouping
                centers[id(parameter)] = term.center
        return {
            name: Logged(w, groups[id(w)] or outputs, centers[id(w)])
            for name, (w, outputs, _) in found.items()
            if id(w) in groups
        }


def _weight_scalars(
    numbers: dict[str, Tensor], logged: dict[str, Logged], weights: dict[str, Counts], nonzero: dict[str, Counts]
) -> dict[str, float]:
    """The scalars about the weights, by their tags."""
    scalars: dict[str, float] = {}
    elements = zeros = compared = flipped = 0.0
    for name, (w, *_) in logged.items():
        for tag in (f"dead_groups/{name}", f"multiplier/{name}"):
            if tag in numbers:
                scalars[tag] = numbers[tag].item()
        if weights[name].nonfinite:
            scalars[f"nonfinite/{name}"] = weights[name].nonfinite
        if not w.numel():
            continue
        scalars[f"sparsity/{name}"] = nonzero[name].zeros / w.numel()
        elements, zeros = elements + w.numel(), zeros + nonzero[name].zeros
        if f"flipped/{name}" in numbers:
            flips = numbers[f"flipped/{name}"].item()
            scalars[f"flipped/{name}"] = flips / w.numel()
            compared, flipped = compared + w.numel(), flipped + flips
    if elements:
        scalars["all/sparsity"] = scalars["sparsity/total"] = zeros / elements
    if compared:
        scalars["flipped/total"] = flipped / compared
    if logged:
        scalars["norm/l1"] = sum(counts.sums[1] for counts in weights.values())
        scalars["norm/l2"] = math.sqrt(sum(counts.sums[2] for counts in weights.values()))
    return scalars


def _penalty_scalars(numbers: dict[str, Tensor], penalty: Penalty | ActivityPenalty) -> dict[str, float]:
    """The scalars about the penalty, by their tags."""
    value = numbers["penalty/value"]
    lams = [float(group["lam"]) for group in penalty.param_groups]
    scalars = {"penalty/value": value.item()}
    scalars |= {f"penalty/lam/{i}" if len(lams) > 1 else "penalty/lam": lam for i, lam in enumerate(lams)}
    if isinstance(penalty, ActivityPenalty) and penalty.lam:
        scalars["penalty/activity"] = value.item() / penalty.lam
    if "penalty/loss" in numbers:
        scalars["penalty/ratio"] = (value / numbers["penalty/loss"]).item()
    if "penalty/stationarity" in numbers:
        scalars["penalty/stationarity"] = numbers["penalty/stationarity"].item()
    return scalars
