"""Proximal maps and regularizers against pyproximal, jaxopt and Keras."""

import math
import os

import numpy as np
import pytest
import torch
from helpers.kinds import proxed, scad, value_of
from helpers.oracles import double, excess
from torch import nn

from torch_regpen import L0, L1, L2, ActivityPenalty, ElasticNet, GroupLasso, NuclearNorm, Orthogonal, SparseGroupLasso
from torch_regpen import functional as F

os.environ.setdefault("KERAS_BACKEND", "torch")


os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # compiling takes longer than all there is to do


# pyproximal


def test_proximal_maps_are_those_of_pyproximal_where_these_are_right():
    pyproximal = pytest.importorskip("pyproximal")
    rng = np.random.default_rng(0)
    x, sigma, tau = rng.standard_normal(24), 0.7, 0.9
    t, w = sigma * tau, double(x)
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


def test_beyond_a_minus_1_the_prox_of_scad_is_least_unlike_pyproximal():
    pyproximal = pytest.importorskip("pyproximal")
    for sigma, a, tau, w in ((1.0, 3.7, 3.0, 3.9), (0.7, 2.5, 2.0, 2.0)):

        def rho(v, sigma=sigma, a=a):
            return scad(v, a * sigma, a)

        (their,) = pyproximal.SCAD(sigma, a).prox(np.array([w]), tau)
        assert excess(rho, their, w, tau * sigma) > 0.1
        for x in np.linspace(0.01, 6, 60).tolist():
            ours = F.scad_prox(double(x), tau * sigma, a * sigma, a).item()
            assert excess(rho, ours, x, tau * sigma) < 1e-9


def test_the_threshold_of_l0_is_not_the_step_as_in_pyproximal():
    pyproximal = pytest.importorskip("pyproximal")

    def rho(v):
        return (v > 0) * 0.7  # sigma times the count, as its text says

    (their,) = pyproximal.L0(0.7).prox(np.array([1.0]), 0.9)
    assert their == 1.0
    assert excess(rho, their, 1.0, 0.9) > 0.1
    assert excess(rho, F.l0_prox(double(1.0), 0.63).item(), 1.0, 0.9) < 1e-9


# jaxopt: the cases of its own tests


def test_the_cases_of_the_tests_of_jaxopt():
    prox = pytest.importorskip("jaxopt").prox
    rng = np.random.RandomState(0)
    x = rng.rand(20) * 2 - 1
    w, alphas = double(x), double(rng.rand(20))
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
