"""WeightLogger beside SummaryWriter.add_histogram, on the same tensors: what one logging step costs.

Medians of interleaved runs, in processor time, which other programs on the machine disturb less. Both write event
files. add_histogram is called as PyTorch's documentation does, once for each parameter; of zeros, norms and dead groups
it knows nothing.

    OMP_NUM_THREADS=1 python tests/benchmarks/logger.py
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from torch_regpen import L1
from torch_regpen.tensorboard import WeightLogger


def resnet18() -> dict[str, Tensor]:
    """11.7M parameters in 62 tensors, with the shapes of ResNet-18's."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
    width = 64
    for stage, out in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            for conv, inputs in enumerate((width, out), start=1):
                shapes |= {f"{name}.conv{conv}.weight": (out, inputs, 3, 3)}
                shapes |= {f"{name}.bn{conv}.weight": (out,), f"{name}.bn{conv}.bias": (out,)}
            if width != out:
                shapes |= {f"{name}.down.0.weight": (out, width, 1, 1)}
                shapes |= {f"{name}.down.1.weight": (out,), f"{name}.down.1.bias": (out,)}
            width = out
    shapes |= {"fc.weight": (1000, 512), "fc.bias": (1000,)}
    return {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}


def dense() -> dict[str, Tensor]:
    """11M parameters in one matrix."""
    return {"weight": 0.05 * torch.randn(2750, 4000)}


def sparse() -> dict[str, Tensor]:
    """The same, nine tenths of it exactly zero, a third of the rows and a third of the columns throughout."""
    w = dense()["weight"]
    w[torch.rand_like(w) < 0.8] = 0
    w[::3] = w[:, ::3] = 0
    return {"weight": w}


def model_of(tensors: dict[str, Tensor]) -> nn.Module:
    """A module that holds them."""
    model = nn.Module()
    for name, w in tensors.items():
        model.register_parameter(name.replace(".", "_"), nn.Parameter(w))
    return model


def main() -> None:
    """Prints a row for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), medians of {runs} interleaved runs\n")
    print(f"{'':10} {'add_histogram':>14} {'WeightLogger':>14} {'of a penalty':>14} {'ratio':>7}")
    for make in (resnet18, dense, sparse):
        model = model_of(make())
        with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
            bare, penalized = WeightLogger(writer, model), WeightLogger(writer, L1(model, 1e-4))

            def stock(model: nn.Module = model, writer: SummaryWriter = writer) -> None:
                for name, w in model.named_parameters():
                    writer.add_histogram(f"stock/{name}", w, 0)

            times: dict[Callable[[], None], list[float]] = {stock: [], bare.step: [], penalized.step: []}
            for index in range(runs + 1):  # the first warms up
                for run, taken in times.items():
                    start = time.process_time()
                    run()
                    if index:
                        taken.append(1000 * (time.process_time() - start))
            old, new, with_penalty = (median(taken) for taken in times.values())
        print(f"{make.__name__:10} {old:11.0f} ms {new:11.0f} ms {with_penalty:11.0f} ms {old / new:6.1f}x")


if __name__ == "__main__":
    main()
