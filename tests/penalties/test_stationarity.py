"""The audit: 0 where others found the optimum, and elsewhere the distance that brute force finds."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.kinds import BASIC, RATIO
from helpers.problems import LAMBDA_MAX, diabetes_data, standardized
from sklearn.linear_model import ElasticNet as SklearnElasticNet
from sklearn.linear_model import Lasso, MultiTaskLasso, Ridge
from torch import nn

from torch_regpen import L1, L2, ElasticNet, GroupLasso

PRECISE = {"fit_intercept": False, "tol": 1e-14, "max_iter": 1_000_000}


@pytest.fixture(scope="module")
def diabetes():
    return diabetes_data()


def fitted(coefficients, x, y, device):
    """A linear model with these weights, and the gradient of its SSE/(2n) in them."""
    x, y, coefficients = (torch.tensor(np.atleast_2d(a), device=device) for a in (x, y, coefficients))
    y = y if len(y) == len(x) else y.T
    model = nn.Linear(x.shape[1], y.shape[1], bias=False, dtype=torch.float64, device=device)
    with torch.no_grad():
        model.weight.copy_(coefficients)
    ((model(x) - y).square().sum() / (2 * len(x))).backward()
    return model


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.01])
def test_zero_at_the_lasso_of_scikit_learn(fraction, diabetes, device):
    lam = fraction * LAMBDA_MAX
    model = fitted(Lasso(alpha=lam, **PRECISE).fit(*diabetes).coef_, *diabetes, device)
    assert L1(model, lam).stationarity().item() < 1e-8
    assert L1(model, 1.01 * lam).stationarity().item() == pytest.approx(0.01 * lam, rel=1e-4)
    assert L1(model, 0.99 * lam).stationarity().item() == pytest.approx(0.01 * lam, rel=1e-4)


def test_zero_weights_are_stationary_from_the_largest_lambda_on(diabetes, device):
    model = fitted(np.zeros(10), *diabetes, device)
    assert L1(model, LAMBDA_MAX * (1 + 1e-12)).stationarity().item() == 0
    assert L1(model, LAMBDA_MAX - 0.01).stationarity().item() == pytest.approx(0.01)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_zero_at_the_elastic_net_of_scikit_learn(ratio, diabetes, device):
    lam = 0.1
    alpha = lam * (ratio + 2 * (1 - ratio))
    model = fitted(
        SklearnElasticNet(alpha=alpha, l1_ratio=lam * ratio / alpha, **PRECISE).fit(*diabetes).coef_, *diabetes, device
    )
    assert ElasticNet(model, lam, l1_ratio=ratio).stationarity().item() < 1e-8
    assert (L1(model, lam * ratio) + L2(model, lam * (1 - ratio))).stationarity().item() < 1e-8
    assert ElasticNet(model, lam, l1_ratio=ratio / 2).stationarity().item() > 1e-3


def test_zero_at_the_ridge_of_scikit_learn(diabetes, device):
    lam = 0.1
    model = fitted(Ridge(alpha=2 * 442 * lam, fit_intercept=False).fit(*diabetes).coef_, *diabetes, device)
    assert L2(model, lam).stationarity().item() < 1e-12
    assert L2(model, 2 * lam).stationarity().item() > 1e-3


@pytest.mark.parametrize("lam", [0.3, 0.05])
def test_zero_at_the_group_lasso_of_scikit_learn(lam, diabetes, device):
    x, y = diabetes
    targets = np.stack([y, standardized(y**2 + x[:, 2])], axis=1)
    fit = MultiTaskLasso(alpha=lam * math.sqrt(2), **PRECISE).fit(x, targets)
    dead = (fit.coef_ == 0).all(0).sum()
    assert 0 < dead < 10
    model = fitted(fit.coef_, x, targets, device)
    assert GroupLasso(model, lam, groups="input").stationarity().item() < 1e-7
    assert GroupLasso(model, 1.1 * lam, groups="input").stationarity().item() > 1e-3


# Elsewhere


def box(points=401):
    side = torch.linspace(-1, 1, points, dtype=torch.float64)
    return torch.cartesian_prod(side, side)


def disc(radii=200, angles=720):
    radius = torch.linspace(0, 1, radii, dtype=torch.float64)
    angle = torch.linspace(0, 2 * math.pi, angles + 1, dtype=torch.float64)[:-1]
    r, a = torch.cartesian_prod(radius, angle).T
    return torch.stack([r * a.cos(), r * a.sin()], dim=1)


def held(w, grad, make, dtype=torch.float64):
    w = torch.tensor(w, dtype=dtype, requires_grad=True)
    w.grad = torch.tensor(grad, dtype=dtype)
    return make([w]).stationarity().item()


@pytest.mark.parametrize("w", [0.0, 0.7, -2.0])
@pytest.mark.parametrize("grad", [-3.0, -0.4, 0.0, 0.2, 5.0])
@pytest.mark.parametrize("kind", ["L1", "L2", "ElasticNet"])
def test_distance_of_a_number_by_brute_force_over_its_interval(w, grad, kind):
    slopes = torch.linspace(-1, 1, 200_001, dtype=torch.float64) if w == 0 else torch.tensor([math.copysign(1.0, w)])
    linear, quadratic = {"L1": (1, 0), "L2": (0, 1), "ElasticNet": (RATIO, 1 - RATIO)}[kind]
    expected = (-grad - 0.6 * (linear * slopes + quadratic * 2 * w)).abs().min().item()
    assert held([w], [grad], lambda p: BASIC[kind](p, 0.6)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("grad", [[0.1, 0.2], [-1.0, 2.0], [0.5, -0.6]])
def test_distance_of_a_zero_group_by_brute_force_over_its_ball(grad):
    ball = 0.6 * math.sqrt(2) * disc()
    expected = (-torch.tensor(grad) - ball).norm(dim=1).min().item()
    assert held([[0.0, 0.0]], [grad], lambda p: GroupLasso(p, 0.6)) == pytest.approx(expected, abs=5e-3)


def test_distance_of_a_nonzero_group_is_the_norm_of_the_whole_gradient():
    w, grad = torch.tensor([3.0, 0.0]), torch.tensor([0.5, -0.7])
    expected = (-grad - 0.6 * math.sqrt(2) * w / w.norm()).norm().item()
    assert held([w.tolist()], [grad.tolist()], lambda p: GroupLasso(p, 0.6)) == pytest.approx(expected)


@pytest.mark.parametrize("grad", [[0.4, 0.9], [-2.0, 1.5], [0.1, -0.2]])
def test_distance_of_a_zero_group_under_a_sum_by_brute_force(grad):
    """The subdifferential is the sum of a box and a ball."""
    residual = -torch.tensor(grad, dtype=torch.float64)
    corners = residual - 0.3 * box()
    radius = 0.4 * math.sqrt(2)
    expected = (corners.norm(dim=1) - radius).clamp_min(0).min().item()  # the ball is round
    for make in (lambda p: L1(p, 0.3) + GroupLasso(p, 0.4), lambda p: GroupLasso(p, 0.4) + L2(p, 5.0) + L1(p, 0.3)):
        assert held([[0.0, 0.0]], [grad], make) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("grad", [0.3 + 0.3j, -2 + 1j, 0.1j])
def test_distance_of_a_complex_zero_by_brute_force_over_its_disc(grad):
    expected = (-torch.view_as_real(torch.tensor(grad, dtype=torch.complex128)) - 0.5 * disc()).norm(dim=1).min().item()
    assert held([0j], [grad], lambda p: L1(p, 0.5), torch.complex128) == pytest.approx(expected, abs=5e-3)


def test_it_is_the_largest_over_coordinates_and_parameters():
    pair = []
    for w, grad in (([0.0, 1.0], [-0.5, -0.75]), ([[2.0], [0.0]], [[-1.5], [0.1]])):
        pair.append(torch.tensor(w, requires_grad=True))
        pair[-1].grad = torch.tensor(grad)
    assert L1(pair, 0.25).stationarity().item() == 1.25
    assert L1(pair[::-1], 0.25).stationarity().item() == 1.25
    assert L1(pair[:1], 0.25).stationarity().item() == 0.5
    groups = [{"params": pair[:1]}, {"params": pair[1:], "lam": 0.75}]
    assert L1(groups, 0.25).stationarity().item() == 0.75
    penalty = L1(pair, 0.25)
    pair[1].requires_grad_(False)
    assert penalty.stationarity().item() == 0.5


def test_parameters_without_grad_are_passed_over(device):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).to(device)
    penalty = L1(model, 0.25)
    assert penalty.stationarity().item() == 0
    model[1].weight.grad = torch.full_like(model[1].weight, 3.0)
    expected = (3 + 0.25 * model[1].weight.sign()).abs().max().item()
    assert penalty.stationarity().item() == pytest.approx(expected)
    distance = penalty.stationarity()
    assert (distance.shape, distance.device.type, distance.requires_grad) == ((), device.type, False)


def test_it_changes_nothing(device):
    model = nn.Linear(3, 2, device=device)
    model(torch.ones(1, 3, device=device)).sum().backward()
    before = [model.weight.detach().clone(), model.weight.grad.clone()]
    (L1(model, 0.1) + GroupLasso(model, 0.1)).stationarity()
    assert torch.equal(model.weight, before[0])
    assert torch.equal(model.weight.grad, before[1])


def test_lambda_zero_leaves_the_plain_gradient():
    assert held([0.0, 1.0], [0.5, -2.0], lambda p: L1(p, 0.0)) == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_no_small_lambda(dtype):
    assert held([1.0], [0.0], lambda p: L1(p, 1e-9), dtype) == pytest.approx(1e-9, rel=1e-2)
    assert held([[1.0]], [[0.0]], lambda p: GroupLasso(p, 1e-9), dtype) == pytest.approx(1e-9, rel=1e-2)


def test_sparse_gradients():
    embedding = nn.Embedding(4, 2, sparse=True)
    nn.init.ones_(embedding.weight)
    embedding(torch.tensor([1, 1])).sum().backward()
    assert L1(embedding, 0.25).stationarity().item() == 2.25
    assert GroupLasso(embedding, 0.25).stationarity().item() == pytest.approx(2.25 * math.sqrt(2))


def test_nan_gradients_stay_visible():
    assert math.isnan(held([0.0, 1.0], [math.nan, 0.0], lambda p: L1(p, 0.1)))
    assert math.isnan(held([[0.0, 1.0]], [[math.nan, 0.0]], lambda p: GroupLasso(p, 0.1)))


def test_groups_that_overlap_are_refused():
    for make in itertools.permutations([lambda p: GroupLasso(p, 0.1), lambda p: GroupLasso(p, 0.1, groups="input")]):
        with pytest.raises(ValueError, match="overlap"):
            held([[0.0, 1.0]], [[1.0, 1.0]], lambda p, make=make: make[0](p) + make[1](p))
