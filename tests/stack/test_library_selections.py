"""The default selection, beside what the libraries of many architectures decay."""

from fnmatch import fnmatchcase

import pytest
from helpers.zoo import ZOO, built

from torch_regpen import L1

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
