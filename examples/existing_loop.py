"""A training loop that was there before, without and with torch_regpen: the difference is two lines.

`fit` is the loop of any project: a DataLoader, a loss, a step. It knows nothing of penalties and is used twice as it
is. What is new stands in `main`, between the dashes: the penalty, and the optimizer wrapped with it.

    python examples/existing_loop.py
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_regpen import L1, RegularizedOptimizer

Batches = DataLoader[tuple[torch.Tensor, ...]]


def make_data() -> tuple[Batches, torch.Tensor, torch.Tensor]:
    """Scikit-learn's handwritten digits: batches to train on, images and labels to test on."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
    scaler = StandardScaler().fit(x_train)
    x_train, x_test = scaler.transform(x_train), scaler.transform(x_test)
    train = TensorDataset(torch.tensor(x_train, dtype=torch.float32), torch.tensor(y_train))
    batches = DataLoader(train, batch_size=64, shuffle=True)
    return batches, torch.tensor(x_test, dtype=torch.float32), torch.tensor(y_test)


def make_model() -> nn.Module:
    """A small net."""
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, epochs: int) -> None:
    """The loop that was there before."""
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def report(name: str, model: nn.Module, x_test: torch.Tensor, y_test: torch.Tensor) -> None:
    """Prints the accuracy on the test images, and how many of the weights are exactly zero."""
    accuracy = (model(x_test).argmax(dim=1) == y_test).float().mean().item()
    weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() >= 2])
    zeros = int((weights == 0).sum())
    share = zeros / weights.numel()
    print(f"{name:8}  test accuracy {accuracy:6.2%}   zeros {zeros:6,} of {weights.numel():,} weights ({share:.1%})")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the same net twice."""
    parser = argparse.ArgumentParser(description="A training loop without and with torch_regpen.")
    parser.add_argument("--epochs", type=int, default=40)
    epochs = parser.parse_args(argv).epochs
    batches, x_test, y_test = make_data()

    torch.manual_seed(0)
    model = make_model()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(model, optimizer, batches, epochs)
    report("without", model, x_test, y_test)

    torch.manual_seed(0)  # the same initial weights and the same batches once more
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # ------------------------------------------------------------------------
    penalty = L1(model, lam=5e-4)
    optimizer = RegularizedOptimizer(optimizer, penalty, mode="proximal")
    # ------------------------------------------------------------------------
    fit(model, optimizer, batches, epochs)
    report("with", model, x_test, y_test)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small for more
    main()
