"""FSDP2: find the sharded parameters while FSDP2 has unsharded them."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from torch.distributed import _composable_state
except ImportError:  # a build without torch.distributed
    _composable_state = None  # type: ignore[assignment]

__all__ = ["unsharded_to_sharded"]


def unsharded_to_sharded() -> dict[int, Tensor]:
    """Map the id of each parameter that FSDP2 has currently unsharded to its sharded parameter.

    From a forward to its backward, FSDP2 replaces the sharded parameters in the modules by gathered copies (in low
    precision under a mixed precision policy). After a forward without a backward the copies remain. The optimizer owns
    the sharded parameters, so the penalty must use those.
    """
    found: dict[int, Tensor] = {}
    if torch.compiler.is_compiling():
        return found
    # PyTorch has no public function for this. If these private names change, the copies would be penalized.
    for reference in list(getattr(_composable_state, "_module_state_mapping", {}).values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in (p for group in groups for p in getattr(group, "fsdp_params", ())):
            place = parameter._module_info
            standing = place.module._parameters.get(place.param_name)
            if standing is not None and standing is not parameter.sharded_param:
                found[id(standing)] = parameter.sharded_param
    return found
