"""Optimizers that are not torch.optim's, and loops that are not the usual one."""

import copy
import warnings
from functools import partial

import pytest
import torch
from helpers.nets import assert_same, closure_on, data, network
from helpers.optimizers import MODES, modes
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torch_regpen import L1, L2, GroupLasso, RegularizedOptimizer

LAM = 0.05
RHO = 0.05


def penalty_on(model):
    return L1(model, LAM) + GroupLasso(model, LAM)


def other(package, name, **kw):
    """A function that makes an optimizer of another package, from the parameters of a model."""

    def make(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = pytest.importorskip(package)
            torch.manual_seed(0)
            return getattr(module, name)(model.parameters(), **{"lr": 0.01, **kw})

    return pytest.param(make, id=f"{package}.{name}")


OTHERS = [
    other("bitsandbytes.optim", "Adam"),
    other("bitsandbytes.optim", "Adam8bit", min_8bit_size=1),
    other("bitsandbytes.optim", "Lion8bit", min_8bit_size=1),
    other("bitsandbytes.optim", "SGD", momentum=0.9),
    other("schedulefree", "AdamWScheduleFree"),
    other("schedulefree", "SGDScheduleFree"),
    other("schedulefree", "RAdamScheduleFree"),
    other("pytorch_optimizer", "Lion"),
    other("pytorch_optimizer", "Lamb"),
    other("pytorch_optimizer", "Prodigy", lr=1.0),
    other("pytorch_optimizer", "SOAP", weight_decay=0.0),
    other("pytorch_optimizer", "Adan"),
    other("pytorch_optimizer", "AdEMAMix"),
    other("pytorch_optimizer", "Ranger"),
]


def train(model, optimizer, extra=lambda: 0.0, steps=5):
    getattr(optimizer, "train", lambda: None)()  # schedule-free ones have this
    closure = closure_on(model, optimizer, extra)
    for _ in range(steps):
        closure()
        optimizer.step()
    getattr(optimizer, "eval", lambda: None)()


@pytest.mark.parametrize("make", OTHERS)
def test_coupled_is_the_penalty_in_the_loss_bit_for_bit_everywhere(make):
    ours, theirs = network(), network()
    train(ours, RegularizedOptimizer(make(ours), L1(ours, LAM), "coupled"))
    bare = make(theirs)
    train(theirs, bare, L1(theirs, LAM))
    assert_same(ours, theirs)


@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_an_optimizer_whose_step_is_not_known_says_so_and_goes_by_its_lr(make, mode):
    model = network()
    optimizer = make(model)
    with pytest.warns(UserWarning, match="the prox takes its lr"):
        optimizer = RegularizedOptimizer(optimizer, L1(model, 10.0), mode)
    train(model, optimizer)
    assert (model[0].weight == 0).any() or hasattr(optimizer, "eval")  # schedule-free: what it evaluates is an average
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", OTHERS)
def test_at_lambda_zero_it_is_the_optimizer_itself(make):
    for mode in MODES:
        ours, theirs = network(), network()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = RegularizedOptimizer(make(ours), L1(ours, 0.0), mode)
        train(ours, optimizer)
        train(theirs, make(theirs))
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_schedule_free_optimizers_go_to_and_fro_through_the_wrapper(name):
    schedulefree = pytest.importorskip("schedulefree")
    model = network()
    optimizer = RegularizedOptimizer(getattr(schedulefree, name)(model.parameters(), lr=0.1), L1(model, LAM))
    train(model, optimizer)
    evaluated = copy.deepcopy(model)
    optimizer.train()
    assert not torch.equal(model[0].weight, evaluated[0].weight)
    optimizer.eval()
    assert_same(model, evaluated, 1e-6)


# Closures


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_minimises_the_loss_with_the_penalty(line_search):
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    kw = {"lr": 0.5, "max_iter": 10, "line_search_fn": line_search}
    optimizer = RegularizedOptimizer(torch.optim.LBFGS(ours.parameters(), **kw), L2(ours, LAM))
    bare = torch.optim.LBFGS(theirs.parameters(), **kw)
    for _ in range(3):
        value = optimizer.step(closure_on(ours, optimizer))
        expected = bare.step(closure_on(theirs, bare, L2(theirs, LAM)))
        torch.testing.assert_close(value, expected)
    assert_same(ours, theirs, 1e-9)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as it is usually written: the gradient of uphill, applied by a base optimizer."""

    def __init__(self, params, make_base):
        super().__init__(params, {})
        self.base = make_base(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * (RHO / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, state in self.state.items():
            p.copy_(state["old"])
        self.base.step()
        self.zero_grad()


@modes
def test_sharpness_aware_steps_take_the_wrapper_as_their_base(mode):
    """The penalty is then applied where the weights are, with the gradient of the plain loss from uphill."""
    ours, uphill = network(), network()
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    sam = SAM(ours.parameters(), lambda groups: RegularizedOptimizer(make(groups), penalty_on(ours), mode))
    by_hand = RegularizedOptimizer(make(uphill.parameters()), penalty_on(uphill), mode)
    for _ in range(4):
        closure = closure_on(ours, sam)
        closure()
        sam.first_step()
        closure()
        sam.second_step()

        closure_on(uphill, by_hand)()
        moved = copy.deepcopy(uphill)
        norm = torch.stack([p.grad.norm() for p in uphill.parameters()]).norm()
        with torch.no_grad():
            for p, q in zip(moved.parameters(), uphill.parameters(), strict=True):
                p.add_(q.grad * (RHO / norm))
        closure_on(moved, by_hand)()
        for p, q in zip(moved.parameters(), uphill.parameters(), strict=True):
            q.grad = p.grad
        by_hand.step()
    assert_same(ours, uphill)
    if mode in ("proximal", "dual"):
        assert (ours[0].weight == 0).any()


def test_sam_of_pytorch_optimizer_takes_the_wrapper_as_its_base():
    package = pytest.importorskip("pytorch_optimizer")
    model, expected = network(), network()

    def base(groups, **kw):
        return RegularizedOptimizer(torch.optim.SGD(groups, **kw), L1(model, 0.3), "proximal")

    sam = package.SAM(model.parameters(), base_optimizer=base, rho=RHO, lr=0.1)
    plain = package.SAM(expected.parameters(), base_optimizer=torch.optim.SGD, rho=RHO, lr=0.1)
    penalty = L1(expected, 0.3)
    for _ in range(4):
        for m, optimizer in ((model, sam), (expected, plain)):
            closure = closure_on(m, optimizer)
            closure()
            optimizer.step(closure)
        penalty.prox_(0.1)
    assert_same(model, expected)
    assert (model[0].weight == 0).any()


# Averages, and optimizers that step in the backward


def test_an_averaged_model_has_a_penalty_on_the_average():
    model = nn.ModuleDict({"net": network()})
    model["penalty"] = L1(model["net"], LAM)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model["penalty"], "proximal")
    for _ in range(3):
        closure_on(model["net"], optimizer)()
        optimizer.step()
        average.update_parameters(model)
    expected = sum(LAM * p.abs().sum() for p in average.module["net"].parameters() if p.ndim > 1)
    torch.testing.assert_close(average.module["penalty"](), expected)
    assert not torch.equal(average.module["penalty"](), model["penalty"]())


@modes
def test_an_average_that_is_swapped_in_for_an_evaluation_leaves_no_trace(mode):
    straight, swapped = network(), network()
    for model in (straight, swapped):
        optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, LAM), mode)
        for _ in range(3):
            closure_on(model, optimizer)()
            optimizer.step()
            if model is swapped:
                kept = copy.deepcopy(model.state_dict())
                model.load_state_dict({name: torch.zeros_like(p) for name, p in kept.items()})
                model(data(model[0].weight)[0])
                model.load_state_dict(kept)
    assert_same(swapped, straight)


@modes
def test_optimizers_that_step_in_the_backward_and_free_the_gradient(mode):
    ours, theirs = network(), network()
    penalty = penalty_on(ours)
    penalized = {id(p) for _, p in penalty.named_parameters_penalized()}
    optimizers = {}
    for p in ours.parameters():
        optimizer = torch.optim.Adam([p], lr=0.01)
        if id(p) in penalized:
            optimizer = RegularizedOptimizer(optimizer, penalty.restricted_to(optimizer), mode)
        optimizers[p] = optimizer

    def step_now(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in ours.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    usual = RegularizedOptimizer(torch.optim.Adam(theirs.parameters(), lr=0.01), penalty_on(theirs), mode)
    x, y = data(ours[0].weight)
    for step in range(4):
        penalty.penalties[0].lam = usual.penalty.penalties[0].lam = LAM * (step + 1)
        (ours(x) - y).square().mean().backward()
        assert all(p.grad is None for p in ours.parameters())
        closure_on(theirs, usual)()
        usual.step()
    assert_same(ours, theirs)
