"""Attention layers of torch, timm and transformers: what the heads of each are, and what shows that one has ceased."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers.units import Units, image, mask_of, reaction_to_weight, sequence
from torch_regpen.groups import Heads


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
