"""A penalty on the activations of a model."""

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
from ..utils import first_names
from .lookup import spellings
from .param_groups import ParamGroup

__all__ = ["ActivityPenalty"]

SEQUENCE_MODULES = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


class ActivityPenalty(nn.Module):
    """`lam * (sum |a|) / n`, or with `kind="l2"` `lam * (sum |a|^2) / n`, on the outputs `a` of modules; `n` samples.

    Forward hooks record the outputs of the latest forward of the model; `remove()` removes them. Add `penalty()` to the
    loss after each forward (`RegularizedOptimizer` does not accept it). A module that runs several times in a forward
    counts each time. The hooks copy each output, because a later layer may change it in place.

    The batch is dimension 0, or dimension 1 if the module has `batch_first=False`; layers inside a Transformer do not
    have this attribute. If a module returns a tuple (LSTM, attention), its first element counts; if it returns a dict,
    its "last_hidden_state". Activation checkpointing needs `use_reentrant=False`; otherwise the backward raises. To
    make torch.compile see the hooks, construction and `remove()` reset its compiled code.

    Args:
        model: the model.
        lam: lambda, 0 or more, in units of the loss per activation; no learning rate multiplies it.
        kind: "l1" or "l2".
        select: a glob or a list of globs on module names; by default all modules without submodules.

    Raises:
        ValueError: `kind` is unknown; no module matches; `lam` is negative or not finite.
        TypeError: `lam` is not a number; an output is not a tensor (in the forward).
        RuntimeError: there was no forward yet (when called); the model is replicated by DataParallel (in the forward);
            checkpointing with `use_reentrant=True` (in the backward).

    Example:
        >>> import torch
        >>> from torch_regpen import ActivityPenalty
        >>> model = torch.nn.Sequential(torch.nn.Identity())
        >>> penalty = ActivityPenalty(model, lam=0.5)
        >>> _ = model(torch.ones(4, 3))
        >>> penalty().item()  # 0.5 * 12 / 4
        1.5
    """

    def __init__(self, model: nn.Module, lam: float, kind: str = "l1", select: str | list[str] | None = None) -> None:
        super().__init__()
        if str(kind).lower() not in ("l1", "l2"):
            raise ValueError(f"kind must be 'l1' or 'l2', but got {kind!r}")
        self.kind = kind.lower()
        self.param_groups: list[dict[str, Any]] = [ParamGroup({}, lam)]
        # By module: the sizes of its outputs in the latest forward. Below: the modules that ran without gradients.
        self._sizes: dict[str, list[Tensor]] = {}
        self._detached: set[str] = set()
        self._ran = False  # whether there was a forward yet
        self._asked = False  # whether penalty() was called with gradients enabled since then
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
            names = first_names((name for name, _ in model.named_modules() if name), most=8)
            raise ValueError(f"select={select!r} matches no module; the modules are: {names}")
        self._names = list(watched)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin),
            *(module.register_forward_hook(partial(self._watch, name)) for name, module in watched.items()),
            model.register_forward_hook(self._end, always_call=True),
        ]
        _reset_compiler()

    @property
    def lam(self) -> float:
        """Lambda; it can be set at any time."""
        return float(self.param_groups[0]["lam"])

    @lam.setter
    def lam(self, lam: float) -> None:
        self.param_groups[0]["lam"] = lam

    def forward(self) -> Tensor:
        """Return the penalty of the latest forward: a 0-dim tensor, float32 or float64; 0 after `remove()`."""
        if not self._ran and self._handles:
            raise RuntimeError("the model has not run yet; call the model before the penalty")
        self._asked = self._asked or torch.is_grad_enabled()
        total = torch.zeros((), dtype=torch.float32)
        for size in (size for sizes in self._sizes.values() for size in sizes):
            total = total.to(size.device) + size
        return self.lam * total

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sizes.clear()
        _reset_compiler()

    def extra_repr(self) -> str:
        """The text inside the parentheses of the repr."""
        return f"lam={self.lam:g}, kind={self.kind!r}, {len(self._names)} modules: {first_names(self._names)}"

    def _refuse(self, other: object) -> Any:
        raise TypeError(
            "an ActivityPenalty cannot be added or multiplied: add its value to the loss, as in "
            "loss + penalty() + activity(), and set its lam"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = _refuse

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of an autograd graph cannot be copied, so a copy starts without a forward.
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
        # A checkpointed module runs again in the backward. The hook must repeat its operations, but record nothing.
        if getattr(module, "_is_replica", False):
            raise RuntimeError("ActivityPenalty does not support DataParallel; use DistributedDataParallel")
        again = _in_backward()
        if again and self._asked and name in self._detached and torch.is_grad_enabled():
            raise RuntimeError(
                f"the gradient of the penalty on {name!r} is lost: its forward ran without gradient and runs again in "
                "the backward, as torch.utils.checkpoint does with use_reentrant=True. Pass use_reentrant=False, or "
                "exclude the module with `select`"
            )
        a, samples = _activations(name, module, output)
        a = (a.float() if a.dtype == torch.bool else a.clone()).abs().to(working_dtype(a.dtype))
        size = (a if self.kind == "l1" else a.square()).sum() / max(samples, 1)
        if again:
            return
        if not self._in_forward:  # the module was called directly, which starts a new forward
            self._sizes.pop(name, None)
            self._detached.discard(name)
        self._ran = True
        self._sizes.setdefault(name, []).append(size)
        if not torch.is_grad_enabled():
            self._detached.add(name)


def _activations(name: str, module: nn.Module, output: Any) -> tuple[Tensor, int]:
    """Return the tensor to penalize from the output of a module, and its number of samples."""
    a = output
    if isinstance(output, Mapping):
        a = output.get("last_hidden_state")
    elif isinstance(output, tuple) and not isinstance(output, PackedSequence):
        a = output[0] if output else None
    if isinstance(a, PackedSequence):
        return a.data, int(a.batch_sizes[0])
    if not isinstance(a, Tensor):
        given = f"a dict of {', '.join(map(repr, output))}" if isinstance(output, Mapping) else type(output).__name__
        raise TypeError(
            f"the output of {name!r} is {given}; it must be a tensor, a tuple that begins with one, or a dict with a "
            "'last_hidden_state'. Exclude the module with `select`"
        )
    batch_first = getattr(module, "batch_first", True)
    if isinstance(module, SEQUENCE_MODULES):
        if a.ndim == 2:
            return a, 1  # one unbatched sequence
        batch_first = all(getattr(inner, "batch_first", True) for inner in module.modules())
    dim = 0 if batch_first or a.ndim < 3 else 1
    return a, a.shape[dim] if a.ndim else 1


def _in_backward() -> bool:
    # PyTorch has no public function for this. Compiled code is not run again by autograd hooks.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _reset_compiler() -> None:
    """Make torch.compile compile again, because it does not check whether hooks were added or removed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
