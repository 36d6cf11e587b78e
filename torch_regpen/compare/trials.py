"""Records of trainings: `Trial` (finished), `Failure` (raised), `Difference` (between two methods)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..inspect.parameters import find_parameters

__all__ = ["Difference", "Failure", "Job", "Scores", "Trial", "mean_and_deviation", "weights_of"]

Scores = dict[str, float]
Job = tuple[str, float, int]  # method, lambda, seed


class Trial(NamedTuple):
    """A finished training.

    Attributes:
        method: the name of the method.
        lam: lambda. For `weight_decay` it is half the weight decay.
        seed: the seed of the initial weights and of the batches.
        scores: what `score` returned.
        zeros: the fraction of exact zeros, from 0 to 1, in the weights that a penalty selects by default.
        dead: the number of units whose weights are all zero: what `dead_units` finds for the method's penalty.
        steps: the number of optimizer steps.
        seconds: the duration of `fit`.

    Example:
        >>> from torch_regpen.compare import Trial
        >>> Trial("L1", 0.1, 0, {"validation": 0.9, "test": 0.8}, zeros=0.5, dead=3, steps=10, seconds=0.2).zeros
        0.5
    """

    method: str
    lam: float
    seed: int
    scores: Scores
    zeros: float
    dead: int
    steps: int
    seconds: float

    @property
    def job(self) -> Job:
        """Method, lambda and seed."""
        return self.method, self.lam, self.seed


class Failure(NamedTuple):
    """A training that raised an exception.

    Attributes:
        method: the name of the method.
        lam: lambda.
        seed: the seed.
        error: the type and the message of the exception.
        traceback: the traceback, as text.

    Example:
        >>> from torch_regpen.compare import Failure
        >>> Failure("L1", 0.1, 0, "ValueError: the loss is NaN", "Traceback ...").error
        'ValueError: the loss is NaN'
    """

    method: str
    lam: float
    seed: int
    error: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.method!r} at lambda {self.lam:g}, seed {self.seed}: {self.error}"


class Difference(NamedTuple):
    """The mean of paired differences, and its 95% confidence interval `[low, high]` (Student 1908).

    Example:
        >>> from torch_regpen.compare import Difference
        >>> Difference(mean=0.5, low=-0.1, high=1.1).low > 0  # the interval contains 0
        False
    """

    mean: float
    low: float
    high: float


def weights_of(model: nn.Module) -> Tensor:
    """The elements of all weights that a penalty selects by default, in one vector."""
    return torch.cat([use.tensor.detach().flatten() for use in find_parameters(model, default="weights")])


def mean_and_deviation(numbers: Iterable[float]) -> tuple[float, float]:
    """The mean and the standard deviation (ddof 1). For a single number the deviation is NaN."""
    x = torch.tensor(list(numbers), dtype=torch.float64)
    return x.mean().item(), x.std().item() if len(x) > 1 else math.nan
