"""A small network, its data and its loop, for tests that compare two ways of training."""

import torch
from torch import nn

from torch_regpen import RegularizedOptimizer

STEPS = 5


def network(device="cpu", dtype=torch.float32):
    """A network that is the same at each call; its parameters are 0.weight, 0.bias, 2.weight and 2.bias."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(device, dtype)


def data(like):
    """Inputs and targets, the same at each call, on the device and of the dtype of a parameter."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 5, generator=generator).to(like), torch.randn(16, 3, generator=generator).to(like)


def backward(model, seed=0):
    """The gradients of the loss on data that differ by seed, for a network with 5 inputs and 3 outputs; the loss."""
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    x, y = torch.randn(16, 5, generator=generator).to(like), torch.randn(16, 3, generator=generator).to(like)
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def closure_on(model, optimizer, extra=lambda: 0.0, sign=1.0):
    """What computes `sign * (loss + extra())` and its gradients, and returns it."""
    x, y = data(next(model.parameters()))

    def closure():
        optimizer.zero_grad()
        loss = sign * ((model(x) - y).square().mean() + extra())
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps=STEPS, **kw):
    """Some steps of `optimizer` on the data; see `closure_on` for the rest. Returns the losses."""
    closure = closure_on(model, optimizer, **kw)
    losses = []
    for _ in range(steps):
        losses.append(closure().item())
        optimizer.step()
    return losses


def assert_same(model, expected, tolerance=0.0):
    """The two models agree to the last bit, or to a `tolerance`, relative and absolute."""
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def set_gradients(model, seed, scale=1.0):
    """Made-up gradients, the same for the same seed: what a penalty does to the weights cannot change them."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator).to(p)


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
