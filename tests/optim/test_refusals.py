"""What RegularizedOptimizer refuses, and what it warns of."""

import warnings
from functools import partial

import pytest
import torch
from helpers.nets import assert_same, network, train
from helpers.optimizers import Homemade, adam, direct_modes, sgd
from torch import nn

from torch_regpen import L0, L1, L2, GroupLasso, Penalty, RegularizedOptimizer
from torch_regpen.utils import first_names

# Errors and warnings


def test_an_unknown_mode_is_refused_and_the_four_are_named():
    model = network()
    with pytest.raises(ValueError, match=r"'coupled', 'decoupled', 'dual', 'proximal'.*'prox'"):
        RegularizedOptimizer(sgd(model), L1(model, 0.1), mode="prox")


def test_an_unknown_metric_is_refused_and_the_known_are_named():
    model = network()
    with pytest.raises(ValueError, match=r"'auto'.*'euclidean'.*callable.*'riemann'"):
        RegularizedOptimizer(sgd(model), L1(model, 0.1), "proximal", metric="riemann")


@direct_modes
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
def test_an_unknown_optimizer_does_not_warn_where_its_step_is_not_needed(mode, metric):
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


def test_messages_show_the_first_names_and_count_the_others():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    with pytest.raises(ValueError, match=r": 0\.weight, 1\.weight, 2\.weight, 3\.weight and 46 others\. Pass"):
        RegularizedOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), L1(model, 0.1))
    with pytest.warns(UserWarning, match=r"both shrink 0\.weight, 1\.weight, 2\.weight, 3\.weight and 46 others\. Set"):
        RegularizedOptimizer(torch.optim.AdamW(model.parameters()), L2(model, 0.1))
    assert first_names(["a", "b", "c"], most=2, separator="; ") == "a; b and 1 other"
    assert first_names(["a", "b"], most=2) == "a, b"


def convolutions(norm):
    """A convolution with a norm behind it, a second one with none, and a linear layer."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3))


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("penalty", [GroupLasso, partial(L0, groups=0)])
def test_filters_as_groups_before_a_batchnorm_warn(penalty, mode):
    model = convolutions(nn.BatchNorm2d(8))
    with pytest.warns(
        UserWarning, match=r"^a BatchNorm or InstanceNorm seems to follow '0\.weight'\. .*Coupled\(model"
    ) as caught:
        RegularizedOptimizer(sgd(model), penalty(model, 1e-3), mode)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("norm", "penalty", "mode"),
    [
        (nn.GroupNorm(2, 8), GroupLasso, "proximal"),
        (nn.BatchNorm2d(8), GroupLasso, "coupled"),
        (nn.BatchNorm2d(8), partial(GroupLasso, groups="input"), "proximal"),
        (nn.BatchNorm2d(8), partial(GroupLasso, select="5.weight"), "proximal"),
        (nn.BatchNorm2d(8), L1, "proximal"),
    ],
)
def test_other_groups_norms_and_modes_do_not_warn(norm, penalty, mode):
    model = convolutions(norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RegularizedOptimizer(sgd(model), penalty(model, 1e-3), mode)


@direct_modes
def test_the_penalty_in_the_loss_and_in_the_optimizer_at_once_warns_once(mode):
    model = network()
    penalty = L1(model, 0.1)
    optimizer = RegularizedOptimizer(sgd(model), penalty, mode)
    with pytest.warns(UserWarning, match="counts double") as record:
        train(model, optimizer, steps=3, extra=penalty)
    assert len(record) == 1
    assert record[0].filename.endswith("nets.py")  # the line that called step()


def test_a_part_of_a_sum_in_the_loss_counts_double_too():
    model = network()
    part = L1(model, 0.1)
    optimizer = RegularizedOptimizer(sgd(model), part + L2(model, 0.1))
    with pytest.warns(UserWarning, match="counts double"):
        train(model, optimizer, steps=1, extra=part)


@direct_modes
def test_looking_at_the_value_of_the_penalty_does_not_warn(mode):
    model = network()
    penalty = L1(model, 0.1)
    optimizer = RegularizedOptimizer(sgd(model), penalty, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, steps=2, extra=lambda: penalty().detach())


def test_a_penalty_in_the_loss_before_the_optimizer_took_it_warns_not():
    model = network()
    penalty = L1(model, 0.1)
    train(model, sgd(model), steps=2, extra=penalty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, RegularizedOptimizer(sgd(model), penalty), steps=2)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_momentum_of_1_is_refused_where_the_step_depends_on_it(make, mode):
    w = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"momentum=1 .* below 1, metric='euclidean'"):
        RegularizedOptimizer(make([w], lr=0.1, momentum=1.0), L1([w], 0.1), mode)
    optimizer = RegularizedOptimizer(make([w], lr=0.1, momentum=0.9), L1([w], 0.1), mode)
    optimizer.param_groups[0]["momentum"] = 1.5
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        optimizer.step()
    for kwargs in ({"mode": "coupled"}, {"mode": mode, "metric": "euclidean"}):
        RegularizedOptimizer(make([w], lr=0.1, momentum=1.0), L1([w], 0.1), **kwargs).step()
