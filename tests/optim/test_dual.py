"""The dual mode against dual averaging written by hand, and what it leaves alone."""

import copy

import pytest
import torch
from helpers.kinds import ONE_STEP, VARIANTS
from helpers.nets import assert_same, backward, network, train_on_batches
from helpers.optimizers import adam, sgd
from helpers.oracles import soft
from torch import nn

from torch_regpen import L1
from torch_regpen import RegularizedOptimizer as Regularized
from torch_regpen.optim.dual_averaging import GAP, STEPS

LAM = 0.05


# What it computes.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_regularized_dual_averaging(momentum):
    """Xiao (2010) with `h(w) = |w - w0|^2/2`: `w = argmin <sum of s*g, w> + S*lam*|w|_1 + |w - w0|^2/2`."""
    lam, lr = 0.05 * (1 - momentum), 0.1
    ours, hand = network(), network()
    optimizer = Regularized(sgd(ours, lr, momentum=momentum), L1(ours, lam), "dual")
    latent = [p.detach().clone() for p in hand.parameters()]
    velocity = [torch.zeros_like(p) for p in hand.parameters()]
    for step in range(30):
        backward(ours, step)
        backward(hand, step)
        optimizer.step()
        with torch.no_grad():
            for p, z, v in zip(hand.parameters(), latent, velocity, strict=True):
                v.mul_(momentum).add_(p.grad)
                z.sub_(lr * v)
                p.copy_(soft(z, (step + 1) * lr / (1 - momentum) * lam) if p.ndim > 1 else z)
        for p, q in zip(ours.parameters(), hand.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert (ours[0].weight == 0).any()
    assert (ours[0].weight != 0).any()


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_the_textbook_loop_for_every_kind_and_grouping(kind, momentum):
    """The latent weights move by the gradient at the visible ones, which are their prox with the sum of all steps."""
    lr = 0.05 * (1 - momentum)
    ours, hand = network(dtype=torch.float64), network(dtype=torch.float64)
    optimizer = Regularized(sgd(ours, lr, momentum=momentum), VARIANTS[kind](ours, LAM), "dual")
    penalty = VARIANTS[kind](hand, LAM)
    latent = [p.detach().clone() for p in hand.parameters()]
    velocity = [torch.zeros_like(p) for p in hand.parameters()]
    for step in range(8):
        backward(ours, step)
        backward(hand, step)
        optimizer.step()
        with torch.no_grad():
            for p, z, v in zip(hand.parameters(), latent, velocity, strict=True):
                v.mul_(momentum).add_(p.grad)
                p.copy_(z.sub_(lr * v))
        penalty.prox_((step + 1) * lr / (1 - momentum))
        for p, q in zip(ours.parameters(), hand.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_under_adam_each_coordinate_has_its_own_sum():
    lam, lr, beta = 0.02, 0.01, 0.99
    ours, hand = network(dtype=torch.float64), network(dtype=torch.float64)
    optimizer = Regularized(adam(ours, lr, betas=(0.0, beta), eps=0.0), L1(ours, lam, select="all"), "dual")
    latent = [p.detach().clone() for p in hand.parameters()]
    moments = [torch.zeros_like(p) for p in hand.parameters()]
    sums = [torch.zeros_like(p) for p in hand.parameters()]
    for step in range(1, 31):
        backward(ours, step)
        backward(hand, step)
        optimizer.step()
        with torch.no_grad():
            for p, z, v, total in zip(hand.parameters(), latent, moments, sums, strict=True):
                v.mul_(beta).addcmul_(p.grad, p.grad, value=1 - beta)
                s = lr * (1 - beta**step) ** 0.5 / v.sqrt()
                z.sub_(s * p.grad)
                total.add_(s.clamp_max(10 * lr / lam))  # small gradients wipe nothing out at once
                p.copy_(soft(z, total * lam))
    assert any((p == 0).any() for p in hand.parameters())
    for p, q in zip(ours.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_zero_comes_back_with_all_that_it_has_gathered():
    w = torch.tensor([0.1], requires_grad=True)
    optimizer = Regularized(torch.optim.SGD([w], lr=1.0), L1([w], 0.2), "dual")
    seen = []
    for gradient in (0.0, 0.1, -0.5, -0.5):
        w.grad = torch.tensor([gradient])
        optimizer.step()
        seen.append(round(w.item(), 6))
    assert seen == [0.0, 0.0, 0.0, pytest.approx(1.0 - 0.8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_that_half_precision_rounds_away_add_up(dtype):
    start, lr, steps = torch.tensor([0.51, -1.9], dtype=dtype), 2.4e-4, 2200
    ends = {}
    for mode in ("proximal", "decoupled", "dual"):
        w = start.clone().requires_grad_()
        w.grad = torch.zeros_like(w)
        optimizer = Regularized(torch.optim.SGD([w], lr=lr), L1([w], 1.0), mode)
        for _ in range(steps):
            optimizer.step()
        ends[mode] = w.detach()
    assert torch.equal(ends["proximal"], start)  # lr*lam is less than half a unit in the last place
    assert torch.equal(ends["decoupled"], start)
    assert ends["dual"][0] == 0
    torch.testing.assert_close(ends["dual"], nn.functional.softshrink(start.double(), steps * lr).to(dtype))


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("make", [sgd, adam])
def test_every_kind_and_grouping_trains_and_moves_by_its_own_prox(kind, make):
    model = network()
    penalty = VARIANTS[kind](model, LAM)
    if make is adam and kind in ONE_STEP:
        with pytest.raises(ValueError, match="differs by coordinate"):
            Regularized(make(model), penalty, "dual")
        return
    optimizer = Regularized(make(model), penalty, "dual")
    before = penalty().item()
    train_on_batches(model, optimizer, 30)
    assert all(p.isfinite().all() for p in model.parameters())
    if kind not in ("tensors of L0", "initial center"):
        assert penalty().item() < before
    if make is sgd:  # the visible weights are the prox of the latent ones, as the penalty itself computes it
        visible = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(optimizer.state[p].get(GAP, 0))
        penalty.prox_(optimizer.state[model[0].weight][STEPS].item())
        for name, p in model.state_dict().items():
            torch.testing.assert_close(p, visible[name])


# What it leaves alone.


@pytest.mark.parametrize("make", [sgd, adam])
def test_at_lambda_zero_it_is_the_bare_optimizer_to_the_last_bit(make):
    ours, bare = network(), network()
    optimizer = Regularized(make(ours), L1(ours, 0.0), "dual")
    train_on_batches(ours, optimizer, 10)
    train_on_batches(bare, make(bare), 10)
    assert_same(ours, bare)


def test_parameters_without_a_penalty_are_those_of_the_bare_optimizer():
    ours, bare = network(), network()
    optimizer = Regularized(adam(ours), L1(ours, 0.1, select="2.weight"), "dual")
    backward(ours, 0)
    backward(bare, 0)
    optimizer.step()
    adam_ = adam(bare)
    adam_.step()
    for name in ("0.weight", "0.bias", "2.bias"):
        assert torch.equal(ours.get_parameter(name), bare.get_parameter(name))
        assert GAP not in optimizer.state[ours.get_parameter(name)]


def test_a_parameter_without_gradient_keeps_its_weights_and_its_gap():
    model = network()
    optimizer = Regularized(sgd(model), L1(model, 0.05), "dual")
    train_on_batches(model, optimizer, 3)
    w = model[0].weight
    kept = w.detach().clone(), optimizer.state[w][GAP].clone(), optimizer.state[w][STEPS].clone()
    backward(model, 3)
    w.grad = None
    optimizer.step()
    for now, before in zip((w, optimizer.state[w][GAP], optimizer.state[w][STEPS]), kept, strict=True):
        assert torch.equal(now, before)


def test_the_first_step_of_adam_finds_the_state_empty():
    """What the wrapper adds to the state must not look to the optimizer as if it had been initialised."""
    model = network()
    optimizer = Regularized(adam(model), L1(model, 0.1), "dual")
    train_on_batches(model, optimizer, 1)
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq", GAP, STEPS}


def test_when_lambda_falls_to_zero_the_visible_weights_go_on():
    model = network()
    penalty = L1(model, 0.1)
    optimizer = Regularized(sgd(model), penalty, "dual")
    train_on_batches(model, optimizer, 5)
    bare = copy.deepcopy(model)
    penalty.lam = 0.0
    backward(model, 9)
    optimizer.step()  # this once the latent weights have moved; from here on it is the bare optimizer
    backward(bare, 9)
    sgd(bare).step()
    train_on_batches(model, optimizer, 3, start=10)
    train_on_batches(bare, sgd(bare), 3, start=10)
    assert_same(model, bare)
    penalty.lam = 0.1
    train_on_batches(model, optimizer, 1, start=20)
    assert optimizer.state[model[0].weight][STEPS].item() == pytest.approx(0.1)
