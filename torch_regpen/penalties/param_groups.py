"""The parameter groups of a penalty, each with its own lambda."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ParamGroup", "as_param_groups", "checked_lam"]

LARGEST = torch.finfo(torch.float32).max
GROUP_KEYS = {"params", "lam", "select", "exclude"}


class ParamGroup(dict[str, Any]):
    """A parameter group: a dict that checks each value set for "lam".

    Args:
        group: the keys of the group.
        lam: lambda; it replaces the "lam" of `group`.

    Raises:
        TypeError, ValueError: see `checked_lam`.
    """

    def __init__(self, group: dict[str, Any], lam: float) -> None:
        super().__init__(group)
        self["lam"] = lam
        if isinstance(
            group.get("params"), nn.Module
        ):  # without the wrapper of torch.compile, which a step cannot trace
            self["params"] = getattr(group["params"], "_orig_mod", group["params"])

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, checked_lam(value) if key == "lam" else value)

    def update(self, *args: Any, **kw: Any) -> None:
        """As `dict.update`, with the same check."""
        for key, value in dict(*args, **kw).items():
            self[key] = value

    def scaled(self, factor: float) -> ParamGroup:
        """A copy with lambda times `factor`, and so the lambdas that a schedule has noted."""
        group = ParamGroup(self, self["lam"] * factor)
        if "scheduled" in group:
            group["scheduled"] = tuple(lam * factor for lam in group["scheduled"])
        return group

    def __ior__(self, other: Any) -> ParamGroup:  # type: ignore[override,misc]
        self.update(other)
        return self


def checked_lam(lam: Any) -> float:
    """Return `lam` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative, or not finite in float32.
    """
    if isinstance(lam, bool) or not isinstance(lam, numbers.Real):
        hint = "; pass its .item()" if isinstance(lam, Tensor) else ""
        raise TypeError(f"lam must be a number, 0 or more and finite; {lam!r} is a {type(lam).__name__}{hint}")
    value = float(lam)
    if not 0 <= value <= LARGEST:
        raise ValueError(f"lam must be 0 or more and finite in float32, but got {value}")
    return value


def as_param_groups(params: Any) -> list[dict[str, Any]]:
    """Return the argument `params` of a penalty as a list of dicts with the key "params".

    Raises:
        TypeError: `params` has none of the allowed forms.
        ValueError: a dict lacks "params" or has an unknown key.
    """
    if isinstance(params, nn.Module | Tensor):
        return [{"params": params}]
    if isinstance(params, str | dict) or not isinstance(params, Iterable):
        raise TypeError(
            "params must be a module, or an iterable of tensors, of (name, tensor), or of dicts with a 'params'; "
            f"got a {type(params).__name__}"
        )
    entries = list(params)
    if entries and all(isinstance(entry, nn.Module) for entry in entries):
        raise TypeError(
            f"params is a {type(params).__name__} of {len(entries)} modules; pass nn.ModuleList(modules), or a list "
            "with {'params': module} for each"
        )
    if not any(isinstance(entry, dict) for entry in entries):
        return [{"params": entries}]
    for entry in entries:
        if not isinstance(entry, dict) or "params" not in entry or not entry.keys() <= GROUP_KEYS:
            raise ValueError(
                "a parameter group must be a dict with 'params' and, optionally, 'lam', 'select' and 'exclude'; got "
                + (f"a dict with {sorted(map(str, entry))}" if isinstance(entry, dict) else f"a {type(entry).__name__}")
            )
        if isinstance(entry["params"], Iterator):
            entry["params"] = list(entry["params"])
    return entries
