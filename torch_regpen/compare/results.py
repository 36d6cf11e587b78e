"""What came of comparing penalties: the trials, a table, a file and a picture of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path as File
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..inspect.parameters import find_parameters
from ..utils import format_table, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Comparison", "Difference", "Scores", "Trial", "weights_of"]

Scores = dict[str, float]
CONFIDENCE = 0.95


class Trial(NamedTuple):
    """What came of one training.

    Attributes:
        method: its name.
        lam: lambda; of weight_decay half the weight_decay.
        seed: the seed of the initial weights and of the batches.
        scores: what `score` returned.
        zeros: the fraction of exact zeros in the weights that a penalty selects by default.
        dead: the number of units, of those that `dead_units` asks of the method's penalty, that are zero throughout.
        steps: how many steps the optimizer made.
        seconds: how long `fit` took.
    """

    method: str
    lam: float
    seed: int
    scores: Scores
    zeros: float
    dead: int
    steps: int
    seconds: float


class Difference(NamedTuple):
    """The mean of paired differences, and the interval in which it lies with 95% confidence (Student 1908)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What came of all trainings.

    Attributes:
        trials: one for each method, lambda and seed.
        chosen: for each method the largest lambda whose validation score is within one standard error of the best.
        models: for each method the net that was trained with that lambda and the first seed.
    """

    trials: list[Trial]
    chosen: dict[str, float]
    models: dict[str, nn.Module]

    def at(self, method: str, lam: float | None = None) -> list[Trial]:
        """The trials of a method, one for each seed, at a lambda; without one, at that which was chosen."""
        lam = self.chosen[method] if lam is None else lam
        return [trial for trial in self.trials if (trial.method, trial.lam) == (method, lam)]

    def lams(self, method: str) -> list[float]:
        """The lambdas that a method tried."""
        return sorted({trial.lam for trial in self.trials if trial.method == method})

    def difference(self, method: str, baseline: str = "weight_decay") -> Difference:
        """The test score of a method minus that of another, paired by seed, each at the lambda that it chose.

        The interval holds for the seeds' draws of initial weights, batches and, if they differ by seed, data. One that
        holds 0 means that these seeds do not show a difference. With many methods, some intervals miss 0 by chance.

        Raises:
            ImportError: SciPy is missing.
        """
        with require("intervals need SciPy", "examples"):
            from scipy.stats import t
        differences = self._differences(method, baseline)
        mean, n = differences.mean().item(), len(differences)
        half = t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std().item() / math.sqrt(n)
        return Difference(mean, mean - half, mean + half)

    def _differences(self, method: str, baseline: str = "weight_decay") -> Tensor:
        pairs = zip(self.at(method), self.at(baseline), strict=True)
        return torch.tensor([a.scores["test"] - b.scores["test"] for a, b in pairs], dtype=torch.float64)

    def _versus(self, method: str) -> str:
        try:
            mean, low, high = self.difference(method)
        except ImportError:
            return f"{self._differences(method).mean().item():+.2g} [no SciPy]"
        return f"{mean:+.2g} [{low:+.2g}, {high:+.2g}]"

    def __str__(self) -> str:
        """A row for each method at the lambda that it chose: means over the seeds, and standard deviations.

        In brackets is the interval of `difference`, which takes SciPy.
        """
        names = [name for name in self.trials[0].scores if name != "validation"]
        rows = [["", "lambda", *names, "test - weight_decay", "zeros %", "dead", "ms/step"]]
        for method, lam in self.chosen.items():
            trials = self.at(method)
            means, deviations = zip(*(_spread(trial.scores[name] for trial in trials) for name in names), strict=True)
            cells = [f"{mean:#.4g} ± {deviation:.2g}" for mean, deviation in zip(means, deviations, strict=True)]
            versus = "" if method == "weight_decay" else self._versus(method)
            zeros, dead = 100 * fmean(trial.zeros for trial in trials), fmean(trial.dead for trial in trials)
            ms = median(1000 * trial.seconds / max(trial.steps, 1) for trial in self.trials if trial.method == method)
            rows.append([method, f"{lam:g}", *cells, versus, f"{zeros:.2f}", f"{dead:.1f}", f"{ms:.3f}"])
        return format_table(rows)

    def to_csv(self, file: str | File) -> None:
        """Write a row for each trial, all lambdas and seeds."""
        names = list(self.trials[0].scores)
        with open(file, "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["method", "lam", "seed", *names, "zeros", "dead", "steps", "seconds"])
            for trial in self.trials:
                scores = [trial.scores[name] for name in names]
                rows.writerow([*trial[:3], *scores, trial.zeros, trial.dead, trial.steps, f"{trial.seconds:.4f}"])

    def plot(self, file: str | File) -> None:
        """Draw, above, test score against exact zeros; below, the sizes of the weights that each method ends with.

        Args:
            file: where to write it; the ending says the format.

        Raises:
            ImportError: matplotlib is missing.
        """
        with require("Comparison.plot needs matplotlib", "examples"):
            from matplotlib import colormaps
            from matplotlib.figure import Figure
        palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
        colors = {method: palette[i % 20] for i, method in enumerate(self.chosen)} | {"plain": (0.0, 0.0, 0.0)}
        columns = min(len(self.chosen), 6)
        lines = -(-len(self.chosen) // columns)
        figure = Figure(figsize=(11, 5 + 1.5 * lines), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[5, 1.5 * lines], squeeze=False)[:, 0]

        sparse = [m for m in self.chosen if fmean(trial.zeros for trial in self.at(m)) >= 0.01]
        dense = [m for m in self.chosen if m not in sparse]
        left, right = above.subplots(1, 2, sharey=True, width_ratios=[1, 1 + len(sparse) / len(self.chosen)])
        for column, method in enumerate(dense):
            mean, deviation = _spread(trial.scores["test"] for trial in self.at(method))
            left.errorbar(column, mean, deviation, color=colors[method], fmt="o", markersize=8, capsize=3)
        for method in sparse:
            self._plot_path(right, method, colors[method])
        plain = fmean(trial.scores["test"] for trial in self.at("plain"))
        plain = plain if math.isfinite(plain) else math.nan  # which is not drawn
        for axes in (left, right):
            axes.axhline(
                plain if math.isfinite(plain) else math.nan,
                color="black",
                linestyle=":",
                linewidth=1,
                zorder=0,
                label="mean of plain",
            )
            axes.spines[["top", "right"]].set_visible(False)
        chosen = [_spread(trial.scores["test"] for trial in self.at(method)) for method in self.chosen]
        ends = [mean + side for mean, sd in chosen if math.isfinite(mean) for side in (-sd, sd)]
        low, high = min(ends, default=0.0), max(ends, default=0.0)
        if low < high:
            left.set_ylim(low - (high - low) / 2, high + (high - low) / 10)
        left.set_xticks(range(len(dense)), dense, rotation=35, ha="right", rotation_mode="anchor")
        left.set(title="under 1% exact zeros", ylabel="test score (mean ± deviation)")
        right.set(title="a dot for each lambda, the chosen one large", xlabel="exact zeros, %", xlim=(-3, 103))
        right.legend(loc="lower left", frameon=False, fontsize="small")

        panels = below.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (method, model) in zip(panels, self.models.items(), strict=False):
            _plot_sizes(axes, weights_of(model).cpu(), colors[method])
            axes.set_title(method, fontsize="small")
        for axes in panels[len(self.models) :]:
            axes.set_axis_off()
        below.supxlabel("size of the weight, |w|; in black, the weights that are exactly 0 (log scales)", fontsize=10)
        figure.savefig(file, dpi=100)

    def _plot_path(self, axes: Axes, method: str, color: Any) -> None:
        """A method's test score against its zeros, over all lambdas, the chosen one with its deviation."""
        zeros = [100 * fmean(trial.zeros for trial in self.at(method, lam)) for lam in self.lams(method)]
        tests = [_spread(trial.scores["test"] for trial in self.at(method, lam)) for lam in self.lams(method)]
        axes.plot(zeros, [mean for mean, _ in tests], ".-", color=color, linewidth=1, alpha=0.6, zorder=0)
        i = self.lams(method).index(self.chosen[method])
        axes.errorbar(zeros[i], *tests[i], color=color, fmt="o", markersize=8, capsize=3, label=method)


def weights_of(model: nn.Module) -> Tensor:
    """The elements of all weights that a penalty selects by default."""
    return torch.cat([place.tensor.detach().flatten() for place in find_parameters(model, default="weights")])


def _spread(numbers: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    x = torch.tensor(list(numbers), dtype=torch.float64)
    return x.mean().item(), x.std().item()


def _plot_sizes(axes: Axes, w: Tensor, color: Any) -> None:
    """How many weights there are of each size and, in a bar of its own, how many are exactly zero."""
    sizes = w[(w != 0) & w.isfinite()].abs().clamp(min=1e-7).log10()
    zeros = int((w == 0).sum())
    axes.hist(sizes.tolist(), bins=64, range=(-7, 1), color=color)
    axes.bar(-8.5, zeros, width=1, color="black")
    axes.text(-9, 1.3 * max(zeros, 1), f"{zeros / len(w):.0%}", fontsize="small")
    axes.set_yscale("log")
    axes.set_ylim(0.7, 5 * len(w))
    axes.set_xticks([-8.5, -6, -3, 0], ["0", "$10^{-6}$", "$10^{-3}$", "1"])
    axes.spines[["top", "right"]].set_visible(False)
