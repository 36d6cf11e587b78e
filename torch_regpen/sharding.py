"""Sharded parameters: each rank works on its own part, as a plain tensor, and what crosses ranks is put together here.

A DTensor (FSDP2, tensor parallelism, or both) is taken by the part of it that lies on this rank. Functions of single
elements need no more. Groups that go on on other ranks get their norms summed over those ranks (`AcrossShards`); a
penalty that needs a tensor as a whole gets it gathered. Nothing else in the package knows that tensors can be sharded,
nor that PyTorch can be built without torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import Elements, Grouping, NormGrouping, Slices, WholeTensor, working_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .terms import Term

try:
    from torch.distributed import ReduceOp, _composable_state  # a build without torch.distributed has no ReduceOp
    from torch.distributed.tensor import DTensor, Partial, Replicate
except ImportError:
    ReduceOp = _composable_state = Partial = Replicate = None  # type: ignore[assignment,misc]

    class DTensor(Tensor):  # type: ignore[no-redef]
        """Stands for the class that this build does not have: no tensor is one."""


__all__ = [
    "DTensor",
    "Part",
    "Partial",
    "everywhere",
    "local",
    "maximum",
    "on_parts",
    "placed_as",
    "reduced",
    "stand_ins",
    "total",
]

Along = tuple["DeviceMesh", tuple[int, ...]]  # a mesh, and those of its dimensions over which something is cut


def local(w: Tensor) -> Tensor:
    """The part of a sharded tensor that lies on this rank; any other tensor as it is."""
    return w.to_local() if isinstance(w, DTensor) else w


def everywhere(x: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def placed_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor` on the device of `parameter` and sharded as it is, along the dimensions in which they agree.

    Args:
        tensor: a DTensor, or a plain tensor that is the same on every rank.
        parameter: the tensor beside which it is to stand.
    """
    if tensor.device != parameter.device:  # under a transform of torch.func, to() wraps what it returns unchanged
        tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return everywhere(tensor)
    mesh = parameter.device_mesh
    if isinstance(tensor, DTensor) and tensor.device_mesh != mesh:
        tensor = everywhere(tensor)
    alike = tensor.ndim == parameter.ndim
    placements = [
        p if alike and not p.is_replicate() and tensor.shape[p.dim] == parameter.shape[p.dim] else Replicate()  # type: ignore[attr-defined]
        for p in parameter.placements
    ]
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return tensor.redistribute(placements=placements)


def stand_ins() -> dict[int, Tensor]:
    """The sharded parameters for which FSDP2 has put others into their modules for now, by the id of those others.

    Between a forward and its backward it leaves gathered copies there, in the low precision of its policy if it has
    one; after a forward without a backward they stay. The optimizer owns the sharded parameters.
    """
    found: dict[int, Tensor] = {}
    if torch.compiler.is_compiling():
        return found
    # PyTorch has no public way from the one to the other. Should these names change, the copies are what is penalized.
    for reference in list(getattr(_composable_state, "_module_state_mapping", {}).values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in (p for group in groups for p in getattr(group, "fsdp_params", ())):
            place = parameter._module_info
            standing = place.module._parameters.get(place.param_name)
            if standing is not None and standing is not parameter.sharded_param:
                found[id(standing)] = parameter.sharded_param
    return found


class Part:
    """The terms of one tensor as this rank works on them: on plain tensors, whatever the tensor is.

    Args:
        terms: all on one tensor, plain or sharded.
        whole: gather it on every rank, whether it takes that or not.

    Attributes:
        terms: on this rank's part; or on the whole, where a term cannot do with less.
        along: the mesh dimensions over which the tensor is cut, so that sums over elements are sums over ranks too;
            None for the whole.
    """

    def __init__(self, terms: list[Term], whole: bool = False) -> None:
        self.parameter = terms[0].tensor
        self.terms = terms
        self.along: Along | None = None
        self.whole = whole
        w = self.parameter
        if not isinstance(w, DTensor):
            return
        groupings = [_cut(term, w) for term in terms]
        self.whole = whole or None in groupings
        if not self.whole:
            self.along = w.device_mesh, _cut_over(w)
        memo: dict[int, Tensor] = {}
        self.terms = [
            replace(
                term,
                tensor=self._plain(w, memo),
                grouping=grouping if grouping is not None and not self.whole else term.grouping,
                weights=self._plain(term.weights, memo),
                center=self._plain(term.center, memo),
            )
            for term, grouping in zip(terms, groupings, strict=True)
        ]

    def take(self, x: Any) -> Any:
        """What belongs to the tensor, such as a step for each of its elements, as the terms here need it."""
        if not isinstance(x, Tensor) or not isinstance(self.parameter, DTensor):
            return x
        if x.ndim == 0:
            return everywhere(x)
        x = placed_as(x, self.parameter)
        return everywhere(x) if self.whole else local(x)

    def give(self, x: Tensor) -> Tensor:
        """A tensor like those here, as one like the tensor: sharded as it is."""
        w = self.parameter
        if not isinstance(w, DTensor):
            return x
        if self.whole:
            return placed_as(x, w)
        return DTensor.from_local(x, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride())

    def _plain(self, x: Any, memo: dict[int, Tensor]) -> Any:
        # Terms that share a tensor go on sharing it.
        if x is None:
            return None
        if id(x) not in memo:
            memo[id(x)] = everywhere(x) if self.whole else local(x)
        return memo[id(x)]


def on_parts(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lets a function of the terms of one tensor, which returns a tensor like it, be written for plain tensors."""

    @wraps(function)
    def of_terms(terms: list[Term], *args: Any) -> Tensor:
        part = Part(terms)
        return part.give(function(part.terms, *map(part.take, args)))

    return of_terms


@torch.no_grad()
def total(parts: Sequence[Part], value: Callable[[list[Term]], Tensor]) -> tuple[Tensor, list[Term]]:
    """The sum of all terms over all ranks, 0-dim: one collective for all of them, for each mesh dimension they use.

    Args:
        parts: of each tensor.
        value: what some terms come to on this rank, 0-dim.

    Returns:
        The sum, and the terms, in which the norms of groups across ranks are known: no collective for their gradients.
    """
    crossing: list[tuple[Term, Any, Along | None]] = []
    others: dict[Along | None, list[Term]] = {}
    for part in parts:
        for term in part.terms:
            if isinstance(term.grouping, AcrossShards):
                crossing.append((term, term.grouping, part.along))
            else:
                others.setdefault(part.along, []).append(term)
    squares = [(grouping.squares(term.offset(term.tensor)), grouping.along) for term, grouping, _ in crossing]
    reduced = _summed([*squares, *((value(terms), along) for along, terms in others.items())])
    found = [term for terms in others.values() for term in terms]
    # With norms that are known everywhere, a group counts on each rank that holds some of it: only the rest is summed.
    left: dict[Along | None, list[Term]] = {}
    for (term, grouping, along), square in zip(crossing, reduced, strict=False):
        known = replace(term, grouping=replace(grouping, norms=grouping.root(square, term.tensor.dtype)))
        left.setdefault(_without(along, grouping.along), []).append(known)
        found.append(known)
    sums = reduced[len(crossing) :] + _summed([(value(terms), along) for along, terms in left.items()])
    return torch.stack(sums).sum(), found


def maximum(values: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The largest, over all ranks, of 0-dim values, each beside the parameter of which this rank's part has it."""
    largest: dict[Along | None, list[Tensor]] = {}
    for value, w in values:
        along = (w.device_mesh, _cut_over(w)) if isinstance(w, DTensor) else None
        largest.setdefault(along, []).append(value)
    tops = []
    for along, found in largest.items():
        top = torch.stack([x.to(found[0]) for x in found]).max()
        if along is not None and along[1]:
            # Some backends let a NaN get lost in a maximum.
            pair = _all_reduce(torch.stack([top.nan_to_num(torch.inf), top.isnan().to(top)]), along, "MAX")
            top = pair[0].masked_fill(pair[1] > 0, torch.nan)
        tops.append(top)
    return torch.stack([top.to(tops[0]) for top in tops]).max()


def reduced(x: Tensor, like: Tensor, op: str) -> Tensor:
    """`x` of each rank, reduced by `op` (`"sum"`, `"max"`) over the ranks that hold different shards of `like`."""
    if not isinstance(like, DTensor):
        return x
    placements = [Replicate() if placement.is_replicate() else Partial(op) for placement in like.placements]
    return DTensor.from_local(x, like.device_mesh, placements, run_check=False).full_tensor()


@dataclass(frozen=True, kw_only=True)
class AcrossShards(NormGrouping):
    """Groups of a sharded tensor that go on on other ranks, seen from the part on this one.

    Args:
        grouping: the groups of the whole.
        shape: the shape of the whole.
        along: the mesh dimensions over which a group is cut.
        norms: the norms of the groups of the part, where they are known and need no gradient.
    """

    grouping: NormGrouping
    shape: torch.Size
    along: Along
    norms: Tensor | None = field(default=None, compare=False)

    def view(self, w: Tensor) -> Tensor:
        return self.grouping.view(w)

    def dims(self, ndim: int) -> list[int]:
        return self.grouping.dims(ndim)

    def size(self, shape: torch.Size) -> int:
        return self.grouping.size(self.shape)

    def norm(self, x: Tensor) -> Tensor:
        if self.norms is not None and not torch.is_grad_enabled():
            return self.norms
        return self.root(_Sum.apply(self.squares(x), self.along), x.dtype)

    def totals(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return _all_reduce(torch.stack(super().totals(*xs)), self.along).unbind()

    def largest(self, x: Tensor) -> Tensor:
        return _all_reduce(super().largest(x), self.along, "MAX")

    def all_known(self, condition: Tensor) -> bool:
        return False  # on other ranks, which take part in what follows, it may not hold

    def squares(self, x: Tensor) -> Tensor:
        """What this rank has to add to the squared norms; in float64, which they do not overflow."""
        return self.grouping.norm(x).double().square()

    def root(self, squares: Tensor, dtype: torch.dtype) -> Tensor:
        """The norms, from their squares; of zero with gradient zero."""
        zero = squares == 0
        return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0).to(working_dtype(dtype))


class _Sum(torch.autograd.Function):
    """A sum over ranks, all of which get it and use it, each for its own part of what is then differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, along: Along) -> Tensor:
        ctx.along = along
        return _all_reduce(x.clone(), along)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(g, ctx.along), None


def _cut(term: Term, w: DTensor) -> Grouping | None:
    """The groups of a term as they are on this rank's part of `w`; None where it takes the whole to see them."""
    over = _cut_over(w)
    grouping = term.grouping
    if not over:
        return grouping
    if term.plain:
        return Elements()
    if not term.kind.separable or not isinstance(grouping, Elements | Slices | WholeTensor):
        return None
    if isinstance(grouping, Elements):
        return grouping
    inside = [d % w.ndim for d in grouping.dims(w.ndim)]
    crossing = tuple(i for i in over if w.placements[i].dim % w.ndim in inside)  # type: ignore[attr-defined]
    if not crossing:
        return grouping
    return AcrossShards(grouping=grouping, scale=grouping.scale, shape=w.shape, along=(w.device_mesh, crossing))


def _cut_over(w: DTensor) -> tuple[int, ...]:
    return tuple(i for i, placement in enumerate(w.placements) if not placement.is_replicate())


def _without(along: Along | None, others: Along) -> Along | None:
    return along and (along[0], tuple(dim for dim in along[1] if dim not in others[1]))


def _summed(xs: Sequence[tuple[Tensor, Along | None]]) -> list[Tensor]:
    """Each tensor, in float64, summed over the ranks along its mesh dimensions: one collective for each of these."""
    sums = [x.double() for x, _ in xs]
    steps = dict.fromkeys((along[0], dim) for _, along in xs if along is not None for dim in along[1])
    for mesh, dim in steps:
        together = [i for i, (_, along) in enumerate(xs) if along is not None and along[0] == mesh and dim in along[1]]
        flat = _all_reduce(torch.cat([sums[i].flatten() for i in together]), (mesh, (dim,)))
        for i, x in zip(together, flat.split([sums[i].numel() for i in together]), strict=True):
            sums[i] = x.view_as(sums[i])
    return sums


def _all_reduce(x: Tensor, along: Along, op: str = "SUM") -> Tensor:
    """In place."""
    x = x.contiguous()
    mesh, dims = along
    for dim in dims:
        dist.all_reduce(x, getattr(ReduceOp, op), group=mesh.get_group(dim))
    return x
