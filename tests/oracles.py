"""What the penalties are by definition, written for reading; and minimisation by brute force."""

import math

import torch

from torch_regpen import L1, L2, ElasticNet, GroupLasso

RATIO = 0.3

KINDS = {
    "L1": L1,
    "L2": L2,
    "ElasticNet": lambda params, lam, **kw: ElasticNet(params, lam, l1_ratio=RATIO, **kw),
    "GroupLasso": GroupLasso,
}


def squares(w):
    return (w * w.conj()).real.sum()


def groups_of(w, dim=0):
    return w.unbind(dim)


def group_lasso(w, dim=0):
    return sum(math.sqrt(g.numel()) * squares(g).sqrt() for g in groups_of(w, dim))


OMEGA = {
    "L1": lambda w: w.abs().sum(),
    "L2": squares,
    "ElasticNet": lambda w: RATIO * w.abs().sum() + (1 - RATIO) * squares(w),
    "GroupLasso": group_lasso,
}


def proximal_objective(omega, v, w, t):
    """What a proximal map minimises over `v`."""
    return 0.5 * squares(v - w) + t * omega(v)


def scalar_minimiser(f, bound, points=2001, rounds=8):
    """Where the convex function `f`, of a tensor of points, is least from `-bound` to `bound`; 0 is tried exactly."""
    low, high = -bound, bound
    best = torch.zeros((), dtype=torch.float64)
    for _ in range(rounds):
        grid = torch.cat([torch.linspace(low, high, points, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
        best = grid[f(grid).argmin()]
        width = 2 * (high - low) / points
        low, high = best.item() - width, best.item() + width
    return best


def assert_minimal(f, v, scale=1.0, tries=300):
    """No random neighbour of `v`, near or far, has a smaller `f`, rounding aside."""
    least = f(v)
    slack = 1e-12 * (1 + abs(least.item()))
    for i in range(tries):
        neighbour = v + scale * 10.0 ** -(i % 7) * torch.randn_like(v)
        assert f(neighbour) >= least - slack, (v, neighbour)
