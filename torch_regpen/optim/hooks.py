"""Step hooks of a wrapping optimizer, and a callback right after the update of the wrapped optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["hooked", "updated"]


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `step` to call the step hooks registered on its optimizer, as torch.optim does.

    Global hooks are not called here, because the step of the wrapped optimizer calls them.

    Raises:
        RuntimeError: a pre-hook returns neither None nor `(new_args, new_kwargs)` (when `step` is called).
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


def updated(
    optimizer: Optimizer, *args: Any, finish: Callable[[], None], start: Callable[[], None] = lambda: None
) -> Any:
    """Call `optimizer.step(*args)`, `start()` before the update and `finish()` after it; return the result of the step.

    `start` runs after all pre-hooks; it does not run if one of them raises. `finish` runs after the optimizer's own
    post-hooks and before the global post-hooks, which see its effect. It runs even if a post-hook raises.
    """
    if torch.compiler.is_compiling() or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        start()
        result = optimizer.step(*args)
        finish()
        return result
    # A step may call the step of its base class, which calls hooks too.
    depth, started, moved, finished = 0, False, False, False

    def enter(*_: Any) -> None:
        nonlocal depth, started
        depth += 1
        if not started:
            started = True
            start()

    def leave(*_: Any) -> None:
        nonlocal depth, moved
        depth -= 1
        moved = moved or depth == 0

    def last(*_: Any) -> None:
        nonlocal finished
        if moved and not finished:
            finished = True
            finish()

    # register_step_post_hook would take longer than the rest of this function.
    before: Any = optimizer._optimizer_step_pre_hooks
    after: Any = optimizer._optimizer_step_post_hooks
    before[enter], after[leave], after[last] = enter, leave, last
    after.move_to_end(leave, last=False)
    try:
        result = optimizer.step(*args)
        moved = True
    finally:
        del before[enter], after[leave], after[last]
        if moved and not finished:
            finish()
    return result
