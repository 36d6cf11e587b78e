"""One lambda means one solution, whichever optimizer gets there.

The Lasso on scikit-learn's diabetes data, ten weights, at 16 lambdas: how many weights are not zero under SGD, with
momentum, Adam, RMSprop and Adagrad, and in scikit-learn's exact solution. On the left the proximal mode as it is: the
prox is taken in the optimizer's own metric. On the right with the learning rate in its place, `metric="euclidean"`, as
a textbook has it, which is right for plain SGD only.

    python examples/same_lambda_every_optimizer.py
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_diabetes
from sklearn.linear_model import lasso_path
from sklearn.preprocessing import scale
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from torch_regpen import L1, RegularizedOptimizer

OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], Optimizer]] = {
    "SGD": lambda weights: SGD(weights, lr=0.2),
    "SGD, momentum 0.9": lambda weights: SGD(weights, lr=0.05, momentum=0.9),
    "Adam": lambda weights: Adam(weights, lr=0.01),
    "RMSprop": lambda weights: RMSprop(weights, lr=0.005),
    "Adagrad": lambda weights: Adagrad(weights, lr=0.2),
}
X, Y = (scale(part) for part in load_diabetes(return_X_y=True))
LAMBDA_MAX = np.abs(X.T @ Y).max() / len(X)
LAMBDAS = LAMBDA_MAX * np.geomspace(0.01, 0.95, 16)


def objective(weights: np.ndarray) -> np.ndarray:
    """`SSE/(2n) + lambda * sum|w|` of the weights at each lambda, a row each."""
    return np.square(Y - weights @ X.T).sum(axis=1) / (2 * len(X)) + LAMBDAS * np.abs(weights).sum(axis=1)


def solve(make: Callable[[list[torch.Tensor]], Optimizer], metric: str, steps: int) -> np.ndarray:
    """Trains the weights at each lambda from 0, all in one optimizer; returns a row for each.

    The learning rate is constant for half of the steps, and then falls to a thousandth.
    """
    hessian, slope = torch.tensor(X.T @ X / len(X)), torch.tensor(X.T @ Y / len(X))
    weights = [torch.zeros(10, dtype=torch.float64, requires_grad=True) for _ in LAMBDAS]
    groups = [{"params": [w], "lam": lam} for w, lam in zip(weights, LAMBDAS.tolist(), strict=True)]
    optimizer = RegularizedOptimizer(make(weights), L1(groups, 0.0), "proximal", metric=metric)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 10 ** min(0.0, 3 - 6 * step / steps))
    for _ in range(steps):
        gradients = torch.stack(weights).detach() @ hessian - slope
        for w, gradient in zip(weights, gradients, strict=True):
            w.grad = gradient
        optimizer.step()
        schedule.step()
    return torch.stack(weights).detach().numpy()


def plot(exact: np.ndarray, found: dict[tuple[str, str], np.ndarray], file: Path) -> None:
    """The number of weights that are not zero against lambda."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    titles = {"auto": "proximal: the optimizer's own metric", "euclidean": 'metric="euclidean": threshold lr * lambda'}
    sides = dict(zip(titles, figure.subplots(1, 2, sharey=True), strict=True))
    for metric, axes in sides.items():
        axes.plot(LAMBDAS, np.count_nonzero(exact, axis=1), color="0.8", linewidth=9, label="scikit-learn's Lasso")
        for marker, size, name in zip("o^sDv", (9, 7.5, 6, 4.5, 3), OPTIMIZERS, strict=True):
            count = np.count_nonzero(found[name, metric], axis=1)
            axes.plot(LAMBDAS, count, f"{marker}-", markersize=size, linewidth=1, fillstyle="none", label=name)
        axes.set(xscale="log", xlabel="lambda", title=titles[metric])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    sides["auto"].set_ylabel("weights that are not zero")
    sides["auto"].legend(frameon=False, fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def main(argv: Sequence[str] | None = None) -> None:
    """Solves, prints and plots."""
    parser = argparse.ArgumentParser(description="One lambda means one solution, whichever optimizer gets there.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--plot", type=Path, default=Path("runs/same_lambda_every_optimizer.png"), help="to write")
    options = parser.parse_args(argv)

    exact = lasso_path(X, Y, alphas=LAMBDAS, tol=1e-12, max_iter=10**5)[1].T[::-1]
    found = {}
    print(f"{'':20}{'metric':12}{'same support':>14}{'objective above the optimum, at most':>40}")
    for name, make in OPTIMIZERS.items():
        for metric in ("auto", "euclidean"):
            weights = found[name, metric] = solve(make, metric, options.steps)
            same = ((weights != 0) == (exact != 0)).all(axis=1).sum()
            gap = (objective(weights) / objective(exact) - 1).max()
            print(f"{name:20}{metric:12}{f'{same} of {len(LAMBDAS)}':>14}{gap:>39.1e}x")
    plot(exact, found, options.plot)
    print(f"\nThe plot: {options.plot}")


if __name__ == "__main__":
    main()
