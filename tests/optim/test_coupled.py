"""The coupled mode: the path of the penalty in the loss."""

import pytest
import torch
from helpers.kinds import FORMULAS, l1
from helpers.nets import assert_same, closure_on, explicit, network, set_gradients, train, with_zeros
from helpers.optimizers import adam, momentum, optimizers, sgd

from torch_regpen import L1, RegularizedOptimizer

# Each penalty beside its formula, as a user would write it in the loss.
kinds = pytest.mark.parametrize("kind", FORMULAS)


# Coupled


@optimizers
@kinds
def test_coupled_takes_the_path_of_the_penalty_in_the_loss(device, kind, make):
    penalty, formula = FORMULAS[kind]
    theirs, ours = (with_zeros(network(device, torch.float64)) for _ in range(2))
    train(theirs, make(theirs), steps=8, extra=explicit(theirs, formula))
    train(ours, RegularizedOptimizer(make(ours), penalty(ours)), steps=8)
    assert_same(ours, theirs, 1e-12)


@kinds
def test_coupled_takes_the_path_of_the_penalty_called_in_the_loss(device, kind):
    make, _ = FORMULAS[kind]
    theirs, ours = (with_zeros(network(device, torch.float64)) for _ in range(2))
    penalty = make(theirs)
    terms = penalty if isinstance(penalty, list) else [penalty]
    train(theirs, momentum(theirs), steps=8, extra=lambda: sum(term() for term in terms))
    train(ours, RegularizedOptimizer(momentum(ours), make(ours)), steps=8)
    assert_same(ours, theirs, 1e-12)


def test_coupled_gives_each_group_its_own_lambda(device):
    theirs, ours = network(device, torch.float64), network(device, torch.float64)
    train(theirs, sgd(theirs), extra=lambda: 0.1 * l1(theirs[0].weight) + 0.02 * l1(theirs[2].weight))
    penalty = L1([{"params": ours[0], "lam": 0.1}, {"params": ours[2]}], 0.02)
    train(ours, RegularizedOptimizer(sgd(ours), penalty))
    assert_same(ours, theirs, 1e-12)


@kinds
def test_after_a_coupled_step_grad_holds_the_part_of_the_penalty(device, kind):
    penalty, formula = FORMULAS[kind]
    theirs, ours = network(device, torch.float64), network(device, torch.float64)
    closure_on(theirs, sgd(theirs), extra=explicit(theirs, formula))()
    optimizer = RegularizedOptimizer(sgd(ours), penalty(ours))
    closure_on(ours, optimizer)()
    optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["decoupled", "proximal"])
def test_after_any_other_step_grad_is_the_plain_one(device, mode):
    model = network(device)
    optimizer = RegularizedOptimizer(adam(model), L1(model, 0.1), mode)
    set_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
