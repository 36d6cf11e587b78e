"""Which dimension the units of a layer lie along."""

import sys
import types

import pytest
import torch
from helpers.kinds import group_lasso, l1
from helpers.nets import Encoder
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from torch_regpen import L1, L2, ElasticNet, GroupLasso

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


def test_a_bare_tensor_has_outputs_along_dim_0_and_inputs_along_dim_1():
    w = torch.randn(3, 4, requires_grad=True)
    torch.testing.assert_close(GroupLasso([w], 0.1)(), 0.1 * group_lasso(w, 0))
    torch.testing.assert_close(GroupLasso([w], 0.1, groups="input")(), 0.1 * group_lasso(w, 1))


def test_output_groups_of_a_bias_are_its_elements():
    layer = nn.ConvTranspose2d(3, 4, 2)
    torch.testing.assert_close(GroupLasso(layer, 0.1, select="bias")(), 0.1 * l1(layer.bias))


@pytest.mark.parametrize("kind", [L1, L2, ElasticNet, GroupLasso])
def test_groups_that_a_parameter_does_not_have_are_refused_at_construction(kind):
    with pytest.raises(ValueError, match=r"head\.bias"):
        kind(Encoder(), 0.1, select="head.*", groups="input")
    with pytest.raises(ValueError, match="dimension"):
        kind([torch.ones(3, requires_grad=True)], 0.1, groups="input")
    with pytest.raises(ValueError, match="dimension 2"):
        kind(nn.Linear(3, 2), 0.1, groups=2)
    with pytest.raises(ValueError, match="rows"):
        kind(Encoder(), 0.1, groups="rows")
    with pytest.raises(TypeError):
        kind(Encoder(), 0.1, groups=1.0)
