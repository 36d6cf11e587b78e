"""The dual mode: each penalized parameter has a latent twin, which the optimizer moves in its place.

`latent -= s * grad(w)`, `S += s`, `w = prox(latent, S*lam)`: regularized dual averaging (Xiao 2010). The twin and the
sum of the steps live in the optimizer's state of the parameter, so that they travel in its state dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .groups import Elements, working_dtype
from .metric import Step
from .sharding import local, on_parts
from .terms import Term, limit, prox

__all__ = ["LATENT", "STEPS", "fingerprint", "forget", "restart", "to_latent", "to_visible", "visible"]

LATENT = "latent"
STEPS = "latent_steps"

State = dict[str, Any]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(parameter: Tensor) -> Tensor:
    """A sum of the bits of the elements on this rank, each weighted by where it lies; 0-dim.

    It is the same as long as nobody changed them, and hardly ever after.
    """
    w = local(parameter)
    w = torch.view_as_real(w) if w.is_complex() else w
    bits: Tensor = torch.atleast_2d(w.view(INTEGERS[w.element_size()])).flatten(1)
    for _ in range(2):
        places = 2 * torch.arange(bits.shape[-1], device=bits.device) + 1
        bits = (bits * places.to(bits.dtype)).sum(dim=-1)
    return bits


def to_latent(parameter: Tensor, state: State, known: Tensor | None) -> None:
    """Put the latent weights in place of the visible ones, which are kept where the latent ones were.

    Args:
        parameter: holds the visible weights.
        state: the optimizer's state of the parameter; without a twin in it the latent weights are the visible ones.
        known: the fingerprint of the weights that the last step left; where it differs now the twin starts anew.
    """
    if LATENT not in state:
        return
    w, twin = local(parameter), local(state[LATENT])
    steps = local(state[STEPS])
    if known is not None:
        steps.masked_fill_(fingerprint(parameter) != known, 0)
    # Without a step it is where the weights are: so it is for a twin that was not in the checkpoint they come from.
    latent = torch.where(steps == 0, w.to(twin.dtype), _read_now(twin))
    twin.copy_(_read_now(w))
    w.copy_(latent)


def to_visible(terms: list[Term], state: State, step: Step) -> None:
    """Keep the latent weights that the optimizer has moved, and put the visible ones in their place."""
    parameter = terms[0].tensor
    if LATENT not in state:
        restart(parameter, state, step)
    state[STEPS] += step.size
    w = visible(terms, state)
    if step.cap is not None:
        w = _shrunk_at_most(terms, step.cap, state[LATENT], w)
        if any(term.kind.positive for term in terms):
            w = w.clamp_min(0)
    state[LATENT].copy_(_read_now(parameter))
    parameter.copy_(w)


def restart(parameter: Tensor, state: State, step: Step) -> None:
    """Put the twin where the visible weights are, with no steps yet.

    It is there while lambda is 0 too, as before a ramp: a distributed checkpoint is loaded into what is there.
    """
    if LATENT in state:
        state[LATENT].copy_(parameter)
        state[STEPS].zero_()
        return
    state[LATENT] = parameter.detach().clone()
    dtype = working_dtype(parameter.dtype)
    if isinstance(step.size, Tensor) and step.size.ndim:
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
