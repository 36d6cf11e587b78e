"""Plot a comparison: test scores against exact zeros, and the sizes of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..utils import require
from .trials import Trial, mean_and_deviation, weights_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

__all__ = ["draw"]

PANELS = 6  # histograms in a row
BLACK = (0.0, 0.0, 0.0)

Trials = Mapping[float, Sequence[Trial]]  # by lambda


def draw(
    file: str | File, chosen: Mapping[str, float], trials: Mapping[str, Trials], models: Mapping[str, nn.Module]
) -> None:
    """Draw the test scores of each method above, and the weights of its model below.

    Args:
        file: the file to write; its extension sets the format.
        chosen: the chosen lambda of each method.
        trials: the trainings of each method, by lambda.
        models: the trained models.

    Raises:
        ImportError: matplotlib is missing.
    """
    with require("Comparison.plot needs matplotlib", "examples"):
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    colors = {method: palette[i % 20] for i, method in enumerate(chosen)} | {"plain": BLACK}
    rows = max(-(-len(models) // PANELS), 1)
    figure = Figure(figsize=(11, 5 + 1.5 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[5, 1.5 * rows], squeeze=False)[:, 0]
    _draw_scores(above, chosen, trials, colors)
    _draw_weights(below, rows, models, colors)
    figure.savefig(file, dpi=100)


def _draw_scores(
    figure: SubFigure, chosen: Mapping[str, float], trials: Mapping[str, Trials], colors: Mapping[str, Any]
) -> None:
    """Draw methods with few zeros side by side on the left, and the others against their zeros on the right."""
    at_chosen = {method: trials[method][lam] for method, lam in chosen.items()}
    tests = {method: mean_and_deviation(trial.scores["test"] for trial in at_chosen[method]) for method in chosen}
    sparse = [method for method in chosen if fmean(trial.zeros for trial in at_chosen[method]) >= 0.01]
    dense = [method for method in chosen if method not in sparse]
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1 + len(sparse) / len(chosen)])
    for column, method in enumerate(dense):
        left.errorbar(column, *tests[method], color=colors[method], fmt="o", markersize=8, capsize=3)
    for method in sparse:
        zeros = [100 * fmean(trial.zeros for trial in some) for some in trials[method].values()]
        means = [mean_and_deviation(trial.scores["test"] for trial in some)[0] for some in trials[method].values()]
        right.plot(zeros, means, ".-", color=colors[method], linewidth=1, alpha=0.6, zorder=0)
        x = zeros[list(trials[method]).index(chosen[method])]
        right.errorbar(x, *tests[method], color=colors[method], fmt="o", markersize=8, capsize=3, label=method)
    plain = tests.get("plain", (math.nan, math.nan))[0]
    for axes in (left, right):
        if math.isfinite(plain):
            axes.axhline(plain, color="black", linestyle=":", linewidth=1, zorder=0, label="mean of plain")
        axes.spines[["top", "right"]].set_visible(False)
    ends = [mean + side for mean, sd in tests.values() for side in (-sd, sd) if math.isfinite(mean + side)]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    if low < high:
        left.set_ylim(low - (high - low) / 2, high + (high - low) / 10)
    left.set_xticks(range(len(dense)), dense, rotation=35, ha="right", rotation_mode="anchor")
    left.set(title="under 1% exact zeros", ylabel="test score (mean ± deviation)")
    right.set(title="a dot for each lambda, the chosen one large", xlabel="exact zeros, %", xlim=(-3, 103))
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="lower left", frameon=False, fontsize="small")


def _draw_weights(figure: SubFigure, rows: int, models: Mapping[str, nn.Module], colors: Mapping[str, Any]) -> None:
    """Draw a histogram for each model."""
    panels = figure.subplots(rows, max(min(len(models), PANELS), 1), sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (method, model) in zip(panels, models.items(), strict=False):
        _draw_sizes(axes, weights_of(model).cpu(), colors[method])
        axes.set_title(method, fontsize="small")
    for axes in panels[len(models) :]:
        axes.set_axis_off()
    figure.supxlabel("size of the weight, |w|; in black, the weights that are exactly 0 (log scales)", fontsize=10)


def _draw_sizes(axes: Axes, w: Tensor, color: Any) -> None:
    """Draw the number of weights of each size and, as a separate bar, the number of exact zeros."""
    sizes = w[(w != 0) & w.isfinite()].abs().clamp(min=1e-7).log10()
    zeros = int((w == 0).sum())
    axes.hist(sizes.tolist(), bins=64, range=(-7, 1), color=color)
    axes.bar(-8.5, zeros, width=1, color="black")
    axes.text(-9, 1.3 * max(zeros, 1), f"{zeros / len(w):.0%}", fontsize="small")
    axes.set_yscale("log")
    axes.set_ylim(0.7, 5 * len(w))
    axes.set_xticks([-8.5, -6, -3, 0], ["0", "$10^{-6}$", "$10^{-3}$", "1"])
    axes.spines[["top", "right"]].set_visible(False)
