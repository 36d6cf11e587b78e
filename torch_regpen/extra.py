"""Penalties that are no function of magnitudes: orthogonality of rows, and the size of activations."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .groups import Grouping, working_dtype
from .lookup import Slot, spellings
from .penalty import ParamGroup, Penalty
from .selection import Params

__all__ = ["ActivityPenalty", "Orthogonal"]


class Orthogonal(Penalty):
    """`lam * sum ||W W^T - I||_F^2` over the flattened rows of each tensor; `W^T W` where rows outnumber columns.

    `measure="cosine"` is `lam *` the mean absolute cosine between two rows, Keras's OrthogonalRegularizer. It has no
    proximal map and is no sum over elements or groups: in the loss and in the coupled mode only.

    Args:
        params, lam, select: see `Penalty`.
        measure: `"gram"` or `"cosine"`.

    Raises:
        ValueError: an unknown measure; a tensor with fewer than 2 dimensions; and as `Penalty`.
    """

    separable = False

    def __init__(self, params: Params, lam: float, measure: str = "gram", **kw: Any) -> None:
        if measure not in ("gram", "cosine"):
            raise ValueError(f"measure must be 'gram' or 'cosine', not {measure!r}")
        if kw.keys() - {"select"}:
            raise TypeError(f"Orthogonal takes params, lam, select and measure, not {sorted(kw.keys() - {'select'})}")
        self.measure = measure
        super().__init__(params, lam, **kw)

    def _grouping(self, slot: Slot, name: str, tensor: Tensor) -> Grouping:
        if tensor.ndim < 2:
            raise ValueError(
                f"parameter {name!r} of shape {tuple(tensor.shape)} has no rows that could be orthogonal; leave it out "
                "with `select`"
            )
        return super()._grouping(slot, name, tensor)

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


class ActivityPenalty(nn.Module):
    """`lam * mean over the batch of sum |a|` or `sum a^2`, on the outputs `a` of modules in the latest forward.

    It watches by forward hooks, which `remove()` takes off; dim 0 of an output is the batch. Add `penalty()` to the
    loss after each forward; it is for the loss only. A module that runs several times in a forward counts each time,
    one that does not run counts 0. It costs a copy of each output, which a later layer may change in place.

    Args:
        model: the model whose modules are watched.
        lam: lambda, 0 or more.
        kind: `"l1"` or `"l2"`.
        select: a glob or a list of globs on module names; by default every leaf.

    Raises:
        ValueError: an unknown kind; no module matches; `lam` is negative or not finite.
        TypeError: an output is no tensor (in the forward); `lam` is not a number.
    """

    def __init__(self, model: nn.Module, lam: float, kind: str = "l1", select: str | list[str] | None = None) -> None:
        super().__init__()
        if kind not in ("l1", "l2"):
            raise ValueError(f"kind must be 'l1' or 'l2', not {kind!r}")
        self.kind = kind
        self.param_groups: list[dict[str, Any]] = [ParamGroup({}, lam)]
        self._sizes: dict[str, list[Tensor]] = {}  # of the outputs of each module in the latest forward
        self._in_forward = False
        patterns = [select] if isinstance(select, str) else select
        watched = {
            name: module
            for name, module in model.named_modules()
            if (
                not list(module.children())
                if patterns is None
                else any(fnmatchcase(spelling, p) for spelling in spellings(name) for p in patterns)
            )
        }
        if not watched:
            names = ", ".join(name for name, _ in model.named_modules() if name)
            raise ValueError(f"select={select!r} matches no module; there are: {names}")
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin),
            *(module.register_forward_hook(partial(self._watch, name)) for name, module in watched.items()),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @property
    def lam(self) -> float:
        """Lambda."""
        return float(self.param_groups[0]["lam"])

    @lam.setter
    def lam(self, lam: float) -> None:
        self.param_groups[0]["lam"] = lam

    def forward(self) -> Tensor:
        """The penalty of the latest forward, a 0-dim tensor in float32 at least."""
        total = torch.zeros(())
        for size in (size for sizes in self._sizes.values() for size in sizes):
            total = total.to(size.device) + size
        return self.lam * total

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._sizes.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}}  # tensors of a graph cannot be copied

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._sizes.clear()
        self._in_forward = True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._in_forward = False

    def _watch(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the output of {name!r} is a {type(output).__name__}, not a tensor; leave it out with `select`"
            )
        if not self._in_forward:  # called by itself: that is its latest forward
            self._sizes.pop(name, None)
        a = output.clone().abs().to(working_dtype(output.dtype))
        size = (a if self.kind == "l1" else a.square()).sum() / max(output.shape[0] if output.ndim else 1, 1)
        self._sizes.setdefault(name, []).append(size)


def _rows(x: Tensor) -> Tensor:
    w = x.flatten(1)
    return w.to(torch.promote_types(w.dtype, working_dtype(w.dtype)))


def _gram(w: Tensor) -> Tensor:
    """`W W^T - I`, or `W^T W - I`: the smaller."""
    gram = w @ w.mH if w.shape[0] <= w.shape[1] else w.mH @ w
    return gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)


def _units(w: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    norm = norm.masked_fill(norm == 0, torch.inf)  # a zero row has no angle
    return w / norm, norm


def _cosines(w: Tensor) -> Tensor:
    """The cosines between rows, each pair once above and once below a zero diagonal, halved."""
    unit, _ = _units(w)
    cosines = unit @ unit.mH
    return 0.5 * (cosines - torch.diag(cosines.diagonal()))


def _pairs(w: Tensor) -> int:
    return max(w.shape[0] * (w.shape[0] - 1) // 2, 1)
