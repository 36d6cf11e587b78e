"""Small tensors are processed as one flat tensor: the weights are those of an optimizer for each tensor alone."""

from functools import partial
from itertools import product

import pytest
import torch
from helpers.kinds import KINDS
from torch import nn, optim

from torch_regpen import GroupLasso, RegularizedOptimizer, SparseGroupLasso
from torch_regpen.groups import Blocks, Heads
from torch_regpen.ops.chunks import CPU, CUDA
from torch_regpen.ops.thresholds import zero_factors

SHAPES = [(3, 4), (7,), (2, 3, 2), (1,), (5, 5)]
MATRICES = [(3, 4), (5, 4), (2, 6), (2, 2, 2), (4, 6), (6, 4)]  # rows of 4, and of 6; columns of 2, 3, 4, 5 and 6
OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD, a tensor lr": lambda params: optim.SGD(params, lr=torch.tensor(0.1)),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adagrad": partial(optim.Adagrad, lr=0.1),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.5),
    "Adafactor": partial(optim.Adafactor, lr=0.1),
}
WITHOUT_METRIC = ("SGD", "SGD, a tensor lr", "Adam")  # of the modes that do not ask for the optimizer's step
COMBINATIONS = {
    **KINDS,
    "L1 + L2": lambda params, lam: KINDS["L1"](params, lam) + KINDS["L2"](params, lam),
    "positive": partial(KINDS["L1"], positive=True),
}
GROUPED = {
    "output": GroupLasso,
    "input": partial(GroupLasso, groups="input"),
    "tensor": partial(GroupLasso, groups="tensor"),
    "blocks": partial(GroupLasso, groups=Blocks(2)),
    "unscaled blocks": partial(GroupLasso, groups=Blocks(2), scale=False),
    "heads": partial(GroupLasso, groups=Heads(1)),
    "heads of the last dim": partial(GroupLasso, groups=Heads(2, dim=-1)),
    "sparse": SparseGroupLasso,
    "elastic": partial(KINDS["ElasticNet"], groups="output"),
    "positive": partial(KINDS["L1"], groups="output", positive=True),
    "and L2": lambda params, lam: GroupLasso(params, lam) + KINDS["L2"](params, lam),
    **{f"rows of {kind}": partial(KINDS[kind], groups="output") for kind in ("L0", "MCP", "SCAD", "LogSum", "Capped")},
}
WAYS = [("coupled", "SGD"), ("decoupled", "SGD"), *product(("proximal", "dual"), OPTIMIZERS)]


def trained(weights, gradients, penalty, mode, optimizer):
    """The weights and gaps after some steps. A tensor with the gradient None has none in that step."""
    ws = [nn.Parameter(w.clone()) for w in weights]
    wrapped = RegularizedOptimizer(optimizer(ws), penalty([(str(i), w) for i, w in enumerate(ws)], 0.02), mode)
    for step in gradients:
        for w, grad in zip(ws, step, strict=True):
            w.grad = None if grad is None else grad.clone()
        wrapped.step()
    return [x for w in ws for x in (w.detach(), wrapped.state[w].get("gap", torch.zeros(())))]


def random_gradients(weights):
    """Gradients for some steps. Some elements have none."""
    unseen = [torch.rand(w.shape, device=w.device) < 0.2 for w in weights]
    return [
        [torch.randn_like(w).masked_fill(none, 0) for w, none in zip(weights, unseen, strict=True)] for _ in range(4)
    ]


def check_together_is_as_each_alone(weights, gradients, penalty, mode, optimizer):
    try:
        together = trained(weights, gradients, penalty, mode, optimizer)
    except ValueError:
        pytest.skip("not a step of this kind in this mode and metric")
    alone = []
    for i, w in enumerate(weights):
        alone += trained([w], [[step[i]] for step in gradients], penalty, mode, optimizer)
    exact = weights[0].dtype == torch.float64
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 1e-2, "atol": 1e-2}
    for x, y in zip(together, alone, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
        assert torch.equal(x == 0, y == 0)


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
    gradients = random_gradients(weights)
    check_together_is_as_each_alone(weights, gradients, COMBINATIONS[kind], mode, OPTIMIZERS[optimizer])


@pytest.mark.filterwarnings("ignore:L2 in mode")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "optimizer"), WAYS)
@pytest.mark.parametrize("kind", GROUPED)
def test_groups_together_are_as_each_alone(kind, mode, optimizer, dtype, device):
    if dtype == torch.bfloat16 and kind not in ("output", "sparse", "rows of MCP"):
        pytest.skip("as the others")
    weights = [torch.randn(shape, device=device).to(dtype) for shape in MATRICES]
    weights[1][2:] *= 0.05  # become zero
    gradients = random_gradients(weights)
    gradients[0][0] = gradients[2][2] = None
    check_together_is_as_each_alone(weights, gradients, GROUPED[kind], mode, OPTIMIZERS[optimizer])


def launches(shapes, penalty, mode, optimizer):
    """The number of operations in a step."""
    ws = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    wrapped = RegularizedOptimizer(optimizer(ws), penalty(ws, 0.02), mode)
    for w in ws:
        w.grad = torch.randn_like(w)
    wrapped.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        wrapped.step()
    return sum(event.name.startswith("aten::") and "norm" in event.name for event in profile.events())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "Adagrad"])
@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("kind", ["output", "blocks", "sparse", "heads"])
def test_groups_of_one_size_take_one_norm(kind, mode, optimizer):
    few, many = ([(3, 4)] * n if kind != "blocks" else [(n, 4) for n in range(2, 2 + n)] for n in (2, 5))
    arguments = GROUPED[kind], mode, OPTIMIZERS[optimizer]
    assert 0 < launches(many, *arguments) == launches(few, *arguments)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "ASGD"])
@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("kind", ["output", "blocks", "sparse", "rows of L0"])
def test_the_factors_on_lambda_of_groups_together_are_those_of_each_alone(kind, mode, optimizer):
    make = partial(optim.ASGD, lr=0.1) if optimizer == "ASGD" else OPTIMIZERS[optimizer]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in MATRICES]
    gradients = random_gradients(weights)

    def factors(indices):
        ws = [nn.Parameter(weights[i].clone()) for i in indices]
        wrapped = RegularizedOptimizer(make(ws), GROUPED[kind]([(str(i), w) for i, w in enumerate(ws)], 0.02), mode)
        for step in gradients:
            for i, w in zip(indices, ws, strict=True):
                w.grad = step[i].clone()
            wrapped.step()
        return zero_factors(wrapped.before_prox(lambda terms: lambda x: x))

    try:
        together = factors(range(len(weights)))
    except ValueError:
        pytest.skip("not a step of this kind in this mode and metric")
    alone = torch.cat([factors([i]) for i in range(len(weights))])
    torch.testing.assert_close(together.sort().values, alone.sort().values, rtol=1e-4, atol=1e-6)


def test_a_pack_is_one_chunk_of_groups():
    """Numbers for each row of a pack are not divided into chunks."""
    assert all(sizes.group_pack <= sizes.group_chunk for sizes in (CPU, CUDA))
