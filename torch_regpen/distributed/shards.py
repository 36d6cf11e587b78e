"""Shards: a DTensor (FSDP2, tensor parallelism, or both), the shard of it on this rank, and back.

This package is the only one that knows how PyTorch shards tensors, and that PyTorch can be built without
torch.distributed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

try:
    from torch.distributed.tensor import DTensor, Partial, Replicate
except ImportError:
    Partial = Replicate = None  # type: ignore[assignment,misc]

    class DTensor(Tensor):  # type: ignore[no-redef]
        """Stands for the class that this build of PyTorch does not have: no tensor is one."""


__all__ = ["Along", "DTensor", "Partial", "Replicate", "full_tensor", "local", "shard_like", "sharded_over"]

Along = tuple["DeviceMesh", tuple[int, ...]]  # a mesh, and the dimensions of it over which something is sharded


def local(w: Tensor) -> Tensor:
    """The shard of this rank; any other tensor as it is."""
    return w.to_local() if isinstance(w, DTensor) else w


def full_tensor(x: Tensor) -> Tensor:
    """The whole tensor, on every rank; a tensor that is not sharded as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor` on the device of `parameter`, and sharded like it along the dimensions in which their sizes agree.

    Args:
        tensor: a DTensor, or a plain tensor that is the same on every rank.
        parameter: the parameter that it belongs to.
    """
    if tensor.device != parameter.device:  # under a transform of torch.func, to() wraps what it returns unchanged
        tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return full_tensor(tensor)
    mesh = parameter.device_mesh
    if isinstance(tensor, DTensor) and tensor.device_mesh != mesh:
        tensor = full_tensor(tensor)
    alike = tensor.ndim == parameter.ndim
    placements = [
        p if alike and not p.is_replicate() and tensor.shape[p.dim] == parameter.shape[p.dim] else Replicate()  # type: ignore[attr-defined]
        for p in parameter.placements
    ]
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return tensor.redistribute(placements=placements)


def sharded_over(w: DTensor) -> tuple[int, ...]:
    """The mesh dimensions over which a tensor is sharded."""
    return tuple(i for i, placement in enumerate(w.placements) if not placement.is_replicate())
