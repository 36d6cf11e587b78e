"""Which penalty makes zeros behind BatchNorm: a small CNN on scikit-learn's digits, at the same fractions of zeros.

    python tests/benchmarks/batchnorm.py

It takes about 15 minutes on one core. `TargetSparsity` steers the penalty on a cubic ramp over half of the steps; then
the zeros are frozen. SGD with momentum 0.9, 30 epochs, a learning rate that falls from 0.1 to 0 in a half cosine.
Printed are the test accuracies in %, one for each seed, and how many of the 32, 64 and 64 channels are left with the
first seed.
"""

import argparse
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torch_regpen import L0, L1, GroupLasso, Penalty, RegularizedOptimizer
from torch_regpen.groups import Coupled
from torch_regpen.groups.grouping import Grouping
from torch_regpen.schedules import TargetSparsity

EPOCHS, BATCH, RATE, CLIP = 30, 64, 0.1, 0.1
Wrap = Callable[[nn.Module, Tensor, torch.optim.Optimizer], RegularizedOptimizer]


class HoyerSquare(Penalty):
    """`lam * (sum u)^2 / sum u^2` over the magnitudes `u` in a tensor, whatever their scale (Yang, Wen and Li 2020)."""

    separable = False

    def omega(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor:
        u, _ = grouping.polar(x)
        return factor * u.sum() * _inverse_scale(u)

    def omega_grad(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor:
        u, rebuild = grouping.polar(x)
        ratio = _inverse_scale(u)
        return factor * 2 * ratio * (rebuild(torch.ones_like(u)) - ratio * x) / grouping.count(x.shape)

    def has_grad(self) -> bool:
        return True


def _inverse_scale(u: Tensor) -> Tensor:
    return u.sum() / u.square().sum().clamp_min(torch.finfo(u.dtype).tiny)  # 0 for a tensor of zeros


def one(kind: Any, mode: str, model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> RegularizedOptimizer:
    """A penalty on all weights, in one mode."""
    return RegularizedOptimizer(optimizer, kind(model, 1e-4), mode)


def with_hoyer(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> RegularizedOptimizer:
    """L0 makes the zeros, beside Hoyer-square."""
    return RegularizedOptimizer(optimizer, [(HoyerSquare(model, 1e-5), "coupled"), (L0(model, 1e-4), "dual")])


def clipped(wrap: Wrap, model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> RegularizedOptimizer:
    """No element of a gradient is larger than CLIP."""

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_value_(model.parameters(), CLIP)

    optimizer.register_step_pre_hook(clip)
    return wrap(model, x, optimizer)


def filters(kind: Any, mode: str, model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """The filters alone are the groups."""
    return RegularizedOptimizer(optimizer, kind(model, 1e-4, select=nn.Conv2d, groups="output"), mode)


def coupled(kind: Any, scale: bool, model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """A group is a filter with its scale and shift in the norm."""
    return RegularizedOptimizer(optimizer, kind(model, 1e-4, groups=Coupled(model, x, scale=scale)), "dual")


def coupled_with_hoyer(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> RegularizedOptimizer:
    """Group lasso on units makes the zeros, beside Hoyer-square over filters."""
    hoyer = HoyerSquare(model, 1e-3, select=nn.Conv2d, groups="output")
    lasso = GroupLasso(model, 1e-4, groups=Coupled(model, x, scale=False))
    return RegularizedOptimizer(optimizer, [(hoyer, "coupled"), (lasso, "dual")])


def scales(kind: Any, model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> RegularizedOptimizer:
    """The scales of the norms alone."""
    found = [layer.weight for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    return RegularizedOptimizer(optimizer, kind(found, 1e-4, select="all"), "dual")


WEIGHTS: dict[str, Wrap] = {
    "L1, proximal": partial(one, L1, "proximal"),
    "L1, dual": partial(one, L1, "dual"),
    "L1, dual, gradients clipped by value": partial(clipped, partial(one, L1, "dual")),
    "L0, dual": partial(one, L0, "dual"),
    "L0, dual, gradients clipped by value": partial(clipped, partial(one, L0, "dual")),
    "L0, dual, with Hoyer-square in the gradient": with_hoyer,
}
CHANNELS: dict[str, Wrap] = {
    "group lasso on filters, proximal": partial(filters, GroupLasso, "proximal"),
    "group lasso on filters, dual": partial(filters, GroupLasso, "dual"),
    "group lasso on `Coupled`, dual": partial(coupled, GroupLasso, True),
    "group lasso on `Coupled(scale=False)`, dual": partial(coupled, GroupLasso, False),
    "the same, with Hoyer-square over filters in the gradient": coupled_with_hoyer,
    "L1 on the scales of the norms, dual": partial(scales, L1),
    "L0 on the scales of the norms, dual": partial(scales, L0),
}


def network() -> nn.Sequential:
    """Three convolutions with BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def run(wrap: Wrap, target: float, seed: int) -> tuple[float, list[int]]:
    """The test accuracy of a training, and the channels that are left."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    torch.manual_seed(seed)
    train, test = torch.randperm(len(x)).split([900, len(x) - 900])
    model = network()
    steps = EPOCHS * (len(train) // BATCH)
    optimizer = wrap(model, x[:2], torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9))
    schedule = TargetSparsity(optimizer, target, steps=steps // 2, every=max(steps // 120, 1), freeze=True)
    step = 0
    for _ in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(BATCH)[: len(train) // BATCH]:
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
            step += 1
    with torch.no_grad():
        right = model.eval()(x[test]).argmax(1) == y[test]
    return 100 * right.double().mean().item(), channels(model)


def channels(model: nn.Sequential) -> list[int]:
    """How many channels of each convolution have a nonzero filter and a nonzero scale."""
    pairs = [(model[i].weight, model[i + 1].weight) for i, layer in enumerate(model) if isinstance(layer, nn.Conv2d)]
    return [int(((filters.flatten(1) != 0).any(1) & (scale != 0)).sum()) for filters, scale in pairs]


def main() -> None:
    """Runs, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for what, forms, targets in (("weights", WEIGHTS, (0.95, 0.98, 0.99)), ("channels", CHANNELS, (0.7, 0.85))):
        print(f"| zero {what}: | " + " | ".join(f"{100 * target:g}% | channels left" for target in targets) + " |")
        print("|---|" + "---|" * 2 * len(targets), flush=True)
        for name, wrap in forms.items():
            row = []
            for target in targets:
                results = [run(wrap, target, seed) for seed in range(options.seeds)]
                row += [", ".join(f"{accuracy:.1f}" for accuracy, _ in results), ", ".join(map(str, results[0][1]))]
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
