"""Several backwards for one step, and clipping: how often the penalty counts, and whether it is clipped."""

import pytest
import torch
from helpers.nets import assert_same, data, network
from torch import nn

from torch_regpen import L1, GroupLasso, RegularizedOptimizer

LAM = 0.05
PARTS = 4


def loss_on(model, part):
    x, y = data(model[0].weight)
    return (model(x[part::PARTS]) - y[part::PARTS]).square().mean() / PARTS


def whole_batch(model, mode, penalty):
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), penalty, mode)
    x, y = data(model[0].weight)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal", "dual"])
def test_in_the_optimizer_it_counts_once_a_step_however_many_backwards(mode):
    model, expected = network(dtype=torch.float64), network(dtype=torch.float64)
    whole_batch(expected, mode, L1(expected, LAM))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = RegularizedOptimizer(sgd, L1(model, LAM), mode)
    for _ in range(3):
        optimizer.zero_grad()
        for part in range(PARTS):
            loss_on(model, part).backward()
        optimizer.step()
    assert_same(model, expected, 1e-12)


def test_in_the_loss_it_is_divided_as_the_loss_or_added_to_one_part():
    expected = network(dtype=torch.float64)
    whole_batch(expected, "coupled", L1(expected, LAM))
    for divided in (True, False):
        model = network(dtype=torch.float64)
        penalty = L1(model, LAM)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            for part in range(PARTS):
                counted = penalty() / PARTS if divided else penalty() if part == 0 else 0.0
                (loss_on(model, part) + counted).backward()
            optimizer.step()
        assert_same(model, expected, 1e-12)


def test_add_grad_before_clipping_clips_the_penalty_with_the_rest():
    model, expected = network(dtype=torch.float64), network(dtype=torch.float64)
    penalty, in_loss = GroupLasso(model, LAM), GroupLasso(expected, LAM)
    for part in range(PARTS):
        loss_on(model, part).backward()
        (loss_on(expected, part) + in_loss() / PARTS).backward()
    penalty.add_grad_()
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, expected)]
    assert norms[0] > 0.1  # so that there is something to clip
    torch.testing.assert_close(*norms)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_in_the_optimizer_it_is_not_clipped():
    """With no gradient of the loss, a step of SGD is `lr * lam`, however small the clip."""
    model = network()
    before = model[0].weight.detach().clone()
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, LAM))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before - 0.1 * LAM * before.sign())
