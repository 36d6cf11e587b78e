"""Handing exact zeros on: to torch.nn.utils.prune, to a sparse file, and to whoever takes dead units out of a model."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .distributed.shards import DTensor
from .groups.grouping import Grouping
from .inspect.parameters import ParameterUse, find_parameters
from .penalties.base import Penalty
from .penalties.rules import Select

__all__ = ["dead_units", "load_sparse_state_dict", "prune_masks", "sparse_state_dict"]

SPARSE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64)
INDEX_BYTES = 4  # of a position in compressed sparse row format


def dead_units(penalty_or_model: Penalty | nn.Module, *, select: Select | None = None) -> dict[str, list[int]]:
    """The output units whose incoming weights are all exactly zero: `{parameter name: [unit, ...]}`.

    Units are neurons, filters, rows of an embedding; of an LSTM or GRU, what has zeros in the rows of all gates, from
    the input and from the step before; of stacked experts, the units of the first, then of the second. Of a penalty
    over input units (`groups="input"`) they are the input units, which nothing reads; of a sum of both, the output
    units. A parameter with no dead units is left out, and so is one of fewer than 2 dimensions.

    A dead unit is not silent: it goes on to emit its bias. Before such units are taken out, by Torch-Pruning say, that
    constant must be moved into the bias of the layer that follows, as `examples/export_pruned.py` does. Masks of
    torch.nn.utils.prune are not looked at: make them permanent first, with `prune.remove`.

    Args:
        penalty_or_model: the penalty whose parameters are meant, or a model.
        select: which parameters of a model, as a penalty takes it; None means `"weights"`: no biases and no
            normalization layers.

    Raises:
        TypeError: given neither a penalty nor a model.
        ValueError: `select` matches nothing, or is given beside a penalty.
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
    """Hand the exact zeros to `torch.nn.utils.prune`, so that they hold in training: `{parameter name: mask}`.

    Each parameter `NAME` that has zeros becomes a parameter `NAME_orig`, the same tensor that the optimizer has, and a
    buffer `NAME_mask`, 0 where it was zero; the module multiplies them at each forward.
    `torch.nn.utils.prune.remove(module, NAME)` makes it a plain parameter again, zeros included. A penalty on the model
    has to be built anew afterwards.

    Args:
        penalty_or_model: the penalty whose parameters are meant, or a model.
        select: which parameters of a model, as a penalty takes it; None means `"weights"`: no biases, which often start
            at zero, and no normalization layers.

    Returns:
        The masks that were set, by the names that the parameters had, True where a weight is kept.

    Raises:
        TypeError: given neither a penalty nor a model.
        ValueError: a parameter is sharded, or has zeros and is parametrized or without a module; nothing is then
            changed. `select` matches nothing, or is given beside a penalty.
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
    """The model's state dict, with the matrices that are smaller that way in compressed sparse row format (CSR).

    These are the tensors with 2 dimensions for which `nonzeros * (itemsize + 4) + 4 * (rows + 1)` bytes, with 32-bit
    positions, are fewer than all elements take: of float32, where more than half of them are zero. The others stay as
    they are. `torch.save` writes it and `torch.load(..., weights_only=True)` reads it:

        >>> torch.save(sparse_state_dict(model), "model.pt")
        >>> load_sparse_state_dict(model, torch.load("model.pt", weights_only=True))
    """
    state: dict[str, Any] = model.state_dict()
    known: dict[tuple[Any, ...], Tensor] = {}  # shared matrices are converted, and saved, once
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
    """`model.load_state_dict(state)`, for a `state` with sparse tensors, as `sparse_state_dict` gives it.

    Raises:
        RuntimeError: as `load_state_dict`: a name is missing or unexpected, or a shape differs.
    """
    dense = OrderedDict(
        (name, w.to_dense() if isinstance(w, Tensor) and w.layout != torch.strided else w) for name, w in state.items()
    )
    if hasattr(state, "_metadata"):  # the versions of the modules
        dense._metadata = state._metadata  # type: ignore[attr-defined]
    model.load_state_dict(dense)


def sparse_bytes(nonzeros: int, rows: int, itemsize: int) -> int:
    """The size of a matrix in compressed sparse row format, with 32-bit positions."""
    return nonzeros * (itemsize + INDEX_BYTES) + (rows + 1) * INDEX_BYTES


def _compressed(w: Tensor) -> Tensor:
    with warnings.catch_warnings():  # that the format is in beta
        warnings.simplefilter("ignore")
        csr = w.to_sparse_csr()
        positions = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(*positions, csr.values(), csr.shape)


def _check_prunable(place: ParameterUse) -> None:
    for ref in place.refs:
        if ref.owner is None:
            why = "is a tensor without a module, and torch.nn.utils.prune masks parameters of modules; give the module"
        elif ref.key not in ref.owner._parameters:
            why = "is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
        elif isinstance(place.tensor, DTensor):
            why = "is sharded; RegularizedOptimizer.freeze_zeros() holds zeros there, or give an unsharded copy"
        else:
            continue
        raise ValueError(f"parameter {place.name!r} {why}")
