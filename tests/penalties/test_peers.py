"""Values, proximal maps and solutions against skglm and cvxpy."""

import math
import os

import numpy as np
import pytest
import torch
from helpers.kinds import log_sum, mcp
from helpers.oracles import double, excess
from helpers.problems import proximal_gradient
from torch import nn

from torch_regpen import L1, L2, MCP, SCAD, ElasticNet, GroupLasso, LHalf, LogSum, NuclearNorm, SparseGroupLasso
from torch_regpen import functional as F
from torch_regpen.groups import Blocks

os.environ.setdefault("KERAS_BACKEND", "torch")


os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # compiling takes longer than all there is to do


@pytest.fixture(scope="module")
def skglm():
    skglm = pytest.importorskip("skglm")
    from skglm.penalties import block_separable, separable

    if os.environ["NUMBA_DISABLE_JIT"] == "1":
        separable.bool_ = block_separable.bool_ = np.bool_  # what numba's is without compiling
    return skglm


def regression(n=60, p=12, q=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p))
    B = rng.standard_normal((p, q or 1)) * (np.arange(p) < p // 3)[:, None]
    Y = X @ B + 0.3 * rng.standard_normal((n, q or 1))
    return X, (Y if q else Y[:, 0])


# skglm: penalties


def assert_agree(their, make, w, grad):
    """skglm's penalty and ours, on weights with a gradient: the value, and the distance to the subdifferential."""
    p = nn.Parameter(double(w))
    penalty = make([("w", p)])
    assert penalty().item() == pytest.approx(their.value(w), rel=1e-12), penalty
    p.grad = double(grad)
    distance = their.subdiff_distance(w, grad, np.arange(len(w)))
    assert penalty.stationarity().item() == pytest.approx(distance.max(), rel=1e-12), penalty


def test_values_and_distances_to_the_subdifferential_are_those_of_skglm(skglm):
    from skglm import penalties as theirs

    rng = np.random.default_rng(0)
    w, grad = rng.standard_normal(30), 0.5 * rng.standard_normal(30)
    w[::3] = 0
    factors = rng.uniform(0.5, 2, 30)
    weights = {"w": double(factors)}
    lam, gamma, eps, a = 0.3, 4.0, 0.2, 3.7
    pairs = [
        (theirs.L1(lam), L1, lam, {}),
        (theirs.L1_plus_L2(lam, 0.4), ElasticNet, lam * 0.7, {"l1_ratio": 0.4 / 0.7}),  # theirs has 1/2 in the square
        (theirs.MCPenalty(lam, gamma), MCP, lam, {"knee": gamma * lam}),
        (theirs.SCAD(lam, a), SCAD, lam, {"knee": a * lam, "a": a}),
        (theirs.LogSumPenalty(lam, eps), LogSum, lam / eps, {"eps": eps}),
        (theirs.L0_5(lam), LHalf, lam, {}),
        (theirs.WeightedL1(lam, factors), L1, lam, {"weights": weights}),
        (theirs.WeightedMCPenalty(lam, gamma, factors), MCP, lam, {"knee": gamma * lam, "weights": weights}),
    ]
    for their, ours, our_lam, shape in pairs:
        assert_agree(their, lambda w, ours=ours, lam=our_lam, shape=shape: ours(w, lam, **shape), w, grad)


def test_group_values_and_distances_are_those_of_skglm(skglm):
    from skglm import penalties as theirs

    rng = np.random.default_rng(0)
    w, grad = rng.standard_normal((10, 4)), 0.5 * rng.standard_normal((10, 4))
    w[::3] = 0
    lam, gamma = 0.3, 4.0
    pairs = [
        (theirs.L2_1(lam), GroupLasso, {}),
        (theirs.L2_05(lam), LHalf, {"groups": "output"}),
        (theirs.BlockMCPenalty(lam, gamma), MCP, {"groups": "output", "knee": gamma * lam}),
        (theirs.BlockSCAD(lam, 3.7), SCAD, {"groups": "output", "knee": 3.7 * lam, "a": 3.7}),
    ]
    for their, ours, shape in pairs:
        assert_agree(their, lambda w, ours=ours, shape=shape: ours(w, lam, scale=False, **shape), w, grad)


def test_proximal_maps_are_those_of_skglm_where_these_are_right(skglm):
    from skglm.utils import prox_funcs as theirs

    rng = np.random.default_rng(0)
    for _ in range(300):
        w, step, lam = 3 * rng.standard_normal(), rng.uniform(0.05, 0.95), rng.uniform(0.1, 2)
        t, x = step * lam, double(w)
        pairs = [
            (theirs.ST(w, t), F.l1_prox(x, t)),
            (theirs.prox_MCP(w, step, lam, 3.0), F.mcp_prox(x, t, 3 * lam)),
            (theirs.prox_SCAD(w, step, lam, 3.7), F.scad_prox(x, t, 3.7 * lam, 3.7)),
            (theirs.prox_log_sum(w, t, 1.5 + t), F.log_sum_prox(x, t / (1.5 + t), 1.5 + t)),
            (theirs.prox_05(w, t), F.l_half_prox(x, t)),
        ]
        for their, ours in pairs:
            assert ours.item() == pytest.approx(their, rel=1e-9, abs=1e-12)
        v = rng.standard_normal(5)
        assert F.group_lasso_prox(double(v)[None], t / math.sqrt(5))[0].tolist() == pytest.approx(theirs.BST(v, t))


def test_where_the_log_sum_of_skglm_is_nan_or_not_least_ours_is_least(skglm):
    from skglm.utils.prox_funcs import prox_log_sum

    def ours(w, alpha, eps):
        return F.log_sum_prox(double(w), alpha / eps, eps).item()

    def rho(eps):
        return lambda v: log_sum(v, eps) / eps

    assert prox_log_sum(8.0, 3.0, 0.1) == 0
    assert excess(rho(0.1), 0.0, 8.0, 3.0) > 18
    assert excess(rho(0.1), ours(8.0, 3.0, 0.1), 8.0, 3.0) < 1e-9
    rng = np.random.default_rng(0)
    wrong = 0
    with np.errstate(invalid="ignore"):
        for _ in range(150):
            w, alpha, eps = rng.uniform(0, 10), rng.uniform(0, 5), 10 ** rng.uniform(-2, 0.5)
            their = prox_log_sum(w, alpha, eps)
            wrong += math.isnan(their) or excess(rho(eps), their, w, alpha) > 1e-6
            assert excess(rho(eps), ours(w, alpha, eps), w, alpha) < 1e-7
    assert wrong > 10


def test_beyond_gamma_the_prox_of_mcp_is_the_hard_threshold(skglm):
    from skglm.utils.prox_funcs import prox_MCP

    lam, gamma, step = 0.5, 2.0, 3.0
    jump = lam * math.sqrt(step * gamma)

    def rho(v):
        return mcp(v, gamma * lam)

    for w in (jump - 0.01, jump + 0.01, 1.4, 1.6):
        ours = F.mcp_prox(double(w), step * lam, gamma * lam).item()
        assert ours == (w if w > jump else 0)
        assert excess(rho, ours, w, step * lam) < 1e-9
    assert prox_MCP(1.4, step, lam, gamma) == 0
    assert excess(rho, 0.0, 1.4, step * lam) > 0.2


# skglm: solutions


def test_group_lasso_regression_ends_where_skglm_does(skglm):
    X, y = regression()
    groups, size, alpha = 4, 3, 0.1
    roots = np.full(groups, math.sqrt(size))
    their = skglm.GroupLasso(groups=size, alpha=alpha, weights=roots, fit_intercept=False, tol=1e-12)
    w = double(their.fit(X, y).coef_)
    ours, penalty = proximal_gradient(lambda w: GroupLasso(w, alpha, groups=Blocks(size)), X, y)
    torch.testing.assert_close(ours, w, atol=1e-8, rtol=0)
    assert torch.equal(ours == 0, w == 0)
    assert 0 < (w == 0).sum() < len(w)
    assert penalty.stationarity() < 1e-10
    unscaled, _ = proximal_gradient(
        lambda w: GroupLasso(w, alpha * math.sqrt(size), groups=Blocks(size), scale=False), X, y
    )
    torch.testing.assert_close(unscaled, ours)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_mcp_regression_ends_where_skglm_does(skglm, alpha):
    X, y = regression()
    X = X / np.linalg.norm(X, axis=0) * math.sqrt(len(X))
    gamma = 3.0
    their = skglm.MCPRegression(alpha=alpha, gamma=gamma, fit_intercept=False, tol=1e-12).fit(X, y)
    ours, penalty = proximal_gradient(lambda w: MCP(w, alpha, knee=gamma * alpha), X, y)
    torch.testing.assert_close(ours, double(their.coef_), atol=1e-7, rtol=0)
    assert torch.equal(ours == 0, double(their.coef_) == 0)
    assert penalty.stationarity() < 1e-9
    _, penalty = proximal_gradient(lambda w: MCP(w, alpha, knee=gamma * alpha), X, y, steps=0, start=their.coef_)
    assert penalty.stationarity() < 1e-8


# cvxpy: any convex problem


@pytest.fixture(scope="module")
def minimised():
    """The minimiser over W of `square(W) + penalty(W)`, by an interior point method."""
    cp = pytest.importorskip("cvxpy")

    def minimise(shape, objective):
        W = cp.Variable(shape)
        problem = cp.Problem(cp.Minimize(objective(cp, W)))
        problem.solve(solver="CLARABEL")
        return double(W.value)

    return minimise


CONVEX = {
    "L1": (lambda w, lam: L1(w, lam), lambda cp, W: cp.norm1(W)),
    "elastic net": (
        lambda w, lam: ElasticNet(w, lam, l1_ratio=0.3),
        lambda cp, W: 0.3 * cp.norm1(W) + 0.7 * cp.sum_squares(W),
    ),
    "group lasso": (
        lambda w, lam: GroupLasso(w, lam),
        lambda cp, W: math.sqrt(W.shape[1]) * cp.sum(cp.norm(W, 2, axis=1)),
    ),
    "group lasso over inputs": (
        lambda w, lam: GroupLasso(w, lam, groups="input"),
        lambda cp, W: math.sqrt(W.shape[0]) * cp.sum(cp.norm(W, 2, axis=0)),
    ),
    "sparse group lasso": (
        lambda w, lam: SparseGroupLasso(w, lam, l1_ratio=0.4),
        lambda cp, W: 0.4 * cp.norm1(W) + 0.6 * math.sqrt(W.shape[1]) * cp.sum(cp.norm(W, 2, axis=1)),
    ),
    "L1 + group lasso + L2": (
        lambda w, lam: L2(w, 0.5 * lam) + GroupLasso(w, lam) + L1(w, 0.3 * lam),
        lambda cp, W: (
            0.5 * cp.sum_squares(W) + math.sqrt(W.shape[1]) * cp.sum(cp.norm(W, 2, axis=1)) + 0.3 * cp.norm1(W)
        ),
    ),
    "positive group lasso": (
        lambda w, lam: GroupLasso(w, lam, positive=True),
        lambda cp, W: math.sqrt(W.shape[1]) * cp.sum(cp.norm(W, 2, axis=1)) + cp.transforms.indicator([W >= 0]),
    ),
    "nuclear norm": (lambda w, lam: NuclearNorm(w, lam), lambda cp, W: cp.normNuc(W)),
    "nuclear norm + L2": (
        lambda w, lam: NuclearNorm(w, lam) + L2(w, 0.5 * lam),
        lambda cp, W: cp.normNuc(W) + 0.5 * cp.sum_squares(W),
    ),
}


@pytest.mark.parametrize("name", CONVEX)
def test_prox_and_regression_end_where_cvxpy_does(name, minimised):
    ours, theirs = CONVEX[name]
    w, lam = torch.randn(5, 4, dtype=torch.float64), 0.25
    p = nn.Parameter(w.clone())
    ours([p], lam).prox_(1.5)
    expected = minimised((5, 4), lambda cp, V: 0.5 * cp.sum_squares(V - w.numpy()) + 1.5 * lam * theirs(cp, V))
    torch.testing.assert_close(p.detach(), expected, atol=1e-4, rtol=0)

    X, Y = regression(p=6, q=3)
    n = len(X)
    W, penalty = proximal_gradient(lambda W: ours(W, lam), X, Y)
    assert penalty.stationarity() < 1e-9
    expected = minimised((6, 3), lambda cp, V: cp.sum_squares(Y - X @ V) / (2 * n) + lam * theirs(cp, V))
    torch.testing.assert_close(W, expected, atol=1e-4, rtol=0)
    if "nuclear" not in name:
        assert torch.equal(W == 0, expected.abs() < 1e-4)
