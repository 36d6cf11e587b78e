"""A step in rough weather: exceptions, hooks, optimizers that write gradients of their own, copies, what is let go."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from helpers.nets import assert_same, backward, network, set_gradients, train
from helpers.optimizers import modes
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_regpen import L1, L2, ElasticNet, GroupLasso, RegularizedOptimizer, SparseGroupLasso


def wrapped(model, mode, lam=0.05, make=lambda p: optim.SGD(p, lr=0.1, momentum=0.9)):
    return RegularizedOptimizer(make(model.parameters()), L1(model, lam), mode)


# Exceptions


def fails(kind):
    def fail(*_):
        raise kind

    return fail


@modes
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["closure", "pre-hook", "inner pre-hook", "wrapped step"])
def test_an_error_before_the_update_leaves_weights_and_next_step_right(mode, where, kind, monkeypatch):
    model, expected = network(), network()
    optimizer, other = wrapped(model, mode), wrapped(expected, mode)
    train(model, optimizer, 20)
    train(expected, other, 20)
    backward(model, 30)
    handle = None
    if where == "pre-hook":
        handle = optimizer.register_step_pre_hook(fails(kind))
    elif where == "inner pre-hook":
        handle = optimizer.optimizer.register_step_pre_hook(fails(kind))
    elif where == "wrapped step":
        monkeypatch.setattr(optimizer.optimizer, "step", fails(kind))
    with pytest.raises(kind):
        optimizer.step(fails(kind) if where == "closure" else None)
    monkeypatch.undo()
    if handle is not None:
        handle.remove()
    if mode != "decoupled" or where not in ("inner pre-hook", "wrapped step"):  # there the weights have shrunk already
        assert_same(model, expected)
        train(model, optimizer, 5)
        train(expected, other, 5)
        assert_same(model, expected)
    assert not optimizer.optimizer._optimizer_step_post_hooks


@modes
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("inner", [False, True])
def test_a_post_hook_that_raises_leaves_the_step_done(mode, inner, kind):
    model, expected = network(), network()
    optimizer, other = wrapped(model, mode), wrapped(expected, mode)
    for step in range(4):
        backward(model, step)
        backward(expected, step)
        handle = (optimizer.optimizer if inner else optimizer).register_step_post_hook(fails(kind))
        with pytest.raises(kind):
            optimizer.step()
        handle.remove()
        other.step()
        assert_same(model, expected)


# Hooks


@modes
def test_global_hooks_fire_once_and_see_the_weights_after_the_penalty(mode):
    model = network()
    optimizer = wrapped(model, mode, lam=0.5)
    seen = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(model[0].weight.detach().clone()))
    try:
        for step in range(3):
            backward(model, step)
            optimizer.step()
            assert len(seen) == step + 1
            assert torch.equal(seen[-1], model[0].weight)
    finally:
        handle.remove()
    assert mode in ("coupled", "decoupled") or (seen[-1] == 0).any()


def test_a_hook_of_the_wrapped_optimizer_sees_the_update_before_the_prox():
    model = network()
    optimizer = wrapped(model, "proximal", lam=10.0)
    seen = []
    optimizer.optimizer.register_step_post_hook(lambda *_: seen.append((model[0].weight == 0).sum().item()))
    train(model, optimizer, 1)
    assert seen == [0]
    assert (model[0].weight == 0).all()


def test_step_hooks_get_what_torch_gives_them():
    model = network()
    calls = {}
    for name, optimizer in (("ours", wrapped(model, "proximal")), ("torch", optim.SGD(model.parameters(), lr=0.1))):
        got = calls[name] = []

        def note(source, args, kwargs, got=got, optimizer=optimizer):
            assert source is args[0] is optimizer
            got.append((args[1:], kwargs))

        optimizer.register_step_pre_hook(note)
        optimizer.register_step_post_hook(note)
        set_gradients(model, 0)
        optimizer.step()
        closure = fails(AssertionError) if False else lambda: None
        calls.setdefault("closure", closure)
        optimizer.step(calls["closure"])
        optimizer.step(closure=calls["closure"])
    assert calls["ours"] == calls["torch"]
    assert calls["ours"][0] == ((), {})


@pytest.mark.parametrize("form", ["args", "kwargs", "nothing"])
def test_what_a_pre_hook_returns_is_what_the_step_gets(form):
    model = network()
    optimizer = wrapped(model, "proximal")
    calls = []

    def closure():
        calls.append(1)
        return backward(model)

    def hook(source, args, kwargs):
        return {
            "args": ((source, closure), {}),
            "kwargs": ((source,), {"closure": closure}),
            "nothing": ((source,), {}),
        }[form]

    optimizer.register_step_pre_hook(hook)
    set_gradients(model, 0)
    optimizer.step()
    assert len(calls) == (form != "nothing")


def test_a_pre_hook_that_returns_something_else_is_refused_as_in_torch():
    optimizer = wrapped(network(), "proximal")
    optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="new_args, new_kwargs"):
        optimizer.step()


# What is refused, and what is warned of


def test_a_wrapper_around_a_wrapper_is_refused_and_the_way_out_named():
    model = network()
    with pytest.raises(TypeError, match="list of all penalties"):
        RegularizedOptimizer(wrapped(model, "decoupled"), L2(model, 0.1), "proximal")


@modes
@pytest.mark.parametrize("kind", [L2, ElasticNet, lambda m, lam: L1(m, lam) + L2(m, lam)])
def test_two_l2_on_one_parameter_warn_once(mode, kind):
    model = network()
    with pytest.warns(UserWarning, match=r"weight_decay of AdamW.* both shrink 0\.weight, 2\.weight\.") as record:
        optimizer = RegularizedOptimizer(optim.AdamW(model.parameters()), kind(model, 0.1), mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    assert len(record) == 1
    assert record[0].filename == __file__


@modes
@pytest.mark.parametrize("kind", [L1, GroupLasso, SparseGroupLasso])
def test_l1_beside_a_weight_decay_is_an_elastic_net_and_warns_not(mode, kind):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RegularizedOptimizer(optim.AdamW(model.parameters()), kind(model, 0.1), mode)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("metric", ["auto", "euclidean"])
def test_a_line_search_is_refused_on_a_loss_without_the_penalty(mode, metric):
    model = network()
    inner = optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match=r"line search of LBFGS.*mode='coupled'"):
        RegularizedOptimizer(inner, L1(model, 0.1), mode, metric=metric)
    RegularizedOptimizer(inner, L1(model, 0.1), "coupled")


class SelfTuning(optim.SGD):
    """Keeps what it multiplies its lr of 1 by in "d", as Prodigy and D-Adaptation do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * group["d"] * p.grad


def self_tuning(params):
    class Tuned(optim.Optimizer):
        step = SelfTuning.step

    return Tuned(params, {"lr": 1.0, "d": 1e-6})


def test_an_optimizer_that_sets_its_own_step_warns_in_the_decoupled_mode():
    model = network()
    with pytest.warns(UserWarning, match="sets its own step size.*coupled") as record:
        optimizer = RegularizedOptimizer(self_tuning(model.parameters()), L1(model, 0.1), "decoupled")
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
        RegularizedOptimizer(self_tuning(model.parameters()), L1(model, 0.1), "coupled")
        RegularizedOptimizer(optim.Adafactor(model.parameters()), L1(model, 0.1), "decoupled")  # its "d" is another


class Private(optim.SGD):
    """Makes `.grad` anew of the gradients of the samples, as Opacus' DPOptimizer does."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.samples.mean(0) + 0.01 * torch.randn_like(p)
        super().step()


@pytest.mark.parametrize("name", ["grad_sample", "samples"])
def test_coupled_over_private_gradients_is_refused_in_the_step(name):
    model = network()
    optimizer = wrapped(model, "coupled", make=lambda p: Private(p, lr=0.1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.samples = torch.stack([p.grad] * 3)
        setattr(p, name, p.samples)
    with pytest.raises((ValueError, RuntimeError), match=r"Private replaces \.grad.*'decoupled'.*'proximal'"):
        optimizer.step()


def test_coupled_over_what_says_it_is_private_is_refused_at_construction():
    model = network()
    inner = Private(model.parameters(), lr=0.1)
    inner.noise_multiplier = 1.0
    with pytest.raises(ValueError, match="differential privacy"):
        RegularizedOptimizer(inner, L1(model, 0.1))
    for mode in ("decoupled", "proximal", "dual"):
        RegularizedOptimizer(inner, L1(model, 0.1), mode)


def test_gradients_dropped_by_the_optimizer_or_a_closure_are_no_others():
    class Dropping(optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad()

    model = network()
    optimizer = wrapped(model, "coupled", make=lambda p: Dropping(p, lr=0.1))
    for step in range(3):
        optimizer.step(lambda step=step: backward(model, step))
    inner = optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    RegularizedOptimizer(inner, L1(model, 0.1)).step(lambda: backward(model))


# What lives on, and what does not


@modes
def test_wrapper_and_model_are_gone_when_nobody_holds_them(mode):
    model = network()
    optimizer = wrapped(model, mode)
    train(model, optimizer, 2)
    optimizer.freeze_zeros()
    train(model, optimizer, 2)
    left = [weakref.ref(x) for x in (optimizer, optimizer.optimizer, optimizer._applied[0], optimizer._zeros)]
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert [ref() for ref in left] == [None] * len(left)
    finally:
        gc.enable()


@modes
def test_parameters_in_the_place_of_others_inherit_nothing(mode):
    model = network()
    optimizer = wrapped(model, mode)
    for i in range(5):
        train(model, optimizer, 2)
        model[0].weight = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(i)))
        optimizer.param_groups[0]["params"] = list(model.parameters())
        fresh = copy.deepcopy(model)
        other = wrapped(fresh, mode, make=lambda p: optim.SGD(p, lr=0.1, momentum=0.9))
        backward(model, 7)
        backward(fresh, 7)
        optimizer.step()
        other.step()
        assert torch.equal(model[0].weight, fresh[0].weight)


def test_a_hook_that_raises_before_the_update_leaves_the_weights_undecayed():
    layer = nn.Linear(4, 2)
    before = layer.weight.detach().clone()
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer = RegularizedOptimizer(sgd, L2(layer, 0.5), "decoupled")
    handle = sgd.register_step_pre_hook(lambda *_: 1 / 0)
    layer(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert torch.equal(layer.weight, before)
    handle.remove()
    layer.weight.grad.zero_()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 2 * 0.5))
