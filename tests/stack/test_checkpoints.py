"""torch.distributed.checkpoint takes the wrapper as it takes the optimizer in it, and training goes on bit for bit."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.nets import assert_same, data
from helpers.optimizers import MODES
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from torch_regpen import L1, L2, RegularizedOptimizer
from torch_regpen.schedules import LinearRamp, TargetSparsity

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAM = 0.02


class Network(nn.Module):
    """A model with its penalty in it, so that lambda is part of its checkpoints."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.penalty = L1(self.layers, LAM) + L2(self.layers, LAM, select="all")

    def forward(self, x):
        return self.layers(x)


class Run:
    """All that a training has that a checkpoint must hold."""

    def __init__(self, mode, seed=0, schedule=None):
        self.model = Network(seed)
        self.bare = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.0)
        self.optimizer = self.bare
        if mode is not None:
            self.optimizer = RegularizedOptimizer(self.bare, self.model.penalty, mode)
        self.schedule = schedule(self.optimizer) if schedule else LinearRamp(self.model.penalty, 10)

    def train(self, steps):
        x, y = data(torch.empty(0))
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.model(x) - y).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()
        return self

    def state_dict(self):
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "schedule": self.schedule,
        }

    def save(self, folder):
        dcp.save(self.state_dict(), checkpoint_id=folder)

    def load(self, folder, **kw):
        state = self.state_dict()
        dcp.load(state, checkpoint_id=folder, **kw)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        return self

    def lams(self):
        return [part.lam for part in self.model.penalty.parts]


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_bit_for_bit_lambda_and_its_schedule_included(mode, tmp_path):
    straight = Run(mode).train(3)
    straight.save(tmp_path)
    straight.train(3)
    resumed = Run(mode, seed=1).load(tmp_path)
    assert resumed.lams() == pytest.approx([3 / 10 * LAM] * 2)
    resumed.train(3)
    assert_same(resumed.model, straight.model)
    assert resumed.lams() == straight.lams() == pytest.approx([6 / 10 * LAM] * 2)


def test_frozen_zeros_stay_frozen(tmp_path):
    straight = Run("proximal").train(3)
    with torch.no_grad():
        straight.model.layers[0].weight[0] = 0
    straight.optimizer.freeze_zeros()
    straight.save(tmp_path)
    resumed = Run("proximal", seed=1)
    resumed.optimizer.freeze_zeros()  # as the optimizer that was saved: a checkpoint is loaded into what is there
    resumed.load(tmp_path).train(3)
    straight.train(3)
    assert_same(resumed.model, straight.model)
    assert (resumed.model.layers[0].weight[0] == 0).all()


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal"])
def test_the_state_is_the_wrapped_optimizers_own(mode):
    wrapped = Run(mode).train(3)
    ours = get_optimizer_state_dict(wrapped.model, wrapped.optimizer)
    theirs = get_optimizer_state_dict(wrapped.model, wrapped.bare)
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for name, entry in ours["state"].items():
        assert all(torch.equal(entry[key], value) for key, value in theirs["state"][name].items())
    assert {name.removeprefix("penalty.penalties.") for name in wrapped.model.state_dict() if "penalty" in name} == {
        "0._extra_state",
        "1._extra_state",
    }


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal"])
def test_a_checkpoint_of_the_bare_optimizer_loads_in_the_wrapper_and_back(mode, tmp_path):
    saved = Run(None).train(3)
    saved.save(tmp_path / "bare")
    wrapped = Run(mode, seed=1).load(tmp_path / "bare")
    expected = Run(mode)
    expected.model.load_state_dict(saved.model.state_dict())
    expected.optimizer.load_state_dict(saved.optimizer.state_dict())
    expected.schedule.load_state_dict(saved.schedule.state_dict())
    assert_same(wrapped.train(2).model, expected.train(2).model)

    wrapped.save(tmp_path / "wrapped")
    bare = Run(None, seed=2).load(tmp_path / "wrapped")
    expected = Run(None)
    expected.model.load_state_dict(wrapped.model.state_dict())
    expected.optimizer.load_state_dict(wrapped.optimizer.state_dict())
    assert_same(bare.train(2).model, expected.train(2).model)


def test_a_checkpoint_of_the_dual_mode_loads_into_the_bare_optimizer(tmp_path):
    saved = Run("dual").train(3)
    saved.save(tmp_path)
    bare = Run(None, seed=1).load(tmp_path)
    assert_same(bare.model, saved.model)
    assert all("gap" not in state for state in bare.optimizer.state.values())
    for p, q in zip(bare.model.parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(bare.optimizer.state[p]["exp_avg"], saved.optimizer.state[q]["exp_avg"])


def test_from_a_bare_checkpoint_the_dual_mode_starts_at_its_weights(tmp_path):
    """What the mode adds is not in the checkpoint, so the planner must allow for that."""
    saved = Run(None).train(3)
    saved.save(tmp_path)
    wrapped = Run("dual", seed=1).load(tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert_same(wrapped.model, saved.model)
    wrapped.train(1)
    saved.train(1)
    for p, q in zip(wrapped.model.parameters(), saved.model.parameters(), strict=True):
        torch.testing.assert_close(p + wrapped.optimizer.state[p]["gap"], q)


@pytest.mark.filterwarnings("ignore:with steps=8")  # a short ramp in the proximal mode
@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_a_schedule_that_steers_by_the_weights_goes_on_bit_for_bit(mode, tmp_path):
    def run(seed=0):
        return Run(mode, seed, lambda optimizer: TargetSparsity(optimizer, 0.9, steps=8, every=1))

    straight = run().train(3)
    straight.save(tmp_path)
    straight.train(5)
    resumed = run(seed=1).load(tmp_path).train(5)
    assert resumed.lams() == straight.lams()
    assert_same(resumed.model, straight.model)


def test_a_checkpoint_from_before_the_penalty_was_part_of_the_model_loads(tmp_path):
    before = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    torch.save({f"layers.{name}": p for name, p in before.state_dict().items()}, tmp_path / "model.pt")
    model = Network()
    set_model_state_dict(model, torch.load(tmp_path / "model.pt"))
    assert_same(model.layers, before)
    assert [part.lam for part in model.penalty.parts] == [LAM, LAM]


def test_one_file_of_torch_save_holds_everything_too(tmp_path):
    straight = Run("dual").train(3)
    state = {"model": straight.model, "optimizer": straight.optimizer, "schedule": straight.schedule}
    torch.save({name: part.state_dict() for name, part in state.items()}, tmp_path / "all.pt")
    straight.train(3)
    resumed = Run("dual", seed=1)
    for name, saved in torch.load(tmp_path / "all.pt", weights_only=True).items():
        getattr(resumed, name).load_state_dict(saved)
    assert_same(resumed.train(3).model, straight.model)
