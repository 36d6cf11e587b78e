"""Groups that span tensors: values, steps and zeros are those of the concatenated tensors of each unit."""

import copy
import io
import math
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn

from torch_regpen import L0, L1, MCP, ElasticNet, GroupLasso, LogSum, RegularizedOptimizer, SparseGroupLasso
from torch_regpen.groups import Coupled
from torch_regpen.schedules import TargetSparsity

pytest.importorskip("torch_pruning")


class Block(nn.Module):
    """A residual stream of 6 channels, written by two layers, and a hidden layer of 5."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.Conv2d(6, 5, 1)
        self.down = nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = self.norm(self.stem(x)).relu()
        h = h + self.down(self.up(h).relu())
        return self.head(h.mean((2, 3)))


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    model = Block().to(dtype)
    with torch.no_grad():
        for w in model.norm.parameters():
            w.normal_()
    return model, torch.randn(24, 3, 5, 5, dtype=dtype), torch.randint(4, (24,))


def units(model):
    """Each unit as a list of slices of parameters, read off the forward above."""
    stream = [
        [model.stem.weight[i], model.norm.weight[i], model.norm.bias[i], model.down.weight[i], model.down.bias[i]]
        for i in range(6)
    ]
    hidden = [[model.up.weight[i], model.up.bias[i]] for i in range(5)]
    return stream + hidden


def joined(unit):
    return torch.cat([part.reshape(-1) for part in unit])


def coupled(kind, model, x, lam=0.3, **kw):
    return kind(model, lam, groups=Coupled(model, x[:1]), **kw)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def test_the_members_are_all_that_writes_a_unit():
    model, x, _ = problem()
    names = {name for name, _ in coupled(GroupLasso, model, x).named_parameters_penalized()}
    assert names == {"stem.weight", "norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"}


def test_layers_whose_units_cannot_leave_are_named():
    model, x, _ = problem()
    penalty = coupled(GroupLasso, model, x)
    assert list(penalty.groups.left) == ["head"]


def test_the_value_and_its_gradient_are_those_of_the_concatenated_units():
    model, x, _ = problem()
    penalty = coupled(GroupLasso, model, x)
    expected = sum(0.3 * math.sqrt(len(joined(u))) * joined(u).norm() for u in units(model))
    torch.testing.assert_close(penalty(), expected)
    ws = [w for w in model.parameters() if w.ndim != 2 and w is not model.head.bias]
    gradient = torch.autograd.grad(expected, ws)
    torch.testing.assert_close(torch.autograd.grad(penalty(), ws), gradient)
    for w in ws:
        w.grad = torch.zeros_like(w)
    penalty.add_grad_()
    torch.testing.assert_close([w.grad for w in ws], list(gradient))


@pytest.mark.parametrize(
    ("kind", "rho"),
    [
        (lambda *a, **k: LogSum(*a, eps=0.1, **k), lambda u: 0.1 * math.log(1 + u / 0.1)),
        (lambda *a, **k: MCP(*a, knee=0.5, **k), lambda u: u - u * u if u < 0.5 else 0.25),
        (L0, lambda u: float(u > 0)),
        (ElasticNet, lambda u: 0.5 * u + 0.5 * u * u),
    ],
)
def test_every_kind_takes_the_root_mean_square_of_a_unit(kind, rho):
    model, x, _ = problem()
    sizes = [(len(joined(u)), joined(u).norm().item()) for u in units(model)]
    expected = sum(0.3 * n * rho(norm / math.sqrt(n)) for n, norm in sizes)
    assert coupled(kind, model, x)().item() == pytest.approx(expected, rel=1e-9)


def test_without_scale_a_unit_counts_once():
    model, x, _ = problem()
    expected = sum(0.3 * joined(u).norm() for u in units(model))
    torch.testing.assert_close(coupled(L1, model, x, scale=False)(), expected)


@pytest.mark.parametrize("kind", [GroupLasso, L0, SparseGroupLasso])
def test_the_prox_is_that_of_the_concatenated_units(kind):
    model, x, _ = problem()
    penalty, before = coupled(kind, model, x), [joined(u).detach().clone() for u in units(model)]
    penalty.prox_(0.8)
    for w, v in zip(before, map(joined, units(model)), strict=True):
        cost = partial(objective, kind, w.numpy())
        starts = [w.numpy(), 0.5 * w.numpy(), np.zeros(len(w))]
        searched = [minimize(cost, start, method="Powell", options={"maxiter": 20}).fun for start in starts[:2]]
        assert cost(v.detach().numpy()) <= min(searched + [cost(start) for start in starts]) + 1e-6


def objective(kind, w, v):
    """What the prox of 0.8 times a penalty at lambda 0.3 minimises, by its definition."""
    omega = {
        GroupLasso: math.sqrt(len(w)) * np.linalg.norm(v),
        L0: len(w) * float(np.any(v != 0)),
        SparseGroupLasso: 0.5 * np.abs(v).sum() + 0.5 * math.sqrt(len(w)) * np.linalg.norm(v),
    }[kind]
    return 0.5 * np.sum((v - w) ** 2) + 0.8 * 0.3 * omega


def test_the_prox_in_adams_metric_minimises_its_definition():
    model, x, y = problem()
    penalty = coupled(GroupLasso, model, x, lam=0.002)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer, twin = RegularizedOptimizer(adam, penalty, "proximal"), copy.deepcopy(model)
    bare = torch.optim.Adam(twin.parameters(), lr=0.01)
    for net, opt in ((model, optimizer), (twin, bare)):
        F.cross_entropy(net(x), y).backward()
        opt.step()
    minima = 0
    for ours, theirs, state in zip(units(model), units(twin), unit_steps(twin, bare), strict=True):
        v, w, s = joined(ours).detach(), joined(theirs).detach(), joined(state)
        radius = 0.002 * math.sqrt(len(w))
        if (v - w).norm() > 0.999 * 10 * 0.01 * math.sqrt(len(w)):  # the most that one step may change a group
            continue
        minima += 1
        # The gradient of 1/2 sum (v - w)^2 / s + radius * ||v|| is zero at its minimum.
        torch.testing.assert_close((v - w) / s + radius * v / v.norm(), torch.zeros_like(v), atol=1e-8, rtol=0)
    assert minima >= 6


def unit_steps(model, adam):
    """Adam's step for a unit gradient, by torch's own formula, for each unit."""
    steps = copy.deepcopy(model)
    with torch.no_grad():
        for w, into in zip(model.parameters(), steps.parameters(), strict=True):
            into.copy_(0.01 / ((adam.state[w]["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8))
    return [[part.detach() for part in unit] for unit in units(steps)]


def test_dual_averaging_is_the_textbook_loop_over_concatenated_units():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    penalty = coupled(GroupLasso, model, x, lam=0.02)
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), penalty, "dual")
    bare = torch.optim.SGD(twin.parameters(), lr=0.05)
    latent = [joined(u).detach().clone() for u in units(twin)]
    for step in range(1, 21):
        for net, opt in ((model, optimizer), (twin, bare)):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        visible = [joined(u).detach().clone() for u in units(twin)]
        bare.step()
        with torch.no_grad():
            for i, unit in enumerate(units(twin)):
                latent[i] += joined(unit) - visible[i]
                t = 0.02 * math.sqrt(len(latent[i])) * 0.05 * step
                new = latent[i] * max(1 - t / latent[i].norm().item(), 0.0)
                for part, value in zip(unit, new.split([p.numel() for p in unit]), strict=True):
                    part.copy_(value.view_as(part))
    torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()), rtol=1e-9, atol=1e-11)


def test_dual_averaging_goes_on_where_learning_rates_differ_for_a_while():
    """Each unit minimises `sum (v - latent)^2 / (2 S) + lam * sqrt(n) * ||v||` with S, the sum of the rates."""
    model, x, y = problem()
    biases = {id(w) for w in model.parameters() if w.ndim == 1}
    rest = [w for w in model.parameters() if id(w) not in biases]
    both = [{"params": rest}, {"params": [w for w in model.parameters() if id(w) in biases]}]
    sgd = torch.optim.SGD(both, lr=0.05)
    optimizer = RegularizedOptimizer(sgd, coupled(GroupLasso, model, x, lam=0.02), "dual")
    latent = [joined(u).detach().clone() for u in units(model)]
    sums = [torch.zeros_like(v) for v in latent]
    for rates in ((0.05, 0.05), (0.05, 0.02), (0.05, 0.05), (0.03, 0.03)):
        for group, rate in zip(sgd.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradients = copy.deepcopy(model)
        for w, g in zip(gradients.parameters(), model.parameters(), strict=True):
            w.data = g.grad.clone()
        for v, s, unit, of_unit in zip(latent, sums, units(model), units(gradients), strict=True):
            lrs = torch.cat([torch.full((part.numel(),), rates[part.ndim == 0]).double() for part in unit])
            v -= lrs * joined(of_unit).detach()
            s += lrs
        optimizer.step()
        for z, s, unit in zip(latent, sums, units(model), strict=True):
            v = joined(unit).detach()
            residual = (v - z) / s + 0.02 * math.sqrt(len(v)) * v / v.norm()
            torch.testing.assert_close(residual, torch.zeros_like(v), atol=1e-7, rtol=0)


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal", "dual"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_at_lambda_0_it_is_the_bare_optimizer(mode, optimizer):
    model, x, y = problem()
    twin = copy.deepcopy(model)
    make = {"sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), "adam": lambda ps: torch.optim.Adam(ps, 0.01)}
    pairs = [(twin, make[optimizer](twin.parameters()))]
    pairs.append((model, RegularizedOptimizer(make[optimizer](model.parameters()), coupled(L1, model, x, 0.0), mode)))
    for net, opt in pairs:
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_param_groups_of_biases_and_weights_may_have_options_of_their_own():
    model, x, y = problem()
    decayed = [w for w in model.parameters() if w.ndim > 1]
    others = [w for w in model.parameters() if w.ndim == 1]
    adamw = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.02)
    penalty = coupled(GroupLasso, model, x, lam=0.1)
    optimizer = RegularizedOptimizer(adamw, penalty, "proximal")
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert sum(map(len, penalty.zero_groups().values()))


@pytest.mark.parametrize(("kind", "mode"), [(GroupLasso, "proximal"), (L0, "dual")])
def test_a_target_is_a_fraction_of_units_which_stay_zero_when_frozen(kind, mode):
    model, x, y = problem(torch.float32)
    penalty = coupled(kind, model, x, lam=1e-3)
    optimizer = RegularizedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), penalty, mode, metric="euclidean")
    schedule = TargetSparsity(optimizer, 4 / 11, steps=120, freeze=True)
    for _ in range(140):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    zero = penalty.zero_groups()
    assert sum(map(len, zero.values())) == 4
    assert optimizer.zeros_are_frozen
    before = flat(model.parameters()).detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert penalty.zero_groups() == zero
    after = flat(model.parameters()).detach()
    assert ((before != after) | (before == 0)).float().mean() > 0.95
    assert penalty.sparsity().item() == pytest.approx((penalty_zeros(model)), abs=1e-6)


def penalty_zeros(model):
    members = [joined(u) for u in units(model)]
    return (torch.cat(members) == 0).float().mean().item()


def test_a_unit_that_is_zero_emits_zero():
    model, x, _ = problem()
    penalty = coupled(L0, model, x)
    with torch.no_grad():
        for part in units(model)[2] + units(model)[8]:
            part.zero_()
    assert penalty.zero_groups() == {"stem": [2], "up": [2]}
    seen = {}
    model.up.register_forward_hook(lambda m, args, out: seen.update(stream=args[0], hidden=out))
    model.eval()(x)
    assert (seen["stream"][:, 2] == 0).all()
    assert (seen["hidden"][:, 2] == 0).all()


def test_stationarity_is_the_distance_over_concatenated_units():
    model, x, y = problem()
    penalty = coupled(GroupLasso, model, x, lam=0.05)
    with torch.no_grad():
        for part in units(model)[0]:
            part.zero_()
    F.cross_entropy(model(x), y).backward()
    distances = []
    grads = copy.deepcopy(model)
    with torch.no_grad():
        for w, into in zip(model.parameters(), grads.parameters(), strict=True):
            into.copy_(w.grad)
    for w, g in zip(map(joined, units(model)), map(joined, units(grads)), strict=True):
        radius = 0.05 * math.sqrt(len(w))
        zero = w.norm() == 0
        distances.append((g.norm() - radius).clamp_min(0) if zero else (g + radius * w / w.norm()).norm())
    torch.testing.assert_close(penalty.stationarity(), torch.stack(distances).max())


def test_copies_and_pickles_stay_tied_to_their_model():
    model, x, _ = problem()
    penalty = coupled(GroupLasso, model, x)
    buffer = io.BytesIO()
    torch.save((model, penalty), buffer)
    buffer.seek(0)
    for twin, copied in (copy.deepcopy((model, penalty)), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            for w in twin.parameters():
                w.mul_(2)
        torch.testing.assert_close(copied(), 2 * penalty())


def test_a_layer_of_another_size_is_read_anew():
    model, x, _ = problem()
    penalty = coupled(GroupLasso, model, x)
    model.up, model.down = nn.Conv2d(6, 3, 1).double(), nn.Conv2d(3, 6, 1).double()
    stream = [[model.stem.weight[i], model.norm.weight[i], model.norm.bias[i]] for i in range(6)]
    stream = [[*u, model.down.weight[i], model.down.bias[i]] for i, u in enumerate(stream)]
    now = stream + [[model.up.weight[i], model.up.bias[i]] for i in range(3)]
    expected = sum(0.3 * math.sqrt(len(joined(u))) * joined(u).norm() for u in now)
    torch.testing.assert_close(penalty(), expected)


def test_units_of_which_a_part_is_selected_are_named():
    model, x, _ = problem()
    with pytest.warns(UserWarning, match="down"):
        penalty = coupled(GroupLasso, model, x, exclude="down.*")
    assert {name for name, _ in penalty.named_parameters_penalized()} == {"up.weight", "up.bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coupled(GroupLasso, model, x, select="up.*")


def test_frozen_layers_leave_their_units_out():
    model, x, _ = problem()
    penalty = coupled(GroupLasso, model, x)
    model.norm.requires_grad_(False)
    assert {name for name, _ in penalty.named_parameters_penalized()} == {"up.weight", "up.bias"}


@pytest.mark.parametrize("option", [{"center": "initial"}, {"weights": {"up.weight": torch.ones(5)}}])
def test_options_of_single_tensors_are_refused(option):
    model, x, _ = problem()
    with pytest.raises(ValueError, match="does not support center or weights"):
        coupled(GroupLasso, model, x, **option)


def test_it_takes_the_model_that_the_penalty_is_on():
    model, x, _ = problem()
    other, *_ = problem()
    with pytest.raises(ValueError, match="Coupled the model"):
        GroupLasso(other, 0.1, groups=Coupled(model, x[:1]))
    with pytest.raises(TypeError, match="Coupled takes the model"):
        Coupled(list(model.parameters()), x[:1])


def test_elements_and_units_in_two_proximal_maps_are_refused():
    model, x, _ = problem()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="two proximal maps"):
        RegularizedOptimizer(sgd, coupled(GroupLasso, model, x) + L1(model, 0.1), "proximal")


def test_a_missing_torch_pruning_is_named(monkeypatch):
    model, x, _ = problem()
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_pruning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"torch_regpen\[pruning\]"):
        coupled(GroupLasso, model, x)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop])
def test_the_step_of_each_tensor_of_a_unit_is_that_of_its_own_group(make):
    model, x, y = problem()
    rates = {w: 0.01 if w.ndim > 1 else 0.001 for w in model.parameters()}
    penalty = coupled(GroupLasso, model, x, lam=0.002)
    twin = copy.deepcopy(model)

    def optimizer_of(net):
        ps = list(net.parameters())
        lrs = list(rates.values())
        return make([{"params": [p], "lr": lr} for p, lr in zip(ps, lrs, strict=True)])

    optimizer, bare = RegularizedOptimizer(optimizer_of(model), penalty, "proximal"), optimizer_of(twin)
    for net, opt in ((model, optimizer), (twin, bare)):
        F.cross_entropy(net(x), y).backward()
        opt.step()
    steps = copy.deepcopy(twin)
    with torch.no_grad():
        for w, into, lr in zip(twin.parameters(), steps.parameters(), rates.values(), strict=True):
            moment = (
                bare.state[w]["exp_avg_sq"] / (1 - 0.999) if make is torch.optim.Adam else bare.state[w]["square_avg"]
            )
            into.copy_(lr / (moment.sqrt() + 1e-8))
    minima = 0
    for ours, theirs, sizes in zip(units(model), units(twin), units(steps), strict=True):
        v, w, s = joined(ours).detach(), joined(theirs).detach(), joined(sizes).detach()
        if (v - w).norm() > 0.999 * 10 * 0.01 * math.sqrt(len(w)):
            continue
        minima += 1
        residual = (v - w) / s + 0.002 * math.sqrt(len(w)) * v / v.norm()
        torch.testing.assert_close(residual, torch.zeros_like(v), atol=1e-8, rtol=0)
    assert minima >= 3
