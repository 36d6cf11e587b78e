"""positive: penalties that keep weights at zero or more."""

from functools import partial

import pytest
import torch
from helpers import nets
from helpers.kinds import GROUPS, members
from helpers.problems import proximal_gradient, regression
from scipy.optimize import nnls
from sklearn.linear_model import ElasticNet as SkElasticNet
from sklearn.linear_model import Lasso
from torch import nn

from torch_regpen import L1, L2, MCP, ElasticNet, GroupLasso, RegularizedOptimizer, SparseGroupLasso

network = partial(nets.network, dtype=torch.float64, sizes=(3, 4, 2))


# positive


@pytest.mark.parametrize("alpha", [0.02, 0.2])
def test_positive_is_the_positive_lasso_of_scikit_learn(alpha):
    X, y = regression()
    lasso = Lasso(alpha=alpha, fit_intercept=False, positive=True, tol=1e-14, max_iter=100000).fit(X, y)
    w, penalty = proximal_gradient(lambda w: L1(w, alpha, positive=True), X, y)
    torch.testing.assert_close(w, torch.from_numpy(lasso.coef_), atol=1e-9, rtol=0)
    assert torch.equal(w == 0, torch.from_numpy(lasso.coef_ == 0))
    assert penalty.stationarity() < 1e-9


def test_positive_is_the_positive_elastic_net_of_scikit_learn():
    X, y = regression()
    lam, r = 0.1, 0.4
    alpha = lam * (r + 2 * (1 - r))
    net = SkElasticNet(alpha=alpha, l1_ratio=lam * r / alpha, fit_intercept=False, positive=True, tol=1e-14)
    w, penalty = proximal_gradient(lambda w: ElasticNet(w, lam, l1_ratio=r, positive=True), X, y)
    torch.testing.assert_close(w, torch.from_numpy(net.fit(X, y).coef_), atol=1e-9, rtol=0)
    assert penalty.stationarity() < 1e-9


def test_positive_at_lambda_zero_is_nonnegative_least_squares():
    X, y = regression()
    w, penalty = proximal_gradient(lambda w: L1(w, 0.0, positive=True), X, y)
    torch.testing.assert_close(w, torch.from_numpy(nnls(X, y)[0]), atol=1e-9, rtol=0)
    assert penalty.stationarity() < 1e-9
    p = nn.Parameter(torch.tensor([-1.0, 2.0]))
    L1([p], 0.0, positive=True).prox_(0.1)
    assert p.tolist() == [0, 2]


@pytest.mark.parametrize("make", [L1, ElasticNet, GroupLasso, SparseGroupLasso, L2])
@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_positive_keeps_every_weight_at_zero_or_more_from_the_first_step(make, lam):
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop):
        for mode in ("proximal", "dual"):
            w = nn.Parameter(torch.randn(4, 6))
            wrapped = RegularizedOptimizer(optimizer([w], lr=1e-3), make([w], lam, positive=True), mode)
            for _ in range(3):
                w.grad = torch.randn_like(w)
                wrapped.step()
                assert (w >= 0).all()


@pytest.mark.parametrize("name", ["output", "blocks", "heads of dim 1"])
def test_positive_groups_shrink_what_is_left_above_zero(name):
    w, t = torch.randn(4, 6, dtype=torch.float64), 0.1
    p = nn.Parameter(w.clone())
    GroupLasso([p], t, groups=GROUPS[name], positive=True).prox_(1.0)
    for before, after in zip(members(w, GROUPS[name]), members(p.detach(), GROUPS[name]), strict=True):
        kept = before.clamp_min(0)
        expected = kept * (1 - t * len(kept) ** 0.5 / kept.norm()).clamp_min(0)
        torch.testing.assert_close(after, expected)


def test_positive_is_for_l1_and_the_elastic_net():
    with pytest.raises(TypeError):
        MCP(network(), 0.1, positive=True)
    w = nn.Parameter(torch.tensor([0.5, -0.5]))
    assert L1([w], 2.0, positive=True)().item() == 2.0  # the value is that of L1
