"""freeze_zeros: zeros that hold, survivors that are fitted without the penalty, and the way back."""

import copy
import io
import warnings

import pytest
import torch
from helpers.nets import backward, made_sparse, network, train_on_batches
from helpers.optimizers import MODES, OPTIMIZERS, WITHOUT_STEP, wrapped_quietly
from torch import nn, optim

from torch_regpen import L1, GroupLasso, RegularizedOptimizer
from torch_regpen.optim.dual_averaging import GAP


def decaying(name):
    """How to make an optimizer with a weight decay of its own, where it has any."""
    return WITHOUT_STEP.get(name, lambda params: OPTIMIZERS[name](params, weight_decay=0.1))


def zeros(model):
    return [p.detach() == 0 for p in model.parameters()]


@pytest.mark.parametrize("name", [*OPTIMIZERS, *WITHOUT_STEP])
def test_zeros_hold_and_the_state_is_zero_there(name):
    model = network()
    optimizer = wrapped_quietly(model, decaying(name), lam=0.003)
    train_on_batches(model, optimizer, 20)
    made_sparse(model)
    before = zeros(model)
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 30, start=20)
    for p, mask in zip(model.parameters(), before, strict=True):
        if p.ndim < 2:
            continue
        assert torch.equal(p == 0, mask)
        assert 0 < mask.sum() < mask.numel()
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and key not in ("step_size", "ax", "exp_inf"):
                assert (value[mask] == 0).all(), key


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["SGD momentum", "Adam"])
def test_the_survivors_train_as_a_masked_network_without_a_penalty(name, mode):
    model, masked = made_sparse(network()), made_sparse(network())
    make = {"SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9), "Adam": lambda p: optim.Adam(p, lr=0.01)}[
        name
    ]
    optimizer, bare = wrapped_quietly(model, make, mode, lam=0.5), make(masked.parameters())
    optimizer.freeze_zeros()
    masks = [(p != 0).float() if p.ndim > 1 else torch.ones_like(p) for p in masked.parameters()]
    for step in range(10):
        backward(model, step)
        optimizer.step()
        backward(masked, step)
        for p, mask in zip(masked.parameters(), masks, strict=True):
            p.grad *= mask
        bare.step()
    for p, q in zip(model.parameters(), masked.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_coupled_closures_return_the_plain_loss(mode):
    model = made_sparse(network())
    optimizer = wrapped_quietly(model, lambda p: optim.SGD(p, lr=0.1), mode, lam=1.0)
    optimizer.freeze_zeros()
    plain = backward(model, 0).item()
    assert optimizer.step(lambda: backward(model, 0)).item() == pytest.approx(plain)


@pytest.mark.parametrize("mode", MODES)
def test_unfreezing_takes_it_back(mode):
    model, never = network(), network()
    optimizers = [wrapped_quietly(m, lambda p: optim.SGD(p, lr=0.1), mode, lam=0.1) for m in (model, never)]
    for m, optimizer in zip((model, never), optimizers, strict=True):
        train_on_batches(m, optimizer, 3)
    optimizers[0].freeze_zeros()
    optimizers[0].unfreeze_zeros()
    for m, optimizer in zip((model, never), optimizers, strict=True):
        train_on_batches(m, optimizer, 3, start=3)
    for p, q in zip(model.parameters(), never.parameters(), strict=True):
        assert torch.equal(p, q)


def test_in_the_dual_mode_the_visible_weights_go_on():
    model = network()
    optimizer = wrapped_quietly(model, lambda p: optim.SGD(p, lr=0.1), "dual", lam=0.1)
    train_on_batches(model, optimizer, 10)
    visible = copy.deepcopy(model)
    optimizer.freeze_zeros()
    gap = optimizer.state[model[0].weight][GAP].clone()
    masks = [p == 0 for p in visible.parameters()]
    backward(model, 50)
    optimizer.step()
    backward(visible, 50)
    with torch.no_grad():
        for p, q, mask in zip(model.parameters(), visible.parameters(), masks, strict=True):
            torch.testing.assert_close(p, (q - 0.1 * q.grad).masked_fill(mask, 0))
    assert torch.equal(optimizer.state[model[0].weight][GAP], gap)  # for when the penalty is on again


def test_whole_neurons_stay_away():
    model = network()
    optimizer = RegularizedOptimizer(optim.Adam(model.parameters(), lr=0.02), GroupLasso(model, 0.03), "proximal")
    train_on_batches(model, optimizer, 150)
    gone = (model[0].weight == 0).all(dim=1)
    assert gone.any()
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 20)
    assert torch.equal((model[0].weight == 0).all(dim=1), gone)


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(2, 5))
        self.b = nn.Parameter(torch.zeros(3, 2))

    def forward(self, x):
        return x @ self.a.T @ self.b.T


def test_a_matrix_that_is_zero_before_training_is_not_frozen_for_ever():
    model = LoRA()
    optimizer = RegularizedOptimizer(optim.SGD(model.parameters(), lr=0.1), L1(model, 1e-4), "proximal")
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 5)
    assert (model.b != 0).all()


def test_one_that_training_made_zero_is():
    model = LoRA()
    optimizer = RegularizedOptimizer(optim.SGD(model.parameters(), lr=0.1), L1(model, 100.0), "proximal")
    train_on_batches(model, optimizer, 3)
    assert (model.b == 0).all()
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 3)
    assert (model.b == 0).all()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_right_after_a_sparse_checkpoint_a_fresh_optimizer_freezes(name):
    saved = made_sparse(network()).state_dict()
    model = network()
    model.load_state_dict(saved)
    optimizer = wrapped_quietly(model, decaying(name))
    before = zeros(model)
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 5)
    assert all(map(torch.equal, zeros(model), before))
    assert before[0].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda p: optim.Adam(p, lr=0.01)])
def test_that_they_are_frozen_travels_in_the_state_dict(make, mode):
    model = network()
    optimizer = wrapped_quietly(model, make, mode, lam=0.1)
    train_on_batches(model, optimizer, 10)
    made_sparse(model)
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 4, start=10)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train_on_batches(model, optimizer, 4, start=14)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, bare = network(), network()
    again = wrapped_quietly(resumed, make, mode, lam=0.1)
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    train_on_batches(resumed, again, 4, start=14)
    for p, q in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    inner = make(bare.parameters())
    inner.load_state_dict(saved["optimizer"])
    train_on_batches(bare, inner, 2)


def test_copies_hold_them_too():
    model = made_sparse(network())
    optimizer = wrapped_quietly(model, decaying("Adam amsgrad"))
    optimizer.freeze_zeros()
    twin, other = copy.deepcopy((model, optimizer))
    before = zeros(model)
    train_on_batches(twin, other, 5)
    assert all(map(torch.equal, zeros(twin), before))


def test_lambda_zero_freezes_too():
    model = made_sparse(network())
    optimizer = wrapped_quietly(model, decaying("SGD"), lam=0.0)
    before = zeros(model)
    optimizer.freeze_zeros()
    train_on_batches(model, optimizer, 5)
    assert all(map(torch.equal, zeros(model), before))


def test_a_layer_that_is_entirely_zero_is_named_in_a_warning():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = RegularizedOptimizer(optim.SGD(model.parameters(), lr=0.1), L1(model, 1e-6), "proximal")
    backward(model, 0)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.freeze_zeros()
    optimizer.unfreeze_zeros()
    nn.init.zeros_(model[2].weight)
    with pytest.warns(UserWarning, match=r"of '2\.weight' are zero and stay zero.*unfreeze_zeros") as caught:
        optimizer.freeze_zeros()
    assert caught[0].filename == __file__


def test_biases_and_a_group_that_comes_later_are_free():
    model = made_sparse(network())
    with torch.no_grad():
        model[0].bias.zero_()
    inner = optim.SGD([model[0].weight, model[0].bias], lr=0.1)
    penalty = L1(model[0], 0.01)
    optimizer = RegularizedOptimizer(inner, penalty, "proximal")
    optimizer.freeze_zeros()
    optimizer.add_param_group({"params": model[2].parameters()})
    train_on_batches(model, optimizer, 3)
    assert (model[0].weight == 0).any()
    assert (model[0].bias != 0).all()
    assert (model[2].weight != 0).all()


def test_an_average_that_starts_again_after_freezing_has_the_zeros():
    """What README says to do with averaged models."""
    model = network()
    optimizer = wrapped_quietly(model, lambda p: optim.SGD(p, lr=0.1), lam=0.05)
    average = optim.swa_utils.AveragedModel(model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(30):
        train_on_batches(model, optimizer, 1, start=step)
        average.update_parameters(model)
    assert (model[0].weight == 0).any()
    assert not torch.equal(average.module[0].weight == 0, model[0].weight == 0)
    optimizer.freeze_zeros()
    average = optim.swa_utils.AveragedModel(model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(30, 40):
        train_on_batches(model, optimizer, 1, start=step)
        average.update_parameters(model)
    assert torch.equal(average.module[0].weight == 0, model[0].weight == 0)


def test_a_scalar_trains_after_unfreezing_as_a_vector_of_one_element():
    for make in (optim.NAdam, optim.ASGD):
        ws = [torch.tensor(1.0, requires_grad=True), torch.tensor([1.0], requires_grad=True)]
        optimizer = RegularizedOptimizer(make(ws, lr=0.1), L1(ws, 100.0, select="all"), "proximal")
        for grad in (0.1, -1.0, -1.0):
            for w in ws:
                w.grad = torch.full_like(w, grad)
            optimizer.step()
            if grad > 0:
                with pytest.warns(UserWarning, match="are zero and stay zero"):
                    optimizer.freeze_zeros()
                optimizer.unfreeze_zeros()
                optimizer.penalty.lam = 0.0
        assert ws[0] != 0
        torch.testing.assert_close(ws[0], ws[1][0])


def test_an_empty_tensor_is_not_named_as_a_layer_of_zeros():
    ws = [torch.zeros(0, 4, requires_grad=True), torch.ones(2, 3, requires_grad=True)]
    optimizer = RegularizedOptimizer(optim.SGD(ws, lr=0.1), L1(ws, 0.1), "proximal")
    for w in ws:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.freeze_zeros()
