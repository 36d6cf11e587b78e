"""Split large tensors into chunks that fit the cache, and pack small tensors together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..distributed.shards import local
from ..groups.grouping import working_dtype


@dataclass(frozen=True)
class Sizes:
    """Sizes of packs and chunks on a device, in elements.

    Attributes:
        small: the largest tensor that is packed with others.
        pack: the largest pack.
        chunk: the size of a chunk of a larger tensor.
        group_chunk: the size of a chunk for operations on groups.
        group_small: the largest tensor that is packed with others for operations on groups.
        group_pack: the largest pack for operations on groups; at most `group_chunk`.
    """

    small: int
    pack: int
    chunk: int
    group_chunk: int
    group_small: int
    group_pack: int


# A float32 chunk and its temporaries fit the second-level cache. Temporaries of twice the size would return to the OS
# after each operation; faulting them in again costs more than the arithmetic.
CPU = Sizes(small=1 << 17, pack=1 << 18, chunk=1 << 17, group_chunk=1 << 19, group_small=1 << 15, group_pack=1 << 17)


# Enough to keep the device busy.
CUDA = Sizes(small=1 << 21, pack=1 << 24, chunk=1 << 24, group_chunk=1 << 24, group_small=1 << 22, group_pack=1 << 24)


Scalar = float | Tensor  # a number or a 0-dim tensor


Slicer = Callable[[Any], Any]


def batch_indices(ws: Sequence[Tensor], grouped: bool = False) -> list[list[int]]:
    """The indices of the tensors in each pack: one large tensor, or small ones of one type, dtype and device.

    Args:
        ws: the tensors.
        grouped: whether the packs are for operations on groups.
    """
    if torch.compiler.is_compiling():  # the compiler fuses by itself
        return [[i] for i in range(len(ws))]
    found: list[list[int]] = []
    open_packs: dict[Any, list[int]] = {}
    room: dict[Any, int] = {}
    for i, w in enumerate(ws):
        size, limits = w.numel(), sizes(w)
        small, pack = (limits.group_small, limits.group_pack) if grouped else (limits.small, limits.pack)
        kind = (type(w), w.dtype, w.device)
        if not 0 < size <= small:
            found.append([i])
        elif size <= room.get(kind, 0):
            open_packs[kind].append(i)
            room[kind] -= size
        else:
            open_packs[kind] = [i]
            room[kind] = pack - size
            found.append(open_packs[kind])
    return found


def slicers(w: Tensor, dims: Sequence[int], times: int = 1) -> Iterator[Slicer]:
    """Yield, for each chunk of a tensor, a function that takes this chunk of the tensor or of others like it.

    The function returns numbers, and tensors of another size along the cut, unchanged.

    Args:
        w: the tensor.
        dims: the dimensions along which it may be cut.
        times: a factor on the usual chunk size, for operations with few temporaries.
    """
    chunk = times * sizes(w).chunk
    if not dims or w.numel() <= chunk or local(w) is not w or torch.compiler.is_compiling():
        yield lambda x: x
        return
    dim = max(dims, key=w.size)
    length = max(1, chunk * w.shape[dim] // w.numel())
    for start in range(0, w.shape[dim], length):
        yield partial(_narrow, dim, start, length, w.shape[dim])


def _narrow(dim: int, start: int, length: int, whole: int, x: Any) -> Any:
    if not isinstance(x, Tensor) or x.ndim <= dim or x.shape[dim] != whole:
        return x
    return x.narrow(dim, start, min(length, whole - start))


def half_chunks(ws: Sequence[Tensor]) -> Iterator[slice]:
    """Yield slices of a pack of half a chunk each, for operations with several temporaries of that size."""
    start = size = 0
    for i, w in enumerate(ws):
        if i > start and size + w.numel() > sizes(w).chunk // 2:
            yield slice(start, i)
            start, size = i, 0
        size += w.numel()
    yield slice(start, len(ws))


def zip_chunks(*lists: Sequence[Tensor], times: int = 1) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield corresponding pieces of lists of tensors: chunks of a single tensor, or all tensors of a pack."""
    parts = tuple(map(local_shards, lists))
    if len(parts[0]) > 1 or torch.compiler.is_compiling():
        yield parts
    else:
        for chunks in _chunks(*(x for (x,) in parts), times=times):
            yield tuple([chunk] for chunk in chunks)


def _chunks(w: Tensor, *others: Tensor, times: int) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of one shape in the same way, whatever their strides: along dim 0, if a row fits a chunk."""
    size, chunk = w.numel(), times * sizes(w).chunk
    if size <= chunk:
        return iter([(w, *others)])
    if all(x.is_contiguous() for x in (w, *others)):
        return zip(*(x.view(-1).split(chunk) for x in (w, *others)), strict=True)
    dim = 0 if size // len(w) <= chunk else max(range(w.ndim), key=w.size)
    rows = max(1, chunk * w.shape[dim] // size)
    return zip(*(x.split(rows, dim) for x in (w, *others)), strict=True)


def sizes(w: Tensor) -> Sizes:
    """The sizes of packs and chunks on the device of `w`."""
    return CUDA if w.is_cuda else CPU


def local_shards(ws: Sequence[Tensor]) -> list[Tensor]:
    """The shards of the tensors of a pack on this rank."""
    return list(map(local, ws)) if local(ws[0]) is not ws[0] else list(ws)


def joined(some: Sequence[Tensor]) -> Tensor:
    """Join several tensors into one flat tensor; return a single tensor unchanged."""
    if len(some) == 1:
        return some[0]
    if torch._C._are_functorch_transforms_active():  # torch.func does not support _flatten_dense_tensors
        return torch.cat([x.reshape(-1) for x in some])
    return _flatten_dense_tensors(some)  # type: ignore[no-any-return]


def joined_wide(some: Sequence[Tensor]) -> Tensor:
    """`joined`, in float32 or float64."""
    x = joined(some)
    return x.to(working_dtype(x.dtype))


def split_like(x: Tensor, some: list[Tensor]) -> list[Tensor]:
    """Undo `joined`: split `x` into tensors shaped like `some`."""
    return [x] if len(some) == 1 else list(_unflatten_dense_tensors(x.view(-1), some))


def buffer_like(x: Tensor, buffer: Tensor | None) -> Tensor | None:
    """Memory shaped like `x`, from `buffer` if it fits; None if torch should allocate it (compiling, torch.func)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if buffer is not None and buffer.is_contiguous() and x.is_contiguous() and x.numel() <= buffer.numel():
        return buffer.view(-1)[: x.numel()].view(x.shape)
    return buffer if buffer is not None and buffer.shape == x.shape else torch.empty_like(x)


def spread_scalars(ws: Sequence[Tensor], *xs: Tensor) -> tuple[Tensor, ...]:
    """Repeat one number per tensor of a pack for each of its elements, as `joined` does; 0-dim for one tensor.

    Args:
        ws: the pack.
        xs: each has one number per tensor, or is 0-dim and returned unchanged.
    """
    if not any(x.ndim for x in xs):
        return xs
    if len(ws) == 1:
        return tuple(x[0] if x.ndim else x for x in xs)
    sizes = torch.tensor([w.numel() for w in ws], device="cpu")
    total, device = sum(w.numel() for w in ws), next(x.device for x in xs if x.ndim)
    if device.type == "cpu":
        index = torch.repeat_interleave(sizes, output_size=total)
    else:  # there, repeat_interleave has few threads for each tensor
        ends = sizes.cumsum(0).to(device, non_blocking=True)
        index = torch.bucketize(torch.arange(total, device=device), ends, right=True, out_int32=True)
    return tuple(x.index_select(0, index) if x.ndim else x for x in xs)
