"""Singular values as magnitudes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .grouping import Grouping, Rebuild, working_dtype


@dataclass(frozen=True)
class SingularValues(Grouping):
    """The magnitudes are the singular values of the tensor, as a matrix with `w.shape[0]` rows; each counts once.

    Each use computes a singular value decomposition, in `O(m * n * min(m, n))` time for an `m x n` matrix: about a
    second on a CPU for a square layer of a thousand units. Singular values of at most `eps * max(m, n)` times the
    largest count as zero, because rounding turns exact zeros into such values. `eps` is that of the working dtype:
    float64 for double precision, else float32; half-precision weights of low rank are therefore not recognized as such.

    Example:
        >>> import torch
        >>> from torch_regpen.groups import SingularValues
        >>> SingularValues().polar(torch.diag(torch.tensor([3.0, 2.0])))[0]
        tensor([3., 2.])
    """

    def polar(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        left, u, right = self._svd(w)
        return u, lambda magnitude: ((left * magnitude) @ right).reshape(w.shape)

    def check(self, shape: torch.Size) -> None:
        if len(shape) < 2:
            raise ValueError(
                f"a tensor of shape {tuple(shape)} has no singular values; exclude it with `select`, or choose "
                "another grouping"
            )

    def magnitudes_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([min(shape[0], math.prod(shape[1:]))])

    def excess(self, w: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
        """As `NormGrouping.excess`, in the spectral norm."""
        # The zero singular values can absorb only the part of the residual that is orthogonal to the row and column
        # spaces of w, up to singular values equal to the slope. The distance is the spectral norm of the rest.
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
    """The singular value decomposition, or NaN if `x` is not finite, for which torch.linalg would raise."""
    finite = x.isfinite().all()
    left, u, right = torch.linalg.svd(torch.where(finite, x, 0), full_matrices=False)
    one = torch.where(finite, 1.0, math.nan)
    return left * one, u * one, right
