"""Record one run of a model: the layers that it calls and the operations between them.

Torch-Pruning (Fang et al. 2023) finds the parameters that belong to no layer. Its index rules are not used, because
they guess shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from ..utils import require
from .coupling_layers import port_widths
from .units import transformers_conv1d

__all__ = ["Call", "Trace", "copied_buffers", "kept_contents", "tensors_in"]

OPAQUE = (nn.RNNBase, nn.MultiheadAttention)
Source = tuple[Any, int]  # a node of the autograd graph, and which of its results


class Call(NamedTuple):
    """A call of a layer: where its floating-point inputs come from, and its outputs."""

    layer: nn.Module
    inputs: tuple[Source, ...]
    outputs: tuple[Source, ...]


class _RecordConcatenations(TorchFunctionMode):
    """Records the shapes of the inputs of `torch.cat`."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[Any, list[tuple[int, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("cat", "concat", "concatenate", "hstack", "column_stack"):
            tensors = args[0] if args else kwargs["tensors"]
            if out.grad_fn is not None:
                self.given[out.grad_fn] = [tuple(tensor.shape) for tensor in tensors]
        return out


class Trace:
    """One run of a model.

    Attributes:
        calls: the calls of known layers.
        parameters: parameters outside of known layers, with the dimension along which units lie.
        returned: the tensors that the model returns.
        given: the shapes of the inputs of `torch.cat`, by node.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with require("units that span tensors need Torch-Pruning", "pruning"):
            import torch_pruning as tp

        class Graph(tp.DependencyGraph):  # type: ignore[misc]
            def _build_dependency(self, module2node: dict[Any, Any]) -> None:
                self.nodes = dict(module2node)
                module2node.clear()  # Torch-Pruning then builds nothing more from it

        record = _RecordConcatenations()
        self.calls: list[Call] = []
        self.returned: list[Source] = []
        self.given = record.given

        def forward(model: nn.Module, _: Any) -> list[Tensor]:
            hooks = self._hooks(model)
            try:
                with record:
                    out = functional_call(model, copied_buffers(model), args, kwargs)
            finally:
                for hook in hooks:
                    hook.remove()
            results = list(tensors_in(out))
            if not results:
                raise ValueError(
                    f"{type(model).__name__} returned {type(out).__name__}, without a floating-point tensor to test "
                    "its units by; pass a module that returns a tensor, or a tuple, list or dict of tensors"
                )
            tensors = [tensor for tensor in results if tensor.grad_fn is not None]
            self.returned += map(_source, tensors)
            return tensors

        opaque: list[nn.Module] = [module for module in model.modules() if isinstance(module, OPAQUE)]
        custom = {
            type(module): None for module in model.modules() if isinstance(module, OPAQUE + transformers_conv1d())
        }
        graph = Graph()
        with _as_one_operation(opaque):
            graph.build_dependency(model, (), forward_fn=forward, customized_pruners=custom, verbose=False)
        self.parameters = [(p, dim) for p, dim in graph.unwrapped_parameters if p in graph.nodes]

    def shapes(self, fn: Any) -> list[tuple[int, ...]]:
        """The shapes of the results of a node."""
        return [tuple(each.shape) for each in fn._input_metadata]

    def steps(self) -> list[Any]:
        """The calls of layers, and the nodes of the operations between them, in the order in which they ran."""
        call_of = {fn: call for call in self.calls for fn, _ in call.outputs}
        found: dict[Any, int] = {}
        open_: list[Any] = [fn for fn, _ in self.returned] + list(call_of)
        while open_:
            fn = open_.pop()
            if fn is None or fn in found or hasattr(fn, "variable"):
                continue
            found[fn] = fn._sequence_nr()
            open_ += [source for source, _ in (call_of[fn].inputs if fn in call_of else fn.next_functions)]
        in_order = sorted(found, key=lambda fn: found[fn])
        return list(dict.fromkeys(call_of.get(fn, fn) for fn in in_order))

    def _hooks(self, model: nn.Module) -> list[Any]:
        inputs: dict[nn.Module, tuple[Source, ...]] = {}

        def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[layer] = tuple(map(_source, tensors_in((args, list(kwargs.values())))))

        def afterwards(layer: nn.Module, _: Any, out: Any) -> Any:
            if isinstance(out, Tensor) and out._is_view() and _source(out) not in inputs[layer]:
                out = out.clone()  # an in-place change of a view would bypass its node
            outputs = tuple(_source(tensor) for tensor in tensors_in(out) if tensor.grad_fn is not None)
            if outputs and not set(outputs) & set(inputs[layer]):
                self.calls.append(Call(layer, inputs[layer], outputs))
            return out

        layers = [module for module in model.modules() if port_widths(module) is not None]
        hooks: list[Any] = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
        return hooks + [layer.register_forward_hook(afterwards) for layer in layers]


class _Leaf(NamedTuple):
    variable: Tensor


def _source(tensor: Tensor) -> Source:
    if tensor.grad_fn is None:
        return (_Leaf(tensor) if isinstance(tensor, nn.Parameter) else None), 0
    return tensor.grad_fn, tensor.output_nr


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
    held = [x for module in model.modules() for x in vars(module).values() if isinstance(x, dict | list)]
    kept = [(x, dict(x) if isinstance(x, dict) else list(x)) for x in held]
    try:
        yield
    finally:
        for container, before in kept:
            container.clear()
            container.update(before) if isinstance(container, dict) else container.extend(before)


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
