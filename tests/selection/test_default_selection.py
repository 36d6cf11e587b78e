"""What a penalty takes when nothing is said, and how to say more: forms of `select` and `exclude`."""

import copy
import warnings

import pytest
import torch
from helpers.nets import holding, names
from torch import nn
from torch.nn.utils import parametrizations, prune

from torch_regpen import L1, GroupLasso
from torch_regpen.export import dead_units
from torch_regpen.groups import Heads


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 1))
        self.decoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)


# The rule


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 1),
        nn.Linear(1, 5),
        nn.Linear(1, 1),
        nn.Bilinear(1, 1, 3),
        nn.Conv2d(4, 4, 1, groups=4),
        nn.Conv1d(1, 1, 3),
        nn.ConvTranspose2d(3, 1, 1),
        nn.Embedding(5, 1),
        nn.EmbeddingBag(1, 5),
        nn.LSTM(1, 1),
        nn.GRUCell(1, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_weights_of_a_layer_that_multiplies_are_weights_of_any_shape(layer):
    assert names(L1(layer, 0.1)) == [name for name, _ in layer.named_parameters() if "bias" not in name]


@pytest.mark.parametrize(
    "name",
    ["bias", "bias_k", "q_bias", "gate_up_proj_bias", "relative_position_bias_table", "attention_biases", "pos_bias_u"],
)
def test_what_is_called_a_bias_is_none(name):
    assert names(L1(holding(w=(3, 4), **{name: (3, 4)}), 0.1)) == ["w"]


def test_the_biases_of_keys_and_values_in_attention_are_no_weights():
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert names(L1(attention, 0.1)) == ["in_proj_weight", "out_proj.weight"]


def test_a_weight_is_judged_by_its_own_last_name():
    model = nn.ModuleDict({"relative_attention_bias": nn.Embedding(8, 2)})  # as T5 has it
    assert names(L1(model, 0.1)) == ["relative_attention_bias.weight"]


@pytest.mark.parametrize(
    "name",
    ["cls_token", "mask_token", "register_tokens", "pos_embed", "pos_embedding", "position_embeddings", "abs_pos_emb"],
)
def test_tokens_and_position_embeddings_held_raw_are_no_weights(name):
    assert names(L1(holding(w=(3, 4), **{name: (1, 3, 4)}), 0.1)) == ["w"]


def test_a_position_embedding_that_is_a_layer_is_a_weight():
    assert names(L1(nn.ModuleDict({"position_embeddings": nn.Embedding(5, 4)}), 0.1)) == ["position_embeddings.weight"]


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), (1, 8), (8,), ()])
def test_the_scale_of_a_layer_is_no_weight_whatever_its_dimensions(shape):
    assert names(L1(holding(w=(3, 4), gamma=shape), 0.1)) == ["w"]


@pytest.mark.parametrize("name", ["RMSNorm", "T5LayerNorm", "LayerNorm2d", "GlobalResponseNorm", "rmsnorm"])
def test_a_norm_is_known_by_its_class_name(name):
    norm = type(name, (nn.Module,), {})()
    norm.scale = nn.Parameter(torch.ones(4, 4))
    assert names(L1(nn.Sequential(nn.Linear(4, 4), norm), 0.1)) == ["0.weight"]


def test_a_layer_that_multiplies_is_no_norm_for_its_name():
    for name in ("NormLinear", "NormalHead"):
        layer = type(name, (nn.Linear,), {})(4, 4)
        assert names(L1(layer, 0.1)) == ["weight"]
    head = type("NormalHead", (nn.Module,), {})()
    head.w = nn.Parameter(torch.ones(4, 4))
    assert names(L1(head, 0.1)) == ["w"]


class Listing(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.mixer = nn.Linear(4, 4)
        self.special = nn.ModuleDict({"a": nn.Linear(4, 4)})

    def no_weight_decay(self):
        return {"table", "special.*"}


def test_the_list_that_a_model_keeps_is_heeded_wherever_the_model_is():
    assert names(L1(Listing(), 0.1)) == ["mixer.weight"]
    assert names(L1(nn.ModuleDict({"backbone": Listing()}), 0.1)) == ["backbone.mixer.weight"]
    assert len(names(L1(Listing(), 0.1, select="all"))) == 5


def test_a_parameter_that_its_author_marked_is_no_weight():
    model = holding(A_log=(4, 4), w=(4, 4))
    model.A_log._no_weight_decay = True
    penalty = L1(model, 0.1)
    assert names(penalty) == ["w"]
    assert names(copy.deepcopy(penalty)) == ["w"]  # a copied parameter has no marks


def test_the_lengths_of_weight_norm_are_scales():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 1)), parametrizations.weight_norm(nn.Linear(1, 3)))
    assert names(L1(model, 0.1)) == [f"{i}.parametrizations.weight.original1" for i in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = torch.nn.utils.weight_norm(nn.Linear(3, 1))
    assert names(L1(old, 0.1)) == ["weight_v"]


def test_a_pruned_weight_is_a_weight():
    layer = prune.l1_unstructured(nn.Linear(3, 1), "weight", amount=1)
    assert names(L1(layer, 0.1)) == ["weight_orig"]


# `select` and `exclude`


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (
            nn.Linear,
            ["encoder.1.weight", "encoder.1.bias", "decoder.0.weight", "decoder.0.bias", "head.weight", "head.bias"],
        ),
        ((nn.Embedding, nn.Conv1d), ["encoder.0.weight", "encoder.3.weight", "encoder.3.bias"]),
        (("weights", nn.Linear), ["encoder.1.weight", "decoder.0.weight", "head.weight"]),
        (["weights", "encoder.*"], ["encoder.0.weight", "encoder.1.weight", "encoder.3.weight"]),
        (("weights", nn.Linear, "encoder.*", "decoder.*"), ["encoder.1.weight", "decoder.0.weight"]),
        (("weights", lambda name, p: "head" in name), ["head.weight"]),
        (("all", nn.LayerNorm, "*.bias"), ["encoder.2.bias", "decoder.1.bias"]),
    ],
)
def test_entries_of_one_form_are_alternatives_and_forms_must_all_hold(select, expected):
    assert names(L1(Encoder(), 0.1, select=select)) == expected
    everything = [name for name, _ in Encoder().named_parameters()]
    rest = [name for name in everything if name not in expected]
    assert names(L1(Encoder(), 0.1, select="all", exclude=select)) == rest


def test_exclude_is_taken_off_what_select_chose():
    model = Encoder()
    assert names(L1(model, 0.1, exclude=nn.Embedding)) == names(L1(model, 0.1))[1:]
    assert names(L1(model, 0.1, exclude="head.*")) == names(L1(model, 0.1))[:-1]
    assert names(L1(model, 0.1, exclude=("weights", nn.Linear))) == ["encoder.0.weight", "encoder.3.weight"]
    groups = [{"params": model.encoder, "exclude": nn.Embedding}, {"params": model.head}]
    assert names(L1(groups, 0.1)) == ["1.weight", "3.weight", "weight"]


def test_a_module_type_means_all_parameters_of_such_modules():
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    assert names(L1(model, 0.1, select=("weights", nn.MultiheadAttention))) == ["0.in_proj_weight", "0.out_proj.weight"]
    assert names(L1(model, 0.1, exclude=nn.MultiheadAttention)) == ["1.weight"]


def test_a_shared_parameter_is_excluded_under_each_of_its_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embedding"].weight
    assert names(L1(model, 0.1)) == ["embedding.weight", "body.weight"]
    for exclude in ("head.*", "embedding.*", nn.Embedding):
        assert names(L1(model, 0.1, exclude=exclude)) == ["body.weight"]


def test_an_exclude_that_matches_nothing_is_said():
    with pytest.warns(UserWarning, match="haed"):
        L1(Encoder(), 0.1, exclude="haed.*")


def test_an_exclude_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"exclude=.*matches none"):
        L1(Encoder(), 0.1, select="head.*", exclude="*")


@pytest.mark.parametrize("form", [3, [None], nn.Linear(2, 2), int, ["weights", [3]]])
def test_a_form_that_is_none_of_these_is_refused(form):
    for given in ({"select": form}, {"exclude": form}):
        with pytest.raises(TypeError, match="allowed are"):
            L1(Encoder(), 0.1, **given)


# Tensors given as such


def test_biases_among_tensors_are_said_once_and_both_ways_out_are_silent():
    model = nn.Linear(5, 1)
    with pytest.warns(UserWarning, match=r"biases.*give the module|biases.*Give the module") as caught:
        assert len(names(L1(model.parameters(), 0.1))) == 2
    assert len(caught) == 1
    assert caught[0].filename == __file__
    wide = nn.Sequential(nn.Linear(5, 2), nn.LayerNorm(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(names(L1(wide.parameters(), 0.1, select="all"))) == 4
        assert len(names(L1(wide.parameters(), 0.1, select="weights"))) == 1
        assert names(L1(wide.named_parameters(), 0.1, select="weights")) == ["0.weight"]
        L1([wide[0].weight], 0.1)
        L1([torch.zeros(5, requires_grad=True)], 0.1)  # the vector of a regression, given by itself
    with pytest.raises(ValueError, match="leaves none"):
        L1([wide[0].bias], 0.1, select="weights")


def test_weights_among_named_tensors_go_by_their_names_too():
    named = {"w": torch.ones(2, 2), "cls_token": torch.ones(2, 2), "a.bias": torch.ones(2, 2), "v": torch.ones(2, 1)}
    named = [(name, tensor.requires_grad_()) for name, tensor in named.items()]
    assert names(L1(named, 0.1, select="weights")) == ["w"]


# Heads


def test_heads_are_cut_in_the_projections_of_attention_only():
    model = nn.TransformerEncoderLayer(8, 4, 16)
    assert names(GroupLasso(model, 0.1, groups=Heads(4))) == ["self_attn.in_proj_weight"]
    assert names(GroupLasso(model, 0.1, groups=Heads(4), select="linear1.weight")) == ["linear1.weight"]
    with pytest.raises(ValueError, match="attention"):
        GroupLasso(nn.Sequential(nn.Linear(8, 8)), 0.1, groups=Heads(4))
    assert names(GroupLasso(model.linear1, 0.1, groups=Heads(4))) == ["weight"]  # a single layer is meant itself


def test_another_number_of_heads_than_the_layer_has_is_refused():
    with pytest.raises(ValueError, match=r"in_proj_weight.*Heads\(2\).*4 heads"):
        GroupLasso(nn.MultiheadAttention(8, 4), 0.1, groups=Heads(2))


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)


def test_an_unknown_layer_is_taken_to_stack_q_k_and_v_and_says_so():
    layer = OwnAttention()
    with pytest.warns(UserWarning, match=r"OwnAttention.*Heads\(4, dim=0\)"):
        stacked = GroupLasso(layer, 1.0, groups=Heads(4))
    w = layer.qkv.weight.detach()
    by_head = [torch.cat([part.chunk(4)[h] for part in w.chunk(3)]) for h in range(4)]
    torch.testing.assert_close(stacked().detach(), sum(48**0.5 * head.norm() for head in by_head))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_by_one = GroupLasso(layer, 1.0, groups=Heads(4, dim=0))
        GroupLasso(nn.ModuleDict({"own": nn.MultiheadAttention(8, 4)}), 1.0, groups=Heads(4))
    torch.testing.assert_close(one_by_one().detach(), sum(48**0.5 * head.norm() for head in w.chunk(4)))


def test_a_subclass_of_a_known_attention_layer_is_known():
    layer = type("My", (nn.MultiheadAttention,), {})(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(GroupLasso(layer, 1.0, groups=Heads(4))) == ["in_proj_weight"]


def test_scales_in_a_norm_are_no_weights_whatever_holds_them():
    norm = type("AdaptiveNorm", (nn.Module,), {})()
    norm.scale = nn.Embedding(3, 4)  # one for each class
    assert names(L1(nn.ModuleDict({"n": norm, "w": nn.Linear(4, 4)}), 0.1)) == ["w.weight"]
    called = nn.ModuleDict({"norm": holding(scale=(4, 4)), "w": nn.Linear(4, 4)})
    assert names(L1(called, 0.1)) == ["w.weight"]


def test_dead_units_of_a_sum_over_inputs_and_outputs_are_the_outputs():
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight[1] = layer.weight[:, 2] = 0
    by_input = GroupLasso(layer, 0.1, groups="input")
    assert dead_units(by_input) == {"weight": [2]}
    assert dead_units(by_input + L1(layer, 0.1)) == {"weight": [2]}
    assert dead_units(by_input + GroupLasso(layer, 0.1)) == {"weight": [1]}
