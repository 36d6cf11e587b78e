"""Lambda over time: ramps as LambdaLR has them."""

import math
import pickle

import pytest
import torch
from torch import nn

from torch_regpen import L1, L2, RegularizedOptimizer
from torch_regpen.schedules import Bound, CosineRamp, LamScheduler, LinearRamp, TargetSparsity

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
    other = L1(nn.Linear(2, 2), 1.0)
    resumed = CosineRamp(other, 10)
    resumed.load_state_dict(saved)
    assert other.lam == lam
    schedule.step()
    resumed.step()
    assert other.lam == penalty.lam
    with pytest.raises(ValueError, match="1 groups, the penalty has 2"):
        LinearRamp(L1(nn.Linear(2, 2), 1.0) + L2(nn.Linear(2, 2), 1.0), 10).load_state_dict(saved)


@pytest.mark.parametrize("ramp", [LinearRamp, CosineRamp])
def test_a_ramp_from_a_base_of_0_is_refused(ramp):
    penalty = L1(nn.Linear(2, 2), 1.0) + L2(nn.Linear(2, 2), 0.0)
    with pytest.raises(ValueError, match="base lambda of the schedule is 0"):
        ramp(penalty, 10)


@pytest.mark.parametrize("ramp", [LinearRamp, CosineRamp])
@pytest.mark.parametrize("before", [0, 3])
def test_a_ramp_built_again_has_the_base_of_the_first(ramp, before):
    penalty = L1(nn.Linear(2, 2), 2.0)
    first = ramp(penalty, 10)
    for _ in range(before):
        first.step()
    again = ramp(penalty, 10)
    for _ in range(10):
        again.step()
    assert penalty.lam == 2.0
    penalty.lam = 0.5  # but what the user sets is a new base
    assert ramp(penalty, 10).base == [0.5]


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_a_count_must_be_one(steps):
    with pytest.raises(ValueError, match="whole number"):
        LinearRamp(L1(nn.Linear(2, 2), 1.0), steps)


def test_a_factor_that_is_no_lambda_is_refused():
    with pytest.raises(ValueError, match="finite"):
        LamScheduler(L1(nn.Linear(2, 2), 1.0), lambda step: math.inf)
    with pytest.raises(TypeError, match=r"fn must return a number, but fn\(0\) is None"):
        LamScheduler(L1(nn.Linear(2, 2), 1.0), lambda step: None)


def test_a_number_in_place_of_a_function_is_refused():
    with pytest.raises(TypeError, match=r"fn must be a function of the number of steps.*not 0\.5"):
        LamScheduler(L1([torch.ones(2)], lam=0.1), 0.5)


def test_an_optimizer_or_a_list_in_place_of_a_penalty_is_refused():
    model = nn.Linear(2, 2)
    penalty = L1(model, 0.1)
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), penalty, "proximal")
    with pytest.raises(TypeError, match=r"not a RegularizedOptimizer; pass its \.penalty"):
        LinearRamp(optimizer, 10)
    for wrong in (model, [penalty], L1):
        with pytest.raises(TypeError, match="penalty must be a penalty or a sum of penalties, not a "):
            LamScheduler(wrong, lambda step: 1.0)


def test_the_state_of_another_kind_of_schedule_is_refused():
    model = nn.Linear(2, 2)
    dual, proximal = (
        RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, 0.1), mode)
        for mode in ("dual", "proximal")
    )
    penalty = L1(model, 0.1)
    schedules = [CosineRamp(penalty, 10), TargetSparsity(dual, 0.5, steps=10), Bound(proximal, 0.1)]
    for schedule in schedules:
        before = repr(schedule.state_dict())
        for other in schedules:
            if other is not schedule:
                with pytest.raises(ValueError, match=f"that of a {type(schedule).__name__} has .* such a schedule"):
                    schedule.load_state_dict(other.state_dict())
        assert repr(schedule.state_dict()) == before
    two = [{"params": [model.weight]}, {"params": [model.bias], "select": "all"}]
    other = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(two, 0.1), "dual")
    with pytest.raises(ValueError, match="1 groups, the penalty has 2"):
        TargetSparsity(other, 0.5, steps=10).load_state_dict(schedules[1].state_dict())


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_multiple_of_a_penalty_ramps_to_the_multiple_of_its_lambda(steps):
    penalty = L1([torch.ones(2)], lam=1.0)
    ramp = LinearRamp(penalty, 4)
    for _ in range(steps):
        ramp.step()
    half = 0.5 * penalty
    assert half.lam == 0.5 * penalty.lam
    ramp = LinearRamp(half, 1)
    ramp.step()
    assert half.lam == 0.5
