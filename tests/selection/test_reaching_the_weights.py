"""Penalties as a part of a model, under torch.func and weight_norm; zeros by name."""

import copy
import gc
import weakref

import pytest
import torch
from helpers.kinds import l1
from helpers.nets import Classifier
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils import parametrizations

from torch_regpen import L1, L2, GroupLasso, Penalty, RegularizedOptimizer
from torch_regpen.export import dead_units

# torch.func


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.penalty = L1(self.net, 0.5)

    def forward(self, x):
        return self.net(x).square().mean() + self.penalty()


def test_a_penalty_outside_of_what_is_differentiated_is_refused():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    penalty = L1(model, 0.5)
    params = dict(model.named_parameters())

    def loss(params):
        return functional_call(model, params, (x,)).square().mean() + penalty()

    for transform in (grad(loss), hessian(loss), lambda p: jvp(loss, (p,), (p,))):
        with pytest.raises(RuntimeError, match="part of the module"):
            transform(params)
    with pytest.raises(RuntimeError, match="part of the module"):
        vmap(grad(loss))({name: p.detach().expand(2, *p.shape) for name, p in params.items()})


def test_inside_of_the_module_that_is_called_it_is_differentiated():
    model, x = Loss(), torch.randn(5, 4)
    params = dict(model.named_parameters())
    found = grad(lambda params: functional_call(model, params, (x,)))(params)["net.weight"]
    model(x).backward()
    torch.testing.assert_close(found, model.net.weight.grad)
    assert vmap(lambda x: functional_call(model, params, (x,)))(x[:, None]).shape == (5,)  # nothing is differentiated


# As a part of a model


def test_in_a_sequential_it_hands_its_input_on():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(2, 4)
    expected = model(x)
    model.penalty = L1(model, 0.5)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.penalty().detach(), 0.5 * l1(model[0].weight))


def test_scripting_is_refused_with_a_way_out():
    model = Classifier()
    scripted = torch.jit.script(model)
    with pytest.raises(TypeError, match="the module that was scripted"):
        L1(scripted, 0.1)
    penalty = L1(model, 1.0)
    penalty.prox_(0.1)  # the two share their parameters
    assert torch.equal(scripted.fc.weight, model.fc.weight)
    model.penalty = penalty
    with pytest.raises(TypeError, match="take the penalty out"):
        torch.jit.script(model)


def test_a_model_is_freed_with_its_penalty_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        model = Classifier()
        penalty = L1(model, 0.1) + GroupLasso(model, 0.1)
        penalty().backward()
        penalty.prox_(0.1)
        gone = weakref.ref(model)
        del model, penalty
        assert gone() is None
    finally:
        gc.enable()


# Centers


def test_a_center_that_is_not_the_one_that_was_saved_is_refused():
    model = Classifier()
    penalty = L2(model, 1.0, center="initial")
    begun = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.fc.weight += 1
    value = penalty().item()
    saved, trained = penalty.state_dict(), model.state_dict()

    resumed = Classifier()
    resumed.load_state_dict(trained)
    with pytest.raises(ValueError, match="a different center"):
        L2(resumed, 1.0, center="initial").load_state_dict(saved)
    again = L2(resumed, 0.1, center=begun)
    again.load_state_dict(saved)
    assert again().item() == pytest.approx(value)


def test_the_summary_counts_what_is_at_its_center():
    layer = nn.Linear(4, 2)
    penalty = L1(layer, 1.0, center="initial")
    with torch.no_grad():
        layer.weight[0] += 1
    assert "4/8" in penalty.summary()
    groups = GroupLasso(layer, 1.0, center={"weight": layer.weight.detach()})
    assert "8/8" in groups.summary()
    assert "2/2" in groups.summary()


# Weights under weight_norm


@pytest.mark.parametrize("dim", [0, 1, None])
def test_a_weight_under_weight_norm_becomes_zero_and_not_nan(dim):
    layer = parametrizations.weight_norm(nn.Linear(3, 2, bias=False), dim=dim)
    GroupLasso(layer, 10.0, groups="tensor").prox_(1.0)
    assert torch.equal(layer.weight, torch.zeros(2, 3))
    layer(torch.ones(1, 3)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("mode", ["decoupled", "proximal", "dual"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_training_under_weight_norm_shrinks_units_away_without_nan(mode, make):
    x = torch.randn(64, 5)
    y = x[:, :1] @ torch.ones(1, 3)
    layer = parametrizations.weight_norm(nn.Linear(5, 3))
    optimizer = RegularizedOptimizer(make(layer.parameters(), lr=0.05), GroupLasso(layer, 0.5), mode)
    for _ in range(150):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    assert layer.weight.isfinite().all()
    dead = dead_units(layer).get("parametrizations.weight.original1", [])
    assert dead == (layer.weight == 0).all(1).nonzero().flatten().tolist()
    assert dead or mode == "decoupled"


def test_a_frozen_zero_under_weight_norm_stays_zero():
    x = torch.randn(64, 5)
    layer = parametrizations.weight_norm(nn.Linear(5, 3))
    optimizer = RegularizedOptimizer(torch.optim.Adam(layer.parameters(), lr=0.05), GroupLasso(layer, 0.5), "proximal")
    for step in range(150):
        optimizer.zero_grad()
        (layer(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
        if step == 100:
            optimizer.freeze_zeros()
            dead = (layer.weight == 0).all(1)
    assert dead.any()
    assert torch.equal((layer.weight == 0).all(1), dead)


# Lambda


def test_a_bad_lambda_is_refused_however_it_is_set():
    penalty = L1(Classifier(), 0.1)
    group = penalty.param_groups[0]
    for update in (
        lambda: group.update(lam=-1),
        lambda: group.update({"lam": float("nan")}),
        lambda: group.__ior__({"lam": -1}),
    ):
        with pytest.raises(ValueError, match="0 or more"):
            update()
    for lam in (1e300, 4e38):
        with pytest.raises(ValueError, match="finite in float32"):
            penalty.lam = lam
    assert penalty.lam == 0.1


def test_a_number_times_a_penalty_is_the_same_with_lambda_scaled():
    model = Classifier()
    for penalty in (L1(model, 0.2), L1(model, 0.2) + L2(model, 0.4)):
        for scaled in (0.5 * penalty, penalty * 0.5):
            assert isinstance(scaled, Penalty)
            torch.testing.assert_close(scaled(), 0.5 * penalty())
    penalty = L1(model, 0.2)
    scaled = 0.5 * penalty
    penalty.lam = 3.0
    assert scaled.lam == 0.1
    with pytest.raises(TypeError):
        penalty * "2"
    with pytest.raises(ValueError, match="0 or more"):
        -1.0 * penalty


def test_positive_without_a_prox_is_refused():
    w = nn.Parameter(torch.randn(3, 2))
    penalty = L1([w], 0.1, positive=True)
    for mode in ("coupled", "decoupled"):
        with pytest.raises(ValueError, match=r"positive=True.*proximal"):
            RegularizedOptimizer(torch.optim.SGD([w], lr=0.1), penalty, mode)
    with pytest.raises(ValueError, match="positive=True"):
        penalty().backward()
    w.grad = torch.zeros_like(w)
    with pytest.raises(ValueError, match="positive=True"):
        penalty.add_grad_()
    penalty.prox_(0.1)
    assert (w >= 0).all()


# Zeros, by name and in all


def test_sparsity_and_totals_count_each_element_once():
    model = Classifier()
    with torch.no_grad():
        model.fc.weight[0] = 0
        model.body[0].weight[:, 1] = 0
    penalty = L1(model, 0.1) + GroupLasso(model, 0.1)
    zeros, elements = 8 + 8, 24 + 32
    assert penalty.sparsity().item() == pytest.approx(zeros / elements)
    total = penalty.summary().splitlines()[-1].split()
    assert total[0] == "total"
    assert total[2:] == [f"{zeros}/{elements}", "1/11"]
    assert float(total[1]) == pytest.approx(penalty().item(), rel=1e-4)
    with torch.device("meta"):
        assert L1(Classifier(), 0.1).sparsity().is_meta  # nothing is read back


def test_sparsity_does_not_depend_on_the_default_dtype():
    layer = nn.Linear(400, 300)
    with torch.no_grad():
        layer.weight[150:] = 0
    torch.set_default_dtype(torch.float16)
    try:
        assert L1(layer, 0.1).sparsity() == 0.5
        assert L1(layer, 0.1).stationarity().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_zero_groups_are_named_by_what_the_penalty_groups():
    model = Classifier()
    with torch.no_grad():
        model.body[0].weight[:, 1] = 0
        model.fc.weight[2] = 1e-30  # its square is 0
        model.fc.weight[1] = 0
    assert GroupLasso(model, 0.1).zero_groups() == {"body.0.weight": [], "fc.weight": [1]}
    assert GroupLasso(model, 0.1, groups="input").zero_groups() == {"body.0.weight": [1], "fc.weight": []}
    assert L1(model, 0.1).zero_groups() == {}
    assert "1/3" in GroupLasso(model.fc, 0.1).summary()
