"""The decoupled and the proximal mode: what a step does to the weights."""

import copy

import pytest
import torch
from helpers.kinds import FORMULAS
from helpers.nets import assert_same, explicit, network, set_gradients, train, with_zeros
from helpers.optimizers import DIRECT, adam, momentum, optimizers, sgd
from torch import nn

from torch_regpen import L1, GroupLasso, RegularizedOptimizer

# Each penalty beside its formula, as a user would write it in the loss.
kinds = pytest.mark.parametrize("kind", FORMULAS)


# Decoupled


def subgradients(model, formula):
    """The gradient that autograd finds for the formula at each of the two weights."""
    weights = [model[0].weight, model[2].weight]
    return weights, torch.autograd.grad(explicit(model, formula)(), weights)


@optimizers
@kinds
def test_decoupled_subtracts_lr_times_the_subgradient_then_steps(device, kind, make):
    penalty, formula = FORMULAS[kind]
    theirs, ours = (with_zeros(network(device, torch.float64)) for _ in range(2))
    plain, optimizer = make(theirs), RegularizedOptimizer(make(ours), penalty(ours), "decoupled")
    lr = plain.param_groups[0]["lr"]
    for i in range(3):
        set_gradients(theirs, i)
        set_gradients(ours, i)
        weights, grads = subgradients(theirs, formula)
        with torch.no_grad():
            for w, g in zip(weights, grads, strict=True):
                moved = w - lr * g
                w.copy_(torch.where(moved.sign() == -w.sign(), 0, moved))  # no element crosses zero
        plain.step()
        optimizer.step()
    assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.float32, 1e-30), (torch.float16, 1e-4)])
@kinds
def test_decoupled_stops_at_zero_instead_of_crossing_it(device, kind, dtype, scale):
    weights = scale * torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    weights *= torch.logspace(-2, 2, 30).unsqueeze(1) * torch.logspace(-2, 2, 40)
    model = nn.Linear(40, 30, bias=False).to(device, dtype)
    with torch.no_grad():
        model.weight.copy_(weights)
    before = model.weight.detach().clone()
    lr = (
        20.0 if kind == "L2" else 10 * scale
    )  # 1 - lr * 2 * 0.03 is below zero, or the thresholds are about 0.1 * scale
    optimizer = RegularizedOptimizer(sgd(model, lr=lr), FORMULAS[kind][0](model), "decoupled")
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    after = model.weight.detach()
    assert (after.sign() * before.sign() >= 0).all()
    assert (after.abs() <= before.abs()).all()
    assert (after == 0).sum() > (before == 0).sum()


def test_decoupled_keeps_directions_and_stops_whole_groups_at_zero(device):
    model = nn.Linear(4, 3, bias=False).to(device)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -4.0, 0.0, 12.0], [0.3, -0.4, 0.0, 1.2], [0.0] * 4]))
    optimizer = RegularizedOptimizer(sgd(model, lr=2.0), GroupLasso(model, 0.5), "decoupled")
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()  # norms 13, 1.3 and 0, each shrunk by lr * lam * sqrt(4) = 2
    expected = torch.tensor([[3.0, -4.0, 0.0, 12.0], [0.0] * 4, [0.0] * 4]) * (11 / 13)
    torch.testing.assert_close(model.weight.detach().cpu(), expected)
    assert (model.weight[1:] == 0).all()


def test_decoupled_takes_lr_whatever_the_optimizer(device):
    shrunk = []
    for make in (sgd, momentum, adam, torch.optim.RMSprop):
        model = network(device)
        inner = make(model.parameters() if make is torch.optim.RMSprop else model, lr=0.01)
        bare = copy.deepcopy(model)
        plain = make(bare.parameters() if make is torch.optim.RMSprop else bare, lr=0.01)
        set_gradients(model, 0)
        set_gradients(bare, 0)
        RegularizedOptimizer(inner, L1(model, 0.5), "decoupled").step()
        plain.step()
        shrunk.append((bare[0].weight - model[0].weight).detach())
    for difference in shrunk[1:]:
        torch.testing.assert_close(difference, shrunk[0], rtol=1e-4, atol=1e-7)


# Proximal


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("kind", ["L1", "ElasticNet", "L1+L2"])
def test_proximal_step_of_a_weight_solves_its_problem(device, kind, make):
    """`(w - v) / s` must be a subgradient of the penalty at v, with w where the bare optimizer ends."""
    penalty, formula = FORMULAS[kind]
    bare, ours = network(device, torch.float64), network(device, torch.float64)
    plain, inner = make(bare), make(ours)
    set_gradients(bare, 3)
    set_gradients(ours, 3)
    plain.step()
    RegularizedOptimizer(inner, penalty(ours), "proximal").step()
    for w, v in ((bare[0].weight, ours[0].weight), (bare[2].weight, ours[2].weight)):
        # The first step of Adam is lr * g / (|g| + eps): the correction of v makes it exactly g^2.
        s = 0.1 if make is sgd else 0.01 / (v.grad.abs() + 1e-8)
        needed = ((w - v) / s).detach()
        (slope,) = torch.autograd.grad(formula(v), v)
        (at_zero,) = torch.autograd.grad(formula(one := torch.full_like(v, 1e-300).requires_grad_()), one)
        assert torch.where(v == 0, (needed.abs() - at_zero).clamp_min(0), (needed - slope).abs()).max() < 1e-6


def test_proximal_leaves_exact_zeros_and_coupled_does_not(device):
    zeros = {}
    for mode in DIRECT:
        model = network(device)
        train(model, RegularizedOptimizer(sgd(model), L1(model, 0.05), mode), steps=100)
        zeros[mode] = (model[0].weight == 0).float().mean().item()
    assert zeros["proximal"] > 0.5
    assert zeros["coupled"] == 0


def test_proximal_leaves_whole_neurons_at_zero(device):
    model = network(device)
    train(model, RegularizedOptimizer(adam(model, lr=0.02), GroupLasso(model, 0.05), "proximal"), steps=200)
    dead = (model[0].weight == 0).all(dim=1)
    assert dead.any()
    assert torch.equal(dead, (model[0].weight == 0).any(dim=1))
