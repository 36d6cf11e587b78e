"""The step of each optimizer for a unit gradient, and its cap."""

import warnings

import pytest
import torch
from helpers.optimizers import OPTIMIZERS, SPARSE
from torch import nn, optim

from torch_regpen import L1, MCP, GroupLasso, NuclearNorm, RegularizedOptimizer
from torch_regpen.optim.step_size import steps_of, unsupported_reason
from torch_regpen.schedules import LinearRamp

CAPPED = ["Adam", "Adam amsgrad", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "RMSprop momentum", "Adadelta"]


def own_step(optimizer, w):
    return steps_of(optimizer, [w], optimizer.param_groups[0], "auto")[0]


# The step, measured: what a constant gradient moves a weight by, once the optimizer has come to rest.

GRADIENTS = torch.tensor([[0.5, -2.0, 1e-3], [30.0, 0.1, -0.7]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "maximize"), [*((name, False) for name in [*OPTIMIZERS, *SPARSE]), ("SGD momentum", True), ("Adam", True)]
)
def test_it_is_what_a_constant_gradient_moves_a_weight_by(name, maximize):
    torch.manual_seed(0)
    w = torch.randn_like(GRADIENTS).requires_grad_()
    optimizer = {**OPTIMIZERS, **SPARSE}[name]([w], 1e-3)
    optimizer.param_groups[0]["maximize"] = maximize
    sign = -1 if maximize else 1
    for step in range(1200 if name == "RMSprop momentum" else 600):
        noise = 10 * torch.randn_like(w) if step < 50 else 0.0
        w.grad = sign * GRADIENTS * (1 + noise)
        if name in SPARSE:
            w.grad = w.grad.to_sparse(1)
        before = w.detach().clone()
        optimizer.step()
    measured = (before - w.detach()) / GRADIENTS
    size = own_step(optimizer, w).size
    # NAdam's momentum, the moments of Adadelta's updates and the centered variance go on changing, ever more slowly
    tolerance = {
        "NAdam": 1e-3,
        "RAdam": 1e-4,
        "RMSprop momentum": 1e-4,
        "Adadelta": 1e-2,
        "RMSprop centered": 1e-3,
    }.get(name, 1e-5)
    torch.testing.assert_close(measured, torch.as_tensor(size).expand_as(w).double(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 20])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam", "Adagrad", "Adagrad lr_decay", "Adafactor", "Adamax"])
def test_without_momentum_it_is_exact_from_the_first_step(name, steps):
    w = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    betas = {"betas": (0.0, 0.9)} if name in ("Adam", "AdamW", "RAdam", "Adamax") else {}
    optimizer = OPTIMIZERS[name]([w], 1e-3)
    optimizer.param_groups[0].update(betas)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        w.grad = torch.randn(2, 3, dtype=torch.float64, generator=generator)
        before = w.detach().clone()
        optimizer.step()
    size = torch.as_tensor(own_step(optimizer, w).size).double()
    torch.testing.assert_close(before - w.detach(), (size * w.grad).expand_as(w), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.3}, {"eps": (None, 2.0)}])
@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_adafactor_steps_in_units_of_the_weights_before_the_update(shape, options):
    """Its updates are in proportion to the norm of the weights, which an update of this size changes by much."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    optimizer = optim.Adafactor([w], lr=0.3, **options)
    for _ in range(4):
        w.grad = torch.randn(shape, dtype=torch.float64, generator=generator)
        before = w.detach() * (1 - 0.3 * options.get("weight_decay", 0.0))
        optimizer.step()
        moved = own_step(optimizer, w).size * w.grad * (-1 if "maximize" in options else 1)
        torch.testing.assert_close(before - w.detach(), moved, rtol=1e-6, atol=0)


def test_that_of_asgd_falls_with_the_steps():
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = optim.ASGD([w], lr=0.1, lambd=0.5)
    for _ in range(5):
        before = w.detach().clone()
        w.grad = torch.zeros_like(w)
        optimizer.step()  # by lambd * w, for want of a gradient
    torch.testing.assert_close((1 - w.detach() / before) / 0.5, torch.tensor([own_step(optimizer, w).size]).double())


def test_centered_rmsprop_comes_to_rest_though_its_step_is_unbounded():
    """Where the gradient becomes constant its variance goes to 0, and the step for a unit gradient to `lr/eps`."""
    w = torch.ones(3, requires_grad=True)
    optimizer = optim.RMSprop([w], lr=1e-3, centered=True)
    for _ in range(3000):
        w.grad = torch.tensor([1.0, 0.5, 0.0])
        optimizer.step()
    step = own_step(optimizer, w)
    assert (step.size > 500 * 1e-3).all()  # and not by lr/|g|
    assert step.max_change >= 10 * (step.size * w.grad).max()


# What has no step for a unit gradient, and what knows its own.


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: optim.Rprop(p), "sign of the gradient, whatever its size"),
        (lambda p: optim.LBFGS(p), "approximate Hessian"),
        (lambda p: optim.Muon(p, weight_decay=0), "orthogonal, whatever its size"),
    ],
)
@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_without_such_a_step_it_warns_and_says_why(make, why, mode):
    if why.startswith("orthogonal") and not hasattr(optim, "Muon"):
        pytest.skip("this torch has no Muon")
    w = nn.Parameter(torch.ones(3, 3))
    with pytest.warns(UserWarning, match=why) as caught:
        RegularizedOptimizer(make([w]), L1([w], 0.1), mode)
    assert "the prox takes its lr" in str(caught[-1].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RegularizedOptimizer(make([w]), L1([w], 0.1), mode, metric="euclidean")
        RegularizedOptimizer(make([w]), L1([w], 0.1), mode, metric=lambda *_: 0.1)
        RegularizedOptimizer(make([w]), L1([w], 0.1), "coupled")


def test_every_optimizer_of_torch_is_known_or_said_why_not():
    named = {name for name in optim.__all__ if name not in ("Optimizer", "lr_scheduler", "swa_utils")}
    for name in named:
        kind = getattr(optim, name)
        if isinstance(kind, type) and issubclass(kind, optim.Optimizer):
            why = unsupported_reason(kind([nn.Parameter(torch.ones(2, 2))]))
            assert why is None or why != "takes an unknown step", name


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_a_callable_is_asked_for_the_step_after_each_update(mode):
    asked = []

    def metric(optimizer, parameter, group):
        asked.append((optimizer, parameter, group))
        return group["lr"] / (1 - group["momentum"])

    runs = []
    for options in ({}, {"metric": metric}):
        w = torch.linspace(-1, 1, 9).requires_grad_()
        inner = optim.SGD([w], lr=0.1, momentum=0.5)
        optimizer = RegularizedOptimizer(inner, L1([w], 0.3), mode, **options)
        for step in range(5):
            w.grad = torch.full((9,), 0.1 * step)
            optimizer.step()
        runs.append(w.detach())
    assert torch.equal(*runs)
    assert len(asked) == 5
    assert asked[0][0] is inner
    assert asked[0][1] is w
    assert asked[0][2] is inner.param_groups[0]


@pytest.mark.parametrize("kind", [NuclearNorm, lambda p, lam: MCP(p, lam, groups="output")])
def test_a_callable_step_by_coordinate_without_a_known_prox_is_refused(kind):
    w = nn.Parameter(torch.ones(3, 3))
    optimizer = RegularizedOptimizer(optim.SGD([w], lr=0.1), kind([w], 0.1), "proximal", metric=lambda _, p, g: p.abs())
    w.grad = torch.ones(3, 3)
    with pytest.raises(ValueError, match="differs by coordinate"):
        optimizer.step()


# Coordinates that have seen no gradient.


@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("name", CAPPED)
def test_no_step_takes_more_than_ten_times_lr_off_a_row_that_never_occurs(name, mode, ramp):
    """Their `sqrt(v)` is 0, and `s*lam` beyond all bounds."""
    torch.manual_seed(0)
    model = nn.Embedding(10, 4)
    penalty = L1(model, 1e-3)
    optimizer = RegularizedOptimizer(OPTIMIZERS[name](model.parameters(), 0.1), penalty, mode)
    schedule = LinearRamp(penalty, 20) if ramp else None
    group = optimizer.param_groups[0]
    most = 10 * group["lr"] / (1 - group.get("momentum", 0))
    for _ in range(30):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2, 3])).square().sum().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        assert ((before - model.weight.detach())[4:].abs() <= most * 1.001).all()
    assert (model.weight[4:] != 0).any() or most > 0.05


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_nor_off_a_group_that_never_occurs(mode):
    torch.manual_seed(0)
    model = nn.Embedding(10, 4)
    optimizer = RegularizedOptimizer(optim.Adam(model.parameters(), lr=1e-3), GroupLasso(model, 1e-2), mode)
    for _ in range(5):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2, 3])).square().sum().backward()
        optimizer.step()
        shrunk = before.norm(dim=1) - model.weight.detach().norm(dim=1)
        assert (shrunk[4:] <= 1e-2 * 4**0.5 * 1.001).all()
        assert (shrunk[4:] > 0).all()


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_a_group_of_weights_so_small_that_their_norm_is_zero_vanishes(mode):
    """The momentum of a dead neuron dies out; its last moves are of 1e-24, whose square is no float32 any more."""
    w = torch.zeros(5, 7, requires_grad=True)
    optimizer = RegularizedOptimizer(optim.Adam([w], lr=1e-8), GroupLasso([w], 1.0), mode)
    for _ in range(3):
        w.grad = torch.full((5, 7), 1e-24)
        optimizer.step()
        assert not w.any()
