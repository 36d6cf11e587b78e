"""Exact zeros handed on: to torch.nn.utils.prune, to files of torch.save, and to Torch-Pruning."""

import copy
import io
import math
import runpy
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations, prune

from torch_regpen import L1, GroupLasso
from torch_regpen.export import dead_units, load_sparse_state_dict, prune_masks, sparse_state_dict

EXAMPLE = Path(__file__).parent.parent / "examples" / "export_pruned.py"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def zero_(tensor, dim, units):
    with torch.no_grad():
        tensor.index_fill_(dim, torch.tensor(units), 0)


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
    with pytest.raises(ValueError, match="beside a penalty"):
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
    with pytest.raises(ValueError, match=r"'w' is a tensor without a module"):
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


# Sparse files


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def sparse_layer(rows=300, columns=200, kept=0.1):
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < kept)
    return layer


def test_a_sparse_file_is_smaller_and_loads_into_the_model(tmp_path):
    model = nn.Sequential(sparse_layer(), nn.BatchNorm1d(300), nn.Linear(300, 10))
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    torch.save(sparse_state_dict(model), tmp_path / "sparse.pt")
    nonzeros = int((model[0].weight != 0).sum())
    saves = 4 * 300 * 200 - (nonzeros * 8 + 4 * 301)
    sizes = [(tmp_path / name).stat().st_size for name in ("dense.pt", "sparse.pt")]
    assert sizes[0] - sizes[1] == pytest.approx(saves, abs=2000)  # two entries more
    assert sizes[1] < 0.3 * sizes[0]

    state = torch.load(tmp_path / "sparse.pt", weights_only=True)
    assert state["0.weight"].layout == torch.sparse_csr
    assert state["2.weight"].layout == torch.strided
    other = nn.Sequential(nn.Linear(200, 300), nn.BatchNorm1d(300), nn.Linear(300, 10))
    other.load_state_dict({name: w.to_dense() for name, w in state.items()})
    assert all(torch.equal(w, other.state_dict()[name]) for name, w in model.state_dict().items())


class Versioned(nn.Module):
    """A module whose state dict has changed since its first version, and holds what is no tensor."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.zeros(20, 20))
        self.found = None

    def get_extra_state(self):
        return {"note": "extra"}

    def set_extra_state(self, state):
        self.found = state

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("way", ["as it is", "through a file"])
def test_a_sparse_state_dict_loads_into_a_model_that_is_trained_on(way, tmp_path, recwarn):
    def make():
        model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), Versioned())
        return model.double()

    model, other = make(), make()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(20, 30) < 0.1)
    state = sparse_state_dict(model)
    assert state["0.weight"].layout == torch.sparse_csr
    if way == "through a file":
        torch.save(state, tmp_path / "model.pt")
        state = torch.load(tmp_path / "model.pt", weights_only=True)
    weight, names = other[0].weight, list(state)
    recwarn.clear()
    load_sparse_state_dict(other, state)
    assert not recwarn.list
    assert other[0].weight is weight
    assert other[2].found == {"note": "extra"}
    for name in ("0.weight", "0.bias", "1.running_mean", "2.mask"):
        assert torch.equal(other.state_dict()[name], model.state_dict()[name])
    assert (list(state), state["0.weight"].layout) == (names, torch.sparse_csr)
    other[0](torch.ones(1, 30).double()).sum().backward()


def test_a_sparse_state_dict_of_another_model_is_refused():
    model = nn.Linear(30, 20)
    nn.init.zeros_(model.weight)
    for other, match in ((nn.Linear(30, 10), "size mismatch"), (nn.Sequential(nn.Linear(30, 20)), "Missing key")):
        with pytest.raises(RuntimeError, match=match):
            load_sparse_state_dict(other, sparse_state_dict(model))


def test_the_model_and_its_own_state_stay_dense():
    layer = sparse_layer()
    sparse_state_dict(layer)
    assert layer.weight.layout == layer.state_dict()["weight"].layout == torch.strided


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_is_sparse_where_that_is_smaller(dtype):
    rows, columns = 40, 60
    most = (rows * columns * dtype.itemsize - 4 * (rows + 1) - 1) // (dtype.itemsize + 4)
    for nonzeros in (most, most + 1):
        layer = nn.Linear(columns, rows, bias=False, dtype=dtype)
        layer.weight.data.fill_(0).view(-1)[torch.randperm(rows * columns)[:nonzeros]] = 1.5
        w = sparse_state_dict(layer)["weight"]
        assert (w.layout == torch.sparse_csr) == (nonzeros == most)
        parts = (w.crow_indices(), w.col_indices(), w.values()) if nonzeros == most else (w,)
        assert sum(part.nbytes for part in parts) <= layer.weight.nbytes
        assert torch.equal(torch.load(io.BytesIO(saved(w)), weights_only=True).to_dense(), layer.weight)


def test_what_is_no_matrix_of_weights_stays_as_it_is():
    model = nn.Module()
    others = {
        "vector": torch.zeros(100),
        "filters": torch.zeros(10, 10, 3, 3),
        "whole": torch.zeros(50, 50, dtype=torch.int64),
        "eighth": torch.zeros(50, 50).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 5),
        "sparse": torch.eye(50).to_sparse(),
    }
    for name, tensor in others.items():
        model.register_buffer(name, tensor)
    model.penalty = L1([("w", torch.ones(2, requires_grad=True))], 0.1)
    state = sparse_state_dict(model)
    assert {name: state[name].layout for name in others} == {name: w.layout for name, w in others.items()}
    assert "penalty._extra_state" in state
    torch.load(io.BytesIO(saved(state)), weights_only=True)


def test_a_matrix_that_two_layers_share_is_in_the_file_once():
    one, two = nn.Sequential(sparse_layer()), nn.Sequential(sparse_layer(), sparse_layer())
    two[1].weight = two[0].weight
    assert len(saved(sparse_state_dict(two))) < 1.1 * len(saved(sparse_state_dict(one)))


def test_a_sharded_matrix_stays_as_it_is(one_rank):
    layer = nn.Linear(50, 50)
    layer.weight = nn.Parameter(distribute_tensor(torch.zeros(50, 50), one_rank, [Shard(0)]))
    assert sparse_state_dict(layer)["weight"].layout == torch.strided


# Torch-Pruning: dead units taken out


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("torch_pruning")
    pytest.importorskip("sklearn")
    return runpy.run_path(str(EXAMPLE))


def with_dead_units(model, share=0.5):
    """The model in float64, `share` of the units of each layer but the last dead, with biases that say so."""
    layers = [layer for layer in model.double() if hasattr(layer, "weight")]
    for layer in layers:
        nn.init.normal_(layer.bias)
    for layer in layers[:-1]:
        zero_(layer.weight, 0, torch.randperm(len(layer.weight))[: int(share * len(layer.weight))].tolist())
    return model


@pytest.mark.parametrize("make", ["mlp", "convnet"])
def test_a_shrunk_model_gives_the_same_outputs(example, make):
    model, x = with_dead_units(example[make]()), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    before, size = model(x), sum(p.numel() for p in model.parameters())
    taken = example["shrink"](model, x[:1])
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert list(taken.values()) == {"mlp": [150, 50], "convnet": [16, 32, 50]}[make]
    assert sum(p.numel() for p in model.parameters()) < 0.5 * size
    assert not dead_units(model)


def test_folding_alone_changes_no_output_and_leaves_the_units_silent(example):
    model, x = with_dead_units(example["mlp"]()), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    before, units = model(x), dead_units(model)["1.weight"]
    example["fold"](model[1], model[2:3], model[3], units, x[:1].flatten(1))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert (model[:3](x)[:, units] == 0).all()


def test_the_constants_of_dead_units_matter(example, monkeypatch):
    model, x = with_dead_units(example["mlp"]()), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    before = model(x)
    monkeypatch.setitem(example["shrink"].__globals__, "fold", lambda *_: None)
    example["shrink"](model, x[:1])
    assert (model(x) - before).abs().max() > 0.1


def test_units_that_die_with_those_before_them_are_taken_out_too(example):
    model = with_dead_units(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), 0.25
    )
    alive = (model[0].weight != 0).any(dim=1)
    with torch.no_grad():
        model[2].weight[[0, 3]] *= ~alive  # these read only what is dead
    x = torch.randn(20, 3, dtype=torch.float64)
    before = model(x)
    assert example["shrink"](model, x[:1])[2] >= 2
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_of_a_layer_that_is_all_dead_one_unit_stays(example):
    model, x = with_dead_units(example["mlp"](), share=1), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    before = model(x)
    assert example["shrink"](model, x[:1]) == {1: 299, 3: 99}
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_what_cannot_be_folded_is_refused(example):
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    padded = with_dead_units(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)))
    with pytest.raises(ValueError, match="padding"):
        example["shrink"](padded, x)
    shifted = with_dead_units(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3)))
    with pytest.raises(ValueError, match="zeros"):
        example["shrink"](shifted, x)


def test_a_shrunk_model_is_faster(example):
    layers = nn.Linear(64, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 10)
    model, x = with_dead_units(nn.Sequential(*layers), 0.9), torch.randn(50, 64, dtype=torch.float64)

    def seconds():
        times = []
        for _ in range(5):
            start = time.process_time()
            model(x)
            times.append(time.process_time() - start)
        return min(times)

    before = seconds()
    example["shrink"](model, x[:1])
    assert seconds() < before / 3


def test_the_example_says_so(example, capsys):
    example["main"](["--epochs", "2"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [row[0] for row in rows] == ["mlp", "without", "convnet", "without"]
    accuracies = [row[-1] for row in rows]
    assert accuracies[0] == accuracies[1]
    assert accuracies[2] == accuracies[3]
