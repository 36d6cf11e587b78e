"""The value of a penalty, and add_grad_, which adds its gradient."""

import math

import pytest
import torch
from helpers.kinds import BASIC, OMEGA, total_omega
from helpers.nets import network
from torch import nn

from torch_regpen import L1

LAM = 0.03
EACH = pytest.mark.parametrize("kind", BASIC)


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
    value = BASIC[kind](ws, LAM)()
    exact = LAM * total_omega(kind, [w.to(torch.complex128 if dtype.is_complex else torch.float64) for w in ws])
    assert (value.shape, value.dtype, value.device.type) == ((), expected, device.type)
    assert value.requires_grad
    torch.testing.assert_close(value, exact.to(expected))


@EACH
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float64), (torch.complex128, torch.float32)])
def test_value_is_float64_where_any_parameter_is(kind, dtypes, device):
    ws = [torch.randn(4, 3, device=device, dtype=dtype, requires_grad=True) for dtype in dtypes]
    assert BASIC[kind](ws, LAM)().dtype == torch.float64
    assert BASIC[kind](ws[::-1], LAM)().dtype == torch.float64


@EACH
def test_value_on_the_meta_device(kind):
    model = network("meta")
    value = BASIC[kind](model, LAM)()
    assert (value.device.type, value.shape, value.dtype) == ("meta", (), torch.float32)
    value.backward()
    assert model[0].weight.grad.is_meta


@EACH
def test_value_with_lambda_zero(kind, device):
    model = network(device)
    value = BASIC[kind](model, 0)()
    value.backward()
    assert (value.item(), value.device.type) == (0.0, device.type)
    assert not model[0].weight.grad.any()


@EACH
@pytest.mark.parametrize("shape", [(1500, 2000), (3, 1000, 1000), (2000, 7)])
def test_value_of_many_elements_is_that_in_float64(kind, shape, device):
    w = torch.randn(shape, device=device, requires_grad=True)
    expected = LAM * OMEGA[kind](w.detach().double()).item()
    assert BASIC[kind]([w], LAM)().item() == pytest.approx(expected, rel=1e-6)


@EACH
def test_value_of_many_tensors_of_many_sizes(kind, device):
    shapes = [(n % 7 + 1, n % 5 + 1) for n in range(300)] + [(600, 500), (300, 250), (1, 1)] * 2
    ws = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    expected = LAM * sum(OMEGA[kind](w.detach().double()).item() for w in ws)
    assert BASIC[kind](ws, LAM)().item() == pytest.approx(expected, rel=1e-6)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_of_half_types_neither_overflows_nor_loses_digits(kind, dtype, device):
    w = torch.randn(1000, 300, device=device).mul(50).to(dtype).requires_grad_()
    value = BASIC[kind]([w], LAM)()
    assert value.item() == pytest.approx(LAM * OMEGA[kind](w.detach().double()).item(), rel=1e-5)


@EACH
def test_nan_and_inf_show_in_the_value(kind):
    model = network()
    penalty = BASIC[kind](model, LAM)
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
    penalty = BASIC[kind]([empty, transposed], LAM)
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
        torch.testing.assert_close(BASIC[kind]([number], LAM)(), LAM * OMEGA[kind](number))


# add_grad_


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_add_grad_adds_the_gradient_in_place(kind, dtype, device):
    ws = [torch.randn(4, 3, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    penalty = BASIC[kind](ws, LAM)
    expected = torch.autograd.grad(LAM * total_omega(kind, ws), ws)
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
    penalty = BASIC[kind](model, LAM)
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
    BASIC[kind](model, LAM).add_grad_()
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
    BASIC[kind](model, LAM).add_grad_()
    assert not model[0].weight.grad.any()
    assert not model[2].weight.grad[1:].any()
    assert model[2].weight.grad[0].all()


@EACH
def test_add_grad_of_large_and_many_tensors(kind, device):
    shapes = [(600, 500)] + [(3, 4)] * 50
    ws = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    expected = torch.autograd.grad(LAM * total_omega(kind, ws), ws)
    for w in ws:
        w.grad = torch.zeros_like(w)
    BASIC[kind](ws, LAM).add_grad_()
    torch.testing.assert_close([w.grad for w in ws], list(expected))


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_add_grad_of_half_types(kind, dtype, device):
    w = torch.randn(6, 8, device=device).to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(LAM * OMEGA[kind](wide := w.detach().float().requires_grad_()), wide)
    w.grad = torch.zeros_like(w)
    BASIC[kind]([w], LAM).add_grad_()
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
