"""N:M sparsity: among each m consecutive elements, n are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grouping import Elements, Rebuild
from .layouts import Slices
from .norms import NormGrouping

__all__ = ["NM"]


@dataclass(frozen=True)
class NM(Elements):
    """Among each `m` consecutive elements of a row, keeps the `n` of largest modulus; only for `L0`.

    `L0(params, lam, groups=NM(n, m))` is `lam` times the number of nonzero elements, under the constraint that among
    each `m`, at most `n` are nonzero. Its prox is the projection onto the constraint, for every step and `lam` above 0
    and in every metric (Zhou et al. 2021; torchao's `NMSparseConstraint`). The limit on the change in one step does not
    apply. At `lam=0` it does nothing. In mode "dual", the zeroed weights accumulate their updates and can return.

    A row holds the weights of one output unit: `weight.flatten(1)` of a Linear or a convolution. For `NM(2, 4)` this is
    the matrix that `torch.sparse.to_sparse_semi_structured` takes. The weight of a layer that stores it transposed
    (ConvTranspose, the Conv1D of transformers) is also divided along its inputs. A 1-d tensor is one row.

    Among equal elements, the first are kept. NaN counts as the largest. As for `L0` on elements, `stationarity()` is
    the largest `|gradient|` over the nonzero elements, and `zero_groups()` is empty. `TargetSparsity` refuses this
    grouping, because the fraction of zeros is `1 - n/m` for every `lam`.

    Args:
        n: the number of elements to keep, 1 or more.
        m: the number of consecutive elements among which to keep `n`, more than `n`.
        rows: a grouping with one group for each row; None takes it from the layer, or dimension 0 for a bare tensor.

    Raises:
        ValueError: `n` or `m` is out of range; when used, `m` does not divide a row, or the penalty is not `L0`.

    Example:
        >>> import torch
        >>> from torch_regpen import L0
        >>> from torch_regpen.groups import NM
        >>> w = torch.tensor([[3.0, -4.0, 1.0, 2.0], [0.1, 0.2, -0.3, 0.4]])
        >>> L0([w], lam=1e-4, groups=NM(2, 4)).prox_(1.0)
        >>> w
        tensor([[ 3.0000, -4.0000,  0.0000,  0.0000],
                [ 0.0000,  0.0000, -0.3000,  0.4000]])
    """

    n: int
    m: int
    rows: NormGrouping | None = None

    def __post_init__(self) -> None:
        if any(not isinstance(value, int) or isinstance(value, bool) for value in (self.n, self.m)):
            raise ValueError(f"NM(n, m) takes two whole numbers, but got {self.n!r} and {self.m!r}")
        if not 1 <= self.n < self.m:
            raise ValueError(f"NM(n, m) needs 1 <= n < m, as in NM(2, 4), but got NM({self.n}, {self.m})")

    def __repr__(self) -> str:
        return f"NM({self.n}, {self.m})"

    def project(self, w: Tensor, t: float | Tensor) -> Tensor:
        """`w` with zeros instead of the elements that are not kept, where `t > 0`.

        Args:
            w: a tensor. `m` must divide the length of its rows.
            t: the step times lambda, a number or a tensor that broadcasts to `w`.
        """
        blocks, layout = self._blocks(w.abs())
        # the sort puts NaN first, and keeps the order of equal elements
        survivors = blocks.sort(dim=1, descending=True, stable=True).indices[:, : self.n]
        goes = layout(torch.ones_like(blocks, dtype=torch.bool).scatter_(1, survivors, False))
        return w.masked_fill(goes & (t > 0), 0)

    def check(self, shape: torch.Size) -> None:
        length = shape.numel() if len(shape) < 2 else self._rows.size(shape)
        if length % self.m:
            raise ValueError(
                f"{self} does not divide the rows of {length} elements of a tensor of shape {tuple(shape)}; leave it "
                "out with `select` or `exclude`"
            )

    def separates(self, dim: int, ndim: int) -> bool:
        return ndim > 1 and self._rows.separates(dim, ndim)

    @property
    def _rows(self) -> NormGrouping:
        return Slices(0) if self.rows is None else self.rows

    def _blocks(self, w: Tensor) -> tuple[Tensor, Rebuild]:
        """A matrix with a row for each `m` consecutive elements, and a function that turns it into the shape of `w`."""
        if w.ndim < 2:
            return w.reshape(-1, self.m), lambda blocks: blocks.reshape(w.shape)
        x = self._rows.view(w)
        inside = self._rows.dims(x.ndim)
        order = [*(dim for dim in range(x.ndim) if dim not in inside), *inside]
        back = sorted(range(x.ndim), key=order.__getitem__)
        rows = x.permute(order)
        return rows.reshape(-1, self.m), lambda blocks: blocks.reshape(rows.shape).permute(back).reshape(w.shape)
