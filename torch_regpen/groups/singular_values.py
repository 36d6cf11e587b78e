"""Singular values as magnitudes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .grouping import Grouping, Rebuild, working_dtype


@dataclass(frozen=True)
class SingularValues(Grouping):
    """The magnitudes are the singular values of the tensor flattened to dim 0 by the rest, each counted once.

    Each use costs a singular value decomposition, `O(m * n * min(m, n))`: for a square layer of a thousand units about
    a second on a CPU. Singular values up to `eps * max(m, n)` times the largest count as zero: rounding makes them of
    zeros (with the eps of float32 at most: the elements of half types are rounded to ones that are not).
    """

    def polar(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        left, u, right = self._svd(w)
        return u, lambda magnitude: ((left * magnitude) @ right).reshape(w.shape)

    def check(self, shape: torch.Size) -> None:
        if len(shape) < 2:
            raise ValueError(
                f"a tensor of shape {tuple(shape)} has no singular values; leave it out with `select`, or choose "
                "another grouping"
            )

    def magnitudes_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([min(shape[0], math.prod(shape[1:]))])

    def excess(self, w: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
        """As for other groups, in spectral norm."""
        # What the zero singular values can absorb lies across the row and the column space of w; there the nearest
        # point has its singular values cut at the slope. All else of the residual counts, in spectral norm.
        left, u, right = self._svd(w)
        left, right = left * (u > 0), right * (u > 0)[:, None]
        r = residual.flatten(1)
        across = r - left @ (left.mH @ r)
        across = across - (across @ right.mH) @ right
        left, v, right = _decomposed(across)
        absorbed = (left * v.clamp_max(slope)) @ right
        farthest = _decomposed(r - absorbed)[1].amax()
        return torch.where(u.any(), farthest, (v.amax() - slope).clamp_min(0))  # exactly 0 at a zero tensor

    def _svd(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = w.flatten(1)
        left, u, right = _decomposed(x.to(torch.promote_types(x.dtype, working_dtype(x.dtype))))
        rounding = torch.finfo(u.dtype).eps * max(x.shape)
        return left, u.masked_fill(u <= rounding * u.amax(), 0) if u.numel() else u, right


def _decomposed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition; NaN where `x` is not finite, at which torch.linalg raises."""
    finite = x.isfinite().all()
    left, u, right = torch.linalg.svd(torch.where(finite, x, 0), full_matrices=False)
    one = torch.where(finite, 1.0, math.nan)
    return left * one, u * one, right
