"""The positions of output units, input units and heads in the weights of a layer.

They depend on the type of the layer. An input channel of a grouped convolution is in the filters that read it, a unit
of an LSTM in one row of each gate, and a head of a fused attention projection in q, k and v.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..groups.grouping import Grouping
from ..groups.layouts import Heads, Slices, Units
from ..groups.names import Groups, resolve
from ..groups.nm import NM
from ..groups.norms import NormGrouping
from ..utils import first_names, warn
from .lookup import ParameterRef

__all__ = [
    "MULTIPLYING",
    "grouping_of",
    "is_attention_projection",
    "recurrent_partner",
    "transformers_conv1d",
    "warn_before_norms",
]

# Layers that multiply their input with their weights.
MULTIPLYING: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    _ConvNd,
)

GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
# The names of attention projections in torch, timm and transformers, each with the number of stacked parts: 3 if the
# rows are all of q, then all of k, then all of v; 0 if they are ordered head by head.
PROJECTIONS = {
    **dict.fromkeys(("q", "k", "v", "query", "key", "value", "to_q", "to_k", "to_v", "q_attn"), 1),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin"), 1),
    **dict.fromkeys(("query_proj", "key_proj", "value_proj"), 1),
    **dict.fromkeys(("linear_q", "linear_k", "linear_v", "wq", "wk", "wv", "Wq", "Wk", "Wv"), 1),
    **dict.fromkeys(("to_query", "to_key", "to_value", "project_q", "project_k", "project_v"), 1),
    **dict.fromkeys(("projection_query", "projection_key", "projection_value"), 1),
    **dict.fromkeys(("query_global", "key_global", "value_global", "q_b_proj", "kv_b_proj"), 1),
    **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), 1),
    **dict.fromkeys(("kv", "kv_proj", "to_kv", "qk"), 2),
    **dict.fromkeys(("qkv", "qkv_proj", "to_qkv", "Wqkv", "c_attn", "in_proj", "in_proj_weight"), 3),
    "query_key_value": 0,
}
# The layers of these libraries stack q, k and v as above, except HEAD_BY_HEAD and layers with `head_first = True`.
LIBRARIES = ("torch", "torchvision", "timm", "transformers")
HEAD_BY_HEAD = (
    "timm.layers.halo_attn.HaloAttn",
    "timm.models.efficientformer.Attention",
    "timm.models.tiny_vit.Attention",
    "transformers.models.deberta.modeling_deberta.DisentangledSelfAttention",
    "transformers.models.gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention",
    "transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention",
)
SPLIT_OVER_DEVICES = ("transformers.models.codegen.modeling_codegen.CodeGenAttention",)
QUERIES = ("q", "query", "to_q", "q_proj", "q_lin", "query_proj", "linear_q", "wq", "Wq", "to_query")
SHARED = (
    *("k", "v", "key", "value", "to_k", "to_v", "k_proj", "v_proj", "k_lin", "v_lin", "key_proj", "value_proj"),
    *("linear_k", "linear_v", "wk", "wv", "Wk", "Wv", "to_key", "to_value"),
)
OUTPUTS = ("out_proj", "o_proj", "proj", "c_proj", "o", "dense", "out_lin", "to_out", "linear_out")


def grouping_of(groups: Groups | None, ref: ParameterRef, shape: torch.Size, scale: bool = True) -> Grouping:
    """Return the grouping that the argument `groups` of a penalty means for a parameter.

    Args:
        groups: see `Penalty`.
        ref: the location of the parameter, which identifies its layer.
        shape: the shape of the parameter.
        scale: see `NormGrouping`.

    Raises:
        ValueError: the layer has a different number of heads; see also `torch_regpen.groups.resolve`.
        TypeError: see `torch_regpen.groups.resolve`.
    """
    if isinstance(groups, Heads):
        return _heads(groups, ref, shape, scale)
    if isinstance(groups, NM) and groups.rows is None:
        gated = isinstance(ref.owner, tuple(GATES))  # a row of one gate, not all rows of a unit
        return groups if gated else replace(groups, rows=_units(ref, shape, False, True))
    if groups in ("output", "input") and isinstance(groups, str):
        return _units(ref, shape, groups == "input", scale)
    return resolve(groups, scale=scale)


def transformers_conv1d() -> tuple[type[nn.Module], ...]:
    """The Conv1D of transformers, whose weight is (inputs, outputs); empty if transformers is not imported."""
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def _units(ref: ParameterRef, shape: torch.Size, inputs: bool, scale: bool) -> NormGrouping:
    owner: Any = ref.owner
    if isinstance(owner, _ConvNd) and owner.groups > 1 and len(shape) > 2:
        # Divide dimension 0, over all filters, into the groups of channels.
        transposed = isinstance(owner, _ConvTransposeNd)
        if inputs != transposed:
            view = (owner.groups, shape[0] // owner.groups, *shape[1:])
            return Units(view, (0, 2), scale=scale)
        return Slices(0, scale=scale)
    gates = next((n for kind, n in GATES.items() if isinstance(owner, kind)), 1)
    if gates > 1 and not inputs and ref.key.startswith(("weight_ih", "weight_hh")):
        return Units((gates, shape[0] // gates, *shape[1:]), (1,), scale=scale)
    if len(shape) == 3 and _holds_experts(ref):
        return Units(tuple(shape), (0, 2 if inputs != _transposed_experts(ref, shape) else 1), scale=scale)
    flipped = len(shape) > 1 and isinstance(owner, (_ConvTransposeNd, *transformers_conv1d()))
    return Slices(int(inputs != flipped), scale=scale)


def recurrent_partner(ref: ParameterRef) -> torch.Tensor | None:
    """For an input-to-hidden matrix, the hidden-to-hidden matrix of the same units, and vice versa; else None."""
    if not isinstance(ref.owner, nn.RNNBase | nn.RNNCellBase):
        return None
    for one, other in (("weight_ih", "weight_hh"), ("weight_hh", "weight_ih")):
        if ref.key.startswith(one):
            partner: torch.Tensor = getattr(ref.owner, ref.key.replace(one, other))
            return partner.detach()
    return None


def _holds_experts(ref: ParameterRef) -> bool:
    """Whether a raw parameter holds the stacked weights of experts (mixture of experts)."""
    if ref.owner is None or isinstance(ref.owner, MULTIPLYING):
        return False
    return "expert" in f"{type(ref.owner).__name__} {ref.name}".lower()


def _transposed_experts(ref: ParameterRef, shape: torch.Size) -> bool:
    """Whether expert weights are (inputs, outputs): an attribute of the module says so, or else the shapes."""
    owner: Any = ref.owner
    says = getattr(owner, "is_transposed", None)
    if isinstance(says, bool):
        return says
    up, down = (owner._parameters.get(key) for key in ("gate_up_proj", "down_proj"))
    if up is None or down is None:
        return False
    # gate_up_proj has twice as many outputs as down_proj has inputs
    return bool(up.shape[2] == 2 * down.shape[1] and up.shape[1] != 2 * down.shape[2])


def is_attention_projection(ref: ParameterRef) -> bool:
    """Whether a parameter projects to the queries, keys or values of an attention layer."""
    return _projection(ref) in PROJECTIONS and _in_attention(ref)


def _projection(ref: ParameterRef) -> str:
    """The name of the projection layer; for a layer with several weights, the name of the weight."""
    parts = ref.name.split(".")
    return parts[-1] if ref.key != "weight" or len(parts) < 2 else parts[-2]


def _in_attention(ref: ParameterRef) -> bool:
    if isinstance(ref.owner, nn.MultiheadAttention):
        return True
    names = ref.name.split(".")[:-1]
    return any(map(ATTENTION.search, [*names, *(type(module).__name__ for module in ref.ancestors)]))


def _heads(heads: Heads, ref: ParameterRef, shape: torch.Size, scale: bool) -> Grouping:
    heads = Heads(heads.n, heads.dim, scale=heads.scale and scale)
    name = _projection(ref)
    if ref.owner is None or len(shape) < 2 or name not in (*PROJECTIONS, *OUTPUTS) or not _in_attention(ref):
        return heads
    along = 1 if isinstance(ref.owner, transformers_conv1d()) else 0
    if name in OUTPUTS:  # the heads lie along its inputs
        along = 1 - along
    if heads.dim is not None and heads.dim % len(shape) != along:
        return heads
    layer = _Attention(ref)
    layer.check(heads.n)
    rows, inputs = shape[along], shape[1 - along]
    parts = PROJECTIONS.get(name, 1)
    if parts > 1 and not layer.known and heads.dim is not None:
        return heads
    if parts != 1:
        before, n = layer.stacked(parts, heads.n, rows, inputs)
    else:
        before, n = 1, layer.shared_heads(heads.n, rows) if name in SHARED else heads.n
    if rows % (before * n):
        raise ValueError(f"{n} heads do not divide dimension {along} of a tensor of shape {tuple(shape)}")
    view = (*shape[:along], before, n, rows // (before * n), *shape[along + 1 :])
    return Units(view, (along + 1,), scale=heads.scale)


class _Attention:
    """The heads of the attention layer that contains a projection.

    Args:
        ref: the location of a weight of the projection.
    """

    def __init__(self, ref: ParameterRef) -> None:
        self.ref = ref
        self.modules = list(reversed(ref.ancestors))
        self.heads = self._number("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
        self.size = self._number("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
        # The projection is a submodule of the attention layer, or a parameter of it.
        parent = ref.ancestors[-2 if ref.key == "weight" and len(ref.ancestors) > 1 else -1]
        kinds = [kind for kind in type(parent).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
        self.kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
        self.known = any(kind.split(".")[0] in LIBRARIES for kind in self.kinds)
        self.head_by_head = not set(self.kinds).isdisjoint(HEAD_BY_HEAD) or getattr(parent, "head_first", False) is True
        queries = (parent._modules.get(key) for key in QUERIES)
        weights = (getattr(query, "weight", None) for query in queries)
        self.query_rows = next((len(w) for w in weights if isinstance(w, torch.Tensor) and w.ndim > 1), None)

    def _number(self, *names: str) -> int | None:
        """The first of these attributes on a module or its config, starting with the innermost module."""
        for module in self.modules:
            for source in (module, getattr(module, "config", None)):
                for name in names:
                    value = getattr(source, name, None)
                    if isinstance(value, int) and value > 0:
                        return value
        return None

    def check(self, n: int) -> None:
        """Raise `ValueError` if the layer does not have `n` heads."""
        if self.heads not in (None, n):
            raise ValueError(f"Heads({n}) on a layer of {self.heads} heads; with select=, choose layers of {n} heads")

    def shared_heads(self, n: int, rows: int) -> int:
        """The number of heads of a key or value projection; less than `n` in grouped-query attention."""
        if self.query_rows is None or rows * n % self.query_rows:
            return n
        return rows * n // self.query_rows

    def stacked(self, parts: int, n: int, rows: int, inputs: int) -> tuple[int, int]:
        """The number of stacked parts (3: q, k, v; 2: k, v; 1: ordered head by head), and the heads in each."""
        if not set(self.kinds).isdisjoint(SPLIT_OVER_DEVICES):
            raise ValueError(
                f"{self.kinds[0]} interleaves the rows of its heads; leave the parameter out with exclude="
            )
        if not self.known and not self.ref.warned:
            self.ref.warned = True
            warn(
                f"Heads({n}): the order of the heads in {self.kinds[0]} is not known; all of q, then k, then v is "
                f"assumed. If the order is head by head, pass Heads({n}, dim=0)"
            )
        size = self.size if self.size is not None else inputs // n
        found = 2 if parts == 3 and rows == 2 * n * size and self._number("is_cross_attention") else parts or 3
        if rows != found * n * size:
            raise ValueError(
                f"{rows} outputs are not {found} times {n} heads of {size}: either queries share keys and values, or "
                "the order of the heads is not known. Leave the parameter out with select= or exclude="
            )
        return (found if parts and not self.head_by_head else 1), n


def warn_before_norms(places: Iterable[tuple[ParameterRef, str, Tensor]], why: str) -> None:
    """Warn, for the reason `why`, of the parameters whose layer seems to feed a BatchNorm or InstanceNorm."""
    inside = [(ref, name) for ref, name, _ in places if ref.ancestors]
    layers = {layer for root in {ref.ancestors[0] for ref, _ in inside} for layer in _layers_before_norms(root)}
    names = dict.fromkeys(repr(name) for ref, name in inside if ref.owner in layers)
    if names:
        warn(f"a BatchNorm or InstanceNorm seems to follow {first_names(names)}. {why}")


def _layers_before_norms(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that are followed by a norm of as many channels."""
    layers = [module for module in root.modules() if isinstance(module, (*MULTIPLYING, _NormBase))]
    for layer, following in itertools.pairwise(layers):
        channels = getattr(layer, "out_channels", getattr(layer, "out_features", None))
        if isinstance(following, _NormBase) and following.num_features == channels:
            yield layer
