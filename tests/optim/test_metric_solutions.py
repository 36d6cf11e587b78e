"""One lambda, one solution, under every optimizer: the Lasso and L1 logistic regression."""

import numpy as np
import pytest
import torch
from helpers.optimizers import OPTIMIZERS
from helpers.problems import LAMBDA_MAX, OBJECTIVES, diabetes_data, l1_logistic
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import Lasso
from torch import optim

from torch_regpen import L1, RegularizedOptimizer

LAMBDA = LAMBDA_MAX / 10
SUPPORT = [1, 2, 3, 6, 8]


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


# One problem, one solution: the Lasso of scikit-learn on the diabetes data.


@pytest.fixture(scope="module")
def diabetes():
    x, y = diabetes_data()
    coef = Lasso(alpha=LAMBDA, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(x, y).coef_
    assert np.flatnonzero(coef).tolist() == SUPPORT
    return x, y, torch.tensor(x.T @ x / len(y)), torch.tensor(x.T @ y / len(y)), coef


def lasso(diabetes, make, mode, steps=300, decayed=200, **options):
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
    longer = {"steps": 500, "decayed": 400} if name in ("Adamax", "RMSprop momentum", "Adafactor") else {}
    found, objective, stationarity = lasso(diabetes, OPTIMIZERS[name], mode, **longer)
    assert np.flatnonzero(found).tolist() == SUPPORT
    assert objective == pytest.approx(OBJECTIVES[10], rel=1e-6)
    assert stationarity < 1e-3
    np.testing.assert_allclose(found, diabetes[-1], atol=1e-3)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_adafactor_rests_at_the_lasso_at_a_constant_lr(diabetes, mode):
    found, objective, stationarity = lasso(diabetes, OPTIMIZERS["Adafactor"], mode, steps=900, decayed=1)
    assert objective == pytest.approx(OBJECTIVES[10], rel=1e-11)
    assert stationarity < 1e-6
    np.testing.assert_allclose(found, diabetes[-1], atol=1e-6)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_adafactor_shrinks_elements_far_from_its_moments_of_rank_one(mode):
    """Of a diagonal gradient they are about its mean square: the update of the diagonal is 14 times lr times scale."""
    torch.manual_seed(0)
    target = torch.eye(200) + 0.002 * torch.randn(200, 200)
    w = (0.5 * torch.eye(200)).requires_grad_()
    optimizer = RegularizedOptimizer(optim.Adafactor([w], lr=0.03), L1([w], 0.1), mode)
    for _ in range(300):
        w.grad = w.detach() - target
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.nn.functional.softshrink(target, 0.1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adadelta", "Adamax"])
def test_with_lr_as_the_step_it_is_another_problem(diabetes, name):
    kw = {"steps": 500, "decayed": 400, "metric": "euclidean"}
    found, objective, stationarity = lasso(diabetes, OPTIMIZERS[name], "proximal", **kw)
    assert np.flatnonzero(found).tolist() != SUPPORT
    assert objective > OBJECTIVES[10] * 1.01
    assert stationarity > 1e-2


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


def classify(logistic, wrap, steps, decayed=150, decades=4):
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
    found = classify(
        logistic,
        lambda w: RegularizedOptimizer(LOGISTIC[name]([w], hard(w)), L1([w], lam), mode),
        steps=1200 if name in ("SGD momentum", "Adam") else 700,
    )
    assert np.array_equal(found != 0, exact != 0)
    assert logistic_objective(signed, lam, found) == pytest.approx(logistic_objective(signed, lam, exact), abs=1e-6)


@pytest.mark.parametrize("name", LOGISTIC)
def test_coupled_comes_to_the_same_solution_without_zeros_as_lr_falls(logistic, name):
    signed, lam, exact = logistic
    if hard(exact) and name != "RMSprop":
        pytest.skip("takes more steps than a test should")
    found = classify(
        logistic,
        lambda w: RegularizedOptimizer(LOGISTIC[name]([w], hard(w)), L1([w], lam), "coupled"),
        steps=500 if hard(exact) else 200,
        decayed=3000 if hard(exact) else 1200,
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
        steps=300,
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

    found = classify(logistic, wrap, steps=300)
    assert np.count_nonzero(found) > np.count_nonzero(exact)
    assert logistic_objective(signed, lam, found) > logistic_objective(signed, lam, exact) + 1e-2
