"""A convolutional network with BatchNorm, at 90% zeros: the accuracy before and after.

The penalty is on the weights of the convolutions and the last layer, and not on BatchNorm's scales and biases. In the
dual mode L0 keeps the largest latent weights. TargetSparsity raises lambda until 90% of the weights are exactly zero,
and then freezes the zeros. The rest of the training fits the others.

    python examples/batchnorm_cnn.py
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from torch_regpen import L0, RegularizedOptimizer
from torch_regpen.schedules import TargetSparsity

Data = tuple[Tensor, Tensor]


def make_data() -> tuple[Data, Data]:
    """Scikit-learn's handwritten digits, 8 x 8 pixels: to train on, and to test on."""
    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.5, random_state=0, stratify=y)
    return (x_train, y_train), (x_test, y_test)


def make_model() -> nn.Module:
    """Two convolutions with BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, epochs: int, schedule: TargetSparsity | None
) -> None:
    """A usual loop; the schedule is one line in it."""
    x, y = data
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The fraction of images that are classified correctly."""
    model.eval()
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a dense network, then goes on to 90% zeros."""
    parser = argparse.ArgumentParser(description="A CNN with BatchNorm at 90% zeros.")
    parser.add_argument("--epochs", type=int, default=30)
    epochs = parser.parse_args(argv).epochs
    train, test = make_data()
    torch.manual_seed(0)
    model = make_model()
    fit(model, torch.optim.Adam(model.parameters(), lr=2e-3), train, epochs // 3, None)
    print(f"dense     test accuracy {accuracy(model, test):6.2%}")

    penalty = L0(model, lam=1e-4)  # its size does not matter: the schedule sets it
    optimizer = RegularizedOptimizer(torch.optim.Adam(model.parameters(), lr=2e-3), penalty, mode="dual")
    steps = epochs * -(-len(train[0]) // 64)
    schedule = TargetSparsity(optimizer, 0.9, steps=steps // 2, freeze=True)
    fit(model, optimizer, train, epochs, schedule)
    print(f"at {penalty.sparsity():.1%}  test accuracy {accuracy(model, test):6.2%}")
    print(penalty.summary())


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small for more
    main()
