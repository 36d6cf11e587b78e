"""From exact zeros to a smaller, faster model: masks, fine-tuning, dead units taken out, a sparse file.

Two nets learn scikit-learn's handwritten digits under a sparse group lasso, which leaves them with weights that are
exactly zero and with whole units that have no weights. Then the zeros are handed on:

1. `prune_masks` makes them torch.nn.utils.prune's, and a few epochs without a penalty fit the weights that are left;
2. `dead_units` names the units without weights, and Torch-Pruning takes them out of this layer and of the next;
3. `sparse_state_dict` writes what is left to a file without its zeros.

A dead unit still emits a constant, its bias. Before it is taken out, `fold` adds what the next layer makes of that
constant to the next layer's bias, so that the outputs stay what they were.

    pip install torch-pruning
    python examples/export_pruned.py
"""

import argparse
import io
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_regpen import RegularizedOptimizer, SparseGroupLasso
from torch_regpen.export import dead_units, prune_masks, sparse_state_dict

Layer = nn.Linear | nn.Conv2d
BATCH = 50
BATCHES = (1, 64, 1024)  # of which the latency is measured
PRUNERS = {nn.Linear: tp.prune_linear_out_channels, nn.Conv2d: tp.prune_conv_out_channels}


def make_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of 8 x 8 pixels and their labels: 1000 to train on, 797 to test on."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    return x[train], y[train], x[test], y[test]


def mlp() -> nn.Sequential:
    """A net of full layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def convnet() -> nn.Sequential:
    """A small net of convolutions, without padding: at padded borders no constant could be folded into a bias."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int) -> None:
    """Plain training."""
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def fine_tune(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Training without a penalty, in which the zeros hold: torch.nn.utils.prune multiplies them by its masks."""
    masks = prune_masks(model)
    fit(model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), x, y, epochs)
    for name in masks:
        path, _, key = name.rpartition(".")
        prune.remove(model.get_submodule(path), key)


@torch.no_grad()
def fold(layer: Layer, between: nn.Module, following: Layer, units: list[int], x: Tensor) -> None:
    """Moves the constant that dead units emit into the bias of the layer that follows, and their bias to zero.

    Args:
        layer: it has the dead units.
        between: what lies between the two; it must leave zeros zero, as ReLU, tanh and pooling do, sigmoid does not.
        following: it reads the units.
        units: the dead ones.
        x: an input of `layer`, of one sample.
    """
    silence = torch.zeros_like(layer(x))
    constant = silence.clone()
    constant[:, units] = layer.bias[units].view(-1, *[1] * (silence.ndim - 2))
    if between(silence).any():
        raise ValueError(f"{between} makes something of zeros: units that are taken out would be missed")
    shift = following(between(constant)) - following(between(silence))
    shift = shift.movedim(1, -1).flatten(0, -2)  # rows: samples and positions; columns: the units
    if not torch.allclose(shift, shift[:1].expand_as(shift), atol=1e-6):
        raise ValueError(f"what {following} makes of a constant differs by position, and no bias can: it has padding")
    following.bias += shift[0]
    layer.bias[units] = 0


def shrink(model: nn.Sequential, x: Tensor) -> dict[int, int]:
    """Takes the dead units out of a chain of layers; returns how many, by the index of the layer.

    Args:
        model: layers, one behind the other.
        x: an input, of one sample.
    """
    taken = {}
    for here, there in pairwise(i for i, layer in enumerate(model) if type(layer) in PRUNERS):
        layer: Any = model[here]
        following: Any = model[there]
        # Anew for each layer: without inputs that are gone, further units may be dead. One unit must stay.
        units = dead_units(model).get(f"{here}.weight", [])[: len(layer.weight) - 1]
        if units:
            fold(layer, model[here + 1 : there], following, units, model[:here](x))
            graph = tp.DependencyGraph().build_dependency(model, x)
            graph.get_pruning_group(layer, PRUNERS[type(layer)], idxs=units).prune()
            taken[here] = len(units)
    return taken


def size(state: dict[str, Any]) -> float:
    """The KiB that a state dict takes in a file."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell() / 1024


@torch.no_grad()
def measure(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Prints a row of the table, and returns the outputs of the model."""
    outputs: Tensor = model(x)
    latencies = "".join(f"{latency(model, x[torch.arange(size) % len(x)]):12.3f}" for size in BATCHES)
    parameters, accuracy = sum(p.numel() for p in model.parameters()), (outputs.argmax(dim=1) == y).float().mean()
    operations, _ = tp.utils.count_ops_and_params(model, x[:1])
    files = f"{size(model.state_dict()):8.1f} KiB {size(sparse_state_dict(model)):8.1f} KiB"
    print(f"{name:22} {parameters:10,} {operations:14,.0f} {latencies} {files} {accuracy:9.2%}")
    return outputs


def latency(model: nn.Module, x: Tensor) -> float:
    """The median time of a forward, in milliseconds."""
    times = []
    for _ in range(30):
        start = time.perf_counter()
        model(x)
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, hands the zeros on, and measures before and after."""
    parser = argparse.ArgumentParser(description="Exact zeros, handed on until the model is smaller and faster.")
    parser.add_argument("--epochs", type=int, default=60)
    epochs = parser.parse_args(argv).epochs
    x, y, x_test, y_test = make_data()
    batches = "".join(f"{f'batch {size}':>12}" for size in BATCHES)
    print(f"{'':53}  milliseconds of a forward")
    print(
        f"{'':22} {'parameters':>10} {'multiply-adds':>14} {batches} {'file':>12} {'sparse file':>12} {'accuracy':>9}"
    )
    for make in (mlp, convnet):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        # Not the last layer: its units are the ten digits.
        penalty = SparseGroupLasso(model, 1e-3, select=[f"{i}.weight" for i in range(len(model) - 1)])
        fit(model, RegularizedOptimizer(optimizer, penalty, mode="proximal"), x, y, epochs)
        fine_tune(model, x, y, max(epochs // 6, 1))
        before = measure(make.__name__, model, x_test, y_test)
        taken = shrink(model, x[:1])
        after = measure("  without dead units", model, x_test, y_test)
        units = ", ".join(f"{n} of layer {i}" for i, n in taken.items())
        print(f"  taken out: {units or 'none'}; largest difference of an output: {(after - before).abs().max():.1e}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small for more
    main()
