"""Follow units through the graph of a model, to find the layers that write and read the same units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .coupling_labels import NONE, after, differs, fold, narrowed
from .coupling_layers import channel_dim, out_index, port_widths
from .coupling_trace import Call, Trace

__all__ = ["Flow", "Row"]

ATTENTION = ("ScaledDotProduct", "Bmm")  # operations whose units are heads, even if there is only one


class Row(NamedTuple):
    """The row that writes a unit: in a part of a layer, or in a parameter that belongs to no known layer."""

    layer: nn.Module
    part: str
    unit: int


class Flow:
    """The units of a model, followed from the rows that write them to the columns that read them.

    Each element of each result has a label: the number of the row that wrote it.

    Attributes:
        layers: the layers that the forward pass calls, with their numbers of output and input units.
        parameters: parameters outside of known layers, by owner and key, with the dimension along which units lie.
        readers: for each row, the layers that read it, with the index of the column.
        marks: what each row passes through: `"output"`, `"attention"`, and norms that take the mean over units.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owners: dict[Tensor, tuple[nn.Module, str]] = {
            p: (m, key) for m in model.modules() for key, p in m._parameters.items() if p is not None
        }
        trace = Trace(model, args, kwargs)
        self.layers = {call.layer: width for call in trace.calls if (width := port_widths(call.layer)) is not None}
        self.parameters = {owners[p]: dim for p, dim in trace.parameters}
        self.readers: dict[Row, list[tuple[nn.Module, int]]] = defaultdict(list)
        self.marks: dict[Row, set[Any]] = defaultdict(set)
        self._trace = trace
        self._parent: dict[Row, Row] = {}
        self._rows: list[Row] = []
        self._numbers: dict[Row, int] = {}
        self._labels: dict[Any, Tensor] = {}  # of the results of nodes, and of parameters
        for p, dim in trace.parameters:
            self._labels[p] = _along(
                self._numbered([Row(*owners[p], index) for index in range(p.shape[dim])]), dim, p.shape
            )
        for step in trace.steps():
            if isinstance(step, Call):
                self._call(step)
            else:
                inputs = [self._of(*source) for source in step.next_functions]
                for number, shape in enumerate(trace.shapes(step)):
                    labels = after(step, number, inputs, trace.given.get(step, ()), shape, self._join_all)
                    if labels is not None:
                        self._labels[step, number] = labels
                        if step.name().startswith(ATTENTION):
                            self._mark(labels, "attention")
        for source in trace.returned:
            self._mark(self._of(*source), "output")

    def find(self, row: Row) -> Row:
        """The row that represents all rows joined with `row`."""
        parent = self._parent.setdefault(row, row)
        while parent != row:
            self._parent[row] = self._parent[parent]
            row, parent = parent, self._parent[parent]
        return row

    def join(self, one: Row, other: Row) -> None:
        """Join two rows into one unit."""
        if one is not other:
            self._parent[self.find(other)] = self.find(one)

    def _numbered(self, rows: list[Row]) -> Tensor:
        for row in rows:
            if row not in self._numbers:
                self._numbers[row] = len(self._rows)
                self._rows.append(row)
        return torch.tensor([self._numbers[row] for row in rows], dtype=torch.int64)

    def _of(self, fn: Any, number: int) -> Tensor | None:
        """The labels of a result of a node, or of a parameter. Joined rows have the same label."""
        labels = self._labels.get(getattr(fn, "variable", (fn, number)))
        if labels is None:
            return None
        different, index = labels[_stored(labels)].unique(return_inverse=True)
        units = [
            label if label == NONE else self._numbers[self.find(self._rows[label])] for label in different.tolist()
        ]
        return narrowed(torch.tensor(units, dtype=torch.int64)[index].expand_as(labels))

    def _join_all(self, one: Tensor, other: Tensor) -> None:
        for a, b in _pairs(one, other):
            if a != b and a != NONE != b:
                self.join(self._rows[a], self._rows[b])

    def _mark(self, labels: Tensor | None, mark: Any) -> None:
        if labels is not None:
            for label in labels.unique().tolist():
                if label != NONE:
                    self.marks[self._rows[label]].add(mark)

    def _call(self, call: Call) -> None:
        """Read the inputs of a layer, and label its outputs."""
        layer, (written, taken) = call.layer, self.layers[call.layer]
        own = self._numbered([Row(layer, *out_index(layer, unit)) for unit in range(written)])
        inputs = [self._of(*source) for source in call.inputs]
        shapes = [self._trace.shapes(fn)[number] for fn, number in call.outputs]
        dim = channel_dim(layer, shapes[0], differs(inputs[0]) if inputs and inputs[0] is not None else ())
        if shapes[0][dim] != written:
            return  # a subclass that does something else
        outputs = [_along(own, dim, shapes[0])]
        if isinstance(layer, nn.RNNBase) and not layer.proj_size:
            outputs += [self._states(layer, shape) for shape in shapes[1:]]
            for labels in (labels for labels in inputs[1:] if labels is not None):
                self._join_all(labels, self._states(layer, labels.shape))
        readable = inputs if isinstance(layer, nn.MultiheadAttention) else inputs[:1]
        for labels in (labels for labels in readable if labels is not None):
            if taken and labels.shape[channel_dim(layer, labels.shape)] == taken:
                self._read(layer, labels)
            elif not taken:
                outputs = [self._pass(layer, labels, outputs[0], dim % labels.ndim)]
        for source, labels in zip(call.outputs, outputs, strict=False):
            self._labels[source] = labels

    def _states(self, layer: nn.RNNBase, shape: Sequence[int]) -> Tensor:
        """The labels of the states of all layers and directions of a recurrent layer."""
        suffixes = ("", "_reverse") if layer.bidirectional else ("",)
        parts = [f"l{number}{suffix}" for number in range(layer.num_layers) for suffix in suffixes]
        rows = [self._numbered([Row(layer, part, unit) for unit in range(layer.hidden_size)]) for part in parts]
        return torch.stack([_along(each, -1, shape[1:]) for each in rows])

    def _read(self, layer: nn.Module, labels: Tensor) -> None:
        """Record which columns of a layer read which rows."""
        dim = channel_dim(layer, labels.shape)
        along = differs(labels)
        if along and dim % labels.ndim not in along:
            return  # the layer mixes places, not units
        per_group = layer.in_channels // layer.groups if isinstance(layer, _ConvNd) and layer.groups > 1 else 0
        columns = _along(torch.arange(labels.shape[dim]), dim, labels.shape)
        for label, column in _pairs(labels, columns):
            if label != NONE and per_group:
                self.join(Row(layer, "", column // per_group), self._rows[label])
            elif label != NONE:
                self.readers[self._rows[label]].append((layer, column))

    def _pass(self, layer: nn.Module, labels: Tensor, own: Tensor, dim: int) -> Tensor:
        """The labels of the output of a layer that scales each of its inputs, such as a norm."""
        along, over = differs(labels), set()
        if isinstance(layer, nn.GroupNorm) and layer.num_groups != layer.num_channels:
            over = {dim}
        elif isinstance(layer, nn.LayerNorm):
            n = len(layer.normalized_shape)
            over = {dim} if n == 1 else set(range(labels.ndim - n, labels.ndim))
        if over & set(along) and set(along) <= over:
            self._mark(labels, layer)
            self._mark(own, layer)
        if set(along) <= {dim}:
            self._join_all(own, labels)
            if isinstance(layer, nn.PReLU):
                for label, column in _pairs(own, _along(torch.arange(own.shape[dim]), dim, own.shape)):
                    self.readers[self._rows[label]].append((layer, column))
            return own
        for each in over:  # such as a norm of each head, with one scale for all heads
            labels = fold(labels, each, self._join_all).expand_as(labels)
        return labels


def _along(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Expand one label per index of a dimension to all elements of a tensor."""
    view = [1] * len(shape)
    view[dim] = -1
    return labels.view(view).expand(tuple(shape))


def _pairs(one: Tensor, other: Tensor) -> list[list[int]]:
    """The different pairs of the elements of two tensors."""
    one, other = torch.broadcast_tensors(one[_stored(one)], other[_stored(other)])
    pairs: list[list[int]] = torch.stack([one.flatten(), other.flatten()], 1).unique(dim=0).tolist()
    return pairs


def _stored(labels: Tensor) -> tuple[slice, ...]:
    """The index of the stored part of expanded labels."""
    return tuple(slice(None) if stride else slice(0, 1) for stride in labels.stride())
