"""compare: penalties and weight_decay side by side on a model of yours, over lambdas and seeds."""

from __future__ import annotations

import csv
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .dead import places
from .export import dead_units
from .kinds import L2
from .modes import MODES
from .optim import RegularizedOptimizer
from .optional import needed, with_progress_bar
from .path import Path
from .penalty import Penalty, checked_lam
from .summary import aligned
from .tensorboard import WeightLogger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Comparison", "Difference", "Trial", "compare"]

Method = tuple[Callable[[nn.Module, float], Penalty], str]
Scores = dict[str, float]

WAYS = ("loss", *MODES)
CONFIDENCE = 0.95


class Trial(NamedTuple):
    """What came of one training.

    Attributes:
        method: its name.
        lam: lambda; of weight_decay half the weight_decay.
        seed: the seed of the initial weights and of the batches.
        scores: what `score` returned.
        zeros: the fraction of exact zeros in the weights that a penalty selects by default.
        dead: the number of output units whose incoming weights are all exactly zero.
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
        with needed("intervals need SciPy", "examples"):
            from scipy.stats import t
        pairs = zip(self.at(method), self.at(baseline), strict=True)
        differences = torch.tensor([a.scores["test"] - b.scores["test"] for a, b in pairs], dtype=torch.float64)
        mean, n = differences.mean().item(), len(differences)
        half = t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std().item() / math.sqrt(n)
        return Difference(mean, mean - half, mean + half)

    def __str__(self) -> str:
        """A row for each method at the lambda that it chose: means over the seeds, and standard deviations."""
        names = [name for name in self.trials[0].scores if name != "validation"]
        rows = [["", "lambda", *names, "test - weight_decay", "zeros %", "dead", "ms/step"]]
        for method, lam in self.chosen.items():
            trials = self.at(method)
            means, deviations = zip(*(_spread(trial.scores[name] for trial in trials) for name in names), strict=True)
            cells = [f"{mean:#.4g} ± {deviation:.2g}" for mean, deviation in zip(means, deviations, strict=True)]
            mean, low, high = self.difference(method)
            versus = "" if method == "weight_decay" else f"{mean:+.2g} [{low:+.2g}, {high:+.2g}]"
            zeros, dead = 100 * fmean(trial.zeros for trial in trials), fmean(trial.dead for trial in trials)
            ms = median(1000 * trial.seconds / max(trial.steps, 1) for trial in self.trials if trial.method == method)
            rows.append([method, f"{lam:g}", *cells, versus, f"{zeros:.2f}", f"{dead:.1f}", f"{ms:.3f}"])
        return aligned(rows)

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
        with needed("Comparison.plot needs matplotlib", "examples"):
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
        for axes in (left, right):
            axes.axhline(plain, color="black", linestyle=":", linewidth=1, zorder=0, label="mean of plain")
            axes.spines[["top", "right"]].set_visible(False)
        chosen = [_spread(trial.scores["test"] for trial in self.at(method)) for method in self.chosen]
        low, high = min(mean - sd for mean, sd in chosen), max(mean + sd for mean, sd in chosen)
        left.set_ylim(low - (high - low) / 2, high + (high - low) / 10)
        left.set_xticks(range(len(dense)), dense, rotation=35, ha="right", rotation_mode="anchor")
        left.set(title="under 1% exact zeros", ylabel="test score (mean ± deviation)")
        right.set(title="a dot for each lambda, the chosen one large", xlabel="exact zeros, %", xlim=(-3, 103))
        right.legend(loc="lower left", frameon=False, fontsize="small")

        panels = below.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (method, model) in zip(panels, self.models.items(), strict=False):
            _plot_sizes(axes, _weights(model).cpu(), colors[method])
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


def compare(
    methods: Mapping[str, Method],
    lams: Iterable[float],
    *,
    data: Callable[[int], Any],
    make_model: Callable[[Any], nn.Module],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    fit: Callable[[nn.Module, torch.optim.Optimizer, Callable[[], Tensor | float], Any], object],
    score: Callable[[nn.Module, Any], Scores],
    seeds: Iterable[int] = range(5),
    logdir: str | File | None = None,
    log_every: int = 100,
    progress: bool = False,
) -> Comparison:
    """Train every method with every lambda and every seed, beside no penalty (plain) and torch.optim's weight_decay.

    Each gets the same initial weights and, as far as `fit` draws from torch's generator, the same batches: torch is
    seeded before the model is made and again before it is fitted. weight_decay is `2*lam`, on the parameters that
    `L2(model, lam)` selects. lambda is chosen on the validation scores, by the one-standard-error rule with the seeds
    as folds. The net of the first seed is then trained once more with it, for `Comparison.models` and TensorBoard.

    Args:
        methods: a name, and what it stands for: `(penalty, how)`. `penalty(model, lam)` makes it, as `L1` does, or
            `partial(MCP, knee=0.2)`; `how` is `"loss"` or a mode of `RegularizedOptimizer`.
        lams: the lambdas that each method tries.
        data: `data(seed)` returns what the next three get, of any type.
        make_model: `make_model(data)`.
        make_optimizer: `make_optimizer(params)`, params as torch.optim takes them: `lambda ps: SGD(ps, lr=0.1)`.
        fit: `fit(model, optimizer, penalty, data)` trains; `penalty()` is added to its loss, and is 0.0 where the
            penalty is not in the loss.
        score: `score(model, data)` returns numbers by name, higher is better; lambda is chosen by "validation", "test"
            is reported, and so are all others.
        seeds: two or more.
        logdir: a folder for TensorBoard: in `chosen`, for each method, weights and scores over time at the lambda that
            it chose; in `lambdas` an entry in the HPARAMS table for each method and lambda, with the means over seeds.
        log_every: steps of the optimizer from one histogram to the next.
        progress: show a progress bar (tqdm).

    Raises:
        ValueError: a name that is taken (plain, weight_decay), an unknown way, a lambda that is negative or not finite,
            none at all, or fewer than two seeds; what penalty and optimizer themselves refuse. All before training.
        ImportError: what `logdir` or `progress` need is missing.
    """
    ways: dict[str, Method] = {"plain": (L2, "plain"), "weight_decay": (L2, "weight_decay")}
    for name, (_, how) in methods.items():
        if name in ways:
            raise ValueError(f"{name!r} is always compared with; give the method another name")
        if how not in WAYS:
            raise ValueError(f"{name!r} is to be applied by {how!r}; allowed are {', '.join(map(repr, WAYS))}")
    ways |= methods
    grid, seeds = sorted({checked_lam(lam) for lam in lams}), list(seeds)
    if not grid or len(seeds) < 2:
        raise ValueError(f"given {len(grid)} lambdas and {len(seeds)} seeds; a spread needs a lambda and two seeds")
    tried = {name: [0.0] if name == "plain" else grid for name in ways}
    open_writer = None if logdir is None else _writers(File(logdir))
    datasets = {seed: data(seed) for seed in seeds}

    def set_up(name: str, lam: float, seed: int) -> tuple[nn.Module, Penalty, torch.optim.Optimizer, bool]:
        make_penalty, how = ways[name]
        torch.manual_seed(seed)
        model = make_model(datasets[seed])
        penalty = make_penalty(model, lam)
        return model, penalty, _optimizer(make_optimizer, model, penalty, how, lam), how == "loss"

    def train(name: str, lam: float, seed: int, writer: SummaryWriter | None = None) -> tuple[nn.Module, Trial]:
        model, penalty, optimizer, in_loss = set_up(name, lam, seed)
        evaluate = partial(_scores, score, model, datasets[seed])
        logger = None if writer is None else WeightLogger(writer, penalty, every=log_every)
        steps = _Steps(optimizer, logger, evaluate)
        torch.manual_seed(seed)
        start = time.perf_counter()
        fit(model, optimizer, penalty if in_loss else lambda: 0.0, datasets[seed])
        next(model.parameters()).flatten()[:1].tolist()  # waits for the device
        seconds = time.perf_counter() - start
        scores = evaluate()
        zeros = (_weights(model) == 0).double().mean().item()
        dead = sum(len(units) for units in dead_units(model).values())
        return model, Trial(name, lam, seed, scores, zeros, dead, steps.count, seconds)

    for name in ways:  # what is wrong shows now, not after an hour
        _, penalty, _, in_loss = set_up(name, tried[name][-1], seeds[0])
        if in_loss and (value := penalty()).requires_grad:
            value.backward()
    jobs = [(name, lam, seed) for name in ways for lam in tried[name] for seed in seeds]
    order = random.Random(0).sample(jobs, len(jobs))  # a machine that is busy for a while slows all methods alike
    done = {job: train(*job)[1] for job in (with_progress_bar(order, "comparing") if progress else order)}
    chosen = {}
    for name in ways:
        scores = [[done[name, lam, seed].scores["validation"] for seed in seeds] for lam in tried[name]]
        path = Path(tried[name], scores=torch.tensor(scores, dtype=torch.float64).nan_to_num(nan=-math.inf))
        chosen[name] = path.best_1se
    comparison = Comparison([done[job] for job in jobs], chosen, {})
    for name, lam in chosen.items():
        if open_writer is None:
            comparison.models[name] = train(name, lam, seeds[0])[0]
            continue
        folder = name.replace(" ", "_").replace("/", "_")
        with open_writer("chosen", folder, purge_step=0) as writer:  # hides what an earlier call left there
            comparison.models[name] = train(name, lam, seeds[0], writer)[0]
        for other in tried[name]:
            with open_writer("lambdas", f"{folder}_{other:g}") as writer:
                _write_hparams(writer, comparison.at(name, other))
    return comparison


def _optimizer(
    make: Callable[[Any], torch.optim.Optimizer], model: nn.Module, penalty: Penalty, how: str, lam: float
) -> torch.optim.Optimizer:
    """The optimizer, with the method's way to shrink weights."""
    if how == "weight_decay":
        decayed = [p for _, p in penalty.named_parameters_penalized()]
        others = [p for p in model.parameters() if all(p is not q for q in decayed)]
        return make([{"params": decayed, "weight_decay": 2 * lam}, {"params": others, "weight_decay": 0.0}])
    optimizer = make(model.parameters())
    return RegularizedOptimizer(optimizer, penalty, how) if how in MODES else optimizer


class _Steps:
    """Counts the steps of an optimizer and, with a logger, shows on TensorBoard what becomes of weights and scores."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, logger: WeightLogger | None, evaluate: Callable[[], Scores]
    ) -> None:
        self.count = 0
        self.logger = logger
        self.evaluate = evaluate
        optimizer.register_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        if self.logger is not None and self.logger.writer is not None:
            self.logger.step(self.count)
            if self.count % self.logger.every == 0:
                for name, value in self.evaluate().items():
                    self.logger.writer.add_scalar(f"score/{name}", value, self.count)
        self.count += 1


def _scores(score: Callable[[nn.Module, Any], Scores], model: nn.Module, data: Any) -> Scores:
    """The scores, each module afterwards in training or evaluation as it was before."""
    before = [(module, module.training) for module in model.modules()]
    try:
        return score(model, data)
    finally:
        for module, training in before:
            module.training = training


def _writers(logdir: File) -> Callable[..., SummaryWriter]:
    """What opens a writer in a folder below `logdir`."""
    with needed("logdir needs TensorBoard", "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return lambda *folder, **options: SummaryWriter(str(File(logdir, *folder)), **options)


def _write_hparams(writer: SummaryWriter, trials: Sequence[Trial]) -> None:
    """An entry in the table of hyperparameters: a method and a lambda, with the means over the seeds."""
    metrics = {f"mean/{name}": fmean(trial.scores[name] for trial in trials) for name in trials[0].scores}
    metrics["mean/zeros"] = fmean(trial.zeros for trial in trials)
    metrics["mean/dead"] = fmean(trial.dead for trial in trials)
    writer.add_hparams({"method": trials[0].method, "lambda": trials[0].lam}, metrics, run_name=".")


def _weights(model: nn.Module) -> Tensor:
    """The elements of all weights that a penalty selects by default."""
    return torch.cat([place.tensor.detach().flatten() for place in places(model, default="weights")])


def _spread(numbers: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    x = torch.tensor(list(numbers), dtype=torch.float64)
    return x.mean().item(), x.std().item()


def _plot_sizes(axes: Axes, w: Tensor, color: Any) -> None:
    """How many weights there are of each size and, in a bar of its own, how many are exactly zero."""
    sizes = w[w != 0].abs().clamp(min=1e-7).log10()
    zeros = int((w == 0).sum())
    axes.hist(sizes.tolist(), bins=64, range=(-7, 1), color=color)
    axes.bar(-8.5, zeros, width=1, color="black")
    axes.text(-9, 1.3 * max(zeros, 1), f"{zeros / len(w):.0%}", fontsize="small")
    axes.set_yscale("log")
    axes.set_ylim(0.7, 5 * len(w))
    axes.set_xticks([-8.5, -6, -3, 0], ["0", "$10^{-6}$", "$10^{-3}$", "1"])
    axes.spines[["top", "right"]].set_visible(False)
