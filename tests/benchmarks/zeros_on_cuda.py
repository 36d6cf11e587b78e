"""What exact zeros are worth on a CUDA device, in float16: two of four weights zero, and whole units taken out.

python tests/benchmarks/zeros_on_cuda.py
"""

import warnings
from statistics import median

import torch
import torchvision
from torch import nn
from zeros_on_cpu import NETWORKS, fused, operations, without

from torch_regpen import L0
from torch_regpen.groups import NM

warnings.simplefilter("ignore")


def milliseconds(*functions, rounds=30, calls=10):
    """The median time of a call of each function, run in turns."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, of_function in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            of_function.append(start.elapsed_time(end) / calls)
    return [median(of_function[5:]) for of_function in times]


@torch.no_grad()
def two_of_four():
    """A Linear whose weights `L0(groups=NM(2, 4))` made zero, dense and in torch's semi-structured form."""
    print(
        "A Linear, two of four weights zero\n\n| size | batch | dense, ms | 2:4, ms | times as fast |\n"
        + "|---" * 5
        + "|"
    )
    for size in (4096, 8192):
        layer = nn.Linear(size, size, bias=False, device="cuda", dtype=torch.float16)
        L0(layer, 1.0, groups=NM(2, 4)).prox_(1.0)
        sparse = nn.Linear(size, size, bias=False, device="meta")
        sparse.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
        for batch in (64, 1024, 8192):
            x = torch.randn(batch, size, device="cuda", dtype=torch.float16)
            torch.testing.assert_close(sparse(x), layer(x), rtol=1e-2, atol=1e-2)
            dense_ms, sparse_ms = milliseconds(lambda x=x, layer=layer: layer(x), lambda x=x, sparse=sparse: sparse(x))
            print(f"| {size} | {batch} | {dense_ms:.3f} | {sparse_ms:.3f} | {dense_ms / sparse_ms:.2f} |", flush=True)


@torch.no_grad()
def networks():
    """Networks without half of their units; those with BatchNorm are fused, channels last."""
    print(
        "\nWithout half of the units\n\n| network | times fewer multiply-adds | batch | ms | times as fast |\n"
        + "|---" * 5
        + "|"
    )
    chosen = {"ResNet-18": (torchvision.models.resnet18, torch.randn(1, 3, 224, 224))}
    chosen |= {name: NETWORKS[name] for name in ("ViT-S/16", "BERT, 4 layers")}
    for name, (make, x) in chosen.items():
        pair = [make().cuda().eval(), without(lambda make=make: make().cuda(), x.cuda(), 0.5)]
        counts = [operations(model, x.cuda()) for model in pair]
        if any(isinstance(layer, nn.BatchNorm2d) for layer in pair[0].modules()):
            pair = list(map(fused, pair))
        pair = [model.half() for model in pair]
        for batch in (1, 256):
            xs = x.cuda().expand(batch, *x.shape[1:]).contiguous()
            if xs.ndim == 4:
                xs = xs.half().to(memory_format=torch.channels_last)
            times = milliseconds(*(lambda model=model, xs=xs: model(xs) for model in pair), rounds=12, calls=3)
            print(f"| {name} | {counts[0] / counts[1]:.1f} | {batch} ", end="")
            print(f"| {times[1]:.2f} | {times[0] / times[1]:.1f} |", flush=True)


if __name__ == "__main__":
    two_of_four()
    networks()
