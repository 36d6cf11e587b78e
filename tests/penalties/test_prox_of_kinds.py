"""The prox of each kind: by brute force, and by what makes a map a prox."""

import math

import pytest
import torch
from helpers.functions import prox
from helpers.kinds import CONVEX, KINDS, KNEE, RATIO, RHO, A, log_sum, mcp, scad
from helpers.oracles import least
from torch import nn

from torch_regpen import functional as F
from torch_regpen.scalar import ScalarElasticNet, ScalarL0, ScalarLHalf, ScalarLogSum, ScalarMCP, ScalarSCAD

EACH = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Capped"])
NON_CONVEX = pytest.mark.parametrize("kind", ["MCP", "SCAD", "LogSum", "LHalf", "L0"])


# Prox: brute force


def having(scalar, **attributes):
    """A scalar penalty with a tensor of shapes in place of a number: all at once."""
    penalty = scalar.__new__(scalar)
    vars(penalty).update(attributes)
    return penalty


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
        "L1": (RHO["L1"], ScalarElasticNet(1.0, 0.0).rho_prox),
        "L2": (RHO["L2"], ScalarElasticNet(0.0, 1.0).rho_prox),
        "ElasticNet": (RHO["ElasticNet"], ScalarElasticNet(RATIO, 1 - RATIO).rho_prox),
        "MCP": (lambda v: mcp(v, column), lambda u, t: having(ScalarMCP, knee=shape.to(u.dtype)).rho_prox(u, t)),
        "SCAD": (
            lambda v: scad(v, knee[:, None], a[:, None]),
            lambda u, t: having(ScalarSCAD, knee=knee.to(u.dtype), a=a.to(u.dtype)).rho_prox(u, t),
        ),
        "LogSum": (
            lambda v: log_sum(v, column),
            lambda u, t: having(ScalarLogSum, eps=shape.to(u.dtype)).rho_prox(u, t),
        ),
        "LHalf": (RHO["LHalf"], ScalarLHalf().rho_prox),
        "L0": (RHO["L0"], ScalarL0().rho_prox),
    }[kind]


@EACH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_prox_is_the_minimiser_on_a_grid_for_any_shape_step_and_weight(kind, dtype, tolerance):
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
def test_prox_grows_with_the_weight_and_falls_with_the_step(kind):
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
    torch.testing.assert_close(KINDS[kind](nn.Linear(2, 2), 1.0).rho_prox(w.abs(), t) * w.sign(), one_by_one)


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
def test_convex_prox_is_nonexpansive_and_obeys_its_inequality(kind, t):
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
