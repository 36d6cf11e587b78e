"""How operations change labels. The label of an element is the number of the row that wrote it, or -1.

Operations that move elements are applied to the labels themselves. To save memory, labels are expanded along dimensions
in which they do not differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NONE", "Join", "Shape", "after", "differs", "fold", "narrowed"]

NONE = -1  # the label of an element that no row wrote
Shape = Sequence[int]
Join = Callable[[Tensor, Tensor], None]  # joins the units of two tensors, element by element

VIEWS = ("View", "UnsafeView", "ReshapeAlias", "_ReshapeAlias", "Squeeze", "Unsqueeze")
PRODUCTS = ("Mul", "Div")
MATRIX_PRODUCTS = ("Mm", "Bmm", "Addmm", "Baddbmm")

MOVES: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "ChannelShuffle": lambda fn, x, _: F.channel_shuffle(x, fn._saved_groups),
    "ConstantPadNd": lambda fn, x, _: F.pad(x, _all_signed(fn._saved_pad), value=NONE),
    "Flip": lambda fn, x, _: x.flip(_all_signed(fn._saved_dims)),
    "Index": lambda fn, x, _: x[tuple(slice(None) if index is None else index.cpu() for index in fn._saved_indices)],
    "IndexSelect": lambda fn, x, _: x.index_select(_dim(fn._saved_dim, x), fn._saved_index.cpu()),
    "Permute": lambda fn, x, _: x.permute([_dim(dim, x) for dim in fn._saved_dims]),
    "PixelShuffle": lambda fn, x, _: F.pixel_shuffle(x, fn._saved_upscale_factor),
    "PixelUnshuffle": lambda fn, x, _: F.pixel_unshuffle(x, fn._saved_downscale_factor),
    "Repeat": lambda fn, x, _: x.repeat(fn._saved_repeats),
    "Roll": lambda fn, x, _: x.roll(_all_signed(fn._saved_shifts), _all_signed(fn._saved_dims)),
    "Select": lambda fn, x, _: x.select(_dim(fn._saved_dim, x), _signed(fn._saved_index)),
    "Slice": lambda fn, x, _: _slice(fn, x),
    "Split": lambda fn, x, number: x.split(fn._saved_split_size, _dim(fn._saved_dim, x))[number],
    "SplitWithSizes": lambda fn, x, number: x.split(fn._saved_split_sizes, _dim(fn._saved_dim, x))[number],
    "T": lambda _fn, x, _: x.t(),
    "Transpose": lambda fn, x, _: x.transpose(_dim(fn._saved_dim0, x), _dim(fn._saved_dim1, x)),
    "Unbind": lambda fn, x, number: x.unbind(_dim(fn._saved_dim, x))[number],
    "ViewAsReal": lambda _fn, x, _: x.unsqueeze(-1).expand(*x.shape, 2),
}


def after(
    fn: Any, number: int, inputs: Sequence[Tensor | None], given: Sequence[Shape], shape: Shape, join: Join
) -> Tensor | None:
    """The labels of a result of an operation; None if no row wrote it.

    Args:
        fn: the node of the autograd graph.
        number: which of its results.
        inputs: the labels of its inputs; None for an input that no row wrote.
        given: the shapes of the inputs of `torch.cat`.
        shape: the shape of the result.
        join: joins the units of two tensors.
    """
    labelled = [x for x in inputs if x is not None]
    if not labelled:
        return None
    name, x = fn.name().split("Backward")[0], labelled[0]
    if name in MOVES:
        return narrowed(MOVES[name](fn, x, number))
    if name in VIEWS:
        return narrowed(x.reshape(tuple(shape)))
    if name == "Cat" and len(given) == len(inputs):
        pairs = zip(inputs, given, strict=True)
        return narrowed(torch.cat([_none(s) if x is None else x for x, s in pairs], _signed(fn._saved_dim)))
    if name == "Stack":
        none = _none(x.shape)
        return narrowed(torch.stack([none if x is None else x for x in inputs], _signed(fn._saved_dim)))
    if name == "Glu":
        one, other = x.chunk(2, _dim(fn._saved_dim, x))
        join(one, other)
        return narrowed(one)
    if name == "ViewAsComplex":
        return fold(x, -1, join)[..., 0]
    if name in MATRIX_PRODUCTS:
        return _matrix_product(inputs, shape, join)
    if name.startswith("ScaledDotProduct"):
        return _attention(inputs, shape, join)
    return _merged([_fitted(fn, x, shape, join) for x in labelled], name in PRODUCTS, shape, join)


def differs(x: Tensor) -> list[int]:
    """The dimensions along which the labels differ."""
    several = [dim for dim in range(x.ndim) if x.shape[dim] > 1 and x.stride(dim)]
    return [dim for dim in several if bool((x != x.narrow(dim, 0, 1)).any())]


def narrowed(x: Tensor) -> Tensor:
    """The same labels, expanded along the dimensions in which they do not differ."""
    kept, shape = set(differs(x)), x.shape
    for dim in range(x.ndim):
        if dim not in kept:
            x = x[(slice(None),) * dim + (slice(0, 1),)]
    return x.expand(shape)


def fold(x: Tensor, dim: int, join: Join) -> Tensor:
    """The labels of a result that mixes all elements along a dimension, which gets size 1.

    A unit that extends along this dimension, such as a head, keeps its label, and its rows become one unit.
    """
    if not x.shape[dim]:
        return _none([1 if place == dim % x.ndim else size for place, size in enumerate(x.shape)])
    first, along = x.narrow(dim, 0, 1), differs(x)
    if dim % x.ndim not in along:
        return first
    if len(along) == 1:
        return torch.full_like(first, NONE)
    join(x, first.expand_as(x))
    return first


def _merged(inputs: list[Tensor], is_product: bool, shape: Shape, join: Join) -> Tensor:
    """The labels of a result that is computed elementwise.

    A factor that is the same for all units, such as a gate or the scale that all heads share, does not change them.
    """
    expanded = [x.expand(tuple(shape)) for x in inputs]
    along = [set(differs(x)) for x in expanded]
    if is_product:
        sizes = [(1,) * (len(shape) - x.ndim) + tuple(x.shape) for x in inputs]
        own = [
            x
            for x, size, dims in zip(expanded, sizes, along, strict=True)
            if not any(size[dim] < shape[dim] for dim in set().union(*along) - dims)
        ]
        expanded = own or [_none(shape)]
    merged, *others = sorted(expanded, key=lambda x: -len(differs(x)))
    for x in others:
        most, fewer = set(differs(merged)), set(differs(x))
        if not fewer <= most:
            return _none(shape)  # the units of the inputs lie along different dimensions
        if not is_product or fewer == most:
            join(merged, x)
            merged = narrowed(torch.where(merged < 0, x, merged))
    return merged


def _fitted(fn: Any, x: Tensor, shape: Shape, join: Join) -> Tensor:
    """The labels of an input, in the shape of the result, for an operation that reduces or resizes dimensions."""
    if _fits(x.shape, shape):
        return x
    dims = getattr(fn, "_saved_dim", None)
    if dims is not None and not (x.ndim == len(shape) and not getattr(fn, "_saved_keepdim", False)):
        dims = dims if isinstance(dims, tuple) else (dims,)
        places = [_dim(dim, x) for dim in dims] or list(range(x.ndim))
        for dim in places:
            x = fold(x, dim, join)
        if not getattr(fn, "_saved_keepdim", False):
            x = x[tuple(0 if dim in places else slice(None) for dim in range(x.ndim))]
    elif x.ndim == len(shape):
        for dim, size in enumerate(shape):
            if x.shape[dim] != size:
                x = fold(x, dim, join)
    return x if _fits(x.shape, shape) else torch.full((1,) * len(shape), NONE)


def _matrix_product(inputs: Sequence[Tensor | None], shape: Shape, join: Join) -> Tensor | None:
    *added, a, b = inputs
    if a is not None and b is not None and _joined_heads([a, b], join):
        product: Tensor | None = a[..., :1, :1]
    elif a is not None and b is not None:
        if differs(a)[-1:] == [a.ndim - 1] and b.ndim - 2 in differs(b):
            join(a[..., :1, :], b.mT[..., :1, :])
        left, right = fold(a, -1, join), fold(b, -2, join)
        product = _none(shape) if differs(left) and differs(right) else left if differs(left) else right
    else:
        product = fold(a, -1, join) if a is not None else fold(b, -2, join) if b is not None else None
    found = [x for x in (*added, product) if x is not None]
    return _merged(found, False, shape, join) if found else None


def _attention(inputs: Sequence[Tensor | None], shape: Shape, join: Join) -> Tensor | None:
    q, k, v, *mask = inputs
    heads = [_repeated(x, shape) for x in (q, k, v) if x is not None]
    if _joined_heads([*heads, *(x for x in mask if x is not None)], join):
        return narrowed(heads[0][..., :1, :1].expand(tuple(shape)))
    if q is not None and k is not None:
        join(q[..., :1, :], k[..., :1, :])
    return None if v is None else narrowed(fold(v, -2, join).expand(tuple(shape)))


def _repeated(x: Tensor, shape: Shape) -> Tensor:
    """Repeat the heads of keys and values, if each serves several heads of queries."""
    if x.ndim < 3 or x.shape[-3] == shape[-3]:
        return x
    return x.repeat_interleave(shape[-3] // x.shape[-3], -3)


def _joined_heads(factors: list[Tensor], join: Join) -> bool:
    """Join the rows of each matrix in a batch of matrices, if the matrices belong to different units."""
    if all(dim >= x.ndim - 2 for x in factors for dim in differs(x)):
        return False
    heads = [x[..., :1, :1] for x in factors]
    for x, head in zip(factors, heads, strict=True):
        join(x, head)
        join(head, heads[0])
    return True


def _none(shape: Shape) -> Tensor:
    return torch.full((1,) * len(shape), NONE).expand(tuple(shape))


def _fits(shape: Shape, other: Shape) -> bool:
    """Whether a tensor of one shape can be expanded to the other."""
    last = list(other)[len(other) - len(shape) :]
    return len(shape) <= len(other) and all(a in (1, b) for a, b in zip(shape, last, strict=True))


def _slice(fn: Any, x: Tensor) -> Tensor:
    dim = _dim(fn._saved_dim, x)
    return x[(slice(None),) * dim + (slice(_signed(fn._saved_start), _signed(fn._saved_end), fn._saved_step),)]


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number  # autograd saves -1 as an unsigned number


def _all_signed(numbers: Sequence[int]) -> list[int]:
    return [_signed(number) for number in numbers]


def _dim(number: int, x: Tensor) -> int:
    return _signed(number) % x.ndim
