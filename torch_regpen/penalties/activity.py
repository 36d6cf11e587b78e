"""Penalties that are no function of magnitudes: orthogonality of rows, and the size of activations."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from ..groups.grouping import working_dtype
from .lookup import spellings
from .param_groups import ParamGroup

__all__ = ["ActivityPenalty"]

OF_SEQUENCES = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


class ActivityPenalty(nn.Module):
    """`lam * mean over the batch of sum |a|` or `sum a^2`, on the outputs `a` of modules in the latest forward.

    It watches by forward hooks, which `remove()` takes off. Add `penalty()` to the loss after each forward; it is for
    the loss only. A module that runs several times in a forward counts each time, one that does not run counts 0. It
    costs a copy of each output, which a later layer may change in place.

    Dim 0 of an output is the batch, or dim 1 where the module says `batch_first=False`; the single layers inside such a
    Transformer do not say so. Of a module that returns a tuple, as an LSTM or attention, the first element counts; of
    one that returns a dict, its `last_hidden_state`.

    Under activation checkpointing it takes `use_reentrant=False`: otherwise the first forward runs without gradient,
    and the backward raises. Built or removed, it clears what torch.compile has compiled so far, which would not see it.

    Args:
        model: the model whose modules are watched.
        lam: lambda, 0 or more.
        kind: `"l1"` or `"l2"`.
        select: a glob or a list of globs on module names; by default every leaf.

    Raises:
        ValueError: an unknown kind; no module matches; `lam` is negative or not finite.
        TypeError: an output is no tensor (in the forward); `lam` is not a number.
        RuntimeError: there was no forward yet (when called); a part of the forward ran without gradient, and runs again
            in the backward; the model is a replica of DataParallel's.
    """

    def __init__(self, model: nn.Module, lam: float, kind: str = "l1", select: str | list[str] | None = None) -> None:
        super().__init__()
        if str(kind).lower() not in ("l1", "l2"):
            raise ValueError(f"kind must be 'l1' or 'l2', not {kind!r}")
        self.kind = kind.lower()
        self.param_groups: list[dict[str, Any]] = [ParamGroup({}, lam)]
        # Of the outputs of each module in the latest forward: their sizes, and whether they have no gradient.
        self._sizes: dict[str, list[Tensor]] = {}
        self._detached: set[str] = set()
        self._ran = False  # whether there was a forward
        self._asked = False  # whether somebody wanted a gradient of the latest
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
        self._names = list(watched)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin),
            *(module.register_forward_hook(partial(self._watch, name)) for name, module in watched.items()),
            model.register_forward_hook(self._end, always_call=True),
        ]
        _forget_compiled()

    @property
    def lam(self) -> float:
        """Lambda."""
        return float(self.param_groups[0]["lam"])

    @lam.setter
    def lam(self, lam: float) -> None:
        self.param_groups[0]["lam"] = lam

    def forward(self) -> Tensor:
        """The penalty of the latest forward, a 0-dim tensor in float32 at least; 0 after `remove()`."""
        if not self._ran and self._handles:
            raise RuntimeError("there was no forward of the model yet whose activations could be penalized")
        self._asked = self._asked or torch.is_grad_enabled()
        total = torch.zeros((), dtype=torch.float32)
        for size in (size for sizes in self._sizes.values() for size in sizes):
            total = total.to(size.device) + size
        return self.lam * total

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sizes.clear()
        _forget_compiled()

    def extra_repr(self) -> str:
        """What stands between the brackets of its repr."""
        shown = ", ".join(self._names[:4]) + (", ..." if len(self._names) > 4 else "")
        return f"lam={self.lam:g}, kind={self.kind!r}, {len(self._names)} modules: {shown}"

    def _refuse(self, other: object) -> Any:
        raise TypeError(
            "an ActivityPenalty is for the loss only, and neither added nor multiplied itself: call it, as in "
            "loss + penalty() + activity(), and set its lam"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = _refuse

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of a graph cannot be copied: a copy has seen no forward.
        return {**self.__dict__, "_sizes": {}, "_detached": set(), "_ran": False, "_asked": False}

    def _begin(self, module: nn.Module, args: Any) -> None:
        if _in_backward():
            return
        self._sizes.clear()
        self._detached.clear()
        self._asked, self._in_forward, self._ran = False, True, True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not _in_backward():
            self._in_forward = False

    def _watch(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        # What is checkpointed runs again in the backward. The same operations must then be seen, and nothing is kept.
        if getattr(module, "_is_replica", False):
            raise RuntimeError("the replicas of DataParallel cannot be watched; use DistributedDataParallel")
        again = _in_backward()
        if again and self._asked and name in self._detached and torch.is_grad_enabled():
            raise RuntimeError(
                f"the gradient of the penalty on {name!r} is lost: its forward ran without gradient, and runs again in "
                "the backward, as under torch.utils.checkpoint with use_reentrant=True. Pass use_reentrant=False, or "
                "leave it out with `select`"
            )
        a, samples = _activations(name, module, output)
        a = (a.float() if a.dtype == torch.bool else a.clone()).abs().to(working_dtype(a.dtype))
        size = (a if self.kind == "l1" else a.square()).sum() / max(samples, 1)
        if again:
            return
        if not self._in_forward:  # called by itself: that is its latest forward
            self._sizes.pop(name, None)
            self._detached.discard(name)
        self._ran = True
        self._sizes.setdefault(name, []).append(size)
        if not torch.is_grad_enabled():
            self._detached.add(name)


def _activations(name: str, module: nn.Module, output: Any) -> tuple[Tensor, int]:
    """The tensor that counts of what a module returned, and how many samples are in it."""
    a = output
    if isinstance(output, Mapping):
        a = output.get("last_hidden_state")
    elif isinstance(output, tuple) and not isinstance(output, PackedSequence):
        a = output[0] if output else None
    if isinstance(a, PackedSequence):
        return a.data, int(a.batch_sizes[0])
    if not isinstance(a, Tensor):
        told = f"a dict of {', '.join(map(repr, output))}" if isinstance(output, Mapping) else type(output).__name__
        raise TypeError(
            f"the output of {name!r} is {told}; allowed are a tensor, a tuple that begins with one, and a dict with a "
            "'last_hidden_state'. Leave it out with `select`"
        )
    batch_first = getattr(module, "batch_first", True)
    if isinstance(module, OF_SEQUENCES):
        if a.ndim == 2:
            return a, 1  # a single sequence
        batch_first = all(getattr(inner, "batch_first", True) for inner in module.modules())
    dim = 0 if batch_first or a.ndim < 3 else 1
    return a, a.shape[dim] if a.ndim else 1


def _in_backward() -> bool:
    # PyTorch has no public name for it. Traced code is not run again by hooks of autograd.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _forget_compiled() -> None:
    """Makes torch.compile look at hooks that came or went after it compiled a model: it has no guards on them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
