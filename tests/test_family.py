"""The product: every kind over every grouping, with its options, in the loss, in every mode and in the audit."""

import math

import pytest
import torch
from definitions import CONVEX, GROUPED, GROUPS, KINDS, RHO, Capped, Case, members, proxed
from oracles import assert_minimal
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from torch_regpen import (
    L0,
    L1,
    L2,
    MCP,
    ElasticNet,
    GroupLasso,
    LHalf,
    NuclearNorm,
    Orthogonal,
    Penalty,
    RegularizedOptimizer,
    SparseGroupLasso,
)
from torch_regpen import functional as F
from torch_regpen.groups import Blocks, Heads, SingularValues

LAM = 0.3
LR = 0.2

kinds = pytest.mark.parametrize("kind", KINDS)
names = pytest.mark.parametrize("name", GROUPS)
options = pytest.mark.parametrize("option", ["plain", "unscaled", "moved"])


# In the loss


@kinds
@names
@options
def test_value_and_gradient(kind, name, option):
    case = Case(kind, name, option)
    w = nn.Parameter(case.weight())
    penalty = case.penalty(w, LAM)
    torch.testing.assert_close(penalty(), LAM * case.omega(w))
    if kind == "L0":
        return
    by_autograd = torch.autograd.grad(penalty(), w)[0]
    w.grad = torch.ones_like(w)
    penalty.add_grad_()
    torch.testing.assert_close(w.grad - 1, by_autograd)
    x = case.offset(w.detach())
    if name == "singular values":
        left, values, right = torch.linalg.svd(x, full_matrices=False)
        kept = (values > 0.1).nonzero()[:, 0]
        assert len(kept) == 1
        expected = left[:, kept] * LAM * penalty.rho_grad(values[kept]) @ right[kept]
    else:
        p = w.detach().clone().requires_grad_()
        expected = torch.autograd.grad(LAM * case.omega(p), p)[0].masked_fill(x == 0, 0)
    torch.testing.assert_close(by_autograd, expected)
    at = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))  # away from kinks
    penalty = case.penalty(at, LAM)
    assert gradcheck(lambda _: penalty(), (at,), fast_mode=True)
    if option == "moved":
        assert gradgradcheck(lambda _: penalty(), (at,), fast_mode=True)


# Prox


@kinds
@names
@options
@pytest.mark.parametrize("t", [0.05, 1.0])
def test_nothing_near_or_far_is_better_than_the_prox(kind, name, option, t):
    case = Case(kind, name, option)
    w = case.weight()
    p = nn.Parameter(w.clone())
    case.penalty(p, t / LR).prox_(LR)
    assert_minimal(lambda v: 0.5 * (v - w).square().sum() + t * case.omega(v), p.detach(), tries=14)
    zero = torch.zeros_like(w) if case.center is None else case.center
    still = case.offset(w) == 0
    if name == "elements":
        assert torch.equal(p.detach()[still], zero[still])


@pytest.mark.parametrize("kind", CONVEX)
@names
def test_convex_prox_is_firmly_nonexpansive(kind, name):
    for t in (0.01, 0.4, 5.0):
        x, y = torch.randn(2, 4, 6, dtype=torch.float64)
        p, q = (proxed(KINDS[kind], w, t, groups=GROUPS[name]) for w in (x, y))
        assert (p - q).square().sum() <= ((p - q) * (x - y)).sum() + 1e-14


@pytest.mark.parametrize("name", GROUPED)
def test_moreau_what_the_group_lasso_takes_away_is_the_projection_on_its_dual_ball(name):
    w, t = torch.randn(4, 6, dtype=torch.float64), 0.4
    taken = w - F.group_lasso_prox(w, t, GROUPS[name])
    for part, off in zip(members(w, GROUPS[name]), members(taken, GROUPS[name]), strict=True):
        radius = t * math.sqrt(part.numel())
        expected = part if part.norm() <= radius else part * radius / part.norm()
        torch.testing.assert_close(off, expected)


def test_moreau_what_the_nuclear_norm_takes_away_is_the_projection_on_the_spectral_ball():
    w, t = torch.randn(4, 6, dtype=torch.float64), 0.8
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(w - F.nuclear_norm_prox(w, t), left @ values.clamp_max(t).diag() @ right)


# Modes


@kinds
@names
@options
def test_every_mode_does_what_its_formula_says(kind, name, option):
    case = Case(kind, name, option)
    start, gradients = case.weight(), torch.randn(2, 4, 6, dtype=torch.float64)

    def trained(mode):
        w = nn.Parameter(start.clone())
        optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=LR), case.penalty(w, LAM), mode)
        for g in gradients:
            w.grad = g.clone()
            optimizer.step()
        return w.detach()

    def prox(w, t):
        p = nn.Parameter(w.clone())
        case.penalty(p, 1.0).prox_(t)
        return p.detach()

    def slope(w):
        p = nn.Parameter(w.clone())
        return torch.autograd.grad(case.penalty(p, LAM)(), p)[0]

    w = start
    for g in gradients:
        w = prox(w - LR * g, LR * LAM)
    torch.testing.assert_close(trained("proximal"), w)

    latent = start - LR * gradients.sum(0)
    torch.testing.assert_close(trained("dual"), prox(latent, 2 * LR * LAM))

    if kind == "L0":
        return
    w = start
    for g in gradients:
        w = w - LR * (g + slope(w))
    torch.testing.assert_close(trained("coupled"), w)

    if name == "singular values":  # what stops at zero is one of them: seen in the norm of what is left
        assert trained("decoupled").isfinite().all()
        return
    w = start
    for g in gradients:
        x, off = case.offset(w), LR * slope(w)
        crosses = torch.zeros(4, 6, dtype=torch.bool)
        for index in members(torch.arange(24).view(4, 6), case.groups):
            part, step = x.flatten()[index], off.flatten()[index]
            crosses.view(-1)[index] = (part * (part - step)).sum() <= 0
        w = torch.where(crosses, w - x, w - off) - LR * g
    torch.testing.assert_close(trained("decoupled"), w)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "L0"])
def test_decoupled_singular_values_shrink_by_their_slope_and_stop_at_zero(kind):
    w = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    before = torch.linalg.svdvals(w.detach())
    penalty = KINDS[kind]([w], 3.0, groups=SingularValues())
    w.grad = torch.zeros_like(w)
    RegularizedOptimizer(torch.optim.SGD([w], lr=0.5), penalty, "decoupled").step()
    expected = (before - 1.5 * penalty.rho_grad(before)).clamp_min(0).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(w.detach()), expected)


@kinds
@names
def test_every_mode_takes_half_types_and_reads_no_value_back(kind, name):
    for mode in ("coupled", "decoupled", "proximal", "dual")[2 * (kind == "L0") :]:
        for where in ({"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"device": "meta"}):  # which has none
            w = nn.Parameter(torch.randn(4, 6).to(**where))
            penalty = KINDS[kind]([w], 0.1, groups=GROUPS[name])
            optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=LR), penalty, mode)
            w.grad = torch.zeros_like(w)
            optimizer.step()
            assert w.device.type == "meta" or w.isfinite().all()


@kinds
@names
def test_adam_takes_what_it_can_and_refuses_the_rest_with_the_way_out(kind, name):
    w = nn.Parameter(torch.randn(4, 6))
    penalty = KINDS[kind]([("w", w)], 0.1, groups=GROUPS[name])
    optimizer = torch.optim.Adam([w], lr=0.01)
    alright = kind == "L2" or name == "elements" or (kind in CONVEX and name != "singular values")
    for mode in ("proximal", "dual"):
        if not alright:
            with pytest.raises(ValueError, match=r"'w'.*metric='euclidean'"):
                RegularizedOptimizer(optimizer, penalty, mode)
        for metric in ("auto", "euclidean") if alright else ("euclidean",):
            wrapped = RegularizedOptimizer(optimizer, penalty, mode, metric=metric)
            for _ in range(3):
                w.grad = torch.randn(4, 6)
                wrapped.step()
            assert w.isfinite().all()


@pytest.mark.parametrize("kind", ["MCP", "L0"])
@pytest.mark.parametrize("name", [*GROUPED, "singular values"])
def test_a_callable_metric_that_differs_by_coordinate_is_refused_once_it_is_seen(kind, name):
    w = nn.Parameter(torch.randn(4, 6))
    w.grad = torch.randn(4, 6)
    for mode in ("proximal", "dual"):
        optimizer = RegularizedOptimizer(
            torch.optim.SGD([w], lr=0.1),
            KINDS[kind]([w], 0.1, groups=GROUPS[name]),
            mode,
            metric=lambda optimizer, p, group: torch.full_like(p, 0.1),
        )
        with pytest.raises(ValueError, match="euclidean"):
            optimizer.step()


@pytest.mark.parametrize("kind", ["MCP", "SCAD", "LogSum", "LHalf", "L0", "Capped"])
def test_in_the_metric_of_adam_each_element_has_a_step_of_its_own(kind):
    p = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    steps = 0.5 * torch.rand(4, 6, dtype=torch.float64)
    w = p.detach().clone()
    p.grad = torch.zeros_like(p)
    penalty = KINDS[kind]([p], LAM)
    RegularizedOptimizer(torch.optim.SGD([p], lr=0.1), penalty, "proximal", metric=lambda *_: steps).step()
    one_by_one = [proxed(KINDS[kind], x, LAM * s.item()) for x, s in zip(w.flatten(), steps.flatten(), strict=True)]
    torch.testing.assert_close(p.detach().flatten(), torch.stack(one_by_one))


# The audit


@kinds
@names
@options
def test_stationarity_is_the_distance_to_the_subgradients(kind, name, option):
    case = Case(kind, name, option)
    w = nn.Parameter(case.weight())
    penalty = case.penalty(w, LAM)
    steep = penalty.rho_grad(torch.zeros((), dtype=torch.float64)).item()
    x = case.offset(w.detach())
    slope = torch.zeros_like(x)
    if kind != "L0":
        slope = torch.autograd.grad(penalty(), w)[0]
    if kind == "L2" and name != "elements":  # groups make no difference to a sum of squares
        extra = torch.randn(4, 6, dtype=torch.float64)
        w.grad = -slope + extra
        torch.testing.assert_close(penalty.stationarity(), extra.abs().max())
        return
    if name == "singular values":
        left, values, right = torch.linalg.svd(x)
        assert (values > 1e-12).sum() == (values > 0.1).sum() < 4
        kept = (values > 0.1).nonzero()[-1].item()
        across = left[:, kept + 1 : kept + 2] @ right[kept + 1 : kept + 2]  # between what is zero on both sides
        within = left[:, :1] @ right[:1]
        for size in (0.0, 0.1, 0.7):
            w.grad = -slope + size * across
            assert penalty.stationarity().item() == pytest.approx(max(size - LAM * steep, 0), abs=1e-12)
            w.grad = -slope + size * within
            assert penalty.stationarity().item() == pytest.approx(size, abs=1e-12)
        return
    groups = members(torch.arange(24).view(4, 6), case.groups)
    for i, index in enumerate(groups):
        extra = torch.zeros(24, dtype=torch.float64)
        direction = torch.randn(24, dtype=torch.float64)[index]
        extra[index] = 0.7 * direction / direction.norm()
        w.grad = -slope + extra.view(4, 6)
        still = bool((x.flatten()[index] == 0).all())
        n = index.numel() if case.scale else 1
        factor = 1.0 if case.factors is None else case.factors[i].item()
        absorbed = LAM * factor * math.sqrt(n) * steep if still else 0.0
        assert penalty.stationarity().item() == pytest.approx(max(0.7 - absorbed, 0), abs=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "L0"])  # which stands still in other places too
@names
def test_proximal_gradient_descent_ends_where_the_audit_is_zero(kind, name):
    case = Case(kind, name)
    w = nn.Parameter(case.weight() + 1)
    target = torch.randn(4, 6, dtype=torch.float64)
    penalty = case.penalty(w, 0.1)
    optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=0.5), penalty, "proximal")
    for _ in range(50):
        optimizer.zero_grad()
        (0.5 * (w - target).square().sum()).backward()
        optimizer.step()
    optimizer.zero_grad()
    (0.5 * (w - target).square().sum()).backward()
    assert penalty.stationarity() < 1e-8


# A kind of one's own, which is among the kinds above


def test_a_kind_of_ones_own_on_the_board_and_in_the_table():
    board = pytest.importorskip("torch_regpen.tensorboard")
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
    penalty = Capped(model, 0.5, cap=0.2, groups="output")
    assert penalty.cap == 0.2
    written = {}

    class Writer:
        def add_scalar(self, tag, number, step):
            written[tag] = number

        def add_histogram_raw(self, tag, **kw):
            written[tag] = kw["num"]

    board.WeightLogger(Writer(), penalty).step()
    assert written["penalty/value"] == pytest.approx(penalty().item())
    assert written["penalty/lam"] == 0.5
    assert written["sparsity/0.weight"] == pytest.approx(1 / 3)
    assert written["weights/1.weight"] == 6
    assert "Capped" in penalty.summary()
    assert "Capped" in repr(penalty)


class Pull(Penalty):
    """`lam * sum (|w| - 1)^2`: towards magnitude 1, so that its slope is negative below."""

    def rho(self, u):
        return (u - 1) ** 2

    def rho_grad(self, u):
        return 2 * (u - 1)


@names
def test_a_slope_may_be_negative_and_a_prox_missing(name):
    w = nn.Parameter(torch.tensor([[0.5, -0.5], [2.0, -2.0]], dtype=torch.float64))
    groups = {"blocks": Blocks(2), "heads of dim 1": Heads(2, dim=1)}.get(name, GROUPS[name])
    penalty = Pull([w], 1.0, groups=groups)
    assert gradcheck(lambda _: penalty(), (w,))
    if name == "elements":
        (gradient,) = torch.autograd.grad(penalty(), w)
        assert gradient.tolist() == [[-1, 1], [2, -2]]
    sgd = torch.optim.SGD([w], lr=0.1)
    for mode in ("proximal", "dual"):
        with pytest.raises(ValueError, match="Pull has no proximal map"):
            RegularizedOptimizer(sgd, penalty, mode)
    with pytest.raises(ValueError, match="Pull has no proximal map"):
        penalty.prox_(0.1)
    with pytest.raises(ValueError, match="Pull"):
        RegularizedOptimizer(sgd, penalty + L1([w], 0.1), "proximal")
    for mode in ("coupled", "decoupled"):
        optimizer = RegularizedOptimizer(sgd, penalty, mode)
        for _ in range(60):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        if name == "elements":
            torch.testing.assert_close(w.detach().abs(), torch.ones(2, 2, dtype=w.dtype), atol=1e-5, rtol=0)


class OnlyRho(Penalty):
    def rho(self, u):
        return u.tanh()


def test_a_kind_that_gives_only_a_value():
    w = nn.Parameter(torch.randn(3, 2))
    penalty = OnlyRho([w], 0.5)
    torch.testing.assert_close(penalty().detach(), 0.5 * w.detach().abs().tanh().sum())
    with pytest.raises(ValueError, match="OnlyRho has no gradient"):
        penalty().backward()
    for mode in ("coupled", "decoupled", "proximal", "dual"):
        with pytest.raises(ValueError, match="OnlyRho has no"):
            RegularizedOptimizer(torch.optim.SGD([w], lr=0.1), penalty, mode)


# Sums


def sums():
    """Sums whose prox is known, as functions of the parameter, with the Omega that they are."""
    yield lambda w: L1(w, 0.2) + L2(w, 0.1) + ElasticNet(w, 0.3)
    for groups in ("output", "input", "tensor", Blocks(6), Heads(2), Heads(3, dim=1)):
        yield lambda w, g=groups: L1(w, 0.1) + GroupLasso(w, 0.2, groups=g) + L2(w, 0.1)
        yield lambda w, g=groups: L2(w, 0.1) + SparseGroupLasso(w, 0.3, l1_ratio=0.4, groups=g)
        yield lambda w, g=groups: ElasticNet(w, 0.2, groups=g) + ElasticNet(w, 0.1) + L1(w, 0.1, groups=g)
        yield lambda w, g=groups: GroupLasso(w, 0.2, groups=g, scale=False) + L2(w, 0.1, groups="input")
    yield lambda w: NuclearNorm(w, 0.3) + L2(w, 0.1)
    yield lambda w: ElasticNet(w, 0.3, groups=SingularValues()) + L2(w, 0.1, groups="output")


@pytest.mark.parametrize("make", list(sums()))
@pytest.mark.parametrize("step", [0.3, 3.0])
def test_the_prox_of_a_sum_is_that_of_the_sum(make, step):
    w = torch.randn(4, 6, dtype=torch.float64)
    p = nn.Parameter(w.clone())
    make([p]).prox_(step)

    def objective(v):
        return 0.5 * (v - w).square().sum() + step * make([nn.Parameter(v)])().detach()

    assert_minimal(objective, p.detach(), tries=28)
    p.grad = (p.detach() - w) / step
    assert make([p]).stationarity() < 1e-12  # the two agree on what the subgradients are


def unknown():
    yield "MCP", lambda w: MCP(w, 0.1) + L1(w, 0.1)
    yield "L0", lambda w: L2(w, 0.1) + L0(w, 0.1)
    yield "LHalf", lambda w: LHalf(w, 0.1) + LHalf(w, 0.1, groups="output")
    yield "Capped", lambda w: Capped(w, 0.1) + L2(w, 0.1)
    yield "overlap", lambda w: GroupLasso(w, 0.1, groups="output") + GroupLasso(w, 0.1, groups="input")
    yield "overlap", lambda w: GroupLasso(w, 0.1) + GroupLasso(w, 0.1, scale=False)
    yield "overlap", lambda w: GroupLasso(w, 0.1) + NuclearNorm(w, 0.1)
    yield "singular values", lambda w: L1(w, 0.1) + NuclearNorm(w, 0.1)
    yield "singular values", lambda w: SparseGroupLasso(w, 0.1, groups=SingularValues())
    yield "singular values", lambda w: NuclearNorm(w, 0.1, positive=True)
    yield "Orthogonal", lambda w: Orthogonal(w, 0.1) + L1(w, 0.1)


@pytest.mark.parametrize(("why", "make"), list(unknown()))
def test_a_sum_without_a_closed_form_says_so_at_construction(why, make):
    w = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    penalty = make([("w", w)])
    assert penalty().isfinite()
    sgd = torch.optim.SGD([w], lr=0.1)
    for mode in ("proximal", "dual"):
        with pytest.raises(ValueError, match=why):
            RegularizedOptimizer(sgd, penalty, mode)
    with pytest.raises(ValueError, match=why):
        penalty.prox_(0.1)
    if why not in ("L0", "Orthogonal") and not getattr(penalty, "positive", False):
        for mode in ("coupled", "decoupled"):
            optimizer = RegularizedOptimizer(sgd, penalty, mode)
            w.grad = torch.zeros_like(w)
            optimizer.step()
            assert w.isfinite().all()


def test_decoupled_sums_stop_at_zero_too():
    w = nn.Parameter(torch.tensor([[0.1, -0.1, 2.0], [0.01, 0.02, -0.01]], dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    penalty = SparseGroupLasso([w], 2.0) + L2([w], 0.5)
    RegularizedOptimizer(torch.optim.SGD([w], lr=0.1), penalty, "decoupled").step()
    assert torch.equal(w.detach() == 0, torch.tensor([[True, True, False], [True, True, True]]))


def test_the_slope_of_each_kind_is_that_of_its_definition_far_out():
    for kind, rho in RHO.items():
        u = torch.tensor([1e3], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(rho(u).sum(), u)
        torch.testing.assert_close(KINDS[kind]([u], 1.0).rho_grad(u.detach()), slope)
