"""The step that each optimizer takes for a unit gradient, and what follows: lambda means the same under all of them."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import Lasso
from test_solutions import l1_logistic
from torch import nn, optim

from torch_regpen import L1, MCP, GroupLasso, NuclearNorm, RegularizedOptimizer
from torch_regpen.optim.step_size import steps_of, unsupported_reason
from torch_regpen.schedules import LinearRamp

LAMBDA = 0.05864501344746885  # a tenth of the largest, on the diabetes data
OBJECTIVE = 0.304755537557
SUPPORT = [1, 2, 3, 6, 8]


def with_lr(make, lr, **options):
    return lambda params, factor=1.0: make(params, lr=lr * factor, **options)


OPTIMIZERS = {
    "SGD": with_lr(optim.SGD, 0.2),
    "SGD momentum": with_lr(optim.SGD, 0.05, momentum=0.9),
    "SGD dampening": with_lr(optim.SGD, 0.1, momentum=0.8, dampening=0.5),
    "SGD nesterov": with_lr(optim.SGD, 0.02, momentum=0.9, nesterov=True),
    "SGD foreach": with_lr(optim.SGD, 0.05, momentum=0.9, foreach=True),
    "SGD fused": with_lr(optim.SGD, 0.05, momentum=0.9, fused=True),
    "Adam": with_lr(optim.Adam, 0.01),
    "Adam amsgrad": with_lr(optim.Adam, 0.01, amsgrad=True),
    "Adam foreach": with_lr(optim.Adam, 0.01, foreach=True),
    "Adam fused": with_lr(optim.Adam, 0.01, fused=True),
    "AdamW": with_lr(optim.AdamW, 0.01, weight_decay=0),
    "NAdam": with_lr(optim.NAdam, 0.01),
    "RAdam": with_lr(optim.RAdam, 0.02),
    "Adamax": with_lr(optim.Adamax, 0.01),
    "Adagrad": with_lr(optim.Adagrad, 0.1),
    "Adagrad lr_decay": with_lr(optim.Adagrad, 0.1, lr_decay=1e-3),
    "Adagrad fused": with_lr(optim.Adagrad, 0.1, fused=True),
    "RMSprop": with_lr(optim.RMSprop, 0.003),
    "RMSprop momentum": with_lr(optim.RMSprop, 0.0005, momentum=0.9),
    "RMSprop centered": with_lr(optim.RMSprop, 0.003, centered=True),
    "Adadelta": with_lr(optim.Adadelta, 1.0),
    "Adafactor": with_lr(optim.Adafactor, 0.03),
    "ASGD": with_lr(optim.ASGD, 0.2, lambd=0),
}
SPARSE = {"SparseAdam": with_lr(optim.SparseAdam, 0.01)}
# Those whose solutions test_solutions.py does not have.
SOLVERS = [
    "NAdam",
    "RAdam",
    "Adamax",
    "Adagrad",
    "Adagrad lr_decay",
    "RMSprop",
    "RMSprop momentum",
    "RMSprop centered",
    "Adadelta",
    "Adafactor",
    "ASGD",
]
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
    for step in range(1200):
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
    # Adafactor's step depends on the size of the weights, which are no longer those before the step
    rtol = 1e-4 if name == "Adafactor" else 1e-5
    torch.testing.assert_close(before - w.detach(), (size * w.grad).expand_as(w), rtol=rtol, atol=1e-12)


def test_that_of_asgd_falls_with_the_steps():
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = optim.ASGD([w], lr=0.1, lambd=0.5)
    for _ in range(5):
        before = w.detach().clone()
        w.grad = torch.zeros_like(w)
        optimizer.step()  # by lambd * w, for want of a gradient
    torch.testing.assert_close((1 - w.detach() / before) / 0.5, torch.tensor([own_step(optimizer, w).size]).double())


# One problem, one solution: the Lasso of scikit-learn on the diabetes data.


@pytest.fixture(scope="module")
def diabetes():
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    coef = Lasso(alpha=LAMBDA, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(x, y).coef_
    assert np.flatnonzero(coef).tolist() == SUPPORT
    return x, y, torch.tensor(x.T @ x / len(y)), torch.tensor(x.T @ y / len(y)), coef


def lasso(diabetes, make, mode, steps=500, decayed=400, **options):
    """Trains ten weights; the learning rate is constant for `steps`, and then falls to a thousandth."""
    x, y, hessian, slope, _ = diabetes
    w = torch.full((10,), 0.01, dtype=torch.float64, requires_grad=True)
    penalty = L1([w], LAMBDA)
    optimizer = RegularizedOptimizer(make([w]), penalty, mode, **options)
    lr, normalises = optimizer.param_groups[0]["lr"], not isinstance(optimizer.optimizer, optim.SGD | optim.ASGD)
    for step in range(steps + decayed):
        if normalises:
            optimizer.param_groups[0]["lr"] = lr * 10 ** (-3 * max(step - steps, 0) / decayed)
        w.grad = hessian @ w.detach() - slope
        optimizer.step()
    w.grad = hessian @ w.detach() - slope
    found = w.detach().numpy()
    objective = np.square(y - x @ found).sum() / (2 * len(y)) + LAMBDA * np.abs(found).sum()
    return found, objective, penalty.stationarity().item()


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, mode) for name in SOLVERS for mode in ("proximal", "dual")), ("SGD momentum", "dual"), ("Adam", "dual")],
)
def test_it_is_the_lasso_under_every_optimizer(diabetes, name, mode):
    found, objective, stationarity = lasso(diabetes, OPTIMIZERS[name], mode)
    assert np.flatnonzero(found).tolist() == SUPPORT
    assert objective == pytest.approx(OBJECTIVE, rel=1e-6)
    assert stationarity < 1e-3
    np.testing.assert_allclose(found, diabetes[-1], atol=1e-3)


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adadelta", "Adamax"])
def test_with_lr_as_the_step_it_is_another_problem(diabetes, name):
    found, objective, stationarity = lasso(diabetes, OPTIMIZERS[name], "proximal", metric="euclidean")
    assert np.flatnonzero(found).tolist() != SUPPORT
    assert objective > OBJECTIVE * 1.01
    assert stationarity > 1e-2


def test_the_centered_rmsprop_comes_to_rest_though_its_step_grows_without_bound(diabetes):
    """Where the gradient becomes constant its variance goes to 0, and the step for a unit gradient to `lr/eps`."""
    w = torch.ones(3, requires_grad=True)
    optimizer = optim.RMSprop([w], lr=1e-3, centered=True)
    for _ in range(3000):
        w.grad = torch.tensor([1.0, 0.5, 0.0])
        optimizer.step()
    step = own_step(optimizer, w)
    assert (step.size > 500 * 1e-3).all()  # and not by lr/|g|
    assert step.cap >= 10 * (step.size * w.grad).max()


# Classification: liblinear on breast cancer, and on the digits below 5 against the others.


def classes(name):
    x, y = {"breast cancer": load_breast_cancer, "digits": load_digits}[name](return_X_y=True)
    x, y = x[:, x.std(0) > 0], y if name == "breast cancer" else (y < 5).astype(int)
    x = (x - x.mean(0)) / x.std(0)
    lam = {"breast cancer": 0.05, "digits": 0.01}[name]
    return x, y, lam


@pytest.fixture(scope="module", params=["breast cancer", "digits"])
def logistic(request):
    x, y, lam = classes(request.param)
    c = 1 / (lam * len(x))
    coef = l1_logistic(x, y, c, solver="liblinear", tol=1e-8, fit_intercept=False).coef_[0]
    return torch.tensor((2 * y - 1)[:, None] * x), lam, coef


def logistic_objective(signed, lam, w):
    return np.logaddexp(0, -signed.numpy() @ w).mean() + lam * np.abs(w).sum()


LOGISTIC = {
    "SGD momentum": lambda params, hard: optim.SGD(params, lr=0.5 if hard else 0.1, momentum=0.95),
    "Adam": lambda params, hard: optim.Adam(params, lr=0.2 if hard else 0.05),
    "RMSprop": lambda params, hard: optim.RMSprop(params, lr=0.3 if hard else 0.02),
    "Adagrad": lambda params, hard: optim.Adagrad(params, lr=10.0 if hard else 0.5),
}


def hard(w):
    """Whether it is breast cancer, whose columns are nearly dependent."""
    return len(w) == 30


def classify(logistic, wrap, steps=1200, decayed=150, decades=4):
    signed, _, _ = logistic
    w = torch.zeros(signed.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = wrap(w)
    lr = optimizer.param_groups[0]["lr"]
    for step in range(steps + decayed):
        optimizer.param_groups[0]["lr"] = lr * 10 ** (-decades * max(step - steps, 0) / decayed)
        w.grad = -(torch.sigmoid(-signed @ w.detach()) @ signed) / len(signed)
        optimizer.step()
    return w.detach().numpy()


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("name", LOGISTIC)
def test_it_is_the_l1_logistic_regression_of_liblinear(logistic, name, mode):
    signed, lam, exact = logistic
    found = classify(logistic, lambda w: RegularizedOptimizer(LOGISTIC[name]([w], hard(w)), L1([w], lam), mode))
    assert np.array_equal(found != 0, exact != 0)
    assert logistic_objective(signed, lam, found) == pytest.approx(logistic_objective(signed, lam, exact), abs=1e-6)


@pytest.mark.parametrize("name", LOGISTIC)
def test_coupled_comes_to_the_same_solution_without_zeros_as_lr_falls(logistic, name):
    signed, lam, exact = logistic
    if hard(exact) and name in ("SGD momentum", "Adagrad"):
        pytest.skip("takes more steps than a test should")
    found = classify(
        logistic,
        lambda w: RegularizedOptimizer(LOGISTIC[name]([w], hard(w)), L1([w], lam), "coupled"),
        steps=1000 if hard(exact) else 500,
        decayed=11000 if hard(exact) else 3500,
        decades=7,
    )
    assert not (found == 0).any()
    assert np.array_equal(abs(found) > 1e-4, exact != 0)
    assert logistic_objective(signed, lam, found) == pytest.approx(logistic_objective(signed, lam, exact), abs=1e-6)


@pytest.mark.parametrize("name", LOGISTIC)
def test_the_euclidean_prox_comes_to_another_solution(logistic, name):
    signed, lam, exact = logistic
    found = classify(
        logistic,
        lambda w: RegularizedOptimizer(LOGISTIC[name]([w], hard(w)), L1([w], lam), "proximal", metric="euclidean"),
        steps=500,
    )
    assert np.count_nonzero(found) > np.count_nonzero(exact)
    assert logistic_objective(signed, lam, found) > logistic_objective(signed, lam, exact) + 1e-2


@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "RMSprop"])  # it refuses Adagrad
def test_so_does_torchao(logistic, name):
    pat = pytest.importorskip("torchao.prototype.pat.optim")
    signed, lam, exact = logistic

    def wrap(w):
        inner = LOGISTIC[name]([{"params": [w], "group_type": "ElemGrouper", "prox_type": "ProxLasso"}], hard(w))
        return pat.PruneOptimizer(inner, reg_lambda=lam)

    found = classify(logistic, wrap, steps=500)
    assert np.count_nonzero(found) > np.count_nonzero(exact)
    assert logistic_objective(signed, lam, found) > logistic_objective(signed, lam, exact) + 1e-2


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
def test_a_callable_with_a_step_for_each_coordinate_is_refused_where_the_prox_is_not_known(kind):
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
