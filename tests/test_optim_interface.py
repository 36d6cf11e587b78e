"""RegularizedOptimizer in the place of the optimizer that it wraps: for schedulers, scalers, checkpoints and hooks."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from training import assert_same, closure_on, data, network, set_gradients, train

from torch_regpen import L1, L2, GroupLasso, RegularizedOptimizer

MODES = ("coupled", "decoupled", "proximal", "dual")
modes = pytest.mark.parametrize("mode", MODES)


def wrapped_sgd(model, mode="coupled", lr=0.1, lam=0.05, **options):
    return RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=lr, **options), L1(model, lam), mode)


def wrapped_adam(model, mode="coupled", lr=0.01, lam=0.05, **options):
    return RegularizedOptimizer(torch.optim.Adam(model.parameters(), lr=lr, **options), L1(model, lam), mode)


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


def saved(state):
    """The state after a way through a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


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
    states = saved(through.state_dict()), saved(optimizer.state_dict())
    resumed.load_state_dict(states[0])
    again = wrapped_adam(resumed, mode, **options)
    again.load_state_dict(states[1])
    train(through, optimizer, steps=3)
    train(resumed, again, steps=3)
    assert_same(resumed, through)


def test_a_checkpoint_of_the_bare_optimizer_loads_into_the_wrapper_and_back(device):
    """A penalty of lambda 0 in between makes no difference at all."""
    through, changing = network(device), network(device)
    plain = torch.optim.Adam(through.parameters(), lr=0.01)
    train(through, plain, steps=6)
    first = torch.optim.Adam(changing.parameters(), lr=0.01)
    train(changing, first, steps=2)
    second = wrapped_adam(changing, lam=0.0)
    second.load_state_dict(saved(first.state_dict()))
    train(changing, second, steps=2)
    third = torch.optim.Adam(changing.parameters(), lr=0.01)
    third.load_state_dict(saved(second.state_dict()))
    train(changing, third, steps=2)
    assert_same(changing, through)


def through_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


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


# Schedulers of the learning rate

SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3], gamma=0.3),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.8),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.2, total_iters=2), schedulers.ExponentialLR(o, 0.7)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, total_iters=2), schedulers.ExponentialLR(o, 0.7)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def scheduled(model, optimizer, name):
    """Six scheduled steps; returns the learning rates and momenta met on the way, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = SCHEDULERS[name](optimizer)
        met = []
        for _ in range(6):
            (loss,) = train(model, optimizer, steps=1)
            scheduler.step(*([loss] if name == "ReduceLROnPlateau" else []))
            met.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    return met, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_steers_the_wrapper_as_it_steers_the_bare_optimizer(device, name):
    """Same rates, same warnings (none about the order of steps), and the weights of weight_decay."""
    theirs, ours = network(device), network(device)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02)
    inner = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    expected = scheduled(theirs, plain, name)
    assert scheduled(ours, RegularizedOptimizer(inner, L2(ours, 0.01, select="all")), name) == expected
    assert not any("before" in warning for warning in expected[1])
    assert len({lr for lr, _ in expected[0]}) > 1
    assert_same(ours, theirs)


@pytest.mark.parametrize("mode", ["decoupled", "proximal"])
def test_the_step_of_the_penalty_follows_the_scheduled_lr(device, mode):
    model, expected = network(device), network(device)
    optimizer = wrapped_sgd(model, mode)
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    for i in range(3):
        set_gradients(model, i)
        optimizer.step()
        scheduler.step()
        set_gradients(expected, i)
        wrapped_sgd(expected, mode, lr=0.1 * 0.5**i).step()
    assert_same(model, expected)


def test_a_scheduler_built_on_the_wrapped_optimizer_works_too():
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = schedulers.ExponentialLR(inner, 0.5)
    optimizer = RegularizedOptimizer(inner, L1(model, 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, steps=1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_step_of_the_scheduler_before_the_optimizer_still_warns():
    model = network()
    scheduler = schedulers.ExponentialLR(wrapped_sgd(model), 0.5)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step\(\)"):
        scheduler.step()


# Mixed precision: the loss is scaled, the penalty never

SCALED = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "SGD-fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "Adam-fused": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
}
scaled = pytest.mark.parametrize("make", SCALED.values(), ids=SCALED.keys())


def train_scaled(model, optimizer, scale, steps=4, clip=None, inf_at=()):
    device = torch.device(model[0].weight.device)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    x, y = data(model[0].weight)
    for i in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() * (float("inf") if i in inf_at else 1.0)
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = copy.deepcopy(model)
        scaler.step(optimizer)
        scaler.update()
        if i in inf_at:
            assert_same(model, before)
    return scaler


@modes
@scaled
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_scale_of_the_loss_never_reaches_the_penalty(device, mode, make, clip):
    plain, one, large = network(device), network(device), network(device)
    optimizers = [RegularizedOptimizer(make(m), L1(m, 0.05), mode) for m in (plain, one, large)]
    train_scaled(one, optimizers[1], 1.0, clip=clip)
    train_scaled(large, optimizers[2], 65536.0, clip=clip)
    assert_same(large, one)
    if clip is None:
        train(plain, optimizers[0], steps=4)
        assert_same(large, plain)


def test_unscale_then_clip_is_clipping_without_a_scaler_and_leaves_the_penalty_unclipped(device):
    """Without a loss, a clipped step is lr * lam on each weight, whatever the clip."""
    model, expected = network(device), network(device)
    train_scaled(model, wrapped_sgd(model), 65536.0, clip=0.05)
    optimizer = wrapped_sgd(expected)
    closure = closure_on(expected, optimizer)
    for _ in range(4):
        closure()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
        optimizer.step()
    assert_same(model, expected)
    before = copy.deepcopy(model[0].weight)
    optimizer = wrapped_sgd(model)
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before - 0.1 * 0.05 * before.sign())


@modes
@scaled
def test_a_step_skipped_for_inf_changes_nothing(device, mode, make):
    skipped, never = network(device), network(device)
    train_scaled(skipped, RegularizedOptimizer(make(skipped), L1(skipped, 0.05), mode), 1024.0, steps=5, inf_at=(2,))
    train_scaled(never, RegularizedOptimizer(make(never), L1(never, 0.05), mode), 1024.0, steps=4)
    assert_same(skipped, never)


@modes
@scaled
def test_a_first_step_that_is_skipped_leaves_no_nan_behind(device, mode, make):
    skipped, never = network(device), network(device)
    optimizer = RegularizedOptimizer(make(skipped), L1(skipped, 0.05), mode)
    scaler = train_scaled(skipped, optimizer, 1024.0, steps=4, inf_at=(0, 1))
    assert scaler.get_scale() == 256.0
    train_scaled(never, RegularizedOptimizer(make(never), L1(never, 0.05), mode), 1024.0, steps=2)
    assert_same(skipped, never)
    assert all(p.isfinite().all() for p in skipped.parameters())


@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_a_fused_optimizer_that_skips_its_first_step_itself_leaves_no_nan_behind(device, mode):
    model = network(device)
    optimizer = wrapped_adam(model, mode, fused=True)
    optimizer.optimizer.found_inf = torch.ones((), device=device)  # as a scaler tells it
    before = copy.deepcopy(model)
    set_gradients(model, 0)
    optimizer.step()
    assert_same(model, before)
    del optimizer.optimizer.found_inf
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


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
