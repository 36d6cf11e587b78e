"""`cautious=True` of the decoupled mode: an element shrinks only where its update does not point away from zero."""

import copy

import pytest
import torch
from helpers.kinds import BASIC, FORMULAS
from helpers.nets import assert_same, backward, embedding, network, set_gradients, train, with_zeros
from helpers.operations import LargestCopy, Reads
from helpers.optimizers import OPTIMIZERS, Homemade, adamw, momentum, sgd, through_pickle
from torch import nn, optim

from torch_regpen import L1, L2, GroupLasso, NuclearNorm, RegularizedOptimizer

LAM = 0.05


def skip_if_torch_lacks(name, device):
    if name == "Adagrad fused" and device.type == "cuda":
        pytest.skip("torch has no fused Adagrad on CUDA")


# With a state that tells the sign of the update, or without one.
MAKE = {
    **OPTIMIZERS,
    "Adam maximize": lambda params, **kw: optim.Adam(params, lr=0.01, maximize=True, **kw),
    "Adam tensor lr": lambda params, **kw: optim.Adam(params, lr=torch.tensor(0.01, dtype=torch.float64), **kw),
    "Adam weight_decay": lambda params, **kw: optim.Adam(params, lr=0.01, weight_decay=0.3, **kw),
    "AdamW weight_decay": lambda params, **kw: optim.AdamW(params, lr=0.01, weight_decay=0.3, **kw),
    "SGD maximize": lambda params, **kw: optim.SGD(params, lr=0.1, momentum=0.9, maximize=True, **kw),
    "SGD nesterov dampened": lambda params, **kw: optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.0, nesterov=True),
    "SGD weight_decay": lambda params, **kw: optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.3),
    "Homemade": lambda params, **kw: Homemade(params),
    "Rprop": lambda params, **kw: optim.Rprop(params, lr=0.01),
}


def cautious(model, make=sgd, penalty=L2, lam=LAM, **options):
    return RegularizedOptimizer(make(model), penalty(model, lam), "decoupled", cautious=True, **options)


def published(ws, optimizer, shrunk, rate):
    """Chen et al. 2025: `w - u - rate * mask * (what the penalty takes)`, with the mask `u * w >= 0` by element.

    The update `u` of the bare optimizer is found by running it.
    """
    old = [w.detach().clone() for w in ws]
    optimizer.step()
    with torch.no_grad():
        for w, before in zip(ws, old, strict=True):
            u = before - w
            w.copy_(torch.where(u.sign() * before.sign() >= 0, before - u - (before - shrunk(before, rate)), w))


def formula(kind):
    """The weights after a decay, by autograd on the formula; no element (group) crosses zero."""

    def shrunk(w, rate):
        with torch.enable_grad():
            x = w.clone().requires_grad_()
            (grad,) = torch.autograd.grad(FORMULAS[kind][1](x), x)
        v = w - rate * grad
        return torch.where(v.sign() == -w.sign(), 0, v)

    return shrunk


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("name", MAKE)
def test_cautious_decay_is_the_published_formula(device, name, kind):
    skip_if_torch_lacks(name, device)
    theirs, ours = (with_zeros(network(device, torch.float64)) for _ in range(2))
    plain = MAKE[name](theirs.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_regpen.optim.applied.warn", lambda *_: None)  # of their weight_decay
        optimizer = RegularizedOptimizer(
            MAKE[name](ours.parameters()), FORMULAS[kind][0](ours), "decoupled", cautious=True, rate=lambda *_: 0.1
        )
    for i in range(5):
        set_gradients(theirs, i)
        set_gradients(ours, i)
        published([theirs[0].weight, theirs[2].weight], plain, formula(kind), 0.1)
        optimizer.step()
        assert_same(ours, theirs, 1e-11)


@pytest.mark.parametrize("name", MAKE)
def test_some_elements_shrink_and_the_others_take_the_bare_step(device, name):
    skip_if_torch_lacks(name, device)
    bare, ours = network(device), network(device)
    plain = MAKE[name](bare.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_regpen.optim.applied.warn", lambda *_: None)
        optimizer = RegularizedOptimizer(
            MAKE[name](ours.parameters()), L2(ours, LAM), "decoupled", cautious=True, rate=lambda *_: 0.1
        )
    set_gradients(bare, 0)
    set_gradients(ours, 0)
    before = bare[0].weight.detach().clone()
    plain.step()
    optimizer.step()
    inward = (before - bare[0].weight).sign() * before.sign() >= 0
    same = ours[0].weight == bare[0].weight
    assert 0 < inward.sum() < inward.numel()
    assert (same == ~inward).all()  # bit for bit


@pytest.mark.parametrize("make", [sgd, momentum, adamw])
def test_where_the_update_is_0_the_decay_acts(make):
    model = network()
    before = model[0].weight.detach().clone()
    optimizer = cautious(model, make, rate=lambda *_: 1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 2 * LAM))


@pytest.mark.parametrize("make", [sgd, momentum, adamw, lambda model, lr: Homemade(model.parameters(), lr)])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor lr"])
def test_at_lr_0_as_a_warmup_begins_all_updates_are_0(make, tensor):
    model = network()
    before = model[0].weight.detach().clone()
    lr = torch.tensor(0.0) if tensor else 0.0
    optimizer = cautious(model, lambda m: make(m, lr=lr), rate=lambda *_: 1.0)
    set_gradients(model, 0)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 2 * LAM))


@pytest.mark.parametrize("make", [sgd, momentum, adamw])
@pytest.mark.parametrize("kind", BASIC)
def test_where_every_update_points_to_zero_it_is_the_usual_decay(make, kind):
    usual, ours = network(), network()
    a = RegularizedOptimizer(make(usual), BASIC[kind](usual, LAM), "decoupled")
    b = cautious(ours, make, BASIC[kind])
    for model, optimizer in ((usual, a), (ours, b)):
        for p in model.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
    assert_same(ours, usual)


# Without a copy where the state tells the sign


@pytest.mark.parametrize("make", [sgd, momentum, adamw, lambda m: adamw(m, amsgrad=True, fused=True)])
def test_sgd_and_adam_need_no_copy_of_the_weights(make):
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    optimizer = cautious(model, make)
    for i in range(2):
        set_gradients(model, i)
        optimizer.step()
    (applied,) = optimizer._applied
    w = model[0].weight
    state = [x for x in optimizer.state[w].values() if isinstance(x, torch.Tensor)]
    with torch.no_grad(), LargestCopy(w, w.grad, *state) as copies:
        applied.mode.before_update([batch.with_grads() for batch in applied.batches()])
    assert 0 < copies.largest <= w.numel() / 8


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        (sgd, False),
        (momentum, False),
        (adamw, False),
        (lambda m: optim.NAdam(m.parameters()), True),
        (lambda m: optim.RMSprop(m.parameters()), True),
        (lambda m: Homemade(m.parameters()), True),
        (lambda m: type("Own", (optim.SGD,), {})(m.parameters(), lr=0.1), True),
    ],
)
def test_only_exactly_these_classes_are_trusted_with_the_sign(make, copied):
    model = network()
    optimizer = cautious(model, make)
    set_gradients(model, 0)
    seen = []
    optimizer.optimizer.register_step_post_hook(lambda *_: seen.append(len(optimizer._applied[0].mode._waiting)))
    optimizer.step()
    assert bool(seen[0]) == copied
    assert not optimizer._applied[0].mode._waiting  # no copy outlives the step


# Penalties


@pytest.mark.parametrize("make", [adamw, lambda m: optim.RMSprop(m.parameters(), lr=0.01)])
def test_l1_stops_at_zero(device, make):
    model = network(device)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = cautious(model, make, L1, rate=lambda *_: 100.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (model[0].weight == 0).all()
    assert (model[0].bias == before[1]).all()


def test_around_a_center_the_decay_is_towards_it():
    model, rate = network(dtype=torch.float64), 0.2
    center = {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in model.named_parameters()}
    for make in (adamw, lambda m: optim.RMSprop(m.parameters(), lr=0.01)):
        ours, bare = copy.deepcopy(model), copy.deepcopy(model)
        optimizer = RegularizedOptimizer(
            make(ours), L2(ours, LAM, center=center), "decoupled", cautious=True, rate=lambda *_: rate
        )
        set_gradients(ours, 0)
        set_gradients(bare, 0)
        optimizer.step()
        make(bare).step()
        w, c = model[0].weight.detach(), center["0.weight"]
        u = w - bare[0].weight
        inward = (u * (w - c) >= 0).double()
        torch.testing.assert_close(ours[0].weight, w - u - rate * inward * 2 * LAM * (w - c))


@pytest.mark.parametrize("make", [adamw, lambda m: optim.RMSprop(m.parameters(), lr=0.01)])
def test_sums_with_different_centers_have_a_mask_each(make):
    model, rate = network(dtype=torch.float64), 0.2
    center = {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in model.named_parameters()}
    ours, bare = copy.deepcopy(model), copy.deepcopy(model)
    penalty = L2(ours, LAM, center=center) + L1(ours, LAM)
    optimizer = RegularizedOptimizer(make(ours), penalty, "decoupled", cautious=True, rate=lambda *_: rate)
    set_gradients(ours, 0)
    set_gradients(bare, 0)
    optimizer.step()
    make(bare).step()
    w, c = model[0].weight.detach(), center["0.weight"]
    u = w - bare[0].weight
    pulls = (u * (w - c) >= 0) * 2 * LAM * (w - c) + (u * w >= 0) * LAM * w.sign()
    torch.testing.assert_close(ours[0].weight, w - u - rate * pulls)


def test_singular_values_shrink_where_the_update_allows():
    model = network(dtype=torch.float64)
    before, optimizer = model[0].weight.detach().clone(), cautious(model, adamw, NuclearNorm, rate=lambda *_: 1.0)
    bare = copy.deepcopy(model)
    set_gradients(bare, 0)
    adamw(bare).step()
    u = before - bare[0].weight
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    shrunk = left * (values - LAM).clamp_min(0) @ right
    set_gradients(model, 0)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), torch.where(u * before >= 0, shrunk, before) - u)


def test_tiny_weights_keep_the_sign_of_their_product():
    w = torch.full((2, 2), 1e-30, requires_grad=True)
    optimizer = RegularizedOptimizer(
        optim.SGD([w], lr=1e-3), L2([w], LAM), "decoupled", cautious=True, rate=lambda *_: 1.0
    )
    w.grad = torch.full((2, 2), -1e-30)  # w * u is below the least number of float32
    optimizer.step()
    assert (w >= 1e-30).all()


# Steps of every kind


def test_lambda_0_is_the_bare_optimizer_bit_for_bit():
    for make in (adamw, momentum, lambda m: optim.RMSprop(m.parameters(), lr=0.01)):
        bare, ours = network(), network()
        train(bare, make(bare))
        train(ours, cautious(ours, make, lam=0.0))
        assert_same(ours, bare)


@pytest.mark.parametrize("make", [adamw, lambda m: optim.NAdam(m.parameters())])
def test_parameters_without_a_gradient_are_left_alone(make):
    model = network()
    optimizer = cautious(model, make)
    set_gradients(model, 0)
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert (model[0].weight == before).all()
    set_gradients(model, 1)  # now one has a moment, and the other has not
    optimizer.step()
    assert (model[0].weight != before).any()


@pytest.mark.parametrize("make", [adamw, lambda m: optim.RMSprop(m.parameters(), lr=0.01)])
def test_a_closure_gives_the_same_step(make):
    with_closure, without = network(), network()
    a, b = cautious(with_closure, make), cautious(without, make)
    for i in range(3):
        a.step(lambda i=i: backward(with_closure, i))
        backward(without, i)
        b.step()
    assert_same(with_closure, without)


def test_lbfgs_is_cautious_of_the_whole_of_its_step():
    bare, ours = network(dtype=torch.float64), network(dtype=torch.float64)
    make = {"lr": 0.5, "max_iter": 4}
    optimizer = RegularizedOptimizer(
        optim.LBFGS(ours.parameters(), **make), L2(ours, LAM), "decoupled", cautious=True, rate=lambda *_: 0.1
    )
    optimizer.step(lambda: backward(ours))
    w = bare[0].weight.detach().clone()
    optim.LBFGS(bare.parameters(), **make).step(lambda: backward(bare))
    u = w - bare[0].weight
    torch.testing.assert_close(ours[0].weight.detach(), w - u - 0.1 * 2 * LAM * w * (u * w >= 0))


def test_sparse_gradients_decay_all_rows_whose_update_is_0(device):
    model = embedding(device)
    before = model.weight.detach().clone()
    optimizer = cautious(model, rate=lambda *_: 1.0)
    model(torch.tensor([1, 4], device=device)).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight[[0, 2, 3, 5]], before[[0, 2, 3, 5]] * (1 - 2 * LAM))


def test_a_skipped_step_of_the_scaler_changes_no_weight():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for make in (adamw, lambda m: adamw(m, fused=True), lambda m: optim.NAdam(m.parameters())):
        model = network()
        before, optimizer = copy.deepcopy(model), cautious(model, make)
        scaler.scale(model(torch.ones(2, 5)).sum()).backward()
        model[0].weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        assert_same(model, before)


def test_groups_that_span_tensors_shrink_by_element():
    from torch_regpen.groups import Coupled

    model = network(sizes=(5, 6, 3)).double()
    bare = copy.deepcopy(model)
    penalty = L2(model, LAM, groups=Coupled(model, torch.zeros(1, 5).double()))
    optimizer = RegularizedOptimizer(adamw(model), penalty, "decoupled", cautious=True, rate=lambda *_: 0.5)
    w = model[0].weight.detach().clone()
    set_gradients(model, 0)
    set_gradients(bare, 0)
    optimizer.step()
    adamw(bare).step()
    u = w - bare[0].weight
    torch.testing.assert_close(model[0].weight.detach(), w - u - 0.5 * 2 * LAM * w * (u * w >= 0))


def test_an_update_that_raises_leaves_no_copy_behind():
    model = network()
    optimizer = cautious(model, lambda m: optim.NAdam(m.parameters()))
    set_gradients(model, 0)
    before, step = copy.deepcopy(model), optimizer.optimizer.step

    def failing():
        raise OSError(5)

    optimizer.optimizer.step = failing
    with pytest.raises(OSError, match="5"):
        optimizer.step()
    optimizer.optimizer.step = step
    assert_same(model, before)
    other = network()
    set_gradients(other, 0)
    optimizer.step()
    cautious(other, lambda m: optim.NAdam(m.parameters())).step()
    assert_same(model, other)


@pytest.mark.parametrize("make", [adamw, lambda m: optim.NAdam(m.parameters())])
def test_copies_are_cautious_too(make):
    model = network()
    optimizer = cautious(model, make, rate="schedule")
    train(model, optimizer, steps=2)
    for copied in (copy.deepcopy, through_pickle):
        ours, expected = copied((model, optimizer)), copy.deepcopy((model, optimizer))
        for one in (ours, expected):
            train(*one, steps=2)
        assert_same(ours[0], expected[0])


@pytest.mark.parametrize("make", [sgd, momentum, adamw, lambda m: optim.NAdam(m.parameters(), foreach=False)])
@pytest.mark.parametrize("penalty", [L1, L2, GroupLasso])
def test_nothing_is_read_back(make, penalty):
    bare, model = network(), network()
    plain, optimizer = make(bare), cautious(model, make, penalty)
    for i in range(2):
        set_gradients(bare, i)
        set_gradients(model, i)
        with Reads() as expected:
            plain.step()
        with Reads() as reads:
            optimizer.step()
        assert reads.found == expected.found


@pytest.mark.parametrize("make", [adamw, lambda m: optim.NAdam(m.parameters())])
def test_sharded_parameters_decay_as_whole_ones(one_rank, make):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    def shard(_, module, mesh):
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))

    whole = network()
    sharded = distribute_module(network(), one_rank, shard)
    for penalty in (L2, L1, GroupLasso):
        a, b = cautious(whole, make, penalty), cautious(sharded, make, penalty)
        for i in range(2):
            set_gradients(whole, i)
            for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
                p.grad = distribute_tensor(q.grad.clone(), one_rank, [Shard(0)])
            a.step()
            b.step()
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q)
