"""Trained to the end, the optimizer stands where scikit-learn and other exact solvers do: same support, same weights.

Losses are means over the samples: `SSE/(2n)` for regression, the mean logistic loss for classification. X and y are
standardized. Gradients are computed from the sums that they need, which is a thousand times faster than a network.
"""

import numpy as np
import pytest
import torch
from helpers.optimizers import ADAM_FOR_CURVATURE, SGD_FOR_CURVATURE
from helpers.problems import (
    LAMBDA_MAX,
    OBJECTIVES,
    LeastSquares,
    breast_cancer,
    diabetes,
    l1_logistic,
    l1_objective,
    standardized,
)
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet as ElasticNetSolver
from sklearn.linear_model import Lasso, MultiTaskElasticNet, Ridge
from torch import nn

from torch_regpen import L1, L2, ElasticNet, GroupLasso, RegularizedOptimizer

SUPPORTS = {2: {2, 8}}


# At constant learning rates. SGD stops sooner where it is at rest.
STEPS, STEPS_OF_ADAM = 1500, 1000


def solve(problem, penalty, make, mode="proximal", **options):
    inner = make(problem.model.parameters(), problem.curvature)
    if inner.param_groups[0]["maximize"]:
        sign_of = problem.gradient
        problem.gradient = lambda: -sign_of()
    optimizer = RegularizedOptimizer(inner, penalty, mode, **options)
    steps = STEPS if isinstance(inner, torch.optim.SGD) else STEPS_OF_ADAM
    for _ in range(steps // 50):
        problem.train(optimizer, 50)
        if optimizer.penalty.stationarity() < 1e-11:
            break
    if inner.param_groups[0]["maximize"]:
        problem.gradient = sign_of
        problem.model.weight.grad = problem.gradient()
    return problem


@pytest.fixture(scope="module")
def lasso():
    """The exact Lasso on diabetes, at a fraction of lambda_max."""
    problem = diabetes()
    solver = {
        fraction: Lasso(alpha=LAMBDA_MAX / fraction, fit_intercept=False, tol=1e-14, max_iter=10**6)
        for fraction in OBJECTIVES
    }
    return {fraction: model.fit(problem.x, problem.y[:, 0]).coef_ for fraction, model in solver.items()}


def test_the_figures_of_the_diabetes_lasso(lasso):
    problem = diabetes()
    assert problem.slope.abs().max().item() == pytest.approx(LAMBDA_MAX, rel=1e-14)
    for fraction, objective in OBJECTIVES.items():
        found = l1_objective(problem, LAMBDA_MAX / fraction, lasso[fraction][None])
        assert found == pytest.approx(objective, rel=1e-11)
    assert set(np.flatnonzero(lasso[2])) == SUPPORTS[2]


@pytest.mark.parametrize("fraction", OBJECTIVES)
@pytest.mark.parametrize("name", [*SGD_FOR_CURVATURE, *ADAM_FOR_CURVATURE])
def test_proximal_l1_is_the_lasso(device, lasso, name, fraction):
    lam = LAMBDA_MAX / fraction
    problem = diabetes(device)
    penalty = L1(problem.model, lam)
    solve(problem, penalty, {**SGD_FOR_CURVATURE, **ADAM_FOR_CURVATURE}[name])
    exact = name in SGD_FOR_CURVATURE
    assert np.array_equal(problem.weight[0] != 0, lasso[fraction] != 0)
    assert l1_objective(problem, lam) == pytest.approx(OBJECTIVES[fraction], rel=1e-10 if exact else 1e-6)
    assert penalty.stationarity().item() < (1e-8 if exact else 1e-5)
    np.testing.assert_allclose(problem.weight[0], lasso[fraction], atol=1e-8 if exact else 1e-5)


@pytest.mark.parametrize("name", ["momentum", "dampening", "adam"])
def test_with_lr_in_place_of_the_optimizers_step_it_is_another_problem(lasso, name):
    """Why there is a metric: the same optimizers, with lr as the step of the prox, end elsewhere."""
    problem = diabetes()
    penalty = L1(problem.model, LAMBDA_MAX / 10)
    solve(problem, penalty, {**SGD_FOR_CURVATURE, **ADAM_FOR_CURVATURE}[name], metric="euclidean")
    assert penalty.stationarity().item() > 1e-2
    assert not np.array_equal(problem.weight[0] != 0, lasso[10] != 0)


def test_the_euclidean_metric_is_right_for_plain_sgd(lasso):
    problem = diabetes()
    penalty = L1(problem.model, LAMBDA_MAX / 10)
    solve(problem, penalty, SGD_FOR_CURVATURE["sgd"], metric="euclidean")
    np.testing.assert_allclose(problem.weight[0], lasso[10], atol=1e-8)


class Preconditioned(torch.optim.Optimizer):
    """`w -= lr * scale * g` with a scale for each coordinate: an optimizer that the library does not know."""

    def __init__(self, params, lr, scale):
        super().__init__(params, {"lr": lr, "scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * group["scale"] * p.grad


@pytest.mark.parametrize("kind", ["L1", "GroupLasso"])
def test_a_callable_metric_serves_an_optimizer_that_is_not_known(device, lasso, kind):
    problem = diabetes(device)
    scale = torch.linspace(0.3, 1, 10, dtype=torch.float64, device=device)
    inner = Preconditioned(problem.model.parameters(), 1 / problem.curvature, scale)
    if kind == "L1":
        penalty = L1(problem.model, LAMBDA_MAX / 10)
    else:
        penalty = GroupLasso(problem.model, LAMBDA_MAX / 10, groups="input")  # each of one weight: the same penalty
    seen = []

    def metric(optimizer, parameter, group):
        seen.append((optimizer is inner, parameter is problem.model.weight))
        return (group["lr"] * group["scale"]).expand_as(parameter)

    problem.train(RegularizedOptimizer(inner, penalty, "proximal", metric=metric), STEPS)
    assert all(seen[0])
    np.testing.assert_allclose(problem.weight[0], lasso[10], atol=1e-8)
    assert penalty.stationarity().item() < 1e-8


def test_coupled_l1_has_the_solution_of_proximal_l1_up_to_its_zeros(lasso):
    """Near enough, that is: a sign step jumps around zero by lr * lam, and never stops there."""
    lam = LAMBDA_MAX / 10
    problem = diabetes()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1 / problem.curvature)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.999**step, 1e-4))
    wrapped = RegularizedOptimizer(optimizer, L1(problem.model, lam), "coupled")
    for _ in range(4000):
        problem.train(wrapped, 1)
        schedule.step()
    assert l1_objective(problem, lam) == pytest.approx(OBJECTIVES[10], rel=1e-4)
    np.testing.assert_allclose(problem.weight[0], lasso[10], atol=1e-3)
    assert (problem.weight != 0).all()


@pytest.mark.parametrize("ratio", [0.2, 0.9])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("sum_of_two", [False, True])
def test_proximal_elastic_net_is_that_of_scikit_learn(device, name, ratio, sum_of_two):
    lam = 0.05
    problem = diabetes(device)
    if sum_of_two:
        penalty = L2(problem.model, lam * (1 - ratio)) + L1(problem.model, lam * ratio)
    else:
        penalty = ElasticNet(problem.model, lam, l1_ratio=ratio)
    solve(problem, penalty, {**SGD_FOR_CURVATURE, **ADAM_FOR_CURVATURE}[name])
    alpha = lam * (ratio + 2 * (1 - ratio))
    solver = ElasticNetSolver(alpha=alpha, l1_ratio=lam * ratio / alpha, fit_intercept=False, tol=1e-14, max_iter=10**6)
    expected = solver.fit(problem.x, problem.y[:, 0]).coef_
    assert np.array_equal(problem.weight[0] != 0, expected != 0)
    np.testing.assert_allclose(problem.weight[0], expected, atol=1e-8 if name in SGD_FOR_CURVATURE else 1e-5)
    assert penalty.stationarity().item() < (1e-8 if name in SGD_FOR_CURVATURE else 1e-5)


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
def test_l2_is_ridge(device, name, mode):
    lam = 0.05
    problem = diabetes(device)
    penalty = L2(problem.model, lam)
    solve(problem, penalty, {**SGD_FOR_CURVATURE, **ADAM_FOR_CURVATURE}[name], mode=mode)
    n = len(problem.x)
    expected = Ridge(alpha=2 * n * lam, fit_intercept=False).fit(problem.x, problem.y[:, 0]).coef_
    np.testing.assert_allclose(problem.weight[0], expected, atol=1e-8 if name in SGD_FOR_CURVATURE else 1e-5)
    if mode == "proximal":
        assert penalty.stationarity().item() < (1e-8 if name in SGD_FOR_CURVATURE else 1e-5)


# Groups


def outputs():
    """Ten inputs, six outputs; some inputs matter to none, and some outputs depend on none."""
    rng = np.random.default_rng(0)
    x, _ = load_diabetes(return_X_y=True)
    x = standardized(x)
    truth = rng.standard_normal((6, 10)) * (rng.random((6, 10)) < 0.5)
    truth[:, [1, 4, 7]] = 0
    truth[[2, 5]] = 0
    return x, standardized(x @ truth.T + 2 * rng.standard_normal((len(x), 6)))


def alternating_directions(problem, lam_l1, lam_groups, lam_l2, axis, iterations=3000, rho=0.5):
    """The minimum by ADMM, in numpy: the two penalties on a copy each, their proxes never composed."""
    h, b = problem.hessian.numpy(), problem.slope.numpy()
    inverse = np.linalg.inv(h + 2 * lam_l2 * np.eye(len(h)) + 2 * rho * np.eye(len(h)))
    z1 = z2 = u1 = u2 = np.zeros_like(b)
    size = b.shape[axis]
    for _ in range(iterations):
        w = (b + rho * (z1 - u1) + rho * (z2 - u2)) @ inverse
        v1, v2 = w + u1, w + u2
        z1 = np.sign(v1) * np.maximum(np.abs(v1) - lam_l1 / rho, 0)
        norm = np.linalg.norm(v2, axis=axis, keepdims=True)
        z2 = v2 * np.maximum(1 - lam_groups * size**0.5 / rho / np.maximum(norm, 1e-300), 0)
        u1, u2 = v1 - z1, v2 - z2
    assert max(np.abs(w - z1).max(), np.abs(w - z2).max()) < 1e-11
    return np.where(z1 == 0, 0, z2)


GROUPED = {  # lambdas of L1, groups and L2
    "groups": (0.0, 0.1, 0.0),
    "sparse groups": (0.08, 0.05, 0.0),
    "groups + L2": (0.0, 0.08, 0.1),
    "sparse groups + L2": (0.05, 0.05, 0.05),
}


def grouped_penalty(model, lams, groups):
    l1, group_lasso, l2 = lams
    penalty = GroupLasso(model, group_lasso, groups=groups)
    if l2:
        penalty = L2(model, l2) + penalty  # in any order of writing
    return penalty + L1(model, l1) if l1 else penalty


@pytest.mark.parametrize("groups", ["output", "input"])
@pytest.mark.parametrize("case", GROUPED)
def test_group_penalties_reach_one_stationary_point_everywhere(device, case, groups):
    lams, axis = GROUPED[case], {"output": 1, "input": 0}[groups]
    exact = alternating_directions(LeastSquares(*outputs()), *lams, axis)
    zero_groups = (exact == 0).all(axis=axis)
    assert zero_groups.any()
    assert not zero_groups.all()

    def objective(problem, weight):
        l1, group_lasso, l2 = lams
        norms = np.linalg.norm(weight, axis=axis).sum() * weight.shape[axis] ** 0.5
        return problem.loss(weight) + l1 * np.abs(weight).sum() + group_lasso * norms + l2 * np.square(weight).sum()

    for name in ("sgd", "momentum", "adam"):
        problem = LeastSquares(*outputs(), device)
        penalty = grouped_penalty(problem.model, lams, groups)
        solve(problem, penalty, {**SGD_FOR_CURVATURE, **ADAM_FOR_CURVATURE}[name])
        assert np.array_equal((problem.weight == 0).all(axis=axis), zero_groups), name
        assert np.array_equal(problem.weight == 0, exact == 0), name
        assert penalty.stationarity().item() < (1e-8 if name in SGD_FOR_CURVATURE else 1e-5), name
        best = objective(problem, exact)
        assert objective(problem, problem.weight) == pytest.approx(
            best, rel=1e-10 if name in SGD_FOR_CURVATURE else 1e-8
        ), name


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_group_lasso_over_inputs_is_the_multi_task_lasso(name, l2):
    lam = 0.1
    problem = LeastSquares(*outputs())
    penalty = GroupLasso(problem.model, lam, groups="input")
    solve(problem, [penalty, L2(problem.model, l2)], {**SGD_FOR_CURVATURE, **ADAM_FOR_CURVATURE}[name])
    alpha = lam * 6**0.5 + 2 * l2  # scikit-learn weighs a group by 1, not by the root of its size
    solver = MultiTaskElasticNet(alpha=alpha, l1_ratio=lam * 6**0.5 / alpha, fit_intercept=False, tol=1e-14)
    expected = solver.set_params(max_iter=10**5).fit(problem.x, problem.y).coef_
    assert np.array_equal(problem.weight != 0, expected != 0)
    assert (problem.weight == 0).all(axis=0).any()
    np.testing.assert_allclose(problem.weight, expected, atol=1e-8 if name in SGD_FOR_CURVATURE else 1e-5)


def test_under_adam_the_euclidean_metric_leaves_no_group_at_zero():
    problem = LeastSquares(*outputs())
    penalty = GroupLasso(problem.model, 0.1)
    solve(problem, penalty, ADAM_FOR_CURVATURE["adam"], metric="euclidean")
    assert not (problem.weight == 0).any()
    assert penalty.stationarity().item() > 1e-2


# Classification


@pytest.mark.parametrize(("name", "c"), [("sgd", 0.01), ("sgd", 0.1), ("sgd", 1.0), ("adam", 0.1)])
def test_proximal_l1_is_the_l1_logistic_regression_of_liblinear(device, name, c):
    x, y = breast_cancer()
    expected = l1_logistic(x, y, c, solver="liblinear", tol=1e-12, fit_intercept=False).coef_[0]
    chance = 1 / (1 + np.exp(-x @ expected))
    curvature = np.linalg.eigvalsh((x * (chance * (1 - chance))[:, None]).T @ x / len(x))[-1]

    signed = torch.tensor((2 * y - 1)[:, None] * x, device=device)
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64, device=device)
    nn.init.zeros_(model.weight)
    penalty = L1(model, 1 / (c * len(x)))  # theirs is sum |w| + C * (the sum of the losses)
    if name == "sgd":
        inner = torch.optim.SGD(model.parameters(), lr=2 / curvature, momentum=0.98)
    else:
        inner = torch.optim.Adam(model.parameters(), lr=0.3)
    optimizer = RegularizedOptimizer(inner, penalty, "proximal")
    for _ in range(2000 if name == "sgd" else 2500):
        margins = signed @ model.weight.detach()[0]
        model.weight.grad = -(torch.sigmoid(-margins) @ signed / len(x)).unsqueeze(0)
        optimizer.step()
    found = model.weight.detach().cpu().numpy()[0]
    assert np.array_equal(found != 0, expected != 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_plain_training_loop_is_the_l1_logistic_regression_of_saga(device):
    """As a user writes it: a layer with a bias, which is not penalized, and autograd."""
    x, y = breast_cancer()
    expected = l1_logistic(x, y, 0.1, solver="saga", tol=1e-8)
    inputs, targets = torch.tensor(x, device=device), torch.tensor(y, dtype=torch.float64, device=device)
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], 1, dtype=torch.float64, device=device)
    criterion = nn.BCEWithLogitsLoss()
    optimizer = RegularizedOptimizer(
        torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.98), L1(model, 10 / len(x)), mode="proximal"
    )
    for _ in range(2000):
        optimizer.zero_grad()
        criterion(model(inputs)[:, 0], targets).backward()
        optimizer.step()
    weight, bias = model.weight.detach().cpu().numpy()[0], model.bias.item()
    assert np.array_equal(weight != 0, expected.coef_[0] != 0)
    np.testing.assert_allclose(weight, expected.coef_[0], atol=1e-5)
    assert bias == pytest.approx(expected.intercept_[0], abs=1e-5)
