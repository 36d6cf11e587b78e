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

    It finds the `RegularizedOptimizer` of the Trainer and acts after each of its steps. Batches whose gradients are
    only accumulated do not count, nor do steps that a GradScaler skips. The Trainer's checkpoints contain the number of
    steps and the state of the schedule (in `trainer_state.json`), and the frozen zeros (in the optimizer state). To
    resume, call `trainer.train(resume_from_checkpoint=...)`. Leave `restore_callback_states_from_checkpoint` at False;
    True would replace the callback with a new one without its arguments.

    Args:
        optimizer: the optimizer to follow; None means that of the Trainer.
        schedule: a schedule of `torch_regpen.schedules`, or a callable that makes it from the optimizer.
        logger: a `WeightLogger`, or a callable that makes it from the optimizer. It gets the number of steps taken.
        freeze_at: the number of steps after which `optimizer.freeze_zeros()` is called, 0 or more. Zeros then stay
            frozen to the end.

    Raises:
        TypeError: an argument is none of these.
        ValueError: `freeze_at` is negative; when the training begins, the Trainer has no `RegularizedOptimizer`, or
            not the one that was given or that the schedule was made for.

    Example:
        >>> import torch
        >>> from torch_regpen import L1, RegularizedOptimizer
        >>> from torch_regpen.callbacks import TrainerRegularizer
        >>> from torch_regpen.schedules import LinearRamp
        >>> model = torch.nn.Linear(10, 2)
        >>> penalty = L1(model, lam=1e-4)
        >>> optimizer = RegularizedOptimizer(torch.optim.Adam(model.parameters()), penalty, mode="proximal")
        >>> callback = TrainerRegularizer(schedule=LinearRamp(penalty, steps=100), freeze_at=500)

        Pass it to the trainer: `transformers.Trainer(..., optimizers=(optimizer, None), callbacks=[callback])`.
    """

    HOW = (
        "pass Trainer(..., optimizers=(RegularizedOptimizer(optimizer, penalty, mode='proximal'), scheduler)), and "
        "pass this optimizer, or none, to the callback"
    )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the optimizer. A checkpoint is already loaded at this point."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            raise ValueError(
                f"the checkpoint holds the states of {len(saved)} {type(self).__name__}s, and does not say which is "
                "which; use only one"
            )
        if saved is not None and state.global_step:
            self.load_state_dict(_decoded(saved["attributes"]["saved"]))
        self._attach([kwargs["optimizer"]])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach from the optimizer."""
        self._detach()

    def state(self) -> dict[str, Any]:
        """The state that the Trainer saves in its checkpoints."""
        return {"args": {}, "attributes": {"saved": self.saved}}

    @property
    def saved(self) -> str:
        """The state as text, because a schedule may hold tensors, and the Trainer writes JSON."""
        file = io.BytesIO()
        torch.save(self.state_dict(), file)
        return base64.b64encode(file.getvalue()).decode()

    @saved.setter
    def saved(self, saved: str) -> None:
        raise ValueError(
            "restore_callback_states_from_checkpoint=True replaces this callback with a new one, without its schedule "
            "and its logger; leave it at False: the callback loads its state from the checkpoint by itself"
        )


def _decoded(saved: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(saved)), weights_only=True)
    return state
