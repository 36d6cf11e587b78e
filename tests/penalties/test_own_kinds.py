"""Kinds that a user writes, and sums of any kinds."""

import pytest
import torch
from helpers.kinds import GROUPS, KINDS, RHO, Capped
from helpers.oracles import assert_minimal
from torch import nn
from torch.autograd import gradcheck

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
from torch_regpen.groups import Blocks, Heads, SingularValues

names = pytest.mark.parametrize("name", GROUPS)


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
