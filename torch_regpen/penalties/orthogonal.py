"""A penalty that makes the rows of a weight orthogonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..groups.grouping import Grouping, working_dtype
from .base import Penalty
from .lookup import ParameterRef
from .rules import Params


class Orthogonal(Penalty):
    """`lam * sum ||W W^T - I||_F^2`, over tensors as matrices with `w.shape[0]` rows (Bansal et al. 2018).

    For more rows than columns it is `lam * sum ||W^T W - I||_F^2`. With `measure="cosine"` it is `lam` times the
    mean absolute cosine between two different rows, like Keras's OrthogonalRegularizer. It has no proximal map, so use
    it in the loss or in mode "coupled".

    Args:
        params, lam, select: see `Penalty`.
        measure: "gram" or "cosine".

    Raises:
        TypeError: another argument is given; see also `Penalty`.
        ValueError: `measure` is unknown; a tensor has fewer than 2 dimensions; see also `Penalty`.

    Example:
        >>> import torch
        >>> from torch_regpen import Orthogonal
        >>> Orthogonal([2 * torch.eye(3)], lam=0.5)().item()  # 0.5 * 3 * (4 - 1)^2
        13.5
    """

    separable = False

    def __init__(self, params: Params, lam: float, measure: str = "gram", **kw: Any) -> None:
        if measure not in ("gram", "cosine"):
            raise ValueError(f"measure must be 'gram' or 'cosine', but got {measure!r}")
        if kw.keys() - {"select"}:
            raise TypeError(f"Orthogonal takes params, lam, select and measure, not {sorted(kw.keys() - {'select'})}")
        self.measure = measure
        super().__init__(params, lam, **kw)

    def _grouping(self, ref: ParameterRef, name: str, tensor: Tensor) -> Grouping:
        if tensor.ndim < 2:
            raise ValueError(
                f"parameter {name!r} of shape {tuple(tensor.shape)} has no rows to make orthogonal; exclude it with "
                "`select`"
            )
        return super()._grouping(ref, name, tensor)

    def omega(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor:
        w = _rows(x)
        if self.measure == "gram":
            return factor * _gram(w).abs().square().sum()
        return factor * _cosines(w).abs().sum() / _pairs(w)

    def omega_grad(self, x: Tensor, grouping: Grouping, factor: float | Tensor) -> Tensor:
        w = _rows(x)
        if self.measure == "gram":
            gram = _gram(w)
            grad = 4 * (gram @ w if w.shape[0] <= w.shape[1] else w @ gram)
        else:
            unit, norm = _units(w)
            pull = _cosines(w).sgn() @ unit / _pairs(w)
            grad = (pull - (pull * unit.conj()).real.sum(1, keepdim=True) * unit) / norm
        return (factor * grad).reshape(x.shape).to(x.dtype)

    def has_grad(self) -> bool:
        return True


def _rows(x: Tensor) -> Tensor:
    w = x.flatten(1)
    return w.to(torch.promote_types(w.dtype, working_dtype(w.dtype)))


def _gram(w: Tensor) -> Tensor:
    """`W W^T - I` or `W^T W - I`, whichever is smaller."""
    gram = w @ w.mH if w.shape[0] <= w.shape[1] else w.mH @ w
    return gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)


def _units(w: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    norm = norm.masked_fill(norm == 0, torch.inf)  # the cosines of a zero row are 0
    return w / norm, norm


def _cosines(w: Tensor) -> Tensor:
    """Half the cosines between rows, with a zero diagonal: each pair occurs twice, so its entries sum to its cosine."""
    unit, _ = _units(w)
    cosines = unit @ unit.mH
    return 0.5 * (cosines - torch.diag(cosines.diagonal()))


def _pairs(w: Tensor) -> int:
    return max(w.shape[0] * (w.shape[0] - 1) // 2, 1)
