"""Find the groups of a tensor that are entirely zero."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.shards import DTensor, Partial
from ..groups.grouping import Grouping, working_dtype
from ..groups.layouts import Slices, WholeTensor
from ..groups.norms import NormGrouping

__all__ = ["zero_groups"]

COMPARABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8)


@torch.no_grad()
def zero_groups(w: Tensor, grouping: Grouping) -> Tensor:
    """Return a 1-d bool tensor: for each group of `w`, whether all its elements are exactly zero.

    For a sharded tensor, every rank gets the result for all groups. Norms cannot be used, because the squares of small
    numbers round to zero.
    """
    if not isinstance(w, DTensor):
        return ~_nonzero(w, grouping).flatten().bool()
    if not isinstance(grouping, Slices | WholeTensor):
        return zero_groups(w.full_tensor(), grouping)
    inside = grouping.dims(w.ndim)
    placements = [
        placement if placement.is_replicate() or placement.dim % w.ndim not in inside else Partial("max")  # type: ignore[attr-defined]
        for placement in w.placements
    ]
    shape = grouping.magnitudes_shape(w.shape)
    stride = torch.empty(shape, device="meta").stride()
    flags = _nonzero(w.to_local(), grouping)
    whole = DTensor.from_local(flags, w.device_mesh, placements, run_check=False, shape=shape, stride=stride)
    return ~whole.full_tensor().flatten().bool()


def _nonzero(w: Tensor, grouping: Grouping) -> Tensor:
    """1 for each group that has a nonzero element, else 0; broadcasts to the view of the groups."""
    if not isinstance(grouping, NormGrouping):
        return (grouping.polar(w)[0] != 0).float()
    x = grouping.view(w)
    dims = grouping.dims(x.ndim)
    if x.is_complex() or x.dtype not in COMPARABLE:
        x = (x.abs() if x.is_complex() else x).to(working_dtype(x.dtype))
    if not x.numel():
        return torch.zeros(grouping.magnitudes_shape(w.shape), device=w.device)
    # The fastest exact way without a copy; reducing dimension 0 first and separately makes it faster.
    lowest = highest = x
    for reduced in filter(None, (dims[:1], dims[1:]) if 0 in dims else (dims,)):
        lowest, highest = lowest.amin(reduced, keepdim=True), highest.amax(reduced, keepdim=True)
    return ((lowest != 0) | (highest != 0)).float()
