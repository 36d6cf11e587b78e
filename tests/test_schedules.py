"""Lambda over time: ramps as LambdaLR has them, and the lambda that reaches a target sparsity and holds it."""

import copy
import math
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from torch_regpen import L0, L1, L2, GroupLasso, RegularizedOptimizer
from torch_regpen.schedules import CosineRamp, LamScheduler, LinearRamp, TargetSparsity

# The ramps.


def test_lam_is_base_times_fn_and_fn_of_0_at_once():
    penalty = L1(nn.Linear(2, 2), 0.5)
    schedule = LamScheduler(penalty, lambda step: 0.9**step)
    seen = [penalty.lam]
    for _ in range(3):
        schedule.step()
        seen.append(penalty.lam)
    assert seen == pytest.approx([0.5, 0.45, 0.405, 0.3645])


def test_it_is_lambda_lr():
    penalty = L1(nn.Linear(2, 2), 0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    fn = lambda step: 1 / (1 + step)  # noqa: E731
    ours, theirs = LamScheduler(penalty, fn), torch.optim.lr_scheduler.LambdaLR(optimizer, fn)
    for _ in range(5):
        assert penalty.lam == optimizer.param_groups[0]["lr"]
        ours.step()
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [(LinearRamp, [0, 0.25, 0.5, 0.75, 1, 1]), (CosineRamp, [0, 0.14644661, 0.5, 0.85355339, 1, 1])],
)
def test_ramps(ramp, expected):
    penalty = L1(nn.Linear(2, 2), 2.0)
    schedule = ramp(penalty, 4)
    seen = []
    for _ in range(6):
        seen.append(penalty.lam / 2)
        schedule.step()
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("ramp", [LinearRamp, CosineRamp])
def test_a_pickled_ramp_goes_on_with_its_penalty(ramp):
    penalty = L1(nn.Linear(2, 2), 0.5)
    schedule = ramp(penalty, 4)
    schedule.step()
    found, found_schedule = pickle.loads(pickle.dumps((penalty, schedule)))
    found_schedule.step()
    assert penalty.lam < found.lam < 0.5
    schedule.step()
    assert penalty.lam == found.lam


def test_each_group_and_each_part_has_its_own_base():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    first = L1([{"params": [one.weight], "lam": 1.0}, {"params": [two.weight]}], 3.0)
    second = L2(one, 0.5)
    schedule = LinearRamp(first + second, 2)
    schedule.step()
    assert [group["lam"] for group in first.param_groups] == [0.5, 1.5]
    assert second.lam == 0.25


def test_a_ramp_goes_on_from_its_state():
    penalty = L1(nn.Linear(2, 2), 2.0)
    schedule = CosineRamp(penalty, 10)
    for _ in range(4):
        schedule.step()
    saved, lam = schedule.state_dict(), penalty.lam
    other = L1(nn.Linear(2, 2), 0.0)  # as a checkpoint at the start of a ramp has it
    resumed = CosineRamp(other, 10)
    resumed.load_state_dict(saved)
    assert other.lam == lam
    schedule.step()
    resumed.step()
    assert other.lam == penalty.lam
    with pytest.raises(ValueError, match="1 groups, the penalty has 2"):
        LinearRamp(L1(nn.Linear(2, 2), 1.0) + L2(nn.Linear(2, 2), 1.0), 10).load_state_dict(saved)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_a_count_must_be_one(steps):
    with pytest.raises(ValueError, match="whole number"):
        LinearRamp(L1(nn.Linear(2, 2), 1.0), steps)


def test_a_factor_that_is_no_lambda_is_refused():
    with pytest.raises(ValueError, match="finite"):
        LamScheduler(L1(nn.Linear(2, 2), 1.0), lambda step: math.inf)


# The target.


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


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.003)


def elements(model):
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
    return (weights == 0).double().mean().item()


def rows(model):
    whole = torch.cat([(p.detach().flatten(1) == 0).all(1) for p in model.parameters() if p.ndim > 1])
    return whole.double().mean().item()


STEPS, HELD = 300, 90


def trained(digits, model, optimizer, schedule, first=0, last=STEPS + HELD, measure=elements):
    """Trains with a learning rate that falls to zero along a cosine; returns the fraction of zeros after each step."""
    x, y = digits
    fractions = []
    base = optimizer.param_groups[0].setdefault("base_lr", optimizer.param_groups[0]["lr"])
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = base * 0.5 * (1 + math.cos(math.pi * step / (STEPS + HELD)))
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
        *((mlp, sgd, "proximal", L1, lam, 0.9) for lam in (1e-6, 1e-4, 1e-2)),
        (mlp, sgd, "proximal", L1, 1e-4, 0.5),
        (mlp, adam, "proximal", L1, 1e-6, 0.8),
        (mlp, adam, "proximal", L1, 1e-2, 0.95),
        (conv, sgd, "proximal", L1, 1e-4, 0.7),
        (conv, adam, "proximal", L1, 1e-4, 0.7),
        (mlp, sgd, "proximal", L0, 1e-4, 0.9),
        *((mlp, sgd, "dual", kind, lam, 0.9) for kind in (L1, L0) for lam in (1e-6, 1e-2)),
        (mlp, adam, "dual", L1, 1e-4, 0.95),
        (conv, sgd, "dual", L0, 1e-4, 0.8),
        (conv, adam, "dual", L0, 1e-4, 0.5),
    ],
)
def test_the_target_is_reached_and_held(digits, make, optimizer, mode, kind, lam, target):
    torch.manual_seed(0)
    model = make()
    wrapped = RegularizedOptimizer(optimizer(model), kind(model, lam), mode)
    schedule = TargetSparsity(wrapped, target, steps=STEPS)
    fractions = trained(digits, model, wrapped, schedule)
    assert abs(fractions[STEPS - 1] - target) <= 0.01
    held = torch.tensor(fractions[STEPS:])
    assert abs(held.mean().item() - target) <= 0.01
    assert (held - target).abs().max() <= 0.03  # between two readings the noise of the gradients shows


@pytest.mark.parametrize(("mode", "target"), [("proximal", 0.4), ("proximal", 0.7), ("dual", 0.6)])
def test_of_groups_it_is_the_fraction_of_groups(digits, mode, target):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
    wrapped = RegularizedOptimizer(sgd(model), GroupLasso(model, 1e-4), mode)
    fractions = trained(digits, model, wrapped, TargetSparsity(wrapped, target, steps=STEPS), measure=rows)
    assert abs(fractions[STEPS - 1] - target) <= 0.01  # 310 neurons: three of them
    assert abs(sum(fractions[STEPS:]) / HELD - target) <= 0.01
    assert abs(fractions[-1] - target) <= 0.01


def test_of_a_penalty_alone_it_is_fed_back(digits):
    torch.manual_seed(0)
    model = mlp()
    penalty = L1(model, 1e-3)
    wrapped = RegularizedOptimizer(sgd(model), penalty, "proximal")
    fractions = trained(digits, model, wrapped, TargetSparsity(penalty, 0.9, steps=STEPS))
    assert abs(sum(fractions[STEPS:]) / HELD - 0.9) <= 0.03


def test_in_the_dual_mode_it_follows_the_ramp_from_the_first_reading(digits):
    torch.manual_seed(0)
    model = mlp()
    wrapped = RegularizedOptimizer(sgd(model), L0(model, 1e-4), "dual")
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
        wrapped = RegularizedOptimizer(sgd(model), L1(model, 1e-4), mode)
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
@pytest.mark.parametrize("mode", ["coupled", "proximal", "dual"])
def test_a_copy_with_its_model_and_optimizer_goes_on_alike(digits, mode, way):
    torch.manual_seed(0)
    model = mlp()
    wrapped = RegularizedOptimizer(sgd(model), L1(model, 1e-4), mode)
    schedule = TargetSparsity(wrapped, 0.9, steps=STEPS, every=7)
    trained(digits, model, wrapped, schedule, last=20)
    twin, *others = way((model, wrapped, schedule))
    trained(digits, model, wrapped, schedule, first=20, last=50)
    trained(digits, twin, *others, first=20, last=50)
    assert others[1].factor == schedule.factor
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("given", ["proximal", "dual", "penalty"])
def test_the_device_is_read_each_every_steps_and_no_more_often(monkeypatch, given):
    model = nn.Linear(6, 6)
    penalty = L1(model, 1e-3)
    wrapped = RegularizedOptimizer(sgd(model), penalty, "dual" if given == "dual" else "proximal")
    schedule = TargetSparsity(penalty if given == "penalty" else wrapped, 0.5, steps=40, every=10)
    reads = []
    monkeypatch.setattr(torch.Tensor, "item", lambda x: reads.append(1) or x.tolist())
    most = 2 if given == "proximal" else 1  # the first time also for where to start
    for step in range(1, 61):
        model.weight.grad = torch.randn(6, 6)
        reads.clear()
        wrapped.step()
        schedule.step()
        assert len(reads) <= (most if step % 10 == 0 else 0), step


def test_the_proportions_of_lambdas_stay():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    penalty = L1([{"params": [model[0].weight], "lam": 1.0}, {"params": [model[1].weight], "lam": 3.0}], 1.0)
    wrapped = RegularizedOptimizer(sgd(model), penalty + L2(model, 0.5), "proximal")
    schedule = TargetSparsity(wrapped, 0.5, steps=10)
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
        wrapped = RegularizedOptimizer(sgd(model), penalty, "proximal")
        old = TargetSparsity(wrapped, 0.1, steps=5, every=5) if replaced else None
        penalty.lam = 1e-4
        fractions.append(trained(digits, model, wrapped, TargetSparsity(wrapped, 0.9, steps=60), last=60)[-1])
        del old
    assert fractions == pytest.approx([0.9, 0.9], abs=0.01)


def test_what_makes_no_sense_is_refused():
    model = nn.Linear(2, 2)
    for target in (-0.1, 1.0):
        with pytest.raises(ValueError, match="target"):
            TargetSparsity(L1(model, 0.1), target, steps=10)
    with pytest.raises(ValueError, match="more than 0"):
        TargetSparsity(L1(model, 0.0), 0.5, steps=10)
    with pytest.raises(ValueError, match="zeroes nothing"):
        TargetSparsity(L2(model, 0.1), 0.5, steps=10)
    for wrong in ({"steps": 0}, {"steps": 10, "every": 0}):
        with pytest.raises(ValueError, match="whole number"):
            TargetSparsity(L1(model, 0.1), 0.5, **wrong)
