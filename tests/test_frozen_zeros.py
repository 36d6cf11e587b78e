"""freeze_zeros: zeros that hold, survivors that are fitted without the penalty, and the way back."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn, optim
from training import backward

from torch_regpen import L1, GroupLasso, RegularizedOptimizer
from torch_regpen.optim.dual_averaging import GAP

MODES = ["coupled", "decoupled", "proximal", "dual"]


def with_decay(make, lr, **options):
    return lambda params: make(params, lr=lr, weight_decay=0.1, **options)


OPTIMIZERS = {
    "SGD": with_decay(optim.SGD, 0.1),
    "SGD momentum": with_decay(optim.SGD, 0.1, momentum=0.9, nesterov=True),
    "SGD fused": with_decay(optim.SGD, 0.1, momentum=0.9, fused=True),
    "Adam": with_decay(optim.Adam, 0.02, amsgrad=True),
    "Adam fused": with_decay(optim.Adam, 0.02, fused=True),
    "AdamW": with_decay(optim.AdamW, 0.02),
    "NAdam": with_decay(optim.NAdam, 0.02),
    "RAdam": with_decay(optim.RAdam, 0.02),
    "Adamax": with_decay(optim.Adamax, 0.02),
    "Adagrad": with_decay(optim.Adagrad, 0.1),
    "RMSprop": with_decay(optim.RMSprop, 0.02, momentum=0.9, centered=True),
    "Adadelta": with_decay(optim.Adadelta, 1.0),
    "Adafactor": with_decay(optim.Adafactor, 0.02),
    "ASGD": with_decay(optim.ASGD, 0.1),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.5, max_iter=4),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.step(lambda step=step: backward(model, step))


def zeros(model):
    return [p.detach() == 0 for p in model.parameters()]


def wrapped(model, make, mode="proximal", lam=0.05):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weight_decay, and of optimizers without a step
        return RegularizedOptimizer(make(model.parameters()), L1(model, lam), mode)


def made_sparse(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p[p.abs() < p.abs().median()] = 0
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_hold_and_the_state_is_zero_there(name):
    model = network()
    optimizer = wrapped(model, OPTIMIZERS[name], lam=0.003)
    train(model, optimizer, 20)
    made_sparse(model)
    before = zeros(model)
    optimizer.freeze_zeros()
    train(model, optimizer, 30, start=20)
    for p, mask in zip(model.parameters(), before, strict=True):
        if p.ndim < 2:
            continue
        assert torch.equal(p == 0, mask)
        assert 0 < mask.sum() < mask.numel()
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and key not in ("step_size", "ax", "exp_inf"):
                assert (value[mask] == 0).all(), key


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["SGD momentum", "Adam"])
def test_the_survivors_train_as_a_masked_network_without_a_penalty(name, mode):
    model, masked = made_sparse(network()), made_sparse(network())
    make = {"SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9), "Adam": lambda p: optim.Adam(p, lr=0.01)}[
        name
    ]
    optimizer, bare = wrapped(model, make, mode, lam=0.5), make(masked.parameters())
    optimizer.freeze_zeros()
    masks = [(p != 0).float() if p.ndim > 1 else torch.ones_like(p) for p in masked.parameters()]
    for step in range(10):
        backward(model, step)
        optimizer.step()
        backward(masked, step)
        for p, mask in zip(masked.parameters(), masks, strict=True):
            p.grad *= mask
        bare.step()
    for p, q in zip(model.parameters(), masked.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_coupled_closures_return_the_plain_loss(mode):
    model = made_sparse(network())
    optimizer = wrapped(model, lambda p: optim.SGD(p, lr=0.1), mode, lam=1.0)
    optimizer.freeze_zeros()
    plain = backward(model, 0).item()
    assert optimizer.step(lambda: backward(model, 0)).item() == pytest.approx(plain)


@pytest.mark.parametrize("mode", MODES)
def test_unfreezing_takes_it_back(mode):
    model, never = network(), network()
    optimizers = [wrapped(m, lambda p: optim.SGD(p, lr=0.1), mode, lam=0.1) for m in (model, never)]
    for m, optimizer in zip((model, never), optimizers, strict=True):
        train(m, optimizer, 3)
    optimizers[0].freeze_zeros()
    optimizers[0].unfreeze_zeros()
    for m, optimizer in zip((model, never), optimizers, strict=True):
        train(m, optimizer, 3, start=3)
    for p, q in zip(model.parameters(), never.parameters(), strict=True):
        assert torch.equal(p, q)


def test_in_the_dual_mode_the_visible_weights_go_on():
    model = network()
    optimizer = wrapped(model, lambda p: optim.SGD(p, lr=0.1), "dual", lam=0.1)
    train(model, optimizer, 10)
    visible = copy.deepcopy(model)
    optimizer.freeze_zeros()
    gap = optimizer.state[model[0].weight][GAP].clone()
    masks = [p == 0 for p in visible.parameters()]
    backward(model, 50)
    optimizer.step()
    backward(visible, 50)
    with torch.no_grad():
        for p, q, mask in zip(model.parameters(), visible.parameters(), masks, strict=True):
            torch.testing.assert_close(p, (q - 0.1 * q.grad).masked_fill(mask, 0))
    assert torch.equal(optimizer.state[model[0].weight][GAP], gap)  # for when the penalty is on again


def test_whole_neurons_stay_away():
    model = network()
    optimizer = RegularizedOptimizer(optim.Adam(model.parameters(), lr=0.02), GroupLasso(model, 0.03), "proximal")
    train(model, optimizer, 150)
    gone = (model[0].weight == 0).all(dim=1)
    assert gone.any()
    optimizer.freeze_zeros()
    train(model, optimizer, 20)
    assert torch.equal((model[0].weight == 0).all(dim=1), gone)


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(2, 5))
        self.b = nn.Parameter(torch.zeros(3, 2))

    def forward(self, x):
        return x @ self.a.T @ self.b.T


def test_a_matrix_that_is_zero_before_training_is_not_frozen_for_ever():
    model = LoRA()
    optimizer = RegularizedOptimizer(optim.SGD(model.parameters(), lr=0.1), L1(model, 1e-4), "proximal")
    optimizer.freeze_zeros()
    train(model, optimizer, 5)
    assert (model.b != 0).all()


def test_one_that_training_made_zero_is():
    model = LoRA()
    optimizer = RegularizedOptimizer(optim.SGD(model.parameters(), lr=0.1), L1(model, 100.0), "proximal")
    train(model, optimizer, 3)
    assert (model.b == 0).all()
    optimizer.freeze_zeros()
    train(model, optimizer, 3)
    assert (model.b == 0).all()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_right_after_a_sparse_checkpoint_a_fresh_optimizer_freezes(name):
    saved = made_sparse(network()).state_dict()
    model = network()
    model.load_state_dict(saved)
    optimizer = wrapped(model, OPTIMIZERS[name])
    before = zeros(model)
    optimizer.freeze_zeros()
    train(model, optimizer, 5)
    assert all(map(torch.equal, zeros(model), before))
    assert before[0].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda p: optim.Adam(p, lr=0.01)])
def test_that_they_are_frozen_travels_in_the_state_dict(make, mode):
    model = network()
    optimizer = wrapped(model, make, mode, lam=0.1)
    train(model, optimizer, 10)
    made_sparse(model)
    optimizer.freeze_zeros()
    train(model, optimizer, 4, start=10)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, 4, start=14)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, bare = network(), network()
    again = wrapped(resumed, make, mode, lam=0.1)
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    train(resumed, again, 4, start=14)
    for p, q in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    inner = make(bare.parameters())
    inner.load_state_dict(saved["optimizer"])
    train(bare, inner, 2)


def test_copies_hold_them_too():
    model = made_sparse(network())
    optimizer = wrapped(model, OPTIMIZERS["Adam"])
    optimizer.freeze_zeros()
    twin, other = copy.deepcopy((model, optimizer))
    before = zeros(model)
    train(twin, other, 5)
    assert all(map(torch.equal, zeros(twin), before))


def test_lambda_zero_freezes_too():
    model = made_sparse(network())
    optimizer = wrapped(model, OPTIMIZERS["SGD"], lam=0.0)
    before = zeros(model)
    optimizer.freeze_zeros()
    train(model, optimizer, 5)
    assert all(map(torch.equal, zeros(model), before))


def test_biases_and_a_group_that_comes_later_are_free():
    model = made_sparse(network())
    with torch.no_grad():
        model[0].bias.zero_()
    inner = optim.SGD([model[0].weight, model[0].bias], lr=0.1)
    penalty = L1(model[0], 0.01)
    optimizer = RegularizedOptimizer(inner, penalty, "proximal")
    optimizer.freeze_zeros()
    optimizer.add_param_group({"params": model[2].parameters()})
    train(model, optimizer, 3)
    assert (model[0].weight == 0).any()
    assert (model[0].bias != 0).all()
    assert (model[2].weight != 0).all()


def test_an_exponential_average_has_no_zeros_until_they_are_frozen_and_it_starts_again():
    """What README says to do with averaged models."""
    model = network()
    optimizer = wrapped(model, lambda p: optim.SGD(p, lr=0.1), lam=0.05)
    average = optim.swa_utils.AveragedModel(model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(30):
        train(model, optimizer, 1, start=step)
        average.update_parameters(model)
    assert (model[0].weight == 0).any()
    assert not torch.equal(average.module[0].weight == 0, model[0].weight == 0)
    optimizer.freeze_zeros()
    average = optim.swa_utils.AveragedModel(model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(30, 40):
        train(model, optimizer, 1, start=step)
        average.update_parameters(model)
    assert torch.equal(average.module[0].weight == 0, model[0].weight == 0)


# Copies, checkpoints, and groups that come and go.


def zeroed_by_training(make=lambda p: optim.SGD(p, lr=0.1), mode="proximal"):
    """A network whose second layer training has made zero everywhere."""
    model = network()
    penalty = L1([{"params": model[0], "lam": 0.05}, {"params": model[2], "lam": 100.0}], 0.05)
    optimizer = RegularizedOptimizer(make(model.parameters()), penalty, mode)
    train(model, optimizer, 3)
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
    train(model, optimizer, 3)
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
        train(model, optimizer, 1)
    zero = model[2].weight == 0
    model, _, optimizer = WAYS[way](model, penalty, optimizer)
    assert optimizer.zeros_are_frozen
    train(model, optimizer, 3)
    assert torch.equal(model[2].weight == 0, zero)


def test_the_optimizer_finds_its_state_empty_though_zeros_were_frozen_before_its_first_step():
    model, bare = made_sparse(network()), made_sparse(network())
    optimizer = wrapped(model, lambda p: optim.Adam(p, lr=0.01))
    optimizer.freeze_zeros()
    assert not optimizer.state
    inner = optim.Adam(bare.parameters(), lr=0.01)
    inner.load_state_dict(optimizer.state_dict())
    train(bare, inner, 2)
    train(model, optimizer, 2)


def test_frozen_again_it_holds_the_zeros_that_have_come_since():
    model = made_sparse(network())
    optimizer = wrapped(model, lambda p: optim.SGD(p, lr=0.1))
    optimizer.freeze_zeros()
    train(model, optimizer, 2)
    with torch.no_grad():
        model[0].weight[0] = 0
    optimizer.freeze_zeros()
    train(model, optimizer, 3)
    assert not model[0].weight[0].any()


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.1), lambda p: optim.Adam(p, lr=0.1)])
def test_a_layer_that_was_not_trained_at_that_moment_keeps_its_zeros(make):
    model = made_sparse(network())
    optimizer = wrapped(model, make)
    zero = model[0].weight == 0
    model[0].weight.requires_grad_(False)
    train(model, optimizer, 2)
    optimizer.freeze_zeros()
    train(model, optimizer, 2)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, 3)
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
    train(model, optimizer, 1)
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
    train(model, optimizer, 4)
    assert torch.equal(model[2].weight == 0, zero)
    assert (model[2].bias != 0).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_model_that_moves_to_another_device_takes_its_masks_along():
    model = made_sparse(network())
    optimizer = wrapped(model, lambda p: optim.SGD(p, lr=0.1))
    train(model, optimizer, 1)
    optimizer.freeze_zeros()
    train(model, optimizer, 1)
    zero = (model[0].weight == 0).sum().item()
    model.cuda()
    train(model, optimizer, 2)
    assert (model[0].weight == 0).sum().item() == zero


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_around_a_center_what_is_at_its_center_stays_there(mode):
    model = network()
    start = copy.deepcopy(model.state_dict())
    penalty = L1(model, 0.01, center="initial")
    optimizer = RegularizedOptimizer(optim.Adam(model.parameters(), lr=0.02), penalty, mode)
    train(model, optimizer, 40)
    at_center = model[0].weight == start["0.weight"]
    assert at_center.any()
    assert not at_center.all()
    optimizer.freeze_zeros()
    train(model, optimizer, 20)
    assert torch.equal(model[0].weight == start["0.weight"], at_center)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_whoever_steers_lambda_hears_that_zeros_are_frozen(mode):
    model = network()
    optimizer = wrapped(model, lambda p: optim.SGD(p, lr=0.1), mode)
    train(model, optimizer, 5)
    assert not optimizer.zeros_are_frozen
    optimizer.freeze_zeros()
    assert optimizer.zeros_are_frozen
    backward(model)
    assert all(multiplier is None for _, multiplier in optimizer.before_prox())
    optimizer.unfreeze_zeros()
    assert not optimizer.zeros_are_frozen
    assert all(multiplier is not None for _, multiplier in optimizer.before_prox())


def test_zeros_of_the_dual_mode_are_zeros_still_when_the_penalty_is_on_again():
    model = network()
    optimizer = wrapped(model, lambda p: optim.SGD(p, lr=0.1), "dual", lam=0.1)
    train(model, optimizer, 30)
    zero = (model[0].weight == 0).sum()
    optimizer.freeze_zeros()
    train(model, optimizer, 5, start=30)
    optimizer.unfreeze_zeros()
    train(model, optimizer, 1, start=35)
    assert (model[0].weight == 0).sum() > 0.8 * zero > 0
