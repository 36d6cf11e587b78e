"""The wrapper in the place of an optimizer: its interface, checkpoints, copies and hooks."""

import copy

import pytest
import torch
from helpers.nets import assert_same, closure_on, network, set_gradients, train
from helpers.optimizers import modes, through_a_file, through_pickle, wrapped_adam, wrapped_sgd
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torch_regpen import L1, GroupLasso, RegularizedOptimizer

wrappers = pytest.mark.parametrize("make", [wrapped_sgd, wrapped_adam])


# It is an optimizer


def test_it_is_an_optimizer_and_shares_what_the_wrapped_one_holds():
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = RegularizedOptimizer(inner, L1(model, 0.1))
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, steps=1)
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
    optimizer.load_state_dict(optimizer.state_dict())
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
    replacement = [dict(group, lr=0.5) for group in inner.param_groups]
    optimizer.param_groups = replacement
    assert inner.param_groups is replacement


def test_its_repr_says_what_it_wraps_and_how():
    model = network()
    text = repr(wrapped_sgd(model, "proximal"))
    for part in ("mode='proximal'", "L1(lam=0.05", "0.weight", "SGD"):
        assert part in text


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_that_of_the_wrapped_optimizer(set_to_none):
    model = network()
    optimizer = wrapped_sgd(model)
    set_gradients(model, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()


class ScheduleFree(torch.optim.SGD):
    """An optimizer with more to it than torch.optim's interface."""

    training = False

    def train(self):
        self.training = True


def test_what_the_wrapped_optimizer_has_beyond_the_interface_is_there():
    model = network()
    optimizer = RegularizedOptimizer(ScheduleFree(model.parameters(), lr=0.1), L1(model, 0.1))
    assert hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")
    optimizer.train()
    assert optimizer.optimizer.training
    assert optimizer.training


@modes
def test_a_param_group_added_later_is_stepped_and_penalized_at_its_own_lr(device, mode):
    late, whole = network(device), network(device)
    late[2].requires_grad_(False)
    optimizer = RegularizedOptimizer(torch.optim.SGD(late[0].parameters(), lr=0.1), L1(late, 0.05), mode)
    groups = [{"params": whole[0].parameters()}, {"params": whole[2].parameters(), "lr": 0.02}]
    expected = RegularizedOptimizer(torch.optim.SGD(groups, lr=0.1), L1(whole, 0.05), mode)
    late[2].requires_grad_(True)
    optimizer.add_param_group({"params": late[2].parameters(), "lr": 0.02})
    train(late, optimizer)
    train(whole, expected)
    assert_same(late, whole)


# Checkpoints


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal"])  # the dual mode adds its gaps
@wrappers
def test_its_state_dict_is_the_wrapped_optimizers_own(device, mode, make):
    model, bare = network(device), network(device)
    optimizer = make(model, mode)
    plain = type(optimizer.optimizer)(bare.parameters(), **{"lr": optimizer.param_groups[0]["lr"]})
    for each, opt in ((model, optimizer), (bare, plain)):
        set_gradients(each, 0)
        opt.step()
    state, expected = optimizer.state_dict(), plain.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert state["state"][key].keys() == entry.keys()


@modes
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}])
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_been(device, mode, options):
    through, resumed = network(device), network(device)
    optimizer = wrapped_adam(through, mode, **options)
    train(through, optimizer, steps=3)
    states = through_a_file(through.state_dict()), through_a_file(optimizer.state_dict())
    resumed.load_state_dict(states[0])
    again = wrapped_adam(resumed, mode, **options)
    again.load_state_dict(states[1])
    train(through, optimizer, steps=3)
    train(resumed, again, steps=3)
    assert_same(resumed, through)


def test_a_checkpoint_of_the_bare_optimizer_loads_in_the_wrapper_and_back(device):
    """A penalty of lambda 0 in between makes no difference at all."""
    through, changing = network(device), network(device)
    plain = torch.optim.Adam(through.parameters(), lr=0.01)
    train(through, plain, steps=6)
    first = torch.optim.Adam(changing.parameters(), lr=0.01)
    train(changing, first, steps=2)
    second = wrapped_adam(changing, lam=0.0)
    second.load_state_dict(through_a_file(first.state_dict()))
    train(changing, second, steps=2)
    third = torch.optim.Adam(changing.parameters(), lr=0.01)
    third.load_state_dict(through_a_file(second.state_dict()))
    train(changing, third, steps=2)
    assert_same(changing, through)


ways = pytest.mark.parametrize("way", [copy.deepcopy, through_pickle])


@modes
@wrappers
@ways
def test_a_copy_with_its_model_trains_alike_and_leaves_the_original_alone(device, mode, make, way):
    model = network(device)
    penalty = L1(model, 0.05) + GroupLasso(model, 0.02)
    optimizer = RegularizedOptimizer(make(model).optimizer, penalty, mode)
    train(model, optimizer, steps=2)
    twin, twin_penalty, twin_optimizer = way((model, penalty, optimizer))
    before = copy.deepcopy(model)
    train(twin, twin_optimizer, steps=3)
    assert_same(model, before)
    train(model, optimizer, steps=3)
    assert_same(twin, model)
    twin_penalty.penalties[0].lam = 1.0
    train(twin, twin_optimizer, steps=1)
    train(model, optimizer, steps=1)
    assert not torch.equal(twin[0].weight, model[0].weight)


@ways
def test_a_copy_of_a_scheduled_optimizer_steps_itself(way):
    model = network()
    optimizer = wrapped_sgd(model)
    schedulers.StepLR(optimizer, 1)  # it puts a step of its own on the optimizer
    twin, twin_optimizer = way((model, optimizer))
    before = copy.deepcopy(model)
    train(twin, twin_optimizer, steps=2)
    assert_same(model, before)
    train(model, optimizer, steps=2)
    assert_same(twin, model)


@ways
def test_a_copy_has_no_hooks_and_can_have_its_own(way):
    """As any optimizer of torch.optim: hooks are not copied."""
    model = network()
    optimizer = wrapped_sgd(model)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("original"))
    twin, twin_optimizer = way((model, optimizer))
    twin_optimizer.register_step_post_hook(lambda *_: calls.append("twin"))
    train(twin, twin_optimizer, steps=1)
    assert calls == ["twin"]
    train(model, optimizer, steps=1)
    assert calls == ["twin", "original"]


# Hooks


@modes
def test_hooks_fire_once_a_step_each_at_its_own_optimizer(mode):
    model = network()
    optimizer = wrapped_sgd(model, mode)
    calls = []

    def note(name):
        return lambda source, args, kwargs: calls.append((name, source))

    inner = optimizer.optimizer
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    inner.register_step_pre_hook(note("inner pre"))
    inner.register_step_post_hook(note("inner post"))
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        train(model, optimizer, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(name for name, _ in calls) == [
        "global post",
        "global pre",
        "inner post",
        "inner pre",
        "post",
        "pre",
    ]
    sources = dict(calls)
    assert sources["pre"] is sources["post"] is optimizer
    assert sources["inner pre"] is sources["inner post"] is inner
    assert calls[0][0] == "pre"
    assert calls[-1][0] == "post"


@modes
def test_a_post_hook_sees_the_weights_after_the_penalty(mode):
    model = network()
    optimizer = wrapped_sgd(model, mode)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(model[0].weight.detach().clone()))
    train(model, optimizer, steps=1)
    assert torch.equal(seen[0], model[0].weight)


def test_a_hook_that_was_removed_is_gone():
    model = network()
    optimizer = wrapped_sgd(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1)).remove()
    train(model, optimizer, steps=1)
    assert not calls


def test_a_pre_hook_can_replace_the_closure_as_it_can_in_torch():
    model, expected = network(), network()
    optimizer = wrapped_sgd(model)
    closure = closure_on(model, optimizer)
    optimizer.register_step_pre_hook(lambda source, args, kwargs: ((source, closure), kwargs))
    optimizer.step()
    train(expected, wrapped_sgd(expected), steps=1)
    assert_same(model, expected)


def test_hooks_on_the_state_dict_work():
    model = network()
    optimizer = wrapped_sgd(model)

    def add(source, state):
        state["note"] = 7

    optimizer.register_state_dict_post_hook(add)
    assert optimizer.state_dict()["note"] == 7


def test_the_profiler_sees_the_step():
    model = network()
    optimizer = wrapped_adam(model, "proximal")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, steps=2)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#Adam.step"] == 2
