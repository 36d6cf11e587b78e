"""The file of finished trainings: a line of JSON for each, with the settings that it was made with."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path as File

import torch
from torch import Tensor, nn

from ..describe import describe
from .training import Experiment
from .trials import Job, Trial

__all__ = ["FinishedTrainings", "describe"]

START = '{"method": '  # the start of each line


class FinishedTrainings:
    """A file to which each finished training is appended, so that an interrupted comparison can continue.

    The settings of a training are the user's functions (see `describe`), the repr of the optimizer, a digest of the
    initial weights, the method, and the versions of Python and torch. The settings in the file must equal the current
    ones.

    Attributes:
        trials: the trainings found in the file.

    Args:
        file: the file; it and its folder are created if they do not exist.
        experiment: the current experiment.
        seeds: the current seeds.

    Raises:
        ValueError: the file has another format, or has trainings of these methods with different settings.
    """

    def __init__(self, file: File, experiment: Experiment, seeds: Iterable[int]) -> None:
        self.file = file
        self.methods = {
            name: {"penalty": describe(method.make_penalty), "how": method.how, "options": describe(method.options)}
            for name, method in experiment.methods.items()
        }
        self.models = {seed: _digest(experiment.initial_model(seed)) for seed in seeds}
        optimizer = experiment.make_optimizer(experiment.initial_model(next(iter(self.models))).parameters())
        functions = ("data", "make_model", "make_optimizer", "fit", "score")
        self.shared = {name: describe(getattr(experiment, name)) for name in functions} | {
            "optimizer": " ".join(repr(optimizer).split()),
            "versions": f"Python {'.'.join(platform.python_version_tuple()[:2])}, torch {torch.__version__}",
        }
        self.trials: dict[Job, Trial] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            self._read()
        file.touch()

    def add(self, trial: Trial) -> None:
        """Append a training."""
        line = json.dumps(trial._asdict() | {"settings": self._settings(trial.method, trial.seed)})
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def _settings(self, method: str, seed: int) -> dict[str, str]:
        """The settings of a training; without the weights if the seed is not in this comparison."""
        model = {"initial weights": self.models[seed]} if seed in self.models else {}
        return self.shared | self.methods[method] | model

    def _read(self) -> None:
        not_ours = f"resume={str(self.file)!r} is not a file of finished trainings; give another name"
        try:
            text = self.file.read_bytes().decode()
            *lines, last = text.split("\n")
            if last != START[: len(last)] and not last.startswith(START):
                raise ValueError(not_ours)
            found = [json.loads(line) for line in lines]
            settings = [line.pop("settings") for line in found]
            trials = [Trial(**line) for line in found]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(not_ours) from error
        for trial, given in zip(trials, settings, strict=True):
            if trial.method in self.methods:
                self._check(trial, given)
                self.trials[trial.job] = trial
        if last:  # the writing of this line was interrupted
            self.file.write_bytes("".join(line + "\n" for line in lines).encode())

    def _check(self, trial: Trial, found: Mapping[str, str]) -> None:
        other = {key: now for key, now in self._settings(trial.method, trial.seed).items() if found.get(key) != now}
        if other:
            changes = "; ".join(f"{key}: {found.get(key)} there, {now} here" for key, now in other.items())
            raise ValueError(
                f"resume={str(self.file)!r} has a training of {trial.method!r} (lambda {trial.lam:g}, seed "
                f"{trial.seed}) with other settings ({changes}), which must not be mixed. Give another file, or the "
                "settings of that one"
            )


def _digest(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and byte sums of the weights."""
    parts = [
        f"{name} {tuple(w.shape)} {w.dtype} {w.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64).item()}"
        for name, w in model.state_dict().items()
        if isinstance(w, Tensor)
    ]
    return sha256(" ".join(parts).encode()).hexdigest()[:8]
