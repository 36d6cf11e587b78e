"""Minimisation by brute force."""

import math

import numpy as np
import torch

from helpers.kinds import squares


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


def least(objective, low, high, points=801, rounds=4):
    """The least value of `objective` from `low` to `high`, for each of many rows, on a grid that closes in on it."""
    steps = torch.linspace(0, 1, points, dtype=torch.float64)
    found = torch.full_like(low, math.inf)
    first, last = low, high
    for _ in range(rounds):
        grid = first[:, None] + (last - first)[:, None] * steps
        values = objective(grid)
        found = torch.minimum(found, values.amin(1))
        best = grid.gather(1, values.argmin(1, keepdim=True))[:, 0]
        width = 2 * (last - first) / points
        first, last = torch.maximum(best - width, low), torch.minimum(best + width, high)
    return found


def double(x):
    return torch.from_numpy(np.asarray(x, dtype=np.float64))


def excess(rho, v, w, t):
    """By how much `1/2 (v - w)^2 + t rho(v)` exceeds its least value on a fine grid."""
    rows = double([w]).abs()

    def objective(x):
        return 0.5 * (x - rows[:, None]) ** 2 + t * rho(x)

    best = torch.minimum(least(objective, torch.zeros_like(rows), rows), objective(torch.zeros(1, 1).double())[:, 0])
    return (objective(double([[abs(v)]]))[:, 0] - best).item()


def soft(w, t):
    return w.sign() * (w.abs() - t).clamp_min(0)
