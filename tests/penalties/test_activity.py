"""ActivityPenalty: which activations count, and how often."""

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers import nets
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_regpen import ActivityPenalty, RegularizedOptimizer

# ActivityPenalty


network = partial(nets.network, dtype=torch.float64, sizes=(3, 4, 2), activation=nn.ReLU)


def size(kind, *outputs):
    return sum((a.abs() if kind == "l1" else a**2).sum() / len(a) for a in outputs)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_it_sums_over_features_and_averages_over_the_batch(kind):
    model, x = network(), torch.randn(5, 3, dtype=torch.float64)
    penalty = ActivityPenalty(model, 0.3, kind)
    h = model[0](x)
    outputs = h, h.relu(), model[2](h.relu())
    model(x)
    torch.testing.assert_close(penalty(), 0.3 * size(kind, *outputs))
    expected = torch.autograd.grad(0.3 * size(kind, *outputs), model.parameters())
    found = torch.autograd.grad(penalty(), model.parameters(), retain_graph=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(penalty(), penalty())
    penalty.lam = 0.6
    torch.testing.assert_close(penalty(), 0.6 * size(kind, *outputs))


def test_only_the_latest_forward_counts():
    model = network()
    penalty = ActivityPenalty(model, 1.0, select="2")
    for n in (5, 7, 1):
        x = torch.randn(n, 3, dtype=torch.float64)
        torch.testing.assert_close(size("l1", model(x)), penalty())
    with torch.no_grad():
        model.eval()(x)
    assert not penalty().requires_grad


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(2, 2), nn.Linear(2, 2), nn.Tanh()

    def forward(self, x, second=False):
        return self.act((self.second if second else self.first)(self.act(x)))


def test_a_module_counts_as_often_as_it_ran_in_the_latest_forward():
    model, x = Branches(), torch.randn(4, 2)
    act, first = ActivityPenalty(model, 1.0, select="act"), ActivityPenalty(model, 1.0, select="first")
    out = model(x)
    torch.testing.assert_close(act(), size("l1", x.tanh(), out))
    assert first() > 0
    model(x, second=True)
    assert first() == 0
    model.first(x)  # called by itself
    torch.testing.assert_close(first(), size("l1", model.first(x)))
    model.first(x)
    torch.testing.assert_close(first(), size("l1", model.first(x)))


def test_a_forward_that_fails_leaves_nothing_behind():
    model = network()
    penalty = ActivityPenalty(model, 1.0)
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 7, dtype=torch.float64))
    x = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(2):
        model[0](x)
    torch.testing.assert_close(penalty(), size("l1", model[0](x)))


def test_select_is_globs_on_module_names():
    model = nn.ModuleDict({"encoder": network(), "head": nn.Linear(2, 2).double()})
    x = torch.randn(5, 3, dtype=torch.float64)
    outputs = {}

    def run():
        encoder = model["encoder"]
        outputs["encoder.0"] = encoder[0](x)
        outputs["encoder.1"] = outputs["encoder.0"].relu()
        outputs["encoder.2"] = outputs["encoder"] = encoder(x)
        outputs["head"] = model["head"](outputs["encoder"])

    for select, names in (
        (None, ["encoder.0", "encoder.1", "encoder.2", "head"]),
        ("encoder.*", ["encoder.0", "encoder.1", "encoder.2"]),
        ("encoder", ["encoder"]),
        (["head", "*.1"], ["encoder.1", "head"]),
    ):
        penalty = ActivityPenalty(model, 1.0, select=select)
        run()
        torch.testing.assert_close(penalty(), size("l1", *(outputs[name] for name in names)))
        penalty.remove()
    with pytest.raises(ValueError, match=r"encoder\.1"):
        ActivityPenalty(model, 1.0, select="decoder.*")
    wrapped = nn.Module()
    wrapped.module = network()
    assert "1 modules: module.2" in repr(ActivityPenalty(wrapped, 1.0, select="2"))


def test_a_model_that_is_a_leaf_itself():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    penalty = ActivityPenalty(model, 1.0, "l2")
    out = model(x)
    torch.testing.assert_close(penalty(), size("l2", out))


def test_activations_in_place_are_seen_as_they_were():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    penalty = ActivityPenalty(model, 1.0, select="0")
    before = model[0](x)
    out = model(x)
    torch.testing.assert_close(penalty(), size("l1", before))
    (out.sum() + penalty()).backward()
    assert model[0].weight.grad.isfinite().all()


def test_remove_takes_the_hooks_off():
    model = network()
    penalty = ActivityPenalty(model, 1.0)
    model(torch.randn(5, 3, dtype=torch.float64))
    assert penalty() > 0
    penalty.remove()
    assert penalty() == 0
    model(torch.randn(5, 3, dtype=torch.float64))
    assert penalty() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    penalty.remove()


def test_copies_of_the_model_are_watched_by_copies_of_the_penalty():
    model, x = network(), torch.randn(5, 3, dtype=torch.float64)
    penalty = ActivityPenalty(model, 1.0)
    model(x)
    value = penalty().item()
    copied = copy.deepcopy(model)  # with tensors of a graph in the hooks
    copied(2 * x)
    assert penalty().item() == value
    for other, of_other in (copy.deepcopy((model, penalty)), pickle.loads(pickle.dumps((model, penalty)))):
        with pytest.raises(RuntimeError, match="has not run yet"):
            of_other()
        other(2 * x)
        assert of_other().item() != value
        assert penalty().item() == value
        of_other.remove()
        assert not other[0]._forward_hooks
        assert model[0]._forward_hooks


def test_as_a_submodule_it_adds_nothing_to_the_state_dict():
    model = network()
    keys = model.state_dict().keys()
    model.activity = ActivityPenalty(model, 1.0)
    assert model.state_dict().keys() == keys
    assert list(model.activity.parameters()) == []


def test_half_types_are_summed_in_float32_and_dtype_follows_the_outputs():
    model = nn.Sequential(nn.Identity())
    penalty = ActivityPenalty(model, 1.0, "l2")
    model(torch.full((2, 100), 300.0).half())
    assert penalty().item() == 9e6
    model(torch.ones(2, 3, dtype=torch.float64))
    assert penalty().dtype == torch.float64
    model(torch.tensor(2.0))
    assert penalty().item() == 4.0
    model(torch.empty(0, 3))
    assert penalty().item() == 0.0
    with torch.autocast("cpu", torch.bfloat16):
        linear = nn.Linear(3, 2)
        watched = ActivityPenalty(linear, 1.0)
        out = linear(torch.randn(4, 3))
        torch.testing.assert_close(watched(), size("l1", out.float()))


def test_what_the_activity_penalty_refuses():
    model = network()
    with pytest.raises(ValueError, match="'l1' or 'l2'"):
        ActivityPenalty(model, 1.0, "l3")
    with pytest.raises(ValueError, match="lam"):
        ActivityPenalty(model, -1.0)
    with pytest.raises(TypeError, match="lam"):
        ActivityPenalty(model, "1")
    penalty = ActivityPenalty(model, 1.0)
    with pytest.raises(TypeError, match="Penalty"):
        RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), penalty)
    assert not any("forward_hook" in str(m._forward_hooks) for m in network().modules())


def test_a_compiled_model_is_watched_as_any_other():
    model, x = network(), torch.randn(5, 3, dtype=torch.float64)
    penalty = ActivityPenalty(model, 1.0)
    model(x)
    expected = penalty().item()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        compiled(x)
        assert penalty().item() == pytest.approx(expected)
    penalty().backward()
    assert model[0].weight.grad is not None


def test_added_to_a_compiled_model_it_sees_it_and_removed_it_does_not():
    model, x = network(), torch.randn(5, 3, dtype=torch.float64)
    compiled, step = torch.compile(model, backend="eager"), torch.compile(lambda: model(x), backend="eager")
    expected = size("l1", *(model[: i + 1](x) for i in range(3))).item()
    for watched, run in ((model, lambda: compiled(x)), (compiled, lambda: compiled(x)), (model, step)):
        run()
        penalty = ActivityPenalty(watched, 1.0)
        run()
        assert penalty().item() == pytest.approx(expected)
        penalty.remove()
        run()
        assert penalty() == 0


class Plain(nn.Module):
    """Two layers."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.first, self.second, self.use_reentrant = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), use_reentrant

    def inner(self, x):
        return self.first(x).relu()

    def forward(self, x):
        return self.second(self.inner(x))


class Inner(Plain):
    """The same, the first of them checkpointed."""

    def forward(self, x):
        return self.second(checkpoint(self.inner, x, use_reentrant=self.use_reentrant))


def gradients(model, penalty, out):
    model.zero_grad()
    (out.square().sum() + penalty()).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def checkpointed():
    """The same network without and with a checkpoint inside, watched, and their inputs."""

    def make(kind, use_reentrant):
        torch.manual_seed(0)
        model = kind(use_reentrant)
        return model, ActivityPenalty(model, 0.1, "l2")

    return make, torch.randn(5, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_computed_again_in_the_backward_counts_once(checkpointed, whole):
    make, x = checkpointed
    (plain, expected), (model, penalty) = make(Plain, None), make(Inner, False)
    for _ in range(2):
        want = gradients(plain, expected, plain(x))
        out = checkpoint(model, x, use_reentrant=False) if whole else model(x)
        before = penalty().item()
        torch.testing.assert_close(gradients(model, penalty, out), want)
        assert penalty().item() == before == expected().item()
    model.first(x)  # called by itself, as ever
    assert penalty().item() == before


@pytest.mark.parametrize("whole", [False, True])
def test_where_its_gradient_would_be_lost_the_backward_raises(checkpointed, whole):
    make, x = checkpointed
    model, penalty = make(Plain if whole else Inner, True)
    run = partial(checkpoint, model, use_reentrant=True) if whole else model
    with pytest.raises(RuntimeError, match=r"is lost.*use_reentrant=False.*select"):
        gradients(model, penalty, run(x))
    run(x).sum().backward()  # nobody asked for the gradient of the penalty
    out = run(x)
    with torch.no_grad():
        value = penalty()
    out.sum().backward()
    assert penalty() == value > 0


def test_a_part_that_runs_without_gradient_by_itself_is_no_error():
    class Frozen(Plain):
        def forward(self, x):
            with torch.no_grad():
                h = self.first(x)
            return self.second(h.relu())

    model, x = Frozen(), torch.randn(5, 3, dtype=torch.float64)
    penalty = ActivityPenalty(model, 1.0)
    out = model(x)
    torch.testing.assert_close(penalty(), size("l1", nn.functional.linear(x, *model.first.parameters()), out))
    (out.sum() + penalty()).backward()
    assert model.first.weight.grad is None


def test_before_any_forward_there_is_nothing_to_penalize():
    model, x = network(), torch.randn(5, 3, dtype=torch.float64)
    penalty = ActivityPenalty(model, 1.0)
    with pytest.raises(RuntimeError, match="the model has not run yet"):
        penalty()
    with torch.no_grad():
        nn.DataParallel(model)(x)
    assert penalty() > 0
    assert not penalty().requires_grad
    removed = ActivityPenalty(model, 1.0)
    removed.remove()
    assert removed() == 0


def test_the_replicas_of_data_parallel_are_refused():
    model = nn.Sequential(nn.ReLU())
    penalty = ActivityPenalty(model, 1.0)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()(torch.ones(2, 2))
    assert penalty.lam == 1.0
