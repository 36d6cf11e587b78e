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
from .groups import Elements, largest, working_dtype
from .prox import Sized, Step, limit, one_step, prox, prox_
from .sharding import local, on_parts
from .terms import Bundle, Term, pieces

__all__ = [
    "LATENT",
    "STEPS",
    "Fingerprints",
    "forget",
    "no_steps",
    "restart",
    "to_latent",
    "to_visible",
    "visible",
]

LATENT = "latent"
STEPS = "latent_steps"

State = dict[str, Any]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALL = 1 << 12  # elements, up to which tensors go together
WIDTH = 1 << 9  # words in a row of what is summed by rows


class Fingerprints:
    """Of tensors: the same as long as nobody changed them, whatever the company, and hardly ever after a change.

    A fingerprint is a sum of the bits on this rank, each word weighted by where it lies. One object takes those of one
    step: what it multiplies with is made where the tensors are, and does not outlive them.
    """

    def __init__(self) -> None:
        self._weights: dict[torch.device, Tensor] = {}
        self._together: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def of(self, parameters: Sequence[Tensor]) -> Tensor:
        """One for each tensor of a pack, int64."""
        ws = [local(parameter) for parameter in parameters]
        small = [i for i, w in enumerate(ws) if w.numel() <= SMALL]
        found = dict(zip(small, self._of_small([ws[i] for i in small]), strict=True)) if small else {}
        return torch.stack([found[i] if i in found else self._of_large(w) for i, w in enumerate(ws)])

    def _of_small(self, ws: list[Tensor]) -> Sequence[Tensor]:
        """By the differences of running sums over all of them."""
        flat = _real(multi_tensor.joined(ws)).flatten()
        words = flat.view(INTEGERS[min(flat.element_size(), 4)])  # of 64 bits, the upper ones would hardly count
        in_element = words.numel() // max(sum(w.numel() for w in ws), 1)
        lengths = [in_element * w.numel() for w in ws]
        key = (words.device, *lengths)
        if key not in self._together:
            weights = self._weights_for(max(lengths), words.device)
            ends = torch.tensor([0, *lengths], device="cpu").to(words.device, non_blocking=True).cumsum(0)
            self._together[key] = torch.cat([weights[:length] for length in lengths]), ends
        weights, ends = self._together[key]
        sums = (words * weights).cumsum(0)
        return torch.nn.functional.pad(sums, (1, 0))[ends].diff().unbind()

    def _of_large(self, w: Tensor) -> Tensor:
        """In words of 64 bits, weighted by their row, and the sum of rows by their column; and the sum of the numbers.

        The last is for the upper bits of words, signs and exponents, of which a product shows next to nothing.
        """
        flat = _real(w).reshape(-1)
        number = flat.sum(dtype=working_dtype(w.dtype))
        in_word = 8 // flat.element_size()
        if flat.numel() % in_word or flat.storage_offset() % in_word:
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % in_word))
        words = flat.view(torch.int64)
        length = words.numel() // WIDTH
        rows, rest = words[: length * WIDTH].view(length, WIDTH), words[length * WIDTH :]
        weights = self._weights_for(length + 2 * WIDTH, flat.device)
        of_rows, of_columns = weights[:length], weights[length:]
        if flat.device.type == "cpu" and not torch.compiler.is_compiling():
            total = torch.mv(rows.T, of_rows)  # in one pass; there is none for integers elsewhere
        else:
            size = max(multi_tensor.sizes(flat).chunk // WIDTH, 1)
            chunks = zip(rows.split(size), of_rows[:, None].split(size), strict=True)
            total = torch.stack([(some * factors).sum(0) for some, factors in chunks]).sum(0)
        totals = torch.cat([total, rest, _bits(number).long().view(1)])
        return (totals * of_columns[: totals.numel()]).sum()

    def _weights_for(self, size: int, device: torch.device) -> Tensor:
        """Odd numbers in no order: ordered ones sum to a power of two, which hides a change of all words alike."""
        if device not in self._weights or self._weights[device].numel() < size:
            x = torch.arange(1, max(size, 2 * SMALL) + 1, device=device) * -0x61C8864680B583EB
            x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
            self._weights[device] = (x ^ (x >> 27)) | 1
        return self._weights[device][:size]


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers."""
    x = _real(x)
    return x.view(INTEGERS[x.element_size()])


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def to_latent(parameters: Sequence[Tensor], states: Sequence[State], anew: Tensor, keep: bool) -> None:
    """Put the latent weights of a pack in place of the visible ones.

    Args:
        parameters: hold the visible weights.
        states: the optimizer's states of them, with a twin in each.
        anew: for each whether its twin starts anew, where the visible weights are.
        keep: the visible weights, where the latent ones were: a cap is relative to them.
    """
    for parameter, state in zip(parameters, states, strict=True):
        if state[LATENT].dtype != parameter.dtype:  # of a model that was cast, or of a checkpoint of another dtype
            state[LATENT] = state[LATENT].to(parameter.dtype)
    ws = [local(parameter) for parameter in parameters]
    twins = [local(state[LATENT]) for state in states]
    steps = [_bits(local(state[STEPS])) for state in states]
    # Arithmetic of the bits: of numbers, 0 * nan would not be 0; and torch.where takes twice as long on a CPU.
    torch._foreach_mul_(steps, (~anew).to(steps[0].dtype).unbind())
    goes_on = (~anew).to(_bits(ws[0]).dtype).unbind()
    for some_ws, some_twins in multi_tensor.corresponding(ws, twins):
        visible = list(map(_bits, some_ws))
        beyond = torch._foreach_sub(list(map(_bits, some_twins)), visible)
        if keep:
            torch._foreach_copy_(some_twins, list(map(_read_now, some_ws)))
        torch._foreach_addcmul_(visible, beyond, goes_on)


def to_visible(bundle: Bundle, states: Sequence[State], steps: Sequence[Sized]) -> None:
    """Keep the latent weights that the optimizer has moved, and put the visible ones in their place."""
    for parameter, state, step in zip(bundle.tensors, states, steps, strict=True):
        if LATENT not in state:
            restart(parameter, state, step)
    if steps[0].cap is not None or any(state[STEPS].ndim for state in states):
        for terms, state, step in zip(bundle.each, states, steps, strict=True):
            _to_visible_by_element(terms, state, step)
        return
    twins, so_far = ([local(state[name]) for state in states] for name in (LATENT, STEPS))
    if one_step(steps):
        sums = torch.stack(so_far) + steps[0].size
    else:
        sums = torch.stack([s + step.size for s, step in zip(so_far, steps, strict=True)])
    torch._foreach_copy_(so_far, sums.unbind())
    if bundle.only_thresholds and not torch.compiler.is_compiling():
        multi_tensor.soft_thresholds_(bundle.tensors, sums * bundle.coefficients[0], twins)
        return
    for terms, twin, s in zip(bundle.each, twins, sums.unbind(), strict=True):
        for some, take in pieces(terms, times=8):
            w = some[0].tensor
            take(twin).copy_(_read_now(local(w)))
            prox_(Bundle([some], [w], bundle.group), [Step(s)])


def _to_visible_by_element(terms: list[Term], state: State, step: Sized) -> None:
    """`to_visible` where steps differ by element, or are capped."""
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


def no_steps(state: State) -> Tensor:
    """Whether the twin has taken none, 0-dim: so it is for one that was not in the checkpoint of the weights."""
    none: Tensor = largest(local(state[STEPS])) == 0
    return none


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
    limited = limit(old, new, cap, grouping)
    if isinstance(grouping, Elements) and not new.is_complex():
        # As below, for a mask without an order: there torch.where takes ten times as long on a CPU.
        return torch.lerp(new, limited, new.abs().lt_(old.abs()))
    shrinks = grouping.polar(new)[0] < grouping.polar(old)[0]
    return torch.where(grouping.spread(shrinks, new), limited, new)
