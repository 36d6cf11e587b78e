"""The base of an optimizer that wraps another: delegation to the wrapped optimizer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["WrappingOptimizer"]


class WrappingOptimizer(Optimizer):
    """Shares `param_groups`, `state` and `defaults` with the wrapped optimizer, but has its own step hooks.

    Args:
        optimizer: the optimizer to wrap.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._forget_hooks()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The `param_groups` of the wrapped optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def state(self) -> Any:
        """The `state` of the wrapped optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The `defaults` of the wrapped optimizer."""
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call `zero_grad` of the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Call `add_param_group` of the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # Methods beyond the torch.optim interface, such as train() of schedule-free optimizers.
        if name == "optimizer":  # not set yet during unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # As in torch.optim, hooks are not copied, nor is the `step` that a scheduler has bound to this object.
        bound = ("step", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        return {name: value for name, value in self.__dict__.items() if name not in bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_hooks()

    def _forget_hooks(self) -> None:
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
