"""The state of the dual mode: checkpoints, copies, closures, and weights changed from outside."""

import contextlib
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import nets
from helpers.kinds import ONE_STEP, VARIANTS
from helpers.nets import assert_same, backward, network, train_on_batches
from helpers.optimizers import adam, sgd, through_a_file
from helpers.oracles import soft
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_regpen import L1, ElasticNet, GroupLasso
from torch_regpen import RegularizedOptimizer as Regularized
from torch_regpen.optim.dual_averaging import GAP, STEPS

LAM = 0.05


# Weights that were changed from outside.


@pytest.mark.parametrize("make", [sgd, lambda m: sgd(m, momentum=0.9), adam])
def test_weights_changed_from_outside_are_where_the_next_step_starts(make):
    """The gaps go on, as momentum does."""
    model, mean = network(dtype=torch.float64), network(dtype=torch.float64)
    optimizer = Regularized(make(model), L1(model, 0.05), "dual")
    train_on_batches(model, optimizer, 5)
    model.load_state_dict(mean.state_dict())
    bare = copy.deepcopy(model)
    inner = make(bare)
    inner.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gap = optimizer.state[model[0].weight][GAP].clone()
    backward(model, 9)
    backward(bare, 9)
    optimizer.step()
    inner.step()
    thresholds = optimizer.state[model[0].weight][STEPS] * 0.05
    torch.testing.assert_close(model[0].weight, soft(bare[0].weight + gap, thresholds))


@pytest.mark.parametrize("make", [sgd, adam])
def test_reset_gaps_begins_anew_at_the_visible_weights(make):
    model = network()
    optimizer = Regularized(make(model), L1(model, 0.05), "dual")
    train_on_batches(model, optimizer, 5)
    twin, anew = copy.deepcopy((model, optimizer))
    optimizer.reset_gaps()
    assert not optimizer.state[model[0].weight][GAP].any()
    for state in anew.state.values():
        state.pop(GAP, None)
        state.pop(STEPS, None)
    train_on_batches(model, optimizer, 3, start=5)
    train_on_batches(twin, anew, 3, start=5)
    assert_same(model, twin)


def test_a_swap_of_averages_and_back():
    model = network()
    optimizer = Regularized(sgd(model), L1(model, 0.05), "dual")
    train_on_batches(model, optimizer, 5)
    twin, other = copy.deepcopy((model, optimizer))
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: 0.5 * p for name, p in own.items()})  # to evaluate the average
    model.load_state_dict(own)
    train_on_batches(model, optimizer, 1, start=5)
    train_on_batches(twin, other, 1, start=5)
    assert_same(model, twin)


# Checkpoints and copies.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [sgd, adam, lambda m: sgd(m, momentum=0.9)])
def test_training_goes_on_from_a_checkpoint_to_the_last_bit(make, dtype):
    model = network(dtype=dtype)
    optimizer = Regularized(make(model), L1(model, 0.05), "dual")
    train_on_batches(model, optimizer, 6)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train_on_batches(model, optimizer, 6, start=6)

    resumed = network(dtype=dtype)
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    optimizer = Regularized(make(resumed), L1(resumed, 0.05), "dual")
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    state = optimizer.state[resumed[0].weight]
    assert state[GAP].dtype == state[STEPS].dtype
    assert state[STEPS].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    train_on_batches(resumed, optimizer, 6, start=6)
    assert_same(resumed, model)


def test_training_goes_on_in_a_fresh_process(tmp_path):
    program = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers.nets import network, train_on_batches
from helpers.optimizers import adam
from torch_regpen import L1, RegularizedOptimizer as Regularized
model = network()
optimizer = Regularized(adam(model), L1(model, 0.05), "dual")
found = torch.load(sys.argv[2], weights_only=True)
model.load_state_dict(found["model"])
optimizer.load_state_dict(found["optimizer"])
train_on_batches(model, optimizer, 4, start=4)
torch.save(model.state_dict(), sys.argv[3])
"""
    half, whole = tmp_path / "half.pt", tmp_path / "whole.pt"
    model = network()
    optimizer = Regularized(adam(model), L1(model, 0.05), "dual")
    train_on_batches(model, optimizer, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, half)
    train_on_batches(model, optimizer, 4, start=4)
    folder = str(Path(nets.__file__).parents[1])
    subprocess.run([sys.executable, "-c", program, folder, str(half), str(whole)], check=True)
    for name, p in torch.load(whole, weights_only=True).items():
        assert torch.equal(p, model.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_training_goes_on_from_a_checkpoint_of_another_dtype(dtype):
    w = torch.randn(4, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    saved = Regularized(torch.optim.SGD([w], lr=0.1), L1([w], 0.5), "dual")
    for _ in range(3):
        w.grad = torch.ones_like(w)
        saved.step()
    x = w.detach().float().requires_grad_()
    resumed = Regularized(torch.optim.SGD([x], lr=0.1), L1([x], 0.5), "dual")
    resumed.load_state_dict(saved.state_dict())
    x.grad = torch.ones_like(x)
    resumed.step()
    latent = w.detach().float() + saved.state[w][GAP].float() - 0.1
    torch.testing.assert_close(resumed.state[x][GAP], latent.clamp(-0.4 * 0.5, 0.4 * 0.5))
    torch.testing.assert_close(x.detach(), soft(latent, 0.4 * 0.5))


@pytest.mark.parametrize("make", [sgd, adam])
def test_the_bare_optimizer_loads_its_state_dict(make):
    model = network()
    optimizer = Regularized(make(model), L1(model, 0.05), "dual")
    train_on_batches(model, optimizer, 4)
    bare = make(model)
    bare.load_state_dict(through_a_file(optimizer.state_dict()))
    train_on_batches(model, bare, 4)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_a_state_with_latent_weights_of_an_earlier_version_begins_anew(mode):
    model = network()
    optimizer = Regularized(adam(model), L1(model, 0.05), mode)
    train_on_batches(model, optimizer, 2)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        if entry.pop(GAP, None) is not None or mode == "proximal":
            entry.pop(STEPS, None)
            entry["latent"], entry["latent_steps"] = entry["exp_avg"].clone(), entry["exp_avg"].clone()
    with pytest.warns(UserWarning, match="earlier version") if mode == "dual" else contextlib.nullcontext():
        optimizer.load_state_dict(saved)
    assert all("latent" not in state and GAP not in state for state in optimizer.state.values())


def test_other_modes_do_not_carry_gaps_along():
    model = network()
    optimizer = Regularized(sgd(model), L1(model, 0.05), "dual")
    train_on_batches(model, optimizer, 3)
    other = Regularized(sgd(model), L1(model, 0.05), "proximal")
    other.load_state_dict(optimizer.state_dict())
    assert all(GAP not in state and STEPS not in state for state in other.state.values())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_train_alike_and_apart(way):
    model = network()
    optimizer = Regularized(adam(model), L1(model, 0.05), "dual")
    train_on_batches(model, optimizer, 4)
    twin, other = way((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    train_on_batches(twin, other, 4, start=4)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    train_on_batches(model, optimizer, 4, start=4)
    assert_same(twin, model)


# Closures, sparse gradients, devices without values.


@pytest.mark.parametrize("make", [sgd, adam])
def test_a_step_with_a_closure_is_the_step_without(make):
    one, two = network(), network()
    first, second = (Regularized(make(m), L1(m, 0.05), "dual") for m in (one, two))
    for step in range(6):
        backward(one, step)
        first.step()
        loss = second.step(lambda step=step: backward(two, step))
        assert loss is not None
    assert_same(one, two)


class Twice(torch.optim.SGD):
    """Evaluates twice: moves half a step, and then from there once more."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            closure()
        super().step()


def test_a_closure_is_evaluated_at_the_visible_weights():
    model = network()
    penalty = L1(model, 0.2)
    optimizer = Regularized(Twice(model.parameters(), lr=0.1), penalty, "dual")
    seen = []

    def closure():
        seen.append(model[0].weight.detach().clone())
        return backward(model, 0)

    for _ in range(4):
        optimizer.step(closure)
    w = model[0].weight
    assert all((x == 0).any() for x in seen[2::2])
    torch.testing.assert_close(optimizer.state[w][STEPS], torch.tensor(0.4))
    assert (w == 0).any()


def test_sparse_gradients_are_dense_ones():
    models = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(8, 3, sparse=sparse)
        optimizer = Regularized(sgd(model), L1(model, 0.05), "dual")
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.tensor([1, 4, 4])).square().sum().backward()
            optimizer.step()
        models.append(model)
    assert_same(*models)
    assert (models[0].weight == 0).any()


@pytest.mark.parametrize(
    "kind", [kind for kind in VARIANTS if kind not in ("weights", "weights of rows", "singular values")]
)
@pytest.mark.parametrize("make", [sgd, adam])
def test_no_value_is_read_back(kind, make):
    """On the meta device there is none."""
    if make is adam and kind in ONE_STEP:
        pytest.skip("refused at construction")
    model = network().to("meta")
    optimizer = Regularized(make(model), VARIANTS[kind](model, LAM), "dual")
    for _ in range(2):  # the first makes the state
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()


def test_gaps_go_on_when_a_neighbour_has_no_gradient():
    """Small tensors go together, those that are in the step."""

    def ended(both):
        torch.manual_seed(0)
        ws = [torch.randn(shape, requires_grad=True) for shape in ((4, 3), (2, 5), (6,))]
        optimizer = Regularized(
            torch.optim.SGD(ws if both else ws[1:], lr=0.1), L1(ws if both else ws[1:], 0.05), "dual"
        )
        for step in range(8):
            for w in ws[1:]:
                w.grad = torch.sin(w.detach() + step)
            ws[0].grad = torch.ones_like(ws[0]) if step in (0, 1, 4) else None
            optimizer.step()
        return ws[1:]

    assert all(map(torch.equal, ended(True), ended(False)))


@pytest.mark.parametrize("shape", [(4, 3), (300, 300)])
@pytest.mark.parametrize(
    ("kind", "options", "mode"),
    [(L1, {}, "dual"), (ElasticNet, {}, "proximal"), (GroupLasso, {"groups": "input"}, "proximal")],
)
def test_neither_a_default_device_nor_an_earlier_fake_run_matters(kind, options, mode, shape):
    def trained():
        ws = [torch.ones(shape, device="cpu", requires_grad=True) for _ in range(2)]
        optimizer = Regularized(torch.optim.SGD(ws, lr=0.1), kind(ws, 0.1, **options), mode)
        for _ in range(2):
            for w in ws:
                w.grad = torch.ones_like(w)
            optimizer.step()
        return [w.detach() for w in ws]

    with FakeTensorMode():
        trained()
    expected = trained()
    with torch.device("meta"):
        found = trained()
    assert all(map(torch.equal, found, expected))
