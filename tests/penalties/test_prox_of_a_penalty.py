"""prox_: the minimiser of its problem, by brute force, in any dtype."""

import math

import numpy as np
import pytest
import torch
from helpers.kinds import BASIC, OMEGA, RATIO
from helpers.nets import network, weights_of
from helpers.oracles import assert_minimal, proximal_objective, scalar_minimiser
from hypothesis import given
from hypothesis import strategies as st

from torch_regpen import L1

LAM = 0.03
EACH = pytest.mark.parametrize("kind", BASIC)


# prox_


def applied_prox(kind, w, lam, step):
    w = w.clone().requires_grad_()
    place = w.data_ptr()
    BASIC[kind]([w], lam).prox_(step)
    assert w.data_ptr() == place
    return w.detach()


number = st.one_of(st.sampled_from([0.0, 1e-12, -1e-3, 1.0, 1e4]), st.floats(-10, 10))
size = st.one_of(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6]), st.floats(0, 5))


@pytest.mark.parametrize("kind", ["L1", "L2", "ElasticNet"])
@given(w=number, lam=size, step=size)
def test_prox_of_a_number_is_the_minimiser_on_a_fine_grid(kind, w, lam, step):
    def objective(v):
        rho = {"L1": v.abs(), "L2": v**2, "ElasticNet": RATIO * v.abs() + (1 - RATIO) * v**2}[kind]
        return 0.5 * (v - w) ** 2 + step * lam * rho

    v = applied_prox(kind, torch.tensor([w], dtype=torch.float64), lam, step)[0]
    best = scalar_minimiser(objective, abs(w) + 1e-100)
    assert abs(v - best) <= 1e-7 * abs(w) + 1e-100, (v, best)


@EACH
@pytest.mark.parametrize("step", [0.0, 1e-6, 0.3, 2.0, 1e7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_nothing_near_the_prox_is_better(kind, step, dtype, device):
    w = torch.randn(3, 4, dtype=dtype, device=device)
    w[0, 1] = 0
    w[2] = 0
    v = applied_prox(kind, w, 0.5, step)
    assert_minimal(lambda x: proximal_objective(OMEGA[kind], x, w, 0.5 * step), v)
    assert not v[2].any()


@EACH
def test_prox_step_is_a_number_or_a_0_dim_tensor(kind, device):
    w = torch.randn(5, 4, device=device)
    expected = applied_prox(kind, w, LAM, 2.0)
    for step in (2, np.float64(2), torch.tensor(2.0, device=device), torch.tensor(2.0, device=device).double()):
        torch.testing.assert_close(applied_prox(kind, w, LAM, step), expected)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 8), (700, 600)])
def test_prox_in_other_dtypes_and_sizes(kind, dtype, shape, device):
    w = torch.randn(shape, device=device).to(dtype)
    exact = applied_prox(kind, w.double(), 0.1, 0.5)
    v = applied_prox(kind, w, 0.1, 0.5)
    torch.testing.assert_close(v, exact.to(dtype))
    assert torch.equal(v == 0, exact == 0)


@EACH
def test_prox_of_many_tensors_with_lambdas_of_their_own(kind, device):
    ws = [torch.randn(n % 4 + 1, n % 3 + 1, device=device, requires_grad=True) for n in range(40)]
    lams = [0.1 * (n % 3) for n in range(40)]
    expected = [applied_prox(kind, w.detach(), lam, 0.7) for w, lam in zip(ws, lams, strict=True)]
    BASIC[kind]([{"params": w, "lam": lam} for w, lam in zip(ws, lams, strict=True)], 1.0).prox_(0.7)
    torch.testing.assert_close([w.detach() for w in ws], expected)


@EACH
def test_prox_with_lambda_zero_changes_no_bit(kind):
    w = torch.randn(5, 4)
    w[0, 0] = -0.0
    assert torch.equal(applied_prox(kind, w, 0.0, 1e9).view(torch.int32), w.view(torch.int32))


def test_prox_leaves_exact_zeros_for_l1_and_whole_groups_for_group_lasso():
    w = torch.tensor([[0.2, -0.1], [0.2, 3.0]])
    assert applied_prox("L1", w, 0.5, 1.0).tolist() == [[0.0, 0.0], [0.0, 2.5]]
    grouped = applied_prox("GroupLasso", w, 0.5, 1.0)
    assert not grouped[0].any()
    assert grouped[1].all()
    assert applied_prox("L2", w, 0.5, 1.0).all()


@EACH
def test_prox_keeps_nan_and_inf_visible(kind, device):
    w = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [1.0, 1.0]], device=device)
    for step in (0.1, torch.tensor(0.1, device=device)):
        v = applied_prox(kind, w, 0.1, step)
        assert v[0, 0].isnan()
        assert not v[1, 0].isfinite()
        assert v[2].isfinite().all()


def test_prox_leaves_other_parameters_alone():
    model = network()
    biases = [model[0].bias.detach().clone(), model[2].bias.detach().clone()]
    L1(model, 1e3).prox_(1e3)
    assert not any(w.any() for w in weights_of(model))
    assert torch.equal(model[0].bias, biases[0])
    assert torch.equal(model[2].bias, biases[1])
