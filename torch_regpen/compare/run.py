"""compare: penalties and weight_decay side by side on a model of yours, over lambdas and seeds."""

from __future__ import annotations

import math
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path as File
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..export import dead_units
from ..optim.modes import MODES
from ..optim.wrapper import RegularizedOptimizer
from ..path import Path
from ..penalties.activity import ActivityPenalty
from ..penalties.base import Penalty
from ..penalties.convex import L2
from ..penalties.param_groups import checked_lam
from ..tensorboard import WeightLogger
from ..utils import require, with_progress_bar
from .results import Comparison, Scores, Trial, weights_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["compare"]

Method = tuple[Callable[[nn.Module, float], Penalty], str]

WAYS = ("loss", *MODES)


def compare(
    methods: Mapping[str, Method],
    lams: Iterable[float],
    *,
    data: Callable[[int], Any],
    make_model: Callable[[Any], nn.Module],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    fit: Callable[[nn.Module, torch.optim.Optimizer, Callable[[], Tensor | float], Any], object],
    score: Callable[[nn.Module, Any], Scores],
    seeds: Iterable[int] = range(5),
    logdir: str | File | None = None,
    log_every: int = 100,
    progress: bool = False,
) -> Comparison:
    """Train every method with every lambda and every seed, beside no penalty (plain) and torch.optim's weight_decay.

    Each gets the same initial weights and, as far as `fit` draws from torch's generator, the same batches: torch is
    seeded before the model is made and again before it is fitted. weight_decay is `2*lam`, on the parameters that
    `L2(model, lam)` selects. lambda is chosen on the validation scores, by the one-standard-error rule with the seeds
    as folds. The net of the first seed is then trained once more with it, for `Comparison.models` and TensorBoard.

    Args:
        methods: a name, and what it stands for: `(penalty, how)`. `penalty(model, lam)` makes it, as `L1` does, or
            `partial(MCP, knee=0.2)`; `how` is `"loss"` or a mode of `RegularizedOptimizer`.
        lams: the lambdas that each method tries.
        data: `data(seed)` returns what the next three get, of any type.
        make_model: `make_model(data)`.
        make_optimizer: `make_optimizer(params)`, params as torch.optim takes them: `lambda ps: SGD(ps, lr=0.1)`.
        fit: `fit(model, optimizer, penalty, data)` trains; `penalty()` is added to its loss, and is 0.0 where the
            penalty is not in the loss.
        score: `score(model, data)` returns numbers by name, higher is better; lambda is chosen by "validation", "test"
            is reported, and so are all others. It is tried on an untrained model first.
        seeds: two or more.
        logdir: a folder for TensorBoard: in `chosen`, for each method, weights and scores over time at the lambda that
            it chose; in `lambdas` an entry in the HPARAMS table for each method and lambda, with the means over seeds.
        log_every: steps of the optimizer from one histogram to the next.
        progress: show a progress bar (tqdm).

    Raises:
        TypeError: methods that are no dict of name to `(penalty, how)`, a `penalty` that was made for one model, a
            `score` that returns no numbers by name.
        ValueError: a name that is taken (plain, weight_decay), an unknown way, a lambda that is negative or not finite,
            none at all, or fewer than two seeds; a score without "validation" or "test"; what penalty and optimizer
            themselves refuse. All before training.
        RuntimeError: a training or its score raises; it says which.
        ImportError: what `logdir` or `progress` need is missing.
    """
    ways: dict[str, Method] = {"plain": (L2, "plain"), "weight_decay": (L2, "weight_decay")} | _checked(methods)
    grid, seeds = sorted({checked_lam(lam) for lam in lams}), list(seeds)
    if not grid or len(seeds) < 2:
        raise ValueError(f"given {len(grid)} lambdas and {len(seeds)} seeds; a spread needs a lambda and two seeds")
    tried = {name: [0.0] if name == "plain" else grid for name in ways}
    open_writer = None if logdir is None else _writers(File(logdir))
    datasets = {seed: data(seed) for seed in seeds}

    def set_up(name: str, lam: float, seed: int) -> tuple[nn.Module, Penalty, torch.optim.Optimizer, bool]:
        make_penalty, how = ways[name]
        torch.manual_seed(seed)
        model = make_model(datasets[seed])
        penalty = make_penalty(model, lam)
        if not isinstance(penalty, Penalty | ActivityPenalty):
            raise TypeError(f"{name!r} is to make a penalty, and made a {type(penalty).__name__}")
        return model, penalty, _optimizer(make_optimizer, model, penalty, how, lam), how == "loss"

    def train(name: str, lam: float, seed: int, writer: SummaryWriter | None = None) -> tuple[nn.Module, Trial]:
        model, penalty, optimizer, in_loss = set_up(name, lam, seed)
        evaluate = partial(_scores, score, model, datasets[seed])
        held = penalty if isinstance(penalty, Penalty) else model
        logger = None if writer is None else WeightLogger(writer, held, every=log_every)
        steps = _Steps(optimizer, logger, evaluate)
        torch.manual_seed(seed)
        with _saying(f"{name!r} at lambda {lam:g}, seed {seed}"):
            start = time.perf_counter()
            fit(model, optimizer, penalty if in_loss else lambda: 0.0, datasets[seed])
            next(model.parameters()).flatten()[:1].tolist()  # waits for the device
            seconds = time.perf_counter() - start
            scores = evaluate()
        zeros = (weights_of(model) == 0).double().mean().item()
        dead = sum(len(units) for units in dead_units(held).values())
        return model, Trial(name, lam, seed, scores, zeros, dead, steps.count, seconds)

    for name in ways:  # what is wrong shows now, not after an hour
        model, penalty, _, in_loss = set_up(name, tried[name][-1], seeds[0])
        if name == "plain":
            _scores(score, model, datasets[seeds[0]])
        if in_loss and isinstance(penalty, Penalty) and (value := penalty()).requires_grad:
            value.backward()
    jobs = [(name, lam, seed) for name in ways for lam in tried[name] for seed in seeds]
    order = random.Random(0).sample(jobs, len(jobs))  # a machine that is busy for a while slows all methods alike
    done = {job: train(*job)[1] for job in (with_progress_bar(order, "comparing") if progress else order)}
    names = dict.fromkeys(name for trial in done.values() for name in trial.scores)  # a score may leave some out
    done = {j: t._replace(scores={name: t.scores.get(name, math.nan) for name in names}) for j, t in done.items()}
    chosen = {}
    for name in ways:
        scores = [[done[name, lam, seed].scores["validation"] for seed in seeds] for lam in tried[name]]
        path = Path(tried[name], scores=torch.tensor(scores, dtype=torch.float64))
        try:
            chosen[name] = path.best_1se
        except ValueError:  # all NaN
            warnings.warn(f"{name!r} has a validation score of NaN at each lambda: the smallest is shown", stacklevel=2)
            chosen[name] = tried[name][0]
    comparison = Comparison([done[job] for job in jobs], chosen, {})
    folders = _folders(ways)
    for name, lam in chosen.items():
        if open_writer is None:
            comparison.models[name] = train(name, lam, seeds[0])[0]
            continue
        with open_writer("chosen", folders[name], purge_step=0) as writer:  # hides what an earlier call left there
            comparison.models[name] = train(name, lam, seeds[0], writer)[0]
        for other in tried[name]:
            with open_writer("lambdas", f"{folders[name]}_{other:.12g}") as writer:
                _write_hparams(writer, comparison.at(name, other))
    return comparison


def _checked(methods: Mapping[str, Method]) -> dict[str, Method]:
    """The methods, if they are any."""
    if not isinstance(methods, Mapping):
        raise TypeError(f"methods must be a dict of name to (penalty, how), not a {type(methods).__name__}")
    for name, method in methods.items():
        if name in ("plain", "weight_decay"):
            raise ValueError(f"{name!r} is always compared with; give the method another name")
        if not isinstance(name, str) or not isinstance(method, tuple | list) or len(method) != 2:
            raise TypeError(
                f"a method is a name and (penalty, how), as in 'sparse': (L1, 'proximal'); not {name!r}: {method!r}"
            )
        make, how = method
        if how not in WAYS:
            raise ValueError(f"{name!r} is to be applied by {how!r}; allowed are {', '.join(map(repr, WAYS))}")
        if isinstance(make, nn.Module) or not callable(make):
            raise TypeError(
                f"{name!r} has a {type(make).__name__} where something that makes a penalty of each model and lambda "
                "is to be: a class, as L1, partial(MCP, knee=0.2), or lambda model, lam: ..."
            )
    return dict(methods)


def _folders(names: Iterable[str]) -> dict[str, str]:
    """A folder for each name that any file system takes, no two the same."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.+=,-]", "_", name).strip(".").encode()[:100].decode(errors="ignore") or "_"
        others, folder, i = {other.casefold() for other in found.values()}, plain, 1
        while folder.casefold() in others:
            folder, i = f"{plain}_{i + 1}", i + 1
        found[name] = folder
    return found


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Lets an error say in which training it was raised."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"the training of {what}, raised {type(error).__name__}: {error}") from error


def _optimizer(
    make: Callable[[Any], torch.optim.Optimizer], model: nn.Module, penalty: Penalty, how: str, lam: float
) -> torch.optim.Optimizer:
    """The optimizer, with the method's way to shrink weights."""
    if how == "weight_decay":
        decayed = [p for _, p in penalty.named_parameters_penalized()]
        others = [p for p in model.parameters() if all(p is not q for q in decayed)]
        return make([{"params": decayed, "weight_decay": 2 * lam}, {"params": others, "weight_decay": 0.0}])
    optimizer = make(model.parameters())
    return RegularizedOptimizer(optimizer, penalty, how) if how in MODES else optimizer


class _Steps:
    """Counts the steps of an optimizer and, with a logger, shows on TensorBoard what becomes of weights and scores."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, logger: WeightLogger | None, evaluate: Callable[[], Scores]
    ) -> None:
        self.count = 0
        self.logger = logger
        self.evaluate = evaluate
        optimizer.register_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        if self.logger is not None and self.logger.writer is not None:
            self.logger.step(self.count)
            if self.count % self.logger.every == 0:
                for name, value in self.evaluate().items():
                    self.logger.writer.add_scalar(f"score/{name}", value, self.count)
        self.count += 1


def _scores(score: Callable[[nn.Module, Any], Scores], model: nn.Module, data: Any) -> Scores:
    """The scores, as floats; each module is afterwards in training or evaluation as it was before."""
    before = [(module, module.training) for module in model.modules()]
    try:
        scores = score(model, data)
    finally:
        for module, training in before:
            module.training = training
    if not isinstance(scores, Mapping):
        raise TypeError(f"score must return a dict of numbers by name, not a {type(scores).__name__}")
    missing = [name for name in ("validation", "test") if name not in scores]
    if missing:
        raise ValueError(f"score must return 'validation' and 'test'; it returned {list(scores)}, without {missing}")
    return {name: float(value) for name, value in scores.items()}


def _writers(logdir: File) -> Callable[..., SummaryWriter]:
    """What opens a writer in a folder below `logdir`."""
    with require("logdir needs TensorBoard", "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return lambda *folder, **options: SummaryWriter(str(File(logdir, *folder)), **options)


def _write_hparams(writer: SummaryWriter, trials: Sequence[Trial]) -> None:
    """An entry in the table of hyperparameters: a method and a lambda, with the means over the seeds."""
    metrics = {f"mean/{name}": fmean(trial.scores[name] for trial in trials) for name in trials[0].scores}
    metrics["mean/zeros"] = fmean(trial.zeros for trial in trials)
    metrics["mean/dead"] = fmean(trial.dead for trial in trials)
    writer.add_hparams({"method": trials[0].method, "lambda": trials[0].lam}, metrics, run_name=".")
