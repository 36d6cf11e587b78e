"""What exact zeros are worth on a CPU: single weights in compressed sparse rows, and whole channels taken out.

OMP_NUM_THREADS=1 python tests/benchmarks/zeros_on_cpu.py
"""

import io
import time
import warnings
from statistics import median

import onnxruntime
import timm
import torch
import torchvision
import transformers
from torch.fx.experimental.optimization import fuse
from torch.utils.flop_counter import FlopCounterMode

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


def without(make, x, gone):
    """A network without a part of its units, chosen at random."""
    torch.manual_seed(0)
    model = make().eval()
    for units in coupled_units(model, x)[0]:
        chosen = torch.randperm(units.count)[: int(gone * units.count)]
        for part in units.members:
            getattr(part.module, part.key).index_fill_(part.dim, part.index[chosen].flatten(), 0)
    return shrink(model, x)


def operations(model, x):
    """Floating-point operations of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def fused(model):
    """Norms fused into convolutions, and channels last."""
    return fuse(model).to(memory_format=torch.channels_last)


@torch.no_grad()
def resnet():
    """ResNet-18 as it is, and with norms fused into convolutions and channels last."""
    print("\nResNet-18 at 224 x 224\n")
    print("| channels gone | multiply-adds | times fewer | batch | as it is, ms | times as fast ", end="")
    print("| fused, channels last, ms | times as fast |\n" + "|---" * 8 + "|")
    parts, image = (0.0, 0.5, 0.7), torch.randn(1, 3, 224, 224)
    plain = [without(torchvision.models.resnet18, torch.randn(1, 3, 64, 64), gone) for gone in parts]
    deployed = list(map(fused, plain))
    counts = [operations(model, image) / 2 for model in plain]
    for batch in (1, 8):
        x = image.expand(batch, -1, -1, -1).contiguous()
        last = x.to(memory_format=torch.channels_last)
        jobs = [*((model, x) for model in plain), *((model, last) for model in deployed)]
        times = milliseconds(*(lambda model=model, x=x: model(x) for model, x in jobs), rounds=9)
        for i, gone in enumerate(parts):
            print(f"| {gone:.0%} | {counts[i] / 1e6:.0f}M | {counts[0] / counts[i]:.1f} | {batch} ", end="")
            ms, ms_fused = times[i], times[i + 3]
            print(f"| {ms:.0f} | {times[0] / ms:.1f} | {ms_fused:.0f} | {times[3] / ms_fused:.1f} |")


def bert():
    """The encoder of a small BERT."""
    return transformers.BertModel(
        transformers.BertConfig(
            hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048, return_dict=False
        )
    )


NETWORKS = {
    "VGG-11 with BatchNorm": (torchvision.models.vgg11_bn, torch.randn(1, 3, 224, 224)),
    "MobileNetV2": (torchvision.models.mobilenet_v2, torch.randn(1, 3, 224, 224)),
    "ConvNeXt-T": (torchvision.models.convnext_tiny, torch.randn(1, 3, 224, 224)),
    "ViT-S/16": (lambda: timm.create_model("vit_small_patch16_224"), torch.randn(1, 3, 224, 224)),
    "BERT, 4 layers": (bert, torch.randint(1000, (1, 128))),
}


def on_onnxruntime(model, x):
    """A function that runs a network on ONNX Runtime, with one thread."""
    file = io.BytesIO()
    batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(model, (x.expand(2, *x.shape[1:]),), dynamo=True, dynamic_shapes=batch, verbose=False).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    return lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})


@torch.no_grad()
def networks():
    """More networks of usual sizes, without half of their units; those with BatchNorm are fused, channels last."""
    print("\nWithout half of the units\n\n| network | multiply-adds | times fewer | batch ", end="")
    print("| torch, ms | times as fast | ONNX Runtime, ms | times as fast |\n" + "|---" * 8 + "|")
    for name, (make, x) in NETWORKS.items():
        pair = [without(make, x, gone) for gone in (0.0, 0.5)]
        counts = [operations(model, x) for model in pair]
        sessions = [on_onnxruntime(model, x) for model in pair]
        if any(isinstance(layer, torch.nn.BatchNorm2d) for layer in pair[0].modules()):
            pair = list(map(fused, pair))
        for batch in (1, 8):
            xs = last = x.expand(batch, *x.shape[1:]).contiguous()
            if xs.ndim == 4:
                last = xs.to(memory_format=torch.channels_last)
            jobs = [*((model, last) for model in pair), *((session, xs) for session in sessions)]
            times = milliseconds(*(lambda model=model, x=x: model(x) for model, x in jobs), rounds=9)
            print(f"| {name} | {counts[1] / 2e6:.0f}M | {counts[0] / counts[1]:.1f} | {batch} ", end="")
            print(f"| {times[1]:.0f} | {times[0] / times[1]:.1f} ", end="")
            print(f"| {times[3]:.0f} | {times[2] / times[3]:.1f} |", flush=True)


if __name__ == "__main__":
    linear()
    resnet()
    networks()
