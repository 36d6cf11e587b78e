"""Which weight decay is worth it on a small language model: today's variants, and training that makes zeros.

A byte-level transformer learns to write Python, from the source files of Python's own standard library, dealt by file
into training, validation and test. All methods get the same initial weights, batches, steps and number of values to try
(the same budget of tuning): AdamW with a cosine schedule and warmup. "lambda" is what each method tunes:

- `weight_decay`: AdamW's own, at twice lambda; `L2 lr`: the same by the library.
- `L2 schedule`, `L2 corrected`: `rate=`; `L2 cautious`: `cautious=True`; lambda is per step for "schedule".
- `L2 bound`: no lambda, but a bound: each matrix may keep this times its initial mean square.
- `L1 proximal`: with AdamW's usual decay beside it (lambda 0.05, that is 0.1): exact zeros.
- `L0 50%`, `L0 80%`: dual averaging steered to so many zeros; lambda is that of AdamW's decay beside it.

    python examples/language_model.py                                                     7 minutes on one core
    python examples/language_model.py --width 192 --layers 6 --steps 400 --batch 8 --files 4 --seeds 3 --jobs 2

`--resume` names a file of finished trainings: an interrupted comparison goes on from there.
"""

import argparse
import math
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from torch_regpen import L0, L1, L2, RegularizedOptimizer, TargetSparsity
from torch_regpen.compare import Comparison, compare
from torch_regpen.compare.methods import MethodLike
from torch_regpen.schedules import Bound, LamScheduler

LR, WARMUP, CONTEXT = 2e-3, 0.1, 64
USUAL = 0.05  # lambda of the L2 that is AdamW's usual decay of 0.1

LAMBDAS = {
    "weight_decay": [0.05, 0.5, 5.0],
    "L2 lr": [0.05, 0.5, 5.0],
    "L2 schedule": [1e-4, 1e-3, 1e-2],
    "L2 corrected": [0.05, 0.5, 5.0],
    "L2 cautious": [0.05, 0.5, 5.0],
    "L2 bound": [1.0, 2.0, 4.0],
    "L1 proximal": [1e-6, 1e-5, 1e-4],
    "L0 50%": [0.05, 0.5, 5.0],
    "L0 80%": [0.05, 0.5, 5.0],
}


class Block(nn.Module):
    """Attention to earlier bytes, then a small network for each byte."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """A transformer over bytes; it returns the logits of the next byte at each place."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, width // 16) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(x) + self.place.weight[: x.shape[1]]))


def load_data(files: int, device: str, seed: int) -> dict[str, Tensor]:
    """The bytes of the standard library's modules: a tenth of them each for test and validation, then so many to train.

    They are the same for all seeds.
    """
    found = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    texts, tenth = [found[i].read_bytes() for i in order], len(found) // 10
    parts = {"test": texts[:tenth], "validation": texts[tenth : 2 * tenth], "train": texts[2 * tenth :][:files]}
    joined = {name: torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for name, part in parts.items()}
    return {name: text.to(device) for name, text in joined.items()}


def make_model(width: int, layers: int, data: Mapping[str, Tensor]) -> nn.Module:
    """The network, where the data is."""
    return LanguageModel(width, layers).to(data["train"].device)


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Stretches of the text, and the same one byte later."""
    rows = text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1, device=text.device)].long()
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy of the next byte, in nats."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def warmup_and_cosine(steps: int, step: int) -> float:
    """The factor on the learning rate."""
    warmup = max(int(WARMUP * steps), 1)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))


def make_optimizer(params: Any) -> torch.optim.Optimizer:
    """AdamW, without a decay but for that of the groups that the comparison gives."""
    return torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)


def fit(
    steps: int,
    batch_size: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    penalty: Callable[[], Tensor | float],
    data: Mapping[str, Tensor],
) -> None:
    """An ordinary training loop."""
    scheduler = LambdaLR(optimizer, partial(warmup_and_cosine, steps))
    text = data["train"]
    for _ in range(steps):
        batch = windows(text, torch.randint(len(text) - CONTEXT, (batch_size,), device=text.device))
        loss = loss_of(model, batch) + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def score(model: nn.Module, data: Mapping[str, Tensor]) -> dict[str, float]:
    """The loss in bits per byte, negative since higher is to be better, on stretches that are always the same."""
    scores = {}
    for name in ("validation", "test"):
        starts = torch.linspace(0, len(data[name]) - CONTEXT - 1, 256, device=data[name].device).long()
        losses = [loss_of(model, windows(data[name], part)) for part in starts.split(64)]
        scores[name] = -torch.stack(losses).mean().item() / math.log(2)
    return scores


def bound(optimizer: RegularizedOptimizer) -> Bound:
    """Lambda is the factor on the initial mean square, up to which a matrix may grow."""
    factor, optimizer.penalty.lam = optimizer.penalty.lam, 1.0
    return Bound(optimizer, "initial", factor=factor)


def beside_decay(optimizer: RegularizedOptimizer) -> LamScheduler:
    """AdamW's usual decay beside a penalty whose lambda stays."""
    optimizer.param_groups[0]["weight_decay"] = 2 * USUAL
    return LamScheduler(optimizer.penalty, unchanged)


def unchanged(step: int) -> float:
    """The factor on lambda."""
    return 1.0


def zeros(target: float, steps: int, optimizer: RegularizedOptimizer) -> TargetSparsity:
    """AdamW's decay at lambda, and so many zeros: reached at two thirds of the training, and held."""
    optimizer.param_groups[0]["weight_decay"] = 2 * optimizer.penalty.lam
    return TargetSparsity(optimizer, target, steps=max(2 * steps // 3, 1))


def methods(steps: int) -> dict[str, MethodLike]:
    """The methods; all that is special about one is in its dict."""
    return {
        "L2 lr": (L2, "decoupled"),
        "L2 schedule": (L2, "decoupled", {"rate": "schedule"}),
        "L2 corrected": (L2, "decoupled", {"rate": "corrected"}),
        "L2 cautious": (L2, "decoupled", {"cautious": True}),
        "L2 bound": (L2, "decoupled", {"rate": "schedule", "schedule": bound}),
        "L1 proximal": (L1, "proximal", {"schedule": beside_decay}),
        "L0 50%": (L0, "dual", {"schedule": partial(zeros, 0.5, steps)}),
        "L0 80%": (L0, "dual", {"schedule": partial(zeros, 0.8, steps)}),
    }


def report(comparison: Comparison) -> None:
    """Print a row for each method: the loss on validation and test, with the 95% interval over the seeds."""
    print(
        f"{'':14}{'lambda':>8}{'validation':>12}{'test, bits per byte':>21}{'zeros %':>9}{'against weight_decay':>29}"
    )
    for method, lam in comparison.chosen.items():
        trials = comparison.at(method)
        validation, test = (-fmean(trial.scores[name] for trial in trials) for name in ("validation", "test"))
        mean, low, high = (0.0 - x for x in comparison.difference(method, "weight_decay"))
        against = "" if method == "weight_decay" else f"{mean:+.3f} [{high:+.3f}, {low:+.3f}]"
        share = 100 * fmean(trial.zeros for trial in trials)
        print(f"{method:14}{lam:>8g}{validation:>12.3f}{test:>21.3f}{share:>9.1f}{against:>29}")


def plot(comparison: Comparison, file: Path) -> None:
    """Draw the validation loss of each method: each value that was tried, a seed each, and the mean of the chosen.

    Losses far above those of the chosen values are left out.
    """
    chosen = []
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for column, (method, lam) in enumerate(comparison.chosen.items()):
        tried = [trial for value in comparison.lams(method) for trial in comparison.at(method, value)]
        axes.plot([column] * len(tried), [-t.scores["validation"] for t in tried], "_", color="#BBBBBB", markersize=12)
        losses = [-trial.scores["validation"] for trial in comparison.at(method, lam)]
        axes.plot([column] * len(losses), losses, "_", color="#0072B2", markersize=12)
        axes.plot(column, fmean(losses), "o", color="#0072B2", markersize=9)
        chosen += losses
    margin = 0.2 * (max(chosen) - min(chosen))
    axes.set_ylim(min(chosen) - margin, max(chosen) + margin)
    axes.set_xticks(range(len(comparison.chosen)), comparison.chosen, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_ylabel("validation loss, bits per byte")
    axes.set_title("Blue: the chosen lambda (a line each seed, a dot the mean); grey: others", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, choose lambda, print and plot."""
    parser = argparse.ArgumentParser(description="Weight decay in its variants, on a small language model.")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a training")
    parser.add_argument("--batch", type=int, default=16, help="stretches of text in a step")
    parser.add_argument("--width", type=int, default=64, help="a multiple of 16")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--files", type=int, default=64, help="source files of the standard library to train on")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time, in processes of their own")
    parser.add_argument("--quick", action="store_true", help="one lambda for each method: shows that it runs")
    parser.add_argument("--resume", type=Path, help="a file of finished trainings, from which to go on")
    parser.add_argument("--plot", type=Path, default=Path("runs/language_model.png"), help="the picture to write")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")

    comparison = compare(
        methods(options.steps),
        {name: lams[1:2] if options.quick else lams for name, lams in LAMBDAS.items()},
        data=partial(load_data, options.files, options.device),
        make_model=partial(make_model, options.width, options.layers),
        make_optimizer=make_optimizer,
        fit=partial(fit, options.steps, options.batch),
        score=score,
        seeds=range(options.seeds),
        resume=options.resume,
        n_jobs=options.jobs,
        progress=True,
    )
    report(comparison)
    plot(comparison, options.plot)
    print(f"\nThe plot: {options.plot}")


if __name__ == "__main__":
    main()
