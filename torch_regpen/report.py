"""What is zero in a saved state dict: a table, a row for each tensor."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dead import zero_groups
from .export import sparse_bytes
from .groups import Slices
from .sharding import DTensor
from .summary import aligned

__all__ = ["load_tensors", "report"]

HEADER = ("name", "shape", "elements", "zeros", "%", "near zeros", "norm", "zero rows", "zero columns", "sparse")
NEAR = 1e-3  # of the root mean square of a tensor
CHUNK = 1 << 20  # elements that are looked at at once
CONVERT = (
    "make a file of the checkpoint with: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
)


def report(file: str | Path) -> str:
    """A row for each tensor of a saved state dict, and their total.

    Elements; exact zeros; elements that are not zero but less than a thousandth of the tensor's root mean square; the
    norm; rows (dim 0) and columns (dim 1) that are all zero; and by how much a compressed sparse row format with 32-bit
    positions would make it smaller, where it would. What cannot be counted, such as a tensor on the meta device, has
    dashes. Files are mapped into memory, and may be larger than it.

    Args:
        file: written by `torch.save` or by safetensors; nothing in it is executed.

    Raises:
        ValueError: it cannot be read, or holds no tensors; the message names it and says why, in one line.
    """
    rows = [_row(name, tensor) for name, tensor in load_tensors(file).items()]
    elements, zeros, dense, sparse = (sum(column) for column in zip(*(numbers for _, numbers in rows), strict=True))
    total = ("total", "", f"{elements}", f"{zeros}", _percent(zeros, elements), "", "", "", "", _ratio(dense, sparse))
    return aligned([HEADER, *(cells for cells, _ in rows), total])


def load_tensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved state dict by name; those of nested dicts by dotted names.

    Raises:
        ValueError: as `report`.
    """
    path = Path(file)
    if path.is_dir():
        sharded = (path / ".metadata").exists()
        raise ValueError(f"{file}: it is a folder; {CONVERT if sharded else 'give a file in it'}")
    if path.suffix == ".distcp":
        raise ValueError(f"{file}: it is a part of a sharded checkpoint; {CONVERT}")
    try:
        with warnings.catch_warnings():  # what is wrong with a file is said once, in one line
            warnings.simplefilter("ignore")
            saved = _load(path)
        tensors = dict(_tensors(saved))
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file}: it holds more than tensors, or is no file of torch.save; nothing was executed"
        ) from None
    except ImportError as error:
        raise ValueError(f"{file}: {error}") from None
    except Exception as error:  # whatever a file that is none of these makes a reader raise
        why = (str(error).splitlines() or [""])[0].split(". ")[0]
        raise ValueError(f"{file}: it cannot be read as a state dict ({type(error).__name__}: {why})") from None
    if not tensors:
        raise ValueError(f"{file}: it holds a {type(saved).__name__} without tensors, not a state dict")
    parts = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
    if parts:
        raise ValueError(
            f"{file}: it holds one rank's part of sharded tensors ({parts[0]}, ...); save the whole with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True"
        )
    return tensors


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError("reading it needs safetensors: pip install safetensors") from None
        return load_file(path)
    with path.open("rb") as head:
        zipped = head.read(2) == b"PK"  # the older format cannot be mapped into memory
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _tensors(saved: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(saved, Tensor):
        yield prefix or "tensor", saved
    elif isinstance(saved, Mapping):
        for key, value in saved.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))


def _row(name: str, tensor: Tensor) -> tuple[tuple[str, ...], tuple[int, int, int, int]]:
    shape, elements = "-", 0
    try:
        shape, elements = str(tuple(tensor.shape)), tensor.numel()
        w = _plain(tensor)
        zeros, near, norm = _sizes(w)
        dead = (_zero_slices(w, 0), _zero_slices(w, 1))
    except RuntimeError:  # of types that torch has no arithmetic for: nested, on no device, some of 4 bits
        return (name, shape, f"{elements}", *["-"] * (len(HEADER) - 3)), (0, 0, 0, 0)
    dense = elements * w.element_size()
    rows = w.shape[0] if w.ndim > 1 else 1
    sparse = min(sparse_bytes(elements - zeros, rows, w.element_size()), dense)
    numbers = (f"{elements}", f"{zeros}", _percent(zeros, elements), f"{near}", f"{norm:.4g}")
    return (name, shape, *numbers, *dead, _ratio(dense, sparse)), (elements, zeros, dense, sparse)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor as a dense one."""
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _sizes(w: Tensor) -> tuple[int, int, float]:
    """How many elements are exactly zero, and near zero; and the norm."""
    zeros, squares = 0, 0.0
    for x in _chunks(w):
        zeros, squares = zeros + int((x == 0).sum()), squares + float(x.dot(x))
    norm = math.sqrt(squares)
    limit = NEAR * norm / math.sqrt(max(w.numel(), 1))
    near = sum(int((x < limit).sum()) for x in _chunks(w)) - zeros if 0 < limit < math.inf else 0
    return zeros, near, norm


def _chunks(w: Tensor) -> Iterator[Tensor]:
    """The moduli of the elements, in float64, part by part: a file may be larger than memory."""
    flat = w.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        x = flat[start : start + CHUNK]
        yield x.to(torch.complex128).abs() if x.is_complex() else x.to(torch.float64).abs()


def _zero_slices(w: Tensor, dim: int) -> str:
    if w.ndim < 2 or not w.numel():
        return "-"
    dead = zero_groups(w, Slices(dim))
    return f"{int(dead.sum())}/{len(dead)}"


def _percent(zeros: int, elements: int) -> str:
    return f"{100 * zeros / max(elements, 1):.2f}"


def _ratio(dense: int, sparse: int) -> str:
    return f"{dense / sparse:.2f}x" if sparse else "-"
