"""The prox of a norm where each coordinate has a step of its own, against a bisection in extended precision.

`argmin_v 1/2 sum_i (v_i - x_i)^2 / r_i + ||v||` has `v_i = x_i * theta / (theta + r_i)` with `theta = ||v||`.
"""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from torch_regpen.groups import Slices
from torch_regpen.ops.prox import _block_soft_threshold

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def bisected(x, r):
    """The minimiser for one group: `theta` by halving an interval, after the test for zero."""
    x, r = x.astype(np.longdouble), r.astype(np.longdouble)
    free = (r == 0) & (x != 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        at_zero = np.square(np.where(x == 0, 0, x / r)).sum()
    if not free.any() and at_zero <= 1:
        return np.zeros(len(x))
    low, high = np.longdouble(0), np.sqrt(np.square(x).sum())
    for _ in range(200):
        theta = (low + high) / 2
        low, high = (theta, high) if np.square(x / (theta + r)).sum() > 1 else (low, theta)
    return (x * high / (high + r)).astype(float)


@torch.no_grad()  # as in a step: on a CPU the search then stops where it is at rest
def check(x, r, dtype, device):
    """Compare groups, the rows of x and r, with the bisection; returns which of them are zero."""
    x, r = torch.tensor(x, dtype=dtype, device=device), torch.tensor(r, dtype=dtype, device=device)
    found = _block_soft_threshold(x, r, Slices(0)).double().cpu().numpy()
    x, r = x.double().cpu().numpy(), r.double().cpu().numpy()
    for row, group, steps in zip(found, x, r, strict=True):
        expected = bisected(group, steps)
        np.testing.assert_allclose(row, expected, rtol=0, atol=TOLERANCE[dtype] * np.linalg.norm(group))
        assert (row == 0).all() == (expected == 0).all()
    return (found == 0).all(axis=1)


@dtypes
@pytest.mark.parametrize("size", [1, 2, 30])
@pytest.mark.parametrize("decades", [0, 2, 8])
def test_steps_that_differ_by_many_decades(device, dtype, size, decades):
    rng = np.random.default_rng(0)
    dead = []
    for scale in (1e-6, 1e-2, 1e2):  # of the steps: groups that hardly move, and groups that die
        for along in (-1, 0, 1):  # large weights where the steps are small, anywhere, or where they are large
            steps = rng.uniform(-decades / 2, decades / 2, (6, size))
            x = rng.standard_normal((6, size)) * 10 ** (along * steps)
            x[rng.random(x.shape) < 0.1] = 0
            dead.append(check(x, scale * 10**steps, dtype, device))
    assert np.any(dead)
    assert not np.all(dead)


@dtypes
def test_a_steps_of_zero_leave_their_coordinates_and_no_nan(device, dtype):
    x = np.array([[0.3, -0.4, 0.5], [0.3, -0.4, 0.5], [0.3, -0.4, 0.0], [0.0, 0.0, 0.0]])
    r = np.array([[0.0, 0.0, 0.0], [0.0, 0.1, 100.0], [100.0, 100.0, 0.0], [0.0, 0.0, 1.0]])
    assert check(x, r, dtype, device).tolist() == [False, False, True, True]


@dtypes
def test_tiny_and_huge_steps_in_one_group_do_not_overflow(device, dtype):
    x = np.array([[0.3, 0.5, 0.0, 0.4], [1e-3, 1e-3, 1e-3, 1e-3], [1e-20, 1e-20, 1e-20, 0.0]])
    r = np.array([[1e-14, 1e2, 1e-20, 1e3], [1e-20, 1.0, 1.0, 1e3], [1e-21, 1e-20, 1e-19, 1e3]])
    assert not check(x, r, dtype, device)[:2].any()


@dtypes
def test_a_group_on_the_edge_of_zero(device, dtype):
    """`||x / r||` just below, at, and just above 1."""
    r = np.array([[3.0, 0.01, 1.0, 100.0]] * 3)
    x = r * 0.5 * np.array([[0.99], [1.0], [1.01]])
    assert check(x, r, dtype, device).tolist() == [True, True, False]


def test_one_step_for_all_is_the_block_soft_threshold(device):
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]], device=device)
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]], device=device) * (1 - 2 / 5)
    torch.testing.assert_close(_block_soft_threshold(x, torch.full_like(x, 2.0), Slices(0)), expected)


def test_no_other_point_is_better(device):
    """A general-purpose minimiser, started anywhere, finds nothing below it."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        x, r = rng.standard_normal(4), 10 ** rng.uniform(-1.5, 1.0, 4)
        v = _block_soft_threshold(*(torch.tensor(a, device=device)[None] for a in (x, r)), Slices(0))[0].cpu().numpy()

        def objective(v, x=x, r=r):
            return (np.square(v - x) / r).sum() / 2 + np.linalg.norm(v)

        for start in (x, v + 0.1 * rng.standard_normal(4)):
            best = minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
            assert objective(v) <= best.fun + 1e-9


def test_groups_run_along_any_dimensions(device):
    rng = np.random.default_rng(0)
    x, r = torch.tensor(rng.standard_normal((3, 4, 5))), torch.tensor(10 ** rng.uniform(-2, 0, (3, 4, 5)))
    x, r = x.to(device), r.to(device)
    found = _block_soft_threshold(x, r, Slices(1))
    for i in range(4):
        alone = _block_soft_threshold(x[:, i].reshape(1, -1), r[:, i].reshape(1, -1), Slices(0))
        torch.testing.assert_close(found[:, i].reshape(1, -1), alone)
