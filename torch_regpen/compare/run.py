"""`compare`: trains a model with several penalties, lambdas and seeds, and with torch's weight_decay."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path as File
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..path import Path
from ..penalties.base import Penalty
from ..tensorboard import WeightLogger
from ..utils import warn, with_progress_bar
from .board import Board, write_summary
from .methods import Lams, MethodLike, checked_lams, checked_methods, checked_seeds
from .results import Comparison
from .resume import FinishedTrainings
from .training import Experiment, Fit, Prepared, Score, attempt, attempts
from .trials import Failure, Job, Trial

__all__ = ["compare"]

SHOWN = 5  # failures in a message


def compare(
    methods: Mapping[str, MethodLike],
    lams: Lams,
    *,
    data: Callable[[int], Any],
    make_model: Callable[[Any], nn.Module],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    fit: Fit,
    score: Score,
    seeds: Iterable[int] = range(5),
    resume: str | File | None = None,
    n_jobs: int = 1,
    logdir: str | File | None = None,
    log_every: int = 100,
    progress: bool = False,
) -> Comparison:
    """Train a model with each method, lambda and seed, without a penalty ("plain"), and with torch's "weight_decay".

    All methods get the same initial weights and, if `fit` draws from torch's generator, the same batches: torch is
    seeded before `make_model` and `fit`. weight_decay is `2*lam` on the parameters of `L2(model, lam)`. The chosen
    lambda is the largest whose validation score is within one standard error, over the seeds, of the best (Breiman et
    al. 1984). If a training raises, the table counts the failure, and the others continue.

    Args:
        methods: a dict from name to `(penalty, how)` or `(penalty, how, options)`. `penalty(model, lam)` makes the
            penalty, as do `L1` and `partial(MCP, knee=0.2)`. `how` is "loss" or a mode of `RegularizedOptimizer`.
            `options` are its keyword arguments, such as `{"metric": "euclidean"}`; and `{"schedule": make}`, where
            `make(optimizer)` returns a schedule of lambda, as does `partial(Bound, bound="initial")`. `fit` need not
            step the schedule.
        lams: lambdas for all methods, or a dict from method to lambdas. "weight_decay" gets all of them if it is left
            out.
        data: `data(seed)` returns the data for the next functions.
        make_model: `make_model(data)` returns the model.
        make_optimizer: `make_optimizer(params)` returns the optimizer.
        fit: `fit(model, optimizer, penalty, data)` trains. It adds `penalty()` to its loss: 0.0 unless `how` is "loss".
        score: `score(model, data)` returns a dict of numbers, higher is better, with "validation" and "test".
        seeds: two or more ints.
        resume: a file that collects finished trainings; those in it are not run again.
        n_jobs: the number of processes, each with as many threads as this one. Above 1, the functions must be
            importable from files (no lambdas), and scripts need `if __name__ == "__main__":`.
        logdir: a folder for TensorBoard. It shows each method's weights and scores in the training with the chosen
            lambda, its mean scores by lambda, and its row in HPARAMS.
        log_every: the number of optimizer steps between two entries on TensorBoard.
        progress: show a progress bar with the time left (tqdm).

    Raises:
        TypeError, ValueError: before training: an argument is not as above, a mode cannot apply a penalty, or `resume`
            has other settings.
        RuntimeError: all trainings failed, or a process died.
        ImportError: a package for `logdir` or `progress` is missing.

    Example:
        >>> import torch
        >>> from torch_regpen import L1
        >>> from torch_regpen.compare import compare
        >>> def fit(model, optimizer, penalty, data):
        ...     for _ in range(20):
        ...         optimizer.zero_grad()
        ...         ((model(data[0]) - data[1]).square().mean() + penalty()).backward()
        ...         optimizer.step()
        >>> def score(model, data):
        ...     return dict.fromkeys(["validation", "test"], -(model(data[0]) - data[1]).square().mean())
        >>> comparison = compare(
        ...     {"L1": (L1, "proximal")}, [0.01, 0.1, 1.0], data=lambda seed: (torch.eye(3), torch.eye(3)[:, :1]),
        ...     make_model=lambda data: torch.nn.Linear(3, 1), fit=fit, score=score, seeds=[0, 1, 2],
        ...     make_optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> list(comparison.chosen)
        ['plain', 'weight_decay', 'L1']
    """
    functions = {"data": data, "make_model": make_model, "make_optimizer": make_optimizer, "fit": fit, "score": score}
    for name, function in functions.items():
        if not callable(function) or isinstance(function, nn.Module):
            raise TypeError(f"{name} must be a function, not a {type(function).__name__}")
    experiment = Experiment(checked_methods(methods), data, make_model, make_optimizer, fit, score)
    grids, seeds = checked_lams(lams, experiment.methods), checked_seeds(seeds)
    grid = grids["weight_decay"]
    if not grid or len(seeds) < 2:
        raise ValueError(f"given {len(grid)} lambdas and {len(seeds)} seeds; compare needs a lambda and two seeds")
    if not isinstance(n_jobs, int) or n_jobs < 1:
        raise ValueError(f"n_jobs={n_jobs!r}; allowed is a number of processes, 1 or more")
    if not isinstance(log_every, int) or log_every < 1:
        raise ValueError(f"log_every={log_every!r}; allowed is a number of steps, 1 or more")
    _warn_without_scipy()
    board = None if logdir is None else Board(File(logdir), experiment.methods)
    for seed in seeds:
        experiment.dataset(seed)
    _check_models_are_new(experiment, seeds[0])
    using_lam = {name for name, grid in grids.items() if _try_out(experiment, name, grid[-1], seeds[0]).uses_lam}
    jobs = [(name, lam, seed) for name in grids for lam in grids[name] for seed in seeds]
    finished = None if resume is None else FinishedTrainings(File(resume), experiment, seeds)
    done, failures = _train(experiment, jobs, finished, n_jobs, progress)
    chosen = _chosen(grids, seeds, done, using_lam)

    comparison = Comparison([done[job] for job in jobs if job in done], chosen, {}, failures)
    last: Iterable[tuple[str, float]] = list(chosen.items())
    for name, lam in with_progress_bar(last, "training the models", len(chosen)) if progress else last:
        result = _train_model(experiment, (name, lam, seeds[0]), comparison, board, log_every)
        if isinstance(result, Failure):
            failures.append(result)
        else:
            comparison.models[name] = result
    _warn_of_failures(failures, chosen, grids)
    return comparison


def _check_models_are_new(experiment: Experiment, seed: int) -> None:
    """Raise if two models share parameters that are trained: each training would continue the one before."""
    models = [experiment.initial_model(seed) for _ in range(2)]
    if not isinstance(models[0], nn.Module):
        raise TypeError(f"make_model must return a module, not a {type(models[0]).__name__}")
    first, second = ({id(p) for p in model.parameters() if p.requires_grad} for model in models)
    if first & second:
        raise ValueError(
            "make_model returned the same parameters twice, so each training would continue the one before; it must "
            "make a new model at each call, as does lambda data: copy.deepcopy(model)"
        )


def _warn_without_scipy() -> None:
    try:
        import scipy.stats  # noqa: F401
    except ImportError:
        warn('without SciPy the table will have no intervals: pip install "torch_regpen[examples]"')


def _try_out(experiment: Experiment, name: str, lam: float, seed: int) -> Prepared:
    """Prepare a training, so that errors of a penalty, its optimizer and `score` appear before any training."""
    start = experiment.prepare(name, lam, seed)
    if name == "plain":
        experiment.evaluate(start.model, experiment.dataset(seed))
        _warn_of_decay(start.optimizer)
    if start.in_loss and isinstance(start.penalty, Penalty) and (value := start.penalty()).requires_grad:
        value.backward()
    return start


def _warn_of_decay(optimizer: Optimizer) -> None:
    decays = [group["weight_decay"] for group in optimizer.param_groups if group.get("weight_decay")]
    if decays:
        warn(
            f"make_optimizer makes {type(optimizer).__name__} with weight_decay={decays[0]:g} (AdamW's default is "
            "0.01), which acts in 'plain' and beside each penalty too. Pass weight_decay=0 to compare without it"
        )


def _train(
    experiment: Experiment, jobs: list[Job], finished: FinishedTrainings | None, n_jobs: int, progress: bool
) -> tuple[dict[Job, Trial], list[Failure]]:
    """The trainings that finished, now or in the file, and those that failed.

    Raises:
        RuntimeError: all failed.
    """
    done = {} if finished is None else {job: finished.trials[job] for job in jobs if job in finished.trials}
    failures = []
    order = random.Random(0).sample(jobs, len(jobs))  # so that a busy machine slows all methods alike
    results = attempts(experiment, [job for job in order if job not in done], n_jobs)
    if progress:
        results = with_progress_bar(results, "comparing", len(jobs), len(done))
    for result in results:
        if isinstance(result, Failure):
            failures.append(result)
            continue
        done[result.job] = result
        if finished is not None:
            finished.add(result)
    if not done:
        raise RuntimeError(f"all {len(jobs)} trainings failed. The first failure:\n{failures[0].traceback}")
    names = dict.fromkeys(name for trial in done.values() for name in trial.scores)  # a score may lack some names
    done = {j: t._replace(scores={name: t.scores.get(name, math.nan) for name in names}) for j, t in done.items()}
    return done, failures


def _chosen(
    grids: Mapping[str, list[float]], seeds: list[int], done: Mapping[Job, Trial], using_lam: set[str]
) -> dict[str, float]:
    """The lambda of each method that has a finished training, by the one-standard-error rule."""
    chosen = {}
    at_end = []
    for name, grid in grids.items():
        scores = {
            lam: [done[job].scores["validation"] for seed in seeds if (job := (name, lam, seed)) in done]
            for lam in grid
        }
        most = max(map(len, scores.values()))
        if most == 0:
            continue
        candidates = [lam for lam in grid if len(scores[lam]) == most]
        path = Path(candidates, scores=torch.tensor([scores[lam] for lam in candidates], dtype=torch.float64))
        try:
            chosen[name] = path.best_1se
        except ValueError:  # all NaN
            warn(f"{name!r} has a validation score of NaN at each lambda; the table shows the smallest lambda")
            chosen[name] = candidates[0]
            continue
        if name in using_lam and len(grid) > 1 and chosen[name] in (grid[0], grid[-1]) and chosen[name] > 0:
            end = "smallest" if chosen[name] == grid[0] else "largest"
            at_end.append(f"{name!r} {chosen[name]:g} ({end})")
    if at_end:
        warn(f"the chosen lambda is at an end of lams, so a lambda beyond it may be better: {', '.join(at_end)}")
    return chosen


def _train_model(
    experiment: Experiment, job: Job, comparison: Comparison, board: Board | None, log_every: int
) -> nn.Module | Failure:
    """The model of a method at its chosen lambda, logged to TensorBoard."""
    if board is None:
        result = attempt(experiment, job)
        return result if isinstance(result, Failure) else result[0]
    name, lam, _ = job
    with board.writer(name) as writer:
        result = attempt(experiment, job, lambda weights: WeightLogger(writer, weights, every=log_every))
        write_summary(writer, lam, {lam: comparison.at(name, lam) for lam in comparison.lams(name)})
    return result if isinstance(result, Failure) else result[0]


def _warn_of_failures(failures: list[Failure], chosen: Mapping[str, float], methods: Iterable[str]) -> None:
    if failures:
        shown = "".join(f"\n  {failure}" for failure in failures[:SHOWN])
        more = f"\n  and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        lost = [name for name in methods if name not in chosen]
        all_of = f"; all of {', '.join(map(repr, lost))}" if lost else ""
        warn(f"{len(failures)} trainings failed{all_of}. Comparison.failures has their tracebacks{shown}{more}")
