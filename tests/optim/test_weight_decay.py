"""L2 against what torch.optim has of its own: weight_decay, AdamW, and the optimizer without any penalty."""

import inspect
import warnings

import pytest
import torch
from helpers.nets import assert_same, closure_on, network, set_gradients, train
from helpers.optimizers import DIRECT
from torch import nn

from torch_regpen import L1, L2, GroupLasso, RegularizedOptimizer

LAM = 0.0123

COUPLED = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}],
    "Adam": [{}, {"amsgrad": True}],
    "Adagrad": [{}, {"lr_decay": 0.1}],
    "Adadelta": [{}],
    "Adamax": [{}],
    "ASGD": [{"t0": 2.0}],
    "NAdam": [{}],
    "RAdam": [{}],
    "RMSprop": [{}, {"momentum": 0.9, "centered": True}],
}
DECOUPLED = {
    "AdamW": [{}, {"amsgrad": True}],
    "Adam": [{"decoupled_weight_decay": True}],
    "NAdam": [{"decoupled_weight_decay": True}],
    "RAdam": [{"decoupled_weight_decay": True}],
}
ELSEWHERE = {
    "Muon": "takes matrices only: has a test of its own",
    "Adafactor": "its step size, and so its decay, depends on the weights",
}
BARE = ("Rprop", "LBFGS", "SparseAdam")  # no weight_decay to compare with; lam=0 is tested for these too
VARIANTS = ({"foreach": False}, {"foreach": True}, {"fused": True})


def optimizer_class(name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    return getattr(torch.optim, name)


def accepts(name, *options):
    return set(options) <= set(inspect.signature(getattr(torch.optim, name)).parameters)


def cases(table, *options):
    return [
        pytest.param(name, extra, id="-".join([name, *extra]))
        for name, extras in table.items()
        for extra in extras
        if hasattr(torch.optim, name) and accepts(name, *extra, *options)
    ]


def compare(name, options, mode, device, *, params=nn.Module.parameters, sign=1.0):
    """Train with weight_decay and with L2 in `mode` in its place; the weights must be the same, and decayed."""
    cls = optimizer_class(name)
    theirs, ours, bare = network(device), network(device), network(device)
    if name == "Adagrad" and options.get("fused") and torch.device(device).type == "cuda":
        pytest.skip("torch has no fused Adagrad on CUDA")
    # A fused CUDA kernel rounds its products its own way; everything else does the same operations in the same order.
    tolerance = 1e-6 if options.get("fused") and torch.device(device).type == "cuda" else 0.0
    train(theirs, cls(params(theirs), weight_decay=2 * LAM, **options), sign=sign)
    penalty = L2(ours, LAM, select="all")
    train(ours, RegularizedOptimizer(cls(params(ours), weight_decay=0, **options), penalty, mode), sign=sign)
    assert_same(ours, theirs, tolerance)
    train(bare, cls(params(bare), weight_decay=0, **options), sign=sign)
    assert not torch.equal(ours[0].weight, bare[0].weight)


def own_learning_rates(model):
    return [
        {"params": model[0].parameters(), "lr": 0.03},
        {"params": [model[2].weight], "lr": 0.007},
        {"params": [model[2].bias]},
    ]


def weight_decay_cases(*options):
    both = [("coupled", case) for case in cases(COUPLED, *options)]
    both += [("decoupled", case) for case in cases(DECOUPLED, *options)]
    return [pytest.param(mode, *case.values, id=f"{mode}-{case.id}") for mode, case in both]


def test_every_optimizer_of_torch_is_compared():
    names = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    assert names <= {*COUPLED, *DECOUPLED, *ELSEWHERE, *BARE}
    assert not any(accepts(name, "weight_decay") for name in names.intersection(BARE))
    assert {name for name in names if accepts(name, "decoupled_weight_decay")} <= set(DECOUPLED)


@pytest.mark.parametrize(("mode", "name", "extra"), weight_decay_cases())
def test_l2_equals_weight_decay(device, mode, name, extra):
    for variant in VARIANTS:
        if accepts(name, *variant):
            compare(name, {"lr": 0.01, **extra, **variant}, mode, device)


@pytest.mark.parametrize(("mode", "name", "extra"), weight_decay_cases("maximize"))
def test_l2_equals_weight_decay_when_maximizing(device, mode, name, extra):
    compare(name, {"lr": 0.01, "maximize": True, **extra}, mode, device, sign=-1.0)


@pytest.mark.parametrize(("mode", "name", "extra"), weight_decay_cases())
def test_l2_equals_weight_decay_with_a_learning_rate_for_each_group(device, mode, name, extra):
    compare(name, {"lr": 0.01, **extra}, mode, device, params=own_learning_rates)


@pytest.mark.parametrize(("mode", "name", "extra"), weight_decay_cases())
def test_l2_equals_weight_decay_with_a_tensor_as_learning_rate(device, mode, name, extra):
    compare(name, {"lr": torch.tensor(0.01), "foreach": False, **extra}, mode, device)


@pytest.mark.parametrize("foreach", [False, True])
def test_l2_equals_weight_decay_in_a_capturable_optimizer(device, foreach):
    if torch.device(device).type == "cpu":
        pytest.skip("capturable is for accelerators")
    for mode, name, extra in (case.values for case in weight_decay_cases("capturable")):
        options = {"lr": torch.tensor(0.01, device=device), "foreach": foreach, "capturable": True, **extra}
        compare(name, options, mode, device)


def test_l2_from_weight_decay_equals_it_in_double_precision(device):
    theirs, ours = network(device, torch.float64), network(device, torch.float64)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=0.03))
    penalty = L2.from_weight_decay(ours, 0.03)
    train(ours, RegularizedOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), penalty))
    assert_same(ours, theirs)


def test_l2_on_weights_only_equals_weight_decay_in_a_group_without_biases(device):
    theirs, ours = network(device), network(device)
    weights, biases = ([p for n, p in theirs.named_parameters() if n.endswith(end)] for end in ("weight", "bias"))
    groups = [{"params": weights, "weight_decay": 2 * LAM}, {"params": biases}]
    train(theirs, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    train(ours, RegularizedOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), L2(ours, LAM)))
    assert_same(ours, theirs)


def test_decoupled_l2_equals_the_decay_of_muon(device):
    muon = optimizer_class("Muon")
    theirs, ours = network(device), network(device)
    for model in (theirs, ours):
        model[0].bias.requires_grad_(False)
        model[2].bias.requires_grad_(False)
    weights = [[p for p in model.parameters() if p.requires_grad] for model in (theirs, ours)]
    train(theirs, muon(weights[0], lr=0.01, weight_decay=2 * LAM))
    train(ours, RegularizedOptimizer(muon(weights[1], lr=0.01, weight_decay=0), L2(ours, LAM), "decoupled"))
    assert_same(ours, theirs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decoupled_l2_under_sgd_is_sgdw(device, momentum):
    theirs, ours = network(device), network(device)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=momentum)
    closure = closure_on(theirs, plain)
    for _ in range(5):
        closure()
        with torch.no_grad():
            for p in theirs.parameters():
                p.mul_(1 - 0.05 * 2 * LAM)
        plain.step()
    wrapped = torch.optim.SGD(ours.parameters(), lr=0.05, momentum=momentum)
    train(ours, RegularizedOptimizer(wrapped, L2(ours, LAM, select="all"), "decoupled"))
    assert_same(ours, theirs)


def test_decoupled_l2_follows_the_learning_rate_as_adamw_does(device):
    theirs, ours = network(device), network(device)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=2 * LAM)
    wrapped = RegularizedOptimizer(
        torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0), L2(ours, LAM, select="all"), "decoupled"
    )
    for model, optimizer in ((theirs, adamw), (ours, wrapped)):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        for _ in range(4):
            train(model, optimizer, steps=1)
            scheduler.step()
    assert_same(ours, theirs)


def bare_cases():
    names = [*COUPLED, *DECOUPLED, *ELSEWHERE, *BARE]
    return [name for name in dict.fromkeys(names) if hasattr(torch.optim, name)]


def set_gradients_for(name, model, step):
    set_gradients(model, step)
    if name == "SparseAdam":
        for p in model.parameters():
            row = torch.tensor([step % len(p)], device=p.device)
            p.grad = torch.zeros_like(p).index_copy(0, row, p.grad[:1]).to_sparse(1)


def make(name, model):
    parameters = [p for p in model.parameters() if p.ndim == 2] if name == "Muon" else model.parameters()
    options = {"weight_decay": 0.0} if name in ("AdamW", "Muon") else {}
    return getattr(torch.optim, name)(parameters, lr=0.01, **options)


@pytest.mark.parametrize("mode", DIRECT)
@pytest.mark.parametrize("name", bare_cases())
def test_lambda_zero_is_bit_for_bit_the_bare_optimizer(device, name, mode):
    bare, wrapped = network(device), network(device)
    plain, inner = make(name, bare), make(name, wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not all have a metric
        ours = RegularizedOptimizer(inner, [L1(wrapped, 0.0), GroupLasso(wrapped, 0.0), L2(wrapped, 0.0)], mode)
    results = []
    for model, optimizer in ((bare, plain), (wrapped, ours)):
        closure = closure_on(model, optimizer)
        for i in range(4):
            if name == "LBFGS":
                results.append(optimizer.step(closure))
            else:
                set_gradients_for(name, model, i)
                optimizer.step()
    assert_same(wrapped, bare)
    assert results[: len(results) // 2] == results[len(results) // 2 :]
    for p, q in zip(inner.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert inner.state[p].keys() == plain.state[q].keys()


@pytest.mark.parametrize("mode", DIRECT)
@pytest.mark.parametrize("name", [name for name in bare_cases() if name not in ("LBFGS", "SparseAdam")])
def test_parameters_outside_the_penalty_are_those_of_the_bare_optimizer(device, name, mode):
    bare, wrapped = network(device), network(device)
    plain, inner = make(name, bare), make(name, wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = RegularizedOptimizer(inner, L1(wrapped, 0.1, select="0.weight"), mode)
    for model, optimizer in ((bare, plain), (wrapped, ours)):
        for i in range(4):
            set_gradients_for(name, model, i)
            optimizer.step()
    assert not torch.equal(wrapped[0].weight, bare[0].weight)
    for key in ("0.bias", "2.weight", "2.bias"):
        assert torch.equal(wrapped.get_parameter(key), bare.get_parameter(key)), key
