"""Each kind over each grouping against the definition: value, gradient, prox and audit."""

import math

import pytest
import torch
from helpers.kinds import CONVEX, GROUPED, GROUPS, KINDS, Case, members, proxed
from helpers.oracles import assert_minimal
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from torch_regpen import RegularizedOptimizer
from torch_regpen import functional as F

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
def test_moreau_the_group_lasso_takes_the_projection_on_its_dual_ball(name):
    w, t = torch.randn(4, 6, dtype=torch.float64), 0.4
    taken = w - F.group_lasso_prox(w, t, GROUPS[name])
    for part, off in zip(members(w, GROUPS[name]), members(taken, GROUPS[name]), strict=True):
        radius = t * math.sqrt(part.numel())
        expected = part if part.norm() <= radius else part * radius / part.norm()
        torch.testing.assert_close(off, expected)


def test_moreau_the_nuclear_norm_takes_the_spectral_projection():
    w, t = torch.randn(4, 6, dtype=torch.float64), 0.8
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(w - F.nuclear_norm_prox(w, t), left @ values.clamp_max(t).diag() @ right)


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
