import copy
import fractions
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import KINDS, OMEGA, RATIO, assert_minimal, proximal_objective, scalar_minimiser
from torch import nn

from torch_regpen import L1, L2, ElasticNet, GroupLasso, Penalty

LAM = 0.03
EACH = pytest.mark.parametrize("kind", KINDS)


def network(device="cpu", dtype=torch.float32):
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(device, dtype)


def weights_of(model):
    return [model[0].weight, model[2].weight]


def omega(kind, tensors):
    return sum(OMEGA[kind](w) for w in tensors)


# Arguments


@EACH
def test_the_first_arguments_are_the_same_for_every_kind(kind):
    model = network()
    assert isinstance(KINDS[kind](model, LAM), Penalty)
    assert isinstance(KINDS[kind](model, LAM), nn.Module)
    assert KINDS[kind](params=model, lam=LAM, select="all").lam == LAM
    with pytest.raises(TypeError):
        KINDS[kind](model)
    for cls in (L1, L2, ElasticNet, GroupLasso):
        with pytest.raises(TypeError):
            cls(model, LAM, "all")
    parameters = list(inspect.signature(GroupLasso).parameters)
    assert parameters[:2] == ["params", "lam"]


@pytest.mark.parametrize(
    "lam", ["0.1", None, True, False, 1j, [0.1], torch.tensor(0.1), np.array(0.1), np.bool_(True)], ids=repr
)
def test_a_lambda_that_is_no_number_is_refused(lam):
    with pytest.raises(TypeError, match="lam"):
        L1(network(), lam)
    penalty = L1(network(), LAM)
    with pytest.raises(TypeError, match="lam"):
        penalty.lam = lam
    assert penalty.lam == LAM


@pytest.mark.parametrize("lam", [-1e-9, -1, math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_lambda_that_is_negative_or_not_finite_is_refused(lam):
    with pytest.raises(ValueError, match="lam"):
        L1(network(), lam)
    penalty = L1(network(), LAM)
    with pytest.raises(ValueError, match="lam"):
        penalty.lam = lam
    with pytest.raises(ValueError, match="lam"):
        penalty.param_groups[0]["lam"] = lam
    assert penalty.lam == LAM


@pytest.mark.parametrize(
    "lam", [0, 0.0, 2, 1e-300, np.float32(0.5), np.float64(0.5), np.int64(3), fractions.Fraction(1, 2)]
)
def test_any_number_is_a_lambda(lam):
    penalty = L1(network(), lam)
    assert isinstance(penalty.lam, float)
    assert penalty.lam == float(lam)
    penalty.lam = 0.25
    penalty.lam = lam
    assert penalty.lam == float(lam)


@pytest.mark.parametrize("l1_ratio", [-0.1, 1.1, math.nan])
def test_the_l1_ratio_is_a_share(l1_ratio):
    with pytest.raises(ValueError, match="l1_ratio"):
        ElasticNet(network(), LAM, l1_ratio=l1_ratio)


def test_the_elastic_net_is_half_and_half_unless_told_otherwise():
    model = network()
    half = 0.5 * L1(model, LAM)() + 0.5 * L2(model, LAM)()
    torch.testing.assert_close(ElasticNet(model, LAM)(), half)
    torch.testing.assert_close(ElasticNet(model, LAM, l1_ratio=1)(), L1(model, LAM)())
    torch.testing.assert_close(ElasticNet(model, LAM, l1_ratio=0)(), L2(model, LAM)())


def test_group_lasso_groups_by_output_unit_unless_told_otherwise():
    model = network()
    assert GroupLasso(model, LAM)() == GroupLasso(model, LAM, groups="output")()
    assert GroupLasso(model, LAM)() != GroupLasso(model, LAM, groups="input")()


# Lambda


@EACH
def test_lambda_can_be_set_at_any_time(kind):
    model = network(dtype=torch.float64)
    penalty = KINDS[kind](model, LAM)
    for lam in (0.5, 0, 7):
        penalty.lam = lam
        assert penalty.lam == penalty.param_groups[0]["lam"] == lam
        torch.testing.assert_close(penalty(), lam * omega(kind, weights_of(model)))


def test_there_is_a_dict_for_each_group_of_parameters_and_lam_sets_all():
    model = network()
    assert len(L1(model, LAM).param_groups) == 1
    penalty = L1([{"params": model[0], "lam": 0.5}, {"params": model[2]}], LAM)
    assert [group["lam"] for group in penalty.param_groups] == [0.5, LAM]
    penalty.param_groups[1]["lam"] = 0.25
    torch.testing.assert_close(penalty(), 0.5 * model[0].weight.abs().sum() + 0.25 * model[2].weight.abs().sum())
    penalty.lam = 1.0
    assert [group["lam"] for group in penalty.param_groups] == [1.0, 1.0]


@EACH
def test_no_cast_of_the_model_touches_lambda(kind):
    model = network()
    model.penalty = penalty = KINDS[kind](model, 1e-9)
    for cast in (model.half, penalty.half, penalty.bfloat16, model.float, lambda: penalty.to(torch.float16)):
        cast()
        assert penalty.lam == 1e-9
        assert penalty.state_dict()["_extra_state"].dtype == torch.float64


# It owns nothing


@EACH
def test_it_owns_no_parameter(kind):
    for penalty in (KINDS[kind](network(), LAM), KINDS[kind](network(), LAM) + L2(network(), LAM)):
        assert list(penalty.parameters()) == []
        assert list(penalty.buffers()) == []
    assert list(KINDS[kind](network(), LAM).children()) == []


def test_named_parameters_penalized_yields_names_and_the_parameters_themselves():
    model = network()
    pairs = dict(L1(model, LAM).named_parameters_penalized())
    assert pairs.keys() == {"0.weight", "2.weight"}
    assert pairs["0.weight"] is model[0].weight


# The value


@EACH
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
)
def test_value_is_lambda_times_omega_in_float32_or_float64(kind, dtype, expected, device):
    ws = [torch.randn(4, 3, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    value = KINDS[kind](ws, LAM)()
    exact = LAM * omega(kind, [w.to(torch.complex128 if dtype.is_complex else torch.float64) for w in ws])
    assert (value.shape, value.dtype, value.device.type) == ((), expected, device.type)
    assert value.requires_grad
    torch.testing.assert_close(value, exact.to(expected))


@EACH
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float64), (torch.complex128, torch.float32)])
def test_value_is_float64_where_any_parameter_is(kind, dtypes, device):
    ws = [torch.randn(4, 3, device=device, dtype=dtype, requires_grad=True) for dtype in dtypes]
    assert KINDS[kind](ws, LAM)().dtype == torch.float64
    assert KINDS[kind](ws[::-1], LAM)().dtype == torch.float64


@EACH
def test_value_on_the_meta_device(kind):
    model = network("meta")
    value = KINDS[kind](model, LAM)()
    assert (value.device.type, value.shape, value.dtype) == ("meta", (), torch.float32)
    value.backward()
    assert model[0].weight.grad.is_meta


@EACH
def test_value_with_lambda_zero(kind, device):
    model = network(device)
    value = KINDS[kind](model, 0)()
    value.backward()
    assert (value.item(), value.device.type) == (0.0, device.type)
    assert not model[0].weight.grad.any()


@EACH
@pytest.mark.parametrize("shape", [(1500, 2000), (3, 1000, 1000), (2000, 7)])
def test_value_of_many_elements_is_that_in_float64(kind, shape, device):
    w = torch.randn(shape, device=device, requires_grad=True)
    expected = LAM * OMEGA[kind](w.detach().double()).item()
    assert KINDS[kind]([w], LAM)().item() == pytest.approx(expected, rel=1e-6)


@EACH
def test_value_of_many_tensors_of_many_sizes(kind, device):
    shapes = [(n % 7 + 1, n % 5 + 1) for n in range(300)] + [(600, 500), (300, 250), (1, 1)] * 2
    ws = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    expected = LAM * sum(OMEGA[kind](w.detach().double()).item() for w in ws)
    assert KINDS[kind](ws, LAM)().item() == pytest.approx(expected, rel=1e-6)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_of_half_types_neither_overflows_nor_loses_digits(kind, dtype, device):
    w = torch.randn(1000, 300, device=device).mul(50).to(dtype).requires_grad_()
    value = KINDS[kind]([w], LAM)()
    assert value.item() == pytest.approx(LAM * OMEGA[kind](w.detach().double()).item(), rel=1e-5)


@EACH
def test_nan_and_inf_show_in_the_value(kind):
    model = network()
    penalty = KINDS[kind](model, LAM)
    with torch.no_grad():
        model[0].weight[1, 1] = math.inf
    assert penalty().item() == math.inf
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    assert penalty().isnan()


@EACH
def test_empty_and_scalar_and_noncontiguous_tensors(kind):
    empty = torch.zeros(3, 0, requires_grad=True)
    transposed = torch.randn(4, 6).t()[:, ::2].requires_grad_()
    penalty = KINDS[kind]([empty, transposed], LAM)
    torch.testing.assert_close(penalty(), LAM * OMEGA[kind](transposed))
    expected = [0.1 * torch.autograd.grad(OMEGA[kind](transposed), transposed)[0], torch.zeros(3, 0)]
    penalty.lam = 0.1
    for w in (empty, transposed):
        w.grad = torch.zeros_like(w)
    penalty.add_grad_()
    torch.testing.assert_close([transposed.grad, empty.grad], expected)
    penalty.prox_(0.1)
    assert penalty.stationarity().isfinite()
    assert len(penalty.summary().splitlines()) == 4
    if kind != "GroupLasso":
        number = torch.tensor(-2.0, requires_grad=True)
        torch.testing.assert_close(KINDS[kind]([number], LAM)(), LAM * OMEGA[kind](number))


# add_grad_


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_add_grad_adds_the_gradient_in_place(kind, dtype, device):
    ws = [torch.randn(4, 3, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    penalty = KINDS[kind](ws, LAM)
    expected = torch.autograd.grad(LAM * omega(kind, ws), ws)
    grads = [torch.randn_like(w) for w in ws]
    for w, g in zip(ws, grads, strict=True):
        w.grad = g.clone()
    places = [w.grad for w in ws]
    penalty.add_grad_()
    assert all(w.grad is place for w, place in zip(ws, places, strict=True))
    for w, g, extra in zip(ws, grads, expected, strict=True):
        torch.testing.assert_close(w.grad, g + extra)


@EACH
def test_add_grad_equals_the_penalty_in_the_loss(kind, device):
    model = network(device, torch.float64)
    penalty = KINDS[kind](model, LAM)
    x = torch.randn(8, 5, device=device, dtype=torch.float64)
    (model(x).square().mean() + penalty()).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    penalty.add_grad_()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@EACH
def test_add_grad_passes_over_parameters_without_grad(kind):
    model = network()
    model[2].weight.grad = torch.zeros_like(model[2].weight)
    KINDS[kind](model, LAM).add_grad_()
    assert model[0].weight.grad is None
    assert model[2].weight.grad.any()
    assert model[2].bias.grad is None


@EACH
def test_add_grad_adds_nothing_at_zero(kind):
    model = network()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[2].weight[1:])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    KINDS[kind](model, LAM).add_grad_()
    assert not model[0].weight.grad.any()
    assert not model[2].weight.grad[1:].any()
    assert model[2].weight.grad[0].all()


@EACH
def test_add_grad_of_large_and_many_tensors(kind, device):
    shapes = [(600, 500)] + [(3, 4)] * 50
    ws = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    expected = torch.autograd.grad(LAM * omega(kind, ws), ws)
    for w in ws:
        w.grad = torch.zeros_like(w)
    KINDS[kind](ws, LAM).add_grad_()
    torch.testing.assert_close([w.grad for w in ws], list(expected))


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_add_grad_of_half_types(kind, dtype, device):
    w = torch.randn(6, 8, device=device).to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(LAM * OMEGA[kind](wide := w.detach().float().requires_grad_()), wide)
    w.grad = torch.zeros_like(w)
    KINDS[kind]([w], LAM).add_grad_()
    torch.testing.assert_close(w.grad, expected.to(dtype))


def test_add_grad_accumulates_and_follows_lambda():
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    w.grad = torch.zeros(2)
    penalty = L1([w], 0.5)
    penalty.add_grad_()
    penalty.lam = 0.25
    penalty.add_grad_()
    assert w.grad.tolist() == [0.75, -0.75]


def test_add_grad_and_prox_are_not_recorded():
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    w.grad = torch.zeros(2)
    penalty = L1([w], 0.5)
    penalty.add_grad_()
    penalty.prox_(0.1)
    assert not w.grad.requires_grad
    assert w.is_leaf
    assert w.requires_grad


# prox_


def applied_prox(kind, w, lam, step):
    w = w.clone().requires_grad_()
    place = w.data_ptr()
    KINDS[kind]([w], lam).prox_(step)
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
    KINDS[kind]([{"params": w, "lam": lam} for w, lam in zip(ws, lams, strict=True)], 1.0).prox_(0.7)
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


# L2.from_weight_decay


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_from_weight_decay_is_the_weight_decay_of_torch(momentum):
    torchs, ours = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), None
    ours = copy.deepcopy(torchs)
    penalty = L2.from_weight_decay(ours, 0.1)
    assert (penalty.lam, isinstance(penalty, L2)) == (0.05, True)
    x = torch.randn(6, 5)
    optimizers = [
        torch.optim.SGD(torchs.parameters(), lr=0.1, momentum=momentum, weight_decay=0.1),
        torch.optim.SGD(ours.parameters(), lr=0.1, momentum=momentum),
    ]
    for _ in range(5):
        for model, optimizer, extra in ((torchs, optimizers[0], 0.0), (ours, optimizers[1], penalty())):
            optimizer.zero_grad()
            (model(x).square().sum() + extra).backward()
            optimizer.step()
    torch.testing.assert_close(list(ours.parameters()), list(torchs.parameters()))


def test_from_weight_decay_takes_what_a_penalty_takes():
    model = network()
    everything = (0.05 * sum(p.square().sum() for p in model.parameters())).detach()
    of_weights = (0.05 * sum(w.square().sum() for w in weights_of(model))).detach()
    for params in (model, model.parameters(), model.named_parameters(), [{"params": model}]):
        torch.testing.assert_close(L2.from_weight_decay(params, 0.1)().detach(), everything)
    torch.testing.assert_close(L2.from_weight_decay([{"params": model.parameters()}], 0.1)().detach(), everything)
    for select in ("weights", None, "*.weight"):
        torch.testing.assert_close(L2.from_weight_decay(model, 0.1, select=select)().detach(), of_weights)
    torch.testing.assert_close(
        L2.from_weight_decay([{"params": model, "select": "weights"}], 0.1)().detach(), of_weights
    )
    single = torch.tensor([2.0], requires_grad=True)
    assert L2.from_weight_decay(single, 0.5)().item() == 1.0
    with pytest.raises(ValueError, match="select"):
        L2.from_weight_decay(model.parameters(), 0.1, select="*.weight")
    with pytest.raises(ValueError, match="lam"):
        L2.from_weight_decay(model, -0.1)
    with pytest.raises(TypeError):
        L2.from_weight_decay(model, "0.1")


# restricted_to


@EACH
def test_restricted_to_is_the_same_penalty_on_what_an_optimizer_owns(kind):
    model = network(dtype=torch.float64)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam([{"params": model[2].bias}, {"params": model[2].weight}], lr=0.1)
    penalty = KINDS[kind](model, LAM)
    halves = [penalty.restricted_to(first), penalty.restricted_to(second)]
    assert [[name for name, _ in half.named_parameters_penalized()] for half in halves] == [["0.weight"], ["2.weight"]]
    torch.testing.assert_close(halves[0]() + halves[1](), penalty())
    torch.testing.assert_close(halves[0](), LAM * OMEGA[kind](model[0].weight))
    assert len(list(penalty.named_parameters_penalized())) == 2  # it is as it was


def test_restricted_to_shares_lambda_both_ways():
    model = network()
    penalty = L1(model, LAM)
    half = penalty.restricted_to(torch.optim.SGD(model[0].parameters(), lr=0.1))
    penalty.lam = 0.5
    assert half.lam == 0.5
    half.lam = 0.25
    assert penalty.lam == 0.25
    half.param_groups[0]["lam"] = 0.125
    assert penalty.lam == 0.125


def test_restricted_to_keeps_the_lambdas_of_groups_apart():
    model = network()
    penalty = L1([{"params": model[0], "lam": 0.5}, {"params": model[2], "lam": 0.25}], LAM)
    half = penalty.restricted_to(torch.optim.SGD(model[2].parameters(), lr=0.1))
    torch.testing.assert_close(half(), 0.25 * model[2].weight.abs().sum())
    penalty.param_groups[1]["lam"] = 1.0
    torch.testing.assert_close(half(), model[2].weight.abs().sum())


def test_restricted_to_an_optimizer_that_owns_none_is_refused():
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    model = network()
    for penalty in (L1(model, LAM), L1(model, LAM) + L2(model, LAM)):
        with pytest.raises(ValueError, match="SGD owns none"):
            penalty.restricted_to(other)


# What it says of itself


@EACH
def test_repr_says_what_it_holds(kind):
    penalty = KINDS[kind](network(), 0.0125)
    text = repr(penalty)
    assert text.startswith(kind)
    assert "0.0125" in text
    assert "0.weight" in text
    assert "2.weight" in text
    assert "bias" not in text
    penalty.lam = 0.75
    assert "0.75" in repr(penalty)


def test_repr_says_the_groups_and_stays_short():
    assert "output" in repr(GroupLasso(network(), LAM))
    assert "input" in repr(GroupLasso(network(), LAM, groups="input"))
    many = L1(nn.Sequential(*[nn.Linear(2, 2) for _ in range(100)]), LAM)
    assert len(repr(many)) < 200
    assert "100 parameters" in repr(many)
    grouped = L1([{"params": network(), "lam": 0.5}, {"params": network(), "lam": 0.25}], LAM)
    assert "0.5" in repr(grouped)
    assert "0.25" in repr(grouped)


def rows(penalty):
    return [line.split() for line in penalty.summary().splitlines()[1:-1]]


@EACH
def test_summary_has_a_row_for_each_parameter(kind, device):
    model = network(device)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2, 0] = 0
    table = KINDS[kind](model, 0.5).summary()
    first, second, _ = table.splitlines()[1:]
    assert ("0.weight" in first, "2.weight" in second) == (True, True)
    assert ("(4, 5)" in first, "(3, 4)" in second) == (True, True)
    assert (" 0.5 " in first, " 0.5 " in second) == (True, True)
    value = 0.5 * OMEGA[kind](model[0].weight).item()
    assert any(cell == pytest.approx(value, rel=1e-4) for cell in map(float, numbers_of(first)))
    assert ("6/20" in first, "0/12" in second) == (True, True)
    for word in ("shape", "lam", "value", "zero"):
        assert word in table.splitlines()[0]


def numbers_of(line):
    return [cell for cell in line.split() if cell.replace(".", "").replace("e-", "").isdigit()]


def test_summary_counts_whole_groups_that_are_zero():
    model = network()
    with torch.no_grad():
        model[0].weight[1:3] = 0

    def counts(penalty):
        return [row[-1].split("/")[0] for row in rows(penalty)]

    assert counts(GroupLasso(model, LAM)) == ["2", "0"]
    assert counts(GroupLasso(model, LAM, groups="input")) == ["0", "0"]
    assert counts(L1(model, LAM)) == ["-", "-"]


def test_summary_on_the_meta_device_says_what_is_selected():
    penalty = L1(network("meta"), LAM)
    assert [row[0] for row in rows(penalty)] == [name for name, _ in penalty.named_parameters_penalized()]


def test_summary_of_a_sum_and_of_nothing():
    model = network()
    both = L1(model, LAM) + GroupLasso(model, LAM)
    assert len(rows(both)) == 4
    assert {row[1] for row in rows(both)} == {"L1", "GroupLasso"}
    model[0].requires_grad_(False)
    assert len(rows(both)) == 2
    model.requires_grad_(False)  # as of an average: then all are meant
    assert len(rows(both)) == 4
