"""A sparse autoencoder: few hidden units are active for each image, by an L1 penalty on their activations.

The code has four times as many units as an image has pixels. Without the penalty most of them take part in every
image. With it, an image is described by a few. L2 on the decoder keeps the code from shrinking at the cost of larger
decoder weights, which would lower the penalty without making anything sparse.

    python examples/sparse_autoencoder.py
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from torch_regpen import L2, ActivityPenalty


class Autoencoder(nn.Module):
    """An image, a code that is not negative, and the image again."""

    def __init__(self, pixels: int = 64, units: int = 256) -> None:
        super().__init__()
        self.code = nn.Sequential(nn.Linear(pixels, units), nn.ReLU())
        self.decoder = nn.Linear(units, pixels)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction."""
        y: Tensor = self.decoder(self.code(x))
        return y


def train(x: Tensor, lam: float, epochs: int) -> Autoencoder:
    """Fits an autoencoder; lambda is that of the activations."""
    torch.manual_seed(0)
    model = Autoencoder()
    activity = ActivityPenalty(model, lam, "l1", select="code.1")  # the output of the ReLU
    decay = L2(model.decoder, 1e-3)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in x[torch.randperm(len(x))].split(64):
            optimizer.zero_grad()
            loss = F.mse_loss(model(batch), batch, reduction="sum") / len(batch)
            (loss + activity() + decay()).backward()
            optimizer.step()
    activity.remove()  # training is over: no hook watches any more
    return model


@torch.no_grad()
def report(name: str, model: Autoencoder, x: Tensor) -> None:
    """Prints the error of the reconstruction, and how many units of the code are active for an image."""
    code = model.code(x)
    explained = 1 - (model(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    active = (code > 0).sum(1).float().mean()
    print(f"{name:8}  variance explained {explained:6.1%}   active units {active:5.1f} of {code.shape[1]} for an image")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains without and with the penalty, and compares them on images that were not trained on."""
    parser = argparse.ArgumentParser(description="A sparse autoencoder of handwritten digits.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lam", type=float, default=0.1)
    args = parser.parse_args(argv)
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    train_images, test_images = train_test_split(images, test_size=0.25, random_state=0)
    report("without", train(train_images, 0.0, args.epochs), test_images)
    report("with", train(train_images, args.lam, args.epochs), test_images)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small for more
    main()
