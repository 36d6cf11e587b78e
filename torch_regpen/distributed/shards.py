"""Convert between a DTensor (from FSDP2 or tensor parallelism) and its shard on this rank.

Only `torch_regpen.distributed` depends on how PyTorch shards tensors. It also works if PyTorch was built without
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
        """A placeholder in builds of PyTorch without DTensor; it has no instances."""


__all__ = ["Along", "DTensor", "Partial", "Replicate", "full_tensor", "local", "shard_like", "sharded_over"]

Along = tuple["DeviceMesh", tuple[int, ...]]  # a device mesh, and the mesh dimensions over which a tensor is sharded


def local(w: Tensor) -> Tensor:
    """The shard of `w` on this rank; a plain tensor is returned unchanged."""
    return w.to_local() if isinstance(w, DTensor) else w


def full_tensor(x: Tensor) -> Tensor:
    """The whole tensor, gathered on every rank; a plain tensor is returned unchanged."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Move `tensor` to the device of `parameter` and shard it like `parameter`, in dimensions of the same size.

    Args:
        tensor: a DTensor, or a plain tensor that is the same on every rank.
        parameter: the parameter to which the tensor belongs.
    """
    if tensor.device != parameter.device:  # under torch.func, to() returns a wrapper even if nothing changes
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
