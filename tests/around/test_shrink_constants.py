"""Dead units that emit a constant, taken out of models. The oracle is the outputs of the original model."""

import copy
import warnings

import pytest
import torch
from helpers.nets import Scale, zero_
from torch import nn

from torch_regpen import GroupLasso, RegularizedOptimizer
from torch_regpen.export import dead_units, shrink
from torch_regpen.penalties.coupling import coupled_units

pytest.importorskip("torch_pruning")

STAY = "their weights are zero, but a bias or a norm is not, and "


def randomize(model):
    """All parameters and running statistics random, biases and norms far from zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 1.0
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.ndim < 2 else scale * torch.randn(tensor.shape))
                tensor *= -1 if name.endswith("running_mean") else 1
    return model.eval()


def assert_same(smaller, model, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(
            smaller(*inputs), model(*inputs), rtol=0, atol=1e-5 * float(model(*inputs).abs().max())
        )


def without_warning(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return shrink(model, x)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


# What is folded


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.PReLU(8), nn.BatchNorm1d(8), nn.Identity()])
def test_what_follows_makes_of_a_bias_goes_to_the_next_bias(between):
    model = randomize(nn.Sequential(nn.Linear(6, 8), between, nn.Linear(8, 3)))
    zero_(model[0].weight, 0, [1, 4, 5])
    smaller = without_warning(model, torch.randn(1, 6))
    assert (smaller[0].out_features, smaller[2].in_features) == (5, 5)
    assert_same(smaller, model, torch.randn(20, 6))
    assert_same(smaller, model, torch.randn(2, 20, 6)) if not isinstance(between, nn.PReLU | nn.BatchNorm1d) else None


def test_units_that_are_zero_throughout_leave_in_the_same_go():
    model = randomize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    zero_(model[0].weight, 0, [0, 1, 2])
    zero_(model[0].bias, 0, [1])
    smaller = without_warning(model, torch.randn(2, 6))
    assert smaller[0].out_features == 5
    assert_same(smaller, model, torch.randn(20, 6))


def test_a_layer_without_a_bias_gets_one_that_fits_its_own_rows():
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False)
    model = randomize(nn.Sequential(*layers, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1, bias=False)))
    model[3].weight.requires_grad_(False)
    zero_(model[0].weight, 0, [0, 3, 7])
    zero_(model[3].weight, 0, [1, 2])
    smaller = without_warning(model, torch.randn(2, 3, 9, 9))
    assert [smaller[i].weight.shape[:2] for i in (0, 3, 6)] == [(5, 3), (4, 5), (2, 4)]
    assert [smaller[i].bias is None for i in (0, 3, 6)] == [True, False, False]
    assert smaller[3].bias.shape == (4,)
    assert not smaller[3].bias.requires_grad
    assert_same(smaller, model, torch.randn(3, 3, 12, 10))
    assert model[3].bias is None


@pytest.mark.parametrize("mode", ["zeros", "circular", "replicate", "reflect"])
def test_a_padded_convolution_takes_up_a_constant_unless_it_pads_with_zeros(mode):
    convs = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1, padding_mode=mode)
    model = randomize(nn.Sequential(convs[0], nn.ReLU(), convs[1]))
    zero_(model[0].weight, 0, [0, 3])
    with torch.no_grad():
        model[0].bias[3] = -1.0  # of which ReLU makes zero
    if mode == "zeros":
        with pytest.warns(UserWarning, match=rf"1 of '0': {STAY}'2' \(Conv2d\) pads with zeros"):
            smaller = shrink(model, torch.randn(2, 3, 9, 9))
    else:
        smaller = without_warning(model, torch.randn(2, 3, 9, 9))
    assert smaller[0].out_channels == (7 if mode == "zeros" else 6)
    assert_same(smaller, model, torch.randn(2, 3, 7, 5))


def test_a_convolution_of_one_pixel_pads_nothing_with_same():
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1, padding="same")))
    zero_(model[0].weight, 0, [0, 3])
    smaller = without_warning(model, torch.randn(2, 3, 9, 9))
    assert smaller[0].out_channels == 6
    assert_same(smaller, model, torch.randn(2, 3, 7, 5))


def test_the_channels_before_a_flatten_are_folded():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3)
    model = randomize(nn.Sequential(*layers))
    zero_(model[0].weight, 0, [0, 3])
    smaller = without_warning(model, torch.randn(1, 3, 6, 6))
    assert (smaller[0].out_channels, smaller[5].in_features) == (6, 24)
    assert_same(smaller, model, torch.randn(5, 3, 6, 6))


def test_units_that_read_only_dead_units_leave_with_them():
    layers = [layer for n in (5, 6, 7, 8) for layer in (nn.Linear(n, n + 1), nn.ReLU())]
    model = randomize(nn.Sequential(*layers, nn.Linear(9, 2)))
    dead = [1, 4]
    zero_(model[0].weight, 0, dead)
    for layer in model[2:8:2]:  # these units read only dead ones
        rows = layer.weight[:2].detach().clone()
        alive = [unit for unit in range(layer.in_features) if unit not in dead]
        rows[:, alive] = 0
        layer.weight.data[:2], dead = rows, [0, 1]
        assert rows.abs().sum() > 0
    smaller = without_warning(model, torch.randn(2, 5))
    assert [smaller[i].out_features for i in (0, 2, 4, 6)] == [4, 5, 6, 7]
    assert_same(smaller, model, torch.randn(20, 5))


def test_a_residual_stream_is_folded_where_all_its_writers_are_zero():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.out((x + self.block(x).relu()).relu())

    model = randomize(Residual())
    zero_(model.stem.weight, 0, [0, 1])
    zero_(model.block.weight, 0, [0, 2])
    smaller = without_warning(model, torch.randn(2, 5))
    assert smaller.stem.out_features == 7
    assert_same(smaller, model, torch.randn(20, 5))


def test_the_values_of_a_dead_head_go_to_the_output_projection():
    vision_transformer = pytest.importorskip("timm").models.vision_transformer
    model = randomize(vision_transformer.VisionTransformer(16, 8, 3, 4, embed_dim=12, depth=1, num_heads=3))
    zero_(model.blocks[0].attn.qkv.weight, 0, [row + start for start in (0, 12, 24) for row in range(4, 8)])
    smaller = without_warning(model, torch.randn(2, 3, 16, 16))
    assert smaller.blocks[0].attn.num_heads == 2
    assert_same(smaller, model, torch.randn(3, 3, 16, 16))


def test_the_transposed_linear_of_transformers_is_folded():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=1, n_head=3)
    model = randomize(transformers.GPT2LMHeadModel(config))
    zero_(model.transformer.h[0].mlp.c_fc.weight, 1, list(range(20)))
    x = torch.randint(0, 50, (2, 7))
    smaller = without_warning(model, x)
    assert smaller.transformer.h[0].mlp.c_fc.nf == 28
    with torch.no_grad():
        torch.testing.assert_close(smaller(x).logits, model(x).logits, rtol=1e-5, atol=1e-4)


def test_of_units_that_all_are_constant_one_stays():
    model = randomize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    nn.init.zeros_(model[0].weight)
    smaller = without_warning(model, torch.randn(2, 6))
    assert smaller[0].out_features == 1
    assert_same(smaller, model, torch.randn(20, 6))


def test_a_network_trained_with_rows_as_groups_becomes_smaller():
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 8, 8), torch.randint(3, (64,))
    layers = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    penalty = GroupLasso(model, 0.03, groups="output", select=["0.weight", "3.weight"])
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), 0.1), penalty, "proximal")
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    dead = {name: min(len(units), 15) for name, units in dead_units(model).items()}
    assert sum(dead.values()) > 4
    smaller = without_warning(model.eval(), x[:1])
    assert 16 - smaller[0].out_channels >= dead.get("0.weight", 0)
    assert 16 - smaller[3].out_channels >= dead.get("3.weight", 0)
    assert_same(smaller, model, x)


def test_the_model_keeps_its_parameters_and_buffers():
    model = randomize(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))).train()
    zero_(model[0].weight, 0, [0, 3])
    before = copy.deepcopy(model.state_dict())
    shrink(model, torch.randn(4, 6))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


# What stays


@pytest.mark.parametrize("gate", [lambda x: x[:, :1], lambda x: x.mean(1, keepdim=True).sigmoid()])
def test_a_constant_times_something_of_the_input_stays(gate):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.first(x) * gate(x))

    model = randomize(Gated())
    zero_(model.first.weight, 0, [0, 3])
    for batch in (1, 4):  # of a single example, all that reaches the next layer looks constant
        with pytest.warns(UserWarning, match=f"2 of 'first': {STAY}their output is not constant"):
            smaller = shrink(model, torch.randn(batch, 6))
        assert_same(smaller, model, torch.randn(20, 6))


def test_a_constant_times_a_gate_of_tokens_stays():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.gate = nn.Embedding(9, 6), nn.Embedding(9, 1)
            self.first, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.first(self.embed(x).mean(1)) * self.gate(x).mean(1))

    model = randomize(Gated())
    zero_(model.first.weight, 0, [0, 3])
    with pytest.warns(UserWarning, match="2 of 'first'"):
        smaller = shrink(model, torch.randint(0, 9, (1, 5)))
    assert_same(smaller, model, torch.randint(0, 9, (20, 5)))


def test_what_reads_a_border_of_zeros_is_no_constant():
    convs = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 2, 1)
    model = randomize(nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2]))
    zero_(model[0].weight, 0, [0, 3])
    zero_(model[2].weight[:2].data, 1, [1, 2, 4, 5, 6, 7])  # two filters read nothing but the dead channels
    with pytest.warns(UserWarning, match=r"2 of '0': .*'2' \(Conv2d\) pads with zeros"):
        smaller = shrink(model, torch.randn(2, 3, 3, 3))  # so small that no border shows
    assert (smaller[0].out_channels, smaller[2].out_channels) == (8, 6)
    assert_same(smaller, model, torch.randn(2, 3, 9, 9))


def test_a_pooled_border_of_zeros_stays():
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 2, 1)))
    zero_(model[0].weight, 0, [0, 3])
    with pytest.warns(UserWarning, match="2 of '0': .*their output is not constant"):
        smaller = shrink(model, torch.randn(2, 3, 9, 9))
    assert_same(smaller, model, torch.randn(2, 3, 9, 9))


def test_transposed_convolutions_and_recurrent_layers_take_up_no_constant():
    up = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 2, 3)))
    zero_(up[0].weight, 0, [0, 3])
    with pytest.warns(UserWarning, match=r"2 of '0': .*'1' \(ConvTranspose2d\) pads with zeros"):
        smaller = shrink(up, torch.randn(2, 3, 9, 9))
    assert_same(smaller, up, torch.randn(2, 3, 9, 9))

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rnn, self.out = nn.Linear(5, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.rnn(self.first(x))[0])

    model = randomize(Tagger())
    zero_(model.first.weight, 0, [0, 3])
    for key in ("weight_ih_l0", "weight_hh_l0"):
        zero_(getattr(model.rnn, key), 0, [1, 5, 9, 13])
    with pytest.warns(UserWarning, match=r"2 of 'first': .*1 of 'rnn.l0': .*no bias of 'rnn' \(LSTM\) can take up"):
        smaller = shrink(model, torch.randn(2, 1, 5))
    assert_same(smaller, model, torch.randn(2, 7, 5))


def test_constants_behind_a_function_of_which_zero_is_no_zero_are_named():
    model = randomize(nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2)))
    zero_(model[0].weight, 0, [0, 3])
    with pytest.warns(UserWarning, match="2 of '0'"):
        smaller = shrink(model, torch.randn(2, 4))
    assert smaller[0].out_features == 6


def test_units_with_an_obstacle_stay_whatever_they_emit():
    model = randomize(nn.Sequential(nn.Linear(4, 6), Scale(), nn.Linear(6, 2)))
    zero_(model[0].weight, 0, [0, 3])
    with pytest.warns(UserWarning, match=r"2 of '0': it is not known what 1\.size = 6 of Scale means"):
        smaller = shrink(model, torch.randn(2, 4))
    assert smaller[0].out_features == 6
    assert len(coupled_units(smaller, torch.randn(2, 4))[0]) == 1
