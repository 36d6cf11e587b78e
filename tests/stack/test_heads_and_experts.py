"""Heads of whole models, their projections, and the units of experts."""

from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
import torch
from helpers.attention import (
    ATTENTION,
    HEADS,
    LLM,
    WIDTH,
    attention_of,
    bert,
    config_of,
    cut,
    gpt2,
    gpt_neox,
    head_signal,
    llama,
    on,
    run_first,
    run_llama,
    run_plain,
    run_rotary,
    run_self,
    timm_attention,
    without_bias,
)
from helpers.units import each, image, inputs_of, mask_of, reaction_to_weight, rows, sequence, sum_of_norms
from helpers.zoo import built
from torch import Tensor, nn

from torch_regpen import GroupLasso
from torch_regpen.export import dead_units
from torch_regpen.groups import Heads

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
