"""The textbook page: what L1 and L2 do to five weights, one of which does not matter.

A linear model with five weights, mean squared error, plain gradient descent. The third input is 0 in all of the data,
so the data have nothing to say about w3: its part of A, the gradient of the mean squared error, is 0. What happens to
w3 is what the penalty does, and nothing else.

    no penalty   w - lr * A                        w3 stays where it started
    L1           w - lr * (A + lam * sign(w))      takes off a constant: w3 walks to zero in a straight line
    L2           w - lr * (A + 2 * lam * w)        takes off a share: w3 becomes small, and never zero

On a computer L1 needs one more idea. The sign step takes off the same `lr * lam` at +0.01 as at +1, so it steps over
zero, and back, for ever. The decoupled and the proximal step stop at zero, and the weight is exactly 0.0.

    python examples/five_weights.py
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from torch_regpen import L1, L2, Penalty, RegularizedOptimizer

LR = 0.1
LAM = 0.3
STEPS = 100
TRUE_WEIGHTS = torch.tensor([2.0, -1.5, 0.0, 0.8, -0.6], dtype=torch.float64)
NAMES = ["w1", "w2", "w3", "w4", "w5"]
W3 = 2


def make_data() -> tuple[Tensor, Tensor]:
    """50 samples of `y = X w + noise`, with a third input that is always 0."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 5, dtype=torch.float64, generator=generator)
    X[:, W3] = 0
    noise = torch.randn(50, dtype=torch.float64, generator=generator)
    return X, X @ TRUE_WEIGHTS + 0.1 * noise


def descend(X: Tensor, y: Tensor, kind: type[Penalty] | None = None, how: str = "loss") -> Tensor:
    """Gradient descent from five ones; returns the weights at the start and after each step.

    Args:
        X: the inputs.
        y: the targets.
        kind: `L1`, `L2`, or None for no penalty.
        how: "loss" adds the penalty to the loss; else the mode in which the optimizer applies it.
    """
    w = torch.ones(5, dtype=torch.float64, requires_grad=True)
    optimizer: torch.optim.Optimizer = torch.optim.SGD([w], lr=LR)
    penalty = None if kind is None else kind([w], LAM)
    if penalty is not None and how != "loss":
        optimizer = RegularizedOptimizer(optimizer, penalty, mode=how)

    path = [w.detach().clone()]
    for _ in range(STEPS):
        loss = (X @ w - y).square().mean()
        if penalty is not None and how == "loss":
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def largest_difference(path: Tensor, formula: Callable[[Tensor, Tensor], Tensor], X: Tensor, y: Tensor) -> float:
    """Takes each step of a path once more, by the formula; returns how far the two ever are from each other."""
    difference = 0.0
    for before, after in pairwise(path):
        A = 2 / len(y) * X.T @ (X @ before - y)  # the gradient of the mean squared error, by hand
        difference = max(difference, (after - formula(before, A)).abs().max().item())
    return difference


def print_weights(paths: dict[str, Tensor]) -> None:
    """The five weights at the end of each path."""
    print(f"All weights start at 1; lr = {LR}, lam = {LAM}. After {STEPS} steps:\n")
    print(" " * 14 + "".join(f"{name:>10}" for name in NAMES))
    for label, weights in [("true weights", TRUE_WEIGHTS), *((name, path[-1]) for name, path in paths.items())]:
        print(f"{label:14}" + "".join(f"{w:10.4f}" for w in weights.tolist()))


def print_w3(paths: dict[str, Tensor]) -> None:
    """The path of w3."""
    print("\nThe path of w3:\n")
    print("step" + "".join(f"{name:>14}" for name in paths))
    for step in [0, 1, 2, 3, 10, 20, 30, 32, 33, 34, 35, 36, STEPS - 1, STEPS]:
        print(f"{step:4}" + "".join(f"{w3:14.4f}" for w3 in (path[step, W3].item() for path in paths.values())))
    print(" end" + "".join(f"{'exactly 0' if path[-1, W3] == 0 else 'not 0':>14}" for path in paths.values()))


def print_formulas(X: Tensor, y: Tensor) -> None:
    """Each step of the library beside the step of the formula."""
    formulas: list[tuple[type[Penalty] | None, str, Callable[[Tensor, Tensor], Tensor]]] = [
        (None, "w - lr*A", lambda w, A: w - LR * A),
        (L1, "w - lr*(A + lam*sign(w))", lambda w, A: w - LR * (A + LAM * w.sign())),
        (L2, "w - lr*(A + 2*lam*w)", lambda w, A: w - LR * (A + 2 * LAM * w)),
    ]
    print(f"\nEach of the {STEPS} steps against the formula; the largest difference of any weight at any step:\n")
    print(f"{'':30}{'in the loss':>14}{'coupled':>14}")
    for kind, text, formula in formulas:
        ways = ["loss", "coupled"] if kind is not None else ["loss"]
        differences = [largest_difference(descend(X, y, kind, how), formula, X, y) for how in ways]
        print(f"{text:30}" + "".join(f"{difference:14.1e}" for difference in differences))


def plot(paths: dict[str, Tensor], file: Path) -> None:
    """Above, the five weights without a penalty, under L1 and under L2; below, how w3 arrives at zero under L1."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    above, below = figure.subplots(2, 3, sharey="row")
    colors = ["tab:blue", "tab:green", "tab:red", "tab:purple", "tab:orange"]

    titles = {"no penalty": "No penalty: w3 stays", "L1": "L1: w3 walks to zero", "L2": "L2: w3 is small, never zero"}
    for axes, (name, title) in zip(above, titles.items(), strict=True):
        for i in range(5):
            axes.plot(paths[name][:, i], color=colors[i], linewidth=3 if i == W3 else 1.5, label=NAMES[i])
            if i != W3:
                axes.axhline(TRUE_WEIGHTS[i], color=colors[i], linewidth=1, linestyle=":")
        axes.axhline(0, color="0.4", linewidth=0.8, zorder=0)
        axes.set(title=title, xlabel="step")
    above[0].set_ylabel("weight (dotted: the true one)")
    above[2].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)

    titles = {
        "L1": "L1, sign step: around zero for ever",
        "L1 decoupled": "L1 decoupled: exactly 0",
        "L1 proximal": "L1 proximal: exactly 0",
    }
    first, last = 25, 50
    for axes, (name, title) in zip(below, titles.items(), strict=True):
        axes.axhline(0, color="0.4", linewidth=0.8, zorder=0)
        axes.plot(range(first, last + 1), paths[name][first : last + 1, W3], ".-", color=colors[W3], markersize=7)
        axes.set(title=title, xlabel="step")
    below[0].set_ylabel("w3, close to zero")

    for axes in (*above, *below):
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Descends, prints and plots."""
    parser = argparse.ArgumentParser(description="What L1 and L2 do to five weights, one of which does not matter.")
    parser.add_argument("--plot", type=Path, default=Path("runs/five_weights.png"), help="the PNG file to write")
    options = parser.parse_args(argv)

    X, y = make_data()
    paths = {
        "no penalty": descend(X, y),
        "L1": descend(X, y, L1),
        "L2": descend(X, y, L2),
        "L1 decoupled": descend(X, y, L1, "decoupled"),
        "L1 proximal": descend(X, y, L1, "proximal"),
    }
    print_weights(paths)
    print_w3(paths)
    print_formulas(X, y)
    plot(paths, options.plot)
    print(f"\nThe plot: {options.plot}")


if __name__ == "__main__":
    main()
