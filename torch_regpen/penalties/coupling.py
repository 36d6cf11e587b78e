"""Units that span the tensors of a model: everything that is removed together with a channel, a neuron or a head.

A graph of the model says which rows and columns belong together. It is built by heuristics, so each set of units is
tested on the model before it is returned.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedParameter

from .coupling_graph import Flow, Row
from .coupling_layers import Slices, columns, inner_columns, rows
from .coupling_trace import copied_buffers, kept_contents, tensors_in
from .units import MULTIPLYING

__all__ = ["Inputs", "Slices", "UnitSet", "arguments_in", "coupled_units", "equal_to_rounding"]

INPUT = "input"
_Part = tuple[nn.Module, str]
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class UnitSet:
    """Units of one kind. Each can only be removed as a whole.

    Attributes:
        name: the qualified name of the first layer that writes the units; for an LSTM or GRU with its part, `"rnn.l0"`.
        members: the slices that write the units: rows, biases, and the scales and shifts of norms. A unit is zero if
            its members are. No element of a parameter is in two units.
        readers: the slices that read the units: columns of the layers that follow, and slopes of a PReLU. They are cut
            together with the unit, but do not belong to it.
    """

    name: str
    members: tuple[Slices, ...]
    readers: tuple[Slices, ...]

    @property
    def count(self) -> int:
        """The number of units."""
        return len(self.members[0].index)


def coupled_units(model: nn.Module, example_inputs: Inputs) -> tuple[list[UnitSet], dict[str, str]]:
    """The units of a model that can be removed, over all tensors that they span.

    A unit is a row of a Linear, a channel of a convolution with its norm, a channel of a residual stream with all that
    writes it, a group of a grouped convolution, a unit of an LSTM or GRU, or an attention head.

    Each set is tested with random parameters: a unit whose members are zero is zero wherever it is read, and the
    outputs of the model depend on a unit only through its readers.

    Args:
        model: the model. Its mode, gradients, buffers and hooks are not changed. It runs in eval mode, several times
            for each set, with a copy of its parameters.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        The sets of units, and the layers with units that cannot be removed: `{name: reason}`.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError: the example inputs are neither a tensor, a tuple nor a dict.
        ValueError: the model has lazy parameters that were not initialized, or returns no floating-point tensor.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialized yet; run the model once on a batch")
    args, kwargs = arguments_in(example_inputs)
    with _unchanged(model):
        return _Coupling(model, args, kwargs).sets()


def arguments_in(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keyword arguments to call a model with."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, list | tuple):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    what = type(example_inputs).__name__
    raise TypeError(f"example_inputs must be a tensor, a tuple or a dict, not {what}")


class _Unit(NamedTuple):
    """A unit in the graph: the rows that write it, the columns that read it, and what it passes through."""

    rows: list[Row]
    readers: dict[Row, None]
    marks: set[Any]


class _Coupling:
    """The units of one model.

    Args:
        model: the model, in eval mode.
        args: positional inputs.
        kwargs: inputs by name.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with kept_contents(model):
            self.flow = Flow(model, args, kwargs)
        self.probe = _Probe(model, args, kwargs)
        self.names = {module: name for name, module in model.named_modules()}
        self.uses = Counter(p for m in self.names for p in m._parameters.values() if p is not None)
        inside = {module.out_proj for module in self.names if isinstance(module, nn.MultiheadAttention)}
        self.parts = {(m, part): cuts for m in self.names if m not in inside for part, cuts in rows(m).items() if cuts}
        for (owner, key), dim in self.flow.parameters.items():
            if not isinstance(owner, MULTIPLYING):
                n = getattr(owner, key).shape[dim]
                self.parts[owner, key] = [Slices(owner, key, dim, torch.arange(n).unsqueeze(1))]
        self.order = {part: place for place, part in enumerate(self.parts)}

    def sets(self) -> tuple[list[UnitSet], dict[str, str]]:
        """The sets of units, and why the units of some layers cannot be removed."""
        reasons: dict[tuple[nn.Module, str], Counter[str]] = defaultdict(Counter)
        alike: dict[Any, list[_Unit]] = defaultdict(list)
        for unit in sorted(self._units(), key=lambda unit: self._place(unit.rows[0])):
            reason = self._reason(unit)
            reasons_of_rows = [reasons[row[:2]] for row in unit.rows]
            if reason is None:
                written, read = (Counter(row[:2] for row in part) for part in unit[:2])
                alike[frozenset(written.items()), frozenset(read.items())].append(unit)
            for counts in reasons_of_rows:
                counts[reason or ""] += 1
        found = []
        for units in alike.values():
            unit_set = self._set(units)
            reason = self.probe.objection(unit_set)
            if reason is None:
                found.append(unit_set)
            else:
                for row in (row for unit in units for row in unit.rows):
                    reasons[row[:2]].subtract([""])
                    reasons[row[:2]][reason] += 1
        return found, self._left({part: +counts for part, counts in reasons.items()})

    def _units(self) -> list[_Unit]:
        """The units that layers write. Features of the model's inputs are not units."""
        found: dict[Row, _Unit] = defaultdict(lambda: _Unit([], {}, set()))
        every = [Row(*part, index) for part, cuts in self.parts.items() for index in range(len(cuts[0].index))]
        readers: dict[tuple[nn.Module, int], Row] = {}
        for row, read in self.flow.readers.items():
            for reader in read:
                self.flow.join(readers.setdefault(reader, row), row)
        for row in every:
            unit = found[self.flow.find(row)]
            unit.rows.append(row)
            if inner_columns(*row[:2]):
                unit.readers[row] = None
        for row, read in self.flow.readers.items():
            found[self.flow.find(row)].readers.update(dict.fromkeys(Row(layer, INPUT, index) for layer, index in read))
        for row, marks in self.flow.marks.items():
            found[self.flow.find(row)].marks.update(marks)
        return [unit for unit in found.values() if any(self._writes(row[:2]) for row in unit.rows)]

    def _place(self, row: Row) -> tuple[int, int]:
        return self.order[row[:2]], row.unit

    def _writes(self, part: tuple[nn.Module, str]) -> bool:
        """Whether a part of a layer has rows, and not only scales and shifts."""
        return any(getattr(cut.module, cut.key).ndim > 1 for cut in self.parts[part])

    def _reason(self, unit: _Unit) -> str | None:
        """Why a unit cannot be removed according to the graph, or None."""
        if any(row.layer not in self.flow.layers for row in unit.rows if row[:2] not in self.flow.parameters):
            return "the forward pass in eval mode does not call it, or calls it without gradients"
        if "output" in unit.marks:
            return "its units are outputs of the model"
        norm = next((module for module in self.names if module in unit.marks), None)
        if norm is not None:
            return f"{self.names[norm]} ({type(norm).__name__}) takes the mean over its units"
        cuts = [cut for row in unit.rows for cut in self.parts[row[:2]]]
        cuts += [cut for row in unit.readers for cut in _columns(row.layer, row.part)]
        reason = next(filter(None, map(self._obstacle, cuts)), None)
        if reason is not None:
            return reason
        writers = Counter(row[:2] for row in unit.rows if self._writes(row[:2]))
        whole = any(1 < n == len(self.parts[part][0].index) for part, n in writers.items())
        if whole and "attention" not in unit.marks:
            return "its units can only leave all together"
        return None if unit.readers else "no layer was found that reads its units"

    def _obstacle(self, cut: Slices) -> str | None:
        """Why a parameter cannot be cut, or None."""
        parameter = cut.module._parameters.get(cut.key)
        name = f"{self.names[cut.module]}.{cut.key}"
        if parameter is None:
            return f"{name} is parametrized"
        return f"{name} is a parameter of several layers" if self.uses[parameter] > 1 else None

    def _set(self, units: list[_Unit]) -> UnitSet:
        def together(units: list[Iterable[Row]], cuts_of: Callable[[_Part], list[Slices]]) -> tuple[Slices, ...]:
            by_part: dict[_Part, list[list[int]]] = defaultdict(lambda: [[] for _ in units])
            for place, unit in enumerate(units):
                for row in unit:
                    by_part[row[:2]][place].append(row.unit)
            return tuple(
                Slices(cut.module, cut.key, cut.dim, cut.index[torch.tensor(indices)].flatten(1))
                for part, indices in by_part.items()
                for cut in cuts_of(part)
            )

        first = next(row[:2] for row in units[0].rows if self._writes(row[:2]))
        members = together([unit.rows for unit in units], lambda part: self.parts[part])
        readers = together([unit.readers for unit in units], lambda part: _columns(*part))
        return UnitSet(self._name(first), members, readers)

    def _name(self, part: _Part) -> str:
        return ".".join(filter(None, (self.names[part[0]], part[1])))

    def _left(self, reasons: Mapping[_Part, Counter[str]]) -> dict[str, str]:
        left = {}
        for module, name in self.names.items():
            for part in (part for part in self.parts if part[0] is module and self._writes(part)):
                why = [reason for reason in reasons[part] if reason]
                if why:
                    left[self._name(part)] = ("in part: " if reasons[part][""] else "") + "; ".join(why)
            known = rows(module) or ".parametrizations." in f".{name}."
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.ndim > 1 and not known and (module, key) not in self.parts:
                    where = name if isinstance(module, MULTIPLYING) else f"{name}.{key}".lstrip(".")
                    left[where] = f"what a unit of {type(module).__name__} is here is not known"
        return left


def _columns(layer: nn.Module, part: str) -> list[Slices]:
    return columns(layer) if part == INPUT else inner_columns(layer, part)


class _Probe:
    """Tests on a model with random parameters whether units can be removed.

    Args:
        model: the model, in eval mode.
        args: positional inputs.
        kwargs: inputs by name.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.random = torch.Generator().manual_seed(0)
        self.names = {
            (module, key): f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key in module._parameters
        }
        new = {p: p.detach() if ".original" in name else self._random_like(p) for name, p in model.named_parameters()}
        self.state = {name: new[p] for name, p in model.named_parameters(remove_duplicate=False)}
        for name, buffer in copied_buffers(model).items():
            if name.endswith("running_mean"):  # a fresh mean is 0, and the test must hold for other means
                buffer = torch.randn(buffer.shape, generator=self.random).to(buffer)
            self.state[name] = buffer

    def objection(self, units: UnitSet) -> str | None:
        """Why a random half of the units cannot be removed, or None."""
        chosen = torch.randperm(units.count, generator=self.random)[: -(-units.count // 2)]
        silent = self._run([(units.readers, chosen, True), (units.members, chosen, False)])
        unread = self._run([(units.readers, chosen, False), (units.members, chosen, False)])
        if not equal_to_rounding(silent, unread):
            return "a unit that is zero still reaches the layers that read it"
        if not equal_to_rounding(unread, self._run([(units.members, chosen, True), (units.readers, chosen, False)])):
            return "its units are read by more than columns that can be cut: by a norm or a softmax over them, say"
        return None

    @torch.no_grad()
    def _run(self, changes: list[tuple[tuple[Slices, ...], Tensor, bool]]) -> list[Tensor]:
        """The outputs of the model after some slices of its parameters are set to random numbers or zero."""
        state = dict(self.state)
        for slices, chosen, random in changes:
            for part in slices:
                name = self.names[part.module, part.key]
                value = state[name] = state[name].clone()
                index = part.index[chosen].flatten().to(value.device)
                new = value.index_select(part.dim, index)
                value.index_copy_(part.dim, index, self._random_like(new) if random else torch.zeros_like(new))
        # Each run draws the same random numbers, and starts from the same cached values in modules.
        with torch.random.fork_rng(devices=_cuda_devices(self.model)), kept_contents(self.model):
            return list(tensors_in(functional_call(self.model, state, self.args, self.kwargs)))

    def _random_like(self, tensor: Tensor) -> Tensor:
        """Random weights that keep the scale of their input; random biases and scales around 1."""
        if not tensor.is_floating_point():
            return tensor.detach()
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
        if tensor.ndim < 2:
            new = torch.rand(tensor.shape, generator=self.random) + 0.5
        else:
            new = torch.randn(tensor.shape, generator=self.random) / fan_in**0.5
        return new.to(tensor)


def equal_to_rounding(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether outputs are equal up to rounding, which may differ between kernels of the device."""
    for a, b in zip(one, other, strict=True):
        largest = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
        if not torch.allclose(a, b, rtol=0.0, atol=64 * torch.finfo(a.dtype).eps * largest, equal_nan=True):
            return False
    return True


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.is_cuda})


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and let all parameters require gradients; restore everything at the end."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    attributes = {module: dict(vars(module)) for module in model.modules()}
    with kept_contents(model):
        model.eval()
        for p in frozen:
            p.requires_grad_(True)
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=_cuda_devices(model)):
                yield
        finally:
            for p in frozen:
                p.requires_grad_(False)
            for module, before in attributes.items():
                vars(module).clear()
                vars(module).update(before)
