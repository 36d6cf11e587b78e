"""`p + q`: value, gradient, and above all the prox, which is not that of one after that of the other in general."""

import itertools

import pytest
import torch
from helpers.kinds import BASIC, OMEGA
from helpers.oracles import assert_minimal, proximal_objective, scalar_minimiser
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from torch_regpen import L0, L1, L2, ElasticNet, GroupLasso, Penalty, RegularizedOptimizer

LAM = {"L1": 0.2, "L2": 0.35, "ElasticNet": 0.15, "GroupLasso": 0.25}
PAIRS = [*itertools.product(BASIC, BASIC)]
TRIPLES = [*itertools.permutations(["L1", "GroupLasso", "L2"]), ("ElasticNet", "GroupLasso", "L1")]


def total(kinds, params):
    penalty = BASIC[kinds[0]](params, LAM[kinds[0]])
    for kind in kinds[1:]:
        penalty = penalty + BASIC[kind](params, LAM[kind])
    return penalty


def definition(kinds):
    return lambda w: sum(LAM[kind] * OMEGA[kind](w) for kind in kinds)


def applied_prox(make, w, step):
    w = w.clone().requires_grad_()
    make([w]).prox_(step)
    return w.detach()


# As a penalty


def test_a_sum_is_a_penalty_and_has_its_parts():
    model = nn.Linear(3, 2)
    p, q, r = L1(model, 0.1), GroupLasso(model, 0.2), L2(model, 0.3)
    both = p + q
    assert isinstance(both, Penalty)
    assert list(both.penalties) == [p, q]
    for three in (p + q + r, p + (q + r), sum([p, q, r])):
        assert isinstance(three, Penalty)
        assert list(three.penalties) == [p, q, r]
    assert sum([p]) is p


@pytest.mark.parametrize("other", [3, 0.0, None, torch.ones(()), "L1", nn.Linear(3, 2)], ids=repr)
def test_only_penalties_add_up(other):
    with pytest.raises(TypeError):
        L1(nn.Linear(3, 2), 0.1) + other
    with pytest.raises(TypeError):
        other + L1(nn.Linear(3, 2), 0.1)


def test_lambda_is_read_and_set_on_the_parts():
    model = nn.Linear(3, 2)
    both = L1(model, 0.1) + L2(model, 0.2)
    with pytest.raises(AttributeError, match="penalties"):
        both.lam  # noqa: B018
    with pytest.raises(AttributeError, match="penalties"):
        both.lam = 0.5
    both.penalties[1].lam = 0.5
    expected = 0.1 * model.weight.abs().sum() + 0.5 * model.weight.square().sum()
    torch.testing.assert_close(both(), expected)
    assert [group["lam"] for group in both.param_groups] == [0.1, 0.5]


def test_parts_on_different_parameters():
    first, second = nn.Linear(3, 2), nn.Linear(2, 1, dtype=torch.float64)
    both = L1(first, 0.1) + L2([("w", second.weight)], 0.2)
    expected = 0.1 * first.weight.abs().sum() + 0.2 * second.weight.square().sum()
    assert both().dtype == torch.float64
    torch.testing.assert_close(both(), expected)
    assert [name for name, _ in both.named_parameters_penalized()] == ["weight", "w"]


def test_a_parameter_of_several_parts_is_named_once():
    model = nn.Linear(3, 2)
    both = L1(model, 0.1, select="all") + L2(model, 0.2)
    assert [name for name, _ in both.named_parameters_penalized()] == ["weight", "bias"]


@pytest.mark.parametrize("kinds", [*PAIRS, *TRIPLES], ids="+".join)
def test_value_and_gradient_add_up(kinds, device):
    w = torch.randn(3, 4, dtype=torch.float64, device=device)
    w[1] = 0
    w.requires_grad_()
    penalty = total(kinds, [w])
    expected = definition(kinds)(w.clone())
    torch.testing.assert_close(penalty(), expected)
    alive = w.detach()[[0, 2]].requires_grad_()
    (gradient,) = torch.autograd.grad(definition(kinds)(alive), alive)
    penalty().backward()
    torch.testing.assert_close(w.grad[[0, 2]], gradient)
    assert not w.grad[1].any()
    penalty.add_grad_()
    torch.testing.assert_close(w.grad[[0, 2]], 2 * gradient)


def test_gradcheck_of_a_sum():
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    penalty = total(("L1", "GroupLasso", "L2"), [w])
    assert torch.autograd.gradcheck(lambda _: penalty(), w)
    assert torch.autograd.gradgradcheck(lambda _: penalty(), w)


def test_repr_and_summary_show_each_part():
    model = nn.Linear(3, 2)
    both = L1(model, 0.125) + GroupLasso(model, 0.25)
    for shown in ("L1", "GroupLasso", "0.125", "0.25"):
        assert shown in repr(both)
        assert shown in both.summary()


def test_restricted_to_an_optimizer_keeps_the_parts_that_it_owns():
    first, second = nn.Linear(3, 2), nn.Linear(2, 1)
    p, q = L1(first, 0.1), L2(second, 0.2)
    of_all = L1(nn.ModuleList([first, second]), 0.3)
    half = (p + q + of_all).restricted_to(torch.optim.SGD(second.parameters(), lr=0.1))
    torch.testing.assert_close(half(), 0.2 * second.weight.square().sum() + 0.3 * second.weight.abs().sum())
    q.lam = 1.0
    torch.testing.assert_close(half(), second.weight.square().sum() + 0.3 * second.weight.abs().sum())


# The prox


@pytest.mark.parametrize("kinds", list(itertools.product(["L1", "L2", "ElasticNet"], repeat=2)), ids="+".join)
@given(w=st.floats(-5, 5), step=st.one_of(st.sampled_from([0.0, 1e-6, 1e6]), st.floats(0, 5)))
def test_prox_over_elements_is_the_minimiser_on_a_fine_grid(kinds, w, step):
    def on_grid(v):
        linear = {"L1": (1, 0), "L2": (0, 1), "ElasticNet": (0.3, 0.7)}
        omega = sum(LAM[kind] * (linear[kind][0] * v.abs() + linear[kind][1] * v**2) for kind in kinds)
        return 0.5 * (v - w) ** 2 + step * omega

    v = applied_prox(lambda params: total(kinds, params), torch.tensor([w], dtype=torch.float64), step)[0]
    best = scalar_minimiser(on_grid, abs(w) + 1e-100)
    assert abs(v - best) <= 1e-7 * abs(w) + 1e-100


@pytest.mark.parametrize("kinds", [*PAIRS, *TRIPLES], ids="+".join)
@pytest.mark.parametrize("step", [1e-3, 0.4, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_nothing_near_the_prox_of_a_sum_is_better(kinds, step, dtype, device):
    w = torch.randn(2, 3, dtype=dtype, device=device) * 2
    w[1] = 0.2
    w[0, 1] = 0
    v = applied_prox(lambda params: total(kinds, params), w, step)
    assert_minimal(lambda x: proximal_objective(definition(kinds), x, w, step), v)


@pytest.mark.parametrize("kinds", TRIPLES, ids="+".join)
@pytest.mark.parametrize("step", [0.1, 1.0])
def test_prox_of_a_sum_is_where_a_general_minimiser_ends(kinds, step):
    w = torch.tensor([[1.5, -0.4, 0.1]], dtype=torch.float64)

    def objective(v):
        return proximal_objective(definition(kinds), torch.tensor(v[None]), w, step).item()

    starts = [w[0].numpy(), 0.5 * w[0].numpy(), w[0].numpy() * 0]
    ends = [minimize(objective, start, method="Powell", options={"xtol": 1e-10, "ftol": 1e-15}) for start in starts]
    best = min(ends, key=lambda end: end.fun)
    v = applied_prox(lambda params: total(kinds, params), w, step)
    assert objective(v[0].numpy()) <= best.fun + 1e-12
    torch.testing.assert_close(v[0], torch.tensor(best.x), rtol=1e-4, atol=1e-4)


def test_prox_is_that_of_the_sum_in_any_order_of_writing(device):
    w = torch.randn(4, 5, dtype=torch.float64, device=device)
    results = [
        applied_prox(lambda params, kinds=kinds: total(kinds, params), w, 0.5)
        for kinds in itertools.permutations(["L1", "GroupLasso", "L2", "ElasticNet"])
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("off", ["L1", "GroupLasso", "L2"])
def test_prox_of_a_sum_of_which_a_part_is_off(off):
    w = torch.randn(3, 4, dtype=torch.float64)
    kinds = ["L1", "GroupLasso", "L2"]

    def make(params):
        penalty = total(kinds, params)
        penalty.penalties[kinds.index(off)].lam = 0
        return penalty

    left = [kind for kind in kinds if kind != off]
    torch.testing.assert_close(applied_prox(make, w, 0.5), applied_prox(lambda params: total(left, params), w, 0.5))


def test_prox_of_parts_that_share_only_some_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    first, second = (layer.weight.detach().clone() for layer in model)
    bias = model[0].bias.detach().clone()
    (L1(model, 0.2, select="all") + GroupLasso(model[0], 0.25)).prox_(0.5)
    torch.testing.assert_close(
        model[0].weight.detach(), applied_prox(lambda params: L1(params, 0.2) + GroupLasso(params, 0.25), first, 0.5)
    )
    torch.testing.assert_close(model[1].weight.detach(), applied_prox(lambda params: L1(params, 0.2), second, 0.5))
    torch.testing.assert_close(model[0].bias.detach(), applied_prox(lambda params: L1(params, 0.2), bias, 0.5))


def test_a_penalty_twice_counts_twice():
    w = torch.randn(3, 4, dtype=torch.float64)
    for kind in BASIC.values():
        twice = applied_prox(lambda params, kind=kind: kind(params, 0.1) + kind(params, 0.1), w, 0.5)
        torch.testing.assert_close(twice, applied_prox(lambda params, kind=kind: kind(params, 0.2), w, 0.5))


def test_l1_and_l2_are_the_elastic_net():
    w = torch.randn(3, 4, dtype=torch.float64)
    ours = applied_prox(lambda params: L1(params, 0.15) + L2(params, 0.35), w, 0.7)
    assert torch.equal(ours == 0, applied_prox(lambda params: ElasticNet(params, 0.5, l1_ratio=0.3), w, 0.7) == 0)
    torch.testing.assert_close(ours, applied_prox(lambda params: ElasticNet(params, 0.5, l1_ratio=0.3), w, 0.7))


def test_a_sum_without_a_closed_form_says_so_and_has_value_and_gradient():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    overlapping = GroupLasso([w], 0.1) + GroupLasso([w], 0.2, groups="input")
    before = w.detach().clone()
    with pytest.raises(ValueError, match="closed form"):
        overlapping.prox_(0.1)
    assert torch.equal(w.detach(), before)
    with pytest.raises(ValueError, match="closed form"):
        RegularizedOptimizer(torch.optim.SGD([w], lr=0.1), overlapping, mode="proximal")
    torch.testing.assert_close(overlapping(), 0.1 * OMEGA["GroupLasso"](w) + 0.2 * OMEGA["GroupLasso"](w.T))
    w.grad = torch.zeros_like(w)
    overlapping.add_grad_()
    (expected,) = torch.autograd.grad(overlapping(), w)
    torch.testing.assert_close(w.grad, expected)
    RegularizedOptimizer(torch.optim.SGD([w], lr=0.1), overlapping, mode="coupled").step()


def test_groups_that_are_the_same_by_another_name_add_up():
    w = torch.randn(3, 4, dtype=torch.float64)
    for groups in ("output", 0):
        twice = applied_prox(
            lambda params, g=groups: GroupLasso(params, 0.1) + GroupLasso(params, 0.1, groups=g), w, 0.5
        )
        torch.testing.assert_close(twice, applied_prox(lambda params: GroupLasso(params, 0.2), w, 0.5))


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal"])
def test_a_list_given_to_the_optimizer_is_the_sum(mode):
    torch.manual_seed(0)
    start = torch.randn(3, 4, dtype=torch.float64)
    results = []
    for combine in (lambda parts: parts, tuple, sum, lambda parts: [parts[0] + parts[1], parts[2]]):
        w = start.clone().requires_grad_()
        parts = [L1([w], 0.2), GroupLasso([w], 0.25), L2([w], 0.35)]
        optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=0.5), combine(parts), mode=mode)
        w.grad = torch.ones_like(w)
        optimizer.step()
        results.append(w.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    assert not torch.equal(results[0], start - 0.5)


def test_where_no_gradient_is_known_a_sum_without_prox_names_a_way_that_works():
    model = nn.Linear(4, 4)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    zeroing, other = L0(model, 0.1), L2(model, 0.2)
    with pytest.raises(ValueError, match=r"give each its own mode.*'proximal'.*'decoupled'"):
        RegularizedOptimizer(plain, zeroing + other, "proximal")
    RegularizedOptimizer(plain, [(zeroing, "proximal"), (other, "decoupled")])
