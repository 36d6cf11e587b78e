"""An optimizer that stands in the place of another: what it shares with the optimizer that it wraps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["WrappingOptimizer"]


class WrappingOptimizer(Optimizer):
    """Shares `param_groups`, `state` and `defaults` with the optimizer that it wraps, and has step hooks of its own.

    Args:
        optimizer: the optimizer to wrap.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._forget_hooks()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's own."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's own."""
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # What an optimizer has beyond torch.optim's interface, such as the train() of schedule-free ones.
        if name == "optimizer":  # not there yet, while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # As those of torch.optim, hooks are not copied. A scheduler has put a step that is bound to this object.
        bound = ("step", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        return {name: value for name, value in self.__dict__.items() if name not in bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_hooks()

    def _forget_hooks(self) -> None:
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
