"""Penalties in the loss and in the optimizer against weight_decay: a net that overfits a small set of real images.

The data are scikit-learn's handwritten digits: 200 images to train on, 400 to choose lambda on, 1197 to test on. The
test images are the same for all seeds, so that no image that judges a net ever had a say in a lambda; each seed deals
the others anew into training and validation. Pixels that are blank in the whole training split are dropped, so that no
zero comes for free; the others are standardized with the mean and deviation of the training split.

    python examples/compare_weight_decay.py
    tensorboard --logdir runs/compare_weight_decay    the weights over time, scores by lambda, the methods in HPARAMS
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from torch_regpen import L0, L1, L2, MCP, SCAD, ElasticNet, GroupLasso, LHalf, LogSum
from torch_regpen.compare import compare

TRAIN, VALIDATION, BATCH = 200, 400, 50
HIDDEN = 100
LAMBDAS = [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
METHODS = {
    "L2 in the loss": (L2, "loss"),
    "L2 coupled": (L2, "coupled"),
    "L1 in the loss": (L1, "loss"),
    "L1 coupled": (L1, "coupled"),
    "L1 decoupled": (L1, "decoupled"),
    "L1 proximal": (L1, "proximal"),
    "L1 dual": (L1, "dual"),
    "elastic net proximal": (ElasticNet, "proximal"),
    "group lasso proximal": (GroupLasso, "proximal"),
    "MCP proximal": (MCP, "proximal"),
    "SCAD proximal": (SCAD, "proximal"),
    "log-sum proximal": (LogSum, "proximal"),
    "L1/2 proximal": (LHalf, "proximal"),
    "L0 proximal": (L0, "proximal"),
}


@dataclass(frozen=True)
class Split:
    """Images, a row each, and their labels."""

    x: Tensor
    y: Tensor


Data = dict[str, Split]


def load_data(device: str, seed: int) -> Data:
    """Deals the digits into training, validation and test."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32, device=device), torch.tensor(labels, device=device)

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rest, test = order[: TRAIN + VALIDATION], order[TRAIN + VALIDATION :]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    train, validation = rest[:TRAIN], rest[TRAIN:]

    x = x[:, (x[train] != 0).any(dim=0)]
    x = (x - x[train].mean(dim=0)) / x[train].std(dim=0)
    rows = {"train": train, "validation": validation, "test": test}
    return {name: Split(x[indices], y[indices]) for name, indices in rows.items()}


def make_model(data: Data) -> nn.Module:
    """A net with two hidden layers."""
    x = data["train"].x
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(x.shape[1], HIDDEN),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(HIDDEN, HIDDEN),
            relu2=nn.ReLU(),
            output=nn.Linear(HIDDEN, 10),
        )
    ).to(x.device)


def fit(
    epochs: int, model: nn.Module, optimizer: torch.optim.Optimizer, penalty: Callable[[], Tensor | float], data: Data
) -> None:
    """Any training loop: all it does for the comparison is to add the penalty."""
    x, y = data["train"].x, data["train"].y
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN).split(BATCH):
            loss = F.cross_entropy(model(x[batch]), y[batch]) + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> dict[str, float]:
    """The percentage of images that the model gets right, of each split."""
    hits = {name: model(split.x).argmax(dim=1) == split.y for name, split in data.items()}
    return {name: 100 * hit.double().mean().item() for name, hit in hits.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, chooses, prints and plots."""
    parser = argparse.ArgumentParser(description="Penalties against weight_decay, on a net that overfits.")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, 2 or more")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs/compare_weight_decay"), help="TensorBoard, the plot, and a CSV file"
    )
    options = parser.parse_args(argv)
    if options.seeds < 2 or options.epochs < 1:
        parser.error("a spread needs --seeds 2 or more, and --epochs is 1 or more")

    comparison = compare(
        METHODS,
        LAMBDAS,
        data=partial(load_data, options.device),
        make_model=make_model,
        make_optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        fit=partial(fit, options.epochs),
        score=accuracy,
        seeds=range(options.seeds),
        logdir=options.logdir,
        log_every=max(1, options.epochs // 20) * TRAIN // BATCH,
        progress=True,
    )
    print(comparison)
    print(
        "\n±: standard deviation over the seeds; weight_decay is 2 * lambda; [ ]: the 95% interval of the difference,"
        f"\npaired by seed; dead: of {2 * HIDDEN} hidden neurons, those whose incoming weights are all exactly zero"
    )
    plot, table = options.logdir / "compare_weight_decay.png", options.logdir / "compare_weight_decay.csv"
    comparison.plot(plot)
    comparison.to_csv(table)
    print(f"\nThe plot: {plot}\nAll trainings: {table}\nTensorBoard: tensorboard --logdir {options.logdir}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small for more
    main()
