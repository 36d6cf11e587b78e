"""Export exact zeros: masks for torch.nn.utils.prune, sparse files, dead units, and smaller models."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .distributed.shards import DTensor
from .groups.grouping import Grouping
from .inspect.parameters import ParameterUse, find_parameters
from .inspect.shrink import shrink
from .inspect.shrink_inputs import shrink_inputs
from .penalties.base import Penalty
from .penalties.rules import Select

__all__ = ["dead_units", "load_sparse_state_dict", "prune_masks", "shrink", "shrink_inputs", "sparse_state_dict"]

SPARSE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64)
UNCALLED = (nn.ParameterList, nn.ParameterDict, NonDynamicallyQuantizableLinear)  # the last: of MultiheadAttention
INDEX_BYTES = 4  # a position in compressed sparse row format


def dead_units(penalty_or_model: Penalty | nn.Module, *, select: Select | None = None) -> dict[str, list[int]]:
    """The output units whose incoming weights are all exactly zero: `{parameter name: [unit, ...]}`.

    An output unit is a neuron, a filter or a row of an embedding. A unit of an LSTM or GRU is dead if its rows are zero
    in all gates of both matrices. Units of stacked experts are numbered across all experts. For a penalty with
    `groups="input"`, the result lists the input units that no weight reads; for a sum of penalties with both kinds of
    groups, the output units. Parameters without dead units or with fewer than 2 dimensions are left out.

    A dead unit still outputs its bias. Before it is removed, for instance by Torch-Pruning, this constant must be added
    to the bias of the next layer, as in `examples/export_pruned.py`. Masks of torch.nn.utils.prune are ignored: make
    them permanent with `prune.remove` first.

    Args:
        penalty_or_model: a penalty, for the parameters that it penalizes, or a model.
        select: the parameters of a model, in the forms of a penalty's `select`. None is "weights": no biases and no
            normalization layers.

    Raises:
        TypeError: `penalty_or_model` is neither a penalty nor a model.
        ValueError: `select` matches nothing, or is given with a penalty.

    Example:
        >>> import torch
        >>> from torch_regpen.export import dead_units
        >>> layer = torch.nn.Linear(2, 3)
        >>> with torch.no_grad():
        ...     _ = layer.weight[1].zero_()
        >>> dead_units(layer)
        {'weight': [1]}
    """
    inputs: dict[str, Grouping] = {}
    outputs: set[str] = set()
    if isinstance(penalty_or_model, Penalty):
        for term in penalty_or_model.terms(frozen=True):
            if term.grouped and term.penalty.groups == "output":
                outputs.add(term.name)
            elif term.grouped and (term.penalty.groups == "input" or isinstance(term.penalty.groups, int)):
                inputs.setdefault(term.name, term.grouping)
    found = {}
    for place in find_parameters(penalty_or_model, select, default="weights"):
        if place.tensor.ndim > 1:
            units = None if place.name in outputs else inputs.get(place.name)
            found[place.name] = place.dead(units).nonzero().flatten().tolist()
    return {name: units for name, units in found.items() if units}


@torch.no_grad()
def prune_masks(penalty_or_model: Penalty | nn.Module, *, select: Select | None = None) -> dict[str, Tensor]:
    """Keep exact zeros at zero in further training, with masks of `torch.nn.utils.prune`.

    A parameter `NAME` with zeros becomes `NAME_orig * NAME_mask` at each forward. `NAME_orig` is the same tensor as
    before, so an optimizer keeps it; `NAME_mask` is a buffer of zeros and ones.
    `torch.nn.utils.prune.remove(module, NAME)` makes it a plain parameter again, with its zeros. Penalties follow the
    parameter to its new name and back.

    torch computes the product when the module that owns the parameter is called. If a model reads the parameter without
    calling this module, the parameter is not trained; use `RegularizedOptimizer.freeze_zeros()` there.

    Args:
        penalty_or_model: a penalty, for the parameters that it penalizes, or a model.
        select: the parameters of a model, in the forms of a penalty's `select`. None is "weights": no biases, which
            often start at zero, and no normalization layers.

    Returns:
        `{parameter name: mask}`; a mask has the shape of the parameter and is True where a weight is kept.

    Raises:
        TypeError: `penalty_or_model` is neither a penalty nor a model.
        ValueError: a parameter is sharded, or has zeros and is parametrized, in no module, or in a module that is never
            called (an nn.ParameterList or nn.ParameterDict, the `out_proj` of nn.MultiheadAttention); `select` matches
            nothing, or is given with a penalty. Nothing is changed then.

    Example:
        >>> import torch
        >>> from torch_regpen.export import prune_masks
        >>> layer = torch.nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.0, 3.0]]))
        >>> prune_masks(layer)
        {'weight': tensor([[False,  True]])}
    """
    chosen = find_parameters(penalty_or_model, select, default="weights")
    pruned = [place for place in chosen if isinstance(place.tensor, DTensor) or bool((place.tensor == 0).any())]
    for place in pruned:
        _check_prunable(place)
    masks = {place.name: place.tensor != 0 for place in pruned}
    for place in pruned:
        for owner, key in {(ref.owner, ref.key): None for ref in place.refs}:
            plain = key.removesuffix("_orig")
            again = f"{plain}_mask" in owner._buffers  # type: ignore[union-attr]
            prune.custom_from_mask(owner, plain if again else key, masks[place.name])
    return masks


def sparse_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model, with matrices in compressed sparse row format (CSR) if that is smaller.

    In this format, with 32-bit positions, a matrix takes `nonzeros * (itemsize + 4) + 4 * (rows + 1)` bytes. In float32
    that is smaller if a little more than half of the elements are zero. All other entries are unchanged.

    Args:
        model: the model.

    Returns:
        The state dict, which `torch.save` writes and `torch.load(..., weights_only=True)` reads.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import torch
        >>> from torch_regpen.export import sparse_state_dict
        >>> model = torch.nn.Linear(8, 8)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_().fill_diagonal_(1.0)
        >>> sparse_state_dict(model)["weight"].layout
        torch.sparse_csr
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    state: dict[str, Any] = model.state_dict()
    known: dict[tuple[Any, ...], Tensor] = {}  # convert, and save, a shared matrix once
    for name, w in state.items():
        if not isinstance(w, Tensor) or isinstance(w, DTensor) or w.ndim != 2 or w.layout != torch.strided:
            continue
        nonzeros = int(torch.count_nonzero(w)) if w.dtype in SPARSE else w.numel()
        if sparse_bytes(nonzeros, len(w), w.itemsize) < w.numel() * w.itemsize:
            key = w.data_ptr(), w.shape, w.stride(), w.dtype
            if key not in known:
                known[key] = _compressed(w)
            state[name] = known[key]
    return state


def load_sparse_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """`model.load_state_dict(state)`, for a state dict with sparse tensors.

    Args:
        model: the model.
        state: the state dict, as from `sparse_state_dict`.

    Raises:
        TypeError: `model` is not a module, or `state` is not a dict.
        RuntimeError: as `load_state_dict`: a name is missing or unexpected, or a shape differs.

    Example:
        >>> import torch
        >>> from torch_regpen.export import load_sparse_state_dict
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> load_sparse_state_dict(model, {"weight": torch.eye(2).to_sparse()})
        >>> model.weight.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if not isinstance(model, nn.Module) or not isinstance(state, Mapping):
        raise TypeError(
            f"given a {type(model).__name__} and a {type(state).__name__}; allowed are a torch.nn.Module and a state "
            "dict, as in load_sparse_state_dict(model, torch.load(file))"
        )
    dense = OrderedDict(
        (name, w.to_dense() if isinstance(w, Tensor) and w.layout != torch.strided else w) for name, w in state.items()
    )
    if hasattr(state, "_metadata"):  # module versions, used to convert older states
        dense._metadata = state._metadata  # type: ignore[attr-defined]
    model.load_state_dict(dense)


def sparse_bytes(nonzeros: int, rows: int, itemsize: int) -> int:
    """The size in bytes of a matrix in compressed sparse row format with 32-bit positions."""
    return nonzeros * (itemsize + INDEX_BYTES) + (rows + 1) * INDEX_BYTES


def _compressed(w: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch warns that the format is in beta
        warnings.simplefilter("ignore")
        csr = w.to_sparse_csr()
        positions = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(*positions, csr.values(), csr.shape)


def _check_prunable(place: ParameterUse) -> None:
    for ref in place.refs:
        if ref.owner is None:
            why = "is not in a module, and torch.nn.utils.prune masks only parameters of modules; give the module"
        elif ref.key not in ref.owner._parameters:
            why = "is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
        elif any(isinstance(hook, WeightNorm | SpectralNorm) for hook in ref.owner._forward_pre_hooks.values()):
            why = "is parametrized; call torch.nn.utils.remove_weight_norm or remove_spectral_norm first"
        elif isinstance(ref.owner, UNCALLED):
            why = (
                f"is in a {type(ref.owner).__name__}, which is not called, so torch.nn.utils.prune would not apply its "
                "mask; call RegularizedOptimizer.freeze_zeros() instead, or choose other parameters with select"
            )
        elif isinstance(place.tensor, DTensor):
            why = "is sharded; call RegularizedOptimizer.freeze_zeros() instead, or give an unsharded copy"
        else:
            continue
        raise ValueError(f"parameter {place.name!r} {why}")
