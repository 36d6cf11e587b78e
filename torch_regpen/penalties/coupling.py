"""stub"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterSlices:
    module: nn.Module
    key: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class UnitSet:
    name: str
    members: tuple[ParameterSlices, ...]
    readers: tuple[ParameterSlices, ...]


def coupled_units(model: nn.Module, example_inputs: Any) -> tuple[list[UnitSet], dict[str, str]]:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.BatchNorm2d))]
    sets: list[UnitSet] = []
    current = None
    for name, m in layers:
        n = m.weight.shape[0]
        idx = torch.arange(n)[:, None]
        mem = [ParameterSlices(m, "weight", 0, idx)] + (
            [ParameterSlices(m, "bias", 0, idx)] if m.bias is not None else []
        )
        if isinstance(m, nn.BatchNorm2d):
            sets[-1] = UnitSet(sets[-1].name, sets[-1].members + tuple(mem), ())
        else:
            sets.append(UnitSet(name, tuple(mem), ()))
    last = sets.pop()
    return sets, {last.name: "its units are the model's output"}
