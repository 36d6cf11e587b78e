"""What `select` means, and tensors that are given as such."""

import functools
import re

import pytest
import torch
from helpers.kinds import BASIC, l1
from helpers.nets import Encoder, names
from torch import nn

from torch_regpen import L1

# What `select` means


@pytest.mark.parametrize("kind", BASIC.values(), ids=BASIC)
def test_weights_are_the_default_without_biases_and_norm_scales(kind):
    model = Encoder()
    assert names(kind(model, 0.1)) == ["encoder.conv.weight", "head.weight"]
    assert names(kind(model, 0.1, select=None)) == names(kind(model, 0.1, select="weights"))


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((4, 5)),
        nn.RMSNorm((4, 5)),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.SyncBatchNorm(4),
        type("MyNorm", (nn.LayerNorm,), {})((4, 5)),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_no_scale_of_a_norm_is_a_weight_even_with_two_dimensions(norm):
    model = nn.Sequential(nn.Linear(5, 5), norm)
    assert names(L1(model, 0.1)) == ["0.weight"]
    assert len(names(L1(model, 0.1, select="all"))) == len(list(model.parameters()))


def test_all_means_every_parameter():
    model = Encoder()
    assert names(L1(model, 0.1, select="all")) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("head.weight", ["head.weight"]),
        ("encoder.*.weight", ["encoder.conv.weight", "encoder.norm.weight"]),
        ("*.bias", ["encoder.conv.bias", "encoder.norm.bias", "head.bias"]),
        (["*.bias", "head.*"], ["encoder.conv.bias", "encoder.norm.bias", "head.weight", "head.bias"]),
        (("head.?eight",), ["head.weight"]),
        ("[!e]*.weight", ["head.weight"]),
    ],
)
def test_globs_on_the_qualified_name(select, expected):
    assert names(L1(Encoder(), 0.1, select=select)) == expected


def test_a_glob_matches_the_whole_name_and_minds_case():
    with pytest.raises(ValueError, match="matches none"):
        L1(Encoder(), 0.1, select="weight")
    with pytest.raises(ValueError, match="matches none"):
        L1(Encoder(), 0.1, select="HEAD.weight")


def test_a_callable_gets_name_and_parameter():
    model, seen = Encoder(), []

    def select(name, parameter):
        seen.append((name, parameter))
        return parameter.ndim == 4

    assert names(L1(model, 0.1, select=select)) == ["encoder.conv.weight"]
    assert [name for name, _ in seen] == [name for name, _ in model.named_parameters()]
    assert all(p is q for (_, p), q in zip(seen, model.parameters(), strict=True))
    assert names(L1(model, 0.1, select=functools.partial(lambda end, name, p: name.endswith(end), "head.bias"))) == [
        "head.bias"
    ]


@pytest.mark.parametrize(
    ("select", "near"),
    [
        ("head.wieght", "head.weight"),
        ("head.weigth", "head.weight"),
        ("encoder.*.wight", "encoder.conv.weight"),
        ("conv.weight", "encoder.conv.weight"),
        (["decoder.*", "hed.weight"], "head.weight"),
    ],
)
def test_a_selection_that_matches_nothing_names_near_matches(select, near):
    with pytest.raises(ValueError, match="near matches: .*" + re.escape(near)):
        L1(Encoder(), 0.1, select=select)


def test_a_selection_without_matches_or_near_ones_names_some_parameters():
    for nothing in ([], lambda name, p: False):
        with pytest.raises(ValueError, match=r"head\.weight"):
            L1(Encoder(), 0.1, select=nothing)
    with pytest.raises(ValueError, match=r"weight, bias"):
        L1(nn.BatchNorm1d(3), 0.1)
    with pytest.raises(ValueError, match="has none"):
        L1(nn.ReLU(), 0.1)


@pytest.mark.parametrize("select", [3, [3], True, ["head.weight", None], iter(["head.weight"])])
def test_a_select_of_another_type_is_refused(select):
    with pytest.raises(TypeError, match="select"):
        L1(Encoder(), 0.1, select=select)


# Tensors given as such


def test_tensors_given_as_such_are_all_taken(device):
    w, b = torch.randn(3, 2, device=device, requires_grad=True), torch.randn(3, device=device, requires_grad=True)
    for params in ([w, b], (w, b), iter([w, b]), {"w": w, "b": b}.values()):
        torch.testing.assert_close(L1(params, 0.1)(), 0.1 * l1(w, b))
    assert names(L1([("w", w), ("b", b)], 0.1)) == ["w", "b"]
    assert names(L1({"w": w, "b": b}.items(), 0.1)) == ["w", "b"]
    assert names(L1(Encoder().named_parameters(), 0.1)) == [name for name, _ in Encoder().named_parameters()]
    torch.testing.assert_close(L1(w, 0.1)(), 0.1 * l1(w))
    assert len(names(L1(Encoder().parameters(), 0.1))) == 6


@pytest.mark.parametrize("select", ["*.weight", ["all", "*"], nn.Linear, lambda name, p: True])
def test_select_beside_tensors_is_refused(select):
    with pytest.raises(ValueError, match="select"):
        L1(Encoder().parameters(), 0.1, select=select)
    with pytest.raises(ValueError, match="select"):
        L1([{"params": Encoder().parameters(), "select": select}], 0.1)
    with pytest.raises(ValueError, match="select"):
        L1(torch.ones(2, requires_grad=True), 0.1, select=select)


def test_an_empty_iterable_is_refused():
    used_up = Encoder().parameters()
    list(used_up)
    for params in ([], (), used_up, [{"params": []}], [{"params": iter([])}]):
        with pytest.raises(ValueError, match="empty"):
            L1(params, 0.1)


def test_a_tensor_that_is_no_leaf_is_refused():
    w = torch.ones(3, requires_grad=True)
    for params in ([w * 2], [("double", w * 2)], [{"params": [w, w * 2]}], w * 2):
        with pytest.raises(ValueError, match="not a leaf"):
            L1(params, 0.1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_a_tensor_of_integers_is_refused(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        L1([torch.ones(3, dtype=dtype)], 0.1)


@pytest.mark.parametrize(
    "params",
    [
        None,
        3,
        "weight",
        [3],
        ["weight"],
        [nn.Linear(2, 2)],
        {"params": []},
        Encoder().state_dict(),
        [("w", 3)],
        [(3, 4)],
    ],
    ids=lambda params: type(params).__name__,
)
def test_anything_else_is_refused(params):
    with pytest.raises(TypeError):
        L1(params, 0.1)
