"""Rows without a gradient: sparse gradients, and the cap on one step of optimizers that normalise."""

import copy

import pytest
import torch
from helpers.kinds import FORMULAS
from helpers.nets import assert_same, embedding, look_up, network, set_gradients
from helpers.optimizers import adam, sgd
from torch import nn

from torch_regpen import L1, GroupLasso, RegularizedOptimizer

# Each penalty beside its formula, as a user would write it in the loss.
kinds = pytest.mark.parametrize("kind", FORMULAS)


# Sparse gradients


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad])
def test_coupled_with_sparse_gradients_names_parameter_and_way_out(device, make):
    model = nn.ModuleDict({"tokens": embedding(device)})
    optimizer = RegularizedOptimizer(make(model.parameters(), lr=0.1), L1(model, 0.1))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"tokens\.weight.*decoupled.*proximal"):
        look_up(model["tokens"], optimizer)
    assert_same(model, before)


@kinds
@pytest.mark.parametrize("mode", ["decoupled", "proximal"])
def test_with_sparse_gradients_the_penalty_acts_on_all_rows(device, mode, kind):
    sparse, dense = embedding(device), embedding(device, sparse=False)
    for model in (sparse, dense):
        optimizer = RegularizedOptimizer(sgd(model), FORMULAS[kind][0](model), mode)
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
def test_no_group_norm_shrinks_by_more_than_ten_lr_times_root_size(device, kind):
    """Not even by all the penalties on it together."""
    model = embedding(device, sparse=False)
    before = model.weight.detach().clone()
    look_up(model, RegularizedOptimizer(adam(model), FORMULAS[kind][0](model), "proximal"))
    shrunk = before[UNSEEN].norm(dim=1) - model.weight[UNSEEN].norm(dim=1)
    most = 10 * 0.01 * 3**0.5
    assert (shrunk > 0.9 * most).all()
    assert (shrunk <= most * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", [kind for kind in FORMULAS if kind != "L2"])
def test_rows_that_never_occur_end_at_zero_and_not_at_once(device, kind):
    model = embedding(device, sparse=False)
    optimizer = RegularizedOptimizer(adam(model, lr=0.01), FORMULAS[kind][0](model), "proximal")
    look_up(model, optimizer)
    assert (model.weight[UNSEEN] != 0).any()
    for _ in range(30):
        look_up(model, optimizer)
    assert (model.weight[UNSEEN] == 0).all()
    assert (model.weight[1] != 0).any()


@pytest.mark.parametrize("kind", ["L1", "L2", "ElasticNet", "L1+L2"])
def test_no_element_shrinks_by_more_than_ten_times_lr_in_a_step(device, kind):
    bare, ours = network(device), network(device)
    plain, optimizer = adam(bare), RegularizedOptimizer(adam(ours), FORMULAS[kind][0](ours), "proximal")
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
