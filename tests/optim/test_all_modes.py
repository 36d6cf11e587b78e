"""What holds in each mode: groups, rates, gradients, lambdas and several penalties."""

import copy

import pytest
import torch
from helpers.kinds import FORMULAS
from helpers.nets import assert_same, network, set_gradients, train
from helpers.optimizers import adam, direct_modes, momentum, sgd

from torch_regpen import L1, L2, GroupLasso, RegularizedOptimizer

# Each penalty beside its formula, as a user would write it in the loss.
kinds = pytest.mark.parametrize("kind", FORMULAS)


# All direct_modes


@direct_modes
def test_each_parameter_takes_the_lr_of_its_own_group(device, mode):
    """One optimizer with two groups moves the weights as two optimizers with a group each do."""
    together, apart = network(device), network(device)
    groups = [{"params": together[0].parameters()}, {"params": together[2].parameters(), "lr": 0.3}]
    one = RegularizedOptimizer(torch.optim.SGD(groups, lr=0.02), L1(together, 0.05), mode)
    two = [
        RegularizedOptimizer(torch.optim.SGD(apart[i].parameters(), lr=lr), L1(apart[i], 0.05), mode)
        for i, lr in ((0, 0.02), (2, 0.3))
    ]
    for i in range(3):
        set_gradients(together, i, 0.1)
        set_gradients(apart, i, 0.1)
        one.step()
        for optimizer in two:
            optimizer.step()
    assert_same(together, apart)


@kinds
@direct_modes
@pytest.mark.parametrize("make", [sgd, momentum, adam])
def test_a_tensor_as_lr_does_what_the_number_does(device, mode, kind, make):
    with_number, with_tensor = network(device), network(device)
    penalty = FORMULAS[kind][0]
    for model, lr in ((with_number, 0.05), (with_tensor, torch.tensor(0.05, device=device))):
        optimizer = RegularizedOptimizer(make(model, lr=lr, foreach=False), penalty(model), mode)
        for i in range(3):
            set_gradients(model, i)
            optimizer.step()
    assert_same(with_tensor, with_number, 1e-6)


@direct_modes
@pytest.mark.parametrize("make", [sgd, momentum, adam])
def test_maximizing_the_negative_loss_is_minimizing_the_loss(device, mode, make):
    down, up = network(device), network(device)
    train(down, RegularizedOptimizer(make(down), L1(down, 0.05), mode))
    train(up, RegularizedOptimizer(make(up, maximize=True), L1(up, 0.05), mode), sign=-1.0)
    assert_same(up, down)


@direct_modes
def test_a_parameter_without_gradient_is_left_alone(device, mode):
    model = network(device)
    optimizer = RegularizedOptimizer(sgd(model), L1(model, 0.1) + L2(model, 0.1), mode)
    before = copy.deepcopy(model)
    set_gradients(model, 0)
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight, before[0].weight)
    assert model[0].weight.grad is None
    assert not torch.equal(model[2].weight, before[2].weight)


@direct_modes
def test_a_step_without_any_gradient_does_nothing(device, mode):
    model = network(device)
    before = copy.deepcopy(model)
    RegularizedOptimizer(adam(model), L1(model, 0.1), mode).step()
    assert_same(model, before)


@direct_modes
def test_a_zero_gradient_shrinks_all_the_same(device, mode):
    model = network(device)
    optimizer = RegularizedOptimizer(sgd(model), L1(model, 0.1), mode)
    before = copy.deepcopy(model)
    set_gradients(model, 0, scale=0.0)
    optimizer.step()
    assert model[0].weight.abs().sum() < 0.99 * before[0].weight.abs().sum()
    assert torch.equal(model[0].bias, before[0].bias)


@direct_modes
def test_lambda_can_change_while_training(device, mode):
    changing = network(device)
    penalty = L1(changing, 0.02)
    optimizer = RegularizedOptimizer(momentum(changing), penalty, mode)
    constant = network(device)
    reference = momentum(constant)
    for lam in (0.02, 0.2, 0.0, 0.05):
        penalty.lam = lam
        train(changing, optimizer, steps=2)
        train(constant, RegularizedOptimizer(reference, L1(constant, lam), mode), steps=2)
    assert_same(changing, constant)


@direct_modes
def test_parameters_can_be_frozen_and_unfrozen_while_training(device, mode):
    model = network(device)
    optimizer = RegularizedOptimizer(sgd(model), L1(model, 0.1), mode)
    train(model, optimizer, steps=1)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    train(model, optimizer, steps=2)
    assert torch.equal(model[0].weight, frozen)
    model[0].weight.grad = torch.zeros_like(frozen)  # even with a gradient left over
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, steps=1)
    assert not torch.equal(model[0].weight, frozen)


@direct_modes
def test_a_list_of_penalties_is_their_sum(device, mode):
    listed, summed, generated = network(device), network(device), network(device)
    train(listed, RegularizedOptimizer(sgd(listed), [L1(listed, 0.01), L2(listed, 0.02)], mode))
    train(summed, RegularizedOptimizer(sgd(summed), L1(summed, 0.01) + L2(summed, 0.02), mode))
    parts = (kind(generated, lam) for kind, lam in ((L1, 0.01), (L2, 0.02)))
    train(generated, RegularizedOptimizer(sgd(generated), parts, mode))
    assert_same(listed, summed)
    assert_same(generated, summed)


@direct_modes
def test_penalties_on_different_parameters_each_take_their_own(device, mode):
    together, apart = network(device), network(device)
    parts = [L1(together, 0.05, select="0.weight"), GroupLasso(together, 0.02, select="2.weight")]
    optimizer = RegularizedOptimizer(sgd(together), parts, mode)
    first = RegularizedOptimizer(sgd(apart[0]), L1(apart[0], 0.05), mode)
    second = RegularizedOptimizer(sgd(apart[2]), GroupLasso(apart[2], 0.02), mode)
    for i in range(3):
        set_gradients(together, i)
        set_gradients(apart, i)
        optimizer.step()
        first.step()
        second.step()
    assert_same(together, apart)


@direct_modes
def test_two_optimizers_share_a_penalty_through_restricted_to(device, mode):
    shared, whole = network(device), network(device)
    penalty = L1(shared, 0.01)
    inner = [torch.optim.SGD(shared[0].parameters(), lr=0.1), torch.optim.SGD(shared[2].parameters(), lr=0.1)]
    two = [RegularizedOptimizer(each, penalty.restricted_to(each), mode) for each in inner]
    all_of_it = L1(whole, 0.01)
    one = RegularizedOptimizer(sgd(whole), all_of_it, mode)
    for lam in (0.01, 0.1):
        penalty.lam = all_of_it.lam = lam
        set_gradients(shared, 0, 0.1)
        set_gradients(whole, 0, 0.1)
        for optimizer in two:
            optimizer.step()
        one.step()
    assert_same(shared, whole)
