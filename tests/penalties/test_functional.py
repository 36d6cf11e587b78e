import inspect
import math
from functools import partial

import pytest
import torch
from helpers.functions import grad, prox, value
from helpers.kinds import CONVEX, OMEGA, RATIO, group_lasso
from helpers.oracles import assert_minimal, proximal_objective, scalar_minimiser
from hypothesis import given
from hypothesis import strategies as st

from torch_regpen import functional as F

ALL = list(OMEGA)

TINY = 1e-100  # the squares of smaller numbers vanish
weights = st.one_of(st.sampled_from([0.0, 1e-12, -1e-3, 1.0, -7.5, 1e4]), st.floats(-10, 10))
steps = st.one_of(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6]), st.floats(0, 20))


def test_names_and_order_of_arguments():
    assert list(inspect.signature(F.soft_threshold).parameters) == ["w", "t"]
    assert list(inspect.signature(F.l1_prox).parameters) == ["w", "t"]
    assert list(inspect.signature(F.l2_prox).parameters) == ["w", "t"]
    assert list(inspect.signature(F.elastic_net_prox).parameters) == ["w", "t", "l1_ratio"]
    assert list(inspect.signature(F.group_lasso_prox).parameters) == ["w", "t", "groups"]
    for kind in ("l1", "l2", "elastic_net", "group_lasso"):
        assert {f"{kind}_value", f"{kind}_grad", f"{kind}_prox"} <= set(F.__all__)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_value_is_the_definition(kind, dtype, device):
    w = torch.randn(4, 5, dtype=dtype, device=device)
    w[1, 2] = 0
    torch.testing.assert_close(value(kind, w), OMEGA[kind](w))


@pytest.mark.parametrize("kind", ALL)
def test_value_at_known_numbers(kind):
    w = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    known = {"L1": 7.0, "L2": 25.0, "ElasticNet": 0.3 * 7 + 0.7 * 25, "GroupLasso": math.sqrt(2) * 5}
    assert value(kind, w).item() == pytest.approx(known[kind], rel=1e-6)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_grad_is_that_of_autograd(kind, dtype, device):
    w = torch.randn(4, 5, dtype=dtype, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(OMEGA[kind](w), w)
    torch.testing.assert_close(grad(kind, w.detach()), expected)


@pytest.mark.parametrize("kind", ALL)
def test_grad_at_known_numbers(kind):
    w = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    known = {
        "L1": [[1.0, -1.0], [0.0, 0.0]],
        "L2": [[6.0, -8.0], [0.0, 0.0]],
        "ElasticNet": [[0.3 + 1.4 * 3, -0.3 - 1.4 * 4], [0.0, 0.0]],
        "GroupLasso": [[math.sqrt(2) * 0.6, -math.sqrt(2) * 0.8], [0.0, 0.0]],
    }
    torch.testing.assert_close(grad(kind, w), torch.tensor(known[kind]))


@pytest.mark.parametrize("kind", ALL)
def test_value_can_be_differentiated_and_has_no_nan_at_zero(kind):
    w = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(kind, w), w)
    assert torch.equal(gradient, torch.zeros_like(w))


@pytest.mark.parametrize("kind", CONVEX)
@given(w=weights, t=steps)
def test_prox_of_a_number_is_the_minimiser_on_a_fine_grid(kind, w, t):
    def objective(v):
        omega = {"L1": v.abs(), "L2": v**2, "ElasticNet": RATIO * v.abs() + (1 - RATIO) * v**2}[kind]
        return 0.5 * (v - w) ** 2 + t * omega

    v = prox(kind, torch.tensor([w], dtype=torch.float64), t)[0]
    best = scalar_minimiser(objective, abs(w) + TINY)
    assert abs(v - best) <= 1e-7 * abs(w) + TINY, (v, best)
    assert objective(v) <= objective(best) + 1e-14 * abs(objective(best))


@given(w=st.lists(weights, min_size=1, max_size=6), t=steps)
def test_group_lasso_prox_of_a_row_is_the_minimiser_along_its_ray(w, t):
    w = torch.tensor([w], dtype=torch.float64)
    v = F.group_lasso_prox(w, t)
    norm = w.norm().item()
    radius = scalar_minimiser(lambda r: 0.5 * (r - norm) ** 2 + t * math.sqrt(w.numel()) * r.abs(), norm + TINY)
    torch.testing.assert_close(v.norm(), radius.abs(), rtol=0, atol=1e-7 * norm + TINY)
    torch.testing.assert_close(v * norm, w * v.norm())  # the old direction


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("t", [0.0, 1e-9, 0.05, 0.4, 3.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_nothing_near_the_prox_is_better(kind, t, dtype, device):
    w = torch.randn(3, 4, dtype=dtype, device=device)
    w[0, 1] = 0
    w[2] *= 1e-3
    v = prox(kind, w, t)
    assert v.dtype == dtype
    assert_minimal(lambda x: proximal_objective(OMEGA[kind], x, w, t), v)


@pytest.mark.parametrize("kind", ALL)
def test_prox_takes_a_float_or_a_0_dim_tensor(kind, device):
    w = torch.randn(4, 5, device=device)
    torch.testing.assert_close(prox(kind, w, torch.tensor(0.25, device=device)), prox(kind, w, 0.25))
    torch.testing.assert_close(prox(kind, w.half(), torch.tensor(0.25, device=device)), prox(kind, w.half(), 0.25))


@pytest.mark.parametrize("kind", ALL)
def test_prox_with_no_step_is_the_identity_bit_for_bit(kind, device):
    w = torch.randn(6, 5, device=device)
    w[2] = 0
    assert torch.equal(prox(kind, w, 0.0), w)
    assert torch.equal(prox(kind, w, torch.zeros((), device=device)), w)


def test_prox_gives_exact_zeros():
    w = torch.tensor([[0.3, -0.2], [0.3, 2.0]])
    assert torch.equal(F.l1_prox(w, 0.3) == 0, torch.tensor([[True, True], [True, False]]))
    assert torch.equal(F.elastic_net_prox(w, 1.0, 0.3) == 0, torch.tensor([[True, True], [True, False]]))
    assert torch.equal(F.group_lasso_prox(w, 0.3) == 0, torch.tensor([[True, True], [False, False]]))
    assert not (F.l2_prox(w, 1e6) == 0).any()


def test_soft_threshold_at_known_numbers(device):
    w = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0], device=device)
    assert F.soft_threshold(w, 1.0).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    per_element = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.25, 2.0, 3.0], device=device)
    assert F.soft_threshold(w, per_element).tolist() == [-2.0, -1.0, 0.0, 0.0, 0.25, 0.0, 0.0]
    assert F.soft_threshold(torch.tensor([3 + 4j]), 2.5).tolist() == pytest.approx([1.5 + 2j])


@pytest.mark.parametrize("kind", ALL)
def test_nan_and_inf_stay_visible(kind, device):
    w = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [1.0, 1.0]], device=device)
    v = prox(kind, w, 0.1)
    assert v[0, 0].isnan()
    assert not v[1, 0].isfinite()
    assert v[2].isfinite().all()
    assert value(kind, w).isnan()
    assert grad(kind, w)[0, 0].isnan()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(kind, dtype, device):
    w = torch.randn(8, 32, device=device).to(dtype)
    wide = w.float()
    assert value(kind, w).dtype == torch.float32
    torch.testing.assert_close(value(kind, w), value(kind, wide))
    assert torch.equal(prox(kind, w, 0.01), prox(kind, wide, 0.01).to(dtype))
    assert torch.equal(grad(kind, w), grad(kind, wide).to(dtype))


@pytest.mark.parametrize("kind", ALL)
def test_float16_does_not_overflow(kind, device):
    w = torch.full((40, 40), 1000.0, dtype=torch.float16, device=device)
    torch.testing.assert_close(value(kind, w).double(), OMEGA[kind](w.double()), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad(kind, w).double(), grad(kind, w.double()), rtol=1e-3, atol=0)
    assert prox(kind, w, 1.0).isfinite().all()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3), (3, 0)])
def test_any_shape(kind, shape):
    if kind == "GroupLasso" and not shape:
        pytest.skip("a number has no dimension for groups to lie along")
    w = torch.randn(shape)
    assert value(kind, w).isfinite()
    assert value(kind, w).shape == ()
    assert grad(kind, w).shape == prox(kind, w, 0.1).shape == shape


@pytest.mark.parametrize(("groups", "dim"), [("output", 0), ("input", 1), (0, 0), (1, 1), (2, 2), (-1, 2)])
def test_groups_lie_along_a_dimension(groups, dim):
    w = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(group_lasso(w, dim), w)
    w = w.detach()
    torch.testing.assert_close(F.group_lasso_value(w, groups), group_lasso(w, dim))
    torch.testing.assert_close(F.group_lasso_grad(w, groups), expected)
    assert_minimal(
        lambda v: proximal_objective(lambda x: group_lasso(x, dim), v, w, 0.3), F.group_lasso_prox(w, 0.3, groups)
    )


@pytest.mark.parametrize(
    "function", [F.group_lasso_value, F.group_lasso_grad, lambda w, g: F.group_lasso_prox(w, 0.1, g)]
)
def test_groups_that_a_tensor_does_not_have_are_refused(function):
    with pytest.raises(ValueError, match="dimension"):
        function(torch.randn(3), "input")
    with pytest.raises(ValueError, match="dimension"):
        function(torch.randn(3, 2), 2)
    with pytest.raises(ValueError, match=r"output.*input"):
        function(torch.randn(3, 2), "rows")
    with pytest.raises(TypeError):
        function(torch.randn(3, 2), 1.0)


@pytest.mark.parametrize("kind", ALL)
def test_inputs_are_left_alone(kind):
    w = torch.randn(3, 4)
    before = w.clone()
    value(kind, w), grad(kind, w), prox(kind, w, 0.1)
    assert torch.equal(w, before)


@pytest.mark.parametrize("kind", ALL)
def test_functions_of_torch_func(kind):
    w = torch.randn(5, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(partial(value, kind))(w), torch.stack([value(kind, x) for x in w]))
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(partial(value, kind)))(w), torch.stack([grad(kind, x) for x in w])
    )
    torch.testing.assert_close(
        torch.vmap(lambda x: prox(kind, x, 0.2))(w), torch.stack([prox(kind, x, 0.2) for x in w])
    )
