"""A smaller copy of a model, without the units that are exactly zero."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import prune
from torch.utils._pytree import tree_map_only

from ..distributed.shards import DTensor
from ..penalties.coupling import Inputs, UnitSet, arguments_in, coupled_units, equal_to_rounding
from ..penalties.coupling_layers import Slices, port_widths, resize, rows
from ..penalties.coupling_trace import copied_buffers, kept_contents, tensors_in
from ..utils import checked_count, first_names, modes_kept, warn
from .folding import Folding, Map, zero_units

__all__ = ["shrink"]

Cut = list[tuple[UnitSet, list[int]]]  # sets of units, with the indices of units that can only be removed together

# The names that attention modules in timm and transformers use for the number of heads, and for its product with the
# size of a head.
HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head", "heads")
WIDTHS = ("attn_dim", "all_head_size", "split_size", "inner_dim")


def shrink(model: nn.Module, example_inputs: Inputs, *, round_to: int = 1) -> nn.Module:
    """A copy of a model without its zero units: it has smaller layers and the same outputs up to rounding.

    A unit is one group of `Coupled`: a neuron, a channel, an attention head, a unit of an LSTM. It is removed if
    - everything that writes it is exactly zero: its rows, its bias, and its scale and shift in norm layers; or
    - its weights are zero, so its output in eval mode is a constant (from its bias or the shift of a norm), and this
      constant can be folded into the biases of the layers that read it: a Linear, or a convolution without zero
      padding. A constant of 0, as after a ReLU, needs no bias and may be padded. A layer without a bias gets one.

    Weights that read removed units count as zero. The columns that read a unit are removed with it, whatever their
    values are. At least one unit of each set is kept.

    The copy consists of the same modules with smaller parameters, without classes of this package. Save it whole, with
    `torch.save(model, file)`, because its class would construct the original sizes. It has no gradients and needs a new
    optimizer. It takes the same inputs as the model; `shrink_inputs` removes inputs that are not read.

    Some zero units are kept, and a warning names them with the reason:
    - a constant cannot be folded exactly;
    - they cannot be removed: outputs of the model, units under a LayerNorm, heads of nn.MultiheadAttention, and units
      whose number equals an attribute of unknown meaning in some module;
    - the layers and directions of an LSTM or GRU, which share one `hidden_size`, have different numbers of them;
    - the outputs for `example_inputs` change without them.

    Args:
        model: the model; it is not changed.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments to call the model with.
        round_to: keep so many zero units that the number of units left in each layer is a multiple of this, if the
            layer has that many. Kernels are fastest for multiples of 8 or 16: on ONNX Runtime, 64 channels can take
            less time than 58.

    Returns:
        The copy, in the mode of the model.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError: the model is not a module, or the example inputs are neither a tensor, a tuple nor a dict.
        ValueError: a parameter is sharded, masked by torch.nn.utils.prune, or not initialized; `round_to` is not a
            whole number of 1 or more.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_regpen.export import shrink
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:5].zero_(), model[0].bias[:5].zero_()
        >>> shrink(model, torch.ones(1, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    checked_count("round_to", round_to)
    smaller = copied_model(model)
    sets, left = coupled_units(smaller, example_inputs)
    with in_eval_mode(smaller):
        shrinking = Shrinking(smaller, example_inputs, round_to)
        shrinking.name_left(sets, left)
        shrinking.remove(shrinking.cuts(sets))
    shrinking.warn_about_what_stays("units that are zero")
    return smaller


def copied_model(model: nn.Module) -> nn.Module:
    """A copy to shrink, without gradients.

    Raises:
        TypeError: the model is not a module.
        ValueError: a parameter is sharded, or masked by torch.nn.utils.prune.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"parameter {name!r} is sharded; give an unsharded copy of the model")
    if prune.is_pruned(model):
        raise ValueError("the model has masks; make them permanent with torch.nn.utils.prune.remove first")
    smaller = copy.deepcopy(model)
    smaller.zero_grad()
    return smaller


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; restore the mode of each module at the end."""
    with modes_kept(model):
        model.eval()
        yield


class Shrinking:
    """Removes units from a model in eval mode, and restores them if its outputs change.

    Attributes:
        stay: the units that are kept, with the reasons, for a message.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs, round_to: int = 1) -> None:
        self.model = model
        self.round_to = round_to
        self.args, self.kwargs = arguments_in(example_inputs)
        self.stay: list[str] = []
        self.names = {module: name for name, module in model.named_modules()}
        self.parents = {child: parent for parent in self.names for child in parent.children()}
        self.before = {module: _copied(vars(module)) for module in self.names}
        self.folding = Folding(self.names, self._run)
        self.outputs = self._run()

    def warn_about_what_stays(self, what: str) -> None:
        """Warn about the units that are kept."""
        if self.stay:
            shown = first_names(self.stay, most=8, separator="; ")
            warn(f"shrink could not remove all {what}. These remain: {shown}")

    def cuts(self, sets: Sequence[UnitSet]) -> list[Cut]:
        """The zero units that seem removable, judging by the modules alone."""
        found = []
        zeros = {units: zero_units(units.members) for units in sets}
        dead = self.folding.dead(sets, zeros)
        for together in _with_common_rnn(sets):
            cut = [(units, zeros[units][: units.count - 1]) for units in together]
            most, obstacle = max(len(zero) for _, zero in cut), next(filter(None, map(self.obstacle, together)), "")
            reason = obstacle
            if reason:
                most = 0
            elif any(isinstance(part.module, nn.RNNBase) for part in together[0].members):
                most = min(len(zero) for _, zero in cut) if _has_all_parts(together) else 0
                reason = "the layers and directions of a recurrent layer must keep the same number of units"
            for units, zero in cut:
                self.name_staying(units.name, len(zero[most:]), reason)
            removed = self._rounded(together[0].count, most)
            if removed:
                found.append([(units, zero[:removed]) for units, zero in cut])
            for units, zero in cut:
                for why, count in Counter(filter(None, dead[units].values())).items():
                    reason = f"their weights are zero, but a bias or a norm is not, and {why}"
                    self.name_staying(units.name, count, reason)
                constant = [unit for unit, why in dead[units].items() if not why][: units.count - 1 - len(zero)]
                if obstacle:
                    self.name_staying(units.name, len(constant), obstacle)
                elif constant:
                    more = self._rounded(units.count, most + len(constant)) - removed
                    found += [[(units, (zero[removed:most] + constant)[:more])]] if more else []
        return found

    def _rounded(self, count: int, removable: int) -> int:
        """The number of units to remove, of `removable` ones, so that a multiple of `round_to` is left of `count`."""
        return max(count - -(-(count - removable) // self.round_to) * self.round_to, 0)

    def remove(self, cuts: list[Cut]) -> None:
        """Make the cuts that do not change the outputs."""
        if cuts:
            self._apply(self._accepted([], cuts))
            self._run()  # for `_adopt_size`

    def _accepted(self, accepted: list[Cut], more: list[Cut]) -> list[Cut]:
        """The accepted cuts, and the cuts in `more` that do not change the outputs either, found by bisection."""
        reason = self._objection([*accepted, *more])
        if reason is None:
            return [*accepted, *more]
        if len(more) == 1:
            for units, each in more[0]:
                self.name_staying(units.name, len(each), reason)
            return accepted
        half = len(more) // 2
        return self._accepted(self._accepted(accepted, more[:half]), more[half:])

    @torch.no_grad()
    def _apply(self, cuts: list[Cut]) -> None:
        """Restore the model, then remove the units of these cuts."""
        for module, contents in self.before.items():
            vars(module).update(_copied(contents))
        gone: dict[tuple[nn.Module, str, int], list[Tensor]] = defaultdict(list)
        leaving: Counter[UnitSet] = Counter()
        created = []
        for units, each in (unit for cut in cuts for unit in cut):
            created += self.folding.fold_(units, each)
            leaving[units] += len(each)
            for part in (*units.members, *units.readers):
                gone[part.module, part.key, part.dim].append(part.index[each].flatten())
        for module in created:
            if (module, "weight", 0) in gone:
                gone[module, "bias", 0] = gone[module, "weight", 0]
        for units, count in leaving.items():
            self._resize_attention(units, count)
        for (module, key, dim), indices in gone.items():
            parameter: Any = module._parameters[key]
            kept = torch.ones(parameter.shape[dim], dtype=torch.bool)
            kept[torch.cat(indices)] = False
            index = kept.nonzero().flatten().to(parameter.device)
            module._parameters[key] = nn.Parameter(parameter.index_select(dim, index), parameter.requires_grad)
            if isinstance(module, _NormBase) and key == "weight":
                for name in ("running_mean", "running_var"):
                    buffer = module._buffers.get(name)
                    module._buffers[name] = None if buffer is None else buffer.index_select(0, index)
        for module in dict.fromkeys(module for module, *_ in gone):
            resize(module, self.before[module]["_parameters"])

    def name_left(self, sets: Sequence[UnitSet], left: dict[str, str]) -> None:
        """Record the zero rows of layers for which some or all units cannot be removed."""
        in_units: dict[tuple[nn.Module, str], list[Tensor]] = defaultdict(list)
        for member in (member for units in sets for member in units.members):
            in_units[member.module, member.key].append(member.index.flatten())
        for module, name in self.names.items():
            for part, slices in rows(module).items():
                where = ".".join(filter(None, (name, part)))
                if where in left and slices:
                    first = slices[0]
                    known = torch.cat([torch.zeros(0, dtype=torch.int64), *in_units[first.module, first.key]])
                    # A row without weights is dead even if it has a bias: its output is constant.
                    weights = [part for part in slices if _parameter(part).ndim > 1]
                    zero = first.index[zero_units(weights or slices)]
                    count = len(zero) - int(torch.isin(zero, known).any(1).sum())
                    self.name_staying(where, count, left[where].removeprefix("in part: "))

    def name_staying(self, name: str, count: int, reason: str) -> None:
        if count > 0:
            self.stay.append(f"{count} of {name!r}: {reason}")

    def obstacle(self, units: UnitSet) -> str | None:
        """Why units cannot be removed: a module depends on their number other than by the sizes of its parameters."""
        for part in (*units.members, *units.readers):
            module, size = part.module, _parameter(part).shape[part.dim]
            if isinstance(module, nn.MultiheadAttention) or isinstance(self.parents.get(module), nn.MultiheadAttention):
                return "nn.MultiheadAttention requires embed_dim = num_heads * head_dim"
            if port_widths(module) is None:
                for key, value in vars(module).items():
                    if type(value) is int and value == size:
                        where = f"{self.names[module]}.{key}".lstrip(".")
                        return f"it is not known what {where} = {size} of {type(module).__name__} means"
        return None

    def _objection(self, cuts: list[Cut]) -> str | None:
        """Why the units of these cuts cannot be removed: the outputs change. None if they do not."""
        self._apply(cuts)
        try:
            outputs = self._run()
        except Exception as error:  # a forward pass may raise anything for unexpected sizes
            return f"the forward pass fails without them: {next(iter(str(error).splitlines()), type(error).__name__)}"
        if [each.shape for each in outputs] != [each.shape for each in self.outputs]:
            return "the outputs have another shape without them"
        return None if equal_to_rounding(outputs, self.outputs) else "the outputs differ without them"

    @torch.no_grad()
    def _run(self, state: Mapping[str, Tensor] = MappingProxyType({}), change: Map | None = None) -> list[Tensor]:
        """The outputs, after `state` replaces parameters and `change` is applied to floating-point inputs."""
        args, kwargs = self.args, self.kwargs
        if change is not None:
            args, kwargs = tree_map_only(Tensor, lambda x: change(x) if x.is_floating_point() else x, (args, kwargs))
        norms = [module for module in self.names if isinstance(module, _InstanceNorm) and module.weight is None]
        hooks = [norm.register_forward_pre_hook(_adopt_size) for norm in norms]
        try:
            devices = list({p.device for p in self.model.parameters() if p.is_cuda})
            with torch.random.fork_rng(devices=devices), kept_contents(self.model):
                # each run draws the same random numbers
                out = functional_call(self.model, {**copied_buffers(self.model), **state}, args, kwargs)
                return [tensor.clone() for tensor in tensors_in(out)]
        finally:
            for hook in hooks:
                hook.remove()

    def _resize_attention(self, units: UnitSet, leaving: int) -> None:
        """If the units are heads, change the number of heads in the attributes of the attention modules."""
        projections = [part for part in units.members if _parameter(part).ndim > 1 and part.index.shape[1] > 1]
        for parent in dict.fromkeys(self.parents[part.module] for part in projections if part.module in self.parents):
            if any(name in vars(parent) for name in HEADS):
                for name in (*HEADS, *WIDTHS):
                    value = vars(parent).get(name)
                    if type(value) is int and value % units.count == 0:
                        setattr(parent, name, value // units.count * (units.count - leaving))


def _with_common_rnn(sets: Sequence[UnitSet]) -> list[list[UnitSet]]:
    """Group the sets into lists; sets that write units of the same recurrent layer are in the same list."""
    found: list[tuple[set[nn.Module], list[UnitSet]]] = []
    for units in sets:
        layers = {part.module for part in units.members if isinstance(part.module, nn.RNNBase)}
        joined = [each for each in found if each[0] & layers]
        found = [each for each in found if not each[0] & layers]
        together = [other for each in joined for other in each[1]]
        found.append((layers.union(*(each[0] for each in joined)), [*together, units]))
    return [together for _, together in found]


def _has_all_parts(sets: Sequence[UnitSet]) -> bool:
    """Whether the sets have units of all layers and directions of their recurrent layers."""
    places = {(part.module, part.key) for units in sets for part in units.members}
    return all(
        (module, name) in places
        for module in {module for module, _ in places if isinstance(module, nn.RNNBase)}
        for name in module._parameters
    )


def _adopt_size(norm: Any, args: tuple[Tensor, ...]) -> None:
    """Set the size of a norm without parameters; a wrong one would only cause a warning."""
    norm.num_features = args[0].shape[args[0].ndim - norm._get_no_batch_dim()]


def _parameter(part: Slices) -> Tensor:
    parameter: Tensor = getattr(part.module, part.key)
    return parameter


def _copied(contents: dict[str, Any]) -> dict[str, Any]:
    """The attributes, with copies of the dicts of parameters and buffers, because these change in place."""
    return {**contents, "_parameters": dict(contents["_parameters"]), "_buffers": dict(contents["_buffers"])}
