"""FSDP2: the sharded parameters behind the copies that it gathers for a forward and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from torch.distributed import _composable_state
except ImportError:  # a build without torch.distributed
    _composable_state = None  # type: ignore[assignment]

__all__ = ["unsharded_to_sharded"]


def unsharded_to_sharded() -> dict[int, Tensor]:
    """The id of each parameter that FSDP2 has unsharded now, and its sharded parameter.

    Between a forward and its backward FSDP2 puts gathered copies into the modules, in the low precision of its policy
    if it has one; after a forward without a backward they stay there. The optimizer owns the sharded parameters.
    """
    found: dict[int, Tensor] = {}
    if torch.compiler.is_compiling():
        return found
    # PyTorch has no public function for this. If these names change, the copies are penalized.
    for reference in list(getattr(_composable_state, "_module_state_mapping", {}).values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in (p for group in groups for p in getattr(group, "fsdp_params", ())):
            place = parameter._module_info
            standing = place.module._parameters.get(place.param_name)
            if standing is not None and standing is not parameter.sharded_param:
                found[id(standing)] = parameter.sharded_param
    return found
