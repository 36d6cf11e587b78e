"""Small tensors are processed as one flat tensor: the weights are those of an optimizer for each tensor alone."""

from functools import partial

import pytest
import torch
from helpers.kinds import KINDS
from torch import nn, optim

from torch_regpen import RegularizedOptimizer

SHAPES = [(3, 4), (7,), (2, 3, 2), (1,), (5, 5)]
OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD, a tensor lr": lambda params: optim.SGD(params, lr=torch.tensor(0.1)),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adagrad": partial(optim.Adagrad, lr=0.1),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.5),
}
WITHOUT_METRIC = ("SGD", "SGD, a tensor lr", "Adam")  # of the modes that do not ask for the optimizer's step
COMBINATIONS = {
    **KINDS,
    "L1 + L2": lambda params, lam: KINDS["L1"](params, lam) + KINDS["L2"](params, lam),
    "positive": partial(KINDS["L1"], positive=True),
}


def trained(weights, gradients, penalty, mode, optimizer):
    """The weights and gaps after some steps."""
    ws = [nn.Parameter(w.clone()) for w in weights]
    wrapped = RegularizedOptimizer(optimizer(ws), penalty([(str(i), w) for i, w in enumerate(ws)], 0.02), mode)
    for step in gradients:
        for w, grad in zip(ws, step, strict=True):
            w.grad = grad.clone()
        wrapped.step()
    return [x for w in ws for x in (w.detach(), wrapped.state[w].get("gap", torch.zeros(())))]


@pytest.mark.filterwarnings("ignore:L2 in mode", "ignore:.*fewer than 2 dimensions")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("mode", "optimizer"),
    [
        *((mode, name) for mode in ("proximal", "dual") for name in OPTIMIZERS),
        *((mode, name) for mode in ("coupled", "decoupled") for name in WITHOUT_METRIC),
    ],
)
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_together_is_as_each_alone(kind, mode, optimizer, dtype, device):
    weights = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]
    unseen = [torch.rand(shape, device=device) < 0.2 for shape in SHAPES]  # elements without a gradient
    gradients = [
        [
            torch.randn(w.shape, device=device).masked_fill(none, 0).to(dtype)
            for w, none in zip(weights, unseen, strict=True)
        ]
        for _ in range(4)
    ]
    penalty = COMBINATIONS[kind]
    try:
        together = trained(weights, gradients, penalty, mode, OPTIMIZERS[optimizer])
    except ValueError:
        pytest.skip("not a step of this kind in this mode and metric")
    alone = []
    for i, w in enumerate(weights):
        alone += trained([w], [[step[i]] for step in gradients], penalty, mode, OPTIMIZERS[optimizer])
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    for x, y in zip(together, alone, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
        assert torch.equal(x == 0, y == 0)
