"""Fold the constant outputs of dead units into the biases of the layers that read them.

A unit whose weights are all zero has a constant output, which depends only on its biases and norms. The layers that
read the unit do not need it once this constant, times their weights, is added to their biases.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..penalties.coupling import UnitSet
from ..penalties.coupling_layers import Slices
from ..penalties.units import transformers_conv1d

__all__ = ["Folding", "Map"]

Units = Mapping[UnitSet, list[int]]
Map = Callable[[Tensor], Tensor]


class Folding:
    """Finds the constants that the layers of a model read, and folds them into biases.

    Args:
        names: the qualified name of each module of the model.
        run: runs the model on the example inputs. Its first argument replaces parameters, by name; its second is a
            function to apply to the floating-point inputs, or None.
    """

    def __init__(self, names: Mapping[nn.Module, str], run: Callable[[dict[str, Tensor], Map | None], object]) -> None:
        self.names = names
        self.run = run
        self._ranges: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # the lowest and highest input of each channel

    def dead(self, sets: Sequence[UnitSet], zero: Units) -> dict[UnitSet, dict[int, str]]:
        """The units whose weights are all zero, and why their constants cannot be folded; "" if they can.

        Weights that read a dead unit do not count if that unit can be removed.

        Args:
            sets: the sets of units.
            zero: the units of each set that are entirely zero. They are left out of the result.
        """
        candidates = _dead_units(sets, lambda *_: "")
        if all(candidates[units].keys() == set(zero[units]) for units in sets):
            return {units: {} for units in sets}
        self._observe(candidates)
        found = _dead_units(sets, lambda units, unit: "" if unit in zero[units] else self._obstacle(units, unit))
        return {units: {unit: why for unit, why in found[units].items() if unit not in zero[units]} for units in sets}

    def fold_(self, units: UnitSet, each: list[int]) -> list[nn.Module]:
        """Add the constants of some units to the biases of their readers, and return those that had no bias before."""
        created = []
        for part in units.readers:
            if part.module not in self._ranges or isinstance(part.module, _ConvTransposeNd):
                continue
            constants = self._constants(part, each)
            module: Any = part.module
            if constants is None or not bool(constants.any()):
                continue
            index = part.index[each].flatten().to(module.weight.device)
            weight = module.weight.detach().index_select(part.dim, index).movedim(part.dim, 0).double()
            shift = torch.einsum("k,ko->o", constants, weight.reshape(*weight.shape[:2], -1).sum(-1))
            bias = module.bias
            if bias is None:
                created.append(module)
                bias = module.weight.new_zeros(len(shift)).requires_grad_(module.weight.requires_grad)
            module._parameters["bias"] = nn.Parameter((bias.detach() + shift).to(bias.dtype), bias.requires_grad)
        return created

    def _observe(self, candidates: Mapping[UnitSet, Mapping[int, str]]) -> None:
        """Record the inputs of layers, for the example inputs, and then with other inputs and other weights.

        The constant of a dead unit depends on no input, and on no weights except its own, which are kept.
        """
        kept: dict[tuple[nn.Module, str], list[tuple[int, Tensor]]] = defaultdict(list)
        for units, dead in candidates.items():
            for part in units.members:
                kept[part.module, part.key].append((part.dim, part.index[list(dead)].flatten()))
        random = torch.Generator().manual_seed(0)
        others: dict[Tensor, Tensor] = {}  # a shared parameter stays shared
        state = {}
        for module, name in self.names.items():
            for key, p in module._parameters.items():
                if p is None or p.ndim < 2 or not p.is_floating_point() or ".parametrizations." in f".{name}.":
                    continue
                factors = torch.rand(p.shape, generator=random).to(p)
                for dim, index in kept[module, key]:
                    factors.index_fill_(dim, index.to(p.device), 1)
                state[f"{name}.{key}".lstrip(".")] = others.setdefault(p, p.detach() * factors)
        hooks = [module.register_forward_pre_hook(self._record) for module in self.names if _has_bias(module)]
        try:
            self.run({}, None)
            self.run(state, lambda x: x * torch.rand(x.shape, generator=random).to(x))
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            return
        channels = args[0].detach().movedim(_channel_dim(module), 0).flatten(1).double()
        low, high = channels.amin(1), channels.amax(1)
        if module in self._ranges:
            low, high = torch.minimum(low, self._ranges[module][0]), torch.maximum(high, self._ranges[module][1])
        self._ranges[module] = low, high

    def _constants(self, part: Slices, each: list[int]) -> Tensor | None:
        """The values that a layer reads from some units, if they are constant; else None."""
        low, high = (bound[part.index[each].flatten().to(bound.device)] for bound in self._ranges[part.module])
        rounding = 16 * torch.finfo(getattr(part.module, part.key).dtype).eps
        same = bool((high - low <= rounding * torch.maximum(low.abs(), high.abs())).all())
        return (low + high) / 2 if same else None

    def _obstacle(self, units: UnitSet, unit: int) -> str:
        """Why the constant of a unit cannot be folded, or an empty string."""
        for part in units.readers:
            module: Any = part.module
            if isinstance(module, nn.PReLU):
                continue  # it passes the constant on
            name = f"{self.names[module]!r} ({type(module).__name__})"
            if module not in self._ranges:
                return f"no bias of {name} can take up the constant"
            constants = self._constants(part, [unit])
            if constants is None:
                return "their output is not constant"
            if bool(constants.any()) and _pads_with_zeros(module):
                return f"{name} pads with zeros"
        return ""


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd, *transformers_conv1d()))


def _channel_dim(module: nn.Module) -> int:
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1


def _pads_with_zeros(module: nn.Module) -> bool:
    """Whether a layer reads zeros besides the constant, so that its output differs at the borders."""
    if isinstance(module, _ConvTransposeNd):
        return True
    if not isinstance(module, _ConvNd) or module.padding_mode != "zeros" or module.padding == "valid":
        return False
    return max(module.kernel_size) > 1 if module.padding == "same" else any(module.padding)


def zero_units(slices: Sequence[Slices]) -> list[int]:
    """The units whose slices are all zero."""
    zero = torch.ones(len(slices[0].index), dtype=torch.bool)
    for part in slices:
        parameter: Tensor = getattr(part.module, part.key).detach()
        alive = (parameter != 0).movedim(part.dim, 0).reshape(parameter.shape[part.dim], -1).any(1).cpu()
        zero &= ~alive[part.index].any(1)
    return zero.nonzero().flatten().tolist()


def _dead_units(sets: Sequence[UnitSet], obstacle: Callable[[UnitSet, int], str]) -> dict[UnitSet, dict[int, str]]:
    """The units without weights, with the result of `obstacle` for each.

    Weights do not count if they are zero, or if they read a dead unit without an obstacle.
    """
    nonzero = {
        (part.module, part.key): getattr(part.module, part.key).detach() != 0
        for units in sets
        for part in (*units.members, *units.readers)
    }
    found: dict[UnitSet, dict[int, str]] = {units: {} for units in sets}
    more = True
    while more:
        more = False
        for units, known in found.items():
            new = {unit: obstacle(units, unit) for unit in _without_weights(units, nonzero) if unit not in known}
            known.update(new)
            ignored = [unit for unit, reason in new.items() if not reason]
            more |= bool(ignored)
            for part in units.readers:
                mask = nonzero[part.module, part.key]
                mask.index_fill_(part.dim, part.index[ignored].flatten().to(mask.device), False)
    return found


def _without_weights(units: UnitSet, nonzero: Mapping[tuple[nn.Module, str], Tensor]) -> list[int]:
    alive = torch.zeros(units.count, dtype=torch.bool)
    for part in units.members:
        mask = nonzero[part.module, part.key]
        if mask.ndim > 1:
            rows = mask.movedim(part.dim, 0).reshape(mask.shape[part.dim], -1).any(1).cpu()
            alive |= rows[part.index].any(1)
    return (~alive).nonzero().flatten().tolist()
