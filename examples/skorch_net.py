"""skorch: a function that makes the wrapper is the net's `optimizer`, and lambda is one more parameter to search.

The net and the search are those of any skorch project.

    python examples/skorch_net.py
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from torch import nn

from torch_regpen import L1, RegularizedOptimizer


def proximal_adam(param_groups: list[dict[str, Any]], lam: float, **kw: Any) -> RegularizedOptimizer:
    """Adam with L1 on every matrix, made as skorch makes an optimizer: from its parameter groups."""
    weights = [p for group in param_groups for p in group["params"] if p.ndim >= 2]
    return RegularizedOptimizer(torch.optim.Adam(param_groups, **kw), L1(weights, lam), mode="proximal")


def main(argv: Sequence[str] | None = None) -> None:
    """Chooses lambda by cross-validation, on scikit-learn's handwritten digits."""
    parser = argparse.ArgumentParser(description="torch_regpen in skorch.")
    parser.add_argument("--epochs", type=int, default=15)
    epochs = parser.parse_args(argv).epochs

    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    net = NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)),
        criterion=nn.CrossEntropyLoss,
        optimizer=proximal_adam,
        optimizer__lam=1e-3,
        lr=2e-3,
        max_epochs=epochs,
        train_split=None,
        verbose=0,
    )
    search = GridSearchCV(net, {"optimizer__lam": [1e-4, 1e-3, 1e-2]}, cv=3)
    search.fit(x, y)
    results = search.cv_results_
    for lam, score in zip(results["param_optimizer__lam"], results["mean_test_score"], strict=True):
        print(f"lambda {lam:g}: accuracy {score:.3f} in cross-validation")
    weights = [p for p in search.best_estimator_.module_.parameters() if p.ndim >= 2]
    zeros = sum(int((p == 0).sum()) for p in weights)
    print(f"the best net: {zeros:,} of {sum(p.numel() for p in weights):,} weights are exactly zero")


if __name__ == "__main__":
    main()
