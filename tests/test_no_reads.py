"""No step reads a value back from the device, in any mode, metric or state: on the meta device there is none."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import optim
from training import network

from torch_regpen import L1, GroupLasso, RegularizedOptimizer

STEPPED = [optim.SGD, optim.Adam]
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
    penalty = L1(model, 0.05) + GroupLasso(model, 0.05)
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
