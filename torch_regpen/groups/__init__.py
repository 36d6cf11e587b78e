"""What a magnitude is: an element's modulus, a group's root mean square, a singular value.

A penalty sees a tensor only through its magnitudes. A grouping maps a tensor to magnitudes and directions
(`Grouping.polar`) and can put new magnitudes along the old directions. Nothing else in the package knows how a group
lies in its tensor.
"""

from .coupled import Coupled
from .grouping import Elements, Grouping
from .layouts import Blocks, Heads, Slices, Units, WholeTensor
from .names import Groups, resolve
from .norms import NormGrouping
from .singular_values import SingularValues

__all__ = [
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
