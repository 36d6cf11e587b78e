"""What regularization is for: penalties, `weight_decay` and plain training on a net that overfits.

The data are scikit-learn's handwritten digits, 8 x 8 pixels each. There are three settings:

- `wrong-labels`: 30% of the labels to learn from are wrong. A net without a penalty learns the wrong ones by heart; 70%
  on the training images is the best that a net can do that does not.
- `noise-inputs`: beside each pixel are 8 shuffled copies of it, which say nothing about the digit. A net without a
  penalty uses them all.
- `clean`: labels and inputs are as they are. Accuracy hardly depends on the penalty; but most weights are not needed.

Each method gets the same initial weights, batches, epochs and lambdas. lambda is chosen on 400 validation images, whose
labels are as wrong as those of the training images. The other images, about 1000, are for the test; their labels are
right, and no lambda is chosen on them. The test images are the same for all seeds. Each seed deals the others anew into
training and validation, with wrong labels and shuffles of its own.

    python examples/compare_weight_decay.py --plot compare.png                            all three, a few minutes
    python examples/compare_weight_decay.py --plot compare.png --setting wrong-labels     one of them

With `--logdir DIR`, `tensorboard --logdir DIR` shows the weights over time (`chosen`), and the lambdas side by side
(`lambdas`, in the tab HPARAMS).
"""

import argparse
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t
from sklearn.datasets import load_digits
from torch import Tensor, nn

from torch_regpen import L1, L2, ElasticNet, GroupLasso, Penalty
from torch_regpen.compare import Comparison, compare

METHODS: dict[str, tuple[Callable[..., Penalty], str]] = {
    "L2 in the loss": (L2, "loss"),
    "L1 in the loss": (L1, "loss"),
    "L1 proximal": (L1, "proximal"),
    "elastic net proximal": (ElasticNet, "proximal"),
    "group lasso proximal": (partial(GroupLasso, groups="input"), "proximal"),
}
SEEDS = 5
PIXELS = 64
VALIDATION, BATCH = 400, 100


@dataclass(frozen=True)
class Setting:
    """What a net learns from.

    Attributes:
        title: what is special about it.
        finding: what came of it, as the picture says.
        images: the number of images to train on.
        epochs: how often the net sees each of them.
        hidden: the sizes of its hidden layers.
        lambdas: what each method tries.
        claims: pairs of methods; the first is to be better than the second, or as good.
        wrong_labels: the fraction of training and validation labels that are replaced by another digit.
        copies: the number of shuffled copies of each pixel.
    """

    title: str
    finding: str
    images: int
    epochs: int
    hidden: tuple[int, ...]
    lambdas: list[float]
    claims: list[tuple[str, str]]
    wrong_labels: float = 0.0
    copies: int = 0


SETTINGS = {
    "wrong-labels": Setting(
        "30% of the labels are wrong",
        "L2 wins",
        images=500,
        epochs=30,
        hidden=(100, 100),
        lambdas=[5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2],
        claims=[("L2 in the loss", "plain"), ("L2 in the loss", "L1 proximal")],
        wrong_labels=0.3,
    ),
    "noise-inputs": Setting(
        "8 of 9 inputs are noise",
        "group lasso and L1 win",
        images=300,
        epochs=40,
        hidden=(100,),
        lambdas=[1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        claims=[
            ("group lasso proximal", "plain"),
            ("group lasso proximal", "weight_decay"),
            ("L1 proximal", "weight_decay"),
        ],
        copies=8,
    ),
    "clean": Setting(
        "Clean labels and inputs",
        "little to gain, yet L1 drops most weights",
        images=200,
        epochs=100,
        hidden=(100, 100),
        lambdas=[2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2],
        claims=[("L1 proximal", "plain"), ("L1 proximal", "weight_decay")],
    ),
}


@dataclass(frozen=True)
class Split:
    """Images, a row each, and their labels."""

    x: Tensor
    y: Tensor


Data = dict[str, Split]


def load_data(setting: Setting, seed: int) -> Data:
    """Deal the digits into training, validation and test, and spoil them as the setting says."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, test = order[: setting.images + VALIDATION], order[setting.images + VALIDATION :]
    generator = torch.Generator().manual_seed(seed)
    learn = learn[torch.randperm(len(learn), generator=generator)]
    train, validation = learn[: setting.images], learn[setting.images :]

    wrong = learn[torch.rand(len(learn), generator=generator) < setting.wrong_labels]
    y[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
    columns = [*x.T]
    for _ in range(setting.copies):
        columns += [pixel[torch.randperm(len(x), generator=generator)] for pixel in x.T]
    x = torch.stack(columns, dim=1)

    deviation = x[train].std(dim=0)
    x = (x - x[train].mean(dim=0)) / deviation.where(deviation > 0, math.inf)  # a pixel that is always blank becomes 0
    rows = {"train": train, "validation": validation, "test": test}
    return {name: Split(x[indices], y[indices]) for name, indices in rows.items()}


def make_model(setting: Setting, data: Data) -> nn.Module:
    """A fully connected net."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = data["train"].x.shape[1]
    for i, outputs in enumerate(setting.hidden, start=1):
        layers[f"hidden{i}"] = nn.Linear(inputs, outputs)
        layers[f"relu{i}"] = nn.ReLU()
        inputs = outputs
    layers["output"] = nn.Linear(inputs, 10)
    return nn.Sequential(layers)


def fit(
    epochs: int, model: nn.Module, optimizer: torch.optim.Optimizer, penalty: Callable[[], Tensor | float], data: Data
) -> None:
    """Train as in any training loop. All that the comparison asks for is to add the penalty to the loss."""
    x, y = data["train"].x, data["train"].y
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[batch]), y[batch]) + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def kept_inputs(model: nn.Module) -> Tensor:
    """Which inputs have a weight that is not zero: a row for the pixels, and one for each shuffled copy of them."""
    return model.get_parameter("hidden1.weight").detach().any(dim=0).view(-1, PIXELS)


@torch.no_grad()
def score(model: nn.Module, data: Data) -> dict[str, float]:
    """The percentage of labels that the model gets right, for each split, and the number of inputs that it uses."""
    hits = {name: model(split.x).argmax(dim=1) == split.y for name, split in data.items()}
    kept = kept_inputs(model)
    inputs = {"pixels": kept[0].sum().item(), "copies": kept[1:].sum().item()}
    return {name: 100 * hit.double().mean().item() for name, hit in hits.items()} | inputs


def mean_and_margin(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and how far the 95% interval (Student's t) reaches to both sides."""
    x = list(values)
    return fmean(x), t.ppf(0.975, len(x) - 1) * stdev(x) / math.sqrt(len(x))


def difference(comparison: Comparison, method: str, other: str) -> str:
    """The difference in test accuracy of two methods, with its 95% interval."""
    mean, low, high = comparison.difference(method, other)
    return f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"


def report(setting: Setting, comparison: Comparison) -> None:
    """Print a row for each method, then what is claimed."""
    header = f"{'':22}{'lambda':>7}{'train %':>9}{'test %':>8}  {'95% interval':15}{'zeros %':>7}"
    print(header + (f"{'pixels':>10}{'shuffled':>12}" if setting.copies else ""))
    for method, lam in comparison.chosen.items():
        trials = comparison.at(method)
        mean = {name: fmean(trial.scores[name] for trial in trials) for name in trials[0].scores}
        test, margin = mean_and_margin(trial.scores["test"] for trial in trials)
        interval = f"[{test - margin:.1f}, {test + margin:.1f}]"
        zeros = 100 * fmean(trial.zeros for trial in trials)
        row = f"{method:22}{lam:>7g}{mean['train']:>9.1f}{test:>8.1f}  {interval:15}{zeros:>7.1f}"
        inputs = f"{mean['pixels']:>7.0f}/{PIXELS}{mean['copies']:>8.0f}/{setting.copies * PIXELS}"
        print(row + (inputs if setting.copies else ""))
    print()
    for method, other in setting.claims:
        print(f"{method} against {other}: {difference(comparison, method, other)}")
    if setting.copies:
        print_inputs(kept_inputs(comparison.models["group lasso proximal"]))


def print_inputs(kept: Tensor) -> None:
    """Print which pixels are kept, and which of their shuffled copies, as 8 x 8 maps side by side."""
    pixels, copies = kept[0], kept[1:]
    print("\nThe inputs that the group lasso keeps with the first seed (#):")
    print(
        f"{pixels.sum()} of {pixels.numel()} pixels, the first map; {copies.sum()} of {copies.numel()} shuffled copies."
    )
    for line in kept.view(-1, 8, 8).transpose(0, 1):
        print(" ".join("".join("#" if on else "." for on in part) for part in line))


def plot(comparisons: dict[str, Comparison], file: Path) -> None:
    """Draw a panel for each setting."""
    figure = Figure(figsize=(5 * len(comparisons), 6.4), layout="constrained")
    panels = figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
    for axes, (name, comparison) in zip(panels, comparisons.items(), strict=True):
        plot_accuracy(axes, SETTINGS[name], comparison)
        if SETTINGS[name].copies:
            plot_inputs(axes, kept_inputs(comparison.models["group lasso proximal"]))
    chosen = [trial for c in comparisons.values() for method in c.chosen for trial in c.at(method)]
    lowest = min(trial.scores[split] for trial in chosen for split in ("train", "test"))
    panels[0].set_ylim(50 if lowest > 50 else 0, 102)
    panels[0].set_ylabel("accuracy, % (mean and 95% interval)", fontsize=14)
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 0.1), frameon=False, fontsize=13)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def plot_accuracy(axes: Axes, setting: Setting, comparison: Comparison) -> None:
    """Draw training and test accuracy of each method, and its exact zeros in numbers."""
    styles = {"train": ("s", "#E69F00"), "test": ("o", "#0072B2")}
    columns = range(len(comparison.chosen))
    for split, (marker, color) in styles.items():
        points = [mean_and_margin(trial.scores[split] for trial in comparison.at(m)) for m in comparison.chosen]
        means, margins = zip(*points, strict=True)
        axes.errorbar(columns, means, margins, fmt=marker, color=color, markersize=9, capsize=4, label=split)
        if split == "test":
            axes.axhline(means[0], color=color, linestyle=":", linewidth=1)
    for column, method in enumerate(comparison.chosen):
        zeros = 100 * fmean(trial.zeros for trial in comparison.at(method))
        axes.text(column, 0.02, f"{zeros:.0f}%", ha="center", fontsize=12, transform=axes.get_xaxis_transform())
    axes.text(-0.4, 0.07, "exact zeros:", fontsize=12, transform=axes.get_xaxis_transform())
    axes.set_title(f"{setting.title}:\n{setting.finding}", fontsize=16, loc="left")
    axes.set_xticks(columns, comparison.chosen, rotation=40, ha="right", rotation_mode="anchor", fontsize=13)
    axes.tick_params("y", labelsize=13)
    axes.spines[["top", "right"]].set_visible(False)


def plot_inputs(axes: Axes, kept: Tensor) -> None:
    """Draw the inputs that are kept: the pixels in the middle, their shuffled copies around them."""
    order = [1, 2, 3, 4, 0, 5, 6, 7, 8]
    square = kept[order].view(3, 3, 8, 8).transpose(1, 2).reshape(24, 24)
    inset = axes.inset_axes((0.05, 0.13, 0.3, 0.3))
    inset.imshow(square, cmap="Greys", vmin=0, vmax=1)
    inset.plot([7.5, 15.5, 15.5, 7.5, 7.5], [7.5, 7.5, 15.5, 15.5, 7.5], color="#D55E00", linewidth=2)
    inset.set(xticks=[], yticks=[])
    caption = "inputs that the group\nlasso keeps: in the\nmiddle the pixels,\naround them noise"
    axes.text(0.4, 0.28, caption, transform=axes.transAxes, va="center", fontsize=13)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, choose lambda, print and plot."""
    parser = argparse.ArgumentParser(description="Penalties, weight_decay and plain training on a net that overfits.")
    parser.add_argument("--setting", choices=SETTINGS, help="only this one")
    parser.add_argument("--plot", type=Path, default=Path("runs/compare_weight_decay.png"), help="the picture to write")
    parser.add_argument("--logdir", type=Path, help="a folder for TensorBoard and a CSV file of all trainings")
    parser.add_argument("--quick", action="store_true", help="1 epoch, 2 seeds: shows that it runs, and nothing else")
    options = parser.parse_args(argv)

    comparisons = {}
    for name in [options.setting] if options.setting else SETTINGS:
        setting = SETTINGS[name]
        if options.quick:
            setting = replace(setting, epochs=1, lambdas=setting.lambdas[::3])
        print(f"\n{name}: {setting.title}\n", flush=True)
        comparisons[name] = compare(
            METHODS,
            setting.lambdas,
            data=partial(load_data, setting),
            make_model=partial(make_model, setting),
            make_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            fit=partial(fit, setting.epochs),
            score=score,
            seeds=range(2 if options.quick else SEEDS),
            logdir=options.logdir and options.logdir / name,
            progress=True,
        )
        report(setting, comparisons[name])
        if options.logdir:
            comparisons[name].to_csv(options.logdir / name / "trainings.csv")
    plot(comparisons, options.plot)
    print(f"\nThe plot: {options.plot}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small for more
    main()
