"""The block soft threshold if each element of a group has its own step.

The minimiser `v` of `1/2 sum_i (v_i - x_i)^2 / r_i + ||v||` is `v_i = x_i * theta / (theta + r_i)`, where `theta =
||v||` solves `f(theta) = sum_i (x_i / (theta + r_i))^2 = 1`, and `v = 0` if `f(0) <= 1`.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ..groups.norms import NormGrouping

__all__ = ["GroupSums", "TensorSums", "root", "shrink_factors"]

NEWTON_STEPS = 16  # 800,000 groups that were made to be hard needed at most 13


class GroupSums(Protocol):
    """The sums over each group that the root search needs. Each method is one pass over `x` and `r`."""

    def weighted(self) -> tuple[Tensor, Tensor]:
        """`||x||` and `sum_i r_i x_i^2`."""

    def at_zero(self) -> tuple[Tensor, Tensor]:
        """`f(0)`, with the smallest normal number instead of `r_i = 0`, and `max_i (|x_i| - r_i)`."""

    def powers(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """`f(theta)` and `sum_i x_i^2 / (theta + r_i)^3`."""


def root(sums: GroupSums, grouping: NormGrouping) -> Tensor:
    """`theta` of each group; 0 if the group becomes zero.

    `1/sqrt(f)` is concave (a power mean of lines), so Newton's method for it climbs to the root from any start below
    it. With the means weighted by `x_i^2`, `||x||` is the power mean of order -2 of `theta + r_i`, so it is at most
    their arithmetic mean. Hence the first-order solution `||x|| - sum_i r_i x_i^2 / ||x||^2` is such a start, and if
    it is positive, the group does not become zero.
    """
    norm, weighted = sums.weighted()
    theta = norm - weighted / norm / norm
    real, dead = torch.finfo(norm.dtype), None
    smallest = real.tiny ** (1 / 3)  # the smallest norm whose cube does not underflow
    # Far from zero no quotient overflows. Otherwise max `|x_i| - r_i` is also a start; from it no quotient exceeds 1.
    if not grouping.all_known(theta.sub(norm, alpha=0.01) > smallest):
        at_zero, largest = sums.at_zero()
        dead = at_zero <= 1
        theta = torch.maximum(theta.masked_fill(norm <= smallest, 0), largest).clamp_min(0).masked_fill(dead, 0)
    accuracy = math.sqrt(real.eps)
    for _ in range(NEWTON_STEPS):
        f, slope = sums.powers(theta)
        change = f * (f.sqrt() - 1) / slope
        if dead is not None:
            change = change.masked_fill(dead, 0)
        theta = theta + change
        if grouping.all_known(change.abs() <= accuracy * theta):  # the next change would be below rounding
            break
    return theta


class TensorSums:
    """`GroupSums` of a view of a tensor in which groups lie along whole dimensions."""

    def __init__(
        self,
        x: Tensor,
        r: Tensor,
        grouping: NormGrouping,
        buffers: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        self.x, self.r, self.grouping = x, r, grouping
        self.distance, self.squares = buffers

    def weighted(self) -> tuple[Tensor, Tensor]:
        norm = self.grouping.norm(self.x)
        (weighted,) = self.grouping.totals(torch.mul(self.x, self.r, out=self.squares).mul_(self.x))
        return norm, weighted

    def at_zero(self) -> tuple[Tensor, Tensor]:
        self.r = self.r.clamp_min(torch.finfo(self.r.dtype).tiny)
        modulus = self.x.abs()
        (at_zero,) = self.grouping.totals((modulus / self.r).square_())
        return at_zero, self.grouping.largest(modulus.sub_(self.r))

    def powers(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.distance = torch.add(self.r, theta, out=self.distance)
        self.squares = torch.div(self.x, self.distance, out=self.squares).square_()
        f, slope = self.grouping.totals(self.squares, torch.div(self.squares, self.distance, out=self.distance))
        return f, slope

    def factors(self, theta: Tensor) -> Tensor:
        """`theta / (theta + r)`."""
        distance = torch.add(self.r, theta, out=self.distance)
        return torch.div(theta, distance, out=distance)


def shrink_factors(
    x: Tensor, r: Tensor, grouping: NormGrouping, buffers: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    """`v / x` of the minimiser `v`, for each group of a view of a tensor.

    Args:
        x: a view of a tensor in which groups lie along whole dimensions.
        r: a tensor of the same shape, 0 or more.
        grouping: the groups of the view.
        buffers: memory of the shape of `x` for temporaries, or None for new memory. The result is in the first.
    """
    sums = TensorSums(x, r, grouping, buffers)
    return sums.factors(root(sums, grouping))
