"""Against other libraries: their values, their proximal maps, their solutions; and where they are wrong, ours is right.

Each is skipped where its library is missing: `pip install skglm cvxpy keras pyproximal jaxopt` for all of them.
"""

import math
import os

import numpy as np
import pytest
import torch
from definitions import least, log_sum, mcp, proxed, scad, value_of
from torch import nn
from training import proximal_gradient

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
    Orthogonal,
    SparseGroupLasso,
)
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


def tensor(x):
    return torch.from_numpy(np.asarray(x, dtype=np.float64))


def excess(rho, v, w, t):
    """By how much `1/2 (v - w)^2 + t rho(v)` exceeds its least value on a fine grid."""
    rows = tensor([w]).abs()

    def objective(x):
        return 0.5 * (x - rows[:, None]) ** 2 + t * rho(x)

    best = torch.minimum(least(objective, torch.zeros_like(rows), rows), objective(torch.zeros(1, 1).double())[:, 0])
    return (objective(tensor([[abs(v)]]))[:, 0] - best).item()


def regression(n=60, p=12, q=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p))
    B = rng.standard_normal((p, q or 1)) * (np.arange(p) < p // 3)[:, None]
    Y = X @ B + 0.3 * rng.standard_normal((n, q or 1))
    return X, (Y if q else Y[:, 0])


# skglm: penalties


def assert_agree(their, make, w, grad):
    """skglm's penalty and ours, on weights with a gradient: the value, and the distance to the subdifferential."""
    p = nn.Parameter(tensor(w))
    penalty = make([("w", p)])
    assert penalty().item() == pytest.approx(their.value(w), rel=1e-12), penalty
    p.grad = tensor(grad)
    distance = their.subdiff_distance(w, grad, np.arange(len(w)))
    assert penalty.stationarity().item() == pytest.approx(distance.max(), rel=1e-12), penalty


def test_values_and_distances_to_the_subdifferential_are_those_of_skglm(skglm):
    from skglm import penalties as theirs

    rng = np.random.default_rng(0)
    w, grad = rng.standard_normal(30), 0.5 * rng.standard_normal(30)
    w[::3] = 0
    factors = rng.uniform(0.5, 2, 30)
    weights = {"w": tensor(factors)}
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
        t, x = step * lam, tensor(w)
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
        assert F.group_lasso_prox(tensor(v)[None], t / math.sqrt(5))[0].tolist() == pytest.approx(theirs.BST(v, t))


def test_where_the_log_sum_of_skglm_is_nan_or_not_least_ours_is_least(skglm):
    from skglm.utils.prox_funcs import prox_log_sum

    def ours(w, alpha, eps):
        return F.log_sum_prox(tensor(w), alpha / eps, eps).item()

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


def test_where_the_mcp_of_skglm_takes_a_step_beyond_gamma_ours_is_the_hard_threshold(skglm):
    from skglm.utils.prox_funcs import prox_MCP

    lam, gamma, step = 0.5, 2.0, 3.0
    jump = lam * math.sqrt(step * gamma)

    def rho(v):
        return mcp(v, gamma * lam)

    for w in (jump - 0.01, jump + 0.01, 1.4, 1.6):
        ours = F.mcp_prox(tensor(w), step * lam, gamma * lam).item()
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
    w = tensor(their.fit(X, y).coef_)
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
    torch.testing.assert_close(ours, tensor(their.coef_), atol=1e-7, rtol=0)
    assert torch.equal(ours == 0, tensor(their.coef_) == 0)
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
        return tensor(W.value)

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


# pyproximal


def test_proximal_maps_are_those_of_pyproximal_where_these_are_right():
    pyproximal = pytest.importorskip("pyproximal")
    rng = np.random.default_rng(0)
    x, sigma, tau = rng.standard_normal(24), 0.7, 0.9
    t, w = sigma * tau, tensor(x)
    pairs = [
        (pyproximal.L1(sigma), F.l1_prox(w, t)),
        (pyproximal.L2(sigma=sigma), F.l2_prox(w, t / 2)),  # theirs has 1/2
        (pyproximal.SCAD(sigma, 3.7), F.scad_prox(w, t, 3.7 * sigma, 3.7)),
        (pyproximal.Log(sigma, 5.0), F.log_sum_prox(w, t * 5 / math.log(6), 1 / 5)),
        (pyproximal.L21(ndim=4, sigma=sigma), F.group_lasso_prox(w.view(4, 6), t / 2, "input").flatten()),
        (pyproximal.Nuclear((4, 6), sigma), F.nuclear_norm_prox(w.view(4, 6), t).flatten()),
    ]
    for their, ours in pairs:
        np.testing.assert_allclose(ours.numpy(), their.prox(x, tau), atol=1e-10, err_msg=type(their).__name__)


def test_where_the_scad_of_pyproximal_takes_a_step_beyond_a_minus_1_ours_is_least():
    pyproximal = pytest.importorskip("pyproximal")
    for sigma, a, tau, w in ((1.0, 3.7, 3.0, 3.9), (0.7, 2.5, 2.0, 2.0)):

        def rho(v, sigma=sigma, a=a):
            return scad(v, a * sigma, a)

        (their,) = pyproximal.SCAD(sigma, a).prox(np.array([w]), tau)
        assert excess(rho, their, w, tau * sigma) > 0.1
        for x in np.linspace(0.01, 6, 60).tolist():
            ours = F.scad_prox(tensor(x), tau * sigma, a * sigma, a).item()
            assert excess(rho, ours, x, tau * sigma) < 1e-9


def test_where_the_l0_of_pyproximal_takes_the_step_itself_for_the_threshold_ours_is_least():
    pyproximal = pytest.importorskip("pyproximal")

    def rho(v):
        return (v > 0) * 0.7  # sigma times the count, as its text says

    (their,) = pyproximal.L0(0.7).prox(np.array([1.0]), 0.9)
    assert their == 1.0
    assert excess(rho, their, 1.0, 0.9) > 0.1
    assert excess(rho, F.l0_prox(tensor(1.0), 0.63).item(), 1.0, 0.9) < 1e-9


# jaxopt: the cases of its own tests


def test_the_cases_of_the_tests_of_jaxopt():
    prox = pytest.importorskip("jaxopt").prox
    rng = np.random.RandomState(0)
    x = rng.rand(20) * 2 - 1
    w, alphas = tensor(x), tensor(rng.rand(20))
    p = nn.Parameter(w.clone())
    L1([p], 0.5, positive=True).prox_(1.0)
    lam, gamma = 0.5, 0.1  # lam * (|w| + gamma/2 w^2)
    both = lam * (1 + gamma / 2)
    pairs = [
        (prox.prox_lasso(x, 0.5), F.l1_prox(w, 0.5)),
        (prox.prox_lasso(x, alphas.numpy()), F.soft_threshold(w, alphas)),
        (prox.prox_non_negative_lasso(x, 0.5), p.detach()),
        (prox.prox_elastic_net(x, (lam, gamma)), F.elastic_net_prox(w, both, lam / both)),
        (prox.prox_group_lasso(x, 0.1), F.group_lasso_prox(w, 0.1 / math.sqrt(20), "tensor")),
        (prox.prox_group_lasso(x, 10.0), F.group_lasso_prox(w, 10.0 / math.sqrt(20), "tensor")),
        (prox.prox_ridge(x, 10.0), F.l2_prox(w, 5.0)),  # its text says 10 w^2, its code takes half of that
    ]
    for their, ours in pairs:
        np.testing.assert_allclose(ours.numpy(), np.asarray(their), atol=1e-6)


def test_the_factor_of_l2_is_the_one_in_the_text():
    w = torch.tensor([1.0, -3.0], dtype=torch.float64)
    assert F.l2_value(w) == value_of(L2, w) == 10.0
    objective = 0.5 * (F.l2_prox(w, 10.0) - w).square().sum() + 10 * F.l2_value(F.l2_prox(w, 10.0))
    for factor in (0.9, 1.1, 21 / 11):
        v = F.l2_prox(w, 10.0) * factor
        assert 0.5 * (v - w).square().sum() + 10 * F.l2_value(v) > objective


def test_a_zero_group_and_no_step_is_no_0_over_0():
    w = torch.zeros(3, 4)
    for t in (0.0, 0.1):
        assert torch.equal(F.group_lasso_prox(w, t), w)
        for make in (L0, GroupLasso, NuclearNorm, SparseGroupLasso):
            assert torch.equal(proxed(make, w, t), w)


# Keras


@pytest.fixture(scope="module")
def regularizers():
    return pytest.importorskip("keras").regularizers


def of_keras(regularizer, w):
    from keras import ops

    return float(regularizer(ops.convert_to_tensor(w.numpy())))


def test_l1_l2_and_l1l2_of_keras(regularizers):
    w = torch.randn(4, 6)
    l1, l2 = 0.3, 0.05
    pairs = [
        (regularizers.L1(l1), L1, l1, {}),
        (regularizers.L2(l2), L2, l2, {}),
        (regularizers.L1L2(l1, l2), ElasticNet, l1 + l2, {"l1_ratio": l1 / (l1 + l2)}),
        (regularizers.L1L2(0.0, l2), ElasticNet, l2, {"l1_ratio": 0.0}),
    ]
    for their, ours, lam, shape in pairs:
        assert ours([nn.Parameter(w)], lam, **shape)().item() == pytest.approx(of_keras(their, w), rel=1e-6)


def test_the_orthogonal_regularizer_of_keras(regularizers):
    w = torch.randn(4, 6)
    rows, columns = regularizers.OrthogonalRegularizer(0.2), regularizers.OrthogonalRegularizer(0.2, mode="columns")
    for weight, their in ((w, of_keras(rows, w)), (w.T.contiguous(), of_keras(columns, w))):
        ours = Orthogonal([nn.Parameter(weight)], 0.2, measure="cosine")
        assert ours().item() == pytest.approx(their, rel=1e-5)


def test_the_regularizers_of_a_keras_layer(regularizers):
    """Its kernel is the transpose of torch's weight; its activity regularizer means over the batch."""
    import keras

    linear, x = nn.Linear(5, 3), torch.randn(7, 5)
    for kind, regularizer in (("l1", regularizers.L1(0.1)), ("l2", regularizers.L2(0.1))):
        layer = keras.layers.Dense(
            3,
            kernel_regularizer=regularizers.L2(0.01),
            bias_regularizer=regularizers.L1(0.02),
            activity_regularizer=regularizer,
        )
        layer.build((None, 5))
        layer.set_weights([linear.weight.detach().T.numpy(), linear.bias.detach().numpy()])
        layer(np.asarray(x))
        their = sorted(float(keras.ops.convert_to_numpy(loss)) for loss in layer.losses)
        activity = ActivityPenalty(linear, 0.1, kind)
        linear(x)
        ours = L2(linear, 0.01)(), L1(linear, 0.02, select="bias")(), activity()
        assert sorted(loss.item() for loss in ours) == pytest.approx(their, rel=1e-5)
        activity.remove()
