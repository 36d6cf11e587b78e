"""Groups that span several tensors: all that goes when a unit of a network goes."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Coupled"]


class Coupled:
    """A group for each unit of a network (channel, neuron, attention head, LSTM unit) over all tensors that write it.

    A unit is what leaves the network together: its row in each layer that writes it, its bias, and its scale and shift
    in the norms behind it. The layers of a residual stream share their units; the rows of a head in q, k and v are one
    unit. A weight belongs to the unit that it writes; columns that read a unit are not penalized. Units that cannot
    leave, as those of the model's output, are not penalized: `left` names their layers. The dependencies are found by
    Torch-Pruning (Fang, Ma, Song, Mi and Wang 2023), and again where layers have changed their shape.

    Give it as `groups` to a penalty on the same model. `select` and `exclude` then choose among the weights: units are
    penalized where all their weights are chosen. It takes no `center` and no `weights`.

    Args:
        model: the model, or the part of it, whose units are meant.
        example_inputs: what the model is called with, once: a tensor, a tuple, or a dict of keyword arguments.
        scale: False takes the norm of a group in place of its root mean square and counts each group once.

    Attributes:
        left: the layers whose units cannot leave, by name, and why.

    Raises:
        ImportError: Torch-Pruning is missing.
        TypeError: `model` is no module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_regpen import GroupLasso
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> penalty = GroupLasso(model, 0.1, groups=Coupled(model, torch.ones(1, 4)))
        >>> [len(w) for _, w in penalty.named_parameters_penalized()]  # 8 neurons: weights and biases
        [8, 8]
    """

    def __init__(self, model: nn.Module, example_inputs: Any, *, scale: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Coupled takes the model and its example inputs, not a {type(model).__name__}")
        self.model = model
        self.example_inputs = example_inputs
        self.scale = scale
        self.left: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Coupled({type(self.model).__name__})"
