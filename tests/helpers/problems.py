"""Problems whose solutions scikit-learn and other exact solvers know.

Losses are means over the samples: `SSE/(2n)` for regression, the mean logistic loss for classification. X and y are
standardized. Gradients are computed from the sums that they need, which is a thousand times faster than a network.
"""

import inspect

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression
from torch import nn

from torch_regpen import RegularizedOptimizer

LAMBDA_MAX = 0.5864501344746885  # of the diabetes Lasso
OBJECTIVES = {2: 0.444451435686, 10: 0.304755537557, 100: 0.249939397662}  # at LAMBDA_MAX / key


def standardized(x):
    return (x - x.mean(axis=0)) / x.std(axis=0)


class LeastSquares:
    """`SSE/(2n)` of the weights of a linear layer, outputs by inputs, for targets Y, samples by outputs."""

    def __init__(self, x, y, device="cpu"):
        self.x, self.y = x, y.reshape(len(y), -1)
        self.hessian = torch.tensor(x.T @ x / len(x), device=device)
        self.slope = torch.tensor(self.y.T @ x / len(x), device=device)
        self.curvature = torch.linalg.eigvalsh(self.hessian)[-1].item()
        self.model = nn.Linear(x.shape[1], self.y.shape[1], bias=False, dtype=torch.float64, device=device)
        with torch.no_grad():
            self.model.weight.copy_(torch.linspace(-0.5, 0.5, self.model.weight.numel()).view(self.model.weight.shape))

    @property
    def weight(self):
        return self.model.weight.detach().cpu().numpy()

    def loss(self, weight=None):
        weight = self.weight if weight is None else weight
        return np.square(self.y - self.x @ weight.T).sum() / (2 * len(self.x))

    def gradient(self):
        return self.model.weight.detach() @ self.hessian - self.slope

    def train(self, optimizer, steps):
        weight = self.model.weight
        for _ in range(steps):
            weight.grad = self.gradient()
            optimizer.step()
        weight.grad = self.gradient()
        return self


def regression(seed=0, n=60, p=8):
    """Made-up data of a sparse linear model."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p))
    y = X @ np.array([2.0, -1.5, 1.0, 0, 0, 0.5, 0, -0.3][:p]) + 0.3 * rng.standard_normal(n)
    return X, y


def diabetes_data():
    x, y = load_diabetes(return_X_y=True)
    return standardized(x), standardized(y)


def diabetes(device="cpu"):
    return LeastSquares(*diabetes_data(), device)


def l1_objective(problem, lam, weight=None):
    weight = problem.weight if weight is None else weight
    return problem.loss(weight) + lam * np.abs(weight).sum()


def breast_cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return standardized(x), y


def l1_logistic(x, y, c, **options):
    # the spelling of "L1" has changed over the versions of scikit-learn
    old = inspect.signature(LogisticRegression).parameters["penalty"].default == "l2"
    l1 = {"penalty": "l1"} if old else {"l1_ratio": 1.0}
    return LogisticRegression(C=c, max_iter=10**5, random_state=0, **l1, **options).fit(x, y)


def proximal_gradient(make, X, Y, steps=500, start=None):
    """What proximal gradient descent makes of `||Y - X w||^2 / (2n) + make([("w", w)])`, and the penalty at it."""
    A, B = torch.from_numpy(X), torch.from_numpy(Y)
    w = torch.zeros((A.shape[1], *B.shape[1:]), dtype=A.dtype) if start is None else torch.from_numpy(start).clone()
    w.requires_grad_()
    penalty = make([("w", w)])
    lr = len(A) / torch.linalg.matrix_norm(A, 2).item() ** 2
    optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=lr), penalty, "proximal")
    for _ in range(steps):
        w.grad = A.T @ (A @ w.detach() - B) / len(A)
        optimizer.step()
    w.grad = A.T @ (A @ w.detach() - B) / len(A)
    return w.detach(), penalty


X, y = diabetes_data()
x_all, y_all = torch.tensor(X), torch.tensor(y)


def linear(outputs=1):
    torch.manual_seed(0)
    return nn.Linear(10, outputs, bias=False, dtype=torch.float64)


def sse(model, targets=y_all[:, None]):
    return (model(x_all) - targets).square().sum() / (2 * len(x_all))
