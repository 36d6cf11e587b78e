"""Step hooks: those of an optimizer that wraps another, and what comes right after the update of the wrapped one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["hooked", "updated"]


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `step` call the hooks that were registered on its optimizer, as torch.optim does.

    The global hooks are called by the step of the wrapped optimizer.
    """

    @wraps(step)
    def with_hooks(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        for pre_hook in self._optimizer_step_pre_hooks.values():
            result = pre_hook(self, args, kwargs)
            if result is not None:
                if not isinstance(result, tuple) or len(result) != 2:
                    raise RuntimeError(
                        f"a step pre-hook must return None or a tuple of (new_args, new_kwargs), but got {result}"
                    )
                args, kwargs = result
        out = step(*args, **kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return out

    return with_hooks


def updated(optimizer: Optimizer, *args: Any, finish: Callable[[], None]) -> Any:
    """`optimizer.step(*args)`, with `finish()` after the update.

    It comes after the hooks of that optimizer and before the global ones, which see what it has done. Where a hook
    raises it comes all the same.
    """
    if torch.compiler.is_compiling() or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        result = optimizer.step(*args)
        finish()
        return result
    depth, moved, finished = 0, False, False  # a subclass may call the step that it overrides, hooks included

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth, moved
        depth -= 1
        moved = moved or depth == 0

    def last(*_: Any) -> None:
        nonlocal finished
        if moved and not finished:
            finished = True
            finish()

    left = optimizer.register_step_post_hook(leave)
    optimizer._optimizer_step_post_hooks.move_to_end(left.id, last=False)  # type: ignore[attr-defined]
    handles = [left, optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(last)]
    try:
        result = optimizer.step(*args)
        moved = True
    finally:
        for handle in handles:
            handle.remove()
        if moved and not finished:
            finish()
    return result
