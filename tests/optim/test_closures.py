"""Steps that take a closure: once, several times, by a line search, and uphill first."""

import pytest
import torch
from helpers.kinds import FORMULAS, l1
from helpers.nets import assert_same, closure_on, explicit, network, set_gradients, train
from helpers.optimizers import direct_modes, momentum, sgd

from torch_regpen import L1, L2, RegularizedOptimizer

# Each penalty beside its formula, as a user would write it in the loss.
kinds = pytest.mark.parametrize("kind", FORMULAS)


# Closures


@direct_modes
@kinds
def test_a_step_with_a_closure_is_the_step_without(device, mode, kind):
    with_closure, without = network(device), network(device)
    penalty = FORMULAS[kind][0]
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
    penalty, formula = FORMULAS[kind]
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


@direct_modes
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
    penalty, formula = FORMULAS[kind]
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
