"""Write a comparison to TensorBoard, in one folder for each method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path as File
from statistics import fmean
from typing import TYPE_CHECKING

from ..utils import require
from .trials import Trial

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Board", "write_summary"]


class Board:
    """Opens a writer for each method, below `logdir/chosen`.

    Args:
        logdir: the folder.
        names: the names of the methods.

    Raises:
        ImportError: TensorBoard is missing.
    """

    def __init__(self, logdir: File, names: Iterable[str]) -> None:
        with require("logdir needs TensorBoard", "tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._open = SummaryWriter
        self._folders = {name: logdir / "chosen" / folder for name, folder in _folders(names).items()}

    def writer(self, name: str) -> SummaryWriter:
        """The writer of a method. It hides the events of an earlier comparison in the same folder."""
        return self._open(str(self._folders[name]), purge_step=0)


def write_summary(writer: SummaryWriter, chosen: float, trials: dict[float, Sequence[Trial]]) -> None:
    """Write the row of a method in the table HPARAMS, and the means over the seeds as curves over lambda.

    HPARAMS shows the last scores that were logged while the chosen model was trained. The horizontal axis of the curves
    is the index of lambda, from 0, since a step must be an integer; `by_lambda/lambda` shows its value.

    Args:
        writer: the writer of the method.
        chosen: the chosen lambda.
        trials: the trainings with each lambda.
    """
    from torch.utils.tensorboard.summary import hparams

    first = trials[chosen][0]
    metrics = dict.fromkeys([*(f"score/{name}" for name in first.scores), "sparsity/total"], 0.0)
    for summary in hparams({"method": first.method, "lambda": chosen}, metrics):
        writer._get_file_writer().add_summary(summary)
    if len(trials) < 2:
        return
    for i, (lam, of_lam) in enumerate(trials.items()):
        writer.add_scalar("by_lambda/lambda", lam, i)
        writer.add_scalar("by_lambda/zeros", fmean(trial.zeros for trial in of_lam), i)
        writer.add_scalar("by_lambda/dead", fmean(trial.dead for trial in of_lam), i)
        for name in first.scores:
            writer.add_scalar(f"by_lambda/{name}", fmean(trial.scores[name] for trial in of_lam), i)


def _folders(names: Iterable[str]) -> dict[str, str]:
    """A different folder for each name, valid on any file system."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.+=,-]", "_", name).strip(".").encode()[:100].decode(errors="ignore") or "_"
        others, folder, i = {other.casefold() for other in found.values()}, plain, 1
        while folder.casefold() in others:
            folder, i = f"{plain}_{i + 1}", i + 1
        found[name] = folder
    return found
