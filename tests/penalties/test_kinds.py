"""The kinds against their definitions: value, gradient, shape, dtypes, and what they cannot do."""

import math

import pytest
import torch
from helpers.functions import grad, prox, value
from helpers.kinds import KINDS, RATIO, RHO
from torch import nn

from torch_regpen import L0, L1, MCP, SCAD, LHalf, LogSum, RegularizedOptimizer

EACH = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Capped"])


def penalty(kind, lam=1.0):
    return KINDS[kind](nn.Linear(2, 2), lam)


# Value and gradient


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_value_and_gradient_are_those_of_the_definition(kind, dtype):
    w = torch.randn(200, dtype=dtype)
    w[:20] = 0
    w.requires_grad_()
    definition = RHO[kind](w[20:].abs()).sum()
    (expected,) = torch.autograd.grad(definition, w)
    torch.testing.assert_close(value(kind, w.detach()), definition.detach())
    torch.testing.assert_close(grad(kind, w.detach()), expected)


@EACH
def test_the_value_alone_can_be_differentiated_at_zero_too(kind):
    w = torch.tensor([0.0, 0.2, -0.7], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(kind, w), w)
    torch.testing.assert_close(gradient, grad(kind, w.detach()))


@EACH
def test_the_functions_of_magnitudes_are_those_of_the_class(kind):
    u = torch.cat([torch.zeros(1), torch.rand(50, dtype=torch.float64)])
    of_class = penalty(kind)
    torch.testing.assert_close(of_class.rho(u), RHO[kind](u))
    torch.testing.assert_close(of_class.rho(u).sum(), value(kind, u))
    torch.testing.assert_close(of_class.rho_grad(u)[1:], grad(kind, u)[1:])
    torch.testing.assert_close(of_class.rho_prox(u, 0.1), prox(kind, u, 0.1))


@EACH
def test_the_right_derivative_at_zero(kind):
    slope = penalty(kind).rho_grad(torch.zeros((), dtype=torch.float64)).item()
    known = {"L1": 1, "L2": 0, "ElasticNet": RATIO, "MCP": 1, "SCAD": 1, "LogSum": 1, "LHalf": math.inf, "L0": math.inf}
    assert slope == known[kind]
    if slope < math.inf:
        u = torch.tensor(1e-9, dtype=torch.float64)
        assert (RHO[kind](u) / u).item() == pytest.approx(slope, abs=1e-6)


def test_the_usual_notation_of_mcp_scad_and_log_sum():
    x, lam = torch.linspace(-3, 3, 601, dtype=torch.float64), 0.7
    u = x.abs()
    gamma = 2.5  # Zhang 2010: lambda |x| - x^2 / (2 gamma) up to gamma lambda, then gamma lambda^2 / 2
    usual = torch.where(u <= gamma * lam, lam * u - u**2 / (2 * gamma), torch.tensor(gamma * lam**2 / 2).double())
    torch.testing.assert_close(MCP([x], lam, knee=gamma * lam).rho(u) * lam, usual)
    a = 3.7  # Fan and Li 2001, by its derivative: lambda up to lambda, then (a lambda - u)_+ / (a - 1)
    slope = lam * torch.where(u <= lam, torch.ones_like(u), (a * lam - u).clamp_min(0) / ((a - 1) * lam))
    ours = SCAD([x], lam, knee=a * lam, a=a)
    torch.testing.assert_close(ours.rho_grad(u) * lam, slope)
    fine = torch.linspace(0, 3, 300001, dtype=torch.float64)
    torch.testing.assert_close(ours.rho(fine[-1]), torch.trapezoid(ours.rho_grad(fine), fine), rtol=1e-8, atol=0)
    alpha, eps = 0.3, 0.2  # Candes, Wakin and Boyd 2008: alpha log(1 + u/eps)
    torch.testing.assert_close(LogSum([x], alpha / eps, eps=eps).rho(u) * alpha / eps, alpha * (1 + u / eps).log())


def test_the_shape_does_not_move_with_lambda():
    w = torch.linspace(-1, 1, 101, dtype=torch.float64)
    for kind in KINDS:
        one = KINDS[kind]([w], 1.0)
        torch.testing.assert_close(KINDS[kind]([w], 3.0)(), 3 * one())
    assert MCP([w], 1.0).knee == SCAD([w], 1.0).knee == 0.1
    assert SCAD([w], 1.0).a == 3.7
    assert LogSum([w], 1.0).eps == 0.05


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(("cls", "name"), [(MCP, "knee"), (SCAD, "knee"), (SCAD, "a"), (LogSum, "eps")])
def test_a_shape_that_is_none_is_refused(cls, name, bad):
    with pytest.raises(ValueError, match=name):
        cls(nn.Linear(2, 2), 0.1, **{name: bad})


def test_scad_needs_an_a_above_1():
    with pytest.raises(ValueError, match="a must be more than 1"):
        SCAD(nn.Linear(2, 2), 0.1, a=1.0)
    with pytest.raises(TypeError):
        MCP(nn.Linear(2, 2), 0.1, gamma=3.0)


# Half types, NaN, inf


@EACH
def test_nan_and_inf_stay_visible(kind):
    w = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    for t in (0.0, 0.1, 5.0):
        v = prox(kind, w, t)
        assert v[0].isnan()
        assert not v[1:3].isfinite().any()
        assert v[3].isfinite()
    assert value(kind, w).isnan()
    assert not value(kind, w[1:]).isfinite() or kind in ("MCP", "SCAD", "L0")  # these are flat
    assert grad(kind, w)[0].isnan()


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_rounded_once(kind, dtype):
    w = torch.randn(300).to(dtype)
    assert value(kind, w).dtype == torch.float32
    torch.testing.assert_close(value(kind, w), value(kind, w.float()))
    assert torch.equal(grad(kind, w), grad(kind, w.float()).to(dtype))
    for t in (1e-6, 0.05, torch.tensor(0.3)):
        assert torch.equal(prox(kind, w, t), prox(kind, w.float(), t).to(dtype))


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_dtype_and_shape_stay(kind, dtype):
    for shape in ((), (0,), (3,), (2, 1, 3)):
        w = torch.randn(shape).to(dtype)
        assert prox(kind, w, 0.1).dtype == grad(kind, w).dtype == dtype
        assert prox(kind, w, 0.1).shape == grad(kind, w).shape == shape
        assert value(kind, w).shape == ()
        assert value(kind, w).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# Kinds that cannot do everything


def test_l0_has_no_gradient_and_says_so():
    model = nn.Linear(3, 2)
    model.weight.grad = torch.zeros_like(model.weight)
    penalty = L0(model, 0.5)
    assert penalty().item() == 3.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for mode in ("coupled", "decoupled"):
        with pytest.raises(ValueError, match="L0 has no gradient"):
            RegularizedOptimizer(optimizer, penalty, mode)
        with pytest.raises(ValueError, match="L0 has no gradient"):
            RegularizedOptimizer(optimizer, L1(model, 0.1) + penalty, mode)
    with pytest.raises(ValueError, match="L0 has no gradient"):
        penalty.add_grad_()
    with pytest.raises(ValueError, match="L0 has no gradient"):
        (model(torch.ones(1, 3)).sum() + penalty()).backward()
    with pytest.raises(ValueError, match="L0 has no gradient"):
        (L1(model, 0.1) + penalty)().backward()
    with torch.no_grad():
        model.weight[0] = 0
        assert penalty().item() == 1.5
    assert "1.5" in penalty.summary()
    for mode in ("proximal", "dual"):
        RegularizedOptimizer(optimizer, penalty, mode)


def test_l_half_takes_its_infinite_gradient_at_zero_as_zero():
    w = nn.Parameter(torch.tensor([0.0, 0.25, -4.0], dtype=torch.float64))
    penalty = LHalf([w], 0.5)
    (gradient,) = torch.autograd.grad(penalty(), w, create_graph=True)
    assert gradient.tolist() == [0, 0.5, -0.125]
    (second,) = torch.autograd.grad(gradient.sum(), w)
    assert second.tolist() == pytest.approx([0, -0.25 * 0.5 * 0.25**-1.5, -0.25 * 0.5 * 4**-1.5])


@EACH
def test_the_audit_of_elements_is_the_distance_to_their_subgradients(kind):
    w = nn.Parameter(torch.tensor([0.0, 0.3, -0.7], dtype=torch.float64))
    lam = 0.2
    penalty = KINDS[kind]([w], lam)
    slope = grad(kind, w.detach()) * lam
    at_zero = lam * penalty.rho_grad(torch.zeros((), dtype=torch.float64)).item()
    for g in (0.0, 0.01, 0.15, -0.5, 7.0):
        w.grad = -slope + torch.tensor([g, 0.0, 0.0], dtype=torch.float64)
        assert penalty.stationarity().item() == pytest.approx(max(abs(g) - at_zero, 0), abs=1e-15)
        w.grad = -slope + torch.tensor([0.0, 0.0, g], dtype=torch.float64)
        assert penalty.stationarity().item() == pytest.approx(abs(g), abs=1e-15)
    penalty.lam = 0.0
    w.grad = torch.tensor([0.5, 0.1, 0.2], dtype=torch.float64)
    assert penalty.stationarity().item() == 0.5  # nothing is absorbed, by an infinite slope either
