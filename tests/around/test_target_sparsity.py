"""The lambda that reaches a target sparsity and holds it."""

import copy
import math
import pickle
import warnings
import weakref

import pytest
import torch
from helpers import optimizers
from helpers.optimizers import momentum, sgd
from sklearn.datasets import load_digits
from torch import nn

from torch_regpen import L0, L1, L2, GroupLasso, LogSum, RegularizedOptimizer
from torch_regpen.schedules import TargetSparsity


def mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def adam(model):
    return optimizers.adam(model, lr=0.003)


def adamw(model):
    return optimizers.adamw(model, lr=0.003)


def elements(model):
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
    return (weights == 0).double().mean().item()


def rows(model):
    whole = torch.cat([(p.detach().flatten(1) == 0).all(1) for p in model.parameters() if p.ndim > 1])
    return whole.double().mean().item()


STEPS, HELD = 100, 40


def trained(digits, model, optimizer, schedule, first=0, last=STEPS + HELD, measure=elements, total=STEPS + HELD):
    """Trains with a learning rate that falls to zero along a cosine; returns the fraction of zeros after each step."""
    x, y = digits
    fractions = []
    base = optimizer.param_groups[0].setdefault("base_lr", optimizer.param_groups[0]["lr"])
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = base * 0.5 * (1 + math.cos(math.pi * step / total))
        batch = torch.randint(len(x), (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
        fractions.append(measure(model))
    return fractions


@pytest.mark.parametrize(
    ("make", "optimizer", "mode", "kind", "lam", "target"),
    [
        *((mlp, momentum, "proximal", L1, lam, 0.9) for lam in (1e-6, 1e-4, 1e-2)),
        (mlp, momentum, "proximal", L1, 1e-4, 0.5),
        (mlp, adam, "proximal", L1, 1e-6, 0.8),
        (mlp, adam, "proximal", L1, 1e-2, 0.95),
        (conv, momentum, "proximal", L1, 1e-4, 0.7),
        (conv, adam, "proximal", L1, 1e-4, 0.7),
        (mlp, momentum, "proximal", L0, 1e-4, 0.9),
        *((mlp, momentum, "dual", kind, lam, 0.9) for kind in (L1, L0) for lam in (1e-6, 1e-2)),
        (mlp, adam, "dual", L1, 1e-4, 0.95),
        (conv, momentum, "dual", L0, 1e-4, 0.8),
        (conv, adam, "dual", L0, 1e-4, 0.5),
        *((mlp, opt, mode, LogSum, 1e-4, 0.8) for opt in (momentum, adamw) for mode in ("proximal", "dual")),
        *((mlp, sgd, mode, L0, 1e-4, 0.7) for mode in ("proximal", "dual")),
        (mlp, adamw, "proximal", L0, 1e-4, 0.9),
        *((mlp, momentum, mode, L1, lam, 0.8) for mode in ("proximal", "dual") for lam in (1e-16, 1e12)),
    ],
)
def test_the_target_is_reached_and_held(digits, make, optimizer, mode, kind, lam, target):
    torch.manual_seed(0)
    model = make()
    wrapped = RegularizedOptimizer(optimizer(model), kind(model, lam), mode)
    longer = optimizer is adamw and kind is L0  # whose zeros come and go for longer
    steps, total = (300, 390) if longer else (STEPS, STEPS + HELD)
    schedule = TargetSparsity(wrapped, target, steps=steps)
    fractions = trained(digits, model, wrapped, schedule, last=total, total=total)
    assert abs(fractions[steps - 1] - target) <= 0.01
    held = torch.tensor(fractions[steps:])
    assert abs(held.mean().item() - target) <= 0.01
    assert (held - target).abs().max() <= 0.03  # between two readings the noise of the gradients shows


@pytest.mark.parametrize(("mode", "target"), [("proximal", 0.4), ("proximal", 0.7), ("dual", 0.6)])
def test_of_groups_it_is_the_fraction_of_groups(digits, mode, target):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
    wrapped = RegularizedOptimizer(momentum(model), GroupLasso(model, 1e-4), mode)
    fractions = trained(digits, model, wrapped, TargetSparsity(wrapped, target, steps=STEPS), measure=rows)
    assert abs(fractions[STEPS - 1] - target) <= 0.02
    assert abs(sum(fractions[STEPS:]) / HELD - target) <= 0.02


def test_in_the_dual_mode_it_follows_the_ramp_from_the_first_reading(digits):
    torch.manual_seed(0)
    model = mlp()
    wrapped = RegularizedOptimizer(momentum(model), L0(model, 1e-4), "dual")
    schedule = TargetSparsity(wrapped, 0.9, steps=100, every=1, ramp=lambda x: x)
    fractions = trained(digits, model, wrapped, schedule, last=100)
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    for step, fraction in enumerate(fractions, start=1):
        assert fraction == pytest.approx(0.9 * step / 100, abs=2 / weights)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_it_goes_on_from_its_state_to_the_last_bit(digits, mode):
    def start():
        torch.manual_seed(0)
        model = mlp()
        wrapped = RegularizedOptimizer(momentum(model), L1(model, 1e-4), mode)
        return model, wrapped, TargetSparsity(wrapped, 0.9, steps=STEPS, every=7)

    model, wrapped, schedule = start()
    trained(digits, model, wrapped, schedule, last=60)
    saved = copy.deepcopy([x.state_dict() for x in (model, wrapped, schedule)])
    trained(digits, model, wrapped, schedule, first=60, last=100)
    resumed, *others = start()
    for x, state in zip((resumed, *others), saved, strict=True):
        x.load_state_dict(state)
    trained(digits, resumed, *others, first=60, last=100)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda objects: pickle.loads(pickle.dumps(objects))])
@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_a_copy_with_its_model_and_optimizer_goes_on_alike(digits, mode, way):
    torch.manual_seed(0)
    model = mlp()
    wrapped = RegularizedOptimizer(momentum(model), L1(model, 1e-4), mode)
    schedule = TargetSparsity(wrapped, 0.9, steps=STEPS, every=7)
    trained(digits, model, wrapped, schedule, last=20)
    twin, *others = way((model, wrapped, schedule))
    trained(digits, model, wrapped, schedule, first=20, last=50)
    trained(digits, twin, *others, first=20, last=50)
    assert others[1].factor == schedule.factor
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_the_device_is_read_once_each_every_steps_and_no_more_often(monkeypatch, mode):
    model = nn.Linear(6, 6)
    wrapped = RegularizedOptimizer(momentum(model), L1(model, 1e-3), mode)
    schedule = TargetSparsity(wrapped, 0.5, steps=500, every=10)
    reads = []
    for name in ("item", "cpu", "tolist"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, method=method: reads.append(1) or method(x))
    for step in range(1, 61):
        model.weight.grad = torch.randn(6, 6)
        reads.clear()
        wrapped.step()
        schedule.step()
        assert len(reads) == (1 if step == 1 or step % 10 == 0 else 0), step


def most_nonzeros(every):
    """In terms of those that the ramp wants: the most after any step of its second half, in the dual mode."""
    torch.manual_seed(0)
    w = (0.01 * torch.randn(10_000)).requires_grad_()
    pull = torch.randn(10_000)
    wrapped = RegularizedOptimizer(torch.optim.SGD([w], lr=0.05, momentum=0.9), L0([w], 1e-4, select="all"), "dual")
    schedule = TargetSparsity(wrapped, 0.99, steps=500, every=every)
    found = []
    for step in range(1, 501):
        w.grad = 1e-3 * pull * (1 + step / 100) ** 3
        wrapped.step()
        schedule.step()
        found.append(int(w.count_nonzero()) / (10_000 * (1 - 0.99 * (1 - (1 - step / 500) ** 3))))
    return max(found[250:])


def test_high_targets_in_the_dual_mode_are_read_in_each_step():
    assert most_nonzeros(every=5) > 1.2
    assert most_nonzeros(every=None) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("mode", "target", "groups", "every"),
    [("dual", 0.91, None, 1), ("dual", 0.9, None, 5), ("dual", 0.91, 0, 5), ("proximal", 0.91, None, 5)],
)
def test_how_often_a_target_is_read_by_default(mode, target, groups, every):
    model = nn.Linear(6, 6)
    wrapped = RegularizedOptimizer(momentum(model), L0(model, 0.1, groups=groups), mode)
    assert TargetSparsity(wrapped, target, steps=500).every == every


def test_the_proportions_of_lambdas_stay():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    penalty = L1([{"params": [model[0].weight], "lam": 1.0}, {"params": [model[1].weight], "lam": 3.0}], 1.0)
    wrapped = RegularizedOptimizer(momentum(model), penalty + L2(model, 0.5), "proximal")
    schedule = TargetSparsity(wrapped, 0.5, steps=100)
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        wrapped.step()
        schedule.step()
    lams = [group["lam"] for part in wrapped.penalty.parts for group in part.param_groups]
    assert lams == pytest.approx([lams[0], 3 * lams[0], 0.5 * lams[0]])


def test_a_schedule_that_was_replaced_is_silent(digits):
    """As when a cell of a notebook runs twice."""
    fractions = []
    for replaced in (False, True):
        torch.manual_seed(0)
        model = mlp()
        penalty = L1(model, 1e-4)
        wrapped = RegularizedOptimizer(momentum(model), penalty, "proximal")
        old = TargetSparsity(wrapped, 0.1, steps=100) if replaced else None
        penalty.lam = 1e-4
        fractions.append(trained(digits, model, wrapped, TargetSparsity(wrapped, 0.9, steps=100), last=100)[-1])
        del old
    assert fractions == pytest.approx([0.9, 0.9], abs=0.01)


def steps_with_noise(model, wrapped, schedule, count, seed=0):
    """Trains on gradients without meaning; returns the fraction of zeros after each step."""
    generator = torch.Generator().manual_seed(seed)
    fractions = []
    for _ in range(count):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
        wrapped.step()
        schedule.step()
        fractions.append(elements(model))
    return fractions


def linear(*sizes):
    torch.manual_seed(0)
    return nn.Linear(*sizes, bias=False)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("kind", [L1, GroupLasso])
def test_around_a_center_it_is_the_fraction_at_the_center(mode, kind):
    model = linear(40, 100)
    penalty = kind(model, 1e-3, center="initial")
    center = model.weight.detach().clone()
    wrapped = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), penalty, mode)
    steps_with_noise(model, wrapped, TargetSparsity(wrapped, 0.5, steps=100), 100)
    same = model.weight == center
    assert (same.all(1) if kind is GroupLasso else same).double().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_a_warm_up_from_0_with_few_readings(digits, mode):
    torch.manual_seed(0)
    model = mlp()
    wrapped = RegularizedOptimizer(momentum(model), L1(model, 1e-3), mode)
    wrapped.param_groups[0]["lr"] = 0.0
    schedule = TargetSparsity(wrapped, 0.8, steps=150, every=3)
    steps_with_noise(model, wrapped, schedule, 1)
    wrapped.param_groups[0]["lr"] = 0.05
    assert trained(digits, model, wrapped, schedule, first=1, last=150)[-1] == pytest.approx(0.8, abs=0.01)


def test_the_default_dtype_makes_no_difference():
    model = linear(400, 400)  # more zeros than the largest number of float16
    wrapped = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, 1e-3), "dual")
    schedule = TargetSparsity(wrapped, 0.9, steps=20)
    torch.set_default_dtype(torch.float16)
    try:
        fractions = steps_with_noise(model, wrapped, schedule, 20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert fractions[-1] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_where_the_target_is_out_of_reach_it_is_of_what_is_in_reach(mode):
    model = nn.Sequential(linear(60, 40), linear(60, 60))
    wrapped = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, 1e-3), mode)
    schedule = TargetSparsity(wrapped, 0.7, steps=100)
    with pytest.warns(UserWarning, match=r"0\.7 cannot be reached: only 0\.4 .* 0\.28 of all") as caught:
        steps_with_noise(model[0], wrapped, schedule, 300)  # the other one has no gradient
    assert len(caught) == 1
    assert elements(model[0]) == pytest.approx(0.7, abs=0.02)
    assert wrapped.penalty.lam < 10


@pytest.mark.parametrize("kind", [L1, L0])
@pytest.mark.parametrize("steps", [1, 20, 50])
def test_a_short_ramp_is_enough_in_the_dual_mode(digits, kind, steps):
    torch.manual_seed(0)
    model = mlp()
    wrapped = RegularizedOptimizer(momentum(model), kind(model, 1e-4), "dual")
    fractions = trained(digits, model, wrapped, TargetSparsity(wrapped, 0.9, steps=steps), last=steps)
    assert fractions[-1] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("optimizer", [sgd, momentum, adam])
def test_a_ramp_of_100_steps_is_enough_in_the_proximal_mode(digits, optimizer):
    torch.manual_seed(0)
    model = mlp()
    wrapped = RegularizedOptimizer(optimizer(model), L1(model, 1e-4), "proximal")
    fractions = trained(digits, model, wrapped, TargetSparsity(wrapped, 0.9, steps=100), last=130)
    assert fractions[99] == pytest.approx(0.9, abs=0.02)
    assert sum(fractions[100:]) / 30 == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("settings", [{"steps": 99}, {"steps": 150, "every": 50}])
def test_a_ramp_too_short_for_the_proximal_mode_warns(settings):
    model = nn.Linear(6, 6)
    with pytest.warns(UserWarning, match="may miss the target"):
        TargetSparsity(RegularizedOptimizer(momentum(model), L1(model, 0.1), "proximal"), 0.5, **settings)
    wrapped = RegularizedOptimizer(momentum(model), L1(model, 0.1), "dual")
    assert steps_with_noise(model, wrapped, TargetSparsity(wrapped, 0.5, **settings), settings["steps"])[-1] == 0.5


@pytest.mark.parametrize("skipped", [0, 9, 99])
def test_a_skipped_step_loses_no_reading(skipped):
    """As under GradScaler, at a gradient that is not finite: the schedule goes on, the optimizer does not."""
    model = linear(40, 100)
    wrapped = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, 1e-3), "dual")
    schedule = TargetSparsity(wrapped, 0.8, steps=100, every=10)
    steps_with_noise(model, wrapped, schedule, skipped)
    schedule.step()
    assert steps_with_noise(model, wrapped, schedule, max(99 - skipped, 1))[-1] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("mode", "kind"), [("dual", L1), ("dual", L0), ("proximal", L1)])
def test_zeros_freeze_at_the_target_and_lambda_rests(digits, mode, kind):
    torch.manual_seed(0)
    model = mlp()
    wrapped = RegularizedOptimizer(momentum(model), kind(model, 1e-4), mode)
    schedule = TargetSparsity(wrapped, 0.9, steps=150, freeze=True)
    trained(digits, model, wrapped, schedule, last=149)
    assert not wrapped.zeros_are_frozen
    trained(digits, model, wrapped, schedule, first=149, last=160)
    assert wrapped.zeros_are_frozen
    lam, zeros = wrapped.penalty.lam, [p == 0 for p in model.parameters() if p.ndim > 1]
    fractions = trained(digits, model, wrapped, schedule, first=310, last=340)
    assert wrapped.penalty.lam == lam
    assert fractions[-1] == fractions[0] == pytest.approx(0.9, abs=0.006)
    assert all(
        torch.equal(p == 0, z) for p, z in zip([p for p in model.parameters() if p.ndim > 1], zeros, strict=True)
    )
    wrapped.unfreeze_zeros()
    after = trained(digits, model, wrapped, schedule, first=340, last=390)
    assert not wrapped.zeros_are_frozen
    if mode == "dual":
        assert min(after) > 0.88
    assert sum(after) / 50 == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize(("target", "zeros"), [(0.94, 9), (0.85, 8), (0.73, 7)])
def test_zeros_freeze_where_few_groups_only_come_near_the_target(mode, target, zeros):
    torch.manual_seed(0)
    layer = nn.Linear(4, 10)
    penalty = GroupLasso(layer, 1e-3, groups="output")
    wrapped = RegularizedOptimizer(momentum(layer), penalty, mode)
    schedule = TargetSparsity(wrapped, target, steps=100, freeze=True)
    for _ in range(130):
        wrapped.zero_grad()
        (layer(torch.randn(8, 4)) - torch.linspace(0, 1, 10)).square().mean().backward()
        wrapped.step()
        schedule.step()
    assert wrapped.zeros_are_frozen
    assert len(penalty.zero_groups()["weight"]) == zeros


@pytest.mark.parametrize("seed", range(3))
def test_few_nonzero_weights_are_as_many_as_asked_for(seed):
    torch.manual_seed(seed)
    layer = nn.Linear(700, 500)
    wrapped = RegularizedOptimizer(momentum(layer), L0(layer, 1e-4), "dual")
    schedule = TargetSparsity(wrapped, 0.998, steps=20, freeze=True)
    for _ in range(21):
        layer.weight.grad = 0.01 * torch.randn(500, 700)
        wrapped.step()
        schedule.step()
    assert int(layer.weight.count_nonzero()) == pytest.approx(0.002 * layer.weight.numel(), rel=0.08)


def test_a_resumed_schedule_does_not_freeze_twice():
    model = linear(40, 100)
    wrapped = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, 1e-3), "dual")
    schedule = TargetSparsity(wrapped, 0.8, steps=20, freeze=True)
    steps_with_noise(model, wrapped, schedule, 20)
    wrapped.unfreeze_zeros()
    resumed = TargetSparsity(wrapped, 0.8, steps=20, freeze=True)
    resumed.load_state_dict(schedule.state_dict())
    del schedule
    steps_with_noise(model, wrapped, resumed, 5)
    assert not wrapped.zeros_are_frozen


def test_a_large_model_is_read_by_a_sample():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), linear(1024, 512))
    wrapped = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, 1e-3), "dual")
    fractions = steps_with_noise(model, wrapped, TargetSparsity(wrapped, 0.8, steps=20), 20)
    assert fractions[-1] == pytest.approx(0.8, abs=0.01)


def test_a_schedule_that_is_gone_holds_nothing():
    model = nn.Linear(6, 6)
    wrapped = RegularizedOptimizer(momentum(model), L1(model, 0.1), "dual")
    gone = weakref.ref(TargetSparsity(wrapped, 0.5, steps=20))
    assert gone() is None
    model.weight.grad = torch.randn(6, 6)
    wrapped.step()


def test_what_makes_no_sense_is_refused():
    model = nn.Linear(2, 2)

    def dual(penalty):
        return RegularizedOptimizer(momentum(model), penalty, "dual")

    for target in (-0.1, 1.0):
        with pytest.raises(ValueError, match="target"):
            TargetSparsity(dual(L1(model, 0.1)), target, steps=10)
    with pytest.raises(ValueError, match="more than 0"):
        TargetSparsity(dual(L1(model, 0.0)), 0.5, steps=10)
    with pytest.raises(ValueError, match="zeroes nothing"):
        TargetSparsity(dual(L2(model, 0.1)), 0.5, steps=10)
    for wrong in ({"steps": 0}, {"steps": 10, "every": 0}):
        with pytest.raises(ValueError, match="whole number"):
            TargetSparsity(dual(L1(model, 0.1)), 0.5, **wrong)
    with pytest.raises(TypeError, match=r"RegularizedOptimizer\(optimizer, penalty, 'dual'\)"):
        TargetSparsity(L1(model, 0.1), 0.5, steps=10)
    for mode in ("coupled", "decoupled"):
        with pytest.raises(ValueError, match="use mode='dual' or 'proximal'"):
            TargetSparsity(RegularizedOptimizer(momentum(model), L1(model, 0.1), mode), 0.5, steps=10)


def test_a_target_or_a_ramp_of_another_kind_is_refused_at_once():
    w = torch.linspace(0, 1, 100).requires_grad_()
    optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=0.1), L1([w], lam=1.0), "dual")
    for target in ("0.5", torch.tensor(0.5)):
        with pytest.raises(TypeError, match="target must be a number"):
            TargetSparsity(optimizer, target, steps=10)
    with pytest.raises(TypeError, match=r"ramp must return a number, but ramp\(1\) is None"):
        TargetSparsity(optimizer, 0.5, steps=10, ramp=lambda x: None)
    with pytest.raises(TypeError, match="ramp must be a function"):
        TargetSparsity(optimizer, 0.5, steps=10, ramp="cubic")
    for value in (50.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"ramp must be from \[0, 1\] to \[0, 1\], but ramp\(1\) is {value:g}"):
            TargetSparsity(optimizer, 0.5, steps=10, ramp=lambda x, value=value: value)
    schedule = TargetSparsity(optimizer, 0.5, steps=10, ramp=lambda x: 1.0 if x == 1 else -1.0)  # wrong on the way
    w.grad = torch.zeros_like(w)
    with pytest.raises(ValueError, match=r"ramp\(0\.1\) is -1"):
        optimizer.step()
    assert schedule.factor == 1.0


def before_a_norm(kind, target=0.95, optimizer=momentum, norm=nn.BatchNorm2d, **options):
    """A target for a network with a convolution before a norm, and one that has none."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    wrapped = RegularizedOptimizer(optimizer(model), kind(model, 1e-3, **options), "dual")
    return TargetSparsity(wrapped, target, steps=10)


@pytest.mark.parametrize("kind", [L0, L1])
def test_a_high_target_before_a_batchnorm_under_sgd_asks_for_clipping(kind):
    with pytest.warns(UserWarning, match=r"follow '0\.weight'\. .*clip_grad_value_") as caught:
        before_a_norm(kind)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0.9},
        {"optimizer": lambda model: torch.optim.Adam(model.parameters())},
        {"norm": lambda channels: nn.GroupNorm(2, channels)},
        {"groups": "input"},
        {"select": "3.weight"},
    ],
)
def test_other_targets_optimizers_and_layers_ask_for_no_clipping(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before_a_norm(GroupLasso if "groups" in options else L1, **options)
