"""Groups are shrunk in place, in chunks: the weights are those of the definition, in every layout and chunk size."""

from dataclasses import replace

import pytest
import torch
from torch import nn, optim

from torch_regpen import GroupLasso, RegularizedOptimizer
from torch_regpen.groups import Blocks, Heads, Slices
from torch_regpen.ops import chunks
from torch_regpen.ops.root_search import shrink_factors

SHAPES = {
    "rows": ((12, 30), "output", lambda w: list(w)),
    "columns": ((12, 30), "input", lambda w: list(w.T)),
    "filters": ((8, 4, 3, 3), "output", lambda w: list(w)),
    "the whole tensor": ((4, 6), "tensor", lambda w: [w]),
    "blocks": ((6, 10), Blocks(5), lambda w: list(w.view(-1, 5))),
    "heads": ((12, 5), Heads(4, dim=0), lambda w: list(w.view(4, 3, 5))),
}
LR, BETA, EPS, LAM, STEPS = 0.01, 0.999, 1e-8, 0.02, 12


def group_prox(x, r):
    """`argmin_v 1/2 sum (v - x)^2 / r + ||v||`, by bisection for the norm of v."""
    if not ((x / r).square().sum() > 1):
        return torch.zeros_like(x)
    low, high = 0.0, x.norm().item()
    for _ in range(60):
        theta = (low + high) / 2
        low, high = (theta, high) if (x / (theta + r)).square().sum() > 1 else (low, theta)
    return x * high / (high + r)


def defined(mode, groups, gradients, start):
    """The weights after Adam's updates and the prox in its metric, group by group, from the formulas."""
    w = start.clone().requires_grad_()
    inner = optim.Adam([w], lr=LR, betas=(0.9, BETA), eps=EPS)
    gap, total = torch.zeros_like(start), torch.zeros_like(start)
    for number, gradient in enumerate(gradients, 1):
        w.grad = gradient.clone()
        inner.step()
        moment = inner.state[w]["exp_avg_sq"]
        s = LR / ((moment / (1 - BETA**number)).sqrt() + EPS)
        views = zip(*(groups(x) for x in (w.detach(), gap, total, s, moment)), strict=True)
        for x, d, t, step, m in views:
            n, norm = x.numel(), x.norm()
            radius = LAM * n**0.5
            old, unseen = x.clone(), m == 0
            if mode == "proximal":
                new = group_prox(x, step * radius)
                moved = (new - old).norm()
                x.copy_(old + (new - old) * min(1.0, (10 * LR * n**0.5 / moved).item() if moved > 0 else 1.0))
                continue
            slope = radius * x.abs() / norm if norm > 0 else torch.full_like(x, LAM)
            t += torch.minimum(step, 10 * LR / slope)
            latent = x + d
            new = group_prox(latent, t * radius)
            new = torch.where(unseen, new.clamp(old - 10 * LR, old + 10 * LR), new)
            x.copy_(new)
            d.copy_((latent - new).masked_fill(unseen, 0))
            t.masked_fill_(unseen, 0)
    return w.detach()


@pytest.mark.parametrize("chunk", [1 << 19, 40])
@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("name", SHAPES)
def test_groups_in_the_metric_of_adam_are_those_of_the_definition(name, mode, chunk, monkeypatch):
    shape, kind, groups = SHAPES[name]
    monkeypatch.setattr(chunks, "CPU", replace(chunks.CPU, group_chunk=chunk))
    generator = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(shape, dtype=torch.float64, generator=generator)
    gradients = [0.2 * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(STEPS)]
    for gradient in gradients:
        gradient[1] = 0  # has no gradient yet
        gradient[2, ::2] = 0
    w = nn.Parameter(start.clone())
    inner = optim.Adam([w], lr=LR, betas=(0.9, BETA), eps=EPS)
    optimizer = RegularizedOptimizer(inner, GroupLasso([("w", w)], LAM, groups=kind), mode)
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), defined(mode, groups, gradients, start), rtol=1e-9, atol=1e-12)
    assert (w != 0).any()


def test_the_gap_keeps_what_a_group_lost_under_sgd():
    """Dual averaging with one step for all: `w + gap` is the sum of all updates."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 8, dtype=torch.float64))
    latent = w.detach().clone()
    optimizer = RegularizedOptimizer(optim.SGD([w], lr=0.1), GroupLasso(w, 0.5), "dual")
    for number in range(1, 6):
        w.grad = torch.randn_like(w)
        latent -= 0.1 * w.grad
        optimizer.step()
        norm = latent.norm(dim=1, keepdim=True)
        expected = latent * (1 - 0.1 * number * 0.5 * 8**0.5 / norm).clamp_min(0)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(optimizer.state[w]["gap"], latent - expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_one_evaluation_is_enough_where_steps_are_small(monkeypatch):
    """The search starts at the first-order solution, which is exact to the square of the steps."""
    evaluations = []
    known = Slices.all_known
    monkeypatch.setattr(Slices, "all_known", lambda self, c: evaluations.append(1) or known(self, c))
    torch.manual_seed(0)
    x, r = torch.randn(50, 100), 0.05 * torch.rand(50, 100)
    shrink_factors(x, r, Slices(0))
    assert len(evaluations) == 2  # whether the start is safe, and whether the first change is the last
