"""TrainerRegularizer: a callback for the Trainer of transformers."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .regularizer import Regularizer

__all__ = ["TrainerRegularizer"]


class TrainerRegularizer(Regularizer, TrainerCallback, ExportableState):
    """Steps a schedule of lambda, freezes zeros and logs the weights, in the Trainer of transformers.

    It acts after each step of the `RegularizedOptimizer` that the Trainer has: batches whose gradients are accumulated
    do not count, nor do steps that a GradScaler skips. It finds the optimizer by itself. Its state, the number of steps
    and that of the schedule, is in the `trainer_state.json` of the Trainer's checkpoints, as is that zeros are frozen,
    in the state of the optimizer. It comes back by `trainer.train(resume_from_checkpoint=...)`; leave
    `restore_callback_states_from_checkpoint` at False, which replaces callbacks by new ones without their arguments.

    Args:
        optimizer: the optimizer to follow; None: that of the Trainer.
        schedule: a schedule of `torch_regpen.schedules`, or a callable that makes it from the optimizer.
        logger: a `WeightLogger`, or a callable that makes it from the optimizer. It gets the number of steps taken.
        freeze_at: the number of steps after which `optimizer.freeze_zeros()` is called, 0 or more. Zeros then stay
            frozen to the end.

    Raises:
        TypeError: an argument is none of these.
        ValueError: `freeze_at` is negative; when the training begins, the Trainer has no `RegularizedOptimizer`, or
            another than the one that was given, or that the schedule was made for.

    Example:
        >>> import torch
        >>> from torch_regpen import L1, RegularizedOptimizer
        >>> from torch_regpen.callbacks import TrainerRegularizer
        >>> from torch_regpen.schedules import LinearRamp
        >>> model = torch.nn.Linear(10, 2)
        >>> penalty = L1(model, lam=1e-4)
        >>> optimizer = RegularizedOptimizer(torch.optim.Adam(model.parameters()), penalty, mode="proximal")
        >>> callback = TrainerRegularizer(schedule=LinearRamp(penalty, steps=100), freeze_at=500)

        It then goes to `transformers.Trainer(..., optimizers=(optimizer, None), callbacks=[callback])`.
    """

    HOW = (
        "pass Trainer(..., optimizers=(RegularizedOptimizer(optimizer, penalty, mode='proximal'), scheduler)), and "
        "that one, or none, to the callback"
    )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the optimizer: a checkpoint has been loaded by now."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            raise ValueError(
                f"the checkpoint holds the states of {len(saved)} {type(self).__name__}s, and does not say whose they "
                "are; use one"
            )
        if saved is not None and state.global_step:
            self.load_state_dict(_decoded(saved["attributes"]["saved"]))
        self._attach([kwargs["optimizer"]])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer."""
        self._detach()

    def state(self) -> dict[str, Any]:
        """What the Trainer puts into its checkpoints."""
        return {"args": {}, "attributes": {"saved": self.saved}}

    @property
    def saved(self) -> str:
        """The state as text: a schedule may hold tensors, and the Trainer writes JSON."""
        file = io.BytesIO()
        torch.save(self.state_dict(), file)
        return base64.b64encode(file.getvalue()).decode()

    @saved.setter
    def saved(self, saved: str) -> None:
        raise ValueError(
            "restore_callback_states_from_checkpoint=True replaces this callback by a new one, without its schedule "
            "and its logger: leave it at False; the callback takes its state from the checkpoint by itself"
        )


def _decoded(saved: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(saved)), weights_only=True)
    return state
