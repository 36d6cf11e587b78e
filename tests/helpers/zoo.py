"""Models of many architectures, built from their configurations alone, and which weights their own libraries decay.

Nothing is downloaded. Where a configuration cannot be made small the model is built on the meta device.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

NORMALIZATIONS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)
EMBEDDINGS = ("class_token", "position_embedding", "relative_position_bias_table")


class Architecture(NamedTuple):
    """How a model is made, and the names of those of its parameters that its own library decays."""

    make: Callable[[], nn.Module]
    decayed: Callable[[nn.Module], set[str]]


def decayed_by_timm(model: nn.Module) -> set[str]:
    """What timm's optimizers decay: their parameter groups with the model's own list of exceptions."""
    optim = pytest.importorskip("timm.optim")
    exceptions = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = optim.param_groups_weight_decay(model, weight_decay=1.0, no_weight_decay_list=exceptions)
    decayed = {parameter for group in groups if group["weight_decay"] for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if parameter in decayed}


def decayed_by_transformers(model: nn.Module) -> set[str]:
    """What the Trainer of transformers decays, less what a model's authors have marked."""
    transformers = pytest.importorskip("transformers")
    names = set(transformers.Trainer.get_decay_parameter_names(None, model))
    return {
        name
        for name, parameter in model.named_parameters()
        if name in names and parameter.requires_grad and not getattr(parameter, "_no_weight_decay", False)
    }


def decayed_by_torchvision(model: nn.Module) -> set[str]:
    """What the recipes of torchvision's references decay (`utils.set_weight_decay` in references/classification).

    Its Swin is trained with `--norm-weight-decay 0 --bias-weight-decay 0 --transformer-embedding-decay 0`.
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and not isinstance(module, NORMALIZATIONS) and name not in ("bias", *EMBEDDINGS)
    }


def decayed_by_hand(model: nn.Module) -> set[str]:
    """What is to be decayed of torch's own layers, which have no list: all but norms and what is named a bias."""
    return {name for name in decayed_by_torchvision(model) if "bias" not in name.rpartition(".")[2]}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that transformers logs for configurations of small models."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def of_timm(name: str, **size: Any) -> Architecture:
    """A model of timm, on the meta device."""

    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **size)

    return Architecture(make, decayed_by_timm)


def of_transformers(name: str, head: str = "Model", **config: Any) -> Architecture:
    """A small model of transformers: `NAMEModel` or another head, with the given `NAMEConfig`."""

    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        with quiet():
            return getattr(transformers, name + head)(getattr(transformers, name + "Config")(**config))

    return Architecture(make, decayed_by_transformers)


def of_torchvision(path: str, *args: Any, **kw: Any) -> Architecture:
    """A model of torchvision.models, on the meta device."""

    def make() -> nn.Module:
        pytest.importorskip("torchvision")
        module, _, name = f"torchvision.models.{path}".rpartition(".")
        with torch.device("meta"):
            return getattr(importlib.import_module(module), name)(*args, **kw)

    return Architecture(make, decayed_by_torchvision)


def of_torch(make: Callable[[], nn.Module]) -> Architecture:
    """Layers of torch itself."""
    return Architecture(make, decayed_by_hand)


def marked_mamba() -> nn.Module:
    """A Mamba with the marks that its authors set (state-spaces/mamba, mamba_simple.py)."""
    model = of_transformers("Mamba", **STATE_SPACE).make()
    for name, parameter in model.named_parameters():
        if name.endswith((".A_log", ".D")):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return model


def modified(make: Callable[[], nn.Module], change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """Another way to make a model: the model that `make` gives, after a change in place."""

    def changed() -> nn.Module:
        model = make()
        change(model)
        return model

    return changed


def freeze_backbone(model: nn.Module) -> None:
    for parameter in model.features.parameters():
        parameter.requires_grad = False


PATCHES = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
WINDOWS = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "num_classes": 3}
STAGES = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8), "num_classes": 3}

LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**LAYERS, "vocab_size": 50, "max_position_embeddings": 20, "pad_token_id": 0}
GROUPED_QUERY = {**TEXT, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 20, "vocab_size": 50}
IMAGE = {**LAYERS, "image_size": 32, "patch_size": 8}
SHIFTED_WINDOWS = {
    "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
CONV_STAGES = {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1]}
STATE_SPACE = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "state_size": 4}
ENCODER_DECODER = {
    "d_model": 32, "vocab_size": 50, "pad_token_id": 0,
    **{f"{side}_{name}": n for side in ("encoder", "decoder")
       for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))},
}  # fmt: skip
SPEECH = {
    **LAYERS, "conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SEGMENT_ANYTHING = {
    "vision_config": {**LAYERS, "image_size": 64, "patch_size": 8, "output_channels": 8, "window_size": 4,
                      "global_attn_indexes": [0], "num_pos_feats": 8, "mlp_dim": 48},
    "mask_decoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "mlp_dim": 48,
                            "iou_head_hidden_dim": 16},
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
}  # fmt: skip

ZOO: dict[str, Architecture] = {
    # timm: transformers of images
    "timm.vit": of_timm("vit_tiny_patch16_224", **PATCHES),
    "timm.vit_map": of_timm("vit_base_patch16_siglip_224", **PATCHES),
    "timm.vit_relpos": of_timm("vit_relpos_small_patch16_224", **PATCHES),
    "timm.deit_distilled": of_timm("deit_tiny_distilled_patch16_224", **PATCHES),
    "timm.dinov2": of_timm("vit_small_patch14_reg4_dinov2", **{**PATCHES, "img_size": 28}),
    "timm.eva02": of_timm("eva02_tiny_patch14_224", **{**PATCHES, "img_size": 28}),
    "timm.beit": of_timm("beit_base_patch16_224", **PATCHES),
    "timm.cait": of_timm("cait_xxs24_224", **PATCHES),
    "timm.swin": of_timm("swin_tiny_patch4_window7_224", **WINDOWS),
    "timm.swinv2": of_timm("swinv2_tiny_window8_256", **WINDOWS),
    "timm.mvitv2": of_timm("mvitv2_tiny"),
    "timm.sam": of_timm(
        "samvit_base_patch16", img_size=64, embed_dim=16, depth=2, num_heads=2, global_attn_indexes=(1,)
    ),
    "timm.levit": of_timm("levit_128s"),
    "timm.xcit": of_timm("xcit_nano_12_p16_224"),
    "timm.coatnet": of_timm("coatnet_0_rw_224"),
    "timm.crossvit": of_timm("crossvit_9_240"),
    # timm: convolutions and others
    "timm.resnet": of_timm("resnet18"),
    "timm.nf_resnet": of_timm("nf_resnet26"),
    "timm.nfnet": of_timm("dm_nfnet_f0"),
    "timm.convnext": of_timm("convnext_atto", **STAGES),
    "timm.convnextv2": of_timm("convnextv2_atto", **STAGES),
    "timm.mobilenetv2": of_timm("mobilenetv2_035"),
    "timm.mobilenetv3": of_timm("mobilenetv3_small_050"),
    "timm.efficientnet": of_timm("efficientnet_b0"),
    "timm.densenet": of_timm("densenet121", growth_rate=4, block_config=(1, 1, 1, 1)),
    "timm.regnet": of_timm("regnety_002"),
    "timm.fastvit": of_timm("fastvit_t8"),
    "timm.mixer": of_timm("mixer_s32_224"),
    "timm.resmlp": of_timm("resmlp_12_224"),
    # torchvision
    "torchvision.resnet": of_torchvision("resnet18"),
    "torchvision.mobilenet_v2": of_torchvision("mobilenet_v2"),
    "torchvision.mobilenet_v2_frozen": Architecture(
        modified(of_torchvision("mobilenet_v2").make, freeze_backbone), decayed_by_torchvision
    ),
    "torchvision.mobilenet_v3": of_torchvision("mobilenet_v3_small"),
    "torchvision.efficientnet": of_torchvision("efficientnet_b0"),
    "torchvision.densenet": of_torchvision("densenet.DenseNet", 4, (1, 1, 1, 1)),
    "torchvision.convnext": of_torchvision("convnext_tiny"),
    "torchvision.vit": of_torchvision("vision_transformer.VisionTransformer", 32, 8, 1, 2, 16, 32),
    "torchvision.swin": of_torchvision("swin_transformer.SwinTransformer", [4, 4], 8, [1, 1], [2, 2], [4, 4]),
    "torchvision.swin_v2": of_torchvision("swin_v2_t"),
    "torchvision.mvit_v2": of_torchvision("video.mvit_v2_s"),
    "torchvision.fasterrcnn": of_torchvision(
        "detection.fasterrcnn_mobilenet_v3_large_320_fpn", weights=None, weights_backbone=None
    ),
    # transformers: text
    "transformers.bert": of_transformers("Bert", "ForMaskedLM", **TEXT),
    "transformers.distilbert": of_transformers(
        "DistilBert", dim=32, n_layers=1, n_heads=4, hidden_dim=48, vocab_size=50, max_position_embeddings=20
    ),
    "transformers.albert": of_transformers("Albert", **TEXT, embedding_size=16),
    "transformers.deberta_v2": of_transformers(
        "DebertaV2",
        **TEXT,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=False,
        pos_att_type=["p2c", "c2p"],
        conv_kernel_size=3,
    ),
    "transformers.modernbert": of_transformers("ModernBert", **TEXT),
    "transformers.xlnet": of_transformers("XLNet", d_model=32, n_layer=1, n_head=4, d_inner=48, vocab_size=50),
    "transformers.t5": of_transformers("T5", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=50),
    "transformers.bart": of_transformers("Bart", **ENCODER_DECODER, max_position_embeddings=20),
    "transformers.gpt2": of_transformers(
        "GPT2", "LMHeadModel", n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=20
    ),
    "transformers.gpt_neox": of_transformers("GPTNeoX", **TEXT),
    "transformers.gptj": of_transformers(
        "GPTJ", n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=20, rotary_dim=4
    ),
    "transformers.bloom": of_transformers("Bloom", hidden_size=32, n_layer=1, n_head=4, vocab_size=50),
    "transformers.llama": of_transformers("Llama", "ForCausalLM", **GROUPED_QUERY),
    "transformers.qwen2": of_transformers("Qwen2", **GROUPED_QUERY),
    "transformers.qwen3": of_transformers("Qwen3", **GROUPED_QUERY, head_dim=8),
    "transformers.gemma2": of_transformers("Gemma2", **GROUPED_QUERY, head_dim=8),
    "transformers.phi": of_transformers("Phi", **TEXT),
    "transformers.phi3": of_transformers("Phi3", **GROUPED_QUERY),
    "transformers.mixtral": of_transformers("Mixtral", **GROUPED_QUERY, num_local_experts=3),
    "transformers.gpt_oss": of_transformers(
        "GptOss", **GROUPED_QUERY, num_local_experts=3, head_dim=8, layer_types=["full_attention"]
    ),
    "transformers.deepseek_v3": of_transformers(
        "DeepseekV3",
        **GROUPED_QUERY,
        n_routed_experts=4,
        moe_intermediate_size=24,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
    ),
    "transformers.llama4": of_transformers(
        "Llama4Text", **GROUPED_QUERY, head_dim=8, num_local_experts=3, intermediate_size_mlp=48, moe_layers=[0]
    ),
    "transformers.mamba": of_transformers("Mamba", **STATE_SPACE),
    "transformers.mamba_marked": Architecture(marked_mamba, decayed_by_transformers),
    "transformers.falcon_mamba": of_transformers("FalconMamba", **STATE_SPACE),
    "transformers.mamba2": of_transformers("Mamba2", **STATE_SPACE, num_heads=8, head_dim=8, n_groups=1),
    # transformers: images and sound
    "transformers.vit": of_transformers("ViT", **IMAGE),
    "transformers.vit_mask": Architecture(
        lambda: pytest.importorskip("transformers").ViTModel(
            pytest.importorskip("transformers").ViTConfig(**IMAGE), use_mask_token=True
        ),
        decayed_by_transformers,
    ),
    "transformers.deit": of_transformers("DeiT", **IMAGE),
    "transformers.vit_mae": of_transformers(
        "ViTMAE",
        "ForPreTraining",
        **IMAGE,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
    ),
    "transformers.dinov2": of_transformers("Dinov2", **IMAGE),
    "transformers.dinov2_registers": of_transformers("Dinov2WithRegisters", **IMAGE, num_register_tokens=2),
    "transformers.beit": of_transformers("Beit", **IMAGE, use_relative_position_bias=True, use_mask_token=True),
    "transformers.swin": of_transformers("Swin", **SHIFTED_WINDOWS),
    "transformers.swinv2": of_transformers("Swinv2", **SHIFTED_WINDOWS),
    "transformers.convnext": of_transformers("ConvNext", **CONV_STAGES),
    "transformers.convnextv2": of_transformers("ConvNextV2", **CONV_STAGES),
    "transformers.resnet": of_transformers("ResNet", embedding_size=4, **CONV_STAGES),
    "transformers.segformer": of_transformers(
        "Segformer",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    "transformers.sam": of_transformers("Sam", **SEGMENT_ANYTHING),
    "transformers.clip": of_transformers("CLIP", text_config=TEXT, vision_config=IMAGE, projection_dim=16),
    "transformers.siglip": of_transformers("Siglip", text_config=TEXT, vision_config=IMAGE),
    "transformers.wav2vec2": of_transformers("Wav2Vec2", **SPEECH),
    "transformers.wavlm": of_transformers("WavLM", **SPEECH),
    "transformers.whisper": of_transformers(
        "Whisper", **ENCODER_DECODER, max_source_positions=20, max_target_positions=20, num_mel_bins=8
    ),
    # torch
    "torch.transformer": of_torch(lambda: nn.Transformer(16, 2, 1, 1, 24, batch_first=True)),
    "torch.attention_bias_kv": of_torch(lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True)),
    "torch.lstm": of_torch(lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=3)),
    "torch.gru": of_torch(lambda: nn.GRU(5, 6)),
    "torch.weight_norm": of_torch(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))),
    "torch.bilinear": of_torch(lambda: nn.Bilinear(3, 4, 1)),
}


@functools.cache
def built(name: str) -> nn.Module:
    """A model of the zoo, the same one each time: to be looked at, not changed."""
    return ZOO[name].make()
