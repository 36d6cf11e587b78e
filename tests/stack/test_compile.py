"""torch.compile with its default backend: the penalty in a compiled loss, and the compiled step of the optimizer."""

import pytest
import torch
from helpers.nets import data, network
from helpers.optimizers import adamw, momentum
from torch import nn

from torch_regpen import L1, MCP, GroupLasso, LHalf, RegularizedOptimizer

LAM = 0.05


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def recompiling_fails_from(step, i):
    """The first step compiles, the second once more for a lambda that can change; from then on nothing does."""
    torch.compiler.set_stance("default" if i < step else "fail_on_recompile")


def test_a_compiled_loss_is_the_eager_one_and_follows_lambda_in_one_graph():
    model = network()
    penalty = L1(model, LAM) + GroupLasso(model, LAM, groups="input") + MCP(model, LAM, groups="tensor")
    penalty = penalty + LHalf(model[0], LAM)
    x, y = data(model[0].weight)

    def loss():
        return (model(x) - y).square().mean() + penalty()

    def value_and_grads(function):
        model.zero_grad()
        value = function()
        value.backward()
        return value.detach(), [p.grad for p in model.parameters()]

    with torch.no_grad():
        model[0].weight[0] = 0  # where a gradient of the compiler's own would be NaN
    compiled = torch.compile(loss, fullgraph=True)
    for i in range(5):
        for part in penalty.parts:
            part.lam = LAM * (i + 1)
        recompiling_fails_from(2, i)
        torch.testing.assert_close(value_and_grads(compiled), value_and_grads(loss))
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    torch.testing.assert_close(value_and_grads(compiled), value_and_grads(loss), equal_nan=True)


def fused(model, lr):
    return adamw(model, lr, fused=True)


def stepped(make, mode, backend):
    """The weights after each of some steps; on the way lambda changes, and a weight becomes NaN."""
    torch.manual_seed(0)
    model = nn.Linear(6, 8)
    penalty = L1(model, LAM)
    optimizer = RegularizedOptimizer(make(model, lr=0.1), penalty, mode)
    step = optimizer.step if backend is None else torch.compile(optimizer.step, backend=backend)
    weights = []
    for i in range(5):
        penalty.lam = LAM * (i + 1)
        for p in model.parameters():
            p.grad = torch.sin(5 * p.detach() + i)
        if i == 3:
            with torch.no_grad():
                model.weight[0, 0] = torch.nan
        if backend is not None:
            recompiling_fails_from(2, i)
        step()
        weights.append(model.weight.detach().clone())
    assert weights[-1].isnan().sum() == 1
    return weights


@pytest.mark.parametrize(
    ("make", "mode", "backend"),
    [
        *((make, mode, "aot_eager") for make in (momentum, adamw) for mode in ("coupled", "decoupled")),
        *((momentum, mode, "inductor") for mode in ("proximal", "dual")),
        *((make, "proximal", "inductor") for make in (adamw, fused)),
        (adamw, "dual", "aot_eager"),
    ],
)
def test_a_compiled_step_is_the_eager_one(make, mode, backend):
    """AdamW's own compiled step differs from its eager one by some 1e-6.

    Inductor's kernels take seconds each: what the others need is in these, or in that of the loss.
    """
    expected = stepped(make, mode, None)
    torch.compiler.set_stance("default")
    torch.testing.assert_close(stepped(make, mode, backend), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_layer_that_compiled_steps_made_zero_stays_zero_when_frozen():
    layer = nn.Linear(4, 4, bias=False)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer = RegularizedOptimizer(sgd, L1(layer, 50.0), "proximal")
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in (compiled, compiled, optimizer.step):
        layer.weight.grad = torch.ones(4, 4)
        if step == optimizer.step:
            optimizer.freeze_zeros()
        step()
        assert (layer.weight == 0).all()
