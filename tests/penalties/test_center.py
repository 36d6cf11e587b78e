"""center: penalties on the distance from given weights."""

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers import nets
from helpers.kinds import KINDS
from torch import nn
from torch.nn.utils import parametrize

from torch_regpen import L1, L2, MCP, GroupLasso, RegularizedOptimizer

EACH = pytest.mark.parametrize("kind", KINDS)
network = partial(nets.network, dtype=torch.float64, sizes=(3, 4, 2))


def moved(model, by=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p += by
    return model


# center


@EACH
def test_the_initial_weights_are_a_center(kind):
    model = network()
    penalty = KINDS[kind](model, 0.5, center="initial")
    assert penalty() == 0
    moved(model, 0.25)
    expected = 0.5 * (12 + 8) * KINDS[kind]([torch.zeros(1)], 1.0).rho(torch.tensor(0.25).double())
    torch.testing.assert_close(penalty().detach(), expected)


def test_a_state_dict_is_a_center_with_more_in_it_than_is_needed():
    model, pretrained = network(), moved(network(), 1.0)
    penalty = L2(model, 0.5, center=pretrained.state_dict())
    expected = sum((model[i].weight - pretrained[i].weight).square().sum() for i in (0, 2))
    torch.testing.assert_close(penalty(), 0.5 * expected)
    before = penalty().item()
    moved(pretrained)  # it has a copy
    assert penalty().item() == before


def test_a_name_missing_from_the_center_is_refused_and_so_is_another_shape():
    model = network()
    with pytest.raises(ValueError, match=r"center has nothing for parameter '2\.weight'"):
        L2(model, 0.5, center={"0.weight": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match=r"2\.weight.*shape"):
        L2(model, 0.5, center={"0.weight": torch.zeros(4, 3), "2.weight": torch.zeros(4, 2)})
    for wrong in ("pretrained", 3.0, [torch.zeros(4, 3)]):
        with pytest.raises(TypeError, match="center"):
            L2(model, 0.5, center=wrong)
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"2\.weight"):
        L2(model, 0.5, center={"0.weight": torch.zeros(4, 3)})


def test_centers_are_no_parameters_and_not_in_the_state_dict():
    model = network()
    without = L2(model, 0.5).state_dict()
    penalty = L2(model, 0.5, center="initial", weights={"0.weight": torch.ones(4, 3)})
    assert penalty.state_dict().keys() == without.keys()
    assert list(penalty.parameters()) == list(penalty.buffers()) == []
    model.penalty = penalty
    assert not any("center" in key for key in model.state_dict())


@EACH
def test_prox_and_decoupled_go_to_the_center_and_stop_there(kind):
    model = network()
    start = copy.deepcopy(model)
    penalty = KINDS[kind](model, 1.0, center="initial")
    moved(model, 1e-3)
    bias = model[0].bias.clone()
    penalty.prox_(50.0)
    if kind != "L2":
        assert torch.equal(model[0].weight, start[0].weight)
    assert torch.equal(model[0].bias, bias)
    if kind in ("L2", "L0"):
        return
    moved(model, 1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=50.0), penalty, "decoupled").step()
    torch.testing.assert_close(model[0].weight, start[0].weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal"])
def test_the_fixed_point_of_l2_sp(mode):
    """Of `1/2 (w - a)^2 + lam (w - c)^2`: `w = (a + 2 lam c) / (1 + 2 lam)`."""
    a, c, lam = torch.randn(3, 2).double(), torch.randn(3, 2).double(), 0.3
    w = nn.Parameter(c.clone())
    penalty = L2([w], lam, center="initial")
    optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=0.01 if mode == "decoupled" else 0.5), penalty, mode)
    for _ in range(2500 if mode == "decoupled" else 100):
        w.grad = w.detach() - a
        optimizer.step()
    tolerance = 5e-3 if mode == "decoupled" else 1e-12  # decoupled steps one after the other
    torch.testing.assert_close(w.detach(), (a + 2 * lam * c) / (1 + 2 * lam), atol=tolerance, rtol=0)
    w.grad = w.detach() - a
    assert penalty.stationarity() < 10 * tolerance


@pytest.mark.parametrize("cast", [False, True])
def test_decoupled_l2_sp_is_adamw_on_the_distance_from_the_center(cast):
    model = nn.Linear(4, 3, bias=False) if cast else nn.Linear(4, 3, bias=False).double()
    penalty = L2(model, 0.15, center="initial")
    model.double()  # the center stays in the dtype that it was taken in
    center = model.weight.detach().clone()
    distance = nn.Parameter(torch.zeros(3, 4).double())
    theirs = torch.optim.AdamW([distance], lr=0.1, weight_decay=0.3)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
    optimizer = RegularizedOptimizer(adamw, penalty, "decoupled")
    for _ in range(5):
        distance.grad = torch.randn(3, 4).double()
        distance.grad[0] = 0
        model.weight.grad = distance.grad.clone()
        theirs.step()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), center + distance.detach(), rtol=1e-13, atol=1e-13)
    assert torch.equal(model.weight[0], center[0])


def test_l1_around_a_center_is_sparse_in_what_has_moved():
    a, c = torch.randn(40).double(), torch.randn(40).double()
    w = nn.Parameter(c.clone())
    penalty = L1([("w", w)], 0.7, center={"w": c})
    optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=0.5), penalty, "proximal")
    for _ in range(100):
        w.grad = w.detach() - a
        optimizer.step()
    expected = c + (a - c).sign() * ((a - c).abs() - 0.7).clamp_min(0)
    torch.testing.assert_close(w.detach(), expected)
    still = (a - c).abs() < 0.7
    assert torch.equal(w.detach()[still], c[still])
    w.grad = w.detach() - a
    assert penalty.stationarity() < 1e-12


def test_copies_keep_their_centers():
    model = network()
    penalty = L2(model, 0.5, center="initial")
    moved(model)
    value = penalty().item()
    for other, of_other in (copy.deepcopy((model, penalty)), pickle.loads(pickle.dumps((model, penalty)))):
        assert of_other().item() == value
        moved(other, -0.1)
        assert of_other().item() < 1e-28
        assert penalty().item() == value


def test_centers_of_groups_whose_parameters_have_the_same_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    penalty = L2([{"params": model[0]}, {"params": model[1], "lam": 2.0}], 1.0, center="initial")
    assert penalty() == 0
    moved(model, 1.0)
    assert penalty().item() == pytest.approx(27)
    penalty = L2([("w", model[0].weight), ("w", model[1].weight)], 1.0, center="initial")
    assert penalty() == 0


def test_centers_follow_casts_wrappers_and_parametrizations():
    model = network()
    state = copy.deepcopy(model.state_dict())
    penalty = L2(model, 0.5, center="initial")
    moved(model, 0.25)
    expected = 0.5 * 20 / 16
    assert penalty().item() == pytest.approx(expected)
    model.half()
    assert penalty().item() == pytest.approx(expected, rel=1e-2)
    model.double()
    elsewhere = L2(copy.deepcopy(model).to("meta"), 0.5, center=state, weights={"0.weight": torch.ones(4, 3)})
    assert elsewhere().device.type == "meta"
    of_copy, copied = copy.deepcopy((penalty, model))
    copied.to("meta")
    assert of_copy().device.type == "meta"
    wrapped = nn.Module()
    wrapped.module = model
    prefixed = {f"module.{key}": value for key, value in state.items()}
    assert L2(wrapped, 0.5, center=state)().item() == pytest.approx(penalty().item())
    assert L2(wrapped, 0.5, center=prefixed)().item() == pytest.approx(penalty().item())
    assert L2(model, 0.5, center=prefixed)().item() == pytest.approx(penalty().item())

    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    before = penalty().item()
    parametrize.register_parametrization(model[0], "weight", Twice(), unsafe=True)
    assert penalty().item() == pytest.approx(before)
    assert L2(model, 0.5, center=state)().item() == pytest.approx(before)
    torch.nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match="center"):
        penalty()  # neither norm nor direction has one


def test_centers_and_weights_under_torch_func_and_compiled():
    model = network()
    penalty = MCP(model, 0.5, groups="output", center="initial", weights={"0.weight": torch.rand(4)})
    parameters = {name: p.detach() + 0.1 for name, p in model.named_parameters()}

    def value(parameters):
        return torch.func.functional_call(wrapper, parameters, ())

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return penalty()

    wrapper = Wrapper()
    parameters = {f"model.{name}": p for name, p in parameters.items()}
    gradients = torch.func.grad(value)(parameters)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    for name, g in torch.vmap(torch.func.grad(value))(stacked).items():
        torch.testing.assert_close(g[0], gradients[name])
    moved(model)
    compiled = torch.compile(lambda: penalty(), backend="eager", fullgraph=True)
    compiled().backward()
    torch.testing.assert_close(model[0].weight.grad, gradients["model.0.weight"])


def test_a_center_can_be_taken_only_of_what_is_there():
    model = nn.Sequential(nn.LazyLinear(3))
    penalty = L2(model, 0.5, center="initial")
    model(torch.randn(1, 2))
    with pytest.raises(ValueError, match=r"0\.weight.*center"):
        penalty()


def test_restricted_to_keeps_centers_and_weights():
    model = network()
    weights = {"2.weight": torch.full((2, 4), 3.0)}
    penalty = L2(model, 0.5, center="initial", weights=weights)
    part = penalty.restricted_to(torch.optim.SGD([model[2].weight], lr=0.1))
    moved(model, 1.0)
    assert part().item() == pytest.approx(0.5 * 3 * 8)


def test_sums_around_different_centers():
    model = network()
    one, other = L2(model, 0.5, center="initial"), L2(model, 0.25)
    w = model[0].weight.detach().clone()
    (one + other).prox_(0.4)
    torch.testing.assert_close(model[0].weight.detach(), (w + 0.4 * w) / (1 + 0.4 + 0.2))
    (L1(model, 0.1) + one).prox_(0.1)  # squares have a closed form around any center
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="different centers"):
        RegularizedOptimizer(sgd, L1(model, 0.1, center="initial") + L1(model, 0.1), "proximal")
    with pytest.raises(ValueError, match="different centers"):
        RegularizedOptimizer(sgd, GroupLasso(model, 0.1, center="initial", positive=True), "proximal")
