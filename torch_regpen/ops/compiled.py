"""Operations of `foreach` through torch.compile: each kernel is one pass over memory, without temporaries.

The eager operations, with the same results up to rounding, do what the kernels do not support: packs of small tensors,
complex tensors, and layouts that would need a copy. They do everything if no compiler works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..distributed.shards import local
from ..utils import warn
from . import foreach, kernels
from .chunks import Scalar

__all__ = [
    "add_",
    "gradients",
    "run",
    "scalar",
    "soft_threshold_each_",
    "takes",
    "threshold_latent_",
    "threshold_latent_each_",
    "total",
]

_failed = False  # whether a compilation has failed in this process


def total(ws: Sequence[Tensor], linear: float, quadratic: float) -> Tensor:
    """See `foreach.total`."""
    # L2 alone is one pass in any case. On a GPU, the kernel divides the sum between threads as the size of the first
    # tensor suggests, and would be slow for much larger ones.
    views = _flat(ws) if linear and ws[0].device.type == "cpu" else None
    if views is None:
        return foreach.total(ws, linear, quadratic)
    squares = scalar(quadratic) if quadratic else None
    return run(kernels.total, *views, scalar(linear), squares)  # type: ignore[no-any-return]


def gradients(ws: Sequence[Tensor], linear: Tensor | None, quadratic: Tensor | None) -> list[Tensor]:
    """See `foreach.gradients`."""
    views = _flat(ws) if linear is not None else None
    if views is None:
        return foreach.gradients(ws, linear, quadratic)
    grad = run(kernels.gradient, *views, linear, None if quadratic is None else 2 * quadratic)
    return [grad.as_strided(ws[0].shape, ws[0].stride())]


def add_(grads: Sequence[Tensor], ws: Sequence[Tensor], linear: float, quadratic: float) -> None:
    """See `foreach.add_`."""
    views = _flat(grads, ws) if linear else None
    if views is None:
        foreach.add_(grads, ws, linear, quadratic)
    else:
        run(kernels.add_gradient_, *views, scalar(linear), scalar(2 * quadratic) if quadratic else None)
        increment_version(grads[0])


def soft_threshold_each_(
    ws: Sequence[Tensor], moments: Sequence[Tensor], numerators: Tensor, eps: Tensor, max_change: Scalar
) -> None:
    """See `foreach.soft_threshold_each_`."""
    views = _flat(ws, moments)
    if views is None:
        foreach.soft_threshold_each_(ws, moments, numerators, eps, max_change)
    else:
        run(kernels.soft_threshold_each_, *views, numerators, eps, scalar(max_change))
        increment_version(ws[0])


def threshold_latent_(ws: Sequence[Tensor], gaps: Sequence[Tensor], ts: Tensor) -> None:
    """See `foreach.threshold_latent_`."""
    views = _flat(ws, gaps)
    if views is None:
        foreach.threshold_latent_(ws, gaps, ts)
    else:
        run(kernels.threshold_latent_, *views, ts[0])
        increment_version(ws[0])


def threshold_latent_each_(
    ws: Sequence[Tensor],
    gaps: Sequence[Tensor],
    sums: Sequence[Tensor],
    moments: Sequence[Tensor],
    numerators: Tensor,
    eps: Tensor,
    max_change: Scalar,
    lam: float,
) -> None:
    """See `foreach.threshold_latent_each_`."""
    views = _flat(ws, gaps, sums, moments)
    if views is None:
        foreach.threshold_latent_each_(ws, gaps, sums, moments, numerators, eps, max_change, lam)
    else:
        most = scalar(max_change / lam)
        run(kernels.threshold_latent_each_, *views, numerators, eps, most, scalar(lam))
        increment_version(ws[0])


def run(kernel: Callable[..., Any], *args: Any) -> Any:
    """Call a compiled kernel. If it does not compile, warn once and call the uncompiled function."""
    global _failed
    if not _failed:
        try:
            return _compiled(kernel)(*args)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # also if torch.compile does not support this Python or system
            _failed = True
            warn(
                f"compiling the penalty has no effect: torch.compile failed with {type(error).__name__}: "
                f"{next(iter(str(error).strip().splitlines()), 'no message')} (it needs a C++ compiler, such as g++)"
            )
    return kernel(*args)


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True)


def takes(*tensors: Tensor) -> bool:
    """Whether kernels support these tensors of one parameter: plain, real, with several elements, not traced."""
    if _failed or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    real = not any(x.is_complex() or x.is_meta or type(x) is not Tensor for x in tensors)
    return real and tensors[0].numel() > 1


def plain(x: Tensor, *shape: int) -> Tensor:
    """The memory of a dense tensor in another shape. It is not a view, for which the kernel would depend on the base.

    It has its own version counter: after an in-place change, call `increment_version` on the tensor.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, strides)


def scalar(x: Scalar) -> Tensor:
    """`x` as a 0-dim tensor, so that torch.compile does not treat it as a constant."""
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")


def _flat(*lists: Sequence[Tensor]) -> list[Tensor] | None:
    """Flat tensors, in memory order, on the memory of the tensors of one parameter; None if that is impossible."""
    if len(lists[0]) > 1:
        return None
    tensors = [local(x).detach() for (x,) in lists]
    first = tensors[0]
    if not takes(*tensors) or not _is_dense(first) or any(x.stride() != first.stride() for x in tensors):
        return None
    return [plain(x, x.numel()) for x in tensors]


def _is_dense(x: Tensor) -> bool:
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (x.ndim in orders and x.is_contiguous(memory_format=orders[x.ndim]))
