"""Frozen zeros in copies and checkpoints, and in groups that come and go."""

import copy
import io
import pickle

import pytest
import torch
from helpers.nets import backward, made_sparse, network, train_on_batches
from helpers.optimizers import MODES, wrapped_quietly
from torch import optim

from torch_regpen import L1, RegularizedOptimizer

# Copies, checkpoints, and groups that come and go.


def zeroed_by_training(make=lambda p: optim.SGD(p, lr=0.1), mode="proximal"):
    """A network whose second layer training has made zero everywhere."""
    model = network()
    penalty = L1([{"params": model[0], "lam": 0.05}, {"params": model[2], "lam": 100.0}], 0.05)
    optimizer = RegularizedOptimizer(make(model.parameters()), penalty, mode)
    train_on_batches(model, optimizer, 3)
    assert not model[2].weight.any()
    return model, penalty, optimizer


def by_state_dict(model, penalty, optimizer):
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = network()
    penalty = L1([{"params": resumed[0], "lam": 0.05}, {"params": resumed[2], "lam": 100.0}], 0.05)
    inner = type(optimizer.optimizer)(resumed.parameters(), lr=0.1)
    again = RegularizedOptimizer(inner, penalty, optimizer.mode)
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    return resumed, penalty, again


WAYS = {
    "deepcopy": lambda *x: copy.deepcopy(x),
    "pickle": lambda *x: pickle.loads(pickle.dumps(x)),
    "state dict": by_state_dict,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.1), lambda p: optim.Adam(p, lr=0.1)])
def test_a_layer_that_training_made_zero_is_frozen_in_copies_too(way, mode, make):
    model, _, optimizer = WAYS[way](*zeroed_by_training(make, mode))
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 3)
    assert not model[2].weight.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", [False, True])
def test_copies_taken_after_freezing_hold_the_same_zeros(way, before):
    """Also before the first step after it, when a fresh optimizer has no state yet."""
    model, penalty, optimizer = zeroed_by_training(lambda p: optim.Adam(p, lr=0.1))
    if before:
        optimizer = RegularizedOptimizer(optim.Adam(model.parameters(), lr=0.1), penalty, "proximal")
        with torch.no_grad():
            model[2].weight[0, 0] = 1.0
    optimizer.freeze_zeros()
    if not before:
        train_on_batches(model, optimizer, 1)
    zero = model[2].weight == 0
    model, _, optimizer = WAYS[way](model, penalty, optimizer)
    assert optimizer.zeros_are_frozen
    train_on_batches(model, optimizer, 3)
    assert torch.equal(model[2].weight == 0, zero)


def test_zeros_frozen_before_the_first_step_leave_the_state_empty():
    model, bare = made_sparse(network()), made_sparse(network())
    optimizer = wrapped_quietly(model, lambda p: optim.Adam(p, lr=0.01))
    optimizer.freeze_zeros()
    assert not optimizer.state
    inner = optim.Adam(bare.parameters(), lr=0.01)
    inner.load_state_dict(optimizer.state_dict())
    train_on_batches(bare, inner, 2)
    train_on_batches(model, optimizer, 2)


def test_frozen_again_it_holds_the_zeros_that_have_come_since():
    model = made_sparse(network())
    optimizer = wrapped_quietly(model, lambda p: optim.SGD(p, lr=0.1))
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 2)
    with torch.no_grad():
        model[0].weight[0] = 0
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 3)
    assert not model[0].weight[0].any()


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.1), lambda p: optim.Adam(p, lr=0.1)])
def test_a_layer_that_was_not_trained_at_that_moment_keeps_its_zeros(make):
    model = made_sparse(network())
    optimizer = wrapped_quietly(model, make)
    zero = model[0].weight == 0
    model[0].weight.requires_grad_(False)
    train_on_batches(model, optimizer, 2)
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 2)
    model[0].weight.requires_grad_(True)
    train_on_batches(model, optimizer, 3)
    assert torch.equal(model[0].weight == 0, zero)


@pytest.mark.parametrize("mode", MODES)
def test_groups_that_come_later_are_free_and_not_penalized_meanwhile(mode):
    model, bare = made_sparse(network()), made_sparse(network())
    for m in (model, bare):
        with torch.no_grad():
            m[2].weight[0, :4] = 0
        m[2].requires_grad_(False)
    optimizer = RegularizedOptimizer(optim.SGD(model[0].parameters(), lr=0.1), L1(model, 0.5), mode)
    optimizer.freeze_zeros()
    optimizer.add_param_group({"params": model[2].parameters()})
    free = optim.SGD(bare[2].parameters(), lr=0.1)
    for m in (model, bare):
        m[2].requires_grad_(True)
    backward(model, 1)
    backward(bare, 1)
    optimizer.step()
    free.step()
    assert torch.equal(model[2].weight, bare[2].weight)


@pytest.mark.parametrize("change", ["removed", "order", "group removed"])
def test_parameters_may_leave_or_change_places(change):
    model = made_sparse(network())
    inner = optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1, momentum=0.9)
    penalty = L1(model, 0.05)
    optimizer = RegularizedOptimizer(inner, penalty, "proximal")
    train_on_batches(model, optimizer, 1)
    made_sparse(model)
    optimizer.freeze_zeros()
    zero = model[2].weight == 0
    if change == "removed":
        model[0].weight.requires_grad_(False)
        del inner.param_groups[0]["params"][0]
    elif change == "order":
        inner.param_groups[1]["params"].reverse()
    else:
        model[0].requires_grad_(False)
        del inner.param_groups[0]
    train_on_batches(model, optimizer, 4)
    assert torch.equal(model[2].weight == 0, zero)
    assert (model[2].bias != 0).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_model_that_moves_to_another_device_takes_its_masks_along():
    model = made_sparse(network())
    optimizer = wrapped_quietly(model, lambda p: optim.SGD(p, lr=0.1))
    train_on_batches(model, optimizer, 1)
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 1)
    zero = (model[0].weight == 0).sum().item()
    model.cuda()
    train_on_batches(model, optimizer, 2)
    assert (model[0].weight == 0).sum().item() == zero


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_around_a_center_what_is_at_its_center_stays_there(mode):
    model = network()
    start = copy.deepcopy(model.state_dict())
    penalty = L1(model, 0.01, center="initial")
    optimizer = RegularizedOptimizer(optim.Adam(model.parameters(), lr=0.02), penalty, mode)
    train_on_batches(model, optimizer, 40)
    at_center = model[0].weight == start["0.weight"]
    assert at_center.any()
    assert not at_center.all()
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 20)
    assert torch.equal(model[0].weight == start["0.weight"], at_center)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_whoever_steers_lambda_hears_that_zeros_are_frozen(mode):
    model = network()
    optimizer = wrapped_quietly(model, lambda p: optim.SGD(p, lr=0.1), mode)
    train_on_batches(model, optimizer, 5)
    assert not optimizer.zeros_are_frozen
    optimizer.freeze_zeros()
    assert optimizer.zeros_are_frozen
    backward(model)
    assert all(multiplier is None for _, multiplier in optimizer.before_prox())
    optimizer.unfreeze_zeros()
    assert not optimizer.zeros_are_frozen
    assert all(multiplier is not None for _, multiplier in optimizer.before_prox())


def test_frozen_zeros_of_the_dual_mode_hold_when_the_penalty_is_on_again():
    model = network()
    optimizer = wrapped_quietly(model, lambda p: optim.SGD(p, lr=0.1), "dual", lam=0.1)
    train_on_batches(model, optimizer, 30)
    zero = (model[0].weight == 0).sum()
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 5, start=30)
    optimizer.unfreeze_zeros()
    train_on_batches(model, optimizer, 1, start=35)
    assert (model[0].weight == 0).sum() > 0.8 * zero > 0
