"""weights: a factor for each element or group."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import nets
from helpers.kinds import GROUPED, GROUPS, KINDS, magnitudes
from helpers.problems import proximal_gradient, regression
from sklearn.linear_model import Lasso
from torch import nn

from torch_regpen import L1, GroupLasso, NuclearNorm, RegularizedOptimizer, SparseGroupLasso

EACH = pytest.mark.parametrize("kind", KINDS)
network = partial(nets.network, dtype=torch.float64, sizes=(3, 4, 2))


# weights


def test_the_adaptive_lasso_is_scikit_learns_on_rescaled_features():
    X, y = regression()
    factors = 1 / np.abs(np.linalg.lstsq(X, y, rcond=None)[0])
    lasso = Lasso(alpha=0.05, fit_intercept=False, tol=1e-14, max_iter=100000).fit(X / factors, y)
    w, penalty = proximal_gradient(lambda w: L1(w, 0.05, weights={"w": torch.from_numpy(factors)}), X, y)
    torch.testing.assert_close(w, torch.from_numpy(lasso.coef_ / factors), atol=1e-8, rtol=0)
    assert torch.equal(w == 0, torch.from_numpy(lasso.coef_ == 0))
    assert 0 < (w == 0).sum() < 8
    assert penalty.stationarity() < 1e-8


def test_a_weight_of_zero_is_not_penalized():
    X, y = regression()
    free = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1])
    w, penalty = proximal_gradient(lambda w: L1(w, 100.0, weights={"w": free}), X, y)
    assert w[0].item() == pytest.approx((X[:, 0] @ y / (X[:, 0] @ X[:, 0])).item())
    assert torch.equal(w[1:], torch.zeros(7).double())
    assert penalty.stationarity() < 1e-8


@EACH
@pytest.mark.parametrize("name", GROUPED)
def test_weights_are_one_for_each_group(kind, name):
    w = torch.randn(4, 6, dtype=torch.float64)
    u, n = magnitudes(w, GROUPS[name])
    factors = torch.rand(len(u), dtype=torch.float64)
    p = nn.Parameter(w.clone())
    penalty = KINDS[kind]([("w", p)], 0.5, groups=GROUPS[name], weights={"w": factors})
    torch.testing.assert_close(penalty().detach(), 0.5 * n * (factors * penalty.rho(u)).sum())
    penalty.prox_(0.6)
    after, _ = magnitudes(p.detach(), GROUPS[name])
    torch.testing.assert_close(after, penalty.rho_prox(u, 0.3 * factors), atol=1e-14, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
def test_weights_of_any_dtype_do_not_change_that_of_the_parameters(dtype):
    model = network().float()
    penalty = L1(model, 0.5, weights={"0.weight": torch.full((4, 3), 2, dtype=dtype)})
    assert penalty().dtype == torch.float32
    torch.testing.assert_close(penalty(), 0.5 * (2 * model[0].weight.abs().sum() + model[2].weight.abs().sum()))
    penalty().backward()
    penalty.add_grad_()
    penalty.prox_(0.01)
    assert model[0].weight.dtype == model[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("factors", "groups"),
    [
        (torch.ones(4), None),
        (torch.ones(3), None),
        (torch.ones(()), None),
        (torch.ones(12), None),
        (torch.ones(4, 1), None),
        (torch.ones(4, 3), "output"),
        (torch.ones(3), "output"),
        (torch.ones(4, 1), "output"),
        (torch.ones(4), "tensor"),
        (-torch.ones(4, 3), None),
        (torch.full((4, 3), torch.nan), None),
        (torch.full((4, 3), torch.inf), None),
    ],
    ids=str,
)
def test_weights_of_another_shape_and_negative_ones_are_refused(factors, groups):
    with pytest.raises(ValueError, match=r"weights for '0\.weight'"):
        L1(network(), 0.5, groups=groups, weights={"0.weight": factors})


def test_unknown_names_are_refused_and_missing_names_count_1():
    model = network()
    with pytest.raises(ValueError, match="encoder"):
        L1(model, 0.5, weights={"encoder.weight": torch.ones(4, 3)})
    with pytest.raises(ValueError, match=r"0\.bias"):
        L1(model, 0.5, weights={"0.bias": torch.ones(4)})
    with pytest.raises(TypeError, match="weights"):
        L1(model, 0.5, weights="initial")
    with pytest.raises(TypeError, match="weights"):
        L1(model, 0.5, weights=[torch.ones(4, 3)])
    with pytest.raises(ValueError, match="singular values"):
        NuclearNorm(model, 0.5, weights={"0.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="SparseGroupLasso takes no weights"):
        SparseGroupLasso(model, 0.5, weights={"0.weight": torch.ones(4)})
    assert L1(model, 0.5, weights={})() == L1(model, 0.5)()


def test_a_shared_parameter_has_weights_by_any_of_its_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    for name in ("0.weight", "1.weight"):
        penalty = L1(model, 1.0, weights={name: torch.full((3, 3), 2.0)})
        torch.testing.assert_close(penalty(), 2 * model[0].weight.abs().sum())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_group_weights_in_every_mode(optimizer):
    factors = torch.tensor([0.0, 1e6, 1.0, 1.0])
    for mode in ("coupled", "decoupled", "proximal", "dual"):
        w = nn.Parameter(torch.randn(4, 6))
        before = w.detach().clone()
        penalty = GroupLasso([("w", w)], 0.1, weights={"w": factors})
        wrapped = RegularizedOptimizer(optimizer([w], lr=0.1), penalty, mode)
        for _ in range(3):
            w.grad = torch.zeros_like(w)
            wrapped.step()
        assert torch.equal(w[0], before[0])
        if mode != "coupled":
            assert w[1].norm() < before[1].norm()
            assert optimizer is torch.optim.Adam or torch.equal(w[1], torch.zeros(6))
