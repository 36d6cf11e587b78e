"""Groupings: they define which elements of a tensor form a group, and the magnitude of a group.

A magnitude is the modulus of an element, the root mean square of a group, or a singular value. A penalty depends on a
tensor only through its magnitudes. `Grouping.polar` splits a tensor into magnitudes and directions; it also returns a
function that combines new magnitudes with the old directions.

Pass a grouping as `groups` to a penalty:

    >>> import torch
    >>> from torch_regpen import L1
    >>> from torch_regpen.groups import Blocks
    >>> L1([torch.ones(4, 4)], lam=0.5, groups=Blocks(2))().item()
    8.0
"""

from .coupled import Coupled
from .grouping import Elements, Grouping
from .layouts import Blocks, Heads, Slices, Units, WholeTensor
from .names import Groups, resolve
from .nm import NM
from .norms import NormGrouping
from .singular_values import SingularValues

__all__ = [
    "NM",
    "Blocks",
    "Coupled",
    "Elements",
    "Grouping",
    "Groups",
    "Heads",
    "NormGrouping",
    "SingularValues",
    "Slices",
    "Units",
    "WholeTensor",
    "resolve",
]
