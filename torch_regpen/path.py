"""Which lambda: the largest that makes sense, and the path of solutions down (or up) from it, cross-validated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from .optional import needed
from .penalty import Penalty, Sum, checked_lam
from .sharding import maximum
from .stationarity import distance
from .terms import by_tensor

__all__ = ["Path", "lam_max", "regularization_path"]

Indices = Any
Fit = Callable[[nn.Module, Penalty, Indices], object]
Score = Callable[[nn.Module, Indices], float]


def lam_max(penalty: Penalty, loss_fn: Callable[[], Tensor]) -> float:
    """`min {lam : -gradient at 0 is in lam * subdifferential(Omega)(0)}`: from there on zero is a stationary point.

    It takes one gradient of `loss_fn()` with the penalized weights at zero (at their center, where there is one), and
    puts them back. Fit what is not penalized, an intercept, before. Meant for models that are linear in the penalized
    weights: a network of zeros has no gradient. Of a network it is found by doubling lambda until training leaves no
    weight (`examples/choose_lambda.py`).

    Args:
        penalty: all its groups get the same lambda; its own are left as they are.
        loss_fn: evaluates the plain loss at the present weights.

    Returns:
        lambda, infinite for L2, which never zeroes a weight.

    Raises:
        ValueError: zero is stationary at every lambda (LHalf, L0), or the penalty is a sum.
    """
    if isinstance(penalty, Sum):
        raise ValueError("a sum has no lambda of its own: ask for one of its .penalties")
    slope = penalty.rho_grad(torch.zeros((), dtype=torch.float64)).item() if penalty.separable else 0.0
    if slope == math.inf:
        raise ValueError(f"{type(penalty).__name__} has an infinite slope at 0: zero is stationary at every lambda")
    work = by_tensor(penalty.terms())
    tensors = [terms[0].tensor for terms in work]
    before = [tensor.detach().clone() for tensor in tensors]
    lams = [group["lam"] for group in penalty.param_groups]
    try:
        with torch.no_grad():
            for terms, tensor in zip(work, tensors, strict=True):
                center = terms[0].center
                tensor.copy_(torch.zeros_like(tensor) if center is None else center)
        with torch.enable_grad():
            grads = torch.autograd.grad(loss_fn(), tensors, allow_unused=True)
        pairs = [(terms, grad) for terms, grad in zip(work, grads, strict=True) if grad is not None]

        def stationary(lam: float) -> bool:
            penalty.lam = lam
            with torch.no_grad():
                return all(bool(maximum([(distance(terms, grad), terms[0].tensor)]) == 0) for terms, grad in pairs)

        if stationary(0.0):
            return 0.0
        return math.inf if slope == 0 else _smallest(stationary)
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        for group, lam in zip(penalty.param_groups, lams, strict=True):
            group["lam"] = lam


def _smallest(holds: Callable[[float], bool]) -> float:
    """The smallest number, to the last digit, from which on `holds`; it does not at 0."""
    high = 1.0
    while not holds(high):
        high *= 2
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@dataclass
class Path:
    """Solutions along a path of lambdas, in the order in which they were fitted.

    Attributes:
        lams: the lambdas.
        states: for each lambda the model's state dict, fitted on all data.
        nonzeros: for each lambda the number of penalized elements that are not zero.
        scores: lambdas x folds, float64, higher is better; None without folds.
        penalized: the names of the penalized parameters.
    """

    lams: list[float]
    states: list[dict[str, Tensor]] = field(default_factory=list)
    nonzeros: list[int] = field(default_factory=list)
    scores: Tensor | None = None
    penalized: list[str] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The lambda with the highest mean score; of equals the largest."""
        mean = self._mean()
        return max(lam for lam, score in zip(self.lams, mean.tolist(), strict=True) if score == mean.max())

    @property
    def best_1se(self) -> float:
        """The largest lambda whose mean score is within one standard error of the best one's (ddof 1)."""
        mean = self._mean()
        least = mean.max() - self._standard_errors()[self.lams.index(self.best)]
        return max(lam for lam, score in zip(self.lams, mean.tolist(), strict=True) if score >= least)

    def plot(self, file: str | File) -> None:
        """Draw weights (of many, the share of zeros by parameter) and scores with their errors against lambda.

        Args:
            file: where to write it; the ending says the format.

        Raises:
            ImportError: matplotlib is missing.
        """
        with needed("Path.plot needs matplotlib", "examples"):
            from matplotlib.figure import Figure
        figure = Figure(figsize=(11 if self.scores is not None else 6, 4), layout="constrained")
        axes = figure.subplots(1, 1 if self.scores is None else 2, squeeze=False)[0]
        flat = [torch.cat([s[name].flatten().cpu() for name in self.penalized]) for s in self.states]
        if flat[0].numel() <= 50:
            axes[0].plot(self.lams, torch.stack(flat).numpy())
            axes[0].set(xlabel="lambda", ylabel="weight", xscale="log", title="weights")
        else:
            for name in self.penalized:
                zeros = [(state[name] == 0).double().mean().item() for state in self.states]
                axes[0].plot(self.lams, zeros, label=name)
            axes[0].set(xlabel="lambda", ylabel="share of exact zeros", xscale="log", title="sparsity by parameter")
            axes[0].legend(fontsize="small")
        if self.scores is not None:
            axes[1].errorbar(self.lams, self._mean(), self._standard_errors(), capsize=3)
            axes[1].axvline(self.best, color="0.3", linestyle="--", label=f"best {self.best:.3g}")
            axes[1].axvline(self.best_1se, color="0.3", linestyle=":", label=f"one standard error {self.best_1se:.3g}")
            axes[1].set(xlabel="lambda", ylabel="score", xscale="log", title="cross-validation")
            axes[1].legend(fontsize="small")
        figure.savefig(file)

    def _mean(self) -> Tensor:
        if self.scores is None:
            raise ValueError("without folds and a score there is no best lambda")
        mean: Tensor = self.scores.mean(dim=1)
        return mean

    def _standard_errors(self) -> Tensor:
        scores = self.scores if self.scores is not None else torch.zeros(0, 1)
        folds = scores.shape[1]
        if folds < 2:
            return torch.zeros(len(scores), dtype=torch.float64)
        errors: Tensor = scores.std(dim=1, correction=1) / folds**0.5
        return errors


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
    """The solutions for each lambda, each warm-started from the last; cross-validated where `folds` are given.

    For all data, and then for each fold, the model starts from the weights that it has now, and goes through the
    lambdas. The model and the penalty are left as they were.

    Args:
        model: the model.
        penalty: on the model's parameters; its `lam` is set.
        fit: `fit(model, penalty, train_indices)` trains the model, with the penalty as it is; without folds the indices
            are None, for all data.
        lams: the lambdas, in any order.
        folds: `(train_indices, test_indices)` of each fold, as scikit-learn's `KFold.split` yields them.
        score: `score(model, test_indices)` is a number, higher is better.
        order: `"down"`, from the largest, for convex models; `"up"`, from dense to sparse, for networks, whose
            all-zero layers have no gradient to leave zero by.
        checkpoint: a file in which each solution is saved, and from which an interrupted path goes on.
        progress: show a progress bar (tqdm).

    Raises:
        ValueError: an unknown order; no lambda, or one that is negative or not finite; folds without a score.
    """
    if order not in ("down", "up"):
        raise ValueError(f"order must be 'down' or 'up', not {order!r}")
    if (folds is None) != (score is None):
        raise ValueError("folds and score go together: the score is what the folds are held out for")
    path = Path(sorted((checked_lam(lam) for lam in lams), reverse=order == "down"))
    if not path.lams:
        raise ValueError("lams is empty")
    path.penalized = [name for name, _ in penalty.named_parameters_penalized()]
    splits = [] if folds is None else list(folds)
    if splits:
        path.scores = torch.full((len(path.lams), len(splits)), math.nan, dtype=torch.float64)
    start, lam = _copied(model), penalty.lam
    done = _Checkpoint(checkpoint, path)
    runs = list(enumerate([(None, None), *splits]))
    jobs = [(run, train, test, step) for run, (train, test) in runs for step in range(len(path.lams))]
    for run, train, test, step in with_progress_bar(jobs, "regularization path") if progress else jobs:
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
    model.load_state_dict(start)
    penalty.lam = lam
    return path


class _Checkpoint:
    """What a path has found so far, in a file: for each run its scores, and for all data each state, else the last."""

    def __init__(self, file: str | File | None, path: Path) -> None:
        self.file = None if file is None else File(file)
        self.found: dict[str, Any] = {"lams": path.lams, "states": {}, "values": {}}
        if self.file is not None and self.file.exists():
            found = torch.load(self.file, weights_only=True)
            if found["lams"] != path.lams:
                raise ValueError(f"{self.file} holds a path over other lambdas; give another file")
            self.found = found

    def get(self, run: int, step: int) -> tuple[dict[str, Tensor] | None, float]:
        key = f"{run}.{step}"
        return self.found["states"].get(key), self.found["values"].get(key, math.nan)

    def put(self, run: int, step: int, state: dict[str, Tensor], value: float) -> None:
        if self.file is None:
            return
        self.found["states"][f"{run}.{step}"] = state
        self.found["values"][f"{run}.{step}"] = float(value)
        partial = self.file.with_name(self.file.name + ".part")
        torch.save(self.found, partial)
        partial.replace(self.file)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def with_progress_bar(jobs: list[Any], name: str) -> Iterable[Any]:
    """The jobs, with a bar that shows how many are done."""
    with needed("progress=True needs tqdm", "examples"):
        from tqdm import tqdm
    bar: Iterable[Any] = tqdm(jobs, desc=name)
    return bar
