"""How accurate a network stays as its weights vanish, beside torchao's PruneOptimizer.

    python tests/benchmarks/sparse_training.py                 the digits of scikit-learn, 5 seeds
    python tests/benchmarks/sparse_training.py --freeze        zeros that flip, and what freeze_zeros() gains

All train the same network on the same batches for the same number of epochs, under SGD with momentum and a cosine
schedule. For three fifths of the steps zeros are made, on a cubic ramp, then they are frozen (torchao: healing) while
the rest is fitted. Each method gets the same settings, three learning rates, and at each sparsity the one with the best
mean validation accuracy counts; ProxLasso, which takes a lambda and no sparsity, gets eight lambdas for each on top.
Printed are mean and standard deviation over seeds of the test accuracy, in %.

torchao is no dependency: pip install --no-deps torchao.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torch_regpen import L0, L1, LHalf, LogSum, RegularizedOptimizer
from torch_regpen.schedules import TargetSparsity

TARGETS = [0.8, 0.9, 0.95, 0.98, 0.99]
RATES = [0.1, 0.2, 0.4]
LAMBDAS = np.geomspace(3e-4, 3e-2, 8).tolist()
SHRINKING = 0.6  # the part of the steps in which zeros are made


class Data(NamedTuple):
    """Inputs and labels to train, to choose a setting, and to test."""

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor


class Result(NamedTuple):
    """What came out of one run."""

    sparsity: float
    validation: float
    test: float


def digits(seed: int) -> Data:
    """1000 of the digits to train, 300 to choose a setting, 497 to test; which, depends on the seed."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    parts = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).split([1000, 300, 497])
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    return Data(*(z for part in parts for z in (x[part], y[part])))


def network(data: Data, seed: int) -> nn.Module:
    """300 and 100 hidden units."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(data.x.shape[1], 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def train(model: nn.Module, data: Data, optimizer: Any, epochs: int, after_step: Callable[[int], None]) -> None:
    """The loop; the learning rate falls to 0 in a half cosine."""
    batches = batches_of(data)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    criterion = nn.CrossEntropyLoss()
    for step in range(epochs * batches):
        if step % batches == 0:
            order = torch.randperm(len(data.x)).tensor_split(batches)
        batch = order[step % batches]
        optimizer.zero_grad()
        criterion(model(data.x[batch]), data.y[batch]).backward()
        optimizer.step()
        schedule.step()
        after_step(step + 1)


def batches_of(data: Data) -> int:
    """How many batches an epoch has."""
    return len(data.x) // 64


def result(model: nn.Module, data: Data) -> Result:
    """The share of weights that are exactly zero, and the accuracies."""
    zeros = torch.cat([p.detach().flatten() == 0 for p in model.parameters() if p.ndim > 1])
    with torch.no_grad():
        right = [model(x).argmax(1) == y for x, y in (data[2:4], data[4:6])]
    sparsity, validation, test = (100 * hits.double().mean().item() for hits in (zeros, *right))
    return Result(sparsity, validation, test)


def run(make: Any, lr: float, data: Data, epochs: int, seed: int) -> Result:
    """Trains with what `make(model, lr, steps)` returns: an optimizer, and what to do after each step."""
    model = network(data, seed)
    optimizer, after_step = make(model, lr, epochs * batches_of(data))
    train(model, data, optimizer, epochs, after_step)
    return result(model, data)


def plain(model: nn.Module, lr: float, steps: int) -> Any:
    """No zeros."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), lambda step: None


def ours(kind: Any, mode: str, target: float, model: nn.Module, lr: float, steps: int, every: int | None = None) -> Any:
    """A penalty with a target sparsity, and then frozen zeros."""
    inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    optimizer = RegularizedOptimizer(inner, kind(model, 1e-4), mode)
    schedule = TargetSparsity(optimizer, target, steps=int(SHRINKING * steps), every=every, freeze=True)
    return optimizer, lambda step: schedule.step()


def torchao(config: dict[str, Any], model: nn.Module, lr: float, steps: int) -> Any:
    """Its PruneOptimizer."""
    from torchao.prototype.pat.optim import PruneOptimizer

    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "group_type": "ElemGrouper", **config}, {"params": others}]
    inner = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return PruneOptimizer(inner, healing_start_step=int(SHRINKING * steps)), lambda step: None


def min_sparsity(target: float, *args: Any) -> Any:
    """Its GlobalMinSparsityConstraint, on its schedule."""
    config = {"prox_type": "GlobalMinSparsityConstraint", "min_sparsity": target, "min_sparsity_schedule": True}
    return torchao(config, *args)


def prox_lasso(lam: float, *args: Any) -> Any:
    """Its ProxLasso."""
    return torchao({"prox_type": "ProxLasso", "reg_lambda": lam}, *args)


METHODS: dict[str, Any] = {
    "dual L0": partial(ours, L0, "dual"),
    "dual LogSum": partial(ours, LogSum, "dual"),
    "dual LHalf": partial(ours, LHalf, "dual"),
    "proximal L1": partial(ours, L1, "proximal"),
    "torchao GlobalMinSparsity": min_sparsity,
}


def print_row(name: str, cells: list[list[Result] | None]) -> None:
    """A line of the table: the test accuracy at each sparsity."""
    tests = [[r.test for r in results] if results else [] for results in cells]
    spreads = [f" ± {np.std(t, ddof=1):.2f}" if len(t) > 1 else "" for t in tests]
    texts = [f"{np.mean(t):.2f}{spread}" if t else "-" for t, spread in zip(tests, spreads, strict=True)]
    print(f"| {name} | " + " | ".join(texts) + " |", flush=True)


def print_head(what: str, targets: list[float]) -> None:
    """The first lines of the table."""
    print(f"| {what} | " + " | ".join(f"{100 * target:g}%" for target in targets) + " |")
    print("|---|" + "---|" * len(targets), flush=True)


def best(settings: list[list[Result]]) -> list[Result]:
    """The runs, one for each seed, of the setting with the best mean validation accuracy."""
    return max(settings, key=lambda results: np.mean([r.validation for r in results]))


def on_digits(seeds: int, epochs: int, targets: list[float], names: list[str]) -> None:
    """The table on digits."""
    data = [digits(seed) for seed in range(seeds)]

    def settings(make: Any) -> list[list[Result]]:
        return [[run(make, lr, data[seed], epochs, seed) for seed in range(seeds)] for lr in RATES]

    print_head(f"digits, 64-300-100-10, {epochs} epochs, {seeds} seeds; zeros:", targets)
    print_row("none", [best(settings(plain))] * len(targets))
    for name in names:
        print_row(name, [best(settings(partial(METHODS[name], target))) for target in targets])
    tried = [results for lam in LAMBDAS for results in settings(partial(prox_lasso, lam))]
    sparse = [[rs for rs in tried if np.mean([r.sparsity for r in rs]) >= 100 * t - 0.5] for t in targets]
    print_row("torchao ProxLasso", [best(enough) if enough else None for enough in sparse])


def on_freeze(seeds: int, epochs: int) -> None:
    """Zeros under L1, those that flip, the accuracy; and after as many epochs more, with L1 or with zeros frozen."""
    print("| L1 proximal | lambda | zeros | of them flip | accuracy | trained on | frozen | gain |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    inner = {
        "SGD, momentum 0.9": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "Adam": partial(torch.optim.Adam, lr=0.003),
    }
    for name, lam in ((name, lam) for name in inner for lam in (0.0003, 0.001)):
        rows = np.array([survivors(digits(seed), inner[name], lam, epochs, seed) for seed in range(seeds)])
        zeros, flips, before, trained_on, frozen = rows.mean(axis=0)
        error = (rows[:, 4] - rows[:, 3]).std(ddof=1) / seeds**0.5
        cells = f"{zeros:.1f}% | {flips:.2f}% | {before:.2f} | {trained_on:.2f} | {frozen:.2f}"
        print(f"| {name} | {lam:g} | {cells} | {frozen - trained_on:+.2f} ± {error:.2f} |", flush=True)


def survivors(data: Data, make: Any, lam: float, epochs: int, seed: int) -> tuple[float, ...]:
    """Zeros, of them those that were not zero at some step of the last tenth, and the three accuracies; in %."""
    model = network(data, seed)
    optimizer = RegularizedOptimizer(make(model.parameters()), L1(model, lam), "proximal")
    weights = [p for p in model.parameters() if p.ndim > 1]
    steps = epochs * batches_of(data)
    moved = [torch.zeros_like(w, dtype=torch.bool) for w in weights]

    def watch(step: int) -> None:
        if step > 0.9 * steps:
            for seen, w in zip(moved, weights, strict=True):
                seen |= w != 0

    train(model, data, optimizer, epochs, watch)
    zeros = [w == 0 for w in weights]
    flips = sum(int((zero & seen).sum()) for zero, seen in zip(zeros, moved, strict=True))
    sparsity, _, before = result(model, data)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    accuracies = [before]
    for freeze in (False, True):
        model_on, optimizer_on = copy.deepcopy((model, optimizer))
        if freeze:
            optimizer_on.freeze_zeros()
        train(model_on, data, optimizer_on, epochs, lambda step: None)
        accuracies.append(result(model_on, data).test)
    return sparsity, 100 * flips / sum(int(zero.sum()) for zero in zeros), *accuracies


def main() -> None:
    """Runs, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--freeze", action="store_true", help="what freezing zeros gains")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--targets", type=float, nargs="+")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.freeze:
        on_freeze(options.seeds, options.epochs)
    else:
        on_digits(options.seeds, options.epochs, options.targets or TARGETS, options.methods)


if __name__ == "__main__":
    main()
