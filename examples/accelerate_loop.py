"""Accelerate: `prepare` takes the wrapper as it takes an optimizer; the loop is the one of Accelerate's own examples.

It runs on one process or on many.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_regpen import L1, RegularizedOptimizer
from torch_regpen.schedules import LinearRamp


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a small net on scikit-learn's handwritten digits, with a lambda that grows over the first half."""
    parser = argparse.ArgumentParser(description="torch_regpen in Accelerate.")
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args(argv).epochs

    set_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    loader = DataLoader(data, batch_size=64, shuffle=True)

    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    penalty = L1(model, lam=1e-3)
    optimizer = RegularizedOptimizer(torch.optim.Adam(model.parameters(), lr=2e-3), penalty, mode="proximal")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(loader))
    ramp = LinearRamp(penalty, steps=epochs * len(loader) // 4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    accelerator.register_for_checkpointing(penalty, ramp)  # save_state() then keeps lambda and where its ramp is

    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)  # of the loss: the penalty is not clipped
                optimizer.step()  # only every second time, and with it the penalty
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ramp.step()
    accelerator.print(penalty.summary())


if __name__ == "__main__":
    main()
