"""Which lambda: the largest that makes sense, and the path of solutions down (or up) from it, cross-validated."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from .distributed.reductions import max_over_ranks
from .groups.norms import NormGrouping
from .ops.subdifferential import distance
from .ops.terms import Term, by_tensor
from .penalties.base import Penalty, Sum
from .penalties.param_groups import checked_lam
from .utils import require, with_progress_bar

__all__ = ["Path", "lam_max", "regularization_path"]

Indices = Any
Fit = Callable[[nn.Module, Penalty, Indices], object]
Score = Callable[[nn.Module, Indices], float]


def lam_max(penalty: Penalty, loss_fn: Callable[[], Tensor]) -> float:
    """`min {lam : -gradient at 0 is in lam * subdifferential(Omega)(0)}`: from there on zero is a stationary point.

    It takes one gradient of `loss_fn()` with the penalized weights at zero (at their center, where there is one), and
    puts them back. Fit what is not penalized before: an intercept, and elements to which `weights` gives 0, which keep
    their present value here and whose gradient does not count. Meant for models that are linear in the penalized
    weights: a network of zeros has no gradient. Of a network it is found by doubling lambda until training leaves no
    weight (`examples/choose_lambda.py`).

    Args:
        penalty: all its groups get the same lambda; its own are left as they are.
        loss_fn: evaluates the plain loss at the present weights.

    Returns:
        lambda, infinite for L2, which never zeroes a weight.

    Raises:
        ValueError: zero is stationary at every lambda (LHalf, L0); a sum; a gradient that is not finite.
    """
    _refuse_sum(penalty)
    slope = penalty.rho_grad(torch.zeros((), dtype=torch.float64)).item() if penalty.separable else 0.0
    if slope == math.inf:
        raise ValueError(f"{type(penalty).__name__} has an infinite slope at 0: zero is stationary at every lambda")
    work = by_tensor(penalty.terms())
    tensors = [terms[0].tensor for terms in work]
    before = [tensor.detach().clone() for tensor in tensors]
    free = [_unpenalized(terms) for terms in work]
    with _lams_kept(penalty):
        try:
            with torch.no_grad():
                for terms, tensor, kept in zip(work, tensors, free, strict=True):
                    center = terms[0].center
                    zero = torch.zeros_like(tensor) if center is None else center
                    tensor.copy_(zero if kept is None else torch.where(kept, tensor, zero))
            with torch.enable_grad():
                grads = torch.autograd.grad(loss_fn(), tensors, allow_unused=True)
            pairs = [
                (terms, grad if kept is None else grad.masked_fill(kept, 0))
                for terms, grad, kept in zip(work, grads, free, strict=True)
                if grad is not None
            ]

            def stationary(lam: float) -> bool:
                penalty.lam = lam
                with torch.no_grad():
                    return all(
                        bool(max_over_ranks([(distance(terms, grad), terms[0].tensor)]) == 0) for terms, grad in pairs
                    )

            if stationary(0.0):
                return 0.0
            for terms, grad in pairs:
                if not bool(grad.isfinite().all()):
                    raise ValueError(f"the gradient of the loss at zero, of {terms[0].name!r}, is not finite")
            return math.inf if slope == 0 else _smallest(stationary)
        finally:
            with torch.no_grad():
                for tensor, old in zip(tensors, before, strict=True):
                    tensor.copy_(old)


def _unpenalized(terms: list[Term]) -> Tensor | None:
    """Which elements of a tensor have weight 0, so that no lambda holds them; None without weights."""
    weights, grouping = terms[0].weights, terms[0].grouping
    if weights is not None and isinstance(grouping, NormGrouping):
        weights = grouping.spread(weights, terms[0].tensor)
    return None if weights is None else weights == 0


@contextmanager
def _lams_kept(penalty: Penalty) -> Iterator[None]:
    """Puts the lambda of each group back at the end."""
    lams = [group["lam"] for group in penalty.param_groups]
    try:
        yield
    finally:
        for group, lam in zip(penalty.param_groups, lams, strict=True):
            group["lam"] = lam


def _refuse_sum(penalty: Penalty) -> None:
    if isinstance(penalty, Sum):
        raise ValueError("a sum has no lambda of its own: ask for one of its .penalties")


def _smallest(holds: Callable[[float], bool]) -> float:
    """The smallest number, to the last digit, from which on `holds`; it does not at 0. Infinite if there is none."""
    high = 1.0
    while not holds(high):
        high *= 2
        if high == math.inf:
            return high
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
        """The lambda with the highest mean score; of equals the largest. One with a score of NaN is never the best.

        Raises:
            ValueError: there are no scores, or each lambda has one that is NaN.
        """
        return max(self._ranked())[1]

    @property
    def best_1se(self) -> float:
        """The largest lambda whose mean score is within one standard error of the best one's (ddof 1)."""
        top, best = max(self._ranked())
        error = self._standard_errors()[self.lams.index(best)].nan_to_num(0.0)  # of infinite scores there is none
        return max(lam for score, lam in self._ranked() if score >= top - error.item())

    def plot(self, file: str | File) -> None:
        """Draw weights (of many, the share of zeros by parameter) and scores with their errors against lambda.

        Args:
            file: where to write it; the ending says the format.

        Raises:
            ImportError: matplotlib is missing.
        """
        with require("Path.plot needs matplotlib", "examples"):
            from matplotlib.figure import Figure
        columns = 1 if self.scores is None else 2
        figure = Figure(figsize=(1 + 5 * columns, 4), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
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
            mean = self._mean()
            finite = mean.masked_fill(mean.isinf(), math.nan)  # which is a gap in the line
            axes[1].errorbar(self.lams, finite, self._standard_errors(), capsize=3)
            if not mean.isnan().all():
                best, best_1se = self.best, self.best_1se
                axes[1].axvline(best, color="0.3", linestyle="--", label=f"best {best:.3g}")
                axes[1].axvline(best_1se, color="0.3", linestyle=":", label=f"one standard error {best_1se:.3g}")
                axes[1].legend(fontsize="small")
            axes[1].set(xlabel="lambda", ylabel="score", xscale="log", title="cross-validation")
        figure.savefig(file)

    def _mean(self) -> Tensor:
        if self.scores is None:
            raise ValueError("without folds and a score there is no best lambda")
        mean: Tensor = self.scores.mean(dim=1)
        return mean

    def _ranked(self) -> list[tuple[float, float]]:
        """Mean score and lambda, without those whose mean is NaN."""
        ranked = [(x, lam) for x, lam in zip(self._mean().tolist(), self.lams, strict=True) if not math.isnan(x)]
        if not ranked:
            raise ValueError("each lambda has a score that is NaN: there is no best; look at `scores`")
        return ranked

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
    lambdas. The model and the penalty are left as they were, each group with its own lambda, if something raises too.

    Args:
        model: the model.
        penalty: on the model's parameters; all its groups get the same lambda, as by setting `penalty.lam`. For groups
            in proportion, give one of them `weights`.
        fit: `fit(model, penalty, train_indices)` trains the model, with the penalty as it is; without folds the indices
            are None, for all data.
        lams: the lambdas, in any order.
        folds: `(train_indices, test_indices)` of each fold, as scikit-learn's `KFold.split` yields them.
        score: `score(model, test_indices)` is a number, higher is better.
        order: `"down"`, from the largest, for convex models; `"up"`, from dense to sparse, for networks, whose
            all-zero layers have no gradient to leave zero by.
        checkpoint: a file in which each solution is saved, and from which an interrupted path goes on, if it is over
            the same lambdas and folds, in the same order, with a penalty, score and model that look the same.
        progress: show a progress bar (tqdm).

    Raises:
        ValueError: an unknown order; no lambda, or one that is negative or not finite; folds without a score; a sum; a
            checkpoint of another path.
    """
    _refuse_sum(penalty)
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
    runs = list(enumerate([(None, None), *splits]))
    jobs = [(run, train, test, step) for run, (train, test) in runs for step in range(len(path.lams))]
    start = _copied(model)
    with _lams_kept(penalty):
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
    """What a path has found so far, in a file: for each run and lambda the state and the score.

    Args:
        file: where; None keeps nothing.
        cache_key: what the path is over, by name: what a file found there must agree with.
    """

    def __init__(self, file: str | File | None, cache_key: dict[str, Any]) -> None:
        self.file = None if file is None else File(file)
        self.found: dict[str, Any] = {"cache_key": cache_key, "states": {}, "values": {}}
        if self.file is not None and self.file.exists():
            found = torch.load(self.file, weights_only=True)
            known = found.get("cache_key", {})
            other = [name for name, value in cache_key.items() if known.get(name) != value]
            if other:
                raise ValueError(f"{self.file} holds a path with other {', '.join(other)}; give another file")
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
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)  # what a module adds
        for name, value in model.state_dict().items()
    }


def _digest(indices: Indices) -> str:
    """Tells indices from others by their values; of an object that does not show any, the type."""
    values = indices.tolist() if hasattr(indices, "tolist") else indices
    shown = repr(values) if isinstance(values, Sequence | slice) else type(values).__qualname__
    return hashlib.sha256(shown.encode()).hexdigest()


def _settings(penalty: Penalty) -> list[str]:
    """Its numbers and names, such as `l1_ratio` and `groups`."""
    shown = {name: value for name, value in vars(penalty).items() if isinstance(value, int | float | str)}
    return [f"{name}={value!r}" for name, value in shown.items() if not name.startswith("_") and name != "training"]
