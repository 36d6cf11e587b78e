"""Small networks, their data and their loops, for tests that compare two ways of training."""

import copy
from collections import OrderedDict
from itertools import pairwise

import torch
from torch import nn
from torch.func import functional_call

from helpers.kinds import BASIC, OMEGA

STEPS = 5


def network(device="cpu", dtype=torch.float32, sizes=(5, 6, 3), activation=nn.Tanh):
    """A network that is the same at each call; its parameters are 0.weight, 0.bias, 2.weight, 2.bias and so on."""
    torch.manual_seed(0)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1]).to(device, dtype)


def holding(**tensors):
    """A module that holds raw parameters: tensors, or random ones of the shapes that are given as tuples."""
    module = nn.Module()
    for name, tensor in tensors.items():
        tensor = torch.randn(tensor) if isinstance(tensor, tuple) else torch.as_tensor(tensor)
        module.register_parameter(name, nn.Parameter(tensor))
    return module


def weights_of(model):
    return [model[0].weight, model[2].weight]


def originals(layer):
    return list(layer.parametrizations.weight.parameters(recurse=False))


def names(penalty):
    return [name for name, _ in penalty.named_parameters_penalized()]


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


def train_on_batches(model, optimizer, steps, start=0):
    """Some steps, each on data of its own."""
    for step in range(start, start + steps):
        optimizer.step(lambda step=step: backward(model, step))


def with_zeros(model):
    """The network with an element, a row and a column that are exactly zero: where the penalties have no derivative."""
    with torch.no_grad():
        model[0].weight[1, 2] = 0
        model[0].weight[3] = 0
        model[2].weight[:, 1] = 0
    return model


def explicit(model, formula):
    """The formula on the two weights of the network, as a term of the loss."""
    return lambda: formula(model[0].weight) + formula(model[2].weight)


def embedding(device, sparse=True):
    torch.manual_seed(0)
    return nn.Embedding(6, 3, sparse=sparse).to(device)


def look_up(model, optimizer, tokens=(1, 4, 1)):
    """A step on the loss of some rows: the others get no gradient, or zeros."""
    optimizer.zero_grad()
    model(torch.tensor(tokens, device=model.weight.device)).square().sum().backward()
    optimizer.step()


class Regularized(nn.Module):
    """A network whose output is its loss, with the penalty as a submodule, as torch.func wants it."""

    def __init__(self, kind, lam=0.3, dtype=torch.float64, device="cpu"):
        super().__init__()
        self.first = nn.Linear(3, 4, dtype=dtype, device=device)
        self.second = nn.Linear(4, 2, dtype=dtype, device=device)
        self.penalty = BASIC[kind](self, lam)
        self.kind = kind

    def plain(self, x):
        return self.second(self.first(x).tanh()).square().mean()

    def forward(self, x):
        return self.plain(x) + self.penalty()


def by_definition(module, parameters, x, frozen=()):
    """The same, with the penalty written out; the parameters are given by name."""
    names = [name for name in ("first.weight", "second.weight") if name not in frozen]
    stripped = copy.copy(module)
    stripped.forward = stripped.plain
    penalty = sum(OMEGA[module.kind](parameters[name]) for name in names)
    return functional_call(stripped, parameters, (x,)) + module.penalty.lam * penalty


def detached(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Encoder(nn.Module):
    """Its parameters are encoder.conv, encoder.norm and head, a weight and a bias each."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean((2, 3)))


class Classifier(nn.Module):
    """Its parameters are body.0 and fc, a weight and a bias each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(x))


def made_sparse(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p[p.abs() < p.abs().median()] = 0
    return model


def zero_(tensor, dim, units):
    with torch.no_grad():
        tensor.index_fill_(dim, torch.tensor(units), 0)


class Scale(nn.Module):
    """A module that the library does not know, and that holds its number of features."""

    def __init__(self, size=6):
        super().__init__()
        self.size, self.scale = size, nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.scale
