"""An LSTM that tags sequences, and the group lasso on its units: how many does the task need?

Each token is to be tagged with the last of three key tokens before it, so that the network must remember which. A unit
of an LSTM is its rows of all four gates. The penalty makes whole units zero: `dead_units` finds those whose weights are
zero in both matrices, from the input and from the step before.

    python examples/lstm_tagger.py
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_regpen import GroupLasso, RegularizedOptimizer
from torch_regpen.export import dead_units

KEYS, TOKENS, LENGTH, UNITS = 3, 10, 20, 64


class Tagger(nn.Module):
    """An embedding, an LSTM, and a tag for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 16)
        self.lstm = nn.LSTM(16, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, KEYS)

    def forward(self, tokens: Tensor) -> Tensor:
        """The scores of the tags: (batch, length, keys)."""
        scores: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return scores


def sequences(count: int) -> tuple[Tensor, Tensor]:
    """Random sequences that begin with a key, and for each of their tokens the last key so far."""
    tokens = torch.randint(TOKENS, (count, LENGTH))
    tokens[:, 0] %= KEYS
    positions = torch.where(tokens < KEYS, torch.arange(LENGTH), 0).cummax(1).values
    return tokens, tokens.gather(1, positions)


def train(lam: float, steps: int) -> Tagger:
    """Fits a tagger; lambda is that of the LSTM's units."""
    torch.manual_seed(0)
    model = Tagger()
    penalty = GroupLasso(model.lstm, lam, groups="output")
    optimizer = RegularizedOptimizer(torch.optim.Adam(model.parameters(), lr=5e-3), penalty, mode="proximal")
    for _ in range(steps):
        tokens, tags = sequences(64)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tags.flatten()).backward()
        optimizer.step()
    return model


@torch.no_grad()
def report(name: str, model: Tagger) -> None:
    """Prints the accuracy on new sequences, and the dead units."""
    tokens, tags = sequences(1000)
    accuracy = (model(tokens).argmax(2) == tags).float().mean().item()
    dead = dead_units(model.lstm).get("weight_hh_l0", [])
    print(f"{name:8}  accuracy {accuracy:6.2%}   dead units {len(dead):2} of {UNITS}")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains without and with the penalty."""
    parser = argparse.ArgumentParser(description="Group lasso on the units of an LSTM.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lam", type=float, default=1e-4)
    args = parser.parse_args(argv)
    report("without", train(0.0, args.steps))
    report("with", train(args.lam, args.steps))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small for more
    main()
