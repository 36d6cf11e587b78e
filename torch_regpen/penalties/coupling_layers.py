"""The units of a layer in its parameters: the rows that write them and the columns that read them.

A row here writes one unit. It is a row of a Linear, a filter, the rows of all gates of an LSTM, or the rows of an
attention head in q, k and v. The filters in one group of a grouped convolution are one row: they are removed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from .units import GATES, transformers_conv1d

__all__ = [
    "Slices",
    "channel_dim",
    "columns",
    "inner_columns",
    "out_index",
    "port_widths",
    "resize",
    "rows",
]


@dataclass(frozen=True, eq=False)
class Slices:
    """Slices of one parameter, the same number for each unit.

    Attributes:
        module: the module that owns the parameter.
        key: the name of the parameter in the module.
        dim: the dimension along which the slices lie.
        index: of shape (units, k): the `k` slices that belong to each unit, int64.
    """

    module: nn.Module
    key: str
    dim: int
    index: Tensor


def rows(module: nn.Module) -> dict[str, list[Slices]]:
    """For each part of a layer, the slices that write its units; empty for an unknown layer.

    The parts of an LSTM are its layers and directions, `"l0"`, `"l0_reverse"`. The parts of nn.MultiheadAttention are
    its heads, `""`, and `"out_proj"`. Other layers have one part, `""`.
    """
    layer: Any = module
    if isinstance(module, _ConvNd):
        lie_along = 1 if isinstance(module, _ConvTransposeNd) and module.groups == 1 else 0
        n = module.weight.shape[lie_along]
        units = module.out_channels if module.groups == 1 else module.groups
        return {"": [*_cut(layer, "weight", lie_along, units, n), *_cut(layer, "bias", 0, units, module.out_channels)]}
    if isinstance(module, nn.Linear):
        return {"": [*_cut(layer, "weight", 0, module.out_features), *_cut(layer, "bias", 0, module.out_features)]}
    if isinstance(module, transformers_conv1d()):
        return {"": [*_cut(layer, "weight", 1, layer.nf), *_cut(layer, "bias", 0, layer.nf)]}
    if isinstance(module, nn.Embedding):
        return {"": _cut(layer, "weight", 1, module.embedding_dim)}
    if isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm):
        n = layer.weight.shape[-1] if layer.weight is not None else 0
        return {"": [*_cut(layer, "weight", -1, n), *_cut(layer, "bias", -1, n)]}
    if isinstance(module, nn.RNNBase) and not module.proj_size:
        return {part: _gates(module, part) for part in _directions(module)}
    if isinstance(module, nn.MultiheadAttention):
        n = module.embed_dim
        out = [*_cut(module.out_proj, "weight", 0, n), *_cut(module.out_proj, "bias", 0, n)]
        return {"": _heads_of(module), "out_proj": out}
    return {}


def columns(module: nn.Module) -> list[Slices]:
    """The slices that read each unit of a layer's input; for PReLU, the slopes."""
    layer: Any = module
    if isinstance(module, _ConvNd):
        return _cut(layer, "weight", 0 if isinstance(module, _ConvTransposeNd) else 1, module.in_channels)
    if isinstance(module, nn.Linear):
        return _cut(layer, "weight", 1, module.in_features)
    if isinstance(module, transformers_conv1d()):
        return _cut(layer, "weight", 0, layer.nx)
    if isinstance(module, nn.PReLU):
        return _cut(layer, "weight", 0, module.num_parameters) if module.num_parameters > 1 else []
    if isinstance(module, nn.RNNBase):
        first = (f"weight_ih_{part}" for part in _directions(module) if part in ("l0", "l0_reverse"))
        return [found for key in first for found in _cut(layer, key, 1, module.input_size)]
    if isinstance(module, nn.MultiheadAttention):
        keys = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        stacked = module._qkv_same_embed_dim or module.kdim == module.vdim == module.embed_dim
        return [found for key in keys for found in _cut(layer, key, 1, module.embed_dim)] if stacked else []
    return []


def inner_columns(module: nn.Module, part: str) -> list[Slices]:
    """The slices in the same layer that read the units of one of its parts."""
    if isinstance(module, nn.MultiheadAttention) and part == "":
        return _cut(module.out_proj, "weight", 1, module.num_heads, module.embed_dim)
    if not isinstance(module, nn.RNNBase):
        return []
    directions = _directions(module)
    layer, direction = divmod(directions.index(part), 1 + module.bidirectional)
    units = torch.arange(module.hidden_size).unsqueeze(1)
    after = [other for other in directions if other.startswith(f"l{layer + 1}_") or other == f"l{layer + 1}"]
    following = [Slices(module, f"weight_ih_{other}", 1, units + direction * module.hidden_size) for other in after]
    return [Slices(module, f"weight_hh_{part}", 1, units), *following]


def port_widths(layer: Any) -> tuple[int, int] | None:
    """The numbers of output and input units of a layer; None for other operations.

    The second number is 0 for norms, PReLU and embeddings: norms and PReLU pass on the units of their input.
    """
    if isinstance(layer, _ConvNd):
        return layer.out_channels, layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, transformers_conv1d()):
        conv1d: Any = layer
        return conv1d.nf, conv1d.nx
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional), layer.input_size
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, layer.embed_dim
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, 0
    if isinstance(layer, nn.PReLU):
        return (layer.num_parameters, 0) if layer.num_parameters > 1 else None
    if isinstance(layer, _NormBase):
        return layer.num_features, 0
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, 0
    return (layer.normalized_shape[-1], 0) if isinstance(layer, nn.LayerNorm) else None


def channel_dim(layer: Any, shape: Sequence[int], along: Sequence[int] = ()) -> int:
    """The dimension along which the units of a layer's inputs and outputs lie.

    Args:
        layer: the layer.
        shape: the shape of the input or output.
        along: the dimensions along which the units of the input lie, where known.
    """
    if isinstance(layer, _ConvNd):
        return -1 - len(layer.kernel_size)
    if isinstance(layer, _InstanceNorm):
        return 0 if len(shape) == layer._get_no_batch_dim() else 1
    if isinstance(layer, nn.LayerNorm):  # timm and torchvision have subclasses for images, whose channels come first
        fitting = [dim for dim, size in enumerate(shape) if size == layer.normalized_shape[-1]]
        return max((dim for dim in fitting if dim in along), default=max(fitting, default=-1))
    return 1 if isinstance(layer, _NormBase | nn.GroupNorm | nn.PReLU) else -1


def resize(module: nn.Module, before: dict[str, Any]) -> None:
    """Set the attributes of a layer to the sizes of its parameters, after slices were removed.

    Args:
        module: the layer.
        before: its parameters before the removal, by name.
    """
    layer: Any = module
    if isinstance(module, _ConvNd):
        if module.groups > 1:  # whole groups were removed
            module.groups = module.groups * len(module.weight) // len(before["weight"])
        sizes = len(module.weight), module.weight.shape[1] * module.groups
        module.out_channels, module.in_channels = sizes[::-1] if isinstance(module, _ConvTransposeNd) else sizes
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, transformers_conv1d()):
        layer.nx, layer.nf = layer.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, _NormBase):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_channels = len(module.weight)  # each channel is a group
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.RNNBase):
        module.hidden_size = module.hidden_size * len(layer.weight_hh_l0) // len(before["weight_hh_l0"])
        module.input_size = layer.weight_ih_l0.shape[1]
        module._init_flat_weights()


def out_index(module: nn.Module, unit: int) -> tuple[str, int]:
    """The part and the row that write a unit of a layer's output."""
    if isinstance(module, _ConvNd) and module.groups > 1:
        return "", unit // (module.out_channels // module.groups)
    if isinstance(module, nn.RNNBase):
        direction, row = divmod(unit, module.proj_size or module.hidden_size)
        return f"l{module.num_layers - 1}{'_reverse' * direction}", row
    return ("out_proj" if isinstance(module, nn.MultiheadAttention) else ""), unit


def _cut(module: nn.Module, key: str, dim: int, units: int, n: int | None = None) -> list[Slices]:
    """The `n` slices of a parameter, divided into units; empty if the layer lacks the parameter."""
    parameter = getattr(module, key, None)
    if parameter is None:
        return []
    n = units if n is None else n
    return [Slices(module, key, dim % parameter.ndim, torch.arange(n).view(units, n // units))]


def _directions(module: nn.RNNBase) -> list[str]:
    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{suffix}" for layer in range(module.num_layers) for suffix in suffixes]


def _gates(module: nn.RNNBase, part: str) -> list[Slices]:
    gates = next((n for kind, n in GATES.items() if isinstance(module, kind)), 1)
    index = torch.arange(gates * module.hidden_size).view(gates, -1).T.contiguous()
    keys = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ())]
    return [Slices(module, f"{key}_{part}", 0, index) for key in keys]


def _heads_of(module: nn.MultiheadAttention) -> list[Slices]:
    n, size = module.num_heads, module.head_dim
    one = torch.arange(n * size).view(n, size)
    stacked = torch.cat([one, one + n * size, one + 2 * n * size], 1)
    places = [("in_proj_weight", 0, stacked), ("in_proj_bias", 0, stacked), ("bias_k", 2, one), ("bias_v", 2, one)]
    places += [(key, 0, one) for key in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    return [Slices(module, key, dim, index) for key, dim, index in places if getattr(module, key) is not None]
