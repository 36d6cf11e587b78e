"""What a reading of TargetSparsity costs, beside a plain fused AdamW step on the same tensors.

    python tests/benchmarks/target_sparsity.py
    python tests/benchmarks/target_sparsity.py --models R --device cuda

One thread; jobs interleaved, medians over the rounds, in processor time. The models are those of speed.py: shapes
alone.
"""

import argparse
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from speed import MODELS, seconds
from torch import nn

from torch_regpen import L0, L1, GroupLasso, LogSum, RegularizedOptimizer
from torch_regpen.schedules import TargetSparsity

KINDS = {"L1": L1, "L0": L0, "LogSum": LogSum, "rows": GroupLasso}


def parameters(model: str, device: str) -> list[nn.Parameter]:
    """The tensors of a model, with gradients."""
    torch.manual_seed(0)
    ps = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in MODELS[model]()]
    for p in ps:
        p.grad = 0.01 * torch.randn_like(p)
    return ps


def reading(
    ps: list[nn.Parameter], kind: Any, mode: str, inner: torch.optim.Optimizer, target: float
) -> Callable[[], object]:
    """A job that takes one reading."""
    some = ps if kind is not GroupLasso else [p for p in ps if p.ndim > 1]
    optimizer = RegularizedOptimizer(inner, kind(some, 1e-6), mode)
    schedule = TargetSparsity(optimizer, target, steps=1000)
    optimizer.step()
    schedule.step()

    def read() -> None:
        schedule.next_reading = 0
        schedule._read()

    return read


def main() -> None:
    """Runs, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="RVS")
    parser.add_argument("--target", type=float, default=0.5, help="more zeros need a larger sample")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| model | kind | mode | optimizer | reading, in plain AdamW steps |\n|---|---|---|---|---|")
    for model in options.models:
        ps = parameters(model, options.device)
        plain = torch.optim.AdamW(ps, lr=1e-5, fused=True)
        for kind in KINDS if any(p.ndim > 1 for p in ps) else ("L1", "L0", "LogSum"):
            for mode in ("proximal", "dual"):
                for name, inner in {
                    "SGD": torch.optim.SGD(ps, lr=1e-5),
                    "AdamW": torch.optim.AdamW(ps, lr=1e-5, fused=True),
                }.items():
                    read = reading(ps, KINDS[kind], mode, inner, options.target)
                    jobs: list[Callable[[], object]] = [plain.step, read]
                    times = [[seconds(job, options.device) for job in jobs] for _ in range(options.rounds)][1:]
                    ratio = median(b / a for a, b in times)
                    print(f"| {model} | {kind} | {mode} | {name} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
