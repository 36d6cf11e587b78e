"""What exact zeros are worth on a CPU: single weights in compressed sparse rows, and whole channels taken out.

OMP_NUM_THREADS=1 python tests/benchmarks/zeros_on_cpu.py
"""

import time
import warnings
from statistics import median

import torch
import torch_pruning as tp
import torchvision
from torch.fx.experimental.optimization import fuse

from torch_regpen.export import shrink
from torch_regpen.penalties.coupling import coupled_units

torch.set_num_threads(1)
warnings.simplefilter("ignore")


def milliseconds(*functions, rounds=15):
    """The median processor time of each function, run in turns."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, of_function in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            of_function.append(1000 * (time.process_time() - start))
    return [median(of_function[2:]) for of_function in times]


@torch.no_grad()
def linear(size=2048):
    """`x @ w.T` with `w` dense, and in compressed sparse rows."""
    print(
        f"A Linear({size}, {size}) in float32\n\n| zeros | batch | dense, ms | CSR, ms | times as fast |\n"
        + "|---" * 5
        + "|"
    )
    for zeros in (0.9, 0.95, 0.98, 0.99):
        w = torch.randn(size, size)
        w[torch.rand(size, size) < zeros] = 0
        csr = w.to_sparse_csr()
        for batch in (1, 64):
            x = torch.randn(batch, size)
            torch.testing.assert_close((csr @ x.T).T, x @ w.T, rtol=1e-3, atol=1e-3)
            dense, sparse = milliseconds(lambda x=x, w=w: x @ w.T, lambda x=x, csr=csr: (csr @ x.T).T)
            print(f"| {zeros:.0%} | {batch} | {dense:.2f} | {sparse:.2f} | {dense / sparse:.1f} |")


def resnet(gone):
    """ResNet-18 without a part of its channels, chosen at random."""
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(1, 3, 64, 64)
    for units in coupled_units(model, x)[0]:
        chosen = torch.randperm(units.count)[: int(gone * units.count)]
        for part in units.members:
            getattr(part.module, part.key).index_fill_(part.dim, part.index[chosen].flatten(), 0)
    return shrink(model, x)


@torch.no_grad()
def channels():
    """Networks as they are, and with norms fused into convolutions and channels last."""
    print("\nResNet-18 at 224 x 224\n")
    print("| channels gone | multiply-adds | times fewer | batch | as it is, ms | times as fast ", end="")
    print("| fused, channels last, ms | times as fast |\n" + "|---" * 8 + "|")
    parts = (0.0, 0.5, 0.7)
    plain = [resnet(gone) for gone in parts]
    fused = [fuse(model).to(memory_format=torch.channels_last) for model in plain]
    operations = [tp.utils.count_ops_and_params(model, torch.randn(1, 3, 224, 224))[0] for model in plain]
    for batch in (1, 8):
        x = torch.randn(batch, 3, 224, 224)
        last = x.to(memory_format=torch.channels_last)
        jobs = [*((model, x) for model in plain), *((model, last) for model in fused)]
        times = milliseconds(*(lambda model=model, x=x: model(x) for model, x in jobs), rounds=9)
        for i, gone in enumerate(parts):
            print(f"| {gone:.0%} | {operations[i] / 1e6:.0f}M | {operations[0] / operations[i]:.1f} | {batch} ", end="")
            ms, ms_fused = times[i], times[i + 3]
            print(f"| {ms:.0f} | {times[0] / ms:.1f} | {ms_fused:.0f} | {times[3] / ms_fused:.1f} |")


linear()
channels()
