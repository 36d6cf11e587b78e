"""`Path`: the solutions for each lambda, the scores, and the best lambda."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path as File

import torch
from torch import Tensor

from ..utils import require

__all__ = ["Path"]


@dataclass
class Path:
    """The solutions along a path of lambdas, in the order of fitting.

    Attributes:
        lams: the lambdas.
        states: for each lambda, the state dict of the model fitted to all data.
        nonzeros: for each lambda, the number of penalized elements that are not zero, or not at their center.
        scores: a float64 tensor of shape (lambdas, folds), higher is better; None without folds.
        penalized: the names of the penalized parameters in `states`.

    Example:
        >>> import torch
        >>> from torch_regpen.path import Path
        >>> path = Path([1.0, 0.5, 0.1], scores=torch.tensor([[0.0, 0.2], [0.6, 0.8], [0.7, 0.9]]))
        >>> path.best, path.best_1se
        (0.1, 0.5)
    """

    lams: list[float]
    states: list[dict[str, Tensor]] = field(default_factory=list)
    nonzeros: list[int] = field(default_factory=list)
    scores: Tensor | None = None
    penalized: list[str] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The lambda with the highest mean score, or the largest of several. Lambdas with a NaN score do not count.

        Raises:
            ValueError: there are no scores, or each lambda has a score of NaN.
        """
        return max(self._ranked())[1]

    @property
    def best_1se(self) -> float:
        """The largest lambda whose mean score is within one standard error of the best one (Breiman et al. 1984).

        This is the standard error of the best lambda's mean over the folds, `std / sqrt(folds)` with ddof 1.

        Raises:
            ValueError: as `best`.
        """
        top, best = max(self._ranked())
        error = self._standard_errors()[self.lams.index(best)].nan_to_num(0.0)  # the error of infinite scores is NaN
        return max(lam for score, lam in self._ranked() if score >= top - error.item())

    def plot(self, file: str | File) -> None:
        """Draw the weights, and the scores with their standard errors, against lambda.

        With more than 50 weights, the fraction of exact zeros in each parameter is drawn instead.

        Args:
            file: the file to write; its extension sets the format.

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
            weights = torch.stack(flat)
            axes[0].plot(self.lams, (weights.abs() if weights.is_complex() else weights).double().numpy())
            axes[0].set(xlabel="lambda", ylabel="weight", xscale="log", title="weights")
        else:
            for name in self.penalized:
                zeros = [(state[name] == 0).double().mean().item() for state in self.states]
                axes[0].plot(self.lams, zeros, label=name)
            axes[0].set(xlabel="lambda", ylabel="share of exact zeros", xscale="log", title="sparsity by parameter")
            axes[0].legend(fontsize="small")
        if self.scores is not None:
            mean = self._mean()
            finite = mean.masked_fill(mean.isinf(), math.nan)  # NaN leaves a gap in the line
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
            raise ValueError("there is no best lambda without folds and a score")
        mean: Tensor = self.scores.mean(dim=1)
        return mean

    def _ranked(self) -> list[tuple[float, float]]:
        """Pairs of mean score and lambda, without means of NaN."""
        ranked = [(x, lam) for x, lam in zip(self._mean().tolist(), self.lams, strict=True) if not math.isnan(x)]
        if not ranked:
            raise ValueError("there is no best lambda, because each has a score of NaN; look at `scores`")
        return ranked

    def _standard_errors(self) -> Tensor:
        scores = self.scores if self.scores is not None else torch.zeros(0, 1)
        folds = scores.shape[1]
        if folds < 2:
            return torch.zeros(len(scores), dtype=torch.float64)
        errors: Tensor = scores.std(dim=1, correction=1) / folds**0.5
        return errors
