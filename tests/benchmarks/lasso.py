"""The diabetes Lasso at lambda_max/10: the proximal mode, and torchao's PruneOptimizer, against the known optimum.

pip install torchao && python tests/benchmarks/lasso.py
"""

import torch
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import scale
from torch import Tensor, nn

from torch_regpen import L1, RegularizedOptimizer

OPTIMUM, LAM, STEPS = 0.304755537557, 0.05864501344746885, 3000
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.2),
    "SGD, momentum 0.9": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.003),
}


def ours(model: nn.Module, make) -> torch.optim.Optimizer:
    return RegularizedOptimizer(make(model.parameters()), L1(model, LAM), "proximal")


def torchaos(model: nn.Module, make) -> torch.optim.Optimizer:
    from torchao.prototype.pat.optim import PruneOptimizer

    kinds = {"group_type": "ElemGrouper", "prox_type": "ProxLasso", "reg_lambda": LAM}
    group = {"params": list(model.parameters()), **kinds}
    return PruneOptimizer(make([group]))


def solve(wrap, make, x: Tensor, y: Tensor) -> Tensor:
    model = nn.Linear(10, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = wrap(model, make)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (0.5 * (model(x)[:, 0] - y).square().mean()).backward()
        optimizer.step()
    return model.weight.detach()[0]


def main() -> None:
    features, target = load_diabetes(return_X_y=True)
    x, y = torch.tensor(scale(features)), torch.tensor(scale(target))
    print("| optimizer | wrapper | objective - optimum | not zero (5 in the optimum) |\n|---|---|---|---|")
    for name, make in OPTIMIZERS.items():
        for wrapper, wrap in (("torch_regpen", ours), ("torchao", torchaos)):
            try:
                w = solve(wrap, make, x, y)
            except ImportError as error:
                print(f"| {name} | {wrapper} | {error} | |")
                continue
            gap = 0.5 * (x @ w - y).square().mean() + LAM * w.abs().sum() - OPTIMUM
            print(f"| {name} | {wrapper} | {gap:.1e} | {int(w.count_nonzero())} |")


if __name__ == "__main__":
    main()
