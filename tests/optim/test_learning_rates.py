"""Schedulers of the learning rate that steer the wrapper."""

import itertools
import warnings

import pytest
import torch
from helpers.nets import assert_same, network, set_gradients, train
from helpers.optimizers import OPTIMIZERS, modes, wrapped_sgd
from torch.optim import lr_scheduler as schedulers

from torch_regpen import L0, L1, L2, ElasticNet, GroupLasso, RegularizedOptimizer, SparseGroupLasso

# Schedulers of the learning rate

SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3], gamma=0.3),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.8),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.2, total_iters=2), schedulers.ExponentialLR(o, 0.7)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, total_iters=2), schedulers.ExponentialLR(o, 0.7)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def scheduled(model, optimizer, name):
    """Six scheduled steps; returns the learning rates and momenta met on the way, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = SCHEDULERS[name](optimizer)
        met = []
        for _ in range(6):
            (loss,) = train(model, optimizer, steps=1)
            scheduler.step(*([loss] if name == "ReduceLROnPlateau" else []))
            met.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    return met, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_steers_the_wrapper_as_it_steers_the_bare_optimizer(device, name):
    """Same rates, same warnings (none about the order of steps), and the weights of weight_decay."""
    theirs, ours = network(device), network(device)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02)
    inner = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    expected = scheduled(theirs, plain, name)
    assert scheduled(ours, RegularizedOptimizer(inner, L2(ours, 0.01, select="all")), name) == expected
    assert not any("before" in warning for warning in expected[1])
    assert len({lr for lr, _ in expected[0]}) > 1
    assert_same(ours, theirs)


@pytest.mark.parametrize("mode", ["decoupled", "proximal"])
def test_the_step_of_the_penalty_follows_the_scheduled_lr(device, mode):
    model, expected = network(device), network(device)
    optimizer = wrapped_sgd(model, mode)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    for i in range(3):
        set_gradients(model, i)
        optimizer.step()
        scheduler.step()
        set_gradients(expected, i)
        wrapped_sgd(expected, mode, lr=0.1 * 0.5**i).step()
    assert_same(model, expected)


def test_a_scheduler_built_on_the_wrapped_optimizer_works_too():
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = schedulers.ExponentialLR(inner, 0.5)
    optimizer = RegularizedOptimizer(inner, L1(model, 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, steps=1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_step_of_the_scheduler_before_the_optimizer_still_warns():
    model = network()
    scheduler = schedulers.ExponentialLR(wrapped_sgd(model), 0.5)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step\(\)"):
        scheduler.step()


ALL = [name for name in OPTIMIZERS if name != "ASGD"]  # whose rate is that of the step before
FEW = ["SGD", "Adam", "Adagrad", "RMSprop"]
KINDS = [L1, GroupLasso, L0, L2, ElasticNet, SparseGroupLasso]


@modes
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(ALL, KINDS[:2]), *itertools.product(FEW, KINDS[2:])])
def test_a_step_at_a_learning_rate_of_0_changes_nothing(name, kind, mode):
    """As the first step of a warm-up and the last of a linear schedule."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(4, 6))
    w.data[1] = 0
    inner = OPTIMIZERS[name]([w])
    try:
        optimizer = RegularizedOptimizer(inner, kind([w], 0.1), mode)
    except ValueError as error:  # L0 has no gradient, and some optimizers no metric
        pytest.skip(str(error))
    lr = inner.param_groups[0]["lr"]
    for rate in (0.0, lr, lr, 0.0, lr):
        before = w.detach().clone()
        inner.param_groups[0]["lr"] = rate
        w.grad = torch.randn(4, 6)
        w.grad[:, 2] = 0  # these never have a gradient
        optimizer.step()
        assert w.isfinite().all()
        if rate == 0:
            torch.testing.assert_close(w.detach(), before, rtol=1e-5, atol=1e-7)
