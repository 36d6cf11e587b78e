"""Layers and their units: which elements belong to each, and what shows that one has ceased."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_regpen.groups import Heads


class Units(NamedTuple):
    """A layer and its units, written out.

    Attributes:
        make: makes the layer.
        groups: how the penalty groups its weights.
        members: for each parameter, the elements of each unit, as masks.
        signal: what depends on a unit: not zero while it lives, zero once it is dead.
        select: which parameters are penalized.
    """

    make: Callable[[], nn.Module]
    groups: str | Heads
    members: Callable[[nn.Module], dict[str, list[Tensor]]]
    signal: Callable[[nn.Module, int], Tensor]
    select: str | None = None


def each(names: Iterable[str], unit: int) -> dict[str, list[int]]:
    """One unit in each of some parameters."""
    return {name: [unit] for name in names}


def mask_of(w: Tensor, *indices) -> Tensor:
    """A mask over the elements of `w` at each of the given indices."""
    mask = torch.zeros(w.shape, dtype=torch.bool)
    for index in indices:
        mask[index] = True
    return mask


def sum_of_norms(layer: nn.Module, members: dict[str, list[Tensor]]) -> Tensor:
    """The group lasso written out: `sum sqrt(n) * norm` over units of `n` elements."""
    return sum(
        math.sqrt(int(unit.sum())) * layer.get_parameter(parameter)[unit].norm()
        for parameter, units in members.items()
        for unit in units
    ).detach()


@torch.no_grad()
def reaction(f: Callable[[Tensor], Tensor], x: Tensor, index) -> Tensor:
    """How far the output of `f` moves when its input moves at an index."""
    moved = x.clone()
    moved[index] += 1
    return (f(moved) - f(x)).abs().max()


@torch.no_grad()
def reaction_to_weight(f: Callable[[], Tensor], w: Tensor, index) -> Tensor:
    """How far the output of `f` moves when some weights move; they are put back."""
    before, kept = f(), w.clone()
    w[index] += 1
    after = f()
    w.copy_(kept)
    return (after - before).abs().max()


def image(channels: int, ndim: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, channels, *([5] * ndim), generator=generator, dtype=torch.float64)


def sequence(features: int, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, length, features, generator=generator, dtype=torch.float64)


def read_by(conv: nn.Module, channel: int) -> Tensor:
    """The weights of a convolution that read an input channel: those of the filters of its group."""
    filters, channels = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    group = channel // channels
    return mask_of(conv.weight, *((group * filters + i, channel % channels) for i in range(filters)))


def written_by(conv: nn.Module, channel: int) -> Tensor:
    """The weights of a transposed convolution that write an output channel: those of the inputs of its group."""
    filters, channels = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    group = channel // filters
    return mask_of(conv.weight, *((group * channels + i, channel % filters) for i in range(channels)))


def inputs_of(conv: nn.Module) -> dict[str, list[Tensor]]:
    return {"weight": [read_by(conv, c) for c in range(conv.in_channels)]}


def outputs_of(conv: nn.Module) -> dict[str, list[Tensor]]:
    return {"weight": [mask_of(conv.weight, c) for c in range(conv.out_channels)]}


def reads(conv: nn.Module, channel: int) -> Tensor:
    return reaction(conv, image(conv.in_channels, len(conv.kernel_size)), (slice(None), channel))


def writes(conv: nn.Module, channel: int) -> Tensor:
    return conv(image(conv.in_channels, len(conv.kernel_size)))[:, channel].abs().max()


def gates(w: Tensor, hidden: int) -> list[Tensor]:
    """The units of a recurrent matrix: row h of each gate."""
    return [mask_of(w, *range(h, len(w), hidden)) for h in range(hidden)]


def rows(w: Tensor) -> list[Tensor]:
    return [mask_of(w, i) for i in range(len(w))]


def columns(w: Tensor) -> list[Tensor]:
    return [mask_of(w, (slice(None), i)) for i in range(w.shape[1])]


def of_recurrent(layer: nn.Module) -> dict[str, list[Tensor]]:
    """Its rows of all gates for each hidden unit; of the projection of an LSTM, its rows."""
    return {
        name: rows(w) if "weight_hr" in name else gates(w, layer.hidden_size)
        for name, w in layer.named_parameters()
        if "weight" in name
    }


def hidden_state(layer: nn.Module, unit: int) -> Tensor:
    if isinstance(layer, nn.RNNCellBase):
        state = layer(sequence(layer.input_size)[:, 0])
        return (state[0] if isinstance(state, tuple) else state)[:, unit].abs().max()
    return layer(sequence(layer.input_size))[0][..., unit].abs().max()


def feature(layer: nn.Module, unit: int) -> Tensor:
    return reaction(lambda x: layer(x)[0], sequence(layer.input_size), (..., unit))


CASES = {
    "conv1d grouped, input": Units(lambda: nn.Conv1d(6, 4, 3, groups=2), "input", inputs_of, reads),
    "conv2d grouped, input": Units(lambda: nn.Conv2d(6, 8, 3, groups=2), "input", inputs_of, reads),
    "conv2d depthwise, input": Units(lambda: nn.Conv2d(8, 8, 3, groups=8), "input", inputs_of, reads),
    "conv2d depthwise twice, input": Units(lambda: nn.Conv2d(4, 8, 3, groups=4), "input", inputs_of, reads),
    "conv1d depthwise 1, input": Units(lambda: nn.Conv1d(4, 4, 1, groups=4), "input", inputs_of, reads),
    "conv2d plain, input": Units(lambda: nn.Conv2d(3, 4, 3), "input", inputs_of, reads),
    "conv2d grouped, output": Units(
        lambda: nn.Conv2d(6, 8, 3, groups=2, bias=False), "output", outputs_of, writes
    ),
    "conv2d depthwise, output": Units(
        lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), "output", outputs_of, writes
    ),
    "transposed1d grouped, output": Units(
        lambda: nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False), "output",
        lambda conv: {"weight": [written_by(conv, c) for c in range(4)]}, writes,
    ),
    "transposed2d grouped, output": Units(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), "output",
        lambda conv: {"weight": [written_by(conv, c) for c in range(6)]}, writes,
    ),
    "transposed2d depthwise, output": Units(
        lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), "output",
        lambda conv: {"weight": [written_by(conv, c) for c in range(4)]}, writes,
    ),
    "transposed2d grouped, input": Units(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "input", lambda conv: {"weight": rows(conv.weight)}, reads
    ),
    "lstm, output": Units(lambda: nn.LSTM(5, 6, bias=False, batch_first=True), "output", of_recurrent, hidden_state),
    "gru, output": Units(lambda: nn.GRU(5, 6, bias=False, batch_first=True), "output", of_recurrent, hidden_state),
    "rnn, output": Units(lambda: nn.RNN(5, 6, bias=False, batch_first=True), "output", of_recurrent, hidden_state),
    "lstm cell, output": Units(lambda: nn.LSTMCell(5, 6, bias=False), "output", of_recurrent, hidden_state),
    "gru cell, output": Units(lambda: nn.GRUCell(5, 6, bias=False), "output", of_recurrent, hidden_state),
    "lstm, input": Units(
        lambda: nn.LSTM(5, 6, batch_first=True), "input",
        lambda layer: {"weight_ih_l0": columns(layer.weight_ih_l0)}, feature, "weight_ih*",
    ),
    "lstm projected, output": Units(
        lambda: nn.LSTM(5, 6, bias=False, batch_first=True, proj_size=3), "output",
        lambda layer: {"weight_hr_l0": rows(layer.weight_hr_l0)}, hidden_state, "weight_hr*",
    ),
}  # fmt: skip
