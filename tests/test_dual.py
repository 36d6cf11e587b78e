"""The dual mode: against regularized dual averaging written by hand, and what must never get lost in it."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training import backward

from torch_regpen import L0, L1, L2, MCP, SCAD, ElasticNet, GroupLasso, LHalf, LogSum, NuclearNorm, SparseGroupLasso
from torch_regpen import RegularizedOptimizer as Regularized
from torch_regpen import groups as g
from torch_regpen.optim.dual_averaging import GAP, STEPS

KINDS = {
    "L1": lambda m: L1(m, 0.05),
    "L1 positive": lambda m: L1(m, 0.05, positive=True),
    "L2": lambda m: L2(m, 0.05),
    "ElasticNet": lambda m: ElasticNet(m, 0.05),
    "MCP": lambda m: MCP(m, 0.05),
    "SCAD": lambda m: SCAD(m, 0.05),
    "LogSum": lambda m: LogSum(m, 0.05),
    "LHalf": lambda m: LHalf(m, 0.01),
    "L0": lambda m: L0(m, 0.01),
    "GroupLasso": lambda m: GroupLasso(m, 0.05),
    "SparseGroupLasso": lambda m: SparseGroupLasso(m, 0.05),
    "NuclearNorm": lambda m: NuclearNorm(m, 0.1),
    "MCP of columns": lambda m: MCP(m, 0.05, groups="input"),
    "L0 of tensors": lambda m: L0(m, 0.001, groups="tensor"),
    "L1 of blocks": lambda m: L1(m, 0.05, groups=g.Blocks(3)),
    "L1 + L2": lambda m: L1(m, 0.05) + L2(m, 0.01),
    "centered": lambda m: L1(m, 0.05, center="initial"),
    "weighted": lambda m: L1(m, 0.05, weights={"0.weight": torch.linspace(0, 2, 30).view(6, 5)}),
}
SCALAR_ONLY = ("NuclearNorm", "MCP of columns", "L0 of tensors")


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        backward(model, step)
        optimizer.step()


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def adam(model, lr=0.01, **options):
    return torch.optim.Adam(model.parameters(), lr=lr, **options)


def assert_same(model, expected):
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def soft(w, t):
    return w.sign() * (w.abs() - t).clamp_min(0)


# What it computes.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_regularized_dual_averaging(momentum):
    """Xiao (2010) with `h(w) = |w - w0|^2/2`: `w = argmin <sum of s*g, w> + S*lam*|w|_1 + |w - w0|^2/2`."""
    lam, lr = 0.05 * (1 - momentum), 0.1
    ours, hand = network(), network()
    optimizer = Regularized(sgd(ours, lr, momentum=momentum), L1(ours, lam), "dual")
    latent = [p.detach().clone() for p in hand.parameters()]
    velocity = [torch.zeros_like(p) for p in hand.parameters()]
    for step in range(30):
        backward(ours, step)
        backward(hand, step)
        optimizer.step()
        with torch.no_grad():
            for p, z, v in zip(hand.parameters(), latent, velocity, strict=True):
                v.mul_(momentum).add_(p.grad)
                z.sub_(lr * v)
                p.copy_(soft(z, (step + 1) * lr / (1 - momentum) * lam) if p.ndim > 1 else z)
        for p, q in zip(ours.parameters(), hand.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert (ours[0].weight == 0).any()
    assert (ours[0].weight != 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_the_textbook_loop_for_every_kind_and_grouping(kind, momentum):
    """The latent weights move by the gradient at the visible ones, which are their prox with the sum of all steps."""
    lr = 0.05 * (1 - momentum)
    ours, hand = network(torch.float64), network(torch.float64)
    optimizer = Regularized(sgd(ours, lr, momentum=momentum), KINDS[kind](ours), "dual")
    penalty = KINDS[kind](hand)
    latent = [p.detach().clone() for p in hand.parameters()]
    velocity = [torch.zeros_like(p) for p in hand.parameters()]
    for step in range(25):
        backward(ours, step)
        backward(hand, step)
        optimizer.step()
        with torch.no_grad():
            for p, z, v in zip(hand.parameters(), latent, velocity, strict=True):
                v.mul_(momentum).add_(p.grad)
                p.copy_(z.sub_(lr * v))
        penalty.prox_((step + 1) * lr / (1 - momentum))
        for p, q in zip(ours.parameters(), hand.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_under_adam_each_coordinate_has_its_own_sum():
    lam, lr, beta = 0.02, 0.01, 0.99
    ours, hand = network(torch.float64), network(torch.float64)
    optimizer = Regularized(adam(ours, lr, betas=(0.0, beta), eps=0.0), L1(ours, lam, select="all"), "dual")
    latent = [p.detach().clone() for p in hand.parameters()]
    moments = [torch.zeros_like(p) for p in hand.parameters()]
    sums = [torch.zeros_like(p) for p in hand.parameters()]
    for step in range(1, 31):
        backward(ours, step)
        backward(hand, step)
        optimizer.step()
        with torch.no_grad():
            for p, z, v, total in zip(hand.parameters(), latent, moments, sums, strict=True):
                v.mul_(beta).addcmul_(p.grad, p.grad, value=1 - beta)
                s = lr * (1 - beta**step) ** 0.5 / v.sqrt()
                z.sub_(s * p.grad)
                total.add_(s.clamp_max(10 * lr / lam))  # small gradients wipe nothing out at once
                p.copy_(soft(z, total * lam))
    assert any((p == 0).any() for p in hand.parameters())
    for p, q in zip(ours.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_zero_comes_back_with_all_that_it_has_gathered():
    w = torch.tensor([0.1], requires_grad=True)
    optimizer = Regularized(torch.optim.SGD([w], lr=1.0), L1([w], 0.2), "dual")
    seen = []
    for gradient in (0.0, 0.1, -0.5, -0.5):
        w.grad = torch.tensor([gradient])
        optimizer.step()
        seen.append(round(w.item(), 6))
    assert seen == [0.0, 0.0, 0.0, pytest.approx(1.0 - 0.8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_that_half_precision_rounds_away_add_up(dtype):
    start, lr, steps = torch.tensor([0.51, -1.9], dtype=dtype), 2.4e-4, 2200
    ends = {}
    for mode in ("proximal", "decoupled", "dual"):
        w = start.clone().requires_grad_()
        w.grad = torch.zeros_like(w)
        optimizer = Regularized(torch.optim.SGD([w], lr=lr), L1([w], 1.0), mode)
        for _ in range(steps):
            optimizer.step()
        ends[mode] = w.detach()
    assert torch.equal(ends["proximal"], start)  # lr*lam is less than half a unit in the last place
    assert torch.equal(ends["decoupled"], start)
    assert ends["dual"][0] == 0
    torch.testing.assert_close(ends["dual"], nn.functional.softshrink(start.double(), steps * lr).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [sgd, adam])
def test_every_kind_and_grouping_trains_and_moves_by_its_own_prox(kind, make):
    model = network()
    penalty = KINDS[kind](model)
    if make is adam and kind in SCALAR_ONLY:
        with pytest.raises(ValueError, match="differs by coordinate"):
            Regularized(make(model), penalty, "dual")
        return
    optimizer = Regularized(make(model), penalty, "dual")
    before = penalty().item()
    train(model, optimizer, 60)
    assert all(p.isfinite().all() for p in model.parameters())
    if kind not in ("L0 of tensors", "centered"):
        assert penalty().item() < before
    if make is sgd:  # the visible weights are the prox of the latent ones, as the penalty itself computes it
        visible = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for p in (model[0].weight, model[2].weight):
                p.add_(optimizer.state[p][GAP])
        penalty.prox_(optimizer.state[model[0].weight][STEPS].item())
        for name, p in model.state_dict().items():
            torch.testing.assert_close(p, visible[name])


# What it leaves alone.


@pytest.mark.parametrize("make", [sgd, adam])
def test_at_lambda_zero_it_is_the_bare_optimizer_to_the_last_bit(make):
    ours, bare = network(), network()
    optimizer = Regularized(make(ours), L1(ours, 0.0), "dual")
    train(ours, optimizer, 10)
    train(bare, make(bare), 10)
    assert_same(ours, bare)


def test_parameters_without_a_penalty_are_those_of_the_bare_optimizer():
    ours, bare = network(), network()
    optimizer = Regularized(adam(ours), L1(ours, 0.1, select="2.weight"), "dual")
    backward(ours, 0)
    backward(bare, 0)
    optimizer.step()
    adam_ = adam(bare)
    adam_.step()
    for name in ("0.weight", "0.bias", "2.bias"):
        assert torch.equal(ours.get_parameter(name), bare.get_parameter(name))
        assert GAP not in optimizer.state[ours.get_parameter(name)]


def test_a_parameter_without_gradient_keeps_its_weights_and_its_gap():
    model = network()
    optimizer = Regularized(sgd(model), L1(model, 0.05), "dual")
    train(model, optimizer, 3)
    w = model[0].weight
    kept = w.detach().clone(), optimizer.state[w][GAP].clone(), optimizer.state[w][STEPS].clone()
    backward(model, 3)
    w.grad = None
    optimizer.step()
    for now, before in zip((w, optimizer.state[w][GAP], optimizer.state[w][STEPS]), kept, strict=True):
        assert torch.equal(now, before)


def test_the_first_step_of_adam_finds_the_state_empty():
    """What the wrapper adds to the state must not look to the optimizer as if it had been initialised."""
    model = network()
    optimizer = Regularized(adam(model), L1(model, 0.1), "dual")
    train(model, optimizer, 1)
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq", GAP, STEPS}


def test_when_lambda_falls_to_zero_the_visible_weights_go_on():
    model = network()
    penalty = L1(model, 0.1)
    optimizer = Regularized(sgd(model), penalty, "dual")
    train(model, optimizer, 5)
    bare = copy.deepcopy(model)
    penalty.lam = 0.0
    backward(model, 9)
    optimizer.step()  # this once the latent weights have moved; from here on it is the bare optimizer
    backward(bare, 9)
    sgd(bare).step()
    train(model, optimizer, 3, start=10)
    train(bare, sgd(bare), 3, start=10)
    assert_same(model, bare)
    penalty.lam = 0.1
    train(model, optimizer, 1, start=20)
    assert optimizer.state[model[0].weight][STEPS].item() == pytest.approx(0.1)


# Weights that were changed from outside.


@pytest.mark.parametrize("make", [sgd, lambda m: sgd(m, momentum=0.9), adam])
def test_weights_changed_from_outside_are_where_the_next_step_starts(make):
    """The gaps go on, as momentum does."""
    model, mean = network(torch.float64), network(torch.float64)
    optimizer = Regularized(make(model), L1(model, 0.05), "dual")
    train(model, optimizer, 5)
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
    train(model, optimizer, 5)
    twin, anew = copy.deepcopy((model, optimizer))
    optimizer.reset_gaps()
    assert not optimizer.state[model[0].weight][GAP].any()
    for state in anew.state.values():
        state.pop(GAP, None)
        state.pop(STEPS, None)
    train(model, optimizer, 3, start=5)
    train(twin, anew, 3, start=5)
    assert_same(model, twin)


def test_a_swap_of_averages_and_back():
    model = network()
    optimizer = Regularized(sgd(model), L1(model, 0.05), "dual")
    train(model, optimizer, 5)
    twin, other = copy.deepcopy((model, optimizer))
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: 0.5 * p for name, p in own.items()})  # to evaluate the average
    model.load_state_dict(own)
    train(model, optimizer, 1, start=5)
    train(twin, other, 1, start=5)
    assert_same(model, twin)


# Checkpoints and copies.


def through_a_file(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [sgd, adam, lambda m: sgd(m, momentum=0.9)])
def test_training_goes_on_from_a_checkpoint_to_the_last_bit(make, dtype):
    model = network(dtype)
    optimizer = Regularized(make(model), L1(model, 0.05), "dual")
    train(model, optimizer, 6)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 6, start=6)

    resumed = network(dtype)
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    optimizer = Regularized(make(resumed), L1(resumed, 0.05), "dual")
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    state = optimizer.state[resumed[0].weight]
    assert state[GAP].dtype == state[STEPS].dtype
    assert state[STEPS].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    train(resumed, optimizer, 6, start=6)
    assert_same(resumed, model)


def test_training_goes_on_in_a_fresh_process(tmp_path):
    program = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_dual import *
model = network()
optimizer = Regularized(adam(model), L1(model, 0.05), "dual")
found = torch.load(sys.argv[2], weights_only=True)
model.load_state_dict(found["model"])
optimizer.load_state_dict(found["optimizer"])
train(model, optimizer, 4, start=4)
torch.save(model.state_dict(), sys.argv[3])
"""
    half, whole = tmp_path / "half.pt", tmp_path / "whole.pt"
    model = network()
    optimizer = Regularized(adam(model), L1(model, 0.05), "dual")
    train(model, optimizer, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, half)
    train(model, optimizer, 4, start=4)
    folder = __file__.rsplit("/", 1)[0]
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
    train(model, optimizer, 4)
    bare = make(model)
    bare.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, bare, 4)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_a_state_with_latent_weights_of_an_earlier_version_begins_anew(mode):
    model = network()
    optimizer = Regularized(adam(model), L1(model, 0.05), mode)
    train(model, optimizer, 2)
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
    train(model, optimizer, 3)
    other = Regularized(sgd(model), L1(model, 0.05), "proximal")
    other.load_state_dict(optimizer.state_dict())
    assert all(GAP not in state and STEPS not in state for state in other.state.values())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_train_alike_and_apart(way):
    model = network()
    optimizer = Regularized(adam(model), L1(model, 0.05), "dual")
    train(model, optimizer, 4)
    twin, other = way((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    train(twin, other, 4, start=4)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    train(model, optimizer, 4, start=4)
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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("weighted", "NuclearNorm")])
@pytest.mark.parametrize("make", [sgd, adam])
def test_no_value_is_read_back(kind, make):
    """On the meta device there is none."""
    if make is adam and kind in SCALAR_ONLY:
        pytest.skip("refused at construction")
    model = network().to("meta")
    optimizer = Regularized(make(model), KINDS[kind](model), "dual")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()


def test_gaps_go_on_when_a_neighbour_has_no_gradient():
    """Small tensors go together, those that are in the step."""

    def train(both):
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

    assert all(map(torch.equal, train(True), train(False)))


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
