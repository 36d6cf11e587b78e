"""`report`: a table of the exact zeros in a saved state dict, with a row for each tensor."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distributed.shards import DTensor
from .export import sparse_bytes
from .groups.layouts import Slices
from .ops.zero_groups import zero_groups
from .utils import format_table

__all__ = ["load_tensors", "report"]

HEADER = ("name", "shape", "elements", "zeros", "%", "near zeros", "norm", "zero rows", "zero columns", "sparse")
NEAR = 1e-3  # elements below this fraction of the root mean square of their tensor are near zero
COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
CHUNK = 1 << 20  # elements converted to float64 at a time
CONVERT = (
    "make a file of the checkpoint with: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
)


def report(file: str | Path) -> str:
    """A table with a row for each tensor of a saved state dict, and a row of totals.

    The columns are

    - elements; zeros, the number of exact zeros; %, their percentage;
    - near zeros: the number of elements that are not zero, but smaller than a thousandth of the tensor's root mean
      square;
    - norm: the L2 norm;
    - zero rows, zero columns: the number of slices along dim 0 and dim 1 that are all zero;
    - sparse: the size of the dense tensor divided by its size in compressed sparse row format with 32-bit positions,
      if that is smaller.

    A tensor that cannot be counted, such as one on the meta device, has dashes. The file is memory-mapped, so it may be
    larger than the memory. Unprintable characters in names are escaped.

    Args:
        file: a file of `torch.save` or safetensors. Nothing in it is executed.

    Raises:
        ValueError: the file cannot be read, or has no tensors. The message is one line with the file and the reason.

    Example:
        >>> import os, tempfile, torch
        >>> from torch_regpen.report import report
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "model.pt")
        ...     torch.save({"weight": torch.tensor([[0.0, 2.0], [0.0, 0.0]])}, file)
        ...     print(report(file))
        name    shape   elements  zeros  %      near zeros  norm  zero rows  zero columns  sparse
        weight  (2, 2)  4         3      75.00  0           2     1/2        1/2           1.00x
        total           4         3      75.00                                             1.00x
    """
    rows = [_row(printable(name), tensor) for name, tensor in load_tensors(file).items()]
    elements, zeros, dense, sparse = (sum(column) for column in zip(*(numbers for _, numbers in rows), strict=True))
    total = ("total", "", f"{elements}", f"{zeros}", _percent(zeros, elements), "", "", "", "", _ratio(dense, sparse))
    return format_table([HEADER, *(cells for cells, _ in rows), total])


def load_tensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved state dict, by name.

    A tensor in nested dicts, lists or tuples has a dotted name. If two tensors have the same name, such as "a.b" and
    the "b" in "a", the second one is called "a.b#2".

    Args:
        file: a file of `torch.save` or safetensors. Nothing in it is executed.

    Raises:
        ValueError: as `report`.

    Example:
        >>> import os, tempfile, torch
        >>> from torch_regpen.report import load_tensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "model.pt")
        ...     torch.save({"step": 3, "state": [torch.ones(2)]}, file)
        ...     list(load_tensors(file))
        ['state.0']
    """
    path = Path(file)
    if path.is_dir():
        sharded = (path / ".metadata").exists()
        raise _unreadable(file, f"it is a folder; {CONVERT if sharded else 'give a file in it'}")
    if path.suffix == ".distcp":
        raise _unreadable(file, f"it is a part of a sharded checkpoint; {CONVERT}")
    tensors: dict[str, Tensor] = {}
    try:
        with warnings.catch_warnings():  # the error below says what is wrong
            warnings.simplefilter("ignore")
            saved = _load(path)
        for name, tensor in _tensors(saved):
            names = (name if i == 1 else f"{name}#{i}" for i in itertools.count(1))
            tensors[next(free for free in names if free not in tensors)] = tensor
    except FileNotFoundError:
        raise _unreadable(file, "there is no such file") from None
    except pickle.UnpicklingError:
        raise _unreadable(
            file, "it holds more than tensors, or is not a file of torch.save; nothing was executed"
        ) from None
    except ImportError as error:
        raise _unreadable(file, str(error)) from None
    except Exception as error:  # a broken file can make the readers raise anything
        why = (str(error).splitlines() or [""])[0].split(". ")[0]
        raise _unreadable(file, f"it cannot be read as a state dict ({type(error).__name__}: {why})") from None
    if not tensors:
        raise _unreadable(file, f"it holds a {type(saved).__name__} without tensors, not a state dict")
    parts = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
    if parts:
        raise _unreadable(
            file,
            f"it holds one rank's part of sharded tensors ({parts[0]}, ...); save the whole with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True",
        )
    return tensors


def printable(text: str) -> str:
    """`text` with line breaks, escape sequences and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _unreadable(file: str | Path, why: str) -> ValueError:
    return ValueError(printable(f"{file}: {why}"))


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError("reading it needs safetensors: pip install safetensors") from None
        return load_file(path)
    with path.open("rb") as head:
        zipped = head.read(2) == b"PK"  # torch can memory-map only its zip format
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _tensors(saved: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(saved, Tensor):
        yield prefix or "tensor", saved
    elif isinstance(saved, Mapping):
        for key, value in saved.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(saved, list | tuple):
        for index, value in enumerate(saved):
            yield from _tensors(value, f"{prefix}.{index}" if prefix else str(index))


def _row(name: str, tensor: Tensor) -> tuple[tuple[str, ...], tuple[int, int, int, int]]:
    shape, elements = "-", 0
    try:
        shape, elements = str(tuple(tensor.shape)), tensor.numel()
        (nonzeros, near, norm), dead = _counts(tensor)
    except RuntimeError:  # torch cannot compute with it: nested tensors, the meta device, some 4-bit types
        return (name, shape, f"{elements}", *["-"] * (len(HEADER) - 3)), (0, 0, 0, 0)
    zeros, itemsize = elements - nonzeros, 4 if tensor.is_quantized else tensor.element_size()
    dense = elements * itemsize
    sparse = min(sparse_bytes(nonzeros, tensor.shape[0] if tensor.ndim > 1 else 1, itemsize), dense)
    numbers = (f"{elements}", f"{zeros}", _percent(zeros, elements), f"{near}", f"{norm:.4g}")
    return (name, shape, *numbers, *dead, _ratio(dense, sparse)), (elements, zeros, dense, sparse)


def _counts(tensor: Tensor) -> tuple[tuple[int, int, float], list[str]]:
    """`_sizes` of a tensor, and the numbers of its zero slices along dim 0 and dim 1.

    Only stored elements are read: a small file may contain a sparse or expanded tensor of any size.
    """
    shape, elements = tensor.shape, tensor.numel()
    if tensor.layout == torch.sparse_coo or (tensor.layout in COMPRESSED and tensor.ndim == 2):
        coo = tensor.to_sparse().coalesce()
        if coo.dense_dim() == 0:
            filled = coo.indices()[:, coo.values() != 0]
            zero = [shape[dim] - len(filled[dim].unique()) for dim in range(len(shape))]
            return _sizes(coo.values(), elements), _zero_slices(shape, zero)
    w = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    repeated = [size > 1 and stride == 0 for size, stride in zip(shape, w.stride(), strict=True)]
    w = w[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
    if w.numel() * w.element_size() > w.untyped_storage().nbytes():
        raise RuntimeError("elements overlap in memory, and not only because the tensor is expanded")
    times = elements // max(w.numel(), 1)
    nonzeros, near, norm = _sizes(w, w.numel())
    zero = []
    if w.ndim > 1 and elements:
        flags = [zero_groups(w, Slices(dim)) for dim in (0, 1)]
        zero = [int(flag.sum()) * (shape[dim] // len(flag)) for dim, flag in enumerate(flags)]
    return (nonzeros * times, near * times, norm * math.sqrt(times)), _zero_slices(shape, zero)


def _sizes(w: Tensor, elements: int) -> tuple[int, int, float]:
    """The number of nonzeros, the number of those near zero, and the norm. `elements` includes zeros not in `w`."""
    nonzeros, squares = 0, 0.0
    for x in _chunks(w):
        nonzeros, squares = nonzeros + int((x != 0).sum()), squares + float(x.dot(x))
    norm = math.sqrt(squares)
    limit = NEAR * norm / math.sqrt(max(elements, 1))
    near = sum(int(((x > 0) & (x < limit)).sum()) for x in _chunks(w)) if 0 < limit < math.inf else 0
    return nonzeros, near, norm


def _chunks(w: Tensor) -> Iterator[Tensor]:
    """The absolute values in float64, in chunks, since a file may be larger than the memory."""
    flat = w.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        x = flat[start : start + CHUNK]
        yield x.to(torch.complex128).abs() if x.is_complex() else x.to(torch.float64).abs()


def _zero_slices(shape: torch.Size, zero: list[int]) -> list[str]:
    if len(shape) < 2 or not shape.numel():
        return ["-", "-"]
    return [f"{zero[dim]}/{shape[dim]}" for dim in (0, 1)]


def _percent(zeros: int, elements: int) -> str:
    return f"{100 * zeros / max(elements, 1):.2f}"


def _ratio(dense: int, sparse: int) -> str:
    return f"{dense / sparse:.2f}x" if sparse else "-"
