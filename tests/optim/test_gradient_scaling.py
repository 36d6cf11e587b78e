"""A scaled loss: the scale never reaches the penalty, and a skipped step changes nothing."""

import copy

import pytest
import torch
from helpers.nets import assert_same, closure_on, data, network, set_gradients, train
from helpers.optimizers import modes, wrapped_adam, wrapped_sgd
from torch import nn

from torch_regpen import L1, RegularizedOptimizer

# Mixed precision: the loss is scaled, the penalty never

SCALED = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "SGD-fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "Adam-fused": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
}


scaled = pytest.mark.parametrize("make", SCALED.values(), ids=SCALED.keys())


def train_scaled(model, optimizer, scale, steps=4, clip=None, inf_at=()):
    device = torch.device(model[0].weight.device)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    x, y = data(model[0].weight)
    for i in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() * (float("inf") if i in inf_at else 1.0)
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = copy.deepcopy(model)
        scaler.step(optimizer)
        scaler.update()
        if i in inf_at:
            assert_same(model, before)
    return scaler


@modes
@scaled
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_scale_of_the_loss_never_reaches_the_penalty(device, mode, make, clip):
    plain, one, large = network(device), network(device), network(device)
    optimizers = [RegularizedOptimizer(make(m), L1(m, 0.05), mode) for m in (plain, one, large)]
    train_scaled(one, optimizers[1], 1.0, clip=clip)
    train_scaled(large, optimizers[2], 65536.0, clip=clip)
    assert_same(large, one)
    if clip is None:
        train(plain, optimizers[0], steps=4)
        assert_same(large, plain)


def test_unscale_then_clip_clips_the_loss_and_not_the_penalty(device):
    """Without a loss, a clipped step is lr * lam on each weight, whatever the clip."""
    model, expected = network(device), network(device)
    train_scaled(model, wrapped_sgd(model), 65536.0, clip=0.05)
    optimizer = wrapped_sgd(expected)
    closure = closure_on(expected, optimizer)
    for _ in range(4):
        closure()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
        optimizer.step()
    assert_same(model, expected)
    before = copy.deepcopy(model[0].weight)
    optimizer = wrapped_sgd(model)
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before - 0.1 * 0.05 * before.sign())


@modes
@scaled
def test_a_step_skipped_for_inf_changes_nothing(device, mode, make):
    skipped, never = network(device), network(device)
    train_scaled(skipped, RegularizedOptimizer(make(skipped), L1(skipped, 0.05), mode), 1024.0, steps=5, inf_at=(2,))
    train_scaled(never, RegularizedOptimizer(make(never), L1(never, 0.05), mode), 1024.0, steps=4)
    assert_same(skipped, never)


@modes
@scaled
def test_a_first_step_that_is_skipped_leaves_no_nan_behind(device, mode, make):
    skipped, never = network(device), network(device)
    optimizer = RegularizedOptimizer(make(skipped), L1(skipped, 0.05), mode)
    scaler = train_scaled(skipped, optimizer, 1024.0, steps=4, inf_at=(0, 1))
    assert scaler.get_scale() == 256.0
    train_scaled(never, RegularizedOptimizer(make(never), L1(never, 0.05), mode), 1024.0, steps=2)
    assert_same(skipped, never)
    assert all(p.isfinite().all() for p in skipped.parameters())


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_a_fused_optimizer_that_skips_its_first_step_leaves_no_nan(device, mode):
    model = network(device)
    optimizer = wrapped_adam(model, mode, fused=True)
    optimizer.optimizer.found_inf = torch.ones((), device=device)  # as a scaler tells it
    before = copy.deepcopy(model)
    set_gradients(model, 0)
    optimizer.step()
    assert_same(model, before)
    del optimizer.optimizer.found_inf
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
