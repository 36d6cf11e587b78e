"""The trainings of a comparison, one after another or in several processes."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..export import dead_units
from ..groups import NM
from ..optim.modes import MODES
from ..optim.wrapper import RegularizedOptimizer
from ..penalties.activity import ActivityPenalty
from ..penalties.base import Penalty
from ..schedules import TargetSparsity
from ..tensorboard import WeightLogger
from ..utils import modes_kept
from .methods import Method
from .trials import Failure, Job, Scores, Trial, weights_of

__all__ = ["Experiment", "Fit", "Prepared", "Score", "attempt", "attempts"]

Fit = Callable[[nn.Module, Optimizer, Callable[[], Tensor | float], Any], object]
Score = Callable[[nn.Module, Any], Scores]
MakeLogger = Callable[[Penalty | nn.Module], WeightLogger]


class Prepared(NamedTuple):
    """A model, penalty, optimizer and schedule before training."""

    model: nn.Module
    penalty: Penalty
    optimizer: Optimizer
    in_loss: bool
    schedule: Any = None

    @property
    def watched(self) -> Penalty | nn.Module:
        """The penalty, whose weights are counted; or the model, if the penalty is on activations."""
        return self.penalty if isinstance(self.penalty, Penalty) else self.model

    @property
    def uses_lam(self) -> bool:
        """Whether lambda has an effect. It has none on N:M groups, or if a `TargetSparsity` sets it."""
        if isinstance(self.schedule, TargetSparsity):
            return False
        terms = self.penalty.terms() if isinstance(self.penalty, Penalty) else []
        return not terms or any(not isinstance(term.grouping, NM) for term in terms)


@dataclass
class Experiment:
    """The methods, and the functions of the user: see `compare`.

    Attributes:
        datasets: the result of `data` for each seed.
    """

    methods: dict[str, Method]
    data: Callable[[int], Any]
    make_model: Callable[[Any], nn.Module]
    make_optimizer: Callable[[Any], Optimizer]
    fit: Fit
    score: Score
    datasets: dict[int, Any] = field(default_factory=dict)

    def dataset(self, seed: int) -> Any:
        if seed not in self.datasets:
            self.datasets[seed] = self.data(seed)
        return self.datasets[seed]

    def initial_model(self, seed: int) -> nn.Module:
        """The same initial weights for each method."""
        data = self.dataset(seed)
        torch.manual_seed(seed)
        return self.make_model(data)

    def prepare(self, name: str, lam: float, seed: int) -> Prepared:
        """The model, the penalty and the optimizer of a training."""
        method = self.methods[name]
        model = self.initial_model(seed)
        penalty = method.make_penalty(model, lam)
        if not isinstance(penalty, Penalty | ActivityPenalty):
            raise TypeError(f"{name!r} must make a penalty, but made a {type(penalty).__name__}")
        if method.how == "weight_decay":
            decayed = [p for _, p in penalty.named_parameters_penalized()]
            others = [p for p in model.parameters() if all(p is not q for q in decayed)]
            groups = [{"params": decayed, "weight_decay": 2 * lam}, {"params": others, "weight_decay": 0.0}]
            optimizer = self._new_optimizer(groups)
            if "weight_decay" not in optimizer.defaults:
                raise ValueError(
                    f"make_optimizer makes a {type(optimizer).__name__}, which has no weight_decay, so the baseline "
                    "'weight_decay' would be the same as 'plain'; make an optimizer that has it"
                )
            return Prepared(model, penalty, optimizer, False)
        optimizer = self._new_optimizer(model.parameters())
        schedule = None
        if method.how in MODES:
            optimizer = RegularizedOptimizer(optimizer, penalty, method.how, **method.optimizer_options)
            if method.options.get("schedule") is not None:
                schedule = method.options["schedule"](optimizer)
                if not callable(getattr(schedule, "step", None)):
                    raise TypeError(f"the schedule of {name!r} made a {type(schedule).__name__}, which has no step()")
        return Prepared(model, penalty, optimizer, method.how == "loss", schedule)

    def train(self, name: str, lam: float, seed: int, logger: MakeLogger | None = None) -> tuple[nn.Module, Trial]:
        """Train, and score.

        Args:
            name: the method.
            lam: lambda.
            seed: the seed.
            logger: makes the logger of the weights, which also logs the scores; None logs nothing.
        """
        start = self.prepare(name, lam, seed)
        data = self.dataset(seed)
        steps = _Steps(
            start.optimizer,
            None if logger is None else logger(start.watched),
            partial(self.evaluate_aside, start.model, data),
        )
        if start.schedule is not None:
            start.optimizer.register_step_post_hook(lambda *_: start.schedule.step())
        torch.manual_seed(seed)
        before = time.perf_counter()
        self.fit(start.model, start.optimizer, start.penalty if start.in_loss else _without_penalty, data)
        next(start.model.parameters()).flatten()[:1].tolist()  # waits for the device
        seconds = time.perf_counter() - before
        scores = self.evaluate(start.model, data)
        steps.end()
        zeros = (weights_of(start.model) == 0).double().mean().item()
        dead = sum(len(units) for units in dead_units(start.watched).values())
        return start.model, Trial(name, lam, seed, scores, zeros, dead, steps.count, seconds)

    def _new_optimizer(self, params: Any) -> Optimizer:
        optimizer = self.make_optimizer(params)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"make_optimizer must return an optimizer, not a {type(optimizer).__name__}")
        return optimizer

    def evaluate(self, model: nn.Module, data: Any) -> Scores:
        """The scores as floats. The training mode of each module is restored."""
        with modes_kept(model):
            scores = self.score(model, data)
        if not isinstance(scores, Mapping):
            raise TypeError(f"score must return a dict of numbers by name, not a {type(scores).__name__}")
        missing = [name for name in ("validation", "test") if name not in scores]
        if missing:
            raise ValueError(
                f"score must return 'validation' and 'test'; it returned {list(scores)}, without {missing}"
            )
        return {name: _number(name, value) for name, value in scores.items()}

    def evaluate_aside(self, model: nn.Module, data: Any) -> Scores:
        """`evaluate` during training: what `score` draws, as each DataLoader does, changes no later batch."""
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices):
            return self.evaluate(model, data)


def _without_penalty() -> float:
    """The `penalty()` of a training without a penalty in the loss."""
    return 0.0


def _number(name: str, value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"score returned {name!r}: {value!r}; allowed is a number") from error


class _Steps:
    """Counts the steps of an optimizer. With a logger, it also logs the weights and the scores."""

    def __init__(self, optimizer: Optimizer, logger: WeightLogger | None, evaluate: Callable[[], Scores]) -> None:
        self.count = 0
        self.logger = logger
        self.evaluate = evaluate
        optimizer.register_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        if self.logger is not None and self.count % self.logger.every == 0:
            self._log(self.logger, self.count)
        self.count += 1

    def end(self) -> None:
        """Log the last step if it is not logged yet; otherwise a short training would have a single point."""
        last = self.count - 1
        if self.logger is not None and self.count and last % self.logger.every:
            self.logger.every = 1
            self._log(self.logger, last)

    def _log(self, logger: WeightLogger, step: int) -> None:
        logger.step(step)
        if logger.writer is not None:
            for name, value in self.evaluate().items():
                logger.writer.add_scalar(f"score/{name}", value, step)


# Many trainings.


def attempts(experiment: Experiment, jobs: list[Job], n_jobs: int) -> Iterator[Trial | Failure]:
    """Train each job, and yield the results in any order.

    Args:
        experiment: the experiment.
        jobs: the method, lambda and seed of each training.
        n_jobs: the number of processes; 1 means only this one.

    Raises:
        TypeError: the functions of the experiment cannot be passed to another process.
        RuntimeError: a process died.
    """
    if n_jobs == 1 or not jobs:
        return (_result(experiment, job) for job in jobs)
    return _in_processes(experiment, jobs, n_jobs)


def attempt(experiment: Experiment, job: Job, logger: MakeLogger | None = None) -> tuple[nn.Module, Trial] | Failure:
    """Call `Experiment.train`; return an exception as a `Failure`."""
    try:
        return experiment.train(*job, logger)
    except Exception as error:
        return Failure(*job, f"{type(error).__name__}: {error}", traceback.format_exc())


def _result(experiment: Experiment, job: Job) -> Trial | Failure:
    """`attempt` without the models, which would fill the memory."""
    result = attempt(experiment, job)
    return result if isinstance(result, Failure) else result[1]


# Processes are spawned, because CUDA and OpenMP threads do not work after a fork.


def _in_processes(experiment: Experiment, jobs: list[Job], n_jobs: int) -> Iterator[Trial | Failure]:
    settings = [get() for get, _ in SETTINGS]
    pool = ProcessPoolExecutor(min(n_jobs, len(jobs)), get_context("spawn"), _start, (_pickled(experiment), settings))
    try:
        try:
            pool.submit(_load).result()
        except (AttributeError, ImportError) as error:
            raise TypeError(_unpicklable("a function of compare", error)) from error
        for future in as_completed([pool.submit(_result_in_worker, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"n_jobs={n_jobs}: a process ended. If it was killed because memory ran out, give fewer n_jobs. If it "
            "could not start: a script that uses n_jobs must call compare below `if __name__ == '__main__':`, since "
            "each process imports the script. See the output of the process"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _pickled(experiment: Experiment) -> bytes:
    experiment = replace(experiment, datasets={})  # each process makes its own
    for part in fields(experiment):
        try:
            pickle.dumps(getattr(experiment, part.name))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(_unpicklable(part.name, error)) from error
    return pickle.dumps(experiment)


def _unpicklable(what: str, error: Exception) -> str:
    return (
        f"n_jobs above 1 starts processes that import what they run, but {what} cannot be imported ({error}). Define "
        "functions and classes at the top level of a file, not as a lambda, inside a function or in a notebook; bind "
        "arguments with functools.partial, as in partial(torch.optim.SGD, lr=0.1). Or leave out n_jobs"
    )


def _set_default_device(device: torch.device) -> None:
    if device != torch.get_default_device():  # setting a default device, even the CPU, slows each call
        torch.set_default_device(device)


SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [  # settings of torch that affect results
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
]

_worker: dict[str, Any] = {}  # in a process that trains: "pickled", and once it is loaded, "experiment"


def _start(pickled: bytes, settings: Iterable[Any]) -> None:
    """Apply the settings of the first process in a new one."""
    for (_, set_), value in zip(SETTINGS, settings, strict=True):
        set_(value)
    _worker["pickled"] = pickled


def _load() -> None:
    if "experiment" not in _worker:
        _worker["experiment"] = pickle.loads(_worker["pickled"])


def _result_in_worker(job: Job) -> Trial | Failure:
    _load()
    return _result(_worker["experiment"], job)
