"""Dead units, and masks that hold zeros in training."""

import copy
import math

import pytest
import torch
from helpers.nets import zero_
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations, prune

from torch_regpen import L1, GroupLasso
from torch_regpen.export import dead_units, prune_masks


@pytest.fixture
def model():
    """Half of all weights are zero; unit 1 of both layers is dead, and no weight reads input 0."""
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.5)
            layer.weight[:, 2] = 1
            layer.weight[:, 0] = layer.weight[1] = 0
    return model


def train(model, optimizer, inputs=5, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, inputs)).square().sum().backward()
        optimizer.step()


# Dead units


def test_dead_units_are_output_units_wherever_their_weights_lie():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 8),
            "conv": nn.Conv2d(2, 8, 3),
            "transposed": nn.ConvTranspose2d(3, 8, 2),
            "embedding": nn.Embedding(8, 3),
            "alive": nn.Linear(6, 8),
            "norm": nn.BatchNorm1d(8),
        }
    )
    for name, dim in {"linear": 0, "conv": 0, "transposed": 1, "embedding": 0}.items():
        zero_(model[name].weight, dim, [2, 5])
    zero_(model["alive"].weight, 1, [0])
    zero_(model["alive"].bias, 0, [0])
    assert dead_units(model) == {f"{name}.weight": [2, 5] for name in ("linear", "conv", "transposed", "embedding")}
    assert dead_units(GroupLasso(model, 0.1, groups="input")) == {"alive.weight": [0]}  # which nothing reads
    assert dead_units(model, select="conv*") == {"conv.weight": [2, 5]}


def test_a_unit_is_dead_if_all_is_exactly_zero():
    layer = nn.Linear(2, 5)
    layer.weight.data = torch.tensor([[0.0, -0.0], [0.0, 1e-30], [1e-45, 0.0], [math.nan, 0.0], [0.0, math.inf]])
    assert dead_units(layer) == {"weight": [0]}


def test_frozen_and_shared_weights_and_those_of_two_models(model):
    model.requires_grad_(False)
    model.add_module("again", model[0])
    assert dead_units(model) == {"0.weight": [1], "2.weight": [1]}
    other = copy.deepcopy(model)
    zero_(other[0].weight, 0, [3])
    assert dead_units(L1(model, 0.1) + L1(model, 0.2) + L1(other, 0.1)) == {
        **{"0.weight": [1], "2.weight": [1]},
        **{"0.weight_": [1, 3], "2.weight_": [1]},
    }


def test_dead_units_of_sharded_weights(one_rank):
    layer = nn.Linear(2, 3)
    zero_(layer.weight, 0, [1])
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, one_rank, [Shard(0)]))
    assert dead_units(layer) == {"weight": [1]}


@pytest.mark.parametrize("function", [dead_units, prune_masks])
def test_what_is_neither_penalty_nor_model_is_refused(function, model):
    with pytest.raises(TypeError, match=r"list; allowed are a penalty.*nn\.Module"):
        function([model[0].weight])
    with pytest.raises(ValueError, match="with a penalty"):
        function(L1(model, 0.1), select="*")
    with pytest.raises(ValueError, match="matches none"):
        function(model, select="nothing")


# Masks


def test_masks_change_no_output_and_come_off_again(model):
    x, before = torch.randn(3, 5), {name: w.clone() for name, w in model.state_dict().items()}
    outputs = model(x)
    masks = prune_masks(model)
    assert torch.equal(model(x), outputs)
    assert {name: torch.equal(mask, before[name] != 0) for name, mask in masks.items()} == {
        **{"0.weight": True, "2.weight": True}
    }
    for layer in (model[0], model[2]):
        assert prune.is_pruned(layer)
        prune.remove(layer, "weight")
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_the_zeros_hold_in_training_and_the_optimizer_stays_valid(make, model):
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.01, **options)
    masks = prune_masks(model)
    train(model, optimizer)
    for name, mask in masks.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        prune.remove(layer, "weight")
        assert torch.equal(layer.weight != 0, mask)


def test_momentum_that_pushes_on_zeros_does_not_get_through(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train(model, optimizer)
    zero_(model[0].weight, 0, [3])
    prune_masks(model, select="0.weight")
    train(model, optimizer)
    assert (model[0].weight_orig[3] != 0).any()
    assert (model[0].weight[3] == 0).all()


def test_a_penalty_says_which_parameters(model):
    assert set(prune_masks(L1(model, 0.1, select="2.*"))) == {"2.weight"}
    assert not prune.is_pruned(model[0])
    model[2].bias.data.zero_()
    prune_masks(model)
    assert "bias" in model[2]._parameters


def test_a_parameter_without_zeros_is_left_alone():
    layer = nn.Linear(3, 3)
    assert prune_masks(layer) == {}
    assert not prune.is_pruned(layer)


def test_masks_add_up(model):
    prune_masks(model)
    with torch.no_grad():
        model[0].weight_orig[5] = 0
        model[0].weight_orig[1] = 7  # as an optimizer may leave it where the mask is zero
    masks = prune_masks(model)
    assert set(masks) == {"0.weight_orig", "2.weight_orig"}
    assert set(model.state_dict()) == {f"{i}.{key}" for i in (0, 2) for key in ("weight_orig", "weight_mask", "bias")}
    model(torch.randn(2, 5))
    assert (model[0].weight[[1, 5]] == 0).all()


def test_a_weight_that_two_layers_share_is_masked_in_both_and_stays_shared():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    zero_(model[0].weight, 0, [2])
    assert list(prune_masks(model)) == ["0.weight"]
    assert model[0].weight_orig is model[1].weight_orig
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(6)).square().sum().backward()
    optimizer.step()
    model(torch.arange(6))
    assert (model[0].weight[2] == 0).all()
    assert torch.equal(model[0].weight, model[1].weight)


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 5), lambda: nn.MultiheadAttention(4, 2)])
def test_layers_with_several_weights_of_their_own(make):
    model, x = make(), torch.randn(3, 2, 4)
    args = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
    weight = next(w for w in model.parameters() if w.ndim == 2)
    zero_(weight, 0, [1])
    outputs = model(*args)[0]
    assert len(prune_masks(model)) == 1
    assert torch.equal(model(*args)[0], outputs)
    model(*args)[0].sum().backward()
    assert (weight.grad[1] == 0).all()
    assert (weight.grad[0] != 0).any()


def test_what_cannot_be_masked_is_refused_and_nothing_is_changed(model, one_rank):
    with pytest.raises(ValueError, match=r"'w' is not in a module"):
        prune_masks(L1([("w", torch.zeros(2, requires_grad=True))], 0.1))
    parametrizations.orthogonal(model[2])
    zero_(model[2].parametrizations.weight.original, 0, [1])
    with pytest.raises(ValueError, match=r"'2\.parametrizations.*remove_parametrizations"):
        prune_masks(model)
    assert not prune.is_pruned(model[0])
    model[2] = nn.Linear(7, 4)
    model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.data, one_rank, [Shard(0)]))
    with pytest.raises(ValueError, match=r"'2\.weight' is sharded.*freeze_zeros"):
        prune_masks(model)
    assert not prune.is_pruned(model[0])


class Holder(nn.Module):
    """Reads parameters of a submodule without calling it."""

    def __init__(self, held, read):
        super().__init__()
        self.held, self.read = held, read

    def forward(self, x):
        return x @ self.read(self.held)


@pytest.mark.parametrize(
    ("make", "weight", "name"),
    [
        (lambda: nn.MultiheadAttention(4, 2), lambda m: m.out_proj.weight, "out_proj.weight"),
        (lambda: Holder(nn.ParameterList([torch.ones(4, 4)]), lambda p: p[0]), lambda m: m.held[0], "held.0"),
        (lambda: Holder(nn.ParameterDict({"a": torch.ones(4, 4)}), lambda p: p["a"]), lambda m: m.held["a"], "held.a"),
    ],
)
def test_a_mask_in_a_module_that_is_not_called_is_refused(make, weight, name):
    model = make()
    zero_(weight(model), 0, [1])
    with pytest.raises(ValueError, match=rf"'{name}' is in a .*, which is not called.*freeze_zeros\(\)"):
        prune_masks(model)
    assert not prune.is_pruned(model)


@pytest.mark.parametrize(("norm", "key"), [(nn.utils.weight_norm, "weight_v"), (nn.utils.spectral_norm, "weight_orig")])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_mask_under_a_weight_norm_in_hooks_is_refused(norm, key):
    layer = norm(nn.Linear(4, 3))
    zero_(getattr(layer, key), 0, [1])
    with pytest.raises(ValueError, match=f"'{key}' is parametrized; call .*remove_weight_norm or remove_spectral_norm"):
        prune_masks(layer)
    assert not prune.is_pruned(layer)
