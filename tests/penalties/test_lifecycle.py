"""What happens to a model while it is trained: casts, loading, copies, sharding; the penalty goes with it."""

import copy
import io
import pickle

import pytest
import torch
from helpers.kinds import BASIC, OMEGA
from torch import nn
from torch.nn.utils import parametrizations

from torch_regpen import L1, L2, GroupLasso

LAM = 0.3
EACH = pytest.mark.parametrize("kind", BASIC)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def expected(kind, model, lam=LAM):
    return lam * (OMEGA[kind](model.first.weight) + OMEGA[kind](model.second.weight))


def assert_holds(penalty, kind, model, lam=LAM):
    """`penalty` is on the weights of `model` as they are now: for the value, the gradient and the prox."""
    torch.testing.assert_close(penalty(), expected(kind, model, lam))
    owned = dict(model.named_parameters())
    held = dict(penalty.named_parameters_penalized())
    assert held.keys() == {"first.weight", "second.weight"}
    assert all(held[name] is owned[name] for name in held)
    model.zero_grad()
    penalty().backward()
    assert model.first.weight.grad.any()
    assert model.second.weight.grad.any()


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_follows_a_cast_of_the_model(kind, dtype, device):
    model = Net()
    penalty = BASIC[kind](model, LAM)
    model.to(device, dtype)
    assert penalty().dtype == dtype
    assert penalty().device.type == device.type
    assert_holds(penalty, kind, model)


@EACH
def test_it_follows_parameters_that_a_cast_replaces(kind):
    model = Net()
    penalty = BASIC[kind](model, LAM)
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        old = model.first.weight
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    assert model.first.weight is not old
    assert_holds(penalty, kind, model)


@EACH
def test_it_follows_from_the_meta_device(kind, device):
    with torch.device("meta"):
        model = Net()
    penalty = BASIC[kind](model, LAM)
    assert penalty().is_meta
    model.to_empty(device=device)
    for p in model.parameters():
        nn.init.normal_(p)
    assert_holds(penalty, kind, model)


@EACH
@pytest.mark.parametrize("assign", [False, True])
def test_it_follows_a_loaded_state(kind, assign):
    model, other = Net(), Net()
    penalty = BASIC[kind](model, LAM)
    penalty()
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    torch.testing.assert_close(penalty(), expected(kind, other))
    assert_holds(penalty, kind, model)


@EACH
def test_it_follows_a_parameter_that_is_set_anew(kind):
    model = Net()
    penalty = BASIC[kind](model, LAM)
    model.first.weight = nn.Parameter(torch.randn(4, 3))
    assert_holds(penalty, kind, model)


def test_it_follows_vector_to_parameters_and_data_swaps():
    model = Net()
    penalty = L1(model, LAM)
    nn.utils.vector_to_parameters(torch.ones(26), model.parameters())
    assert penalty().item() == pytest.approx(LAM * 20)
    model.first.weight.data = torch.zeros(7, 3)
    assert penalty().item() == pytest.approx(LAM * 8)


# Copies


def duplicates(*objects):
    buffer = io.BytesIO()
    torch.save(objects, buffer)
    buffer.seek(0)
    yield copy.deepcopy(objects)
    yield pickle.loads(pickle.dumps(objects))
    yield torch.load(buffer, weights_only=False)


def assert_tied_apart_from(original, kind, model, penalty):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    assert_holds(penalty, kind, model)
    assert not torch.allclose(penalty(), original())
    lam = original.lam
    penalty.lam = 2 * lam
    assert original.lam == lam
    penalty.lam = lam


@EACH
def test_copies_of_model_and_penalty_stay_tied(kind):
    model = Net()
    penalty = BASIC[kind](model, LAM)
    penalty()
    for model_copy, penalty_copy in duplicates(model, penalty):
        assert_tied_apart_from(penalty, kind, model_copy, penalty_copy)
    for penalty_copy, model_copy in duplicates(penalty, model):
        assert_tied_apart_from(penalty, kind, model_copy, penalty_copy)


@EACH
def test_copies_of_a_model_with_its_penalty_in_it_stay_tied(kind):
    model = Net()
    model.penalty = BASIC[kind](model, LAM)
    for (model_copy,) in duplicates(model):
        assert_tied_apart_from(model.penalty, kind, model_copy, model_copy.penalty)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert_tied_apart_from(model.penalty, kind, averaged.module, averaged.module.penalty)


def test_copies_of_tensors_and_penalty_stay_tied():
    w = torch.randn(3, 2, requires_grad=True)
    for params in ([w], [("w", w)], [{"params": [w]}], [{"params": iter([w])}]):
        for w_copy, penalty in duplicates(w, L1(params, LAM)):
            with torch.no_grad():
                w_copy.fill_(1)
            torch.testing.assert_close(penalty(), torch.tensor(6 * LAM))


def test_copies_of_a_sum_and_of_parametrized_and_lazy_models():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    parametrizations.orthogonal(model[1])
    penalty = L1(model, LAM) + L2(model, LAM, select="*.weight")
    for model_copy, penalty_copy in (copy.deepcopy((model, penalty)),):
        model_copy(torch.randn(4, 5))
        held = [model_copy[0].weight, model_copy[1].parametrizations.weight.original]
        torch.testing.assert_close(penalty_copy(), LAM * sum(w.abs().sum() + w.square().sum() for w in held))


def test_what_is_frozen_survives_a_copy():
    model = Net()
    penalty = L1(model, LAM)
    model.first.weight.requires_grad_(False)
    for model_copy, penalty_copy in duplicates(model, penalty):
        torch.testing.assert_close(penalty_copy(), LAM * model_copy.second.weight.abs().sum())


# Checkpoints


@EACH
def test_lambda_travels_in_the_state_dict(kind):
    model = Net()
    penalty = BASIC[kind](model, LAM)
    state = copy.deepcopy(penalty.state_dict())
    penalty.lam = 7.0
    penalty.load_state_dict(state)
    assert penalty.lam == LAM


def test_the_lambdas_of_groups_travel_in_the_state_dict():
    model = Net()
    groups = [{"params": model.first, "lam": 0.1}, {"params": model.second, "lam": 1e-30}]
    state = L1(groups, LAM).state_dict()
    other = L1([{"params": model.first}, {"params": model.second}], LAM)
    other.load_state_dict(state)
    assert [group["lam"] for group in other.param_groups] == [0.1, 1e-30]
    with pytest.raises((ValueError, RuntimeError), match="2 groups"):
        L1(model, LAM).load_state_dict(state)


def test_the_state_dict_holds_no_weight_and_a_broken_lambda_is_not_loaded():
    penalty = L1(Net(), LAM)
    (entry,) = penalty.state_dict().values()
    assert entry.numel() == 1
    for bad in (-1.0, float("nan")):
        with pytest.raises((ValueError, RuntimeError), match="lam"):
            penalty.load_state_dict({"_extra_state": torch.tensor([bad])})
    assert penalty.lam == LAM


def sums(model, lam):
    return L1(model, lam) + L2(model, 2 * lam)


@pytest.mark.parametrize("make", [*BASIC.values(), sums], ids=[*BASIC, "sum"])
def test_a_strict_load_of_a_checkpoint_from_before_the_penalty_was_there(make):
    old = Net().state_dict()
    model = Net()
    model.penalty = make(model, LAM)
    result = model.load_state_dict(old, strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert model.penalty.param_groups[0]["lam"] == LAM
    torch.testing.assert_close(model.first.weight.detach(), old["first.weight"])
    model.penalty.load_state_dict({}, strict=True)


@pytest.mark.parametrize("make", [*BASIC.values(), sums], ids=[*BASIC, "sum"])
def test_lambda_travels_with_the_model_through_a_weights_only_file(make):
    model, other = Net(), Net()
    model.penalty, other.penalty = make(model, LAM), make(other, 9.0)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    result = other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    lams = [group["lam"] for group in other.penalty.param_groups]
    assert lams == [group["lam"] for group in model.penalty.param_groups]
    assert lams[0] == LAM
    torch.testing.assert_close(other.penalty(), model.penalty())


@EACH
def test_as_a_submodule_it_is_no_part_of_the_forward_and_owns_nothing(kind):
    model = Net()
    before = [name for name, _ in model.named_parameters()]
    x = torch.randn(5, 3)
    output = model(x)
    model.penalty = BASIC[kind](model, LAM)
    assert [name for name, _ in model.named_parameters()] == before
    torch.testing.assert_close(model(x), output)
    model.train().eval().requires_grad_(True).zero_grad()
    model.apply(lambda module: None)
    assert kind in repr(model)
    assert_holds(model.penalty, kind, model)
    again = BASIC[kind](model, LAM)  # of a model that has one already
    assert_holds(again, kind, model)


# Sharded


@pytest.mark.parametrize("make", [*BASIC.values(), sums], ids=[*BASIC, "sum"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_it_follows_fully_shard(make, when, one_rank):
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(5, 3)
    plain = Net()
    model = copy.deepcopy(plain)
    if when == "before":
        penalty = make(model, LAM)
        penalty()
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=one_rank)
    if when == "after":
        penalty = make(model, LAM)
    reference = make(plain, LAM)

    def whole(tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    value = penalty()
    assert type(value) is torch.Tensor
    torch.testing.assert_close(value, reference())
    (model(x).square().mean() + value).backward()
    (plain(x).square().mean() + reference()).backward()
    for use in (lambda p: None, lambda p: p.add_grad_(), lambda p: p.prox_(0.1)):
        use(penalty), use(reference)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(p), q)
            torch.testing.assert_close(whole(p.grad), q.grad)
    distance = penalty.stationarity()
    assert type(distance) is torch.Tensor
    torch.testing.assert_close(distance, reference.stationarity())
    assert penalty.summary() == reference.summary()


def test_group_lasso_over_a_sharded_dimension(one_rank):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    w = torch.randn(4, 3)
    sharded = nn.Parameter(distribute_tensor(w, one_rank, [Shard(0)]))
    penalty = GroupLasso([sharded], LAM, groups="input")
    torch.testing.assert_close(penalty(), GroupLasso([nn.Parameter(w)], LAM, groups="input")())
    penalty.prox_(0.1)
    assert isinstance(sharded, DTensor)
