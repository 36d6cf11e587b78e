"""Low precision in the model, full precision in the penalty. What GradScaler skips is in test_gradient_scaling.py."""

import copy

import pytest
import torch
from helpers.nets import assert_same, data, network
from torch import nn
from torch.utils._pytree import tree_leaves

from torch_regpen import L1, GroupLasso, RegularizedOptimizer

LAM = 0.05
SCALE = 65536.0

precisions = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def penalty_on(model):
    return L1(model, LAM) + GroupLasso(model, LAM)


def expected_grad(model):
    """The gradient of the penalty, by autograd and in float64."""
    double = network().double()
    double.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    penalty_on(double)().backward()
    return {name: p.grad for name, p in double.named_parameters() if p.grad is not None}


def backward(model, dtype, penalty=None, scaler=None):
    """Gradients under autocast, unscaled; the penalty is in the loss, inside of autocast, if there is one."""
    x, y = data(torch.empty(0))
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = (model(x) - y).square().mean()
        if penalty is not None:
            loss = loss + penalty()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if scaler is None else scaler
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@precisions
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_in_the_loss_its_gradient_is_exact_in_any_precision_and_scale(dtype, scale):
    model = network()
    without = backward(model, dtype, scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    with_penalty = backward(model, dtype, penalty_on(model), torch.amp.GradScaler("cpu", init_scale=scale))
    for name, expected in expected_grad(model).items():
        torch.testing.assert_close((with_penalty[name] - without[name]).double(), expected, rtol=1e-5, atol=1e-6)


@precisions
@pytest.mark.parametrize("fused", [False, True])
def test_in_the_optimizer_it_is_that_of_a_loop_that_adds_it_by_hand(dtype, fused):
    """Under autocast with a scaler, before unscaling is done: an optimizer that is fused would do that itself."""
    ours, theirs = network(), network()
    optimizer = RegularizedOptimizer(
        torch.optim.Adam(ours.parameters(), lr=0.01, fused=fused), [L1(ours, LAM), GroupLasso(ours, LAM)]
    )
    by_hand = torch.optim.Adam(theirs.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    x, y = data(ours[0].weight)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = (ours(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        added = expected_grad(theirs)
        grads = backward(theirs, dtype, scaler=torch.amp.GradScaler("cpu", init_scale=SCALE))
        for name, p in theirs.named_parameters():
            p.grad = grads[name] + added[name].float() if name in added else grads[name]
        by_hand.step()
    assert_same(ours, theirs, 1e-6)


@precisions
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal", "dual"])
def test_the_scale_makes_no_difference_and_a_skipped_step_none_at_all(dtype, mode, fused):
    """With `unscale_` before the clip, as it has to be."""

    def trained(scale, steps, inf_at=None):
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        optimizer = RegularizedOptimizer(sgd, penalty_on(model), mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        x, y = data(model[0].weight)
        for step in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = (model(x) - y).square().mean()
            scaler.scale(loss * torch.inf if step == inf_at else loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
            scaler.step(optimizer)
            scaler.update()
            if step == inf_at:
                after = [model.state_dict(), optimizer.state_dict()]
                torch.testing.assert_close(tree_leaves(after), tree_leaves(before), rtol=0, atol=0)
        return model

    tolerance = 0.0 if dtype == torch.bfloat16 else 1e-4  # without a scale small gradients lose digits in float16
    assert_same(trained(SCALE, steps=5, inf_at=2), trained(1.0, steps=4), tolerance)


@precisions
@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal", "dual"])
def test_weights_that_are_low_precision_themselves_follow_the_float32_ones(dtype, mode):
    """The first step: one rounding to the weights' own dtype, and no more."""
    low, full = network().to(dtype), network()
    full.load_state_dict({name: p.float() for name, p in low.state_dict().items()})
    for model in (low, full):
        optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), penalty_on(model), mode)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25)
        optimizer.step()
    tolerance = 2 * torch.finfo(dtype).eps
    for p, q in zip(low.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=tolerance, atol=tolerance / 10)


def test_the_value_under_autocast_does_not_overflow_nor_change():
    model = nn.Linear(1000, 200)
    nn.init.constant_(model.weight, 2.0)  # sums to more than float16 can hold
    penalty = L1(model, 1.0)
    with torch.autocast("cpu", torch.float16):
        value = penalty()
    assert value.dtype == torch.float32
    assert value == 400_000.0
