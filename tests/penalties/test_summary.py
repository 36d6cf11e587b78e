"""What a penalty says of itself: its repr and its summary."""

import pytest
import torch
from helpers.kinds import BASIC, OMEGA
from helpers.nets import network
from torch import nn

from torch_regpen import L1, GroupLasso

LAM = 0.03
EACH = pytest.mark.parametrize("kind", BASIC)


# What it says of itself


@EACH
def test_repr_says_what_it_holds(kind):
    penalty = BASIC[kind](network(), 0.0125)
    text = repr(penalty)
    assert text.startswith(kind)
    assert "0.0125" in text
    assert "0.weight" in text
    assert "2.weight" in text
    assert "bias" not in text
    penalty.lam = 0.75
    assert "0.75" in repr(penalty)


def test_repr_says_the_groups_and_stays_short():
    assert "output" in repr(GroupLasso(network(), LAM))
    assert "input" in repr(GroupLasso(network(), LAM, groups="input"))
    many = L1(nn.Sequential(*[nn.Linear(2, 2) for _ in range(100)]), LAM)
    assert len(repr(many)) < 200
    assert "100 parameters" in repr(many)
    grouped = L1([{"params": network(), "lam": 0.5}, {"params": network(), "lam": 0.25}], LAM)
    assert "0.5" in repr(grouped)
    assert "0.25" in repr(grouped)


def rows(penalty):
    return [line.split() for line in penalty.summary().splitlines()[1:-1]]


@EACH
def test_summary_has_a_row_for_each_parameter(kind, device):
    model = network(device)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2, 0] = 0
    table = BASIC[kind](model, 0.5).summary()
    first, second, _ = table.splitlines()[1:]
    assert ("0.weight" in first, "2.weight" in second) == (True, True)
    assert ("(6, 5)" in first, "(3, 6)" in second) == (True, True)
    assert (" 0.5 " in first, " 0.5 " in second) == (True, True)
    value = 0.5 * OMEGA[kind](model[0].weight).item()
    assert any(cell == pytest.approx(value, rel=1e-4) for cell in map(float, numbers_of(first)))
    assert ("6/30" in first, "0/18" in second) == (True, True)
    for word in ("shape", "lam", "value", "zero"):
        assert word in table.splitlines()[0]


def numbers_of(line):
    return [cell for cell in line.split() if cell.replace(".", "").replace("e-", "").isdigit()]


def test_summary_counts_whole_groups_that_are_zero():
    model = network()
    with torch.no_grad():
        model[0].weight[1:3] = 0

    def counts(penalty):
        return [row[-1].split("/")[0] for row in rows(penalty)]

    assert counts(GroupLasso(model, LAM)) == ["2", "0"]
    assert counts(GroupLasso(model, LAM, groups="input")) == ["0", "0"]
    assert counts(L1(model, LAM)) == ["-", "-"]


def test_summary_on_the_meta_device_says_what_is_selected():
    penalty = L1(network("meta"), LAM)
    assert [row[0] for row in rows(penalty)] == [name for name, _ in penalty.named_parameters_penalized()]


def test_summary_of_a_sum_and_of_nothing():
    model = network()
    both = L1(model, LAM) + GroupLasso(model, LAM)
    assert len(rows(both)) == 4
    assert {row[1] for row in rows(both)} == {"L1", "GroupLasso"}
    model[0].requires_grad_(False)
    assert len(rows(both)) == 2
    model.requires_grad_(False)  # as of an average: then all are meant
    assert len(rows(both)) == 4


def test_before_the_first_forward_of_a_lazy_model_no_element_is_zero():
    penalty = L1(nn.LazyLinear(3), LAM)
    assert penalty.sparsity() == 0
    assert penalty.zero_groups() == {}
    assert penalty.summary().splitlines()[1].split() == ["total", "0", "0/0", "-"]
