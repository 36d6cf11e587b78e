"""The arguments of a penalty, its lambda, and L2.from_weight_decay and restricted_to, which make one of another."""

import copy
import fractions
import inspect
import math

import numpy as np
import pytest
import torch
from helpers.kinds import BASIC, OMEGA, total_omega
from helpers.nets import network, weights_of
from torch import nn

from torch_regpen import L1, L2, ElasticNet, GroupLasso, Penalty

LAM = 0.03
EACH = pytest.mark.parametrize("kind", BASIC)


# Arguments


@EACH
def test_the_first_arguments_are_the_same_for_every_kind(kind):
    model = network()
    assert isinstance(BASIC[kind](model, LAM), Penalty)
    assert isinstance(BASIC[kind](model, LAM), nn.Module)
    assert BASIC[kind](params=model, lam=LAM, select="all").lam == LAM
    with pytest.raises(TypeError):
        BASIC[kind](model)
    for cls in (L1, L2, ElasticNet, GroupLasso):
        with pytest.raises(TypeError):
            cls(model, LAM, "all")
    parameters = list(inspect.signature(GroupLasso).parameters)
    assert parameters[:2] == ["params", "lam"]


@pytest.mark.parametrize(
    "lam", ["0.1", None, True, False, 1j, [0.1], torch.tensor(0.1), np.array(0.1), np.bool_(True)], ids=repr
)
def test_a_lambda_that_is_no_number_is_refused(lam):
    with pytest.raises(TypeError, match="lam"):
        L1(network(), lam)
    penalty = L1(network(), LAM)
    with pytest.raises(TypeError, match="lam"):
        penalty.lam = lam
    assert penalty.lam == LAM


@pytest.mark.parametrize("lam", [-1e-9, -1, math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_lambda_that_is_negative_or_not_finite_is_refused(lam):
    with pytest.raises(ValueError, match="lam"):
        L1(network(), lam)
    penalty = L1(network(), LAM)
    with pytest.raises(ValueError, match="lam"):
        penalty.lam = lam
    with pytest.raises(ValueError, match="lam"):
        penalty.param_groups[0]["lam"] = lam
    assert penalty.lam == LAM


@pytest.mark.parametrize(
    "lam", [0, 0.0, 2, 1e-300, np.float32(0.5), np.float64(0.5), np.int64(3), fractions.Fraction(1, 2)]
)
def test_any_number_is_a_lambda(lam):
    penalty = L1(network(), lam)
    assert isinstance(penalty.lam, float)
    assert penalty.lam == float(lam)
    penalty.lam = 0.25
    penalty.lam = lam
    assert penalty.lam == float(lam)


@pytest.mark.parametrize("l1_ratio", [-0.1, 1.1, math.nan])
def test_the_l1_ratio_is_a_share(l1_ratio):
    with pytest.raises(ValueError, match="l1_ratio"):
        ElasticNet(network(), LAM, l1_ratio=l1_ratio)


def test_the_elastic_net_is_half_and_half_unless_told_otherwise():
    model = network()
    half = 0.5 * L1(model, LAM)() + 0.5 * L2(model, LAM)()
    torch.testing.assert_close(ElasticNet(model, LAM)(), half)
    torch.testing.assert_close(ElasticNet(model, LAM, l1_ratio=1)(), L1(model, LAM)())
    torch.testing.assert_close(ElasticNet(model, LAM, l1_ratio=0)(), L2(model, LAM)())


def test_group_lasso_groups_by_output_unit_unless_told_otherwise():
    model = network()
    assert GroupLasso(model, LAM)() == GroupLasso(model, LAM, groups="output")()
    assert GroupLasso(model, LAM)() != GroupLasso(model, LAM, groups="input")()


# Lambda


@EACH
def test_lambda_can_be_set_at_any_time(kind):
    model = network(dtype=torch.float64)
    penalty = BASIC[kind](model, LAM)
    for lam in (0.5, 0, 7):
        penalty.lam = lam
        assert penalty.lam == penalty.param_groups[0]["lam"] == lam
        torch.testing.assert_close(penalty(), lam * total_omega(kind, weights_of(model)))


def test_there_is_a_dict_for_each_group_of_parameters_and_lam_sets_all():
    model = network()
    assert len(L1(model, LAM).param_groups) == 1
    penalty = L1([{"params": model[0], "lam": 0.5}, {"params": model[2]}], LAM)
    assert [group["lam"] for group in penalty.param_groups] == [0.5, LAM]
    penalty.param_groups[1]["lam"] = 0.25
    torch.testing.assert_close(penalty(), 0.5 * model[0].weight.abs().sum() + 0.25 * model[2].weight.abs().sum())
    penalty.lam = 1.0
    assert [group["lam"] for group in penalty.param_groups] == [1.0, 1.0]


@EACH
def test_no_cast_of_the_model_touches_lambda(kind):
    model = network()
    model.penalty = penalty = BASIC[kind](model, 1e-9)
    for cast in (model.half, penalty.half, penalty.bfloat16, model.float, lambda: penalty.to(torch.float16)):
        cast()
        assert penalty.lam == 1e-9
        assert penalty.state_dict()["_extra_state"].dtype == torch.float64


# It owns nothing


@EACH
def test_it_owns_no_parameter(kind):
    for penalty in (BASIC[kind](network(), LAM), BASIC[kind](network(), LAM) + L2(network(), LAM)):
        assert list(penalty.parameters()) == []
        assert list(penalty.buffers()) == []
    assert list(BASIC[kind](network(), LAM).children()) == []


def test_named_parameters_penalized_yields_names_and_parameters():
    model = network()
    pairs = dict(L1(model, LAM).named_parameters_penalized())
    assert pairs.keys() == {"0.weight", "2.weight"}
    assert pairs["0.weight"] is model[0].weight


# L2.from_weight_decay


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_from_weight_decay_is_the_weight_decay_of_torch(momentum):
    torchs, ours = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), None
    ours = copy.deepcopy(torchs)
    penalty = L2.from_weight_decay(ours, 0.1)
    assert (penalty.lam, isinstance(penalty, L2)) == (0.05, True)
    x = torch.randn(6, 5)
    optimizers = [
        torch.optim.SGD(torchs.parameters(), lr=0.1, momentum=momentum, weight_decay=0.1),
        torch.optim.SGD(ours.parameters(), lr=0.1, momentum=momentum),
    ]
    for _ in range(5):
        for model, optimizer, extra in ((torchs, optimizers[0], 0.0), (ours, optimizers[1], penalty())):
            optimizer.zero_grad()
            (model(x).square().sum() + extra).backward()
            optimizer.step()
    torch.testing.assert_close(list(ours.parameters()), list(torchs.parameters()))


def test_from_weight_decay_takes_what_a_penalty_takes():
    model = network()
    everything = (0.05 * sum(p.square().sum() for p in model.parameters())).detach()
    of_weights = (0.05 * sum(w.square().sum() for w in weights_of(model))).detach()
    for params in (model, model.parameters(), model.named_parameters(), [{"params": model}]):
        torch.testing.assert_close(L2.from_weight_decay(params, 0.1)().detach(), everything)
    torch.testing.assert_close(L2.from_weight_decay([{"params": model.parameters()}], 0.1)().detach(), everything)
    for select in ("weights", None, "*.weight"):
        torch.testing.assert_close(L2.from_weight_decay(model, 0.1, select=select)().detach(), of_weights)
    torch.testing.assert_close(
        L2.from_weight_decay([{"params": model, "select": "weights"}], 0.1)().detach(), of_weights
    )
    single = torch.tensor([2.0], requires_grad=True)
    assert L2.from_weight_decay(single, 0.5)().item() == 1.0
    with pytest.raises(ValueError, match="select"):
        L2.from_weight_decay(model.parameters(), 0.1, select="*.weight")
    with pytest.raises(ValueError, match="lam"):
        L2.from_weight_decay(model, -0.1)
    with pytest.raises(TypeError):
        L2.from_weight_decay(model, "0.1")


# restricted_to


@EACH
def test_restricted_to_is_the_same_penalty_on_what_an_optimizer_owns(kind):
    model = network(dtype=torch.float64)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam([{"params": model[2].bias}, {"params": model[2].weight}], lr=0.1)
    penalty = BASIC[kind](model, LAM)
    halves = [penalty.restricted_to(first), penalty.restricted_to(second)]
    assert [[name for name, _ in half.named_parameters_penalized()] for half in halves] == [["0.weight"], ["2.weight"]]
    torch.testing.assert_close(halves[0]() + halves[1](), penalty())
    torch.testing.assert_close(halves[0](), LAM * OMEGA[kind](model[0].weight))
    assert len(list(penalty.named_parameters_penalized())) == 2  # it is as it was


def test_restricted_to_shares_lambda_both_ways():
    model = network()
    penalty = L1(model, LAM)
    half = penalty.restricted_to(torch.optim.SGD(model[0].parameters(), lr=0.1))
    penalty.lam = 0.5
    assert half.lam == 0.5
    half.lam = 0.25
    assert penalty.lam == 0.25
    half.param_groups[0]["lam"] = 0.125
    assert penalty.lam == 0.125


def test_restricted_to_keeps_the_lambdas_of_groups_apart():
    model = network()
    penalty = L1([{"params": model[0], "lam": 0.5}, {"params": model[2], "lam": 0.25}], LAM)
    half = penalty.restricted_to(torch.optim.SGD(model[2].parameters(), lr=0.1))
    torch.testing.assert_close(half(), 0.25 * model[2].weight.abs().sum())
    penalty.param_groups[1]["lam"] = 1.0
    torch.testing.assert_close(half(), model[2].weight.abs().sum())


def test_restricted_to_an_optimizer_that_owns_none_is_refused():
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    model = network()
    for penalty in (L1(model, LAM), L1(model, LAM) + L2(model, LAM)):
        with pytest.raises(ValueError, match="SGD owns none"):
            penalty.restricted_to(other)
