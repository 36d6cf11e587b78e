"""Groups of parameters, each with a lambda of its own."""

import pytest
import torch
from helpers.kinds import l1
from helpers.nets import Encoder, names, originals
from torch import nn
from torch.nn.utils import parametrizations

from torch_regpen import L1

# Parameter groups


def test_groups_are_dicts_as_those_of_an_optimizer(device):
    model = Encoder().to(device)
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
    model = Encoder()
    penalty = L1([{"params": model.encoder, "select": "conv.weight"}, {"params": model.head}], 0.1, select="all")
    assert names(penalty) == ["conv.weight", "weight", "bias"]


def test_the_dicts_of_the_user_keep_their_lambda():
    groups = [{"params": Encoder()}]
    L1(groups, 0.1).lam = 0.5
    L1(groups, 0.2)
    assert groups[0].keys() == {"params"}
    assert L1(groups, 0.3).lam == 0.3


@pytest.mark.parametrize("key", ["lr", "weight_decay", "lamda", "name"])
def test_an_unknown_key_in_a_group_is_refused(key):
    with pytest.raises(ValueError, match=r"'params'.*'lam'.*'select'.*" + key):
        L1([{"params": Encoder(), key: 0.1}], 0.1)


def test_groups_without_params_or_mixed_with_tensors_are_refused():
    w = torch.ones(2, requires_grad=True)
    for params in ([{"lam": 0.1}], [{"params": [w]}, w], [w, {"params": [w]}]):
        with pytest.raises(ValueError, match="'params'"):
            L1(params, 0.1)


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_the_lambda_of_a_group_is_checked_too(lam):
    with pytest.raises(ValueError, match="lam"):
        L1([{"params": Encoder(), "lam": lam}], 0.1)
    with pytest.raises(TypeError, match="lam"):
        L1([{"params": Encoder(), "lam": "0.1"}], 0.1)


def test_a_parameter_in_two_groups_is_refused():
    model = Encoder()
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


def test_groups_of_different_parameters_of_one_module_do_not_overlap():
    model = Encoder()
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
