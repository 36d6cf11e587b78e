"""Sparse state dicts: smaller files that load into the model."""

import io

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from torch_regpen import L1
from torch_regpen.export import load_sparse_state_dict, sparse_state_dict

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


def test_what_is_no_model_and_no_state_dict_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model must be a .*Module, not a OrderedDict"):
        sparse_state_dict(model.state_dict())
    with pytest.raises(TypeError, match=r"given a Linear and a str; allowed are .* and a state dict"):
        load_sparse_state_dict(model, "model.pt")
    with pytest.raises(TypeError, match="given a OrderedDict and a Linear"):
        load_sparse_state_dict(model.state_dict(), model)
