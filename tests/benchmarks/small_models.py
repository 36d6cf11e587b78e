"""What the step of a small model costs, where all is Python and calls: an MLP 20-64-10, its two weights penalized.

One thread; the jobs in turns, medians over the rounds, in processor time.

    python tests/benchmarks/small_models.py
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import nn

from torch_regpen import L1, L2, GroupLasso, Penalty, RegularizedOptimizer

CALLS = 20  # of a job in a round
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=1e-5, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0, fused=True),
}
KINDS: dict[str, tuple[type[Penalty], tuple[str, ...]]] = {
    "L1": (L1, ("coupled", "decoupled", "proximal", "dual")),
    "L2": (L2, ("coupled", "decoupled")),
    "group lasso": (GroupLasso, ("proximal", "dual")),
}


def mlp() -> nn.Module:
    """The model, with gradients."""
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    return model


def steps() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """The row and the column of each step, which is ready to be called."""
    for column, make in OPTIMIZERS.items():
        yield "plain", column, make(mlp().parameters()).step
        for kind, (penalty, modes) in KINDS.items():
            for mode in modes:
                model = mlp()
                yield (
                    f"{kind}, {mode}",
                    column,
                    RegularizedOptimizer(make(model.parameters()), penalty(model, 1e-6), mode).step,
                )


def seconds(job: Callable[[], object]) -> float:
    """What a call takes."""
    begin = time.process_time()
    for _ in range(CALLS):
        job()
    return (time.process_time() - begin) / CALLS


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    jobs = {(row, column): job for row, column, job in steps()}
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for round in range(-1, rounds):
        for key, job in jobs.items():
            if round < 0:
                seconds(job)
            else:
                taken[key].append(seconds(job))
    print("| us, plain steps | " + " | ".join(OPTIMIZERS) + " |\n|---|" + "---|" * len(OPTIMIZERS))
    for row in dict.fromkeys(row for row, _ in jobs):
        cells = []
        for column in OPTIMIZERS:
            own, plain = taken[row, column], taken["plain", column]
            ratio = median(a / b for a, b in zip(own, plain, strict=True))
            cells.append(f"{1e6 * median(own):.0f}, {ratio:.2f}")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
