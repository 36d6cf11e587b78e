"""Which lambda, for a network: its regularization path, cross-validated, and the same choice by Optuna.

An MLP on 300 of scikit-learn's digits, L1 in the proximal mode under Adam. There is no largest lambda to compute for a
network, whose gradient is zero where its weights are; so lambda is doubled until all weights vanish. Below it lies a
grid, through which the path goes from dense to sparse (`order="up"`), each network starting from the last one's
weights, once on all data and once for each of 5 folds.

    python examples/choose_lambda.py
    python examples/choose_lambda.py --optuna 20      20 trials of Optuna instead (pip install optuna)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import KFold
from torch import nn

from torch_regpen import L1, Penalty, RegularizedOptimizer
from torch_regpen.path import regularization_path

PIXELS, DIGITS = load_digits(return_X_y=True)
X, Y = torch.tensor(PIXELS[:300] / 16, dtype=torch.float32), torch.tensor(DIGITS[:300])
FOLDS = KFold(5, shuffle=True, random_state=0)


def network() -> nn.Module:
    """One hidden layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))


def fit(model: nn.Module, penalty: Penalty, train: Any, steps: int = 300) -> None:
    """Trains the model from where it is; `train` are the indices of the samples, None for all."""
    x, y = (X, Y) if train is None else (X[train], Y[train])
    optimizer = RegularizedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), penalty, "proximal")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def score(model: nn.Module, test: Any) -> float:
    """The accuracy on the samples with these indices."""
    return (model(X[test]).argmax(dim=1) == Y[test]).double().mean().item()


def largest_lambda(steps: int) -> float:
    """The first of 0.001, 0.002, 0.004, ... at which a network has no weight left."""
    lam = 1e-3
    while True:
        model = network()
        penalty = L1(model, lam)
        fit(model, penalty, None, steps)
        if not any(w.any() for _, w in penalty.named_parameters_penalized()):
            return lam
        lam *= 2


def by_path(lambdas: int, steps: int, file: Path) -> None:
    """Prints a line for each lambda, and what cross-validation chooses; plots."""
    top = largest_lambda(steps)
    model = network()
    path = regularization_path(
        model,
        L1(model, top),
        lambda model, penalty, train: fit(model, penalty, train, steps),
        np.geomspace(top / 300, top, lambdas).tolist(),
        folds=FOLDS.split(X),
        score=score,
        order="up",
        progress=True,
    )
    print("lambda     accuracy  nonzero weights")
    for lam, scores, nonzeros in zip(path.lams, path.scores, path.nonzeros, strict=True):
        note = "  best" if lam == path.best else "  within one standard error" if lam == path.best_1se else ""
        print(f"{lam:.2e}   {scores.mean():.4f}    {nonzeros:6d}{note}")
    file.parent.mkdir(parents=True, exist_ok=True)
    path.plot(file)
    print(f"The plot: {file}")


def by_optuna(trials: int, steps: int) -> None:
    """Hands lambda to Optuna: any search is a function of lambda that returns a score."""
    import optuna

    def objective(trial: optuna.Trial) -> float:
        lam = trial.suggest_float("lam", 1e-5, 1e-1, log=True)
        scores = []
        for fold, (train, test) in enumerate(FOLDS.split(X)):
            model = network()
            fit(model, L1(model, lam), train, steps)
            scores.append(score(model, test))
            trial.report(float(np.mean(scores)), fold)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(np.mean(scores))

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials)
    print(f"lambda {study.best_params['lam']:.2e}, accuracy {study.best_value:.4f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Chooses lambda."""
    parser = argparse.ArgumentParser(description="Which lambda, for a network.")
    parser.add_argument("--optuna", type=int, metavar="TRIALS", default=0, help="by Optuna, with that many trials")
    parser.add_argument("--lambdas", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300, help="for each fit")
    parser.add_argument("--plot", type=Path, default=Path("runs/choose_lambda.png"), help="to write")
    options = parser.parse_args(argv)
    if options.optuna:
        by_optuna(options.optuna, options.steps)
    else:
        by_path(options.lambdas, options.steps, options.plot)


if __name__ == "__main__":
    main()
