"""The dual mode: each penalized parameter has a latent twin, which the optimizer moves in its place.

`latent -= s * grad(w)`, `S += s`, `w = prox(latent, S*lam)`: regularized dual averaging (Xiao 2010). The twin and the
sum of the steps live in the optimizer's state of the parameter, so that they travel in its state dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import multi_tensor
from .groups import Elements, working_dtype
from .sharding import local, on_parts
from .terms import Sized, Term, limit, pieces, prox

__all__ = [
    "LATENT",
    "STEPS",
    "fingerprints",
    "forget",
    "restart",
    "to_latent",
    "to_latent_together",
    "to_visible",
    "to_visible_together",
    "visible",
]

LATENT = "latent"
STEPS = "latent_steps"

State = dict[str, Any]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALL = 1 << 15  # elements, up to which tensors go together
CHUNK = 1 << 16  # words that are multiplied and summed within the cache


def fingerprints(parameters: Sequence[Tensor]) -> list[Tensor]:
    """For each, a sum of the bits of the elements on this rank, each weighted by where it lies; 0-dim.

    It is the same as long as nobody changed them, whatever the company, and hardly ever after.
    """
    flat = [_flat(parameter) for parameter in parameters]
    small = [i for i, x in enumerate(flat) if len(x) <= SMALL]
    found = dict(zip(small, _of_small([flat[i] for i in small]), strict=True)) if small else {}
    return [found[i] if i in found else _of_large(x) for i, x in enumerate(flat)]


def _of_small(flat: list[Tensor]) -> list[Tensor]:
    """By the differences of running sums over all of them."""
    sizes = [0, *map(len, flat)]
    bits = torch.cat([x.view(INTEGERS[x.element_size()]) for x in flat])
    places = _places(max(sizes), bits.device)
    sums = (bits * torch.cat([places[:size] for size in sizes])).cumsum(0)
    ends = torch.tensor(sizes, device="cpu").to(sums.device, non_blocking=True).cumsum(0)
    return list(torch.nn.functional.pad(sums, (1, 0))[ends].diff().unbind())


def _of_large(flat: Tensor) -> Tensor:
    """In words of 64 bits, whatever the dtype."""
    in_word = 8 // flat.element_size()
    if len(flat) % in_word or flat.storage_offset() % in_word:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % in_word))
    words = flat.view(torch.int64)
    chunk = CHUNK if flat.device.type == "cpu" else len(words)
    places = _places(min(chunk, len(words)), flat.device)
    sums = [(some * places[: len(some)]).sum() for some in words.split(chunk)]
    return sums[0] if len(sums) == 1 else (torch.stack(sums) * places[: len(sums)]).sum()


def _places(size: int, device: torch.device) -> Tensor:
    """The odd numbers; none of them, where all shards are on other ranks."""
    return 2 * torch.arange(size, device=device) + 1


def _flat(parameter: Tensor) -> Tensor:
    w = local(parameter)
    return (torch.view_as_real(w) if w.is_complex() else w).reshape(-1)


def to_latent_together(
    parameters: Sequence[Tensor], states: Sequence[State], known: Sequence[Tensor], keep: bool
) -> None:
    """`to_latent` of a pack, all of which have a twin and a known fingerprint."""
    changed = (torch.stack(fingerprints(parameters)) != torch.stack(list(known))).unbind()
    ws = [local(parameter) for parameter in parameters]
    twins = [local(state[LATENT]) for state in states]
    latent = [torch.where(c, w.to(twin.dtype), twin) for c, w, twin in zip(changed, ws, twins, strict=True)]
    for state, c in zip(states, changed, strict=True):
        local(state[STEPS]).masked_fill_(c, 0)
    if keep:
        torch._foreach_copy_(twins, ws)
    torch._foreach_copy_(ws, latent)


def to_visible_together(parameters: Sequence[Tensor], states: Sequence[State], size: Any, linear: float) -> None:
    """`to_visible` of a pack, all of which have a twin, for `linear * sum abs(w)` and one step without a cap."""
    steps = [local(state[STEPS]) for state in states]
    torch._foreach_add_(steps, size)
    torch._foreach_copy_([local(state[LATENT]) for state in states], [*map(local, parameters)])
    multi_tensor.soft_thresholds_(parameters, torch.stack(steps) * linear)


def to_latent(parameter: Tensor, state: State, known: Tensor | None, keep: bool) -> None:
    """Put the latent weights in place of the visible ones.

    Args:
        parameter: holds the visible weights.
        state: the optimizer's state of the parameter; without a twin in it the latent weights are the visible ones.
        known: the fingerprint of the weights that the last step left; where it differs now the twin starts anew.
        keep: the visible weights, where the latent ones were: a cap is relative to them.
    """
    if LATENT not in state:
        return
    w, twin = local(parameter), local(state[LATENT])
    steps = local(state[STEPS])
    if known is not None:
        steps.masked_fill_(fingerprints([parameter])[0] != known, 0)
    for take in multi_tensor.cuts(w, range(w.ndim)):
        seen, kept = take(w), take(twin)
        # Without a step it is where the weights are: so it is for a twin that was not in the checkpoint they come from.
        latent = torch.where(take(steps) == 0, seen.to(twin.dtype), _read_now(kept))
        if keep:
            kept.copy_(_read_now(seen))
        seen.copy_(latent)


def to_visible(terms: list[Term], state: State, step: Sized) -> None:
    """Keep the latent weights that the optimizer has moved, and put the visible ones in their place."""
    if LATENT not in state:
        restart(terms[0].tensor, state, step)
    if state[STEPS].ndim == 0:
        state[STEPS] += step.size
    for some, take in pieces(terms):
        w, twin, steps, part = some[0].tensor, take(state[LATENT]), take(state[STEPS]), step.part(take)
        if steps.ndim:
            steps += part.size
        seen = prox(some, steps)
        if part.cap is not None:
            seen = _shrunk_at_most(some, part.cap, twin, seen)
            if any(term.kind.positive for term in terms):
                seen = seen.clamp_min(0)
        twin.copy_(_read_now(w))
        w.copy_(seen)


def restart(parameter: Tensor, state: State, step: Sized) -> None:
    """Put the twin where the visible weights are, with no steps yet.

    It is there while lambda is 0 too, as before a ramp: a distributed checkpoint is loaded into what is there.
    """
    if LATENT in state:
        state[LATENT].copy_(parameter)
        state[STEPS].zero_()
        return
    state[LATENT] = parameter.detach().clone()
    dtype, size = working_dtype(parameter.dtype), step.size
    if isinstance(size, Tensor) and size.ndim:
        state[STEPS] = torch.zeros_like(parameter, dtype=dtype)
    else:
        state[STEPS] = torch.zeros((), dtype=dtype, device=parameter.device)


def visible(terms: list[Term], state: State) -> Tensor:
    """`prox(latent, S*lam)`, of the latent weights that the parameter holds."""
    return prox(terms, state[STEPS]) if STEPS in state else terms[0].tensor.clone()


def _read_now(x: Tensor) -> Tensor:
    """`x`, about to be copied and then overwritten.

    Of a bare copy inductor takes what is written later (pytorch/pytorch#198131); of a computation it does not.
    """
    return x.neg().neg() if torch.compiler.is_compiling() else x


def forget(state: State) -> None:
    """The latent twin goes; the visible weights are what goes on."""
    state.pop(LATENT, None)
    state.pop(STEPS, None)


@on_parts
def _shrunk_at_most(terms: list[Term], cap: float | Tensor, old: Tensor, new: Tensor) -> Tensor:
    """`new`, in which nothing has shrunk from `old` by more than the cap; growing is free."""
    grouping: Any = next((term.grouping for term in terms if term.grouped), Elements())
    shrinks = grouping.polar(new)[0] < grouping.polar(old)[0]
    return torch.where(grouping.spread(shrinks, new), limit(old, new, cap, grouping), new)
