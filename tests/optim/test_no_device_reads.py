"""No step reads a value back from the device that the bare optimizer does not read."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers.kinds import FORMULAS
from helpers.nets import network, set_gradients
from helpers.operations import Reads
from helpers.optimizers import adam, adamw, direct_modes, momentum, sgd
from torch import optim

from torch_regpen import L1, GroupLasso, RegularizedOptimizer
from torch_regpen.groups import NormGrouping
from torch_regpen.optim import step_size

# Each penalty beside its formula, as a user would write it in the loss.
kinds = pytest.mark.parametrize("kind", FORMULAS)


# Nothing is read back from the device


def with_lr_tensor(make):
    return lambda model: make(model, lr=torch.tensor(0.05, device=model[0].weight.device), foreach=False)


READ_FREE = {
    "sgd": sgd,
    "momentum": momentum,
    "adam": adam,
    "amsgrad": lambda model: adam(model, amsgrad=True),
    "adamw": adamw,
    "sgd-lr-tensor": with_lr_tensor(sgd),
    "momentum-lr-tensor": with_lr_tensor(momentum),
    "adam-lr-tensor": with_lr_tensor(adam),
}


@direct_modes
@kinds
@pytest.mark.parametrize("optimizer", READ_FREE)
def test_no_value_is_read_back_that_the_bare_optimizer_does_not_read(device, mode, kind, optimizer, monkeypatch):
    monkeypatch.setattr(NormGrouping, "all_known", lambda *_: False)  # these two read on a CPU, and nowhere else
    monkeypatch.setattr(step_size, "_all_equal", lambda *_: False)
    bare, ours = network(device), network(device)
    plain, wrapped = READ_FREE[optimizer](bare), READ_FREE[optimizer](ours)
    wrapped = RegularizedOptimizer(wrapped, FORMULAS[kind][0](ours), mode)
    for i in range(2):  # the second step is not the one that makes the state
        set_gradients(bare, i)
        set_gradients(ours, i)
        with Reads() as expected:
            plain.step()
        with Reads() as reads:
            wrapped.step()
        assert reads.found == expected.found


@direct_modes
@kinds
@pytest.mark.parametrize("make", [sgd, momentum, adam, adamw])
def test_a_step_works_on_the_meta_device_where_no_value_can_be_read(mode, kind, make):
    model = network("meta")
    optimizer = RegularizedOptimizer(make(model), FORMULAS[kind][0](model), mode)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()


@direct_modes
def test_a_step_does_not_wait_for_the_device(device, mode):
    if torch.device(device).type != "cuda":
        pytest.skip("there is nothing to wait for")
    for penalty, _ in FORMULAS.values():
        for make in (sgd, momentum, adam):
            model = network(device)
            optimizer = RegularizedOptimizer(make(model), penalty(model), mode)
            set_gradients(model, 0)
            optimizer.step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


# In every metric and state, with zeros that are frozen and closures

STEPPED = [optim.SGD, optim.Adam]
GROUPED = [*STEPPED, optim.Adagrad]  # groups take the steps of the other metrics as they take those of Adam
METRICS = [*STEPPED, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.RMSprop, optim.Adadelta]
CASES = [
    *((mode, make) for mode in ("coupled", "decoupled") for make in STEPPED),
    *((mode, make) for mode in ("proximal", "dual") for make in METRICS),
]


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("mode", "make"), CASES)
def test_neither_a_step_nor_a_closure_nor_frozen_zeros_wait_for_the_device(device, mode, make):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    model = network(device)
    kw = {"momentum": 0.9} if make is optim.SGD else {}
    penalty = L1(model, 0.05)
    if make in GROUPED:
        penalty = penalty + GroupLasso(model, 0.05)
    optimizer = RegularizedOptimizer(make(model.parameters(), lr=0.01, **kw), penalty, mode)

    def closure():
        for p in model.parameters():
            p.grad = torch.empty_like(p) if device == "meta" else torch.randn_like(p)
        return torch.zeros((), device=device)

    optimizer.step(closure)  # makes the state
    for freeze in (False, True):
        if freeze:
            optimizer.freeze_zeros()
            optimizer.step(closure)  # finds the zeros
        with no_waiting() if device == "cuda" else nullcontext():
            optimizer.step(closure)
            optimizer.step()
