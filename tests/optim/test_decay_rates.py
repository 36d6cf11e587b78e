"""`rate` of the decoupled mode: what multiplies lambda."""

import copy
import math
import warnings

import pytest
import torch
from helpers.nets import assert_same, network, set_gradients, train
from helpers.operations import Reads
from helpers.optimizers import Homemade, adamw, sgd, through_a_file, through_pickle
from torch import nn
from torch.optim import lr_scheduler as schedulers

from torch_regpen import L1, L2, GroupLasso, RegularizedOptimizer
from torch_regpen.groups import Coupled

LAM = 0.01


def steps(model, optimizer, scheduler=None, count=6, start=0):
    for i in range(start, start + count):
        set_gradients(model, i)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def decayed(model, make=sgd, rate="schedule", penalty=L2, lam=LAM, **options):
    return RegularizedOptimizer(make(model, **options), penalty(model, lam, select="all"), "decoupled", rate=rate)


def shrinking(w, optimizer, count=1):
    """The factors by which the weights shrink, in steps without a gradient."""
    factors = []
    for _ in range(count):
        before = w.detach().clone()
        w.grad = torch.zeros_like(w)
        optimizer.step()
        factors.append((w.detach() / before).mean().item())
    return factors


def one_weight(lr=0.1, **options):
    w = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
    optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=lr), L2([w], LAM), "decoupled", **options)
    return w, optimizer


# Optimizers that others wrote


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"lr": torch.tensor(0.01)}])
def test_rate_lr_is_the_decay_of_adamw_bit_for_bit(options):
    theirs, ours = network(), network()
    plain = torch.optim.AdamW(theirs.parameters(), **{"lr": 0.01, **copy.deepcopy(options)}, weight_decay=2 * LAM)
    optimizer = decayed(ours, adamw, "lr", **options)
    steps(theirs, plain, schedulers.CosineAnnealingLR(plain, 6))
    steps(ours, optimizer, schedulers.CosineAnnealingLR(optimizer, 6))
    assert_same(ours, theirs)


@pytest.mark.parametrize("lr", [0.01, 0.3])
def test_rate_schedule_at_a_constant_lr_is_the_fixed_decay_of_pytorch_optimizer(lr):
    peer = pytest.importorskip("pytorch_optimizer")
    theirs, ours = network(dtype=torch.float64), network(dtype=torch.float64)
    options = {"lr": lr, "eps": 1e-300}  # theirs is added elsewhere
    steps(theirs, peer.AdamC(theirs.parameters(), **options, weight_decay=2 * LAM, fixed_decay=True))
    steps(ours, decayed(ours, lambda model: torch.optim.Adam(model.parameters(), **options)))
    assert_same(ours, theirs, 1e-6)


@pytest.mark.parametrize("name", ["AdamWLegacy", "SGDW"])
def test_rate_corrected_is_the_corrected_decay_of_timm(name):
    timm = pytest.importorskip("timm.optim")
    theirs, ours = network(), network()
    make, options = {"AdamWLegacy": (adamw, {}), "SGDW": (sgd, {"momentum": 0.9, "nesterov": True})}[name]
    decay = {"weight_decay": 2 * LAM, "corrected_weight_decay": True}
    plain = getattr(timm, name)(theirs.parameters(), lr=0.05, **options, **decay)
    optimizer = decayed(ours, make, "corrected", lr=0.05, **options)
    steps(theirs, plain, schedulers.LambdaLR(plain, lambda step: 1 / (1 + step)))
    steps(ours, optimizer, schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    assert_same(ours, theirs, 1e-6)


# The definitions

RATES = {
    "lr": lambda lr, initial: lr,
    "schedule": lambda lr, initial: lr / initial,
    "corrected": lambda lr, initial: lr**2 / initial,
    "callable": lambda lr, initial: lr**0.5,
}
SCHEDULES = {
    "warmup from 0": lambda o: schedulers.LambdaLR(o, lambda step: min(step / 3, 1.0)),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "in sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.2, total_iters=2), schedulers.ExponentialLR(o, 0.7)], milestones=[3]
    ),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor lr"])
@pytest.mark.parametrize("before", [False, True], ids=["scheduler after", "scheduler before"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rate", RATES)
def test_each_rate_follows_its_formula_under_a_scheduler(rate, schedule, before, tensor):
    w = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
    inner = torch.optim.SGD([w], lr=torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1)
    scheduler = SCHEDULES[schedule](inner) if before else None
    given = (lambda optimizer, group: group["lr"] ** 0.5) if rate == "callable" else rate
    optimizer = RegularizedOptimizer(inner, L2([w], LAM), "decoupled", rate=given)
    scheduler = scheduler or SCHEDULES[schedule](optimizer)
    initial = float(inner.param_groups[0]["initial_lr"])
    rates = set()
    for _ in range(6):
        lr = float(inner.param_groups[0]["lr"])
        (factor,) = shrinking(w, optimizer)
        rates.add(expected := RATES[rate](lr, initial))
        assert factor == pytest.approx(1 - 2 * LAM * expected, rel=1e-12)
        scheduler.step()
    assert len(rates) > 2


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor lr"])
def test_without_a_scheduler_the_initial_lr_is_the_one_at_construction(tensor):
    w, optimizer = one_weight(torch.tensor(0.1) if tensor else 0.1, rate="schedule")
    if tensor:
        optimizer.param_groups[0]["lr"].fill_(0.05)  # as schedulers do
    else:
        optimizer.param_groups[0]["lr"] = 0.05
    assert shrinking(w, optimizer) == pytest.approx([1 - 2 * LAM * 0.5])


def test_a_param_group_that_is_added_later_starts_at_its_own_lr():
    w, optimizer = one_weight(rate="schedule")
    v = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer.add_param_group({"params": [v], "lr": 0.02})
    penalty = L2([w, v], LAM)
    optimizer = RegularizedOptimizer(optimizer.optimizer, penalty, "decoupled", rate="schedule")
    optimizer.param_groups[0]["lr"] = 0.05
    w.grad = torch.zeros_like(w)
    assert shrinking(v, optimizer, 2) == pytest.approx([1 - 2 * LAM] * 2)
    optimizer.param_groups[1]["lr"] = 0.01
    assert shrinking(v, optimizer) == pytest.approx([1 - 2 * LAM * 0.5])


def test_layers_that_come_later_count_from_the_lr_that_they_come_with():
    model = nn.Sequential(nn.Linear(4, 4, bias=False).double())
    optimizer = decayed(model)
    model.append(nn.Linear(4, 4, bias=False).double())
    optimizer.add_param_group({"params": [model[1].weight], "lr": 0.5})
    fresh = RegularizedOptimizer(optimizer.optimizer, L2(model, LAM), "decoupled", rate="schedule")
    assert shrinking(model[1].weight, fresh) == pytest.approx([1 - 2 * LAM])


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_keep_the_initial_lr(copied):
    model = nn.Linear(4, 4, bias=False)
    optimizer = decayed(model)
    optimizer.param_groups[0]["lr"] = 0.05
    model, optimizer = copied((model, optimizer))
    assert shrinking(model.weight, optimizer) == pytest.approx([1 - 2 * LAM * 0.5])


@pytest.mark.parametrize("with_scheduler", [False, True])
@pytest.mark.parametrize("order", ["wrapped, then loaded", "loaded, then wrapped"])
@pytest.mark.parametrize("rate", ["schedule", "corrected"])
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(rate, order, with_scheduler):
    def schedule(optimizer):
        return schedulers.ExponentialLR(optimizer, 0.5) if with_scheduler else None

    def by_hand(optimizer):
        if not with_scheduler:
            optimizer.param_groups[0]["lr"] = 0.03

    expected = network()
    optimizer = decayed(expected, rate=rate)
    scheduler = schedule(optimizer)
    steps(expected, optimizer, scheduler, 3)
    by_hand(optimizer)
    saved = through_a_file((expected.state_dict(), optimizer.state_dict(), scheduler and scheduler.state_dict()))
    steps(expected, optimizer, scheduler, 3, start=3)

    model = network()
    model.load_state_dict(saved[0])
    if order == "wrapped, then loaded":
        resumed = decayed(model, rate=rate)
        resumed.load_state_dict(saved[1])
    else:
        inner = sgd(model)
        inner.load_state_dict(saved[1])
        resumed = RegularizedOptimizer(inner, L2(model, LAM, select="all"), "decoupled", rate=rate)
    scheduler = schedule(resumed)
    if scheduler is not None:
        scheduler.load_state_dict(saved[2])
    resumed.param_groups[0]["lr"] = saved[1]["param_groups"][0]["lr"]  # a new scheduler has set it
    steps(model, resumed, scheduler, 3, start=3)
    assert_same(model, expected)


def test_a_checkpoint_of_the_bare_optimizer_leaves_the_initial_lr_at_construction():
    w, optimizer = one_weight(rate="schedule")
    bare = torch.optim.SGD([torch.ones(4, 4, requires_grad=True)], lr=0.05)
    optimizer.load_state_dict(bare.state_dict())
    assert shrinking(w, optimizer) == pytest.approx([1 - 2 * LAM * 0.5])


def test_the_bare_optimizer_loads_the_state(device):
    model = network(device)
    optimizer = decayed(model)
    steps(model, optimizer, count=2)
    sgd(network(device)).load_state_dict(through_a_file(optimizer.state_dict()))


def test_rate_lr_adds_nothing_to_the_param_groups():
    model = network()
    before = {*sgd(model).param_groups[0]}
    optimizer = decayed(model, rate="lr")
    steps(model, optimizer, count=1)
    assert {*optimizer.param_groups[0]} == before


def test_schedulers_do_not_take_the_recorded_lr_for_their_own():
    _, optimizer = one_weight(rate="schedule")
    optimizer.param_groups[0]["lr"] = 0.4
    assert schedulers.ExponentialLR(optimizer, 0.5).base_lrs == [0.4]


# Other penalties, and what else a step may be


@pytest.mark.parametrize("penalty", [L1, L2, GroupLasso])
@pytest.mark.parametrize("rate", ["schedule", "corrected"])
def test_a_rate_is_the_same_as_a_scaled_lambda(penalty, rate):
    theirs, ours = network(), network()
    factor = {"schedule": 1 / 0.05, "corrected": 0.25 / 0.5}[rate]
    for model, options, lam in ((theirs, {}, LAM * factor), (ours, {"rate": rate}, LAM)):
        inner = adamw(model, lr=0.05 if rate == "schedule" else 0.5)
        optimizer = RegularizedOptimizer(inner, penalty(model, lam), "decoupled", **options)
        if rate == "corrected":
            optimizer.param_groups[0]["lr"] = 0.25
        train(model, optimizer)
    assert_same(ours, theirs, 1e-5)


def test_l1_stops_at_zero_at_every_rate():
    for rate in ("schedule", lambda *_: 1e3):
        model = network()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = decayed(model, rate=rate, penalty=L1, lam=0.2)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert all((p * q >= 0).all() for p, q in zip(model.parameters(), before, strict=True))
        assert any((p == 0).any() for p in model.parameters())


def test_lambda_0_is_the_bare_optimizer_bit_for_bit_at_every_rate():
    for rate in ("schedule", "corrected", lambda *_: 1.0):
        theirs, ours = network(), network()
        steps(theirs, adamw(theirs))
        steps(ours, decayed(ours, adamw, rate, lam=0.0))
        assert_same(ours, theirs)


@pytest.mark.parametrize("rate", ["schedule", "corrected", lambda optimizer, group: group["lr"] * 2])
def test_no_rate_reads_a_tensor_lr(rate):
    model = network()
    optimizer = decayed(model, lambda m: adamw(m, lr=torch.tensor(0.01), foreach=False), rate)
    bare = adamw(network(), lr=torch.tensor(0.01), foreach=False)
    set_gradients(model, 0)
    with Reads() as reads:
        optimizer.step()
    for p in bare.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    with Reads() as expected:
        bare.step()
    assert reads.found == expected.found


# Units over several tensors, which may be in param_groups of their own


def in_two_groups(lrs, penalty, cautious=False, **options):
    """A layer whose weight and bias are the units, in two param_groups."""
    model = network(sizes=(5, 6, 3), dtype=torch.float64)
    coupled = penalty(model, 0.1, groups=Coupled(model, torch.zeros(1, 5).double()))
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model[0].parameters(), lrs, strict=True)]
    inner = torch.optim.SGD(groups, lr=0.1, foreach=False)
    return model, RegularizedOptimizer(inner, coupled, "decoupled", cautious=cautious, **options)


@pytest.mark.parametrize("tensor", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("penalty", [L2, GroupLasso])
def test_each_tensor_of_a_unit_decays_at_its_own_rate(penalty, cautious, tensor):
    rates = (0.5, 4.0)
    lrs = [torch.tensor(lr, dtype=torch.float64) for lr in rates] if tensor else rates
    model, optimizer = in_two_groups(lrs, penalty, cautious)
    w = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach()
    set_gradients(model, 0)
    g = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], dim=1)
    optimizer.step()
    rate = torch.tensor([rates[0]] * 5 + [rates[1]]).double()
    slope = {L2: 2 * w, GroupLasso: 6**0.5 * w / w.norm(dim=1, keepdim=True)}[penalty]
    decayed = w - rate * 0.1 * slope * ((g * w >= 0) if cautious else 1)
    decayed[decayed * w < 0] = 0
    assert (decayed == 0).any() == (penalty is not L2)
    found = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1)
    torch.testing.assert_close(found.detach(), decayed - rate * g, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rate", ["lr", "schedule", lambda optimizer, group: group["lr"] * 2])
@pytest.mark.parametrize("penalty", [L2, GroupLasso])
def test_equal_learning_rates_of_a_unit_may_be_tensors(penalty, rate):
    found = []
    for lrs in ((0.5, 0.5), (torch.tensor(0.5).double(), torch.tensor(0.5).double())):
        model, optimizer = in_two_groups(lrs, penalty, rate=rate)
        steps(model, optimizer)
        found.append(model)
    assert_same(*found, 1e-12)


@pytest.mark.parametrize("rate", ["lr", "schedule", lambda optimizer, group: group["lr"] * 2])
def test_no_rate_compares_learning_rates_that_are_tensors(rate):
    """A comparison would wait for the device."""
    model, optimizer = in_two_groups([torch.tensor(0.5), torch.tensor(0.5)], GroupLasso, rate=rate)
    set_gradients(model, 0)
    found = []
    for step in (optimizer.optimizer.step, optimizer.step):
        with Reads() as reads:
            step()
        found.append(reads.found)
    assert found[0] == found[1]


def test_a_callable_rate_gets_the_wrapped_optimizer_and_each_group_once():
    model, calls = network(), []
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[2].weight], "lr": 0.2}]
    inner = torch.optim.SGD(groups)

    def rate(optimizer, group):
        calls.append((optimizer, group["lr"]))
        return torch.tensor(0.5)

    optimizer = RegularizedOptimizer(inner, L1(model, LAM) + GroupLasso(model, LAM), "decoupled", rate=rate)
    steps(model, optimizer, count=1)
    assert calls == [(inner, 0.1), (inner, 0.2)]


def test_a_callable_rate_needs_no_lr():
    class WithoutLr(Homemade):
        def __init__(self, params):
            super().__init__(params)
            del self.param_groups[0]["lr"]

        def step(self, closure=None):
            return None

    w = torch.ones(2, 2, requires_grad=True)
    optimizer = RegularizedOptimizer(WithoutLr([w]), L2([w], LAM), "decoupled", rate=lambda *_: 0.5)
    assert shrinking(w, optimizer) == pytest.approx([1 - LAM])


# Refusals


@pytest.mark.parametrize("mode", ["coupled", "proximal", "dual"])
@pytest.mark.parametrize("options", [{"rate": "schedule"}, {"rate": lambda *_: 1.0}, {"cautious": True}])
def test_the_options_of_decoupled_are_refused_where_no_penalty_is_decoupled(mode, options):
    model = network()
    with pytest.raises(ValueError, match=r"(rate=|cautious=).*mode='decoupled' or a pair"):
        RegularizedOptimizer(sgd(model), L1(model, LAM), mode, **options)


def test_one_decoupled_penalty_among_others_is_enough():
    model = network()
    pairs = [(L2(model, LAM), "decoupled"), (L1(model, LAM), "proximal")]
    steps(model, RegularizedOptimizer(adamw(model), pairs, rate="schedule", cautious=True), count=2)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rate": "fixed"}, ValueError, "rate must be 'lr', 'schedule', 'corrected' or a callable, not 'fixed'"),
        ({"rate": 0.5}, ValueError, "rate must be"),
        ({"rate": None}, ValueError, "rate must be"),
        ({"cautious": 1}, TypeError, "cautious must be True or False, not 1"),
        ({"compile": "default"}, TypeError, "compile must be True or False, not 'default'"),
    ],
)
def test_other_values_are_refused_at_construction(options, error, text):
    model = network()
    with pytest.raises(error, match=text):
        RegularizedOptimizer(sgd(model), L1(model, LAM), "decoupled", **options)


@pytest.mark.parametrize(
    ("rate", "error"),
    [(None, TypeError), ("lr", TypeError), (-1.0, ValueError), (math.inf, ValueError), (torch.ones(1), ValueError)],
)
def test_what_a_callable_must_not_return_is_named(rate, error):
    w, optimizer = one_weight(rate=lambda *_: rate)
    w.grad = torch.zeros_like(w)
    with pytest.raises(error, match=r"rate must return a (finite )?number"):
        optimizer.step()


def test_an_initial_lr_of_0_decays_nothing_at_lr_0_and_is_refused_above():
    w, optimizer = one_weight(0.0, rate="schedule")
    assert shrinking(w, optimizer) == [1.0]
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match="initial lr of the param_group, which is 0"):
        optimizer.step()


def test_optimizers_that_set_their_own_step_are_warned_of_where_lr_counts():
    class OwnStep(Homemade):
        def __init__(self, params):
            super().__init__(params, lr=1.0)
            self.param_groups[0]["d"] = 1e-6

    model = network()
    with pytest.warns(UserWarning, match="rate='schedule'"):
        RegularizedOptimizer(OwnStep(model.parameters()), L2(model, LAM), "decoupled", rate="corrected")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RegularizedOptimizer(OwnStep(model.parameters()), L2(model, LAM), "decoupled", rate="schedule")
