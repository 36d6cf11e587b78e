"""Models without the input features that they do not read. The oracle is the original model on all features."""

import copy

import pytest
import torch
from helpers.nets import zero_
from torch import nn

from torch_regpen import GroupLasso, RegularizedOptimizer
from torch_regpen.export import shrink, shrink_inputs

pytest.importorskip("torch_pruning")

UNREAD = [0, 3, 4]
KEPT = [1, 2, 5]


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)],
        [nn.BatchNorm1d(6), nn.Linear(6, 2)],
        [nn.Linear(6, 2, bias=False)],
        [nn.Tanh(), nn.Linear(6, 6)],
    ],
    ids=["mlp", "norm", "linear", "tanh"],
)
def test_features_of_the_last_dimension_leave(layers):
    model = nn.Sequential(*layers).eval()
    first = next(layer for layer in model if isinstance(layer, nn.Linear))
    zero_(first.weight, 1, UNREAD)
    x = torch.randn(5, 6)
    smaller, kept = shrink_inputs(model, x)
    assert kept == KEPT
    assert [type(layer) for layer in smaller] == [type(layer) for layer in model]
    assert_same(smaller(x[:, kept]), model(x))


def test_features_of_a_sequence_leave():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    model, x = Tagger(), torch.randn(2, 7, 6)
    zero_(model.rnn.weight_ih_l0, 1, UNREAD)
    smaller, kept = shrink_inputs(model, x)
    assert (kept, smaller.rnn.input_size) == (KEPT, 3)
    assert_same(smaller(x[..., kept]), model(x))


@pytest.mark.parametrize(
    ("conv", "size"), [(nn.Conv1d, (9,)), (nn.Conv2d, (6, 6)), (nn.Conv2d, (9, 9)), (nn.Conv3d, (5, 5, 5))]
)
def test_channels_of_a_convolution_leave(conv, size):
    model, x = nn.Sequential(conv(6, 4, 3, padding=1), nn.ReLU(), conv(4, 2, 3)), torch.randn(2, 6, *size)
    zero_(model[0].weight, 1, UNREAD)
    smaller, kept = shrink_inputs(model, x)
    assert (kept, smaller[0].in_channels) == (KEPT, 3)
    assert_same(smaller(x[:, kept]), model(x))


def test_channels_before_a_flatten_leave():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(24, 2)), torch.randn(3, 6, 2, 2)
    zero_(model[1].weight, 1, [4 * channel + i for channel in UNREAD for i in range(4)])
    smaller, kept = shrink_inputs(model, x)
    assert kept == KEPT
    assert_same(smaller(x[:, kept]), model(x))


def test_all_layers_that_read_a_feature_must_do_without_it():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep, self.wide, self.out = nn.Linear(6, 4), nn.Linear(6, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.deep(x).relu()) + self.wide(x)

    model, x = Wide(), torch.randn(5, 6)
    zero_(model.deep.weight, 1, UNREAD)
    zero_(model.wide.weight, 1, [3, 4, 5])
    smaller, kept = shrink_inputs(model, x)
    assert kept == [0, 1, 2, 5]
    assert_same(smaller(x[:, kept]), model(x))


def test_inputs_leave_after_units_and_the_model_is_not_changed():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 2)), torch.randn(5, 6)
    zero_(model[0].weight, 1, UNREAD)
    zero_(model[0].weight, 0, [2])
    before = copy.deepcopy(model.state_dict())
    smaller, kept = shrink_inputs(shrink(model, x), x)
    assert (kept, smaller[0].weight.shape) == (KEPT, (3, 3))
    assert smaller.training
    assert_same(smaller.eval()(x[:, kept]), model.eval()(x))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None and p.requires_grad for p in smaller.parameters())


def test_a_penalty_on_input_features_makes_them_leave():
    torch.manual_seed(0)
    x = torch.randn(200, 10)
    y = x[:, :3].sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))
    penalty = GroupLasso(model, 0.05, groups="input", select="0.weight")
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), 0.05), penalty, "proximal")
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    smaller, kept = shrink_inputs(model, x[:1])
    assert kept == [i for i in range(10) if i not in penalty.zero_groups()["0.weight"]]
    assert kept == [0, 1, 2]
    assert_same(smaller(x[:, kept]), model(x))


def test_a_model_that_reads_all_is_copied_and_one_feature_stays():
    model, x = nn.Sequential(nn.Linear(6, 2)), torch.randn(5, 6)
    smaller, kept = shrink_inputs(model, x)
    assert kept == list(range(6))
    assert torch.equal(smaller(x), model(x))
    assert smaller[0].weight is not model[0].weight
    nn.init.zeros_(model[0].weight)
    smaller, kept = shrink_inputs(model, x)
    assert kept == [5]
    assert torch.equal(smaller(x[:, kept]), model(x))


# What is refused, or stays


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(5, 6)),
        (nn.Softmax(-1), torch.randn(5, 6)),
    ],
    ids=["norm", "softmax"],
)
def test_inputs_that_cannot_leave_are_refused(model, x):
    with pytest.raises(ValueError, match=r"no input feature of .* can be removed: "):
        shrink_inputs(model, x)


def test_a_stream_that_begins_at_the_inputs_stays_and_is_named():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(x + self.block(x).relu())

    model, x = Residual(), torch.randn(5, 6)
    zero_(model.block.weight, 1, UNREAD)
    zero_(model.out.weight, 1, UNREAD)
    with pytest.warns(UserWarning, match="3 of 'inputs': other layers write the same units"):
        smaller, kept = shrink_inputs(model, x)
    assert kept == list(range(6))
    assert_same(smaller(x), model(x))


@pytest.mark.parametrize("x", [torch.ones(2, 6, dtype=torch.int64), (torch.ones(2, 6),), torch.ones(())])
def test_other_inputs_than_one_tensor_of_features_are_refused(x):
    with pytest.raises(TypeError, match="one floating-point tensor"):
        shrink_inputs(nn.Linear(6, 2), x)
    with pytest.raises(TypeError, match="not a dict"):
        shrink_inputs({}, torch.ones(2, 6))
