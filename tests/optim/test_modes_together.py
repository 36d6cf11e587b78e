"""A mode for each penalty in one optimizer: each acts as it does alone, in the order of a step."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_regpen import L0, L1, L2, ElasticNet, GroupLasso, RegularizedOptimizer, SparseGroupLasso
from torch_regpen.schedules import TargetSparsity


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(32, 6), torch.randint(3, (32,))


def train(model, optimizer, x, y, steps=30, after=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()
    return torch.cat([w.detach().flatten() for w in model.parameters()])


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_decoupled_l2_beside_l1_is_adamws_decay_beside_l1(mode):
    model, x, y = problem()
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    both = RegularizedOptimizer(adamw, [(L2(model, 0.05, select="all"), "decoupled"), (L1(model, 1e-3), mode)])
    decayed = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    alone = RegularizedOptimizer(decayed, L1(twin, 1e-3), mode)
    ours, theirs = train(model, both, x, y), train(twin, alone, x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours == 0, theirs == 0)
    assert (ours == 0).any()


def test_coupled_l2_beside_l1_is_sgds_weight_decay_beside_l1():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    both = RegularizedOptimizer(sgd, [(L1(model, 1e-3), "proximal"), (L2(model, 0.05, select="all"), "coupled")])
    decayed = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    alone = RegularizedOptimizer(decayed, L1(twin, 1e-3), "proximal")
    torch.testing.assert_close(train(model, both, x, y), train(twin, alone, x, y), rtol=1e-5, atol=1e-7)


def test_penalties_without_a_mode_of_their_own_take_the_default():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    mixed = [(L2(model, 0.05), "coupled"), L1(model, 1e-3)]
    ours = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mixed, "proximal")
    named = [(L2(twin, 0.05), "coupled"), (L1(twin, 1e-3), "proximal")]
    theirs = RegularizedOptimizer(torch.optim.SGD(twin.parameters(), lr=0.1), named)
    assert torch.equal(train(model, ours, x, y), train(twin, theirs, x, y))


def test_at_lambda_0_all_modes_together_are_the_bare_optimizer():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    penalties = [(L2(model, 0.0), "coupled"), (ElasticNet(model, 0.0), "decoupled"), (L1(model, 0.0), "proximal")]
    ours = RegularizedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), penalties)
    assert torch.equal(train(model, ours, x, y), train(twin, torch.optim.Adam(twin.parameters(), lr=0.01), x, y))


def test_a_closure_returns_the_loss_and_the_coupled_penalty_alone():
    model, x, y = problem()
    l2 = L2(model, 0.05)
    optimizer = RegularizedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), [(l2, "coupled"), (L1(model, 1.0), "proximal")]
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    expected = F.cross_entropy(model(x), y) + 0.05 * sum(w.square().sum() for w in (model[0].weight, model[2].weight))
    torch.testing.assert_close(optimizer.step(closure), expected)


@pytest.mark.parametrize("given", [lambda p: [p, p], lambda p: [(p, "coupled"), (p, "proximal")], lambda p: [p + p]])
def test_the_same_penalty_twice_is_refused(given):
    model, *_ = problem()
    with pytest.raises(ValueError, match="twice"):
        RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), given(L1(model, 0.1)), "proximal")


def test_what_is_no_pair_of_penalty_and_mode_is_refused():
    model, *_ = problem()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="penalty must be"):
        RegularizedOptimizer(sgd, [("coupled", L1(model, 0.1))])
    for mode in ("l1", 3, ["coupled"]):
        with pytest.raises(ValueError, match="mode must be one of"):
            RegularizedOptimizer(sgd, [(L1(model, 0.1), mode)])


def test_l2_in_adams_metric_beside_l1_is_explained():
    model, *_ = problem()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="AdamW is much weaker"):
        RegularizedOptimizer(adam, [L2(model, 0.05), L1(model, 1e-4)], "proximal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RegularizedOptimizer(adam, [(L2(model, 0.05), "decoupled"), (L1(model, 1e-4), "proximal")])
        RegularizedOptimizer(adam, ElasticNet(model, 0.05), "proximal")
        RegularizedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), [L2(model, 0.05), L1(model, 1e-4)], "proximal"
        )


def test_two_proximal_maps_of_one_parameter_are_refused():
    model, *_ = problem()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="in two proximal maps"):
        RegularizedOptimizer(adam, [(L1(model, 0.1), "proximal"), (L0(model, 0.1), "dual")])
    RegularizedOptimizer(adam, [(L1(model[0], 0.1), "proximal"), (L0(model[2], 0.1), "dual")])


def test_frozen_zeros_hold_while_the_decay_goes_on():
    model, x, y = problem()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    optimizer = RegularizedOptimizer(
        adamw, [(L2(model, 0.05, select="all"), "decoupled"), (L1(model, 5e-3), "proximal")]
    )
    train(model, optimizer, x, y)
    optimizer.freeze_zeros()
    twin, state = copy.deepcopy(model), copy.deepcopy(adamw.state_dict())
    zeros = [w == 0 for w in model.parameters()]
    assert sum(int(zero.sum()) for zero in zeros) > 5
    ours = train(model, optimizer, x, y)

    decayed = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    decayed.load_state_dict(state)
    decayed.param_groups[0]["weight_decay"] = 0.1
    for _ in range(30):
        decayed.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for w, zero in zip(twin.parameters(), zeros, strict=True):
            w.grad[zero] = 0.0
        decayed.step()
        with torch.no_grad():
            for w, zero in zip(twin.parameters(), zeros, strict=True):
                w[zero] = 0.0
    theirs = torch.cat([w.detach().flatten() for w in twin.parameters()])
    held = torch.cat([zero.flatten() for zero in zeros[::2]])
    assert (torch.cat([w.flatten() for w in list(model.parameters())[::2]])[held] == 0).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_target_steers_the_penalty_that_makes_zeros_alone():
    model, x, y = problem()
    l2, l1 = L2(model, 0.05), L1(model, 1e-3)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    optimizer = RegularizedOptimizer(adamw, [(l2, "decoupled"), (l1, "dual")])
    schedule = TargetSparsity(optimizer, 0.75, steps=60)
    train(model, optimizer, x, y, 80, schedule.step)
    assert l2.lam == 0.05
    assert l1.lam != 1e-3
    assert l1.sparsity().item() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_all_modes_together_resume_from_a_checkpoint(mode):
    model, x, y = problem()

    def optimizer_of(model):
        adam = torch.optim.Adam(model.parameters(), lr=0.01)
        return RegularizedOptimizer(
            adam, [(L2(model, 0.05), "decoupled"), (L1(model, 1e-3), mode), (L2(model[0], 0.01), "coupled")]
        )

    optimizer = optimizer_of(model)
    train(model, optimizer, x, y, 10)
    twin = copy.deepcopy(model)
    resumed = optimizer_of(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(train(model, optimizer, x, y, 10), train(twin, resumed, x, y, 10))


def test_a_copy_of_all_modes_together_trains_alike():
    model, x, y = problem()
    optimizer = RegularizedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.01),
        [(L2(model, 0.05), "decoupled"), (GroupLasso(model, 1e-3) + L1(model, 1e-4), "proximal")],
    )
    train(model, optimizer, x, y, 5)
    twin, copied = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, x, y, 5), train(twin, copied, x, y, 5))


def test_the_repr_names_each_mode():
    model, *_ = problem()
    optimizer = RegularizedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        [(L2(model, 0.1), "decoupled"), (SparseGroupLasso(model, 0.1), "dual")],
    )
    assert repr(optimizer).startswith("RegularizedOptimizer(mode='decoupled', 'dual'\n")
