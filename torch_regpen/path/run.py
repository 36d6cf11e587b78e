"""`regularization_path`: fits a model for each lambda, on all data and on each fold."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from ..penalties.base import Penalty
from ..penalties.param_groups import checked_lam
from ..utils import with_progress_bar
from .largest import lams_kept, refuse_sum
from .solutions import Path

__all__ = ["regularization_path"]

Indices = Any
Fit = Callable[[nn.Module, Penalty, Indices], object]
Score = Callable[[nn.Module, Indices], float]


def regularization_path(
    model: nn.Module,
    penalty: Penalty,
    fit: Fit,
    lams: Iterable[float],
    *,
    folds: Iterable[tuple[Indices, Indices]] | None = None,
    score: Score | None = None,
    order: str = "down",
    checkpoint: str | File | None = None,
    progress: bool = False,
) -> Path:
    """Fit the model for each lambda, starting from the solution for the last one; cross-validate over `folds`.

    The path is fitted to all data, then to each fold. Each time it starts from the weights that the model has now. At
    the end, also after an exception, the weights and the lambdas are restored (Friedman, Hastie and Tibshirani 2010).

    Args:
        model: the model.
        penalty: a penalty on its parameters, with the same lambda for all parameter groups. For different lambdas, use
            `weights`.
        fit: `fit(model, penalty, train_indices)` trains the model. The indices are None for all data.
        lams: the lambdas, in any order.
        folds: `(train_indices, test_indices)` of each fold, as from scikit-learn's `KFold.split`.
        score: `score(model, test_indices)` returns a number, higher is better.
        order: "down" starts from the largest lambda, for convex models. "up" starts from the smallest, for networks:
            a layer of zeros has no gradient, and would stay zero.
        checkpoint: a file in which each solution is saved. An interrupted path continues from it if lambdas, order,
            folds, penalty, score and model agree.
        progress: show a progress bar with the time left (tqdm).

    Raises:
        ValueError: an unknown order; no lambdas, or a negative or infinite one; folds without a score, or a score
            without folds; a sum as penalty; the checkpoint of another path.
        ImportError: `progress` needs tqdm, which is missing.

    Example:
        >>> import torch
        >>> from torch_regpen import L1, RegularizedOptimizer
        >>> from torch_regpen.path import regularization_path
        >>> model, y = torch.nn.Linear(2, 1, bias=False), torch.tensor([[3.0], [-4.0]])
        >>> def fit(model, penalty, indices):
        ...     optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), penalty, "proximal")
        ...     optimizer.zero_grad()
        ...     (0.5 * (model(torch.eye(2)) - y).square().sum()).backward()
        ...     optimizer.step()
        >>> path = regularization_path(model, L1(model, 1.0), fit, [1.0, 3.5, 5.0])
        >>> path.lams, path.nonzeros
        ([5.0, 3.5, 1.0], [0, 1, 2])
    """
    refuse_sum(penalty)
    if order not in ("down", "up"):
        raise ValueError(f"order must be 'down' or 'up', not {order!r}")
    if (folds is None) != (score is None):
        raise ValueError("folds and score go together: give both, or neither")
    path = Path(sorted((checked_lam(lam) for lam in lams), reverse=order == "down"))
    if not path.lams:
        raise ValueError("lams is empty")
    path.penalized = [name for name, _ in penalty.named_parameters_penalized()]
    splits = [] if folds is None else list(folds)
    if splits:
        path.scores = torch.full((len(path.lams), len(splits)), math.nan, dtype=torch.float64)
    runs = list(enumerate([(None, None), *splits]))
    jobs = [(run, train, test, step) for run, (train, test) in runs for step in range(len(path.lams))]
    start = _copied(model)
    with lams_kept(penalty):
        try:
            penalty.lam = path.lams[0]
            cache_key = {
                "lambdas": path.lams,
                "folds": [[_digest(train), _digest(test)] for train, test in splits],
                "score": getattr(score, "__qualname__", type(score).__qualname__),
                "penalty": [repr(penalty), *path.penalized, *_settings(penalty)],
                "model": [f"{name}: {list(getattr(value, 'shape', []))}" for name, value in start.items()],
            }
            done = _Checkpoint(checkpoint, cache_key)
            for run, train, test, step in (
                with_progress_bar(jobs, "regularization path", len(jobs)) if progress else jobs
            ):
                if step == 0:
                    model.load_state_dict(start)
                penalty.lam = path.lams[step]
                state, value = done.get(run, step)
                if state is None:
                    fit(model, penalty, train)
                    state, value = _copied(model), score(model, test) if run and score is not None else math.nan
                    done.put(run, step, state, value)
                model.load_state_dict(state)
                if run == 0:
                    path.states.append(state)
                    path.nonzeros.append(sum(int(w.count_nonzero()) for _, w in penalty.named_parameters_penalized()))
                elif path.scores is not None:
                    path.scores[step, run - 1] = value
        finally:
            model.load_state_dict(start)
    return path


class _Checkpoint:
    """A file of the solutions so far: the state and the score for each run (all data or a fold) and lambda.

    Args:
        file: the file; None saves nothing.
        cache_key: the settings of the path, by name. Those in an existing file must be equal.
    """

    def __init__(self, file: str | File | None, cache_key: dict[str, Any]) -> None:
        self.file = None if file is None else File(file)
        self.found: dict[str, Any] = {"cache_key": cache_key, "states": {}, "values": {}}
        if self.file is not None and self.file.exists():
            found = torch.load(self.file, weights_only=True)
            known = found.get("cache_key", {})
            other = [name for name, value in cache_key.items() if known.get(name) != value]
            if other:
                raise ValueError(f"{self.file} holds a path that differs in {', '.join(other)}; give another file")
            self.found = found

    def get(self, run: int, step: int) -> tuple[dict[str, Tensor] | None, float]:
        return self.found["states"].get(f"{run}.{step}"), self.found["values"].get(f"{run}.{step}", math.nan)

    def put(self, run: int, step: int, state: dict[str, Tensor], value: float) -> None:
        if self.file is None:
            return
        self.found["states"][f"{run}.{step}"] = state
        self.found["values"][f"{run}.{step}"] = float(value)
        partial = self.file.with_name(self.file.name + ".part")
        torch.save(self.found, partial)
        partial.replace(self.file)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)  # extra state of a module
        for name, value in model.state_dict().items()
    }


def _digest(indices: Indices) -> str:
    """A hash of the values of the indices, or of the type of an object without values."""
    values = indices.tolist() if hasattr(indices, "tolist") else indices
    shown = repr(values) if isinstance(values, Sequence | slice) else type(values).__qualname__
    return hashlib.sha256(shown.encode()).hexdigest()


def _settings(penalty: Penalty) -> list[str]:
    """The options of a penalty that are numbers or strings, such as `l1_ratio` and `groups`."""
    shown = {name: value for name, value in vars(penalty).items() if isinstance(value, int | float | str)}
    return [f"{name}={value!r}" for name, value in shown.items() if not name.startswith("_") and name != "training"]
