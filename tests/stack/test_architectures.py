"""Real architectures: which of their parameters are weights, and what are the units of their layers."""

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, built

from torch_regpen import L1, GroupLasso
from torch_regpen.export import dead_units
from torch_regpen.groups import Heads

# The default selection, against what each library decays


TOKEN = "a token held as a raw parameter; the library's list has no names"
POSITION = "a position embedding held as a raw parameter; the library's list has no such name"
SCALE = "a scale of a layer or of a head; the library goes by the number of dimensions, or not by shape at all"
NORM = "the scale or shift of a normalization layer that the library does not know as one"
VECTOR = "a vector: one number for each channel or head; transformers leaves out biases and norms by name only"
BIAS = "a bias with a name of its own"
LOOKUP = "the weight of a layer inside a position bias: the library goes by the whole name, we by the last part"

TAKEN = (LOOKUP,)  # all others are left out by us and decayed by the library

DIFFERENCES: dict[str, dict[str, str]] = {
    "timm.vit_map": {"attn_pool.latent": TOKEN},
    "timm.xcit": {"*.temperature": SCALE},
    "timm.nf_resnet": {"*.gain": SCALE},
    "timm.nfnet": {"*.gain": SCALE},
    "timm.fastvit": {"*.gamma": SCALE},
    "timm.resmlp": {"*.norm?.alpha": NORM, "*.norm?.beta": NORM, "norm.alpha": NORM, "norm.beta": NORM},
    "timm.sam": {"*.rel_pos_?": POSITION},
    "torchvision.mvit_v2": {"*.rel_pos_?": POSITION},
    "torchvision.convnext": {"*.layer_scale": SCALE},
    "torchvision.vit": {"encoder.pos_embedding": POSITION, "*.in_proj_bias": BIAS},
    "torchvision.swin_v2": {"*.logit_scale": SCALE},
    "transformers.xlnet": {"mask_emb": TOKEN},
    "transformers.t5": {"*.relative_attention_bias.weight": LOOKUP},
    "transformers.gpt_oss": {"*.sinks": VECTOR},
    "transformers.mamba": {"*.D": VECTOR, "norm_f.weight": NORM},
    "transformers.mamba_marked": {"norm_f.weight": NORM},
    "transformers.falcon_mamba": {"*.D": VECTOR, "norm_f.weight": NORM},
    "transformers.mamba2": {"*.D": VECTOR, "*.A_log": VECTOR, "norm_f.weight": NORM},
    "transformers.vit": {"*.cls_token": TOKEN, "*.position_embeddings": POSITION},
    "transformers.vit_mask": {"*.cls_token": TOKEN, "*.mask_token": TOKEN, "*.position_embeddings": POSITION},
    "transformers.deit": {"*.cls_token": TOKEN, "*.distillation_token": TOKEN, "*.position_embeddings": POSITION},
    "transformers.vit_mae": {"*.cls_token": TOKEN, "*.mask_token": TOKEN},
    "transformers.dinov2": {
        "*.cls_token": TOKEN, "*.mask_token": TOKEN, "*.position_embeddings": POSITION, "*.lambda1": SCALE,
    },
    "transformers.dinov2_registers": {
        "*.cls_token": TOKEN, "*.mask_token": TOKEN, "*.register_tokens": TOKEN, "*.position_embeddings": POSITION,
        "*.lambda1": SCALE,
    },
    "transformers.beit": {"*.cls_token": TOKEN, "*.mask_token": TOKEN, "*.lambda_?": SCALE},
    "transformers.swinv2": {"*.continuous_position_bias_mlp.?.weight": LOOKUP, "*.logit_scale": SCALE},
    "transformers.convnext": {"*.layer_scale_parameter": SCALE},
    "transformers.convnextv2": {"*.grn.weight": NORM},
    "transformers.resnet": {"*.normalization.weight": NORM},
    "transformers.sam": {"*.pos_embed": POSITION, "*.rel_pos_?": POSITION, "*.positional_embedding": POSITION},
    "transformers.clip": {"logit_scale": SCALE, "*.class_embedding": TOKEN},
    "transformers.siglip": {"logit_scale": SCALE, "*.probe": TOKEN},
    "transformers.wav2vec2": {"masked_spec_embed": TOKEN, "*.original0": SCALE},
    "transformers.wavlm": {"masked_spec_embed": TOKEN, "*.original0": SCALE, "*.gru_rel_pos_const": SCALE},
    "torch.weight_norm": {"*.original0": SCALE},
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_the_default_selection_is_what_the_models_own_library_decays(name):
    """Apart from the listed names, each left out (or taken) for its reason."""
    model = built(name)
    theirs = ZOO[name].decayed(model)
    ours = {parameter for parameter, _ in L1(model, 0.1).named_parameters_penalized()}
    rules = DIFFERENCES.get(name, {})
    names = [parameter for parameter, _ in model.named_parameters()]
    listed = {glob: {n for n in names if fnmatchcase(n, glob)} for glob in rules}
    taken = set().union(*(listed[glob] for glob, reason in rules.items() if reason in TAKEN))
    left_out = set().union(*(listed[glob] for glob, reason in rules.items() if reason not in TAKEN))
    assert ours - theirs == taken
    assert theirs - ours == left_out
    assert all(listed.values()), "a listed name is gone from the model"


# Units, against the definition of each layer


class Units(NamedTuple):
    """A layer and its units, written out.

    Attributes:
        make: makes the layer.
        groups: how the penalty groups its weights.
        members: for each parameter, the elements of each unit, as masks.
        signal: what depends on a unit: not zero while it lives, zero once it is dead.
        select: which parameters are penalized.
    """

    make: Callable[[], nn.Module]
    groups: str | Heads
    members: Callable[[nn.Module], dict[str, list[Tensor]]]
    signal: Callable[[nn.Module, int], Tensor]
    select: str | None = None


def each(names: Iterable[str], unit: int) -> dict[str, list[int]]:
    """One unit in each of some parameters."""
    return {name: [unit] for name in names}


def mask_of(w: Tensor, *indices) -> Tensor:
    """A mask over the elements of `w` at each of the given indices."""
    mask = torch.zeros(w.shape, dtype=torch.bool)
    for index in indices:
        mask[index] = True
    return mask


def sum_of_norms(layer: nn.Module, members: dict[str, list[Tensor]]) -> Tensor:
    """The group lasso written out: `sum sqrt(n) * norm` over units of `n` elements."""
    return sum(
        math.sqrt(int(unit.sum())) * layer.get_parameter(parameter)[unit].norm()
        for parameter, units in members.items()
        for unit in units
    ).detach()


@torch.no_grad()
def reaction(f: Callable[[Tensor], Tensor], x: Tensor, index) -> Tensor:
    """How far the output of `f` moves when its input moves at an index."""
    moved = x.clone()
    moved[index] += 1
    return (f(moved) - f(x)).abs().max()


@torch.no_grad()
def reaction_to_weight(f: Callable[[], Tensor], w: Tensor, index) -> Tensor:
    """How far the output of `f` moves when some weights move; they are put back."""
    before, kept = f(), w.clone()
    w[index] += 1
    after = f()
    w.copy_(kept)
    return (after - before).abs().max()


def image(channels: int, ndim: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, channels, *([5] * ndim), generator=generator, dtype=torch.float64)


def sequence(features: int, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, length, features, generator=generator, dtype=torch.float64)


def read_by(conv: nn.Module, channel: int) -> Tensor:
    """The weights of a convolution that read an input channel: those of the filters of its group."""
    filters, channels = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    group = channel // channels
    return mask_of(conv.weight, *((group * filters + i, channel % channels) for i in range(filters)))


def written_by(conv: nn.Module, channel: int) -> Tensor:
    """The weights of a transposed convolution that write an output channel: those of the inputs of its group."""
    filters, channels = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    group = channel // filters
    return mask_of(conv.weight, *((group * channels + i, channel % filters) for i in range(channels)))


def inputs_of(conv: nn.Module) -> dict[str, list[Tensor]]:
    return {"weight": [read_by(conv, c) for c in range(conv.in_channels)]}


def outputs_of(conv: nn.Module) -> dict[str, list[Tensor]]:
    return {"weight": [mask_of(conv.weight, c) for c in range(conv.out_channels)]}


def reads(conv: nn.Module, channel: int) -> Tensor:
    return reaction(conv, image(conv.in_channels, len(conv.kernel_size)), (slice(None), channel))


def writes(conv: nn.Module, channel: int) -> Tensor:
    return conv(image(conv.in_channels, len(conv.kernel_size)))[:, channel].abs().max()


def gates(w: Tensor, hidden: int) -> list[Tensor]:
    """The units of a recurrent matrix: row h of each gate."""
    return [mask_of(w, *range(h, len(w), hidden)) for h in range(hidden)]


def rows(w: Tensor) -> list[Tensor]:
    return [mask_of(w, i) for i in range(len(w))]


def columns(w: Tensor) -> list[Tensor]:
    return [mask_of(w, (slice(None), i)) for i in range(w.shape[1])]


def of_recurrent(layer: nn.Module) -> dict[str, list[Tensor]]:
    """Its rows of all gates for each hidden unit; of the projection of an LSTM, its rows."""
    return {
        name: rows(w) if "weight_hr" in name else gates(w, layer.hidden_size)
        for name, w in layer.named_parameters()
        if "weight" in name
    }


def hidden_state(layer: nn.Module, unit: int) -> Tensor:
    if isinstance(layer, nn.RNNCellBase):
        state = layer(sequence(layer.input_size)[:, 0])
        return (state[0] if isinstance(state, tuple) else state)[:, unit].abs().max()
    return layer(sequence(layer.input_size))[0][..., unit].abs().max()


def features_of(layer: nn.Module) -> dict[str, list[Tensor]]:
    return {name: columns(w) for name, w in layer.named_parameters() if "weight" in name}


def feature(layer: nn.Module, unit: int) -> Tensor:
    return reaction(lambda x: layer(x)[0], sequence(layer.input_size), (..., unit))


CASES = {
    "conv1d grouped, input": Units(lambda: nn.Conv1d(6, 4, 3, groups=2), "input", inputs_of, reads),
    "conv2d grouped, input": Units(lambda: nn.Conv2d(6, 8, 3, groups=2), "input", inputs_of, reads),
    "conv2d depthwise, input": Units(lambda: nn.Conv2d(8, 8, 3, groups=8), "input", inputs_of, reads),
    "conv2d depthwise twice, input": Units(lambda: nn.Conv2d(4, 8, 3, groups=4), "input", inputs_of, reads),
    "conv1d depthwise 1, input": Units(lambda: nn.Conv1d(4, 4, 1, groups=4), "input", inputs_of, reads),
    "conv2d plain, input": Units(lambda: nn.Conv2d(3, 4, 3), "input", inputs_of, reads),
    "conv2d grouped, output": Units(
        lambda: nn.Conv2d(6, 8, 3, groups=2, bias=False), "output", outputs_of, writes
    ),
    "conv2d depthwise, output": Units(
        lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), "output", outputs_of, writes
    ),
    "transposed1d grouped, output": Units(
        lambda: nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False), "output",
        lambda conv: {"weight": [written_by(conv, c) for c in range(4)]}, writes,
    ),
    "transposed2d grouped, output": Units(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), "output",
        lambda conv: {"weight": [written_by(conv, c) for c in range(6)]}, writes,
    ),
    "transposed2d depthwise, output": Units(
        lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), "output",
        lambda conv: {"weight": [written_by(conv, c) for c in range(4)]}, writes,
    ),
    "transposed2d grouped, input": Units(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "input", lambda conv: {"weight": rows(conv.weight)}, reads
    ),
    "lstm, output": Units(lambda: nn.LSTM(5, 6, bias=False, batch_first=True), "output", of_recurrent, hidden_state),
    "gru, output": Units(lambda: nn.GRU(5, 6, bias=False, batch_first=True), "output", of_recurrent, hidden_state),
    "rnn, output": Units(lambda: nn.RNN(5, 6, bias=False, batch_first=True), "output", of_recurrent, hidden_state),
    "lstm cell, output": Units(lambda: nn.LSTMCell(5, 6, bias=False), "output", of_recurrent, hidden_state),
    "gru cell, output": Units(lambda: nn.GRUCell(5, 6, bias=False), "output", of_recurrent, hidden_state),
    "lstm, input": Units(
        lambda: nn.LSTM(5, 6, batch_first=True), "input",
        lambda layer: {"weight_ih_l0": columns(layer.weight_ih_l0)}, feature, "weight_ih*",
    ),
    "lstm projected, output": Units(
        lambda: nn.LSTM(5, 6, bias=False, batch_first=True, proj_size=3), "output",
        lambda layer: {"weight_hr_l0": rows(layer.weight_hr_l0)}, hidden_state, "weight_hr*",
    ),
}  # fmt: skip


# Heads of attention


def without_bias(layer: nn.Module) -> nn.Module:
    """The layer with its biases at zero, in double precision, with weights large enough to matter."""
    layer.double()
    layer.eval()  # not every eval returns the layer
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            parameter.zero_() if "bias" in name else parameter.normal_() if "Norm" not in name else None
    return layer


def stacked(w: Tensor, heads: int, parts: int = 3, dim: int = 0) -> list[Tensor]:
    """Head h of each of some parts that are stacked along a dimension."""
    size = w.shape[dim] // parts // heads
    return [
        mask_of(w.transpose(0, dim), *(slice((p * heads + h) * size, (p * heads + h + 1) * size) for p in range(parts)))
        .transpose(0, dim)
        for h in range(heads)
    ]  # fmt: skip


def cut(w: Tensor, heads: int, dim: int = 0) -> list[Tensor]:
    """Consecutive parts along a dimension."""
    return stacked(w, heads, 1, dim)


HEADS = 4


def head_signal(run: Callable[[nn.Module], Tensor], projection: str, dim: int = 1):
    """Whether the output of an attention depends on a head: on the columns of the projection that read it."""

    def signal(layer: nn.Module, head: int) -> Tensor:
        w = layer.get_parameter(projection)
        return reaction_to_weight(lambda: run(layer), w, cut(w, HEADS, dim)[head])

    return signal


def config_of(name: str, **kw):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name + "Config")(**kw)
    config._attn_implementation = "eager"
    return config


def attention_of(module: str, name: str, *args) -> nn.Module:
    package = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    return getattr(package, name)(*args)


def rotary(size: int, length: int = 5) -> tuple[Tensor, Tensor]:
    """No rotation."""
    return torch.ones(1, length, size, dtype=torch.float64), torch.zeros(1, length, size, dtype=torch.float64)


WIDTH = 16
SIZE = WIDTH // HEADS
LLM = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 1, "intermediate_size": 24}


def on(x_to_output):
    """A run of a layer on the same sequence each time."""
    return lambda layer: x_to_output(layer, sequence(WIDTH))


def timm_attention(path: str, *args, **kw) -> nn.Module:
    module, _, name = path.rpartition(".")
    return getattr(pytest.importorskip(f"timm.{module}"), name)(*args, **kw)


def gpt2() -> nn.Module:
    config = config_of("GPT2", n_embd=WIDTH, n_head=HEADS, n_layer=1)
    return attention_of("gpt2", "GPT2Attention", config)


def gpt_neox() -> nn.Module:
    return attention_of("gpt_neox", "GPTNeoXAttention", config_of("GPTNeoX", **LLM), 0)


def bert() -> nn.Module:
    return attention_of("bert", "BertAttention", config_of("Bert", **LLM))


def bloom() -> nn.Module:
    return attention_of("bloom", "BloomAttention", config_of("Bloom", hidden_size=WIDTH, n_head=HEADS), 0)


def run_bloom(layer: nn.Module, x: Tensor) -> Tensor:
    position = torch.zeros(2 * HEADS, 1, 5, dtype=torch.float64)
    return layer(x, torch.zeros_like(x), position, torch.zeros(2, 1, 5, 5, dtype=torch.float64))[0]


def llama(key_value_heads: int) -> nn.Module:
    config = config_of("Llama", **LLM, num_key_value_heads=key_value_heads)
    return attention_of("llama", "LlamaAttention", config, 0)


def run_llama(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, rotary(SIZE), None)[0]


def modernbert() -> nn.Module:
    return attention_of("modernbert", "ModernBertAttention", config_of("ModernBert", **LLM, pad_token_id=0), 0)


def run_modernbert(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, position_embeddings=rotary(SIZE))[0]


run_self = on(lambda layer, x: layer(x, x, x)[0])
run_plain = on(lambda layer, x: layer(x))
run_first = on(lambda layer, x: layer(x)[0])
run_rotary = on(lambda layer, x: layer(x, None, position_embeddings=rotary(SIZE))[0])


def parts_of(*names: str):
    """Separate projections for q, k and v, each cut into heads."""
    return lambda layer: {name: cut(layer.get_parameter(name), HEADS) for name in names}


def stack_of(name: str, dim: int = 0):
    return lambda layer: {name: stacked(layer.get_parameter(name), HEADS, dim=dim)}


def cut_of(name: str, dim: int = 0):
    return lambda layer: {name: cut(layer.get_parameter(name), HEADS, dim)}


def t5() -> nn.Module:
    return attention_of("t5", "T5Attention", config_of("T5", d_model=WIDTH, d_kv=SIZE, num_heads=HEADS))


def distilbert() -> nn.Module:
    config = config_of("DistilBert", dim=WIDTH, n_heads=HEADS)
    return attention_of("distilbert", "DistilBertSelfAttention", config)


def phi3(key_value_heads: int) -> nn.Module:
    config = config_of("Phi3", **LLM, num_key_value_heads=key_value_heads, pad_token_id=0)
    return attention_of("phi3", "Phi3Attention", config, 0)


def bigcode_config(multi_query: bool):
    return config_of("GPTBigCode", n_embd=WIDTH, n_head=HEADS, n_layer=1, multi_query=multi_query)


def mpt() -> nn.Module:
    return attention_of("mpt", "MptAttention", config_of("Mpt", d_model=WIDTH, n_heads=HEADS), 0)


def run_mpt(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, torch.zeros(HEADS, 5, 5, dtype=torch.float64))[0]


def codegen() -> nn.Module:
    config = config_of("CodeGen", n_embd=WIDTH, n_head=HEADS, rotary_dim=SIZE)
    return attention_of("codegen", "CodeGenAttention", config, 0)


def run_codegen(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, rotary(layer.rotary_dim // 2)[::-1])[0]


def halo_signal(layer: nn.Module, head: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, WIDTH, 8, 8, generator=generator, dtype=torch.float64)
    return layer(x)[:, head * SIZE : (head + 1) * SIZE].abs().max()


ATTENTION = {
    "torch": Units(
        lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), Heads(HEADS), stack_of("in_proj_weight"),
        head_signal(run_self, "out_proj.weight"),
    ),
    "torch, other widths": Units(
        lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, kdim=7, vdim=9), Heads(HEADS),
        parts_of("q_proj_weight", "k_proj_weight", "v_proj_weight"),
        head_signal(on(lambda m, x: m(x, x[..., :7], x[..., :9])[0]), "out_proj.weight"),
    ),
    "timm": Units(
        lambda: timm_attention("layers.Attention", WIDTH, HEADS), Heads(HEADS), stack_of("qkv.weight"),
        head_signal(run_plain, "proj.weight"),
    ),
    "timm swin": Units(
        lambda: timm_attention("models.swin_transformer.WindowAttention", WIDTH, HEADS, window_size=(1, 5)),
        Heads(HEADS), stack_of("qkv.weight"), head_signal(run_plain, "proj.weight"),
    ),
    "gpt2": Units(
        gpt2, Heads(HEADS), stack_of("c_attn.weight", dim=1), head_signal(run_first, "c_proj.weight", dim=0)
    ),
    "gpt_neox": Units(
        gpt_neox, Heads(HEADS), cut_of("query_key_value.weight"), head_signal(run_rotary, "dense.weight")
    ),
    "bloom": Units(
        bloom, Heads(HEADS), cut_of("query_key_value.weight"), head_signal(on(run_bloom), "dense.weight")
    ),
    "bert": Units(
        bert, Heads(HEADS), parts_of("self.query.weight", "self.key.weight", "self.value.weight"),
        head_signal(run_first, "output.dense.weight"),
    ),
    "llama": Units(
        lambda: llama(HEADS), Heads(HEADS), parts_of("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        head_signal(on(run_llama), "o_proj.weight"),
    ),
    "t5": Units(
        t5, Heads(HEADS), parts_of("q.weight", "k.weight", "v.weight"), head_signal(run_first, "o.weight")
    ),
    "distilbert": Units(
        distilbert, Heads(HEADS), parts_of("q_lin.weight", "k_lin.weight", "v_lin.weight"),
        head_signal(run_first, "out_lin.weight"),
    ),
    "phi3": Units(
        lambda: phi3(HEADS), Heads(HEADS), stack_of("qkv_proj.weight"), head_signal(on(run_llama), "o_proj.weight")
    ),
    "mpt": Units(mpt, Heads(HEADS), stack_of("Wqkv.weight"), head_signal(on(run_mpt), "out_proj.weight")),
    "modernbert": Units(
        modernbert, Heads(HEADS), stack_of("Wqkv.weight"), head_signal(on(run_modernbert), "Wo.weight")
    ),
}  # fmt: skip

# Their names are those of stacks, and they lie otherwise: head by head, q, k and v of each together.
LIKE_STACKS = {
    "timm tiny_vit": Units(
        lambda: timm_attention("models.tiny_vit.Attention", WIDTH, 3, HEADS, 2, (1, 5)),
        Heads(HEADS), cut_of("qkv.weight"), head_signal(run_plain, "proj.weight"),
    ),
    "timm levit": Units(
        lambda: timm_attention("models.levit.Attention", WIDTH, 3, HEADS, 2.0, resolution=(1, 5)),
        Heads(HEADS), cut_of("qkv.linear.weight"), head_signal(run_plain, "proj.ln.linear.weight"),
    ),
    "timm coatnet": Units(
        lambda: timm_attention("models.maxxvit.Attention2d", WIDTH, dim_head=SIZE),
        Heads(HEADS), cut_of("qkv.weight"), head_signal(lambda layer: layer(image(WIDTH)), "proj.weight"),
    ),
    "gpt_bigcode": Units(
        lambda: attention_of("gpt_bigcode", "GPTBigCodeAttention", bigcode_config(False)),
        Heads(HEADS), cut_of("c_attn.weight"), head_signal(run_first, "c_proj.weight"),
    ),
    "timm efficientformer": Units(
        lambda: timm_attention("models.efficientformer.Attention", WIDTH, 3, HEADS, 2, 2),
        Heads(HEADS), cut_of("qkv.weight"),
        head_signal(lambda layer: layer(sequence(WIDTH, 4)), "proj.weight"),
    ),
    "timm halo": Units(
        lambda: timm_attention("layers.halo_attn.HaloAttn", WIDTH, num_heads=HEADS, dim_head=SIZE),
        Heads(HEADS), parts_of("q.weight", "kv.weight"), halo_signal,
    ),
    "codegen": Units(
        codegen, Heads(HEADS), cut_of("qkv_proj.weight"), head_signal(on(run_codegen), "out_proj.weight"),
    ),
    "minimax": Units(
        lambda: attention_of("minimax", "MiniMaxLightningAttention", config_of("MiniMax", **LLM), 0),
        Heads(HEADS), cut_of("qkv_proj.weight"), head_signal(on(run_llama), "out_proj.weight"),
    ),
}  # fmt: skip

EVERY = {**CASES, **{f"attention of {name}": case for name, case in ATTENTION.items()}}


@pytest.mark.parametrize("name", EVERY)
def test_the_value_of_group_lasso_is_the_sum_over_the_layers_units(name):
    case = EVERY[name]
    layer = without_bias(case.make())
    penalty = GroupLasso(layer, 1.0, groups=case.groups, select=case.select)
    members = case.members(layer)
    assert {parameter for parameter, _ in penalty.named_parameters_penalized()} == set(members)
    torch.testing.assert_close(penalty().detach(), sum_of_norms(layer, members))
    assert all((torch.stack(units).sum(0) == 1).all() for units in members.values()), "the loop's own: a partition"


@pytest.mark.parametrize("name", EVERY)
def test_the_prox_shrinks_each_unit_by_its_norm(name):
    case = EVERY[name]
    layer = without_bias(case.make())
    expected = {}
    for parameter, units in case.members(layer).items():
        w = layer.get_parameter(parameter).detach()
        median = torch.stack([w[unit].norm() for unit in units]).median()
        t = 0.9 * median / math.sqrt(int(units[0].sum()))
        expected[parameter] = w.clone()
        for unit in units:
            expected[parameter][unit] *= (1 - t * math.sqrt(int(unit.sum())) / w[unit].norm()).clamp_min(0)
        GroupLasso(layer, 1.0, groups=case.groups, select=parameter).prox_(t.item())
        torch.testing.assert_close(w, expected[parameter])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("unit", [1, -1])
def test_a_unit_is_reported_as_zero_exactly_when_it_has_ceased(name, unit):
    case = EVERY[name]
    layer = without_bias(case.make())
    penalty = GroupLasso(layer, 1.0, groups=case.groups, select=case.select)
    members = case.members(layer)
    unit %= len(next(iter(members.values())))
    assert case.signal(layer, unit) > 0
    assert penalty.zero_groups() == {parameter: [] for parameter in members}
    for parameter, units in members.items():
        layer.get_parameter(parameter).data[units[unit]] = 0
    assert case.signal(layer, unit) == 0
    assert penalty.zero_groups() == each(members, unit)
    counts = [row.split()[-1] for row in penalty.summary().splitlines()[1:-1]]
    assert sorted(counts) == sorted(f"1/{len(units)}" for units in members.values())


@pytest.mark.parametrize("name", CASES)
def test_dead_units_lists_the_units_that_the_penalty_groups(name):
    case = CASES[name]
    layer = without_bias(case.make())
    penalty = GroupLasso(layer, 1.0, groups=case.groups, select=case.select)
    members = case.members(layer)
    for parameter, units in members.items():
        layer.get_parameter(parameter).data[units[2]] = 0
    assert dead_units(penalty) == each(members, 2)
    if case.groups == "output":
        assert dead_units(layer, select=case.select) == each(members, 2)


@pytest.mark.parametrize("name", LIKE_STACKS)
def test_heads_that_lie_one_by_one_under_a_stacks_name_are_read_right_or_refused(name):
    case = LIKE_STACKS[name]
    layer = without_bias(case.make())
    members = case.members(layer)
    expected = sum_of_norms(layer, members)
    try:
        value = GroupLasso(layer, 1.0, groups=case.groups)()
    except ValueError:
        value = expected
    assert case.signal(layer, 2) > 0
    for parameter, units in members.items():
        layer.get_parameter(parameter).data[units[2]] = 0
    assert case.signal(layer, 2) == 0
    torch.testing.assert_close(value, expected)


FEWER_KEYS = {
    "phi3": lambda: phi3(2),
    "gpt_bigcode": lambda: attention_of("gpt_bigcode", "GPTBigCodeAttention", bigcode_config(True)),
    "falcon": lambda: attention_of("falcon", "FalconAttention", config_of("Falcon", **LLM, multi_query=True), 0),
}


@pytest.mark.parametrize("name", FEWER_KEYS)
def test_a_fused_projection_whose_queries_share_keys_is_refused(name):
    with pytest.raises(ValueError, match="share keys and values"):
        GroupLasso(FEWER_KEYS[name](), 1.0, groups=Heads(HEADS))


@pytest.mark.parametrize("name", ["torch", "timm", "timm swin", "gpt2", "gpt_neox", "bloom", "modernbert"])
def test_rows_of_three_different_heads_make_no_head(name):
    """The rows of q of head 0, of k of head 1 and of v of head 2: as many as a head has."""
    case = ATTENTION[name]
    layer = without_bias(case.make())
    penalty = GroupLasso(layer, 1.0, groups=case.groups)
    ((parameter, units),) = case.members(layer).items()
    dim = 1 if name == "gpt2" else 0
    for head in range(3):
        lines = units[head].any(1 - dim).nonzero().flatten()
        layer.get_parameter(parameter).data.index_fill_(dim, lines.tensor_split(3)[head], 0.0)
    assert penalty.zero_groups() == {parameter: []}


# Recurrent units span two matrices


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell], ids=lambda make: make.__name__)
def test_a_recurrent_unit_is_dead_only_where_both_of_its_matrices_are_zero(make):
    layer = make(5, 6, bias=False).double()
    names = [name for name, _ in layer.named_parameters()]
    for zeroed, dead in ((names[0], {}), (names[1], each(names, 2))):
        layer.get_parameter(zeroed).data[gates(layer.get_parameter(zeroed), 6)[2]] = 0
        assert dead_units(layer) == dead
        assert (hidden_state(layer, 2) == 0) == (bool(dead) or isinstance(layer, nn.RNNCellBase))


def test_recurrent_units_of_each_layer_and_direction_are_their_own():
    layer = nn.LSTM(5, 6, num_layers=2, bidirectional=True, bias=False)
    for name, unit in (("ih_l0", 1), ("hh_l0_reverse", 1), ("ih_l1", 3), ("hh_l1", 3), ("hh_l1_reverse", 3)):
        w = layer.get_parameter(f"weight_{name}")
        w.data[gates(w, 6)[unit]] = 0
    assert dead_units(layer) == {"weight_ih_l1": [3], "weight_hh_l1": [3]}


def test_one_gate_of_a_recurrent_unit_is_no_unit():
    layer = nn.LSTM(5, 6)
    layer.weight_ih_l0.data[2] = layer.weight_hh_l0.data[2] = 0
    assert dead_units(layer) == {}
    assert GroupLasso(layer, 1.0).zero_groups() == {"weight_ih_l0": [], "weight_hh_l0": []}


# Depthwise blocks, projections, experts


def test_the_depthwise_filter_of_a_mobilenet_block_is_a_unit_of_its_input():
    mobilenet = pytest.importorskip("torchvision.models.mobilenetv2")
    block = mobilenet.InvertedResidual(6, 6, 1, 2).double().eval()
    expand, depthwise, project = (m for m in block.modules() if isinstance(m, nn.Conv2d))
    penalty = GroupLasso(block, 1.0, groups="input")
    expected = sum(sum_of_norms(conv, inputs_of(conv)) for conv in (expand, depthwise, project))
    torch.testing.assert_close(penalty().detach(), expected)

    def signal() -> Tensor:
        return reaction_to_weight(lambda: block(image(6)), expand.weight, 4)

    (name,) = (name for name, w in block.named_parameters() if w is depthwise.weight)
    assert signal() > 0
    depthwise.weight.data[4] = 0
    assert signal() == 0
    assert penalty.zero_groups()[name] == [4]
    assert dead_units(penalty) == {name: [4]}
    assert dead_units(block) == {name: [4]}


PROJECTIONS = {
    "torch": (ATTENTION["torch"].make, "out_proj.weight", 1, run_self, "in_proj_weight"),
    "timm": (ATTENTION["timm"].make, "proj.weight", 1, run_plain, "qkv.weight"),
    "gpt2": (gpt2, "c_proj.weight", 0, run_first, "c_attn.weight"),
    "gpt_neox": (gpt_neox, "dense.weight", 1, run_rotary, "query_key_value.weight"),
    "bert": (bert, "output.dense.weight", 1, run_first, "self.value.weight"),
    "llama": (lambda: llama(2), "o_proj.weight", 1, on(run_llama), "q_proj.weight"),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_heads_of_a_selected_output_projection_are_what_it_reads_of_each(name):
    make, projection, dim, run, source = PROJECTIONS[name]
    layer = without_bias(make())
    w = layer.get_parameter(projection)
    units = cut(w, HEADS, dim)
    penalty = GroupLasso(layer, 1.0, groups=Heads(HEADS), select=projection)
    torch.testing.assert_close(penalty().detach(), sum_of_norms(layer, {projection: units}))

    rows_of_head = ATTENTION[name].members(layer)[source][2] if name != "llama" else cut(layer.q_proj.weight, HEADS)[2]
    assert reaction_to_weight(lambda: run(layer), layer.get_parameter(source), rows_of_head) > 0
    w.data[units[2]] = 0
    assert reaction_to_weight(lambda: run(layer), layer.get_parameter(source), rows_of_head) == 0
    assert penalty.zero_groups() == {projection: [2]}


def test_grouped_queries_have_as_many_heads_as_there_are_keys_and_values():
    layer = without_bias(llama(2))
    units = {
        "q_proj.weight": cut(layer.q_proj.weight, HEADS),
        "k_proj.weight": cut(layer.k_proj.weight, 2),
        "v_proj.weight": cut(layer.v_proj.weight, 2),
    }
    penalty = GroupLasso(layer, 1.0, groups=Heads(HEADS))
    torch.testing.assert_close(penalty().detach(), sum_of_norms(layer, units))
    signal = head_signal(on(run_llama), "o_proj.weight")
    layer.v_proj.weight.data[units["v_proj.weight"][1]] = 0
    assert [bool(signal(layer, head) > 0) for head in range(HEADS)] == [True, True, False, False]
    assert penalty.zero_groups() == {"q_proj.weight": [], "k_proj.weight": [], "v_proj.weight": [1]}


def block(name: str, module: str, layer: str, **config) -> Callable[[], nn.Module]:
    """A whole layer of a transformer, its feed-forward part included."""
    return lambda: attention_of(module, layer, config_of(name, **config), 0)


BLOCKS = {
    "bert": (block("Bert", "bert", "BertLayer", **LLM), "attention.self.{query,key,value}.weight"),
    "gpt2": (block("GPT2", "gpt2", "GPT2Block", n_embd=WIDTH, n_head=HEADS), "attn.c_attn.weight"),
    "gpt_neox": (block("GPTNeoX", "gpt_neox", "GPTNeoXLayer", **LLM), "attention.query_key_value.weight"),
    "llama": (block("Llama", "llama", "LlamaDecoderLayer", **LLM), "self_attn.{q,k,v}_proj.weight"),
    "timm": (lambda: timm_attention("models.vision_transformer.Block", WIDTH, HEADS), "attn.qkv.weight"),
    "torch": (lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 24), "self_attn.in_proj_weight"),
}


def spelled_out(name: str) -> list[str]:
    """`a.{b,c}.d` as `a.b.d` and `a.c.d`."""
    before, brace, rest = name.partition("{")
    choices, _, after = rest.partition("}")
    return [before + choice + after for choice in choices.split(",")] if brace else [name]


@pytest.mark.parametrize("name", BLOCKS)
def test_heads_are_those_of_attention_and_feed_forward_layers_have_none(name):
    make, projections = BLOCKS[name]
    penalty = GroupLasso(make(), 1.0, groups=Heads(HEADS))
    assert {parameter for parameter, _ in penalty.named_parameters_penalized()} == set(spelled_out(projections))


# In whole models: the heads, and the projections to q, k and v that have them.
HEADED = {
    "timm.vit": (2, ["*.attn.qkv.weight"]),
    "timm.vit_map": (2, ["*.attn.qkv.weight", "attn_pool.{q,kv}.weight"]),
    "timm.eva02": (2, ["*.attn.qkv.weight"]),
    "timm.cait": (2, ["*.attn.qkv.weight", "*.attn.{q,k,v}.weight"]),
    "timm.swin": (2, ["*.attn.qkv.weight"]),
    "timm.swinv2": (2, ["*.attn.qkv.weight"]),
    "torchvision.vit": (2, ["*.in_proj_weight"]),
    "torchvision.swin": (2, ["*.attn.qkv.weight"]),
    "transformers.bert": (4, ["*.self.{query,key,value}.weight"]),
    "transformers.distilbert": (4, ["*.attention.{q,k,v}_lin.weight"]),
    "transformers.albert": (4, ["*.attention.{query,key,value}.weight"]),
    "transformers.deberta_v2": (4, ["*.self.{query,key,value}_proj.weight"]),
    "transformers.modernbert": (4, ["*.attn.Wqkv.weight"]),
    "transformers.t5": (4, ["*Attention.{q,k,v}.weight"]),
    "transformers.bart": (4, ["*_attn.{q,k,v}_proj.weight"]),
    "transformers.gpt2": (4, ["*.attn.c_attn.weight"]),
    "transformers.gpt_neox": (4, ["*.attention.query_key_value.weight"]),
    "transformers.gptj": (4, ["*.attn.{q,k,v}_proj.weight"]),
    "transformers.bloom": (4, ["*.self_attention.query_key_value.weight"]),
    "transformers.llama": (4, ["*.self_attn.{q,k,v}_proj.weight"]),
    "transformers.phi": (4, ["*.self_attn.{q,k,v}_proj.weight"]),
    "transformers.mixtral": (4, ["*.self_attn.{q,k,v}_proj.weight"]),
    "transformers.gpt_oss": (4, ["*.self_attn.{q,k,v}_proj.weight"]),
    "transformers.vit": (4, ["*.attention.{q,k,v}_proj.weight"]),
    "transformers.swinv2": (2, ["*.self.{query,key,value}.weight"]),
    "transformers.sam": (4, ["*.attn.qkv.weight", "*attn*.{q,k,v}_proj.weight"]),
    "transformers.siglip": (4, ["*.self_attn.{q,k,v}_proj.weight", "*.attention.in_proj_weight"]),
    "transformers.clip": (4, ["*.self_attn.{q,k,v}_proj.weight"]),
    "transformers.wav2vec2": (4, ["*.attention.{q,k,v}_proj.weight"]),
    "transformers.whisper": (4, ["*_attn.{q,k,v}_proj.weight"]),
    "torch.transformer": (2, ["*attn.in_proj_weight"]),
}


@pytest.mark.parametrize("name", HEADED)
def test_heads_of_a_model_are_the_projections_to_q_k_and_v(name):
    model = built(name)
    heads, globs = HEADED[name]
    globs = [spelled for glob in globs for spelled in spelled_out(glob)]
    penalty = GroupLasso(model, 1.0, groups=Heads(heads))
    taken = {parameter for parameter, _ in penalty.named_parameters_penalized()}
    named = {parameter for parameter, _ in model.named_parameters()}
    assert taken == {parameter for parameter in named if any(fnmatchcase(parameter, glob) for glob in globs)}


@pytest.mark.parametrize("name", ["timm.resnet", "timm.nfnet", "timm.mixer", "transformers.mamba", "torch.lstm"])
def test_a_model_without_attention_has_no_heads(name):
    with pytest.raises(ValueError, match="attention"):
        GroupLasso(built(name), 1.0, groups=Heads(1))


EXPERTS, INNER = 3, 6
NAMES = ["gate_up_proj", "down_proj"]


def mixtral() -> nn.Module:
    config = config_of("Mixtral", hidden_size=8, intermediate_size=INNER, num_local_experts=EXPERTS)
    return attention_of("mixtral", "MixtralExperts", config)


def gpt_oss() -> nn.Module:
    config = config_of("GptOss", hidden_size=8, intermediate_size=INNER, num_local_experts=EXPERTS)
    return attention_of("gpt_oss", "GptOssExperts", config)


def llama4() -> nn.Module:
    config = config_of("Llama4Text", hidden_size=8, intermediate_size=INNER, num_local_experts=EXPERTS)
    return attention_of("llama4", "Llama4TextExperts", config)


def run_experts(layer: nn.Module, x: Tensor) -> Tensor:
    """Each token goes to all experts."""
    tokens = x.flatten(0, 1)
    if "Llama4" in type(layer).__name__:
        return layer(tokens.repeat(EXPERTS, 1))
    chosen = torch.arange(EXPERTS).expand(len(tokens), EXPERTS)
    return layer(tokens, chosen, torch.ones(len(tokens), EXPERTS, dtype=torch.float64))


# And the dimension of output units; which of those of the first matrix is the gate of an inner unit.
LAYOUTS = {"mixtral": (mixtral, 1, 1), "gpt_oss": (gpt_oss, 2, 2), "llama4": (llama4, 2, 1)}


def within_experts(w: Tensor, dim: int) -> list[Tensor]:
    """A unit for each index along a dimension within each expert."""
    return [mask_of(w, (e, i) if dim == 1 else (e, slice(None), i)) for e in range(len(w)) for i in range(w.shape[dim])]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("groups", ["output", "input"])
def test_units_of_experts_lie_within_each_expert(name, groups):
    make, dim, _ = LAYOUTS[name]
    layer = without_bias(make())
    penalty = GroupLasso(layer, 1.0, groups=groups)
    along = dim if groups == "output" else 3 - dim
    units = {parameter: within_experts(layer.get_parameter(parameter), along) for parameter in NAMES}
    torch.testing.assert_close(penalty().detach(), sum_of_norms(layer, units))
    for parameter, masks in units.items():
        layer.get_parameter(parameter).data[masks[7]] = 0
    assert penalty.zero_groups() == each(NAMES, 7)
    assert dead_units(penalty) == each(NAMES, 7)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dead_unit_of_an_expert_does_nothing_there(name):
    make, dim, stride = LAYOUTS[name]
    layer = without_bias(make())
    expert, unit = 1, 2
    gate = stride * unit  # gates come first, or take turns with what they gate
    read = (expert, slice(None), unit) if dim == 1 else (expert, unit)

    def signal() -> Tensor:
        return reaction_to_weight(lambda: run_experts(layer, sequence(8)), layer.down_proj, read)

    assert signal() > 0
    layer.gate_up_proj.data[(expert, gate) if dim == 1 else (expert, slice(None), gate)] = 0
    assert signal() == 0
    assert dead_units(layer) == {"gate_up_proj": [expert * 2 * INNER + gate]}


def test_a_convolution_among_experts_has_the_units_of_a_convolution():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Conv1d(4, 6, 3), nn.Bilinear(3, 4, 5)])})
    units = {f"experts.{i}.weight": rows(layer.weight) for i, layer in enumerate(model["experts"])}
    torch.testing.assert_close(GroupLasso(model, 1.0)().detach(), sum_of_norms(model, units))
