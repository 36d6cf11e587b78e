"""Lightning: the wrapper goes where an optimizer goes, and a callback steers lambda, freezes the zeros and logs.

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

from torch_regpen import L1, RegularizedOptimizer
from torch_regpen.callbacks import LightningRegularizer
from torch_regpen.schedules import LinearRamp
from torch_regpen.tensorboard import WeightLogger


class Digits(L.LightningModule):
    """A small net for handwritten digits. Its penalty is a submodule, so that lambda is in its checkpoints."""

    def __init__(self, lam: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
        self.penalty = L1(self.net, lam)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The plain loss: the optimizer applies the penalty."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        """The wrapper and a scheduler, like any optimizer and its scheduler."""
        adam = torch.optim.Adam(self.parameters(), lr=2e-3)
        optimizer = RegularizedOptimizer(adam, self.penalty, mode="proximal")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def digits() -> DataLoader[tuple[Tensor, ...]]:
    """Scikit-learn's handwritten digits."""
    x, y = load_digits(return_X_y=True)
    return DataLoader(TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)), 64, shuffle=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains in bfloat16 with accumulated gradients; the callback counts the steps of the optimizer."""
    parser = argparse.ArgumentParser(description="torch_regpen in Lightning.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--logdir", default="runs/lightning")
    args = parser.parse_args(argv)

    L.seed_everything(0, verbose=False)
    model, batches, board = Digits(lam=1e-3), digits(), TensorBoardLogger(args.logdir)
    steps = args.epochs * -(-len(batches) // 2)
    callback = LightningRegularizer(
        schedule=LinearRamp(model.penalty, steps // 4),
        logger=lambda optimizer: WeightLogger(board.experiment, optimizer, every=50),
        freeze_at=steps * 3 // 4,  # the last quarter fits the weights that survive, without the penalty
    )
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        logger=board,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)
    print(model.penalty.summary())


if __name__ == "__main__":
    main()
