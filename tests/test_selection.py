import functools
import re
import sys
import types
from collections import OrderedDict

import pytest
import torch
from oracles import KINDS, group_lasso
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from torch_regpen import L1, L2, ElasticNet, GroupLasso


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean((2, 3)))


def names(penalty):
    return [name for name, _ in penalty.named_parameters_penalized()]


def l1(*tensors):
    return sum(tensor.abs().sum() for tensor in tensors)


# What `select` means


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_weights_are_the_default_without_biases_and_norm_scales(kind):
    model = Net()
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
    model = Net()
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
    assert names(L1(Net(), 0.1, select=select)) == expected


def test_a_glob_matches_the_whole_name_and_minds_case():
    with pytest.raises(ValueError, match="matches none"):
        L1(Net(), 0.1, select="weight")
    with pytest.raises(ValueError, match="matches none"):
        L1(Net(), 0.1, select="HEAD.weight")


def test_a_callable_gets_name_and_parameter():
    model, seen = Net(), []

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
        L1(Net(), 0.1, select=select)


def test_a_selection_that_matches_nothing_names_some_parameters_where_none_is_near():
    for nothing in ([], lambda name, p: False):
        with pytest.raises(ValueError, match=r"head\.weight"):
            L1(Net(), 0.1, select=nothing)
    with pytest.raises(ValueError, match=r"weight, bias"):
        L1(nn.BatchNorm1d(3), 0.1)
    with pytest.raises(ValueError, match="has none"):
        L1(nn.ReLU(), 0.1)


@pytest.mark.parametrize("select", [3, [3], True, ["head.weight", None], iter(["head.weight"])])
def test_a_select_of_another_type_is_refused(select):
    with pytest.raises(TypeError, match="select"):
        L1(Net(), 0.1, select=select)


# Tensors given as such


def test_tensors_given_as_such_are_all_taken(device):
    w, b = torch.randn(3, 2, device=device, requires_grad=True), torch.randn(3, device=device, requires_grad=True)
    for params in ([w, b], (w, b), iter([w, b]), {"w": w, "b": b}.values()):
        torch.testing.assert_close(L1(params, 0.1)(), 0.1 * l1(w, b))
    assert names(L1([("w", w), ("b", b)], 0.1)) == ["w", "b"]
    assert names(L1({"w": w, "b": b}.items(), 0.1)) == ["w", "b"]
    assert names(L1(Net().named_parameters(), 0.1)) == [name for name, _ in Net().named_parameters()]
    torch.testing.assert_close(L1(w, 0.1)(), 0.1 * l1(w))
    assert len(names(L1(Net().parameters(), 0.1))) == 6


@pytest.mark.parametrize("select", ["*.weight", ["all", "*"], nn.Linear, lambda name, p: True])
def test_select_beside_tensors_is_refused(select):
    with pytest.raises(ValueError, match="select"):
        L1(Net().parameters(), 0.1, select=select)
    with pytest.raises(ValueError, match="select"):
        L1([{"params": Net().parameters(), "select": select}], 0.1)
    with pytest.raises(ValueError, match="select"):
        L1(torch.ones(2, requires_grad=True), 0.1, select=select)


def test_an_empty_iterable_is_refused():
    used_up = Net().parameters()
    list(used_up)
    for params in ([], (), used_up, [{"params": []}], [{"params": iter([])}]):
        with pytest.raises(ValueError, match="empty"):
            L1(params, 0.1)


def test_a_tensor_that_is_no_leaf_is_refused():
    w = torch.ones(3, requires_grad=True)
    for params in ([w * 2], [("double", w * 2)], [{"params": [w, w * 2]}], w * 2):
        with pytest.raises(ValueError, match="no leaf"):
            L1(params, 0.1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_a_tensor_of_integers_is_refused(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        L1([torch.ones(3, dtype=dtype)], 0.1)


@pytest.mark.parametrize(
    "params",
    [None, 3, "weight", [3], ["weight"], [nn.Linear(2, 2)], {"params": []}, Net().state_dict(), [("w", 3)], [(3, 4)]],
    ids=lambda params: type(params).__name__,
)
def test_anything_else_is_refused(params):
    with pytest.raises(TypeError):
        L1(params, 0.1)


# Parameter groups


def test_groups_are_dicts_as_those_of_an_optimizer(device):
    model = Net().to(device)
    groups = [
        {"params": model.encoder, "lam": 0.5},
        {"params": model.head, "select": "all"},
        {"params": [torch.full((2,), 3.0, device=device, requires_grad=True)], "lam": 2},
    ]
    penalty = L1(groups, 0.25)
    assert [group["lam"] for group in penalty.param_groups] == [0.5, 0.25, 2.0]
    head = 0.25 * l1(model.head.weight, model.head.bias)
    torch.testing.assert_close(penalty(), 0.5 * l1(model.encoder.conv.weight) + head + 2 * 6.0)
    assert len(names(penalty)) == 4


def test_the_default_select_is_that_of_the_groups_without_one():
    model = Net()
    penalty = L1([{"params": model.encoder, "select": "conv.weight"}, {"params": model.head}], 0.1, select="all")
    assert names(penalty) == ["conv.weight", "weight", "bias"]


def test_the_dicts_of_the_user_keep_their_lambda():
    groups = [{"params": Net()}]
    L1(groups, 0.1).lam = 0.5
    L1(groups, 0.2)
    assert groups[0].keys() == {"params"}
    assert L1(groups, 0.3).lam == 0.3


@pytest.mark.parametrize("key", ["lr", "weight_decay", "lamda", "name"])
def test_an_unknown_key_in_a_group_is_refused(key):
    with pytest.raises(ValueError, match=r"'params'.*'lam'.*'select'.*" + key):
        L1([{"params": Net(), key: 0.1}], 0.1)


def test_a_group_without_params_and_a_mixture_of_groups_and_tensors_are_refused():
    w = torch.ones(2, requires_grad=True)
    for params in ([{"lam": 0.1}], [{"params": [w]}, w], [w, {"params": [w]}]):
        with pytest.raises(ValueError, match="'params'"):
            L1(params, 0.1)


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_the_lambda_of_a_group_is_checked_too(lam):
    with pytest.raises(ValueError, match="lam"):
        L1([{"params": Net(), "lam": lam}], 0.1)
    with pytest.raises(TypeError, match="lam"):
        L1([{"params": Net(), "lam": "0.1"}], 0.1)


def test_a_parameter_in_two_groups_is_refused():
    model = Net()
    w = torch.ones(2, requires_grad=True)
    for groups in (
        [{"params": model.head}, {"params": model}],
        [{"params": [w]}, {"params": [w]}],
        [{"params": [model.head.weight]}, {"params": model}],
    ):
        with pytest.raises(ValueError, match="groups 0 and 1"):
            L1(groups, 0.1)


def test_a_parameter_shared_between_two_groups_is_refused():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    with pytest.raises(ValueError, match="groups 0 and 1"):
        L1([{"params": first}, {"params": second}], 0.1)


def test_groups_that_select_different_parameters_of_one_module_do_not_overlap():
    model = Net()
    penalty = L1([{"params": model}, {"params": model, "select": "*.bias", "lam": 0}], 0.1)
    torch.testing.assert_close(penalty(), 0.1 * l1(model.encoder.conv.weight, model.head.weight))


def test_groups_of_a_lazy_model_are_told_apart_once_it_has_shapes():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2))
    penalty = L1([{"params": model}, {"params": model, "select": "*.bias", "lam": 1.0}], 0.1)
    overlapping = L1([{"params": model}, {"params": model, "select": "1.*", "lam": 1.0}], 0.1)
    model(torch.randn(2, 3))
    expected = 0.1 * l1(model[0].weight, model[1].weight) + l1(model[0].bias, model[1].bias)
    torch.testing.assert_close(penalty(), expected)
    with pytest.raises(ValueError, match="groups 0 and 1"):
        overlapping()


def test_groups_may_divide_the_originals_of_a_parametrization():
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    groups = [{"params": model, "select": "*.original0"}, {"params": model, "select": "*.original1", "lam": 1.0}]
    torch.testing.assert_close(L1(groups, 0.1)(), 0.1 * l1(originals(model)[0]) + l1(originals(model)[1]))


def test_parameters_tied_between_groups_later_are_refused():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    penalty = L1([{"params": first}, {"params": second}], 0.1)
    second.weight = first.weight
    with pytest.raises(ValueError, match="groups 0 and 1"):
        penalty()


# Shared, frozen


def tied():
    model = nn.Sequential(OrderedDict(embed=nn.Embedding(5, 3), out=nn.Linear(3, 5, bias=False)))
    model.out.weight = model.embed.weight
    return model


def test_a_shared_parameter_counts_once(device):
    model = tied().to(device)
    for penalty in (L1(model, 0.1), L1([*model.parameters(), *model.parameters()], 0.1)):
        torch.testing.assert_close(penalty(), 0.1 * l1(model.embed.weight))
        model.embed.weight.grad = torch.zeros_like(model.embed.weight)
        penalty.add_grad_()
        torch.testing.assert_close(model.embed.weight.grad, 0.1 * model.embed.weight.detach().sign())
        before = model.embed.weight.detach().clone()
        penalty.prox_(1.0)
        torch.testing.assert_close(model.embed.weight.detach(), before.sign() * (before.abs() - 0.1).relu())
        assert len(names(penalty)) == 1


def test_a_shared_parameter_answers_to_each_of_its_names():
    model = tied()
    assert names(L1(model, 0.1, select="embed.*")) == ["embed.weight"]
    assert names(L1(model, 0.1, select="out.*")) == ["out.weight"]


def test_a_module_used_twice_counts_once():
    layer = nn.Linear(3, 3)
    assert names(L1(nn.Sequential(layer, nn.ReLU(), layer), 0.1)) == ["0.weight"]


def test_frozen_parameters_are_left_out_while_they_are_frozen(device):
    model = Net().to(device)
    for penalty in (L1(model, 0.1), L1([model.encoder.conv.weight, model.head.weight], 0.1)):
        both = penalty().item()
        model.encoder.conv.weight.requires_grad_(False)
        torch.testing.assert_close(penalty(), 0.1 * l1(model.head.weight))
        assert len(names(penalty)) == 1
        before = model.encoder.conv.weight.clone()
        penalty.prox_(1.0)
        assert torch.equal(model.encoder.conv.weight, before)
        assert "encoder" not in penalty.summary()
        model.encoder.conv.weight.requires_grad_(True)
        assert penalty().item() < both
        assert len(names(penalty)) == 2


def test_parameters_frozen_at_construction_count_from_when_they_are_not():
    model = Net().requires_grad_(False)
    penalty = L1(model, 0.1)
    assert names(penalty) == []
    assert penalty().item() == 0
    model.requires_grad_(True)
    assert len(names(penalty)) == 2


def test_where_all_are_frozen_the_value_is_a_zero_of_the_usual_dtype(device):
    for dtype, expected in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        model = Net().to(device, dtype).requires_grad_(False)
        value = L1(model, 0.1)()
        assert (value.item(), value.dtype, value.device.type) == (0.0, expected, device.type)
        (value + torch.ones((), device=device, requires_grad=True)).backward()


# Wrappers and parametrizations


def wrapped(model):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    return Wrapper()


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        torch.optim.swa_utils.AveragedModel,
        wrapped,
        lambda model: torch.compile(wrapped(model)),
        lambda model: wrapped(torch.compile(model)),
        lambda model: wrapped(wrapped(model)),
    ],
    ids=["DataParallel", "compile", "AveragedModel", "module", "_orig_mod.module", "module._orig_mod", "module.module"],
)
def test_prefixes_of_wrappers_do_not_count(wrap):
    model = wrap(Net())
    full = [name for name, _ in model.named_parameters()]
    assert names(L1(model, 0.1, select="head.weight")) == [full[4]]
    assert names(L1(model, 0.1, select="encoder.*.weight")) == [full[0], full[2]]
    assert names(L1(model, 0.1, select=full[4])) == [full[4]]
    assert names(L1(model, 0.1, select=lambda name, p: name == "head.weight")) == [full[4]]
    assert names(L1(model, 0.1)) == [full[0], full[4]]
    with pytest.raises(ValueError, match=r"near matches: head\.weight"):
        L1(model, 0.1, select="head.wieght")


def test_the_prefix_of_a_compiled_part_does_not_count():
    model = Net()
    model.encoder = torch.compile(model.encoder)
    assert names(L1(model, 0.1, select="encoder.conv.weight")) == ["encoder._orig_mod.conv.weight"]


def test_the_prefix_of_activation_checkpointing_does_not_count():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    model.head = checkpoint_wrapper(model.head)
    assert names(L1(model, 0.1, select="head.weight")) == ["head._checkpoint_wrapped_module.weight"]


@pytest.mark.parametrize("prefix", ["encoder", "head"])
def test_a_module_that_is_called_module_within_a_model_counts(prefix):
    model = nn.ModuleDict({prefix: wrapped(nn.Linear(2, 2))})
    assert names(L1(model, 0.1, select=f"{prefix}.module.weight")) == [f"{prefix}.module.weight"]


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def originals(layer):
    return list(layer.parametrizations.weight.parameters(recurse=False))


@pytest.mark.parametrize("add", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrizations_are_penalized_at_their_originals(add, when, device):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(device)
    if when == "before":
        add(model[0])
    penalty = L1(model, 0.1)
    if when == "after":
        add(model[0])
    scales = 1 if add is parametrizations.weight_norm else 0  # its lengths are the scales of a layer
    expected = [*originals(model[0])[scales:], model[1].weight]
    owned = {id(p) for p in model.parameters()}
    assert all(id(p) in owned for _, p in penalty.named_parameters_penalized())
    assert [id(p) for _, p in penalty.named_parameters_penalized()] == [id(p) for p in expected]
    torch.testing.assert_close(penalty(), 0.1 * l1(*expected))
    assert set(names(penalty)) <= {name for name, _ in model.named_parameters()}
    penalty().backward()
    assert all(p.grad is not None for p in expected)

    parametrize.remove_parametrizations(model[0], "weight")
    assert names(penalty) == ["0.weight", "1.weight"]
    torch.testing.assert_close(penalty(), 0.1 * l1(model[0].weight, model[1].weight))


@pytest.mark.parametrize("add", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
@pytest.mark.parametrize(
    "select",
    ["0.weight", "0.*eight", ["0.weight"], lambda name, p: name == "0.weight"],
    ids=["name", "glob", "list", "f"],
)
def test_a_parametrized_weight_matches_by_its_plain_name(add, select):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    add(model[0])
    penalty = L1(model, 0.1, select=select)
    assert [id(p) for _, p in penalty.named_parameters_penalized()] == [id(p) for p in originals(model[0])]


def test_a_parametrized_weight_matches_by_its_full_name_too():
    model = nn.Sequential(nn.Linear(4, 3))
    parametrizations.weight_norm(model[0])
    full = "0.parametrizations.weight.original1"
    assert names(L1(model, 0.1, select=full)) == [full]
    assert names(L1(model, 0.1, select=lambda name, p: name == full)) == [full]
    assert len(names(L1(model, 0.1, select="all"))) == 3


def test_a_parametrized_bias_is_no_weight():
    model = nn.Linear(4, 3)
    parametrize.register_parametrization(model, "bias", nn.Identity())
    assert names(L1(model, 0.1)) == ["weight"]


def test_a_lambda_set_before_a_parametrization_stays():
    model = nn.Linear(4, 3)
    penalty = L2(model, 0.1)
    parametrizations.orthogonal(model)
    penalty.lam = 0.3
    torch.testing.assert_close(penalty(), 0.3 * originals(model)[0].square().sum())


# Lazy


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (None, ["0.weight", "3.weight"]),
        ("all", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
        ("3.*", ["3.weight", "3.bias"]),
        (lambda name, p: p.ndim == 4, ["0.weight"]),
    ],
    ids=["weights", "all", "glob", "callable"],
)
def test_lazy_parameters_are_judged_once_they_have_a_shape(select, expected):
    model = lazy()
    penalty = L1(model, 0.1, select=select)
    repr(penalty), penalty.summary()
    before = penalty()
    assert (before.shape, before.item()) == ((), 0.0)
    model(torch.randn(2, 3, 5, 5))
    assert names(penalty) == expected
    torch.testing.assert_close(penalty(), 0.1 * l1(*(model.get_parameter(name) for name in expected)))


def test_lazy_parameters_beside_others():
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    penalty = L1(model, 0.1)
    torch.testing.assert_close(penalty(), 0.1 * l1(model[0].weight))
    model(torch.randn(2, 3))
    torch.testing.assert_close(penalty(), 0.1 * l1(model[0].weight, model[1].weight))


def test_lazy_transposed_convolutions_know_their_groups():
    model = nn.Sequential(nn.LazyConvTranspose2d(4, 3))
    penalty = GroupLasso(model, 0.1)
    model(torch.randn(2, 3, 5, 5))
    torch.testing.assert_close(penalty(), 0.1 * group_lasso(model[0].weight, 1))


def test_a_lazy_parameter_that_does_not_fit_the_groups_is_refused_once_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    penalty = GroupLasso(model, 0.1, select="all", groups="input")
    model(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"0\.bias"):
        penalty()


# Which dimension the units lie along


class Conv1D(nn.Module):  # as in transformers: the weight is (in, out)
    def __init__(self, out, features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, out))
        self.bias = nn.Parameter(torch.zeros(out))


@pytest.fixture
def conv1d(monkeypatch):
    stand_in = types.ModuleType("transformers.pytorch_utils")
    stand_in.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", stand_in)
    return Conv1D(4, 3)


LAYERS = {
    "Linear": (lambda: nn.Linear(3, 4), 0),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 2), 0),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 2), 0),
    "Conv3d": (lambda: nn.Conv3d(3, 4, 2), 0),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 2), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 2), 1),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 4, 2), 1),
    "Embedding": (lambda: nn.Embedding(3, 4), 0),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(3, 4), 0),
    "weight_norm": (lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(3, 4, 2)), 1),
}


@pytest.mark.parametrize(("make", "output"), LAYERS.values(), ids=LAYERS)
def test_output_and_input_units_lie_along_the_dims_of_the_layer(make, output, device):
    layer = make().to(device)
    weight = layer.parametrizations.weight.original if parametrize.is_parametrized(layer) else layer.weight
    for groups, dim in (("output", output), ("input", 1 - output), (0, 0), (1, 1), (-1, weight.ndim - 1)):
        torch.testing.assert_close(GroupLasso(layer, 0.1, groups=groups)(), 0.1 * group_lasso(weight, dim))
    assert GroupLasso(layer, 0.1)() == GroupLasso(layer, 0.1, groups="output")()


def test_the_conv1d_of_transformers_is_transposed(conv1d):
    torch.testing.assert_close(GroupLasso(conv1d, 0.1)(), 0.1 * group_lasso(conv1d.weight, 1))
    torch.testing.assert_close(GroupLasso(conv1d, 0.1, groups="input")(), 0.1 * group_lasso(conv1d.weight, 0))


def test_an_output_unit_is_what_an_input_of_one_reaches():
    """The groups of a transposed convolution hold all that leads to one output channel, and nothing else."""
    layer = nn.ConvTranspose2d(3, 4, 2, bias=False)
    penalty = GroupLasso(layer, 1.0)
    with torch.no_grad():
        layer.weight[:, 2] *= 1e-3
    penalty.prox_(1e-2)
    assert [bool((layer(torch.randn(1, 3, 2, 2))[0, c] == 0).all()) for c in range(4)] == [False, False, True, False]


def test_a_tensor_without_a_module_has_output_units_along_dim_0_and_input_units_along_dim_1():
    w = torch.randn(3, 4, requires_grad=True)
    torch.testing.assert_close(GroupLasso([w], 0.1)(), 0.1 * group_lasso(w, 0))
    torch.testing.assert_close(GroupLasso([w], 0.1, groups="input")(), 0.1 * group_lasso(w, 1))


def test_output_groups_of_a_bias_are_its_elements():
    layer = nn.ConvTranspose2d(3, 4, 2)
    torch.testing.assert_close(GroupLasso(layer, 0.1, select="bias")(), 0.1 * l1(layer.bias))


@pytest.mark.parametrize("kind", [L1, L2, ElasticNet, GroupLasso])
def test_groups_that_a_parameter_does_not_have_are_refused_at_construction(kind):
    with pytest.raises(ValueError, match=r"head\.bias"):
        kind(Net(), 0.1, select="head.*", groups="input")
    with pytest.raises(ValueError, match="dimension"):
        kind([torch.ones(3, requires_grad=True)], 0.1, groups="input")
    with pytest.raises(ValueError, match="dimension 2"):
        kind(nn.Linear(3, 2), 0.1, groups=2)
    with pytest.raises(ValueError, match="rows"):
        kind(Net(), 0.1, groups="rows")
    with pytest.raises(TypeError):
        kind(Net(), 0.1, groups=1.0)


# Flattened parameters


@pytest.fixture
def gloo():
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore:FSDP")
def test_parameters_flattened_by_fsdp1_are_refused(use_orig_params, gloo):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = L1(model, 0.1)
    model = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        L1(model, 0.1)
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        L1(model.parameters(), 0.1)
    for use in (before, before.add_grad_, before.stationarity, before.summary, lambda: before.prox_(0.1)):
        with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
            use()


def test_parameters_flattened_by_zero_3_are_refused():
    model = nn.Linear(3, 2)
    before = L1(model, 0.1)
    model.weight.data = torch.empty(0)  # what DeepSpeed leaves of it
    model.weight.ds_id = 0
    for use in (before, lambda: L1(model, 0.1), lambda: L1(model.parameters(), 0.1)):
        with pytest.raises(ValueError, match=r"ZeRO-3.*fully_shard"):
            use()


def test_a_parameter_that_is_gone_is_reported():
    model = nn.Sequential(nn.Linear(3, 2))
    penalty = L1(model, 0.1)
    del model[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' is gone"):
        penalty()


def test_a_plain_tensor_without_requires_grad_is_taken_as_it_is(device):
    w = torch.ones(2, device=device)
    penalty = L1([w], 0.1)
    assert penalty().item() == pytest.approx(0.2)
    penalty.prox_(2.0)
    assert w.tolist() == pytest.approx([0.8, 0.8])


def test_a_tensor_given_as_such_is_left_out_while_it_is_frozen(device):
    w = torch.ones(2, device=device, requires_grad=True)
    penalty = L1([w, torch.nn.Parameter(torch.ones(3, device=device), requires_grad=False)], 0.1)
    assert penalty().item() == pytest.approx(0.2)
    w.requires_grad_(False)
    assert penalty().item() == 0
