"""The modes, and the optimizers with settings under which small problems converge."""

import io
import pickle
import warnings

import pytest
import torch
from torch import optim

from torch_regpen import L1, RegularizedOptimizer

MODES = ("coupled", "decoupled", "proximal", "dual")
DIRECT = MODES[:3]  # those that keep no state of their own

modes = pytest.mark.parametrize("mode", MODES)
direct_modes = pytest.mark.parametrize("mode", DIRECT)


# On all parameters of a model


def sgd(model, lr=0.1, **options):
    return optim.SGD(model.parameters(), lr=lr, **options)


def momentum(model, lr=0.05, **options):
    return optim.SGD(model.parameters(), lr=lr, momentum=0.9, **options)


def adam(model, lr=0.01, **options):
    return optim.Adam(model.parameters(), lr=lr, **options)


def adamw(model, lr=0.01, **options):
    return optim.AdamW(model.parameters(), lr=lr, weight_decay=0, **options)


optimizers = pytest.mark.parametrize("make", [sgd, momentum, adam])


# Wrapped, with L1


def wrapped_sgd(model, mode="coupled", lr=0.1, lam=0.05, **options):
    return RegularizedOptimizer(sgd(model, lr, **options), L1(model, lam), mode)


def wrapped_adam(model, mode="coupled", lr=0.01, lam=0.05, **options):
    return RegularizedOptimizer(adam(model, lr, **options), L1(model, lam), mode)


# By name, on any parameters


def setting(make, lr, **settings):
    """How to make an optimizer: of parameters, at a multiple of its learning rate, with further options."""
    return lambda params, factor=1.0, **options: make(params, lr=lr * factor, **settings | options)


OPTIMIZERS = {
    "SGD": setting(optim.SGD, 0.2),
    "SGD momentum": setting(optim.SGD, 0.05, momentum=0.9),
    "SGD dampening": setting(optim.SGD, 0.1, momentum=0.8, dampening=0.5),
    "SGD nesterov": setting(optim.SGD, 0.02, momentum=0.9, nesterov=True),
    "SGD foreach": setting(optim.SGD, 0.05, momentum=0.9, foreach=True),
    "SGD fused": setting(optim.SGD, 0.05, momentum=0.9, fused=True),
    "Adam": setting(optim.Adam, 0.01),
    "Adam amsgrad": setting(optim.Adam, 0.01, amsgrad=True),
    "Adam foreach": setting(optim.Adam, 0.01, foreach=True),
    "Adam fused": setting(optim.Adam, 0.01, fused=True),
    "AdamW": setting(optim.AdamW, 0.01, weight_decay=0),
    "NAdam": setting(optim.NAdam, 0.01),
    "RAdam": setting(optim.RAdam, 0.02),
    "Adamax": setting(optim.Adamax, 0.01),
    "Adagrad": setting(optim.Adagrad, 0.1),
    "Adagrad lr_decay": setting(optim.Adagrad, 0.1, lr_decay=1e-3),
    "Adagrad fused": setting(optim.Adagrad, 0.1, fused=True),
    "RMSprop": setting(optim.RMSprop, 0.003),
    "RMSprop momentum": setting(optim.RMSprop, 0.0005, momentum=0.9),
    "RMSprop centered": setting(optim.RMSprop, 0.003, centered=True),
    "Adadelta": setting(optim.Adadelta, 1.0),
    "Adafactor": setting(optim.Adafactor, 0.03),
    "ASGD": setting(optim.ASGD, 0.2, lambd=0),
}
WITHOUT_STEP = {  # for which the library knows no step for a unit gradient
    "Rprop": setting(optim.Rprop, 0.01),
    "LBFGS": setting(optim.LBFGS, 0.5, max_iter=4),
}
SPARSE = {"SparseAdam": setting(optim.SparseAdam, 0.01)}


# For a quadratic loss of a given curvature, at constant learning rates

SGD_FOR_CURVATURE = {
    "sgd": lambda p, curvature: optim.SGD(p, lr=1 / curvature),
    "momentum": lambda p, curvature: optim.SGD(p, lr=0.5 / curvature, momentum=0.9),
    "dampening": lambda p, curvature: optim.SGD(p, lr=1 / curvature, momentum=0.9, dampening=0.5),
    "nesterov": lambda p, curvature: optim.SGD(p, lr=0.5 / curvature, momentum=0.9, nesterov=True),
    "maximize": lambda p, curvature: optim.SGD(p, lr=0.5 / curvature, momentum=0.9, maximize=True),
}
ADAM_FOR_CURVATURE = {
    "adam": lambda p, _: optim.Adam(p, lr=0.03),
    "adamw": lambda p, _: optim.AdamW(p, lr=0.03, weight_decay=0),
    "amsgrad": lambda p, _: optim.Adam(p, lr=0.03, amsgrad=True),
    "large eps": lambda p, _: optim.Adam(p, lr=0.03, betas=(0.8, 0.99), eps=0.1),
}


# Optimizers that the library has never heard of


class Homemade(optim.Optimizer):
    """Gradient descent."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


# Copies


def through_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


def through_a_file(state):
    """The state after a way through a file that holds no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def wrapped_quietly(model, make, mode="proximal", lam=0.05):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weight_decay, and of optimizers without a step
        return RegularizedOptimizer(make(model.parameters()), L1(model, lam), mode)
