"""Follow units through the graph of a model, to find the layers that write and read the same units.

Torch-Pruning (Fang et al. 2023) builds the graph from hooks on layers and the autograd graph. Its index rules are not
used, because they guess shapes. Instead, each result here carries a list of the rows that wrote it, unit by unit.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from ..utils import require
from .coupling_layers import out_index, port_widths
from .units import transformers_conv1d

__all__ = ["Flow", "Row", "copied_buffers", "kept_contents", "tensors_in"]

OPAQUE = (nn.RNNBase, nn.MultiheadAttention)
ATTENTION = ("ScaledDotProduct", "Bmm")  # operations that mix the values of a unit at different places


class Row(NamedTuple):
    """The row that writes a unit: in a part of a layer, or in a parameter that belongs to no known layer."""

    layer: nn.Module
    part: str
    unit: int


Labels = Sequence[Row | None]  # the row that wrote each unit of a result; None if no layer wrote it


class Flow:
    """The units of a model, followed from the rows that write them to the columns that read them.

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
        nodes, dims, returned, self._shapes = _trace(model, args, kwargs)
        self.layers = {layer: width for layer in nodes if (width := port_widths(layer)) is not None}
        self.parameters = {owners[p]: dim for p, dim in dims if p in nodes}
        self.readers: dict[Row, list[tuple[nn.Module, int]]] = defaultdict(list)
        self.marks: dict[Row, set[Any]] = defaultdict(set)
        self._parent: dict[Row, Row] = {}
        self._labels: dict[Any, Labels] = {}
        for layer, (written, _) in self.layers.items():
            self._labels[layer] = [Row(layer, *out_index(layer, unit)) for unit in range(written)]
        for p in (p for p, _ in dims if p in nodes):
            self._labels[p] = [Row(*owners[p], index) for index in range(p.shape[self.parameters[owners[p]]])]
        operations = [node for layer, node in nodes.items() if layer not in self._labels]
        for node in sorted(operations, key=lambda node: node.grad_fn._sequence_nr()):
            self._labels[node.module] = self._through(node)
        for layer in self.layers:
            for labels in self._inputs(nodes[layer]):
                self._read(layer, labels)
        for layer, node in nodes.items():
            if node.grad_fn in returned:
                self._mark(self._labels[layer], "output")

    def find(self, row: Row) -> Row:
        """The row that represents all rows joined with `row`."""
        parent = self._parent.setdefault(row, row)
        while parent != row:
            self._parent[row] = self._parent[parent]
            row, parent = parent, self._parent[parent]
        return row

    def join(self, one: Row | None, other: Row | None) -> None:
        """Join two rows into one unit."""
        if one is not None and other is not None and one is not other:
            self._parent[self.find(other)] = self.find(one)

    def _mark(self, labels: Labels, mark: Any) -> None:
        for label in filter(None, labels):
            self.marks[label].add(mark)

    def _read(self, layer: nn.Module, labels: Labels) -> None:
        own, (_, taken) = self._labels[layer], self.layers[layer]
        if isinstance(layer, _ConvNd) and layer.groups > 1:
            per_group = layer.in_channels // layer.groups
            for unit, label in enumerate(labels[:taken]):
                self.join(Row(layer, "", unit // per_group), label)
        elif taken:
            for unit, label in enumerate(labels[:taken]):
                if label is not None:
                    self.readers[label].append((layer, unit))
        else:
            for unit, (label, row) in enumerate(zip(labels, own, strict=False)):
                self.join(row, label)
                if isinstance(layer, nn.PReLU) and row is not None:
                    self.readers[row].append((layer, unit))
        if isinstance(layer, nn.LayerNorm) or (
            isinstance(layer, nn.GroupNorm) and layer.num_groups != layer.num_channels
        ):
            self._mark([*labels, *own], layer)

    def _inputs(self, node: Any) -> list[Labels]:
        """The labels of each input of a node; empty for an input that no layer wrote."""
        found: list[Labels] = []
        inputs = iter(node.inputs)
        for grad_fn, number in node.grad_fn.next_functions:
            is_leaf = grad_fn is None or ("AccumulateGrad" in grad_fn.name() and grad_fn.variable not in self._labels)
            source = None if is_leaf else next(inputs, None)
            found.append(self._chunk(source, number) if source is not None else [])
        return [*found, *(self._chunk(source, 0) for source in inputs)]  # a layer that is used several times has more

    def _chunk(self, node: Any, number: int) -> Labels:
        """The labels of one result of a node; a split has several results."""
        labels, fn = self._labels.get(node.module, []), node.grad_fn
        if "Split" not in fn.name() or not hasattr(fn, "_saved_dim"):
            return labels
        shape = fn._saved_self_sym_sizes
        if shape[_signed(fn._saved_dim, len(shape))] != len(labels):
            return labels
        sizes = getattr(fn, "_saved_split_sizes", None) or [fn._saved_split_size] * (number + 1)
        start = sum(sizes[:number])
        return labels[start : start + sizes[number]]

    def _through(self, node: Any) -> Labels:
        """The labels of the output of an operation."""
        fn, inputs = node.grad_fn, self._inputs(node)
        name, shapes = fn.name(), self._shapes.get(fn)
        if name.startswith("Cat") and shapes is not None and len(shapes.given) == len(inputs):
            dim = _signed(fn._saved_dim, len(shapes.out))
            sizes = [shape[dim] if len(shape) == len(shapes.out) else 0 for shape in shapes.given]  # 0: an empty tensor
            if all(len(labels) in (0, size) for labels, size in zip(inputs, sizes, strict=True)):
                return [each for labels, size in zip(inputs, sizes, strict=True) for each in labels or [None] * size]
        if name.startswith("ScaledDotProduct") and shapes is not None:  # keys and values may have fewer heads
            inputs = [_repeat_heads(labels, math.prod(shapes.out[1::2]), shapes.out[-1]) for labels in inputs]
        labels = self._merge(inputs)
        if not labels:
            return labels
        if name.startswith(ATTENTION):
            self._mark(labels, "attention")
        if name.startswith("Glu"):
            return self._fold(labels, [[unit, unit + len(labels) // 2] for unit in range(len(labels) // 2)])
        if name.startswith("Slice"):
            shape = fn._saved_self_sym_sizes
            dim = _signed(fn._saved_dim, len(shape))
            if shape[dim] == len(labels) and dim in (1, len(shape) - 1):
                return labels[fn._saved_start : fn._saved_end : fn._saved_step]
        if shapes is not None and hasattr(fn, "_saved_self_sym_sizes"):
            return self._reshaped(labels, tuple(fn._saved_self_sym_sizes), shapes.out)
        return labels

    def _reshaped(self, labels: Labels, before: tuple[int, ...], after: tuple[int, ...]) -> Labels:
        """The labels of a tensor that is flattened, unflattened, or repeated head by head for grouped queries."""
        n, kept = len(labels), len(after) - 1
        merged = before[kept:]  # the dimensions merged into the last one
        if len(merged) > 1 and n in merged and math.prod(merged) == after[-1] != n:
            place = merged.index(n)
            inner = [label for label in labels for _ in range(math.prod(merged[place + 1 :]))]
            return inner * math.prod(merged[:place])
        if len(before) == 2 < len(after) and math.prod(after[1:]) == before[1] == n:
            size = n // after[1]
            return self._fold(labels, [list(range(unit * size, (unit + 1) * size)) for unit in range(after[1])])
        if len(before) == len(after) == 5 and before[2] == 1 and before[1] * before[-1] == n:
            return _repeat_heads(labels, n * after[2], before[-1])
        return labels

    def _fold(self, labels: Labels, together: list[list[int]]) -> Labels:
        for units in together:
            for unit in units[1:]:
                self.join(labels[units[0]], labels[unit])
        return [labels[units[0]] for units in together]

    def _merge(self, inputs: list[Labels]) -> Labels:
        """The labels of a result that is computed elementwise from several inputs."""
        n = max(map(len, inputs), default=0)
        merged: list[Row | None] = [None] * n
        for labels in inputs:
            if len(labels) < n:
                continue  # no labels, or units along another dimension
            for unit, label in enumerate(labels):
                self.join(merged[unit], label)
                merged[unit] = merged[unit] or label
        return merged


def _repeat_heads(labels: Labels, n: int, size: int) -> Labels:
    """The labels of heads of this size, each repeated so that there are `n` labels."""
    if not labels or n % len(labels) or len(labels) % size:
        return labels
    starts = range(0, len(labels), size)
    return [label for start in starts for _ in range(n // len(labels)) for label in labels[start : start + size]]


class _Shapes(NamedTuple):
    out: tuple[int, ...]
    given: list[tuple[int, ...]]


class _RecordShapes(TorchFunctionMode):
    """Records the shapes of the results of functions and, for `torch.cat`, the shapes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[Any, _Shapes] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.grad_fn is not None:
            is_cat = getattr(func, "__name__", "") in ("cat", "concat", "concatenate", "hstack", "column_stack")
            given: Any = [*args, *(kwargs or {}).values()][0] if is_cat else ()
            # A function such as dropout in eval mode returns its input, whose shape is already recorded.
            self.shapes.setdefault(out.grad_fn, _Shapes(tuple(out.shape), [tuple(tensor.shape) for tensor in given]))
        return out


def _trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[Any, Any], list[tuple[Tensor, int]], set[Any], dict[Any, _Shapes]]:
    """Run a model once: nodes by layer, parameters outside of layers, what the model returns, and shapes."""
    with require("units that span tensors need Torch-Pruning", "pruning"):
        import torch_pruning as tp

    class Graph(tp.DependencyGraph):  # type: ignore[misc]
        def _build_dependency(self, module2node: dict[Any, Any]) -> None:
            self.nodes = dict(module2node)
            module2node.clear()  # Torch-Pruning then builds nothing more from it

    record = _RecordShapes()
    returned: set[Any] = set()

    def forward(model: nn.Module, _: Any) -> list[Tensor]:
        with record:
            out = functional_call(model, copied_buffers(model), args, kwargs)
        tensors = [tensor for tensor in tensors_in(out) if tensor.grad_fn is not None]
        returned.update(tensor.grad_fn for tensor in tensors)
        return tensors

    opaque: list[nn.Module] = [module for module in model.modules() if isinstance(module, OPAQUE)]
    custom = {type(module): None for module in model.modules() if isinstance(module, OPAQUE + transformers_conv1d())}
    graph = Graph()
    with _as_one_operation(opaque):
        graph.build_dependency(model, (), forward_fn=forward, customized_pruners=custom, verbose=False)
    return graph.nodes, [(p, dim) for p, dim in graph.unwrapped_parameters], returned, record.shapes


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers of a model, by name, for `functional_call`, which may change them."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@contextmanager
def kept_contents(model: nn.Module) -> Iterator[None]:
    """At the end, restore the contents of the dicts and lists of all modules, such as hooks and caches."""
    kept = [
        (x, copy.copy(x)) for module in model.modules() for x in vars(module).values() if isinstance(x, dict | list)
    ]
    try:
        yield
    finally:
        for container, before in kept:
            container.clear()
            container.update(before) if isinstance(container, dict) else container.extend(before)


def _signed(dim: int, ndim: int) -> int:
    return (dim - 2**64 if dim >= 2**63 else dim) % ndim  # autograd saves -1 as an unsigned number


class _Operation(torch.autograd.Function):
    """One node of the autograd graph from inputs to results. It is never run backward."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


@contextmanager
def _as_one_operation(modules: list[nn.Module]) -> Iterator[None]:
    """Make each of the modules one node of the autograd graph, whatever it does inside."""
    before = {module: module.__dict__.get("forward") for module in modules}

    def stand_in(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                out = forward(*args, **kwargs)
            results = list(tensors_in(out))
            inputs = list(tensors_in((args, list(kwargs.values()))))
            inputs.append(torch.zeros((), requires_grad=True))  # makes a node even if no input requires grad
            return _replace(out, iter(_Operation.apply(len(results), *results, *inputs)))

        return run

    for module in modules:
        module.forward = stand_in(module.forward)
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _replace(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with its floating-point tensors replaced, in their order."""
    if isinstance(value, PackedSequence):
        return PackedSequence(next(tensors), *value[1:])
    if isinstance(value, tuple):
        return tuple(_replace(each, tensors) for each in value)
    return next(tensors) if isinstance(value, Tensor) and value.is_floating_point() else value
