"""Bound: Lagrange multipliers that hold the mean of a penalty at or below a bound."""

import copy

import numpy as np
import pytest
import torch
from helpers.kinds import KINDS
from helpers.nets import assert_same, backward, network, set_gradients, train
from helpers.operations import Reads
from helpers.optimizers import adam, momentum, sgd, through_a_file, through_pickle
from helpers.problems import diabetes
from torch import nn

import torch_regpen
from torch_regpen import L1, L2, GroupLasso, RegularizedOptimizer, SparseGroupLasso
from torch_regpen.groups import Coupled
from torch_regpen.schedules import Bound, TargetSparsity


def per_step(*_):
    """The rate of a decay that the lr does not scale, as that of CPR."""
    return 1.0


def bounded(model, bound=0.01, make=adam, penalty=L2, mode="decoupled", lam=1.0, **options):
    decay = {"rate": per_step} if mode == "decoupled" else {}
    optimizer = RegularizedOptimizer(make(model), penalty(model, lam), mode, **decay)
    return optimizer, Bound(optimizer, bound, **options)


def run(model, optimizer, bound, steps, start=0):
    for i in range(start, start + steps):
        set_gradients(model, i)
        optimizer.step()
        bound.step()


# pytorch_cpr, side by side. It decays right after the update, and we before the next one: with the same gradients the
# weights are the same but for that last decay; gradients are taken before the decay here, and after it there.

VARIANTS = {
    "a number": ({"kappa_init_method": "uniform"}, {"bound": 0.02}),
    "initial": ({"kappa_init_method": "dependent", "kappa_init_param": 0.7}, {"bound": "initial", "factor": 0.7}),
    "warmup": ({"kappa_init_method": "warm_start", "kappa_init_param": 4}, {"bound": "warmup", "warmup": 4}),
}


@pytest.mark.parametrize("update", [1.0, 0.3])
@pytest.mark.parametrize(("kind", "foreach"), [("l2", False), ("l2", True), ("l1", False)])  # theirs is l2 at foreach
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_adamcpr_for_the_same_gradients(variant, kind, foreach, update):
    peer = pytest.importorskip("pytorch_cpr")
    theirs, ours = network(), network()
    settings, options = VARIANTS[variant]
    names = ["0.weight", "2.weight"]
    plains = []  # one for each tensor, since a kappa that is given is one for all, of a sum
    for name in names:
        w = theirs.get_parameter(name)
        kappa = settings if variant != "a number" else {**settings, "kappa_init_param": 0.02 * w.numel()}
        groups = [{"params": [w], "regularize": True}]
        plains.append(peer.AdamCPR(groups, lr=0.01, reg_function=kind, foreach=foreach, kappa_update=update, **kappa))
    optimizer, bound = bounded(ours, penalty={"l1": L1, "l2": L2}[kind], rate=update, **options)
    moved = 0
    for i in range(12):
        set_gradients(theirs, i)
        for plain in plains:
            plain.step()
        run(ours, optimizer, bound, 1, start=i)
        for name, plain in zip(names, plains, strict=True):
            p, q, m = theirs.get_parameter(name).detach(), ours.get_parameter(name).detach(), bound.multipliers[name]
            torch.testing.assert_close(m, plain.state[theirs.get_parameter(name)]["lagmul"][0], rtol=1e-4, atol=1e-6)
            decayed = q * (1 - 2 * m) if kind == "l2" else q - m * q.sign()
            torch.testing.assert_close(decayed, p, rtol=1e-4, atol=1e-6)
            moved += bool(m > 0)
            if kind == "l1" and (q.abs() <= m).any():  # theirs crosses zero from here on
                assert moved
                return
    assert moved > 1


def test_the_inflection_is_where_pytorch_cpr_finds_it():
    """It tracks the norm and we the mean square, whose growth is twice that: at a clear inflection both agree."""
    peer = pytest.importorskip("pytorch_cpr")
    time = np.arange(1, 2600)
    size = 1 + 9 / (1 + np.exp(-(time - 1200) / 250))  # of the weights: an S
    w, v = (torch.full((4, 4), float(size[0]), requires_grad=True) for _ in range(2))
    plain = peer.AdamCPR([{"params": [w], "regularize": True}], lr=0.0, foreach=True)
    optimizer = RegularizedOptimizer(torch.optim.SGD([v], lr=0.0), L2([v], 1.0), "decoupled", rate=lambda *_: 0.0)
    bound = Bound(optimizer, "inflection")
    (state,) = bound._state[0].values()
    found = {}
    for t, s in zip(time, size, strict=True):
        for x in (w, v):
            x.data.fill_(s)
            x.grad = torch.zeros_like(x)
        plain.step()
        optimizer.step()
        bound.step()
        if plain.state[w]["kappa"] < 1e6:
            found.setdefault("theirs", t)
        if state["bound"].isfinite():
            found.setdefault("ours", t)
            assert state["bound"] == pytest.approx(size[found["ours"] - 1] ** 2, rel=1e-5)
        if len(found) == 2:
            break
    assert found["ours"] % 200 == 0
    assert abs(found["ours"] - found["theirs"]) <= 200


# Convex problems: the constrained optimum, with the multiplier as the dual variable


@pytest.mark.parametrize("mode", ["proximal", "coupled"])
def test_the_lasso_with_a_constraint_has_the_lambda_of_scikit_learn(mode):
    """The bound is the size of a Lasso solution: the multiplier is found to be its alpha, and the weights are its."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    problem = diabetes()
    x, y = problem.x, problem.y.ravel()
    alpha = 0.06
    expected = linear_model.Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x, y).coef_
    curvature = np.linalg.eigvalsh(x.T @ x / len(x)).max()
    lr = 0.5 / curvature if mode == "proximal" else 0.002
    optimizer = RegularizedOptimizer(torch.optim.SGD(problem.model.parameters(), lr=lr), L1(problem.model, 1.0), mode)
    bound = Bound(optimizer, float(np.abs(expected).mean()), rate=0.1 if mode == "proximal" else 0.02)
    for _ in range(3000 if mode == "proximal" else 5000):
        problem.train(optimizer, 1)
        bound.step()
    tolerance = 1e-6 if mode == "proximal" else 0.01
    (multiplier,) = bound.multipliers.values()
    assert float(multiplier) == pytest.approx(alpha, rel=tolerance)
    np.testing.assert_allclose(problem.weight.ravel(), expected, atol=tolerance)


@pytest.mark.parametrize("kind", ["L2", "GroupLasso"])
def test_the_multiplier_is_the_dual_variable_of_cvxpy(kind):
    cp = pytest.importorskip("cvxpy")
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, k, generator=generator, dtype=torch.float64) for k in (5, 4))
    v = cp.Variable((4, 5))  # as a Linear has it: a row for each output
    omega = cp.sum_squares(v) if kind == "L2" else 5**0.5 * cp.sum(cp.norm(v, axis=1))
    limit = 0.1 if kind == "L2" else 1.0
    constraint = omega <= limit
    cp.Problem(cp.Minimize(cp.sum_squares(x.numpy() @ v.T - y.numpy()) / 120), [constraint]).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    layer = nn.Linear(5, 4, bias=False).double()
    penalty = L2(layer, 2.0) if kind == "L2" else GroupLasso(layer, 2.0)
    optimizer = RegularizedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.5), penalty, "proximal")
    bound = Bound(optimizer, limit / 20, rate=2.0)
    for _ in range(1500):
        optimizer.zero_grad()
        ((layer(x) - y).square().sum() / 120).backward()
        optimizer.step()
        bound.step()
    (multiplier,) = bound.multipliers.values()
    assert 2.0 * float(multiplier) == pytest.approx(np.asarray(constraint.dual_value).item(), rel=1e-4)
    np.testing.assert_allclose(layer.weight.detach().numpy(), v.value, atol=1e-5)


# Its definition, for each penalty


def omegas(kind, w):
    penalty = KINDS[kind]([w], 1.0) if kind in KINDS else getattr(torch_regpen, kind)([w], 1.0)
    return penalty().item() / w.numel()


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal"])
@pytest.mark.parametrize("kind", ["L1", "L2", "MCP", "GroupLasso", "SparseGroupLasso", "NuclearNorm"])
def test_a_step_is_one_at_lambda_times_the_multiplier(device, mode, kind):
    make = KINDS.get(kind) or getattr(torch_regpen, kind)
    ours = network(device, torch.float64)
    optimizer = RegularizedOptimizer(sgd(ours), make(ours, 0.3), mode)
    bound = Bound(optimizer, 0.05, rate=0.4)
    expected, m = network(device, torch.float64), {"0.weight": 0.0, "2.weight": 0.0}
    for i in range(4):
        parts = [make(expected.get_submodule(n[0]), 0.3 * m[n]) for n in m]
        reference = RegularizedOptimizer(sgd(expected), parts, mode)
        set_gradients(ours, i)
        set_gradients(expected, i)
        optimizer.step()
        bound.step()
        reference.step()
        assert_same(ours, expected, 1e-10)
        for n in m:
            m[n] = max(0.0, m[n] + 0.4 * (omegas(kind, expected.get_parameter(n).detach()) - 0.05))
            assert bound.multipliers[n].item() == pytest.approx(m[n], abs=1e-12)
    assert all(m.values())


@pytest.mark.parametrize("make", [momentum, adam])
@pytest.mark.parametrize("mode", ["decoupled", "proximal"])
@pytest.mark.parametrize("penalty", [L1, L2])
def test_the_mean_of_each_tensor_is_held_at_its_bound(mode, penalty, make):
    model = network()
    weights = [model[0].weight, model[2].weight]
    targets = [3 * w.detach() for w in weights]
    options = {"factor": 0.6, "rate": 0.02 if mode == "decoupled" else 0.3}
    optimizer, bound = bounded(model, "initial", lambda m: make(m, lr=0.01), penalty, mode, **options)
    start = [omegas(penalty.__name__, w.detach()) for w in weights]
    for _ in range(700):
        optimizer.zero_grad()
        sum((w - target).square().sum() for w, target in zip(weights, targets, strict=True)).mul(0.5).backward()
        optimizer.step()
        bound.step()
    for w, value in zip(weights, start, strict=True):
        assert omegas(penalty.__name__, w.detach()) == pytest.approx(0.6 * value, rel=0.05)


def test_while_a_tensor_is_below_its_bound_it_takes_the_bare_step():
    bare, ours = network(), network()
    train(bare, adam(bare), steps=3)
    optimizer, bound = bounded(ours, 100.0)
    for _ in range(3):
        train(ours, optimizer, steps=1)
        bound.step()
    assert all(m == 0 for m in bound.multipliers.values())
    assert_same(ours, bare)


def test_multipliers_begin_to_move_after_the_warmup():
    model = network()
    optimizer, bound = bounded(model, 0.0, warmup=3)
    for i in range(5):
        run(model, optimizer, bound, 1, start=i)
        assert (bound.multipliers["0.weight"] > 0) == (i >= 3)


def test_parts_of_a_sum_and_tensors_have_multipliers_of_their_own():
    model = network()
    pairs = [(L2(model, 1.0), "decoupled"), (L1(model, 1.0), "proximal")]
    optimizer = RegularizedOptimizer(adam(model), pairs)
    bound = Bound(optimizer, "initial", factor=0.5)
    run(model, optimizer, bound, 3)
    found = [float(m) for multipliers in bound.multipliers for m in multipliers.values()]
    assert len({*found}) == 4


def test_weights_and_centers_count_in_the_mean():
    model = network(dtype=torch.float64)
    center = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    factors = {"0.weight": torch.rand(6, 5)}
    optimizer = RegularizedOptimizer(sgd(model), L1(model, 0.5, center=center, weights=factors), "proximal")
    bound = Bound(optimizer, 0.1)
    run(model, optimizer, bound, 1)
    mean = (factors["0.weight"].double() * (model[0].weight - 1).abs()).mean()
    assert float(bound.multipliers["0.weight"]) == pytest.approx(float(mean) - 0.1)
    before = model[0].weight.detach().clone()
    run(model, optimizer, bound, 1, start=1)
    t = 0.1 * 0.5 * factors["0.weight"].double() * (float(mean) - 0.1)
    x = before - 0.1 * model[0].weight.grad - 1
    torch.testing.assert_close(model[0].weight.detach(), 1 + x.sign() * (x.abs() - t).clamp_min(0))


def test_units_that_span_tensors_have_one_multiplier():
    model = network(sizes=(5, 6, 3))
    groups = Coupled(model, torch.zeros(1, 5))
    penalty = GroupLasso(model, 1.0, groups=groups)
    optimizer = RegularizedOptimizer(adam(model), penalty, "proximal")
    bound = Bound(optimizer, "initial", factor=0.5)
    run(model, optimizer, bound, 20)
    assert len(bound.multipliers) == len(penalty.terms())
    assert all(m > 0 for m in bound.multipliers.values())


def test_sharded_tensors_have_the_multipliers_of_whole_ones(one_rank):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    def shard(_, module, mesh):
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))

    for penalty in (L2, GroupLasso, SparseGroupLasso):
        whole, sharded = network(), distribute_module(network(), one_rank, shard)
        a, b = bounded(whole, penalty=penalty), bounded(sharded, penalty=penalty)
        for i in range(3):
            set_gradients(whole, i)
            for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
                p.grad = distribute_tensor(q.grad.clone(), one_rank, [Shard(0)])
            for optimizer, bound in (a, b):
                optimizer.step()
                bound.step()
        for name, m in a[1].multipliers.items():
            torch.testing.assert_close(m, b[1].multipliers[name])
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q)


# Parameters that rest


def test_parameters_without_a_gradient_keep_their_multiplier():
    model = network()
    optimizer, bound = bounded(model, 0.0)
    set_gradients(model, 0)
    model[0].weight.grad = None
    optimizer.step()
    bound.step()
    assert bound.multipliers["0.weight"] == 0
    assert bound.multipliers["2.weight"] > 0


def test_gradients_that_are_gone_already_make_no_difference():
    a, b = network(), network()
    (first, one), (second, two) = bounded(a), bounded(b)
    set_gradients(a, 0)
    set_gradients(b, 0)
    first.step()
    second.step()
    second.zero_grad()
    one.step()
    two.step()
    assert one.multipliers == two.multipliers


def test_frozen_parameters_wait_with_their_initial_bound():
    model = network()
    model[0].weight.requires_grad_(False)
    _, bound = bounded(model, "initial", factor=0.5)
    assert "0.weight" in bound.multipliers
    expected = 0.5 * model[0].weight.square().mean()
    model[0].weight.requires_grad_(True)
    torch.testing.assert_close(bound._state[0]["0.weight"]["bound"], expected.detach())


def test_while_zeros_are_frozen_multipliers_rest():
    model = network()
    optimizer, bound = bounded(model, 0.0, penalty=L1, mode="proximal", lam=0.01)
    run(model, optimizer, bound, 2)
    optimizer.freeze_zeros()
    before = copy.deepcopy(bound.multipliers)
    run(model, optimizer, bound, 2)
    assert bound.multipliers == before


# State


@pytest.mark.parametrize(
    "options", [{"bound": 0.01}, {"bound": "warmup", "warmup": 2, "factor": 0.9}, {"bound": "inflection"}]
)
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(options):
    expected = network()
    optimizer, bound = bounded(expected, **options)
    run(expected, optimizer, bound, 4)
    saved = through_a_file((expected.state_dict(), optimizer.state_dict(), bound.state_dict()))
    run(expected, optimizer, bound, 4, start=4)
    model = network()
    optimizer, bound = bounded(model, **options)
    for thing, state in zip((model, optimizer, bound), saved, strict=True):
        thing.load_state_dict(state)
    run(model, optimizer, bound, 4, start=4)
    assert_same(model, expected)


def test_a_saved_state_does_not_move_with_the_training():
    model = network()
    optimizer, bound = bounded(model, 0.0)
    saved = bound.state_dict()
    run(model, optimizer, bound, 2)
    assert saved["tensors"][0]["0.weight"]["multiplier"] == 0


def test_a_state_of_other_tensors_is_refused():
    _, bound = bounded(network())
    _, other = bounded(network(sizes=(5, 6, 6, 3)))
    with pytest.raises(ValueError, match="multipliers for"):
        bound.load_state_dict(other.state_dict())
    _, other = bounded(network(), "inflection")
    for one, state in ((bound, other.state_dict()), (other, bound.state_dict())):
        with pytest.raises(ValueError, match="does not belong to bound="):
            one.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_go_on_by_themselves(copied):
    model = network()
    optimizer = RegularizedOptimizer(adam(model), L2(model, 1.0), "proximal")
    bound = Bound(optimizer, 0.01)
    run(model, optimizer, bound, 2)
    others = copied((model, optimizer, bound))
    run(model, optimizer, bound, 3, start=2)
    run(*others, 3, start=2)
    assert_same(others[0], model)


def test_nothing_is_read_back(device):
    bare, model = network(device), network(device)
    plain, (optimizer, bound) = sgd(bare), bounded(model, make=sgd)
    for options in ({"bound": 0.01}, {"bound": "inflection"}, {"bound": "warmup", "warmup": 2}):
        bound = Bound(optimizer, **options)
        for i in range(4):
            set_gradients(bare, i)
            set_gradients(model, i)
            with Reads() as expected:
                plain.step()
            with Reads() as reads:
                optimizer.step()
                bound.step()
            assert reads.found == expected.found


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal"])
@pytest.mark.parametrize("penalty", [L1, L2, GroupLasso])
def test_it_works_on_the_meta_device_where_no_value_can_be_read(mode, penalty):
    model = network("meta")
    optimizer, bound = bounded(model, "initial", penalty=penalty, mode=mode)
    bound = Bound(optimizer, "inflection")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        bound.step()


def test_the_loss_that_a_closure_returns_has_the_multipliers_in_it():
    model = network()
    optimizer, bound = bounded(model, 0.0, sgd, mode="coupled")
    run(model, optimizer, bound, 2)
    plain = backward(model).item()
    m = bound.multipliers
    value = sum(m[n] * model.get_parameter(n).square().sum() for n in m).item()
    assert optimizer.step(lambda: backward(model)).item() == pytest.approx(plain + value)


# Refusals


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        (("largest",), {}, ValueError, "bound must be a number, 0 or more, or one of"),
        ((-0.1,), {}, ValueError, "bound must be a number"),
        ((None,), {}, TypeError, "bound must be a number, or one of"),
        ((True,), {}, TypeError, "bound must be a number"),
        ((float("inf"),), {}, ValueError, "bound must be finite"),
        (("warmup",), {}, ValueError, "give warmup="),
        ((0.1,), {"warmup": -1}, ValueError, "warmup must be a whole number"),
        ((0.1,), {"warmup": 2.0}, ValueError, "warmup must be a whole number"),
        (("initial",), {"factor": 0}, ValueError, "factor must be more than 0"),
        ((0.5,), {"factor": 0.5}, ValueError, "give bound=0.25"),
        ((0.1,), {"rate": 0.0}, ValueError, "rate must be more than 0"),
        ((0.1,), {"rate": "fast"}, TypeError, "rate must be a number"),
    ],
)
def test_bad_arguments_are_refused_at_construction(args, options, error, text):
    model = network()
    optimizer = RegularizedOptimizer(sgd(model), L2(model, 1.0), "decoupled")
    with pytest.raises(error, match=text):
        Bound(optimizer, *args, **options)


def test_other_optimizers_and_modes_are_refused_with_the_way_out():
    model = network()
    with pytest.raises(TypeError, match="RegularizedOptimizer"):
        Bound(L2(model, 1.0), 0.1)
    with pytest.raises(ValueError, match="mode='decoupled', 'coupled' or 'proximal'"):
        Bound(RegularizedOptimizer(sgd(model), L1(model, 1.0), "dual"), 0.1)
    with pytest.raises(ValueError, match="lam=1 is the usual choice"):
        Bound(RegularizedOptimizer(sgd(model), L1(model, 0.0), "proximal"), 0.1)


def test_a_target_sparsity_beside_a_bound_is_refused():
    """At a multiplier of 0 no lambda makes zeros, and the target would be lost without a word."""
    model = network()
    optimizer = RegularizedOptimizer(sgd(model), L1(model, 1.0), "proximal")
    target = TargetSparsity(optimizer, 0.5, steps=100)
    target.step()
    bound = Bound(optimizer, 0.1)
    with pytest.raises(ValueError, match="two schedules cannot steer it"):
        target.step()
    with pytest.raises(ValueError, match="two schedules cannot steer it"):
        TargetSparsity(optimizer, 0.5, steps=100)
    del bound
    optimizer.penalty.multipliers = {}  # as the message says
    TargetSparsity(optimizer, 0.5, steps=100).step()


def test_a_second_bound_replaces_the_first_which_can_no_longer_step():
    expected, model = network(), network()
    run(expected, *bounded(expected, 0.02), 4)
    optimizer, old = bounded(model, 0.001)  # a cell of a notebook that is run again leaves such a one
    new = Bound(optimizer, 0.02)
    run(model, optimizer, new, 2)
    state = old.state_dict()
    for refused in (old.step, lambda: old.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"another Bound has replaced .* newer one only"):
            refused()
    run(model, optimizer, new, 2, start=2)
    assert_same(model, expected)


def test_bounds_of_two_penalties_leave_each_other_alone():
    model = network()
    optimizers = [RegularizedOptimizer(sgd(part), L2(part, 1.0), "decoupled") for part in (model[:1], model[2:])]
    bounds = [Bound(optimizer, 0.01) for optimizer in optimizers]
    for i in range(3):
        set_gradients(model, i)
        for step in (*optimizers, *bounds):
            step.step()
    assert all(x > 0 for bound in bounds for x in bound.multipliers.values())


def test_without_its_multipliers_a_penalty_is_what_it_was():
    model = network()
    penalty = L1(model, 0.5)
    before = penalty()
    Bound(RegularizedOptimizer(sgd(model), penalty, "proximal"), 0.1)
    assert penalty() == 0
    penalty.multipliers = {}
    assert penalty() == before


def test_the_summary_shows_lambda_times_the_multiplier():
    model = network()
    optimizer, bound = bounded(model, 0.0, penalty=L1, mode="proximal", lam=2.0)
    run(model, optimizer, bound, 3)
    name = "0.weight"
    row = next(line.split() for line in optimizer.penalty.summary().splitlines() if line.startswith(name))
    assert float(row[4]) == pytest.approx(2 * bound.multipliers[name].item(), rel=1e-3)
    assert float(row[5]) == pytest.approx(float(row[4]) * model[0].weight.abs().sum().item(), rel=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_tensors_of_the_same_name_have_multipliers_of_their_own(frozen):
    first, second = (network(sizes=(5, 6, n)) for n in (3, 4))
    both = nn.ModuleList([first, second])
    first[0].weight.requires_grad_(not frozen)
    optimizer = RegularizedOptimizer(sgd(both), L2([{"params": first}, {"params": second}], 1.0), "decoupled")
    bound = Bound(optimizer, 0.0)
    weights = [first[0].weight, first[2].weight, second[0].weight, second[2].weight]
    names = ["0.weight", "2.weight", "0.weight_", "2.weight_"]
    assert [*bound.multipliers] == names
    run(both, optimizer, bound, 1)
    expected = {name: w.square().mean().item() for name, w in zip(names, weights, strict=True)}
    expected["0.weight"] *= not frozen
    assert {name: m.item() for name, m in bound.multipliers.items()} == pytest.approx(expected)


def test_zero_groups_of_tensors_of_the_same_name_are_all_found():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        first.weight[0] = 0
        second.weight[1] = 0
    penalty = GroupLasso([{"params": first}, {"params": second}], 1.0)
    assert penalty.zero_groups() == {"weight": [0], "weight_": [1]}


@pytest.mark.parametrize("options", [{}, {"center": "initial"}])
def test_an_initial_value_of_zero_is_no_bound(options):
    model = network()
    if not options:
        nn.init.zeros_(model[0].weight)
    optimizer = RegularizedOptimizer(sgd(model), L2(model, 1.0, **options), "decoupled")
    with pytest.raises(ValueError, match=r"the penalty of '0\.weight'.* is 0 at construction.* use bound='warmup'"):
        Bound(optimizer, "initial")
    both = [(optimizer.penalty, "decoupled"), (L1(model, 1.0), "decoupled")]
    with pytest.raises(ValueError, match=r"the penalty of '0\.weight'"):
        Bound(RegularizedOptimizer(sgd(model), both), "initial")
