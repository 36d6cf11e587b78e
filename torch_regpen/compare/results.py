"""`Comparison`: the trainings of all methods, as a table, a file or a picture."""

from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path as File
from statistics import fmean, median

from torch import nn

from ..utils import format_table, require
from .plot import draw
from .trials import Difference, Failure, Trial, mean_and_deviation

__all__ = ["Comparison"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The results of `compare`. `print` and notebooks show them as a table.

    Attributes:
        trials: the finished trainings: one for each method, lambda and seed.
        chosen: for each method, the largest lambda whose mean validation score is within one standard error of the best
            one. If trainings failed, only the lambdas with the fewest failures count.
        models: for each method, the model trained with the chosen lambda and the first seed.
        failures: the trainings that raised an exception.

    Example:
        >>> from torch_regpen.compare import Comparison, Trial
        >>> tests = {"plain": [90.0, 92.0], "weight_decay": [91.0, 94.0]}
        >>> trials = [Trial(m, 0.0, i, {"test": x}, 0, 0, 1, 0.1) for m, xs in tests.items() for i, x in enumerate(xs)]
        >>> Comparison(trials, {"plain": 0.0, "weight_decay": 0.0}, {}).difference("plain").mean
        -1.5
    """

    trials: list[Trial]
    chosen: dict[str, float]
    models: dict[str, nn.Module]
    failures: list[Failure] = field(default_factory=list)

    def at(self, method: str, lam: float | None = None) -> list[Trial]:
        """The finished trainings of a method at one lambda, one for each seed.

        Args:
            method: its name.
            lam: lambda; None means the chosen one.

        Raises:
            KeyError: `lam` is None, and the method is unknown, or all its trainings failed.
        """
        lam = self.chosen[method] if lam is None else lam
        return [trial for trial in self.trials if (trial.method, trial.lam) == (method, lam)]

    def lams(self, method: str) -> list[float]:
        """The lambdas of a method's finished trainings, in ascending order."""
        return sorted({trial.lam for trial in self.trials if trial.method == method})

    def difference(self, method: str, baseline: str = "weight_decay") -> Difference:
        """`mean(a_i - b_i)`, where `a_i` and `b_i` are the test scores of the method and the baseline with seed i.

        Both use their chosen lambda, and the seeds that both finished. The 95% interval is that of the paired t-test.
        It covers the randomness of initial weights, batches and, if they differ by seed, data. If it contains 0, these
        seeds show no difference. Among many methods, some intervals exclude 0 by chance.

        Args:
            method: its name.
            baseline: the name of the baseline.

        Returns:
            The mean and the interval, which is NaN for a single seed.

        Raises:
            ImportError: SciPy is missing.
            KeyError: a method is unknown, or all its trainings failed.
        """
        with require("intervals need SciPy", "examples"):
            from scipy.stats import t
        differences = self._differences(method, baseline)
        mean, deviation = mean_and_deviation(differences)
        n = len(differences)
        half = t.ppf((1 + CONFIDENCE) / 2, n - 1) * deviation / math.sqrt(n) if n > 1 else math.nan
        return Difference(mean, mean - half, mean + half)

    def _differences(self, method: str, baseline: str = "weight_decay") -> list[float]:
        others = {trial.seed: trial.scores["test"] for trial in self.at(baseline)}
        return [trial.scores["test"] - others[trial.seed] for trial in self.at(method) if trial.seed in others]

    def _versus_weight_decay(self, method: str) -> str:
        if method == "weight_decay" or "weight_decay" not in self.chosen:
            return ""
        try:
            mean, low, high = self.difference(method)
        except ImportError:
            return f"{mean_and_deviation(self._differences(method))[0]:+.2g} [no SciPy]"
        return f"{mean:+.2g} [{low:+.2g}, {high:+.2g}]"

    def _table(self) -> list[list[str]]:
        """The header, and the cells of each method."""
        names = [name for name in self.trials[0].scores if name != "validation"]
        failed = Counter(failure.method for failure in self.failures)
        rows = [["", "lambda", *names, "test - weight_decay", "zeros %", "dead", "ms/step"]]
        for method, lam in self.chosen.items():
            trials = self.at(method)
            spreads = [mean_and_deviation(trial.scores[name] for trial in trials) for name in names]
            scores = [f"{mean:#.4g} ± {deviation:.2g}" for mean, deviation in spreads]
            zeros, dead = 100 * fmean(trial.zeros for trial in trials), fmean(trial.dead for trial in trials)
            ms = median(1000 * trial.seconds / max(trial.steps, 1) for trial in self.trials if trial.method == method)
            cells = [f"{zeros:.2f}", f"{dead:.1f}", f"{ms:.3f}"]
            rows.append([method, f"{lam:g}", *scores, self._versus_weight_decay(method), *cells])
        rows += [[method, *[""] * (len(rows[0]) - 1)] for method in failed if method not in self.chosen]
        if failed:
            rows = [[*row, f"{failed[row[0]]}" if i else "failed"] for i, row in enumerate(rows)]
        return rows

    def __str__(self) -> str:
        """A row for each method at its chosen lambda: means and standard deviations over the seeds.

        The interval of `difference` is in brackets. If trainings failed, the last column shows their number.
        """
        return format_table(self._table())

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        header, *rows = [[escape(cell) for cell in row] for row in self._table()]
        lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
        head = "".join(f"<th>{cell}</th>" for cell in header)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody>\n</table>"

    def to_csv(self, file: str | File) -> None:
        """Write a row for each training, with all lambdas and seeds; for one that failed, the error.

        Args:
            file: the file to write.
        """
        names = list(self.trials[0].scores)
        with open(file, "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["method", "lam", "seed", *names, "zeros", "dead", "steps", "seconds", "error"])
            for trial in self.trials:
                scores = [trial.scores[name] for name in names]
                rows.writerow([*trial.job, *scores, trial.zeros, trial.dead, trial.steps, f"{trial.seconds:.4f}", ""])
            for failure in self.failures:
                rows.writerow([failure.method, failure.lam, failure.seed, *[""] * (len(names) + 4), failure.error])

    def plot(self, file: str | File) -> None:
        """Draw test score against exact zeros, over all lambdas, and a histogram of each model's weights.

        Args:
            file: the file to write; its extension sets the format.

        Raises:
            ImportError: matplotlib is missing.
        """
        trials = {method: {lam: self.at(method, lam) for lam in self.lams(method)} for method in self.chosen}
        draw(file, self.chosen, trials, self.models)
