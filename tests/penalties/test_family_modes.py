"""Each kind over each grouping in each mode of the optimizer, against its formula."""

import pytest
import torch
from helpers.kinds import CONVEX, GROUPED, GROUPS, KINDS, Case, members, proxed
from torch import nn

from torch_regpen import RegularizedOptimizer
from torch_regpen.groups import SingularValues

LAM = 0.3
LR = 0.2
kinds = pytest.mark.parametrize("kind", KINDS)
names = pytest.mark.parametrize("name", GROUPS)
options = pytest.mark.parametrize("option", ["plain", "unscaled", "moved"])


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
def test_a_metric_that_differs_by_coordinate_is_refused_once_seen(kind, name):
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
