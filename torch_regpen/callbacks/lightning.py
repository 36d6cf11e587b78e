"""LightningRegularizer: a callback for Lightning's Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .regularizer import Regularizer

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

__all__ = ["LightningRegularizer"]


class LightningRegularizer(Regularizer, Callback):
    """Steps a schedule of lambda, freezes zeros and logs the weights, in Lightning's Trainer.

    It finds the `RegularizedOptimizer` that `configure_optimizers` returns and acts after each of its steps. Batches
    whose gradients are only accumulated do not count, nor do steps that a GradScaler skips. Lightning's checkpoints
    contain the number of steps, the state of the schedule, and the frozen zeros (in the optimizer state). For several
    optimizers, give the trainer a callback for each; to resume, give the callbacks in the same order.

    Args:
        optimizer: the optimizer to follow, if `configure_optimizers` returns several `RegularizedOptimizer`s.
        schedule: a schedule of `torch_regpen.schedules`, or a callable that makes it from the optimizer, which exists
            only when the training begins.
        logger: a `WeightLogger`, or a callable that makes it from the optimizer. It gets the number of steps taken.
        freeze_at: the number of steps after which `optimizer.freeze_zeros()` is called, 0 or more. Zeros then stay
            frozen to the end.

    Raises:
        TypeError: an argument is none of these.
        ValueError: `freeze_at` is negative; when the training begins, there is no `RegularizedOptimizer`, or there are
            several and none was given, or the schedule was made for a different one.

    Example:
        >>> import lightning
        >>> from torch_regpen.callbacks import LightningRegularizer
        >>> from torch_regpen.schedules import TargetSparsity
        >>> def schedule(optimizer):
        ...     return TargetSparsity(optimizer, 0.9, steps=1000, freeze=True)
        >>> trainer = lightning.Trainer(logger=False, callbacks=[LightningRegularizer(schedule=schedule)])
    """

    HOW = (
        "let configure_optimizers return RegularizedOptimizer(optimizer, penalty, mode='proximal'), alone or as "
        "{'optimizer': ...}, and pass this optimizer, or none, to the callback"
    )

    _place: int | None = None  # among the callbacks of this class in the trainer, known from `setup` on

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint: the class, with a number for all but the first."""
        place = id(self) if self._place is None else self._place  # the trainer compares keys before `setup`, too
        return f"{type(self).__qualname__}.{place}" if place else type(self).__qualname__

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the place among the callbacks of this class. No checkpoint is loaded at this point."""
        alike = [callback for callback in trainer.callbacks if type(callback) is type(self)]
        self._place = next(place for place, callback in enumerate(alike) if callback is self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizer. A checkpoint is already loaded at this point."""
        self._attach(trainer.optimizers)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach from the optimizer."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach from the optimizer."""
        self._detach()
