"""Steps on CUDA, with torch's fake tensors where there is no such device: no operation mixes devices."""

import warnings
from functools import partial

import pytest
import torch
from helpers.kinds import KINDS
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_regpen import RegularizedOptimizer

OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.1, momentum=0.9),
    "SGD, a tensor lr": lambda params: optim.SGD(params, lr=torch.tensor(0.1)),
    "Adam": partial(optim.Adam, lr=0.01),
    "AdamW, fused": partial(optim.AdamW, lr=0.01, fused=True),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "Adagrad": partial(optim.Adagrad, lr=0.1),
    "RMSprop": partial(optim.RMSprop, lr=0.01, centered=True),
}


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal", "dual"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_mixes_no_devices(kind, mode):
    steps = 0
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for make in OPTIMIZERS.values():
            ws = [nn.Parameter(torch.randn(4 + i, 6, device="cuda")) for i in range(3)]  # of several sizes
            try:
                optimizer = RegularizedOptimizer(make(ws), KINDS[kind](ws, 0.1), mode)
            except ValueError:
                continue  # not a step of this kind in this mode and metric
            for _ in range(2):
                for w in ws:
                    w.grad = torch.randn_like(w)
                optimizer.step()
                steps += 1
            assert all(x.device.type == "cuda" for w in ws for x in (w, optimizer.state[w].get("gap", w)))
    if not steps:
        pytest.skip("not a step of this kind in this mode")


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_mix_no_devices(kind):
    with FakeTensorMode():
        ws = [nn.Parameter(torch.randn(4 + i, 6, device="cuda")) for i in range(3)]
        for w in ws:
            w.grad = torch.randn_like(w)
        penalty = KINDS[kind](ws, 0.1)
        assert penalty().device.type == "cuda"
        try:
            penalty.add_grad_()
        except ValueError:
            assert kind == "L0"  # it has no gradient
        assert penalty.stationarity().device.type == "cuda"
