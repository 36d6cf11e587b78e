"""The factor on lambda at which a prox makes an element (group) zero, beside the prox itself."""

from dataclasses import replace

import pytest
import torch
from helpers.kinds import ONE_STEP, VARIANTS
from torch import nn

from torch_regpen import L1
from torch_regpen.groups import Elements
from torch_regpen.ops.prox import prox
from torch_regpen.ops.thresholds import sampled, stride_for, zero_factors

INTERPOLATED = {"MCP", "SCAD", "LogSum", "Capped"}  # whose thresholds have a kink
MAKE_ZEROS = [name for name in VARIANTS if name not in ("L2", "tensors of L2")]


def after(terms, step, factor):
    """What the prox leaves of each element (group) at this factor on lambda."""
    left = prox([replace(term, factor=factor * term.factor) for term in terms], step)
    grouping = next((term.grouping for term in terms if term.grouped), Elements())
    return grouping.polar(terms[0].offset(left))[0].flatten()


@pytest.mark.parametrize(
    ("name", "by_coordinate"),
    [(name, False) for name in MAKE_ZEROS] + [(name, True) for name in MAKE_ZEROS if name not in ONE_STEP],
)
def test_there_the_prox_begins_to_make_it_zero(name, by_coordinate):
    torch.manual_seed(0)
    model = nn.Linear(20, 12, bias=False)
    terms = VARIANTS[name](model, 0.01).terms()
    off = 0.02 if name in INTERPOLATED else 0.003
    step = torch.rand(12, 20) + 0.1 if by_coordinate else torch.tensor(0.3)
    with torch.no_grad():
        model.weight.mul_(3)  # some lie beyond the knee or the cap of their kind
        factors = zero_factors([(terms, step)])
        assert factors.isfinite().all()
        small = 1e-6 if name == "singular values" else 0.0  # which a prox leaves to rounding
        for i in range(0, len(factors), 7):
            if factors[i] > 0:
                assert after(terms, step, float(factors[i]) * (1 - off))[i] > small
                assert after(terms, step, float(factors[i]) * (1 + off))[i] <= small


def test_what_is_zero_takes_no_lambda_and_what_has_no_prox_all():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[0.0, 1.0, -2.0, 0.0]])
    terms = L1(model, 0.5).terms()
    inf = torch.inf
    with torch.no_grad():
        assert zero_factors([(terms, 1.0)]).tolist() == [0, 2, 4, 0]
        assert zero_factors([(terms, None)]).tolist() == [0, inf, inf, 0]
        assert zero_factors([(terms, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))]).tolist() == [0, inf, 4, 0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sample_takes_the_same_of_each_tensor_without_a_copy(layout):
    model = nn.Conv2d(32, 48, 3, bias=False).to(memory_format=layout)
    terms = L1(model, 0.1).terms()
    stride = stride_for([terms], 100, 100)
    take = sampled(terms, stride, 5)
    w = model.weight.detach()
    assert 90 < take(w).numel() <= 150
    assert take(w).untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
    assert torch.equal(take(2 * w), 2 * take(w))
    assert torch.equal(take((2 * w).contiguous()), 2 * take(w))


@pytest.mark.parametrize("size", [9, 25, 49, 64, 768])
def test_a_sample_is_of_all_columns(size):
    model = nn.Linear(size, 2000, bias=False)
    terms = L1(model, 0.1).terms()
    stride = stride_for([terms], 1000, 1000)
    columns = sampled(terms, stride, 0)(torch.arange(size).expand(2000, size))
    assert columns.unique().numel() > 0.7 * size


@pytest.mark.parametrize("inner", [(), (7,), (30, 7), (2, 3, 5)])
def test_a_sample_of_tensors_of_many_shapes_is_about_as_large_as_asked_for(inner):
    tensors = [torch.ones(size, *inner) for size in range(100, 300)]
    terms = [[term] for term in L1(tensors, 0.1, select="all").terms(frozen=True)]
    elements = sum(w.numel() for w in tensors)
    for wanted in (elements // 2, elements // 10, elements // 33):
        stride = stride_for(terms, wanted, wanted)
        assert wanted / 2 <= elements / stride <= 2.1 * wanted
