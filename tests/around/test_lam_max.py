"""lam_max: the smallest lambda at which zero is stationary."""

import math

import numpy as np
import pytest
import torch
from helpers.problems import LAMBDA_MAX, X, linear, sse, y
from sklearn.linear_model import enet_path

from torch_regpen import (
    L0,
    L1,
    L2,
    MCP,
    SCAD,
    ActivityPenalty,
    ElasticNet,
    GroupLasso,
    LHalf,
    LogSum,
    NuclearNorm,
    SparseGroupLasso,
)
from torch_regpen.path import lam_max, regularization_path

# lam_max.

SLOPE = (X.T @ y / len(y))[None, :]  # minus the gradient at zero


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (L1, LAMBDA_MAX),
        (lambda m, lam: ElasticNet(m, lam, l1_ratio=0.25), 4 * LAMBDA_MAX),
        (lambda m, lam: L1(m, lam, weights={"weight": torch.full((1, 10), 0.5, dtype=torch.float64)}), 2 * LAMBDA_MAX),
        (MCP, LAMBDA_MAX),
        (SCAD, LAMBDA_MAX),
        (LogSum, LAMBDA_MAX),
        (GroupLasso, np.linalg.norm(SLOPE) / 10**0.5),
        (lambda m, lam: GroupLasso(m, lam, scale=False), np.linalg.norm(SLOPE)),
        (lambda m, lam: GroupLasso(m, lam, groups="input"), LAMBDA_MAX),
        (L2, math.inf),
    ],
)
def test_the_smallest_lambda_at_which_zero_is_stationary(make, expected):
    model = linear()
    assert lam_max(make(model, 1.0), lambda: sse(model)) == pytest.approx(expected, rel=1e-12)


def test_that_of_scikit_learn_is_where_its_paths_begin():
    model = linear()
    alphas, *_ = enet_path(X, y, l1_ratio=0.7, n_alphas=3)
    # theirs is alpha * (0.7*|w| + 0.3/2*w^2): our lam = alpha*(0.7 + 0.15), r = 0.7/0.85
    found = lam_max(ElasticNet(model, 1.0, l1_ratio=0.7 / 0.85), lambda: sse(model))
    assert found == pytest.approx(alphas[0] * 0.85, rel=1e-10)


def test_of_singular_values_it_is_the_spectral_norm_of_the_gradient():
    model = linear(3)
    targets = torch.randn(len(y), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.norm(targets.numpy().T @ X / len(y), ord=2)
    assert lam_max(NuclearNorm(model, 1.0), lambda: sse(model, targets)) == pytest.approx(expected, rel=1e-9)


def test_of_a_mixture_it_is_where_what_is_left_of_the_groups_is_gone():
    model = linear()
    found = lam_max(SparseGroupLasso(model, 1.0, l1_ratio=0.5), lambda: sse(model))

    def left(lam):
        return np.linalg.norm(np.maximum(np.abs(SLOPE) - lam / 2, 0)) - lam / 2 * 10**0.5

    assert left(found * (1 - 1e-9)) > 0 > left(found * (1 + 1e-9))


@pytest.mark.parametrize("make", [LHalf, L0])
def test_with_an_infinite_slope_there_is_none(make):
    model = linear()
    with pytest.raises(ValueError, match="every lambda"):
        lam_max(make(model, 1.0), lambda: sse(model))


def test_it_leaves_all_as_it_was():
    model = linear()
    penalty = L1([{"params": [("weight", model.weight)], "lam": 0.3}], 1.0)
    sse(model).backward()
    before = model.weight.detach().clone(), model.weight.grad.clone()
    lam_max(penalty, lambda: sse(model))
    assert torch.equal(model.weight, before[0])
    assert torch.equal(model.weight.grad, before[1])
    assert penalty.lam == 0.3
    with pytest.raises(ZeroDivisionError):
        lam_max(penalty, lambda: 1 / 0)
    assert torch.equal(model.weight, before[0])


def test_of_a_sum_the_parts_are_asked():
    model = linear()
    both = L1(model, 1.0) + L2(model, 1.0)
    with pytest.raises(ValueError, match="penalties"):
        lam_max(both, lambda: sse(model))
    with pytest.raises(ValueError, match="penalties"):
        regularization_path(model, both, lambda *_: None, [0.1])


def penalty_with_free(kind, model, free):
    """A penalty in whose `weights` the features `free` have 0, all others 2."""
    weights = torch.full((10,), 2.0, dtype=torch.float64)
    weights[free] = 0
    if kind is L1:
        return L1(model, 1.0, weights={"weight": weights.expand(model.weight.shape)})
    return kind(model, 1.0, groups="input", weights={"weight": weights})


def test_a_parameter_with_multiplier_0_counts_for_nothing():
    model, other = linear(), linear()
    names = {"penalized": model.weight, "free": other.weight}
    penalty = L1(list(names.items()), 1.0, select="all")
    penalty.multipliers = {"penalized": torch.tensor(0.5), "free": torch.tensor(0.0)}
    with torch.no_grad():
        other.weight.fill_(0.3)
    left = (torch.as_tensor(y) - torch.as_tensor(X) @ other.weight[0]).detach()
    found = lam_max(penalty, lambda: sse(lambda x: model(x) + other(x)))
    assert found == pytest.approx(2 * np.abs(X.T @ left.numpy()).max() / len(y))
    assert torch.equal(other.weight, torch.full_like(other.weight, 0.3))


@pytest.mark.parametrize("kind", [L1, GroupLasso])
def test_what_has_weight_0_is_left_as_it_is_and_counts_for_nothing(kind):
    free, held = [2, 3, 8], [0, 1, 4, 5, 6, 7, 9]
    model, targets = linear(2), np.stack([y, X[:, 0] - y], axis=1)
    coefficients = np.linalg.lstsq(X[:, free], targets, rcond=None)[0]  # fitted before, as glmnet does
    with torch.no_grad():
        model.weight[:, free] = torch.tensor(coefficients.T)
    slopes = X[:, held].T @ (targets - X[:, free] @ coefficients) / len(y)
    expected = (np.abs(slopes) if kind is L1 else np.linalg.norm(slopes, axis=1) / 2**0.5).max() / 2
    seen = []

    def loss():
        seen.append(model.weight.detach().clone())
        return sse(model, torch.tensor(targets))

    before = model.weight.detach().clone()
    assert lam_max(penalty_with_free(kind, model, free), loss) == pytest.approx(expected, rel=1e-10)
    assert torch.equal(seen[0][:, free], before[:, free])
    assert not seen[0][:, held].any()
    assert torch.equal(model.weight, before)


def test_of_free_coordinates_that_are_not_fitted_only_the_others_count():
    model = linear()
    held = np.abs(X.T @ (y - X[:, 2] * model.weight[0, 2].item()))[np.arange(10) != 2].max() / len(y) / 2
    assert lam_max(penalty_with_free(L1, model, [2]), lambda: sse(model)) == pytest.approx(held, rel=1e-10)
    assert lam_max(penalty_with_free(L1, model, list(range(10))), lambda: sse(model)) == 0


def test_a_gradient_that_is_not_finite_is_named():
    model = linear()
    with pytest.raises(ValueError, match="'weight' at zero is not finite"):
        lam_max(L1(model, 1.0), lambda: sse(model) * math.nan)


@pytest.mark.parametrize("loss", [lambda m: sse(m).item(), lambda m: sse(m).detach(), lambda m: sse(m).expand(2)])
def test_a_loss_without_a_gradient_is_refused(loss):
    model = linear()
    before = model.weight.detach().clone()
    with pytest.raises(TypeError, match=r"the loss as a tensor of one element .* without \.item\(\)"):
        lam_max(L1(model, 1.0), lambda: loss(model))
    assert torch.equal(model.weight, before)


def test_what_is_no_penalty_and_what_is_frozen_is_refused():
    model = linear()
    for wrong in (L1, model, ActivityPenalty(model, 1.0)):
        with pytest.raises(TypeError, match="penalty must be a penalty on parameters, such as L1"):
            lam_max(wrong, lambda: sse(model))
        with pytest.raises(TypeError, match="penalty must be a penalty on parameters, such as L1"):
            regularization_path(model, wrong, lambda *_: None, [0.1])
    with pytest.raises(ValueError, match="frozen"):
        lam_max(L1(model.requires_grad_(False), 1.0), lambda: sse(model))
