"""L1 and L2, in the loss and in the optimizer, against weight_decay: a net that overfits a small set of real images.

The data are scikit-learn's handwritten digits: 200 images to train on, 400 to choose lambda on, 1197 to test on. The
test images are the same for all seeds, so that no image that judges a net ever had a say in a lambda; each seed deals
the others anew into training and validation. Pixels that are blank in the whole training split are dropped, so that no
zero comes for free; the others are standardized with the mean and deviation of the training split.

Each method gets the same nets with the same initial weights, the same batches, the same epochs, and tries the same
lambdas. Of these it takes the largest that is within one standard error of the best on the validation split.

    python examples/compare_weight_decay.py
    tensorboard --logdir runs/compare_weight_decay
"""

import argparse
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from torch_regpen import L1, L2, ElasticNet, GroupLasso, Penalty, RegularizedOptimizer
from torch_regpen.tensorboard import WeightLogger

TRAIN, VALIDATION, BATCH = 200, 400, 50
HIDDEN = 100
LR, MOMENTUM = 0.05, 0.9
LAMBDAS = [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: what it is called in the table and the plot.
        how: "plain", "weight_decay", "loss" (the penalty is added to the loss), or a mode of `RegularizedOptimizer`.
        penalty: its kind; plain and weight_decay have one only to be shown on TensorBoard.
        color: in the plot.
    """

    name: str
    how: str
    penalty: type[Penalty]
    color: str

    @property
    def lambdas(self) -> list[float]:
        """The lambdas that it tries."""
        return [0.0] if self.how == "plain" else LAMBDAS


METHODS = [
    Method("plain", "plain", L2, "black"),
    Method("weight_decay", "weight_decay", L2, "tab:blue"),
    Method("L2 in the loss", "loss", L2, "tab:blue"),
    Method("L2 coupled", "coupled", L2, "tab:blue"),
    Method("L1 in the loss", "loss", L1, "tab:orange"),
    Method("L1 coupled", "coupled", L1, "tab:orange"),
    Method("L1 decoupled", "decoupled", L1, "tab:brown"),
    Method("L1 proximal", "proximal", L1, "tab:red"),
    Method("elastic net proximal", "proximal", ElasticNet, "tab:purple"),
    Method("group lasso proximal", "proximal", GroupLasso, "tab:green"),
]
COLORS = {method.name: method.color for method in METHODS}
SHOWN = ["plain", "L2 coupled", "L1 in the loss", "L1 proximal", "group lasso proximal"]  # in the histograms


@dataclass(frozen=True)
class Split:
    """Images, a row each, and their labels."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Data:
    """What one seed trains, chooses and tests on."""

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Run:
    """What came of one training: accuracies and exact zeros in percent, milliseconds per step."""

    train: float
    validation: float
    test: float
    zeros: float
    dead: int
    ms: float


Runs = dict[float, list[Run]]  # the runs of one method: a list over the seeds for each lambda


def load_data(seed: int, device: str) -> Data:
    """Deals the digits into training, validation and test."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32, device=device), torch.tensor(labels, device=device)

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rest, test = order[: TRAIN + VALIDATION], order[TRAIN + VALIDATION :]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    train, validation = rest[:TRAIN], rest[TRAIN:]

    x = x[:, (x[train] != 0).any(dim=0)]
    x = (x - x[train].mean(dim=0)) / x[train].std(dim=0)
    return Data(*(Split(x[indices], y[indices]) for indices in (train, validation, test)))


def make_model(inputs: int, seed: int) -> nn.Module:
    """A net with two hidden layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(inputs, HIDDEN),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(HIDDEN, HIDDEN),
            relu2=nn.ReLU(),
            output=nn.Linear(HIDDEN, 10),
        )
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight matrices, which is what a penalty selects too: no biases."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """The percentage of images that the model gets right."""
    return 100 * int((model(split.x).argmax(dim=1) == split.y).sum()) / len(split.y)


def make_optimizer(method: Method, model: nn.Module, penalty: Penalty, lam: float) -> torch.optim.Optimizer:
    """SGD with momentum, and the method's way to shrink weights."""
    if method.how == "weight_decay":
        decayed = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 2 * lam}, {"params": others}]
        return torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    if method.how in ("plain", "loss"):
        return optimizer
    return RegularizedOptimizer(optimizer, penalty, mode=method.how)


def train(
    method: Method, lam: float, data: Data, seed: int, epochs: int, writer: SummaryWriter | None = None
) -> tuple[nn.Module, Run]:
    """Trains one net, and measures it; with a writer, shows on TensorBoard how its weights change."""
    model = make_model(data.train.x.shape[1], seed).to(data.train.x.device)
    penalty = method.penalty(model, lam)
    optimizer = make_optimizer(method, model, penalty, lam)
    every = max(1, epochs // 20) * TRAIN // BATCH  # steps, from one histogram to the next
    logger = WeightLogger(writer, penalty, every=every)

    shuffle = torch.Generator().manual_seed(seed)
    step = 0
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN, generator=shuffle).split(BATCH):
            loss = F.cross_entropy(model(data.train.x[batch]), data.train.y[batch])
            if method.how == "loss":
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if writer is not None:
                logger.step(step)
                if step % every == 0:
                    for name in ("train", "validation", "test"):
                        writer.add_scalar(f"accuracy/{name}", accuracy(model, getattr(data, name)), step)
            step += 1
    loss.item()  # waits for the device
    seconds = time.perf_counter() - start

    zero = {name: w == 0 for name, w in weights(model).items()}
    return model, Run(
        train=accuracy(model, data.train),
        validation=accuracy(model, data.validation),
        test=accuracy(model, data.test),
        zeros=100 * torch.cat([z.flatten() for z in zero.values()]).double().mean().item(),
        dead=sum(int(zero[f"{layer}.weight"].all(dim=1).sum()) for layer in ("hidden1", "hidden2")),
        ms=1000 * seconds / step,
    )


def train_all(datasets: list[Data], epochs: int) -> dict[str, Runs]:
    """Trains every method with every lambda and every seed."""
    jobs = [(method, lam, seed) for method in METHODS for lam in method.lambdas for seed in range(len(datasets))]
    random.Random(0).shuffle(jobs)  # a machine that is busy for a while slows all methods down alike
    results: dict[str, Runs] = {method.name: {lam: [] for lam in method.lambdas} for method in METHODS}
    for method, lam, seed in tqdm(jobs, desc="training", unit="net"):
        _, run = train(method, lam, datasets[seed], seed, epochs)
        results[method.name][lam].append(run)
    return results


def choose_lambda(runs: Runs) -> float:
    """The largest lambda within one standard error of the best on the validation split."""
    means = {lam: fmean(run.validation for run in runs[lam]) for lam in runs}
    best = max(means, key=means.__getitem__)
    error = stdev(run.validation for run in runs[best]) / sqrt(len(runs[best]))
    return max(lam for lam in runs if means[lam] >= means[best] - error)


def record(chosen: dict[str, float], data: Data, epochs: int, logdir: Path) -> dict[str, Tensor]:
    """Trains the chosen nets of the first seed once more, for TensorBoard; returns the weights of each."""
    trained = {}
    for method in tqdm(METHODS, desc="TensorBoard", unit="net"):
        folder = logdir / method.name.replace(" ", "_")
        with SummaryWriter(str(folder), purge_step=0) as writer:  # hides what an earlier call left there
            model, _ = train(method, chosen[method.name], data, 0, epochs, writer)
        trained[method.name] = torch.cat([w.flatten() for w in weights(model).values()]).cpu()
    return trained


def print_table(results: dict[str, Runs], chosen: dict[str, float]) -> None:
    """A row for each method, at the lambda that it chose: means over the seeds, and standard deviations."""
    print(
        f"\n{'':20} {'lambda':>7} {'test %':>13} {'training %':>14}"
        f" {'gap':>6} {'zeros %':>8} {'dead':>6} {'ms/step':>8}"
    )
    for name, runs in results.items():
        rows = runs[chosen[name]]
        test, training = [run.test for run in rows], [run.train for run in rows]
        zeros, dead = fmean(run.zeros for run in rows), fmean(run.dead for run in rows)
        ms = median(run.ms for rows in runs.values() for run in rows)
        print(
            f"{name:20} {chosen[name]:7g} {fmean(test):6.2f} ± {stdev(test):4.2f}"
            f" {fmean(training):7.2f} ± {stdev(training):4.2f} {fmean(training) - fmean(test):6.2f}"
            f" {zeros:8.2f} {dead:6.1f} {ms:8.3f}"
        )
    print(
        "\n±: standard deviation over the seeds; weight_decay is 2 * lambda; "
        f"dead: of {2 * HIDDEN} hidden neurons,\nthose whose incoming weights are all exactly zero"
    )


def plot_accuracy(
    axes: Axes, names: list[str], results: dict[str, Runs], chosen: dict[str, float], dense: bool
) -> None:
    """Test accuracy at the chosen lambda: of dense nets a column each, of sparse ones against their exact zeros."""
    for column, name in enumerate(names):
        runs, color = results[name], COLORS[name]
        zeros = {lam: fmean(run.zeros for run in runs[lam]) for lam in runs}
        test = {lam: fmean(run.test for run in runs[lam]) for lam in runs}
        lam = chosen[name]
        axes.errorbar(
            column if dense else zeros[lam],
            test[lam],
            yerr=stdev(run.test for run in runs[lam]),
            color=color,
            fmt="o",
            markersize=8,
            capsize=3,
            label=name,
        )
        if not dense:
            axes.plot(list(zeros.values()), list(test.values()), ".-", color=color, linewidth=1, alpha=0.6, zorder=0)
    plain = fmean(run.test for run in results["plain"][0.0])
    axes.axhline(plain, color="black", linestyle=":", linewidth=1, zorder=0, label="mean of plain")
    axes.set_ylim(plain - 4, plain + 2.5)
    axes.spines[["top", "right"]].set_visible(False)


def plot_histogram(axes: Axes, w: Tensor, color: str) -> None:
    """How many weights there are of each size and, in a bar of its own, how many are exactly zero."""
    sizes = w[w != 0].abs().clamp(min=1e-7).log10()
    zeros = int((w == 0).sum())
    axes.hist(sizes, bins=64, range=(-7, 1), color=color)
    axes.bar(-8.5, zeros, width=1, color="black")
    axes.text(-9, 1.3 * max(zeros, 1), f"{zeros / len(w):.0%}", fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 5e4)
    axes.set_xticks([-8.5, -6, -3, 0], ["0", "$10^{-6}$", "$10^{-3}$", "1"])
    axes.spines[["top", "right"]].set_visible(False)


def plot(results: dict[str, Runs], chosen: dict[str, float], trained: dict[str, Tensor], file: Path) -> None:
    """Above, accuracy against sparsity; below, the weights that some of the methods end with."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3, 2])

    dense = [name for name in results if fmean(run.zeros for run in results[name][chosen[name]]) < 1]
    sparse = [name for name in results if name not in dense]
    left, right = above.subplots(1, 2, sharey=True, width_ratios=[2, 3])
    plot_accuracy(left, dense, results, chosen, dense=True)
    left.set_xticks(range(len(dense)), dense, rotation=35, ha="right", rotation_mode="anchor")
    left.set_title("Dense nets: under 1% exact zeros", fontsize=11)
    left.set_ylabel("test accuracy, % (mean ± deviation)")
    plot_accuracy(right, sparse, results, chosen, dense=False)
    right.set_title("Sparse nets: a dot for each lambda, the chosen one large", fontsize=11)
    right.set(xlabel="weights that are exactly zero, %", xlim=(-3, 103))
    right.legend(loc="lower left", frameon=False)

    panels = below.subplots(1, len(SHOWN), sharey=True)
    for axes, name in zip(panels, SHOWN, strict=True):
        plot_histogram(axes, trained[name], COLORS[name])
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("weights (log scale)")
    below.supxlabel("size of the weight, |w|; in black, the weights that are exactly 0", fontsize=10)
    figure.savefig(file, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, chooses, prints and plots."""
    parser = argparse.ArgumentParser(description="L1 and L2 against weight_decay, on a net that overfits.")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, 2 or more")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs/compare_weight_decay"), help="TensorBoard and the plot"
    )
    options = parser.parse_args(argv)
    if options.seeds < 2 or options.epochs < 1:
        parser.error("a spread needs --seeds 2 or more, and --epochs is 1 or more")

    datasets = [load_data(seed, options.device) for seed in range(options.seeds)]
    results = train_all(datasets, options.epochs)
    chosen = {name: choose_lambda(runs) for name, runs in results.items()}
    trained = record(chosen, datasets[0], options.epochs, options.logdir)
    print_table(results, chosen)
    file = options.logdir / "compare_weight_decay.png"
    plot(results, chosen, trained, file)
    print(f"\nThe plot: {file}\nTensorBoard: tensorboard --logdir {options.logdir}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small for more
    main()
