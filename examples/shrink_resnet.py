"""A residual network with whole channels of exact zeros, shrunk: smaller, faster, the same outputs.

A small ResNet learns scikit-learn's handwritten digits. `groups.Coupled` makes one group of each channel: its filters,
its scale and shift in the norms, and on a residual stream those of all layers that write to it. `TargetSparsity` makes
50% and 70% of these groups exactly zero under a group lasso with dual averaging, and `export.shrink` takes them out.
`scale=False` compares channels by their norms, not by their root mean squares: the weights of wide layers are smaller
from the start, and whole layers would go first. Each layer keeps a multiple of 16 channels, for which the kernels of
ONNX Runtime are made; it runs the networks whose speed is measured.

Beside them is what is usually done: train, remove the channels of smallest magnitude with Torch-Pruning, fine-tune.
All take the same number of epochs, and each pruned network has about the multiply-adds of the shrunk network above it.

    pip install "torch_regpen[examples]" onnxruntime onnxscript
    python examples/shrink_resnet.py --plot examples/shrink_resnet.png
"""

import argparse
import copy
import io
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import onnxruntime
import torch
import torch.nn.functional as F
import torch_pruning as tp
from sklearn.datasets import load_digits
from torch import Tensor, nn

from torch_regpen import GroupLasso, RegularizedOptimizer, TargetSparsity
from torch_regpen.export import shrink
from torch_regpen.groups import Coupled

BATCH = 50
OURS, PRUNED = "group lasso, shrunk", "magnitude, fine-tuned"
ROUNDS = 5  # of measuring the latencies of all networks in turns


class Block(nn.Module):
    """Two convolutions, and a shortcut past them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Shortcut and convolutions, added."""
        out = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        sum_of_both: Tensor = out + self.shortcut(x)
        return sum_of_both.relu()


class ResNet(nn.Module):
    """A stem, three blocks of 1, 2 and 4 times `width` channels, and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = width, 2 * width, 4 * width
        self.blocks = nn.Sequential(*(Block(a, b, 1 + (a < b)) for a, b in zip((width, *widths), widths, strict=False)))
        self.out = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of the ten digits."""
        scores: Tensor = self.out(self.blocks(self.stem(x)).mean((2, 3)))
        return scores


class Data(NamedTuple):
    """Images of 8 x 8 pixels and their labels: 1000 to train on, 797 to test on."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


class Row(NamedTuple):
    """A row of the table."""

    name: str
    accuracy: float
    parameters: int
    operations: float
    latencies: tuple[float, float]


def make_data() -> Data:
    """Scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    return Data(x[train], y[train], x[test], y[test])


def fit(
    model: nn.Module, data: Data, epochs: int, penalize: Callable[[Any, int], tuple[Any, Any]] | None = None
) -> None:
    """SGD with momentum and a one-cycle learning rate.

    Args:
        model: the network.
        data: the images.
        epochs: how many times it sees them.
        penalize: makes a regularized optimizer and a schedule of an optimizer, given the number of steps.
    """
    steps = epochs * -(-len(data.x) // BATCH)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, cycle_momentum=False)
    schedule = None
    if penalize is not None:
        optimizer, schedule = penalize(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
            rate.step()
            if schedule is not None:
                schedule.step()
    model.eval()


def zeroed(target: float, width: int, data: Data, epochs: int) -> nn.Module:
    """A network trained with a penalty until `target` of its channels are zero; from then on the zeros are frozen."""
    model = ResNet(width)

    def penalize(optimizer: Any, steps: int) -> tuple[Any, Any]:
        penalty = GroupLasso(model, 1e-4, groups=Coupled(model, data.x[:1], scale=False))
        regularized = RegularizedOptimizer(optimizer, penalty, "dual")
        return regularized, TargetSparsity(regularized, target, steps=steps * 2 // 3, freeze=True)

    fit(model, data, epochs, penalize)
    return model


def pruned(dense: nn.Module, operations: float, data: Data, epochs: int, round_to: int) -> nn.Module:
    """A trained network pruned by magnitude to a number of multiply-adds, and fine-tuned."""

    def at(ratio: float) -> nn.Module:
        model: Any = copy.deepcopy(dense)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        options = {"global_pruning": True, "pruning_ratio": ratio, "round_to": round_to, "ignored_layers": [model.out]}
        tp.pruner.BasePruner(model, data.x[:1], importance, **options).step()
        return model

    low, high = 0.0, 0.95
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if multiply_adds(at(middle), data) > operations else (low, middle)
    model = at(high)
    fit(model, data, epochs)
    return model


def multiply_adds(model: nn.Module, data: Data) -> float:
    """Of one image."""
    return float(tp.utils.count_ops_and_params(model, data.x[:1])[0])


@torch.no_grad()
def measure(models: dict[str, nn.Module], data: Data) -> list[Row]:
    """Accuracy, size and speed of each network."""
    sessions = [session(model, data) for model in models.values()]
    rounds = [[(seconds(s, data.x[:1]), seconds(s, data.x[:64])) for s in sessions] for _ in range(ROUNDS)]
    rows = []
    for (name, model), times in zip(models.items(), zip(*rounds, strict=True), strict=True):
        accuracy = (model(data.x_test).argmax(1) == data.y_test).float().mean().item()
        one, many = (1000 * min(of_batch) for of_batch in zip(*times, strict=True))
        parameters = sum(p.numel() for p in model.parameters())
        rows.append(Row(name, accuracy, parameters, multiply_adds(model, data), (one, many)))
    return rows


def session(model: nn.Module, data: Data) -> onnxruntime.InferenceSession:
    """The network on ONNX Runtime, with one thread."""
    file = io.BytesIO()
    program = torch.onnx.export(
        model, (data.x[:2],), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
    )
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file.getvalue(), options)


def seconds(model: onnxruntime.InferenceSession, x: Tensor) -> float:
    """The median time of a forward pass on an idle core: processor time."""
    inputs = {model.get_inputs()[0].name: x.numpy()}
    times = []
    for _ in range(30):
        start = time.process_time()
        model.run(None, inputs)
        times.append(time.process_time() - start)
    return median(times[5:])


def report(rows: Sequence[Row]) -> None:
    """Prints the table, with how many times smaller and faster than the first row each is."""
    print(f"{'':26} {'accuracy':>9} {'parameters':>11} {'multiply-adds':>17} {'batch 1, ms':>16} {'batch 64, ms':>16}")
    first = rows[0]
    for row in rows:
        operations = f"{row.operations / 1e6:.2f}M {first.operations / row.operations:6.1f}x"
        times = [f"{a:.2f} {b / a:6.1f}x" for a, b in zip(row.latencies, first.latencies, strict=True)]
        print(f"{row.name:26} {row.accuracy:9.2%} {row.parameters:11,} {operations:>17} {times[0]:>16} {times[1]:>16}")


def plot(rows: Sequence[Row], file: str) -> None:
    """Draws accuracy against latency."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for index, (ax, batch) in enumerate(zip(axes, (1, 64), strict=True)):
        for marker, kind in zip("*os", ("dense", OURS, PRUNED), strict=True):
            some = [row for row in rows if row.name.startswith(kind)]
            x, y = [row.latencies[index] for row in some], [100 * row.accuracy for row in some]
            ax.plot(x, y, f"{marker}-", label=kind)
        ax.set(xlabel=f"milliseconds of a forward pass, batch {batch}", xscale="log")
        ax.set_ylim(min(100 * row.accuracy for row in rows) - 2, 100)
        ax.grid(alpha=0.3, which="both")
    axes[0].set(ylabel="test accuracy, %")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains all networks, shrinks them, and compares."""
    parser = argparse.ArgumentParser(description="Whole channels of zeros, shrunk, beside magnitude pruning.")
    parser.add_argument("--epochs", type=int, default=16, help="of each network, fine-tuning included")
    parser.add_argument("--width", type=int, default=48, help="channels of the first block")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.7], help="fractions of zero channels")
    parser.add_argument("--round-to", type=int, default=16, help="of how many channels each layer keeps a multiple")
    parser.add_argument("--plot", metavar="FILE", help="the file of a picture")
    args = parser.parse_args(argv)
    data = make_data()
    torch.manual_seed(0)
    dense = ResNet(args.width)
    fit(dense, data, args.epochs)
    torch.manual_seed(0)
    half = ResNet(args.width)  # magnitude pruning begins here, and fine-tunes with the other half of the epochs
    fit(half, data, args.epochs // 2)
    models: dict[str, nn.Module] = {"dense": dense}
    for target in args.targets:
        torch.manual_seed(0)
        model = zeroed(target, args.width, data, args.epochs)
        smaller = shrink(model, data.x[:2], round_to=args.round_to)
        with torch.no_grad():
            error = (smaller(data.x_test) - model(data.x_test)).abs().max()
        print(f"{target:.0%} of the channels are zero; without them, no output differs by more than {error:.1e}")
        models[f"{OURS} {target:.0%}"] = smaller
        epochs = args.epochs - args.epochs // 2
        models[f"{PRUNED} {target:.0%}"] = pruned(half, multiply_adds(smaller, data), data, epochs, args.round_to)
    rows = measure(models, data)
    print()
    report(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
