"""Units and heads of real layers: what the penalty groups is what works and dies together."""

import math

import pytest
import torch
from helpers.attention import (
    ATTENTION,
    HEADS,
    LIKE_STACKS,
    LLM,
    attention_of,
    bigcode_config,
    config_of,
    phi3,
    without_bias,
)
from helpers.units import CASES, each, gates, hidden_state, sum_of_norms
from torch import nn

from torch_regpen import GroupLasso
from torch_regpen.export import dead_units
from torch_regpen.groups import Heads

# Heads of attention


EVERY = {**CASES, **{f"attention of {name}": case for name, case in ATTENTION.items()}}


@pytest.mark.parametrize("name", EVERY)
def test_the_value_of_group_lasso_is_the_sum_over_the_layers_units(name):
    case = EVERY[name]
    layer = without_bias(case.make())
    penalty = GroupLasso(layer, 1.0, groups=case.groups, select=case.select)
    members = case.members(layer)
    assert {parameter for parameter, _ in penalty.named_parameters_penalized()} == set(members)
    torch.testing.assert_close(penalty().detach(), sum_of_norms(layer, members))
    assert all((torch.stack(units).sum(0) == 1).all() for units in members.values()), "the loop's own: a partition"


@pytest.mark.parametrize("name", EVERY)
def test_the_prox_shrinks_each_unit_by_its_norm(name):
    case = EVERY[name]
    layer = without_bias(case.make())
    expected = {}
    for parameter, units in case.members(layer).items():
        w = layer.get_parameter(parameter).detach()
        median = torch.stack([w[unit].norm() for unit in units]).median()
        t = 0.9 * median / math.sqrt(int(units[0].sum()))
        expected[parameter] = w.clone()
        for unit in units:
            expected[parameter][unit] *= (1 - t * math.sqrt(int(unit.sum())) / w[unit].norm()).clamp_min(0)
        GroupLasso(layer, 1.0, groups=case.groups, select=parameter).prox_(t.item())
        torch.testing.assert_close(w, expected[parameter])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("unit", [1, -1])
def test_a_unit_is_reported_as_zero_exactly_when_it_has_ceased(name, unit):
    case = EVERY[name]
    layer = without_bias(case.make())
    penalty = GroupLasso(layer, 1.0, groups=case.groups, select=case.select)
    members = case.members(layer)
    unit %= len(next(iter(members.values())))
    assert case.signal(layer, unit) > 0
    assert penalty.zero_groups() == {parameter: [] for parameter in members}
    for parameter, units in members.items():
        layer.get_parameter(parameter).data[units[unit]] = 0
    assert case.signal(layer, unit) == 0
    assert penalty.zero_groups() == each(members, unit)
    counts = [row.split()[-1] for row in penalty.summary().splitlines()[1:-1]]
    assert sorted(counts) == sorted(f"1/{len(units)}" for units in members.values())


@pytest.mark.parametrize("name", CASES)
def test_dead_units_lists_the_units_that_the_penalty_groups(name):
    case = CASES[name]
    layer = without_bias(case.make())
    penalty = GroupLasso(layer, 1.0, groups=case.groups, select=case.select)
    members = case.members(layer)
    for parameter, units in members.items():
        layer.get_parameter(parameter).data[units[2]] = 0
    assert dead_units(penalty) == each(members, 2)
    if case.groups == "output":
        assert dead_units(layer, select=case.select) == each(members, 2)


@pytest.mark.parametrize("name", LIKE_STACKS)
def test_heads_one_by_one_under_a_stacks_name_are_read_right_or_refused(name):
    case = LIKE_STACKS[name]
    layer = without_bias(case.make())
    members = case.members(layer)
    expected = sum_of_norms(layer, members)
    try:
        value = GroupLasso(layer, 1.0, groups=case.groups)()
    except ValueError:
        value = expected
    assert case.signal(layer, 2) > 0
    for parameter, units in members.items():
        layer.get_parameter(parameter).data[units[2]] = 0
    assert case.signal(layer, 2) == 0
    torch.testing.assert_close(value, expected)


FEWER_KEYS = {
    "phi3": lambda: phi3(2),
    "gpt_bigcode": lambda: attention_of("gpt_bigcode", "GPTBigCodeAttention", bigcode_config(True)),
    "falcon": lambda: attention_of("falcon", "FalconAttention", config_of("Falcon", **LLM, multi_query=True), 0),
}


@pytest.mark.parametrize("name", FEWER_KEYS)
def test_a_fused_projection_whose_queries_share_keys_is_refused(name):
    with pytest.raises(ValueError, match="share keys and values"):
        GroupLasso(FEWER_KEYS[name](), 1.0, groups=Heads(HEADS))


@pytest.mark.parametrize("name", ["torch", "timm", "timm swin", "gpt2", "gpt_neox", "bloom", "modernbert"])
def test_rows_of_three_different_heads_make_no_head(name):
    """The rows of q of head 0, of k of head 1 and of v of head 2: as many as a head has."""
    case = ATTENTION[name]
    layer = without_bias(case.make())
    penalty = GroupLasso(layer, 1.0, groups=case.groups)
    ((parameter, units),) = case.members(layer).items()
    dim = 1 if name == "gpt2" else 0
    for head in range(3):
        lines = units[head].any(1 - dim).nonzero().flatten()
        layer.get_parameter(parameter).data.index_fill_(dim, lines.tensor_split(3)[head], 0.0)
    assert penalty.zero_groups() == {parameter: []}


# Recurrent units span two matrices


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell], ids=lambda make: make.__name__)
def test_a_recurrent_unit_is_dead_only_where_both_of_its_matrices_are_zero(make):
    layer = make(5, 6, bias=False).double()
    names = [name for name, _ in layer.named_parameters()]
    for zeroed, dead in ((names[0], {}), (names[1], each(names, 2))):
        layer.get_parameter(zeroed).data[gates(layer.get_parameter(zeroed), 6)[2]] = 0
        assert dead_units(layer) == dead
        assert (hidden_state(layer, 2) == 0) == (bool(dead) or isinstance(layer, nn.RNNCellBase))


def test_recurrent_units_of_each_layer_and_direction_are_their_own():
    layer = nn.LSTM(5, 6, num_layers=2, bidirectional=True, bias=False)
    for name, unit in (("ih_l0", 1), ("hh_l0_reverse", 1), ("ih_l1", 3), ("hh_l1", 3), ("hh_l1_reverse", 3)):
        w = layer.get_parameter(f"weight_{name}")
        w.data[gates(w, 6)[unit]] = 0
    assert dead_units(layer) == {"weight_ih_l1": [3], "weight_hh_l1": [3]}


def test_one_gate_of_a_recurrent_unit_is_no_unit():
    layer = nn.LSTM(5, 6)
    layer.weight_ih_l0.data[2] = layer.weight_hh_l0.data[2] = 0
    assert dead_units(layer) == {}
    assert GroupLasso(layer, 1.0).zero_groups() == {"weight_ih_l0": [], "weight_hh_l0": []}
