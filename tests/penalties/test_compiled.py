"""A penalty under torch.compile."""

import pytest
import torch
from helpers.kinds import BASIC, OMEGA
from helpers.nets import Regularized, by_definition, detached
from torch import nn
from torch.func import functional_call

from torch_regpen import L1, GroupLasso, RegularizedOptimizer

LAM = 0.3
EACH = pytest.mark.parametrize("kind", BASIC)


# torch.compile


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def test_compiled_with_the_default_backend_in_one_graph():
    torch._dynamo.reset()
    penalty = L1(nn.Linear(3, 2), LAM) + GroupLasso(layer := nn.Linear(3, 2), LAM)
    value = torch.compile(lambda: penalty(), fullgraph=True)()
    torch.testing.assert_close(value, penalty())
    value.backward()
    (expected,) = torch.autograd.grad(LAM * OMEGA["GroupLasso"](layer.weight), layer.weight)
    torch.testing.assert_close(layer.weight.grad, expected)


@EACH
def test_compiled_in_one_graph(kind, compiled):
    module, x = Regularized(kind), torch.randn(5, 3, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    loss = compiled(lambda x: module.plain(x) + module.penalty())
    value = loss(x)
    expected = by_definition(module, parameters, x)
    torch.testing.assert_close(value, expected)
    value.backward()
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    torch.testing.assert_close([p.grad for p in parameters.values()], list(gradients))
    with torch.no_grad():
        torch.testing.assert_close(loss(x), expected.detach())


def test_compiled_it_follows_lambda_the_weights_and_what_is_frozen(compiled):
    module, x = Regularized("L1"), torch.randn(5, 3, dtype=torch.float64)
    loss = compiled(module)
    for change in (
        lambda: None,
        lambda: setattr(module.penalty, "lam", 0.7),
        lambda: module.first.weight.detach().mul_(2),
        lambda: module.second.weight.requires_grad_(False),
        lambda: module.second.weight.requires_grad_(True),
        lambda: setattr(module.penalty, "lam", 0),
    ):
        change()
        torch.testing.assert_close(loss(x), module(x))


def test_compiled_sum_over_the_same_parameters(compiled):
    model = nn.Linear(3, 2)
    penalty = L1(model, LAM) + GroupLasso(model, LAM)
    compiled(penalty)().backward()
    expected = torch.autograd.grad(LAM * (model.weight.abs().sum() + OMEGA["GroupLasso"](model.weight)), model.weight)
    torch.testing.assert_close(model.weight.grad, expected[0])


def test_compiled_torch_func(compiled):
    module, x = Regularized("L1"), torch.randn(5, 3, dtype=torch.float64)
    module.first.weight.requires_grad_(False)
    parameters = detached(module)

    def loss(ps):
        return functional_call(module, ps, (x,))

    expected = by_definition(module, parameters, x, frozen=("first.weight",))
    torch.testing.assert_close(compiled(loss)(parameters), expected)
    torch.testing.assert_close(compiled(torch.func.grad(loss))(parameters), torch.func.grad(loss)(parameters))


def test_the_penalty_in_a_compiled_loss_is_noticed_by_the_optimizer(compiled):
    model = nn.Linear(3, 2)
    penalty = L1(model, LAM)
    for loss in (lambda: model.weight.sum() + penalty(), compiled(lambda: model.weight.sum() + penalty())):
        optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), penalty)
        loss().backward()
        with pytest.warns(UserWarning, match="double"):
            optimizer.step()


def test_a_compiled_model_is_penalized_as_any_other():
    model = nn.Sequential(nn.Linear(3, 2))
    penalty = L1(torch.compile(model), LAM)
    torch.testing.assert_close(penalty(), LAM * model[0].weight.abs().sum())


@pytest.mark.parametrize("as_group", [False, True])
def test_a_compiled_step_takes_a_penalty_on_a_compiled_model(as_group):
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8))
        given = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        penalty = L1([{"params": given}] if as_group else given, LAM)
        regularized = RegularizedOptimizer(optimizer, penalty, "proximal")
        step = torch.compile(regularized.step, backend="eager") if compiled else regularized.step
        for _ in range(3):
            model[0].weight.grad = torch.randn(8, 8)
            step()
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights)
