"""Groups that span several tensors: everything that is removed together with a unit of a network."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Coupled"]


class Coupled:
    """One group for each unit of a network (channel, neuron, attention head, LSTM unit), over all its tensors.

    A unit is what pruning removes together: a row in each layer that writes the unit, its bias, and its scale and shift
    in the following norm layers. All layers that write to a residual stream share its units; the rows of one head in q,
    k and v are one unit. Each weight belongs to the unit that it writes; the columns that read a unit are not
    penalized. Units that cannot be removed, such as the model's outputs, are not penalized; see `left`. Torch-Pruning
    finds the dependencies (DepGraph: Fang, Ma, Song, Mi and Wang 2023), again whenever a layer changes its shape.

    Pass it as `groups` to a penalty on the same model. A unit is penalized if `select` and `exclude` choose all its
    weights. Such a penalty accepts neither `center` nor `weights`.

    Args:
        model: the model, or the submodule whose units to penalize.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments to call the model with.
        scale: if False, the magnitude of a group is its norm, and each group counts once (see `NormGrouping`).

    Attributes:
        left: a dict from the name of each layer whose units cannot be removed to the reason.

    Raises:
        ImportError: Torch-Pruning is not installed (raised when the penalty is built).
        TypeError: `model` is not a module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_regpen import GroupLasso
        >>> from torch_regpen.groups import Coupled
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> penalty = GroupLasso(model, 0.1, groups=Coupled(model, torch.ones(1, 4)))
        >>> [len(w) for _, w in penalty.named_parameters_penalized()]  # 8 neurons: their weights and biases
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
