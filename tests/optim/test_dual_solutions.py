"""Where dual averaging ends: at the optimum of loss + penalty + the optimizer's decay; and what occurs rarely."""

import warnings

import numpy as np
import pytest
import torch
from helpers.problems import LAMBDA_MAX, diabetes
from scipy.optimize import minimize
from sklearn.linear_model import ElasticNet as ElasticNetSolver
from torch import nn, optim

from torch_regpen import L1, ElasticNet, GroupLasso, RegularizedOptimizer

DECAY = 0.1
LAM = LAMBDA_MAX / 4

DECAYING = {
    "SGD": lambda p, c: optim.SGD(p, lr=1 / c, weight_decay=DECAY),
    "momentum": lambda p, c: optim.SGD(p, lr=0.5 / c, momentum=0.9, weight_decay=DECAY),
    "Adam": lambda p, _: optim.Adam(p, lr=0.01, weight_decay=DECAY),
    "NAdam": lambda p, _: optim.NAdam(p, lr=0.01, weight_decay=DECAY),
    "Adagrad": lambda p, _: optim.Adagrad(p, lr=0.1, weight_decay=DECAY),
    "RMSprop": lambda p, _: optim.RMSprop(p, lr=0.003, weight_decay=DECAY),
}


def solve(problem, optimizer, steps=600, decayed=400):
    if isinstance(optimizer.optimizer, optim.SGD):  # which comes to rest at a constant learning rate
        problem.train(optimizer, 400)
        return problem.weight[0]
    lr = optimizer.param_groups[0]["lr"]
    for step in range(steps + decayed):
        optimizer.param_groups[0]["lr"] = lr * 10 ** (-3 * max(step - steps, 0) / decayed)
        problem.train(optimizer, 1)
    return problem.weight[0]


def net(problem, l1, l2):
    """scikit-learn's optimum of `SSE/(2n) + l1*|w| + l2/2*w^2`."""
    alpha = l1 + l2
    solver = ElasticNetSolver(alpha=alpha, l1_ratio=l1 / alpha, fit_intercept=False, tol=1e-14, max_iter=10**6)
    return solver.fit(problem.x, problem.y[:, 0]).coef_


def objective(problem, w, l1, l2):
    return problem.loss(w[None]) + l1 * np.abs(w).sum() + l2 / 2 * np.square(w).sum()


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize(
    ("name", "own"), [*((name, 0.0) for name in DECAYING), *((name, 0.2) for name in ("SGD", "momentum", "Adam"))]
)
def test_a_coupled_decay_acts_on_the_visible_weights(name, mode, own):
    """`own`: an L2 beside the L1, too."""
    problem = diabetes()
    make = DECAYING[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        penalty = ElasticNet(problem.model, LAM + own, l1_ratio=LAM / (LAM + own))
        found = solve(problem, RegularizedOptimizer(make(problem.model.parameters(), problem.curvature), penalty, mode))
    exact = net(problem, LAM, DECAY + 2 * own)
    assert np.array_equal(found != 0, exact != 0)
    best = objective(problem, exact, LAM, DECAY + 2 * own)
    assert objective(problem, found, LAM, DECAY + 2 * own) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_the_decay_of_adamw_beside_l1_ends_at_a_known_optimum(mode):
    """At rest Adam divides by `|g|`, so `g + DECAY*|g|*w + LAM*sign(w) = 0`, where `|g| = LAM / (1 - DECAY*|w|)`.

    This is the slope of `-LAM/DECAY * log(1 - DECAY*|w|)`, so the optimum is that of loss + this penalty.
    """
    problem, decay = diabetes(), 1.0
    inner = optim.AdamW(problem.model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=decay)
    found = solve(problem, RegularizedOptimizer(inner, L1(problem.model, LAM), mode), 1000, 1)

    def value(parts):
        """Of the positive and the negative parts of the weights."""
        above, below = parts.reshape(2, 10)
        return problem.loss((above - below)[None]) - LAM / decay * np.log(1 - decay * (above + below)).sum()

    best = minimize(value, np.full(20, 0.01), bounds=[(0, 0.45)] * 20, tol=1e-14, options={"maxfun": 10**5})
    np.testing.assert_allclose(found, best.x[:10] - best.x[10:], atol=1e-5)
    end, elastic_net = (value(np.stack([w, -w]).clip(min=0)) for w in (found, net(problem, LAM, decay)))
    assert end <= best.fun * (1 + 1e-9)
    assert elastic_net > best.fun * 1.001


def test_adafactor_at_its_default_lr_finds_the_proximal_solution():
    ends = {}
    for mode in ("proximal", "dual"):
        problem = diabetes()
        inner = optim.Adafactor(problem.model.parameters())
        problem.train(RegularizedOptimizer(inner, L1(problem.model, LAM), mode), 1500)
        ends[mode] = problem.weight[0]
    np.testing.assert_allclose(ends["dual"], ends["proximal"], atol=1e-2)
    assert np.array_equal(ends["dual"] != 0, net(problem, LAM, 0.0) != 0)


# What occurs rarely, and what never does.

RARE = {
    "Adam": optim.Adam,
    "Adagrad": lambda p, lr: optim.Adagrad(p, lr=10 * lr),
    "RMSprop": optim.RMSprop,
    "Adamax": lambda p, lr: optim.Adamax(p, lr=3 * lr),
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Adadelta": lambda p, lr: optim.Adadelta(p, lr=1.0, eps=1e-3),
    "SparseAdam": optim.SparseAdam,
}


def embedded(name, mode, kind=L1, steps=250):
    """Rows of an embedding are fitted 8 at a time, the last 5 never: which are zero, and the error of the others."""
    torch.manual_seed(0)
    model = nn.Embedding(100, 4, sparse=name == "SparseAdam")
    target = torch.randn(100, 4)
    with torch.no_grad():
        model.weight[95:] *= 0.05
    optimizer = RegularizedOptimizer(RARE[name](model.parameters(), lr=0.01), kind(model, 1e-5), mode)
    for _ in range(steps):
        rows = torch.randint(0, 95, (8,))
        optimizer.zero_grad()
        (model(rows) - target[rows]).square().mean().backward()
        optimizer.step()
    zero = (model.weight == 0).all(dim=1)
    return zero, (model.weight - target)[:95].square().mean().item()


@pytest.mark.parametrize("name", RARE)
def test_rows_that_occur_rarely_live_as_in_the_proximal_mode(name):
    (zero, error), (_, proximal) = embedded(name, "dual"), embedded(name, "proximal")
    assert not zero[:95].any()
    assert error == pytest.approx(proximal, rel=0.1, abs=1e-3)
    if name != "Adadelta":  # whose own step is sqrt(eps) where it has seen nothing
        assert zero[95:].all()


def test_groups_that_occur_rarely_live_too():
    zero, error = embedded("Adam", "dual", GroupLasso)
    assert not zero[:95].any()
    assert zero[95:].all()
    assert error == pytest.approx(embedded("Adam", "proximal", GroupLasso)[1], rel=0.1)


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.Adagrad, optim.RMSprop, optim.Adamax, optim.RAdam])
def test_inputs_that_are_always_zero_have_zero_weights_in_the_end(make):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = RegularizedOptimizer(make(model.parameters(), lr=0.05), L1(model, 0.02), "dual")
    for _ in range(250):
        x = torch.randn(16, 6)
        x[:, 4:] = 0
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
    assert not model.weight[:, 4:].any()
    assert (model.weight[:, :3].diagonal() != 0).all()


def test_the_bias_correction_of_adam_is_in_double_precision():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    inner = optim.Adam([w], lr=0.01, betas=(0.0, 0.9999), eps=0.0)
    optimizer = RegularizedOptimizer(inner, L1([w], 0.1), "proximal")
    w.grad = torch.full_like(w, 0.5)
    before = w.detach().clone()
    optimizer.step()
    # the first step of Adam is lr * sign(g), so its step for a unit gradient is lr / |g|
    torch.testing.assert_close(before - w.detach(), torch.full_like(w, 0.01 + 0.01 / 0.5 * 0.1), rtol=1e-12, atol=0)
