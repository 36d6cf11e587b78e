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

from .groups import working_dtype
from .summary import aligned

__all__ = ["load_tensors", "report"]

HEADER = ("name", "shape", "elements", "zeros", "%", "near zeros", "norm", "zero rows", "zero columns", "sparse")
NEAR = 1e-3  # of the root mean square of a tensor
INDEX_BYTES = 4  # of a position in a compressed sparse row format


def report(file: str | Path) -> str:
    """A row for each tensor of a saved state dict, and their total.

    Elements; exact zeros; elements that are not zero but less than a thousandth of the tensor's root mean square; the
    norm; rows (dim 0) and columns (dim 1) that are all zero; and by how much a compressed sparse row format with 32-bit
    positions would make it smaller, where it would.

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
    try:
        with warnings.catch_warnings():  # what is wrong with a file is said once, in one line
            warnings.simplefilter("ignore")
            saved = _load(path)
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
    tensors = dict(_tensors(saved))
    if not tensors:
        raise ValueError(f"{file}: it holds a {type(saved).__name__} without tensors, not a state dict")
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
    w = tensor.to_dense() if tensor.layout != torch.strided else tensor
    elements, zeros = w.numel(), int((w == 0).sum())
    size = w.abs().to(working_dtype(w.dtype))
    norm = float(size.square().sum(dtype=torch.float64).sqrt())
    near = int(((size < NEAR * norm / math.sqrt(max(elements, 1))) & (size > 0)).sum())
    dense = elements * w.element_size()
    rows = w.shape[0] if w.ndim > 1 else 1
    sparse = min((elements - zeros) * (w.element_size() + INDEX_BYTES) + (rows + 1) * INDEX_BYTES, dense)
    cells = (
        name,
        str(tuple(w.shape)),
        f"{elements}",
        f"{zeros}",
        _percent(zeros, elements),
        f"{near}",
        f"{norm:.4g}",
        _zero_slices(w, 0),
        _zero_slices(w, 1),
        _ratio(dense, sparse),
    )
    return cells, (elements, zeros, dense, sparse)


def _zero_slices(w: Tensor, dim: int) -> str:
    if w.ndim < 2 or not w.numel():
        return "-"
    dead = (w == 0).transpose(0, dim).flatten(1).all(dim=1)
    return f"{int(dead.sum())}/{len(dead)}"


def _percent(zeros: int, elements: int) -> str:
    return f"{100 * zeros / max(elements, 1):.2f}"


def _ratio(dense: int, sparse: int) -> str:
    return f"{dense / sparse:.2f}x" if sparse else "-"
