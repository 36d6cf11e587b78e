"""Parameters that are shared, frozen, wrapped, parametrized, lazy or flattened."""

from collections import OrderedDict

import pytest
import torch
from helpers.kinds import group_lasso, l1
from helpers.nets import Encoder, names, originals
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from torch_regpen import L1, L2, GroupLasso

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
    model = Encoder().to(device)
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
    model = Encoder().requires_grad_(False)
    penalty = L1(model, 0.1)
    assert names(penalty) == []
    assert penalty().item() == 0
    model.requires_grad_(True)
    assert len(names(penalty)) == 2


def test_where_all_are_frozen_the_value_is_a_zero_of_the_usual_dtype(device):
    for dtype, expected in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        model = Encoder().to(device, dtype).requires_grad_(False)
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
    model = wrap(Encoder())
    full = [name for name, _ in model.named_parameters()]
    assert names(L1(model, 0.1, select="head.weight")) == [full[4]]
    assert names(L1(model, 0.1, select="encoder.*.weight")) == [full[0], full[2]]
    assert names(L1(model, 0.1, select=full[4])) == [full[4]]
    assert names(L1(model, 0.1, select=lambda name, p: name == "head.weight")) == [full[4]]
    assert names(L1(model, 0.1)) == [full[0], full[4]]
    with pytest.raises(ValueError, match=r"near matches: head\.weight"):
        L1(model, 0.1, select="head.wieght")


def test_the_prefix_of_a_compiled_part_does_not_count():
    model = Encoder()
    model.encoder = torch.compile(model.encoder)
    assert names(L1(model, 0.1, select="encoder.conv.weight")) == ["encoder._orig_mod.conv.weight"]


def test_the_prefix_of_activation_checkpointing_does_not_count():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Encoder()
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


def test_a_lazy_parameter_unfit_for_groups_is_refused_at_its_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    penalty = GroupLasso(model, 0.1, select="all", groups="input")
    model(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"0\.bias"):
        penalty()


# Flattened parameters


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore:FSDP")
def test_parameters_flattened_by_fsdp1_are_refused(use_orig_params, one_rank):
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
