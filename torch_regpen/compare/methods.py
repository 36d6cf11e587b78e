"""Checks of the methods, lambdas and seeds that `compare` is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

from torch import nn

from ..optim.modes import MODES
from ..optim.wrapper import RegularizedOptimizer
from ..penalties.base import Penalty
from ..penalties.convex import L2
from ..penalties.param_groups import checked_lam

__all__ = ["Lams", "Method", "MethodLike", "checked_lams", "checked_methods", "checked_seeds"]

MakePenalty = Callable[[nn.Module, float], Penalty]
MethodLike = tuple[MakePenalty, str] | tuple[MakePenalty, str, Mapping[str, Any]]
Lams = Iterable[float] | Mapping[str, Iterable[float]]

HOW = ("loss", *MODES)
OPTIONS = [p.name for p in signature(RegularizedOptimizer).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
OPTIONS.append("schedule")


class Method(NamedTuple):
    """How a penalty is made, and how it is applied.

    Attributes:
        make_penalty: `make_penalty(model, lam)` returns the penalty.
        how: "loss", or a mode of `RegularizedOptimizer`; for the baselines, "plain" or "weight_decay".
        options: keyword arguments of `RegularizedOptimizer`; and "schedule", a function from optimizer to schedule.
    """

    make_penalty: MakePenalty
    how: str
    options: Mapping[str, Any] = {}

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The keyword arguments of `RegularizedOptimizer`."""
        return {name: value for name, value in self.options.items() if name != "schedule"}


BASELINES = {"plain": Method(L2, "plain"), "weight_decay": Method(L2, "weight_decay")}


def checked_methods(methods: Mapping[str, MethodLike]) -> dict[str, Method]:
    """The baselines and the methods, by name.

    Raises:
        TypeError: not a dict of name to `(penalty, how)` or `(penalty, how, options)`.
        ValueError: a name is that of a baseline; a `how` or an option is unknown.
    """
    if not isinstance(methods, Mapping):
        raise TypeError(f"methods must be a dict of name to (penalty, how), not a {type(methods).__name__}")
    return BASELINES | {name: _checked(name, method) for name, method in methods.items()}


def _checked(name: str, given: MethodLike) -> Method:
    if name in BASELINES:
        raise ValueError(f"{name!r} is the name of a baseline; give the method another name")
    if not isinstance(name, str) or not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise TypeError(
            f"a method is a name and (penalty, how), as in 'sparse': (L1, 'proximal'); not {name!r}: {given!r}. "
            "Options of the optimizer come third: (L1, 'proximal', {'metric': 'euclidean'})"
        )
    method = Method(*given)
    if method.how not in HOW:
        raise ValueError(f"{name!r} has the mode {method.how!r}; allowed are {', '.join(map(repr, HOW))}")
    if isinstance(method.make_penalty, nn.Module) or not callable(method.make_penalty):
        raise TypeError(
            f"{name!r} has a {type(method.make_penalty).__name__}; it needs a callable that makes a penalty from a "
            "model and a lambda, such as L1, partial(MCP, knee=0.2), or lambda model, lam: ..."
        )
    if not isinstance(method.options, Mapping):
        raise TypeError(
            f"{name!r} has options {method.options!r}, a {type(method.options).__name__}; allowed is a dict, as in "
            "(L1, 'proximal', {'metric': 'euclidean'})"
        )
    allowed = [] if method.how == "loss" else OPTIONS
    unknown = [option for option in method.options if option not in allowed]
    if unknown:
        raise ValueError(
            f"{name!r} has the options {unknown}; with {method.how!r} allowed are {allowed or 'none'}. Pass options of "
            "the penalty to the penalty, as in partial(MCP, knee=0.2)"
        )
    schedule = method.options.get("schedule")
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"{name!r} has the schedule {schedule!r}; allowed is a callable that makes one from each optimizer, such "
            "as partial(Bound, bound='initial')"
        )
    return method


def checked_lams(lams: Lams, methods: Mapping[str, Method]) -> dict[str, list[float]]:
    """The lambdas of each method, in ascending order; 0 for "plain".

    Raises:
        TypeError: a lambda is not a number.
        ValueError: a lambda is negative or infinite; a dict lacks a method, or has an unknown one.
    """
    if not isinstance(lams, Mapping):
        grid = _grid(lams)
        return {name: [0.0] if name == "plain" else grid for name in methods}
    named = {name: _grid(grid) for name, grid in lams.items()}
    missing = [name for name in methods if name not in BASELINES and not named.get(name)]
    unknown = [name for name in named if name not in methods or name == "plain"]
    if missing:
        raise ValueError(f"lams has no lambdas for {missing}; as a dict, it needs one or more for each method")
    if unknown:
        raise ValueError(
            f"lams has lambdas for {unknown}, which are not methods with lambdas; those are {[*methods][1:]}"
        )
    named.setdefault("weight_decay", sorted({lam for grid in named.values() for lam in grid}))
    return {name: [0.0] if name == "plain" else named[name] for name in methods}


def _grid(lams: Iterable[float]) -> list[float]:
    if not isinstance(lams, Iterable):
        raise TypeError(f"lams has {lams!r}; it needs a list of lambdas, such as [1e-4, 1e-3, 1e-2]")
    return sorted({checked_lam(lam) for lam in lams})


def checked_seeds(seeds: Iterable[int]) -> list[int]:
    """The seeds, as ints.

    Raises:
        TypeError: not a list, or a seed is not an int.
        ValueError: a seed is given twice.
    """
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds has {seeds!r}; it needs two or more ints, such as range(5)")
    given = list(seeds)
    for seed in given:
        if not hasattr(seed, "__index__"):
            raise TypeError(f"seeds has {seed!r}, a {type(seed).__name__}; allowed are ints")
    found = [int(seed) for seed in given]
    if len(set(found)) < len(found):
        raise ValueError(f"seeds={found} has a seed twice; allowed are different ints")
    return found
