"""`regularization_path`: fits a model for each lambda, on all data and on each fold."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path as File
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from ..describe import describe
from ..distributed.shards import full_tensor
from ..penalties.base import Penalty
from ..penalties.param_groups import checked_lam
from ..utils import first_names, modes_kept, with_progress_bar
from .largest import check_penalty, lams_kept
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
        TypeError: an argument is not as above; `score` does not return a number.
        ValueError: an unknown order; no lambdas, or a negative or infinite one; folds without a score, or a score
            without folds; no folds; a sum as penalty, or one on parameters of another model; the checkpoint of another
            path, or another file.
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
    check_penalty(penalty)
    if not callable(fit):
        raise TypeError(f"fit must be a function of model, penalty and train_indices, not {fit!r}")
    if not isinstance(lams, Iterable):
        raise TypeError(f"lams must be a list of lambdas, such as [0.1, 0.01], not {lams!r}")
    if order not in ("down", "up"):
        raise ValueError(f"order must be 'down' or 'up', not {order!r}")
    if (folds is None) != (score is None):
        raise ValueError("folds and score go together: give both, or neither")
    path = Path(sorted((checked_lam(lam) for lam in lams), reverse=order == "down"))
    if not path.lams:
        raise ValueError("lams is empty")
    path.penalized = _names_in(model, penalty)
    splits = [] if folds is None else _checked_folds(folds)
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
                "score": describe(score),
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
                    state = _copied(model)
                    value = _scored(score, model, test) if run and score is not None else math.nan
                    done.put(run, step, state, value)
                model.load_state_dict(state)
                if run == 0:
                    path.states.append(state)
                    terms = penalty.terms(frozen=True)
                    path.nonzeros.append(sum(int(term.offset(term.tensor).count_nonzero()) for term in terms))
                elif path.scores is not None:
                    path.scores[step, run - 1] = value
        finally:
            model.load_state_dict(start)
    return path


def _names_in(model: nn.Module, penalty: Penalty) -> list[str]:
    """The names of the penalized parameters in the state dict of the model."""
    names = {id(value): name for name, value in reversed(model.state_dict(keep_vars=True).items())}
    penalized = list(penalty.named_parameters_penalized())
    others = [name for name, parameter in penalized if id(parameter) not in names]
    if others:
        raise ValueError(
            f"the penalty is on {first_names(others)}, which the model does not have; make the penalty from this model"
        )
    return [names[id(parameter)] for _, parameter in penalized]


def _checked_folds(folds: Iterable[tuple[Indices, Indices]]) -> list[tuple[Indices, Indices]]:
    found = list(folds) if isinstance(folds, Iterable) else [folds]
    wrong = [fold for fold in found if not hasattr(fold, "__len__") or len(fold) != 2]
    if wrong:
        raise TypeError(
            f"folds must be pairs (train_indices, test_indices), as KFold(5).split(x) yields, not {wrong[0]!r}"
        )
    if not found:
        raise ValueError("folds is empty; an iterator, such as KFold(5).split(x), can be used once only")
    return found


def _scored(score: Score, model: nn.Module, indices: Indices) -> float:
    with modes_kept(model):
        value = score(model, indices)
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"score must return a number, not {value!r}") from error


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
            try:
                found = torch.load(self.file, weights_only=True)
                known = found.get("cache_key", {})
            except (UnpicklingError, RuntimeError, LookupError, AttributeError, EOFError) as error:
                raise ValueError(f"{self.file} is not the checkpoint of a path; give another file") from error
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
        self.file.parent.mkdir(parents=True, exist_ok=True)
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
    """The options of a penalty: numbers and strings, such as `l1_ratio` and `groups`, and `weights` and `center`."""
    shown = {name: value for name, value in vars(penalty).items() if isinstance(value, int | float | str)}
    options = [f"{name}={value!r}" for name, value in shown.items() if not name.startswith("_") and name != "training"]
    for term in penalty.terms():
        for name, tensor in (("weights", term.weights), ("center", term.center)):
            if tensor is not None:
                values = full_tensor(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8)
                options.append(f"{term.name} {name}={hashlib.sha256(values.numpy().tobytes()).hexdigest()}")
    return options
