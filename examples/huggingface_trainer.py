"""The Hugging Face Trainer: the wrapper goes in as `optimizers=`, and a callback steers lambda and freezes the zeros.

A tiny BERT with random weights learns which of two tokens a sequence ends with; nothing is downloaded.

    python examples/huggingface_trainer.py
"""

import argparse
import tempfile
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)

from torch_regpen import L1, RegularizedOptimizer
from torch_regpen.callbacks import TrainerRegularizer
from torch_regpen.schedules import LinearRamp


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, of which the last is the label."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(2, 100, (count, 8), generator=generator)
        self.tokens[:, -1] = torch.arange(count) % 2

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i, -1]}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and prints how many weights of each matrix are exactly zero."""
    parser = argparse.ArgumentParser(description="torch_regpen in the Hugging Face Trainer.")
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(argv).steps

    set_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = BertForSequenceClassification(config)
    penalty = L1(model, lam=1e-5, select=["*.query.weight", "*.key.weight", "*.value.weight", "*.dense.weight"])
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)  # AdamW's default is 0.01
    optimizer = RegularizedOptimizer(adamw, penalty, mode="proximal")
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    callback = TrainerRegularizer(schedule=LinearRamp(penalty, steps // 4), freeze_at=steps * 3 // 4)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=16,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Sequences(512),
            optimizers=(optimizer, scheduler),
            callbacks=[callback],
        )
        trainer.train()
    print(penalty.summary())


if __name__ == "__main__":
    main()
