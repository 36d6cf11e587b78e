"""What RegularizedOptimizer does to the weights in each mode, and what it refuses."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import assert_same, closure_on, network, set_gradients, train

from torch_regpen import L1, L2, ElasticNet, GroupLasso, Penalty, RegularizedOptimizer
from torch_regpen.groups import NormGrouping

MODES = ("coupled", "decoupled", "proximal")


def l1(w):
    return w.abs().sum()


def l2(w):
    return w.square().sum()


def rows(w):
    return w.shape[1] ** 0.5 * w.norm(dim=1).sum()


def columns(w):
    return w.shape[0] ** 0.5 * w.norm(dim=0).sum()


# Each penalty beside its formula, as a user would write it in the loss.
KINDS = {
    "L1": (lambda model: L1(model, 0.03), lambda w: 0.03 * l1(w)),
    "L2": (lambda model: L2(model, 0.03), lambda w: 0.03 * l2(w)),
    "ElasticNet": (
        lambda model: ElasticNet(model, 0.03, l1_ratio=0.7),
        lambda w: 0.03 * (0.7 * l1(w) + 0.3 * l2(w)),
    ),
    "GroupLasso": (lambda model: GroupLasso(model, 0.02), lambda w: 0.02 * rows(w)),
    "GroupLasso-input": (lambda model: GroupLasso(model, 0.02, groups="input"), lambda w: 0.02 * columns(w)),
    "L1+L2": (lambda model: L1(model, 0.02) + L2(model, 0.01), lambda w: 0.02 * l1(w) + 0.01 * l2(w)),
    "L1+GroupLasso": (lambda model: L1(model, 0.02) + GroupLasso(model, 0.01), lambda w: 0.02 * l1(w) + 0.01 * rows(w)),
    "list": (
        lambda model: [GroupLasso(model, 0.01), L2(model, 0.03), L1(model, 0.02)],
        lambda w: 0.02 * l1(w) + 0.01 * rows(w) + 0.03 * l2(w),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)
modes = pytest.mark.parametrize("mode", MODES)


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def adam(model, lr=0.01, **options):
    return torch.optim.Adam(model.parameters(), lr=lr, **options)


def adamw(model, lr=0.01, **options):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0, **options)


def momentum(model, lr=0.05, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **options)


optimizers = pytest.mark.parametrize("make", [sgd, momentum, adam])


def with_zeros(model):
    """The network with an element, a row and a column that are exactly zero: where the penalties have no derivative."""
    with torch.no_grad():
        model[0].weight[1, 2] = 0
        model[0].weight[3] = 0
        model[2].weight[:, 1] = 0
    return model


def explicit(model, formula):
    """The formula on the two weights of the network, as a term of the loss."""
    return lambda: formula(model[0].weight) + formula(model[2].weight)


# Coupled


@optimizers
@kinds
def test_coupled_takes_the_path_of_the_penalty_in_the_loss(device, kind, make):
    penalty, formula = KINDS[kind]
    theirs, ours = (with_zeros(network(device, torch.float64)) for _ in range(2))
    train(theirs, make(theirs), steps=8, extra=explicit(theirs, formula))
    train(ours, RegularizedOptimizer(make(ours), penalty(ours)), steps=8)
    assert_same(ours, theirs, 1e-12)


@kinds
def test_coupled_takes_the_path_of_the_penalty_called_in_the_loss(device, kind):
    make, _ = KINDS[kind]
    theirs, ours = (with_zeros(network(device, torch.float64)) for _ in range(2))
    penalty = make(theirs)
    terms = penalty if isinstance(penalty, list) else [penalty]
    train(theirs, momentum(theirs), steps=8, extra=lambda: sum(term() for term in terms))
    train(ours, RegularizedOptimizer(momentum(ours), make(ours)), steps=8)
    assert_same(ours, theirs, 1e-12)


def test_coupled_gives_each_group_its_own_lambda(device):
    theirs, ours = network(device, torch.float64), network(device, torch.float64)
    train(theirs, sgd(theirs), extra=lambda: 0.1 * l1(theirs[0].weight) + 0.02 * l1(theirs[2].weight))
    penalty = L1([{"params": ours[0], "lam": 0.1}, {"params": ours[2]}], 0.02)
    train(ours, RegularizedOptimizer(sgd(ours), penalty))
    assert_same(ours, theirs, 1e-12)


@kinds
def test_after_a_coupled_step_grad_holds_the_part_of_the_penalty(device, kind):
    penalty, formula = KINDS[kind]
    theirs, ours = network(device, torch.float64), network(device, torch.float64)
    closure_on(theirs, sgd(theirs), extra=explicit(theirs, formula))()
    optimizer = RegularizedOptimizer(sgd(ours), penalty(ours))
    closure_on(ours, optimizer)()
    optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["decoupled", "proximal"])
def test_after_any_other_step_grad_is_the_plain_one(device, mode):
    model = network(device)
    optimizer = RegularizedOptimizer(adam(model), L1(model, 0.1), mode)
    set_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


# Decoupled


def subgradients(model, formula):
    """The gradient that autograd finds for the formula at each of the two weights."""
    weights = [model[0].weight, model[2].weight]
    return weights, torch.autograd.grad(explicit(model, formula)(), weights)


@optimizers
@kinds
def test_decoupled_subtracts_lr_times_the_subgradient_then_steps_on_the_plain_gradient(device, kind, make):
    penalty, formula = KINDS[kind]
    theirs, ours = (with_zeros(network(device, torch.float64)) for _ in range(2))
    plain, optimizer = make(theirs), RegularizedOptimizer(make(ours), penalty(ours), "decoupled")
    lr = plain.param_groups[0]["lr"]
    for i in range(3):
        set_gradients(theirs, i)
        set_gradients(ours, i)
        weights, grads = subgradients(theirs, formula)
        with torch.no_grad():
            for w, g in zip(weights, grads, strict=True):
                moved = w - lr * g
                w.copy_(torch.where(moved.sign() == -w.sign(), 0, moved))  # no element crosses zero
        plain.step()
        optimizer.step()
    assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.float32, 1e-30), (torch.float16, 1e-4)])
@kinds
def test_decoupled_stops_at_zero_instead_of_crossing_it(device, kind, dtype, scale):
    weights = scale * torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    weights *= torch.logspace(-2, 2, 30).unsqueeze(1) * torch.logspace(-2, 2, 40)
    model = nn.Linear(40, 30, bias=False).to(device, dtype)
    with torch.no_grad():
        model.weight.copy_(weights)
    before = model.weight.detach().clone()
    lr = (
        20.0 if kind == "L2" else 10 * scale
    )  # 1 - lr * 2 * 0.03 is below zero, or the thresholds are about 0.1 * scale
    optimizer = RegularizedOptimizer(sgd(model, lr=lr), KINDS[kind][0](model), "decoupled")
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    after = model.weight.detach()
    assert (after.sign() * before.sign() >= 0).all()
    assert (after.abs() <= before.abs()).all()
    assert (after == 0).sum() > (before == 0).sum()


def test_decoupled_keeps_the_direction_of_groups_and_stops_whole_groups_at_zero(device):
    model = nn.Linear(4, 3, bias=False).to(device)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -4.0, 0.0, 12.0], [0.3, -0.4, 0.0, 1.2], [0.0] * 4]))
    optimizer = RegularizedOptimizer(sgd(model, lr=2.0), GroupLasso(model, 0.5), "decoupled")
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()  # norms 13, 1.3 and 0, each shrunk by lr * lam * sqrt(4) = 2
    expected = torch.tensor([[3.0, -4.0, 0.0, 12.0], [0.0] * 4, [0.0] * 4]) * (11 / 13)
    torch.testing.assert_close(model.weight.detach().cpu(), expected)
    assert (model.weight[1:] == 0).all()


def test_decoupled_takes_lr_whatever_the_optimizer(device):
    shrunk = []
    for make in (sgd, momentum, adam, torch.optim.RMSprop):
        model = network(device)
        inner = make(model.parameters() if make is torch.optim.RMSprop else model, lr=0.01)
        bare = copy.deepcopy(model)
        plain = make(bare.parameters() if make is torch.optim.RMSprop else bare, lr=0.01)
        set_gradients(model, 0)
        set_gradients(bare, 0)
        RegularizedOptimizer(inner, L1(model, 0.5), "decoupled").step()
        plain.step()
        shrunk.append((bare[0].weight - model[0].weight).detach())
    for difference in shrunk[1:]:
        torch.testing.assert_close(difference, shrunk[0], rtol=1e-4, atol=1e-7)


# Proximal


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("kind", ["L1", "ElasticNet", "L1+L2"])
def test_proximal_step_of_a_weight_solves_its_problem(device, kind, make):
    """`(w - v) / s` must be a subgradient of the penalty at v, with w where the bare optimizer ends."""
    penalty, formula = KINDS[kind]
    bare, ours = network(device, torch.float64), network(device, torch.float64)
    plain, inner = make(bare), make(ours)
    set_gradients(bare, 3)
    set_gradients(ours, 3)
    plain.step()
    RegularizedOptimizer(inner, penalty(ours), "proximal").step()
    for w, v in ((bare[0].weight, ours[0].weight), (bare[2].weight, ours[2].weight)):
        # The first step of Adam is lr * g / (|g| + eps): the correction of v makes it exactly g^2.
        s = 0.1 if make is sgd else 0.01 / (v.grad.abs() + 1e-8)
        needed = ((w - v) / s).detach()
        (slope,) = torch.autograd.grad(formula(v), v)
        (at_zero,) = torch.autograd.grad(formula(one := torch.full_like(v, 1e-300).requires_grad_()), one)
        assert torch.where(v == 0, (needed.abs() - at_zero).clamp_min(0), (needed - slope).abs()).max() < 1e-6


def test_proximal_leaves_exact_zeros_and_coupled_does_not(device):
    zeros = {}
    for mode in MODES:
        model = network(device)
        train(model, RegularizedOptimizer(sgd(model), L1(model, 0.05), mode), steps=100)
        zeros[mode] = (model[0].weight == 0).float().mean().item()
    assert zeros["proximal"] > 0.5
    assert zeros["coupled"] == 0


def test_proximal_leaves_whole_neurons_at_zero(device):
    model = network(device)
    train(model, RegularizedOptimizer(adam(model, lr=0.02), GroupLasso(model, 0.05), "proximal"), steps=200)
    dead = (model[0].weight == 0).all(dim=1)
    assert dead.any()
    assert torch.equal(dead, (model[0].weight == 0).any(dim=1))


# All modes


@modes
def test_each_parameter_takes_the_lr_of_its_own_group(device, mode):
    """One optimizer with two groups moves the weights as two optimizers with a group each do."""
    together, apart = network(device), network(device)
    groups = [{"params": together[0].parameters()}, {"params": together[2].parameters(), "lr": 0.3}]
    one = RegularizedOptimizer(torch.optim.SGD(groups, lr=0.02), L1(together, 0.05), mode)
    two = [
        RegularizedOptimizer(torch.optim.SGD(apart[i].parameters(), lr=lr), L1(apart[i], 0.05), mode)
        for i, lr in ((0, 0.02), (2, 0.3))
    ]
    for i in range(3):
        set_gradients(together, i, 0.1)
        set_gradients(apart, i, 0.1)
        one.step()
        for optimizer in two:
            optimizer.step()
    assert_same(together, apart)


@kinds
@modes
@pytest.mark.parametrize("make", [sgd, momentum, adam])
def test_a_tensor_as_lr_does_what_the_number_does(device, mode, kind, make):
    with_number, with_tensor = network(device), network(device)
    penalty = KINDS[kind][0]
    for model, lr in ((with_number, 0.05), (with_tensor, torch.tensor(0.05, device=device))):
        optimizer = RegularizedOptimizer(make(model, lr=lr, foreach=False), penalty(model), mode)
        for i in range(3):
            set_gradients(model, i)
            optimizer.step()
    assert_same(with_tensor, with_number, 1e-6)


@modes
@pytest.mark.parametrize("make", [sgd, momentum, adam])
def test_maximizing_the_negative_loss_is_minimizing_the_loss(device, mode, make):
    down, up = network(device), network(device)
    train(down, RegularizedOptimizer(make(down), L1(down, 0.05), mode))
    train(up, RegularizedOptimizer(make(up, maximize=True), L1(up, 0.05), mode), sign=-1.0)
    assert_same(up, down)


@modes
def test_a_parameter_without_gradient_is_left_alone(device, mode):
    model = network(device)
    optimizer = RegularizedOptimizer(sgd(model), L1(model, 0.1) + L2(model, 0.1), mode)
    before = copy.deepcopy(model)
    set_gradients(model, 0)
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight, before[0].weight)
    assert model[0].weight.grad is None
    assert not torch.equal(model[2].weight, before[2].weight)


@modes
def test_a_step_without_any_gradient_does_nothing(device, mode):
    model = network(device)
    before = copy.deepcopy(model)
    RegularizedOptimizer(adam(model), L1(model, 0.1), mode).step()
    assert_same(model, before)


@modes
def test_a_zero_gradient_shrinks_all_the_same(device, mode):
    model = network(device)
    optimizer = RegularizedOptimizer(sgd(model), L1(model, 0.1), mode)
    before = copy.deepcopy(model)
    set_gradients(model, 0, scale=0.0)
    optimizer.step()
    assert model[0].weight.abs().sum() < 0.99 * before[0].weight.abs().sum()
    assert torch.equal(model[0].bias, before[0].bias)


@modes
def test_lambda_can_change_while_training(device, mode):
    changing = network(device)
    penalty = L1(changing, 0.02)
    optimizer = RegularizedOptimizer(momentum(changing), penalty, mode)
    constant = network(device)
    reference = momentum(constant)
    for lam in (0.02, 0.2, 0.0, 0.05):
        penalty.lam = lam
        train(changing, optimizer, steps=2)
        train(constant, RegularizedOptimizer(reference, L1(constant, lam), mode), steps=2)
    assert_same(changing, constant)


@modes
def test_parameters_can_be_frozen_and_unfrozen_while_training(device, mode):
    model = network(device)
    optimizer = RegularizedOptimizer(sgd(model), L1(model, 0.1), mode)
    train(model, optimizer, steps=1)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    train(model, optimizer, steps=2)
    assert torch.equal(model[0].weight, frozen)
    model[0].weight.grad = torch.zeros_like(frozen)  # even with a gradient left over
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, steps=1)
    assert not torch.equal(model[0].weight, frozen)


@modes
def test_a_list_of_penalties_is_their_sum(device, mode):
    listed, summed, generated = network(device), network(device), network(device)
    train(listed, RegularizedOptimizer(sgd(listed), [L1(listed, 0.01), L2(listed, 0.02)], mode))
    train(summed, RegularizedOptimizer(sgd(summed), L1(summed, 0.01) + L2(summed, 0.02), mode))
    parts = (kind(generated, lam) for kind, lam in ((L1, 0.01), (L2, 0.02)))
    train(generated, RegularizedOptimizer(sgd(generated), parts, mode))
    assert_same(listed, summed)
    assert_same(generated, summed)


@modes
def test_penalties_on_different_parameters_each_take_their_own(device, mode):
    together, apart = network(device), network(device)
    parts = [L1(together, 0.05, select="0.weight"), GroupLasso(together, 0.02, select="2.weight")]
    optimizer = RegularizedOptimizer(sgd(together), parts, mode)
    first = RegularizedOptimizer(sgd(apart[0]), L1(apart[0], 0.05), mode)
    second = RegularizedOptimizer(sgd(apart[2]), GroupLasso(apart[2], 0.02), mode)
    for i in range(3):
        set_gradients(together, i)
        set_gradients(apart, i)
        optimizer.step()
        first.step()
        second.step()
    assert_same(together, apart)


@modes
def test_two_optimizers_share_a_penalty_through_restricted_to(device, mode):
    shared, whole = network(device), network(device)
    penalty = L1(shared, 0.01)
    inner = [torch.optim.SGD(shared[0].parameters(), lr=0.1), torch.optim.SGD(shared[2].parameters(), lr=0.1)]
    two = [RegularizedOptimizer(each, penalty.restricted_to(each), mode) for each in inner]
    all_of_it = L1(whole, 0.01)
    one = RegularizedOptimizer(sgd(whole), all_of_it, mode)
    for lam in (0.01, 0.1):
        penalty.lam = all_of_it.lam = lam
        set_gradients(shared, 0, 0.1)
        set_gradients(whole, 0, 0.1)
        for optimizer in two:
            optimizer.step()
        one.step()
    assert_same(shared, whole)


# Closures


@modes
@kinds
def test_a_step_with_a_closure_is_the_step_without(device, mode, kind):
    with_closure, without = network(device), network(device)
    penalty = KINDS[kind][0]
    optimizer = RegularizedOptimizer(momentum(with_closure), penalty(with_closure), mode)
    closure = closure_on(with_closure, optimizer)
    losses = [optimizer.step(closure).item() for _ in range(4)]
    expected = train(without, RegularizedOptimizer(momentum(without), penalty(without), mode), steps=4)
    assert_same(with_closure, without)
    if mode != "coupled":
        assert losses == expected


@pytest.mark.parametrize("line_search", ["strong_wolfe", None])
@pytest.mark.parametrize("kind", ["L1", "L2", "L1+GroupLasso"])
def test_coupled_lbfgs_is_lbfgs_on_loss_plus_penalty(device, kind, line_search):
    penalty, formula = KINDS[kind]
    theirs, ours = network(device, torch.float64), network(device, torch.float64)
    plain, inner = (
        torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=5, line_search_fn=line_search) for m in (theirs, ours)
    )
    expected = closure_on(theirs, plain, extra=explicit(theirs, formula))
    optimizer = RegularizedOptimizer(inner, penalty(ours))
    closure = closure_on(ours, optimizer)
    for _ in range(3):
        torch.testing.assert_close(optimizer.step(closure), plain.step(expected), rtol=1e-10, atol=0)
    assert_same(ours, theirs, 1e-9)


def test_coupled_returns_loss_minus_penalty_where_the_optimizer_maximizes(device):
    model = network(device)
    optimizer = RegularizedOptimizer(sgd(model, maximize=True), L1(model, 0.1))
    closure = closure_on(model, optimizer, sign=-1.0)
    expected = closure() - 0.1 * (l1(model[0].weight) + l1(model[2].weight))
    torch.testing.assert_close(optimizer.step(closure), expected)


@modes
def test_a_closure_that_returns_nothing_is_fine(device, mode):
    model, expected = network(device), network(device)
    optimizer = RegularizedOptimizer(sgd(model), L1(model, 0.1), mode)
    closure = closure_on(model, optimizer)
    assert optimizer.step(lambda: (closure(), None)[1]) is None
    train(expected, RegularizedOptimizer(sgd(expected), L1(expected, 0.1), mode), steps=1)
    assert_same(model, expected)


class Twice(torch.optim.SGD):
    """Calls its closure twice, with the weights back in place and the gradients added up."""

    def step(self, closure):
        first = closure()
        super().step(closure)
        return first


def test_decoupled_shrinks_once_after_the_first_call_of_the_closure(device):
    model = network(device)
    start = model[0].weight.detach().clone()
    optimizer = RegularizedOptimizer(Twice(model.parameters(), lr=0.1), L2(model, 0.5), "decoupled")
    closure, seen = closure_on(model, optimizer), []

    def watched():
        seen.append(model[0].weight.detach().clone())
        return closure()

    optimizer.step(watched)
    assert torch.equal(seen[0], start)
    torch.testing.assert_close(seen[1], start * (1 - 0.1 * 2 * 0.5))
    torch.testing.assert_close(model[0].weight, seen[1] - 0.1 * model[0].weight.grad)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization: climbs by rho along the gradient, and descends from where it was."""

    def __init__(self, params, lr, rho):
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        ascents = [self.param_groups[0]["rho"] * p.grad / norm for p in parameters]
        torch._foreach_add_(parameters, ascents)
        closure()
        torch._foreach_sub_(parameters, ascents)
        torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-self.param_groups[0]["lr"])
        return loss


@kinds
def test_coupled_sam_is_sam_on_loss_plus_penalty(device, kind):
    penalty, formula = KINDS[kind]
    theirs, ours = network(device, torch.float64), network(device, torch.float64)
    plain = SAM(theirs.parameters(), 0.1, 0.05)
    optimizer = RegularizedOptimizer(SAM(ours.parameters(), 0.1, 0.05), penalty(ours))
    expected, closure = closure_on(theirs, plain, extra=explicit(theirs, formula)), closure_on(ours, optimizer)
    for _ in range(4):
        torch.testing.assert_close(optimizer.step(closure), plain.step(expected), rtol=1e-10, atol=0)
    assert_same(ours, theirs, 1e-10)


def test_decoupled_sam_shrinks_once_a_step(device):
    shrunk, bare = network(device), network(device)
    optimizer = RegularizedOptimizer(SAM(shrunk.parameters(), 0.1, 0.05), L2(shrunk, 0.5), "decoupled")
    plain = SAM(bare.parameters(), 0.1, 0.05)

    def constant(model):
        def closure():
            set_gradients(model, 0)
            return torch.zeros(())

        return closure

    optimizer.step(constant(shrunk))
    plain.step(constant(bare))
    start = network(device)[0].weight
    torch.testing.assert_close(bare[0].weight - shrunk[0].weight, 0.1 * 2 * 0.5 * start, rtol=1e-4, atol=1e-6)


# Sparse gradients


def embedding(device, sparse=True):
    torch.manual_seed(0)
    return nn.Embedding(6, 3, sparse=sparse).to(device)


def look_up(model, optimizer, tokens=(1, 4, 1)):
    optimizer.zero_grad()
    model(torch.tensor(tokens, device=model.weight.device)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad])
def test_coupled_with_sparse_gradients_names_the_parameter_and_the_modes_that_work(device, make):
    model = nn.ModuleDict({"tokens": embedding(device)})
    optimizer = RegularizedOptimizer(make(model.parameters(), lr=0.1), L1(model, 0.1))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"tokens\.weight.*decoupled.*proximal"):
        look_up(model["tokens"], optimizer)
    assert_same(model, before)


@kinds
@pytest.mark.parametrize("mode", ["decoupled", "proximal"])
def test_with_sparse_gradients_the_penalty_acts_on_all_rows_as_with_dense_ones(device, mode, kind):
    sparse, dense = embedding(device), embedding(device, sparse=False)
    for model in (sparse, dense):
        optimizer = RegularizedOptimizer(sgd(model), KINDS[kind][0](model), mode)
        for _ in range(3):
            look_up(model, optimizer)
    assert_same(sparse, dense, 1e-6)
    assert not torch.equal(sparse.weight[0], embedding(device).weight[0])


@pytest.mark.parametrize("mode", ["decoupled", "proximal"])
def test_sparse_adam_takes_the_penalty_on_all_rows(device, mode):
    model = embedding(device)
    before = model.weight.detach().clone()
    inner = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    look_up(model, RegularizedOptimizer(inner, L1(model, 0.2), mode, metric="euclidean"))
    unseen = torch.tensor([0, 2, 3, 5], device=device)
    shrunk = before[unseen].sign() * (before[unseen].abs() - 0.1 * 0.2).clamp_min(0)
    torch.testing.assert_close(model.weight[unseen].detach(), shrunk)


# The cap on one step, where the optimizer normalises its steps


UNSEEN = [0, 2, 3, 5]  # rows that `look_up` leaves without a gradient
capped = pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"lr": torch.tensor(0.01), "foreach": False}])


@capped
def test_a_row_that_never_occurs_is_not_wiped_out_in_one_step_under_adam(device, options):
    """Its second moment is 0, so that `s * lam` would be a million; it shrinks by 10 * lr."""
    model = embedding(device, sparse=False)
    with torch.no_grad():
        model.weight[0] = torch.tensor([0.05, -0.2, 0.0])
    before = model.weight.detach().clone()
    optimizer = RegularizedOptimizer(adam(model, **options), L1(model, 0.1), "proximal")
    look_up(model, optimizer)
    expected = before[UNSEEN].sign() * (before[UNSEEN].abs() - 10 * 0.01).clamp_min(0)
    torch.testing.assert_close(model.weight[UNSEEN].detach(), expected)
    assert model.weight[0, 0] == 0


@capped
def test_a_group_that_never_occurs_is_not_wiped_out_in_one_step_under_adam(device, options):
    model = embedding(device, sparse=False)
    with torch.no_grad():
        model.weight[0] = torch.tensor([0.05, -0.1, 0.05])
    before = model.weight.detach().clone()
    optimizer = RegularizedOptimizer(adam(model, **options), GroupLasso(model, 0.1), "proximal")
    look_up(model, optimizer)
    norms = before[UNSEEN].norm(dim=1, keepdim=True)
    expected = before[UNSEEN] * (1 - 10 * 0.01 * 3**0.5 / norms).clamp_min(0)
    torch.testing.assert_close(model.weight[UNSEEN].detach(), expected)
    assert (model.weight[0] == 0).all()


@pytest.mark.parametrize("kind", ["GroupLasso", "L1+GroupLasso", "list"])
def test_no_norm_of_a_group_shrinks_by_more_than_ten_times_lr_times_the_root_of_its_size(device, kind):
    """Not even by all the penalties on it together."""
    model = embedding(device, sparse=False)
    before = model.weight.detach().clone()
    look_up(model, RegularizedOptimizer(adam(model), KINDS[kind][0](model), "proximal"))
    shrunk = before[UNSEEN].norm(dim=1) - model.weight[UNSEEN].norm(dim=1)
    most = 10 * 0.01 * 3**0.5
    assert (shrunk > 0.9 * most).all()
    assert (shrunk <= most * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "L2"])
def test_rows_that_never_occur_end_at_zero_and_not_at_once(device, kind):
    model = embedding(device, sparse=False)
    optimizer = RegularizedOptimizer(adam(model, lr=0.01), KINDS[kind][0](model), "proximal")
    look_up(model, optimizer)
    assert (model.weight[UNSEEN] != 0).any()
    for _ in range(30):
        look_up(model, optimizer)
    assert (model.weight[UNSEEN] == 0).all()
    assert (model.weight[1] != 0).any()


@pytest.mark.parametrize("kind", ["L1", "L2", "ElasticNet", "L1+L2"])
def test_no_element_shrinks_by_more_than_ten_times_lr_in_a_step(device, kind):
    bare, ours = network(device), network(device)
    plain, optimizer = adam(bare), RegularizedOptimizer(adam(ours), KINDS[kind][0](ours), "proximal")
    for i in range(4):
        bare.load_state_dict(ours.state_dict())
        for model in (bare, ours):
            set_gradients(model, i, scale=1e-9)  # no gradient to speak of
        plain.step()
        optimizer.step()
        shrunk = bare[0].weight - ours[0].weight
        assert 0.01 < shrunk.abs().max() <= 10 * 0.01 * (1 + 1e-6)


def test_sgd_has_no_cap(device):
    model = network(device)
    set_gradients(model, 0, scale=0.0)
    RegularizedOptimizer(sgd(model, lr=0.001), L1(model, 1000.0), "proximal").step()
    assert (model[0].weight == 0).all()


# Errors and warnings


def test_an_unknown_mode_is_refused_and_the_four_are_named():
    model = network()
    with pytest.raises(ValueError, match=r"'coupled', 'decoupled', 'dual', 'proximal'.*'prox'"):
        RegularizedOptimizer(sgd(model), L1(model, 0.1), mode="prox")


def test_an_unknown_metric_is_refused_and_the_known_are_named():
    model = network()
    with pytest.raises(ValueError, match=r"'auto'.*'euclidean'.*callable.*'riemann'"):
        RegularizedOptimizer(sgd(model), L1(model, 0.1), "proximal", metric="riemann")


@modes
def test_parameters_that_the_optimizer_does_not_own_are_named(mode):
    model = network()
    with pytest.raises(ValueError, match=r"SGD does not own.*: 0\.weight\. .*restricted_to"):
        RegularizedOptimizer(sgd(model[2]), L1(model, 0.1), mode)


def test_a_frozen_parameter_needs_no_owner_until_it_is_unfrozen():
    model = network()
    model[0].requires_grad_(False)
    optimizer = RegularizedOptimizer(sgd(model[2]), L1(model, 0.1))
    train(model, optimizer, steps=1)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"does not own.*0\.weight"):
        optimizer.step()


def test_what_is_no_optimizer_is_refused():
    model = network()
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, not Sequential"):
        RegularizedOptimizer(model, L1(model, 0.1))


@pytest.mark.parametrize("penalty", [None, 0.1, "L1", [], [None], L1])
def test_what_is_no_penalty_is_refused(penalty):
    with pytest.raises(TypeError, match="must be a Penalty or a list of them"):
        RegularizedOptimizer(sgd(network()), penalty)


def test_a_sum_whose_prox_is_unknown_is_refused_in_proximal_mode_only():
    model = network()
    crossing = GroupLasso(model, 0.1, groups="output") + GroupLasso(model, 0.1, groups="input")
    with pytest.raises(ValueError, match=r"GroupLasso \+ GroupLasso on parameter '0\.weight'"):
        RegularizedOptimizer(sgd(model), crossing, "proximal")
    RegularizedOptimizer(sgd(model), crossing, "coupled")
    RegularizedOptimizer(sgd(model), crossing, "decoupled")


class Half(Penalty):
    """A kind of a user's own that has a gradient and no prox."""

    def rho(self, u):
        return u / 2

    def rho_grad(self, u):
        return torch.full_like(u, 0.5)


class Jump(Penalty):
    """A kind of a user's own that has a prox and no gradient."""

    def rho(self, u):
        return (u > 0).to(u)

    def rho_prox(self, u, t):
        return torch.where(u * u <= 2 * t, 0, u)


def test_a_kind_without_prox_says_so_at_construction():
    model = network()
    with pytest.raises(ValueError, match="Half has no prox"):
        RegularizedOptimizer(sgd(model), Half(model, 0.1), "proximal")
    RegularizedOptimizer(sgd(model), Half(model, 0.1), "coupled")


def test_a_kind_without_gradient_says_so_at_construction():
    model = network()
    for mode in ("coupled", "decoupled"):
        with pytest.raises(ValueError, match="Jump has no gradient"):
            RegularizedOptimizer(sgd(model), Jump(model, 0.1), mode)
    RegularizedOptimizer(sgd(model), Jump(model, 0.1), "proximal")


class Homemade(torch.optim.Optimizer):
    """Gradient descent, by an optimizer that the library has never heard of."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


def test_an_optimizer_that_is_not_known_warns_once_and_takes_lr(device):
    ours, expected = network(device), network(device)
    with pytest.warns(UserWarning, match="Homemade.*not known.*takes its lr.*euclidean") as record:
        optimizer = RegularizedOptimizer(Homemade(ours.parameters()), L1(ours, 0.05), "proximal")
    assert len(record) == 1
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ours, optimizer)
    train(expected, RegularizedOptimizer(sgd(expected), L1(expected, 0.05), "proximal"))
    assert_same(ours, expected, 1e-6)


@pytest.mark.parametrize(
    ("mode", "metric"),
    [
        ("proximal", "euclidean"),
        ("proximal", lambda optimizer, parameter, group: group["lr"]),
        ("coupled", "auto"),
        ("decoupled", "auto"),
    ],
)
def test_an_optimizer_that_is_not_known_does_not_warn_where_its_step_is_not_needed(mode, metric):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, RegularizedOptimizer(Homemade(model.parameters()), L1(model, 0.05), mode, metric=metric))


def test_subclasses_of_known_optimizers_are_known(device):
    class MyAdam(torch.optim.Adam):
        pass

    ours, expected = network(device), network(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = RegularizedOptimizer(MyAdam(ours.parameters(), lr=0.01), L1(ours, 0.05), "proximal")
    train(ours, optimizer)
    train(expected, RegularizedOptimizer(adam(expected), L1(expected, 0.05), "proximal"))
    assert_same(ours, expected)


@pytest.mark.parametrize("mode", ["decoupled", "proximal"])
def test_an_optimizer_without_lr_is_refused_where_it_is_needed(mode):
    model = network()
    inner = Homemade(model.parameters())
    del inner.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"Homemade have no 'lr'.*coupled"):
        RegularizedOptimizer(inner, L1(model, 0.05), mode, metric="euclidean")
    RegularizedOptimizer(inner, L1(model, 0.05), "coupled")


def test_a_complex_parameter_under_adam_is_refused_in_its_own_metric():
    w = torch.randn(3, 2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match=r"complex.*euclidean"):
        RegularizedOptimizer(torch.optim.Adam([w]), L1([w], 0.1), "proximal")
    RegularizedOptimizer(torch.optim.Adam([w]), L1([w], 0.1), "proximal", metric="euclidean")
    RegularizedOptimizer(torch.optim.SGD([w]), L1([w], 0.1), "proximal")


def test_weight_decay_on_other_parameters_does_not_warn():
    model = network()
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.0},
        {"params": [model[0].bias, model[2].bias]},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RegularizedOptimizer(torch.optim.AdamW(groups, weight_decay=0.1), L2(model, 0.1))


@modes
def test_the_penalty_in_the_loss_and_in_the_optimizer_at_once_warns_once(mode):
    model = network()
    penalty = L1(model, 0.1)
    optimizer = RegularizedOptimizer(sgd(model), penalty, mode)
    with pytest.warns(UserWarning, match="counts double") as record:
        train(model, optimizer, steps=3, extra=penalty)
    assert len(record) == 1
    assert record[0].filename.endswith("training.py")  # the line that called step()


def test_a_part_of_a_sum_in_the_loss_counts_double_too():
    model = network()
    part = L1(model, 0.1)
    optimizer = RegularizedOptimizer(sgd(model), part + L2(model, 0.1))
    with pytest.warns(UserWarning, match="counts double"):
        train(model, optimizer, steps=1, extra=part)


@modes
def test_looking_at_the_value_of_the_penalty_does_not_warn(mode):
    model = network()
    penalty = L1(model, 0.1)
    optimizer = RegularizedOptimizer(sgd(model), penalty, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, steps=2, extra=lambda: penalty().detach())


def test_a_penalty_that_was_in_the_loss_before_the_optimizer_took_it_does_not_warn():
    model = network()
    penalty = L1(model, 0.1)
    train(model, sgd(model), steps=2, extra=penalty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, RegularizedOptimizer(sgd(model), penalty), steps=2)


# Nothing is read back from the device


class Reads(TorchDispatchMode):
    """Counts the operations that read a value back from a tensor."""

    NAMES = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "allclose")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.strip("_") in [known.strip("_") for known in self.NAMES]:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def with_lr_tensor(make):
    return lambda model: make(model, lr=torch.tensor(0.05, device=model[0].weight.device), foreach=False)


READ_FREE = {
    "sgd": sgd,
    "momentum": momentum,
    "adam": adam,
    "amsgrad": lambda model: adam(model, amsgrad=True),
    "adamw": adamw,
    "sgd-lr-tensor": with_lr_tensor(sgd),
    "momentum-lr-tensor": with_lr_tensor(momentum),
    "adam-lr-tensor": with_lr_tensor(adam),
}


@modes
@kinds
@pytest.mark.parametrize("optimizer", READ_FREE)
def test_no_value_is_read_back_that_the_bare_optimizer_does_not_read(device, mode, kind, optimizer, monkeypatch):
    monkeypatch.setattr(NormGrouping, "all_known", lambda *_: False)  # which reads on a CPU, and nowhere else
    bare, ours = network(device), network(device)
    plain, wrapped = READ_FREE[optimizer](bare), READ_FREE[optimizer](ours)
    wrapped = RegularizedOptimizer(wrapped, KINDS[kind][0](ours), mode)
    for i in range(2):  # the second step is not the one that makes the state
        set_gradients(bare, i)
        set_gradients(ours, i)
        with Reads() as expected:
            plain.step()
        with Reads() as reads:
            wrapped.step()
        assert reads.found == expected.found


@modes
@kinds
@pytest.mark.parametrize("make", [sgd, momentum, adam, adamw])
def test_a_step_works_on_the_meta_device_where_no_value_can_be_read(mode, kind, make):
    model = network("meta")
    optimizer = RegularizedOptimizer(make(model), KINDS[kind][0](model), mode)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()


@modes
def test_a_step_does_not_wait_for_the_device(device, mode):
    if torch.device(device).type != "cuda":
        pytest.skip("there is nothing to wait for")
    for penalty, _ in KINDS.values():
        for make in (sgd, momentum, adam):
            model = network(device)
            optimizer = RegularizedOptimizer(make(model), penalty(model), mode)
            set_gradients(model, 0)
            optimizer.step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
