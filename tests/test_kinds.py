"""Each kind's scalar function, its derivative and its prox, against the definition."""

import math

import pytest
import torch
from definitions import CONVEX, EPS, KINDS, KNEE, RATIO, RHO, A, least, log_sum, mcp, scad
from torch import nn

from torch_regpen import L0, L1, MCP, SCAD, LHalf, LogSum, RegularizedOptimizer
from torch_regpen import functional as F

FUNCTIONAL = {
    "L1": (F.l1_value, F.l1_grad, F.l1_prox, {}),
    "L2": (F.l2_value, F.l2_grad, F.l2_prox, {}),
    "ElasticNet": (F.elastic_net_value, F.elastic_net_grad, F.elastic_net_prox, {"l1_ratio": RATIO}),
    "MCP": (F.mcp_value, F.mcp_grad, F.mcp_prox, {"knee": KNEE}),
    "SCAD": (F.scad_value, F.scad_grad, F.scad_prox, {"knee": KNEE, "a": A}),
    "LogSum": (F.log_sum_value, F.log_sum_grad, F.log_sum_prox, {"eps": EPS}),
    "LHalf": (F.l_half_value, F.l_half_grad, F.l_half_prox, {}),
    "L0": (F.l0_value, F.l0_grad, F.l0_prox, {}),
}

EACH = pytest.mark.parametrize("kind", FUNCTIONAL)
NON_CONVEX = pytest.mark.parametrize("kind", ["MCP", "SCAD", "LogSum", "LHalf", "L0"])


def value(kind, w):
    function, _, _, shape = FUNCTIONAL[kind]
    return function(w, **shape)


def grad(kind, w):
    _, function, _, shape = FUNCTIONAL[kind]
    return function(w, **shape)


def prox(kind, w, t):
    _, _, function, shape = FUNCTIONAL[kind]
    return function(w, t, **shape)


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


# Prox: brute force


def settings(kind, n=560):
    """Shapes, steps times lambda and magnitudes, from tiny to huge, with the borders between cases among them."""
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))

    def draw(low, high):
        exponent = low + (high - low) * torch.rand(n, dtype=torch.float64, generator=generator)
        return 10**exponent

    shape, t, u = draw(-2, 1), draw(-4, 3), draw(-4, 3)
    a = 1 + draw(-1, 1)
    border = torch.arange(n) % 8
    t = torch.where(border == 0, 0.0, t)
    t = torch.where(border == 1, shape, t)
    t = torch.where(border == 2, (a - 1) * shape, t)
    t = torch.where(border == 3, (a + 1) * shape, t)
    t = torch.where(border == 4, shape * (1 + 1e-3 * torch.randn(n, dtype=torch.float64, generator=generator)), t)
    u = torch.where(torch.arange(n) % 7 == 0, 0.0, u)
    u = torch.where(torch.arange(n) % 7 == 1, (t * shape).sqrt() * (1 + 0.1 * torch.rand(n, generator=generator)), u)
    u = torch.where(torch.arange(n) % 7 == 2, t + shape * torch.rand(n, generator=generator), u)
    return shape, a, t, u


def rho_and_prox(kind, shape, a):
    """The definition, on a grid of a row for each shape, and our prox."""
    column = shape[:, None]
    knee = shape * a  # SCAD falls from `shape` on
    return {
        "L1": (RHO["L1"], lambda u, t: F.elastic_net_rho_prox(u, t, 1.0, 0.0)),
        "L2": (RHO["L2"], lambda u, t: F.elastic_net_rho_prox(u, t, 0.0, 1.0)),
        "ElasticNet": (RHO["ElasticNet"], lambda u, t: F.elastic_net_rho_prox(u, t, RATIO, 1 - RATIO)),
        "MCP": (lambda v: mcp(v, column), lambda u, t: F.mcp_rho_prox(u, t, shape.to(u.dtype))),
        "SCAD": (
            lambda v: scad(v, knee[:, None], a[:, None]),
            lambda u, t: F.scad_rho_prox(u, t, knee.to(u.dtype), a.to(u.dtype)),
        ),
        "LogSum": (lambda v: log_sum(v, column), lambda u, t: F.log_sum_rho_prox(u, t, shape.to(u.dtype))),
        "LHalf": (RHO["LHalf"], F.l_half_rho_prox),
        "L0": (RHO["L0"], F.l0_rho_prox),
    }[kind]


@EACH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_prox_is_the_minimiser_on_a_fine_grid_for_any_shape_step_and_weight(kind, dtype, tolerance):
    shape, a, t, u = settings(kind)
    rho, rho_prox = rho_and_prox(kind, shape, a)

    def objective(v):
        return 0.5 * (v - u[:, None]) ** 2 + t[:, None] * rho(v)

    best = torch.minimum(least(objective, torch.zeros_like(u), u), objective(torch.zeros(len(u), 1).double())[:, 0])
    v = rho_prox(u.to(dtype), t.to(dtype)).double()
    assert ((v >= 0) & (v <= u * (1 + tolerance))).all()
    excess = objective(v[:, None])[:, 0] - best
    worst = excess.sub(tolerance * u**2).argmax()
    assert (excess <= tolerance * u**2).all(), (shape[worst], a[worst], t[worst], u[worst], v[worst], excess[worst])


@EACH
def test_prox_does_not_fall_where_the_weight_grows_nor_rise_where_the_step_does(kind):
    u = torch.linspace(0, 3, 2001, dtype=torch.float64)
    for t in (0.0, 0.01, 0.2, KNEE, 0.5, 1.5):
        assert (prox(kind, u, t).diff() >= -1e-12).all()
    for w in (0.1, 0.5, 2.0):
        v = torch.stack([prox(kind, torch.tensor(w).double(), t) for t in torch.linspace(0, 3, 301).tolist()])
        assert (v.diff() <= 1e-12).all()


@EACH
def test_a_step_for_each_element(kind):
    w, t = torch.randn(40, dtype=torch.float64), 2 * torch.rand(40, dtype=torch.float64)
    one_by_one = torch.stack([prox(kind, x, y.item()) for x, y in zip(w, t, strict=True)])
    torch.testing.assert_close(penalty(kind).rho_prox(w.abs(), t) * w.sign(), one_by_one)


@EACH
@pytest.mark.parametrize("t", [0.0, 0.1, 0.6])
def test_prox_of_complex_numbers_goes_by_modulus(kind, t):
    w = torch.randn(100, dtype=torch.complex128)
    v = prox(kind, w, t)
    torch.testing.assert_close(v.abs(), prox(kind, w.abs(), t))
    torch.testing.assert_close(v * w.abs(), w * v.abs())


@EACH
def test_prox_with_no_step_changes_nothing(kind):
    w = torch.cat([torch.zeros(3), 10.0 ** torch.arange(-37, 38)]).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(prox(kind, w, 0.0), w, rtol=3e-7, atol=0)
    torch.testing.assert_close(prox(kind, w.double(), torch.zeros(())), w.double(), rtol=1e-14, atol=0)


@EACH
def test_nothing_overflows_from_the_least_to_the_largest_number(kind):
    for dtype in (torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        u = torch.tensor([limits.tiny, limits.eps, 1.0, limits.max**0.5, limits.max / 4], dtype=dtype)
        for t in (0.0, limits.tiny, 1e-3, 1.0, 1e10):
            v = prox(kind, u, t)
            assert ((v >= 0) & (v <= u * (1 + limits.eps * 4))).all(), (t, v)


@NON_CONVEX
def test_both_ends_of_a_jump_are_minimisers_and_the_smaller_is_taken(kind):
    t = 0.9
    low, high = torch.zeros((), dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    for _ in range(200):  # bisect to the two neighbouring numbers between which it jumps
        middle = (low + high) / 2
        low, high = (middle, high) if prox(kind, middle, t) <= 0.06 else (low, middle)
    below, above = prox(kind, low, t), prox(kind, high, t)
    assert high - low < 1e-14
    assert above - below > 0.1
    known = {
        "MCP": (t * KNEE) ** 0.5,
        "SCAD": ((A + 1) * KNEE / A * t) ** 0.5,
        "LHalf": 1.5 * t ** (2 / 3),
        "L0": (2 * t) ** 0.5,
    }
    if kind in known:
        assert low.item() == pytest.approx(known[kind], rel=1e-14)
    objective = [0.5 * (v - low) ** 2 + t * RHO[kind](v) for v in (below, above)]
    torch.testing.assert_close(*objective)


def test_the_thresholds_themselves_go_to_the_smaller_end():
    assert F.l0_prox(torch.tensor([2.0, -2.0, 2.0000002]), 2.0).tolist() == pytest.approx([0, 0, 2.0000002])
    assert F.mcp_prox(torch.tensor([2.0, 2.0000002]), 4.0, 1.0).tolist() == pytest.approx([0, 2.0000002])
    assert F.l_half_prox(torch.tensor([1.5, 1.5000002]), 1.0).tolist() == pytest.approx([0, 1.0])
    assert F.scad_prox(torch.tensor([4.0, 4.000001]), 8.0, 1.0, 1.0 + 1e-9).tolist() == pytest.approx([0, 4.000001])
    # SCAD jumps from above zero where (a-1)k < t < (a+1)k: here k = 1, a = 2, t = 2, at u = 2.5
    assert F.scad_prox(torch.tensor([2.5, 2.500001]), 2.0, 2.0, 2.0).tolist() == pytest.approx([0.5, 2.500001])


@EACH
def test_zeros_are_exact_and_so_is_what_is_left_alone(kind):
    t = 0.3
    w = torch.linspace(-2, 2, 4001)
    v = prox(kind, w, t)
    floor = {"L2": 0, "LogSum": 0.05, "LHalf": 0.4, "L0": 0.7}
    assert v[v != 0].abs().min() >= floor.get(kind, 1e-4)
    assert ((v == 0).sum() > 100) == (kind != "L2")
    if kind in ("MCP", "SCAD", "L0"):  # no bias on large weights
        assert torch.equal(v[w.abs() > 1], w[w.abs() > 1])


# Prox: what makes a prox one


@EACH
@pytest.mark.parametrize("t", [0.05, 0.35, 2.0])
def test_what_is_left_of_a_weight_is_stationary(kind, t):
    w = 3 * torch.randn(300, dtype=torch.float64)
    v = prox(kind, w, t)
    kept = v != 0
    x = v[kept].clone().requires_grad_()
    if kind == "L0":
        assert torch.equal(v[kept], w[kept])
        return
    (slope,) = torch.autograd.grad(RHO[kind](x.abs()).sum(), x)
    torch.testing.assert_close(w[kept] - v[kept], t * slope)
    if kind in CONVEX:
        assert (w[~kept].abs() <= t * RATIO if kind == "ElasticNet" else w[~kept].abs() <= t).all()


@pytest.mark.parametrize("kind", CONVEX)
@pytest.mark.parametrize("t", [0.01, 0.7, 20.0])
def test_convex_prox_is_firmly_nonexpansive_and_obeys_its_variational_inequality(kind, t):
    x, y, z = torch.randn(3, 500, dtype=torch.float64)
    p, q = prox(kind, x, t), prox(kind, y, t)
    assert ((p - q) ** 2 <= (p - q) * (x - y) + 1e-14).all()
    rho = RHO[kind]
    assert ((z - p) * (x - p) <= t * (rho(z.abs()) - rho(p.abs())) + 1e-12).all()


@pytest.mark.parametrize("kind", CONVEX)
@pytest.mark.parametrize("t", [0.02, 0.7, 9.0])
def test_moreau_with_the_prox_of_the_conjugate_by_brute_force(kind, t):
    """`w = prox_{t rho}(w) + t * prox_{rho*/t}(w/t)`, with `rho*` from its own definition."""
    conjugate = {  # sup_x xy - rho(|x|)
        "L1": lambda y: torch.where(y.abs() <= 1, 0.0, math.inf),
        "L2": lambda y: y**2 / 4,
        "ElasticNet": lambda y: (y.abs() - RATIO).clamp_min(0) ** 2 / (4 * (1 - RATIO)),
    }[kind]
    points = torch.linspace(-60, 60, 24001, dtype=torch.float64)
    for y in torch.tensor([-0.9, 0.2, 0.6]):  # the conjugates are what they claim to be
        torch.testing.assert_close(
            (y * points - RHO[kind](points.abs())).max(), conjugate(y).double(), atol=1e-4, rtol=0
        )
    w = 3 * torch.randn(50, dtype=torch.float64)
    dual = (w - prox(kind, w, t)) / t
    z = (w / t)[:, None]

    def objective(y):
        return 0.5 * (y - z) ** 2 + conjugate(y) / t

    bound = w.abs() / t + 1
    best = torch.minimum(least(objective, -bound, bound), objective(torch.tensor([[-1.0, 1.0]]).double()).amin(1))
    assert (objective(dual[:, None] * (1 - 1e-12))[:, 0] <= best + 1e-9 * (1 + best)).all()


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
def test_the_audit_of_elements_is_the_distance_to_the_interval_of_subgradients(kind):
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
