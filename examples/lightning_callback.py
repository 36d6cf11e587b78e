"""Lightning: the wrapper goes where an optimizer goes, and a callback logs the weights to Lightning's TensorBoard.

The module's `training_step` says nothing of the penalty.

    python examples/lightning_callback.py
    tensorboard --logdir runs/lightning
"""

import argparse
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_regpen import L1, Penalty, RegularizedOptimizer
from torch_regpen.tensorboard import WeightLogger


class Digits(L.LightningModule):
    """A small net for handwritten digits. Its penalty is a part of it, so that lambda is in its checkpoints."""

    def __init__(self, lam: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
        self.penalty = L1(self.net, lam)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The plain loss: the optimizer applies the penalty."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        """The wrapper and a scheduler, as any optimizer and its scheduler."""
        adam = torch.optim.Adam(self.parameters(), lr=2e-3)
        optimizer = RegularizedOptimizer(adam, self.penalty, mode="proximal")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class LogWeights(L.Callback):
    """Histograms and exact zeros of the penalized weights, on every rank as sharded weights need it."""

    def __init__(self, penalty: Penalty, every: int) -> None:
        self.penalty = penalty
        self.every = every
        self.steps = 0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Only the first rank has a writer."""
        writer = trainer.logger.experiment if trainer.is_global_zero and trainer.logger else None
        self.logger = WeightLogger(writer, self.penalty, every=self.every)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """After the optimizer's step, which with accumulation does not come with every batch."""
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.logger.step(self.steps)


def digits() -> DataLoader[tuple[Tensor, ...]]:
    """Scikit-learn's handwritten digits."""
    x, y = load_digits(return_X_y=True)
    return DataLoader(TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)), 64, shuffle=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains in bfloat16 with accumulated gradients; the penalty counts once a step, in float32."""
    parser = argparse.ArgumentParser(description="torch_regpen in Lightning.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--logdir", default="runs/lightning")
    args = parser.parse_args(argv)

    L.seed_everything(0, verbose=False)
    model = Digits(lam=1e-3)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        logger=TensorBoardLogger(args.logdir),
        callbacks=[LogWeights(model.penalty, every=50)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, digits())
    print(model.penalty.summary())


if __name__ == "__main__":
    main()
