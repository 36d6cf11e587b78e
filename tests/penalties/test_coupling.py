"""Units that span tensors. The oracle is the model: a unit that is zero must not be missed, whatever reads it."""

import copy
import functools
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from torch_regpen.penalties.coupling import coupled_units

pytest.importorskip("torch_pruning")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(12, 3, batch_first=True), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 9), nn.Linear(9, 12)

    def forward(self, x):
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return x + self.down(self.up(x).relu())


class Tagger(nn.Module):
    def __init__(self, kind, last=False, **options):
        super().__init__()
        self.embedding, self.last = nn.Embedding(20, 6), last
        self.rnn = kind(6, 5, batch_first=True, **options)
        self.out = nn.Linear(5 * (1 + self.rnn.bidirectional), 4)

    def forward(self, x):
        x, state = self.rnn(self.embedding(x))
        return self.out(state[-1] if self.last else x)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.up, self.mix = nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv2d(9, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        skip = self.down1(x).relu()
        up = self.up(self.down2(skip).relu()).relu()
        return self.out(self.mix(torch.cat([skip, up], 1)).relu())


class Gated(nn.Module):
    """Gates that are split off a layer, by `chunk` and by GLU; PReLU; a flattened sequence."""

    def __init__(self):
        super().__init__()
        self.fused, self.mid, self.slopes = nn.Linear(4, 12), nn.Linear(6, 10), nn.PReLU(5)
        self.last, self.out = nn.Linear(5, 3), nn.Linear(6, 2)

    def forward(self, x):
        gate, value = self.fused(x).chunk(2, -1)
        x = nn.functional.glu(self.mid(nn.functional.silu(gate) * value))
        x = self.slopes(x.transpose(1, 2)).transpose(1, 2)
        return self.out(self.last(x).flatten(1))


class Recurrent(nn.Module):
    """Channels and rows of an image that are merged to the features of a packed sequence; norms without parameters."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.instance = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.InstanceNorm2d(4)
        self.rnn, self.out = nn.LSTM(16, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        x = self.instance(self.norm(self.conv(x)).relu())
        x = x.permute(0, 3, 1, 2).reshape(len(x), x.shape[3], -1)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 4]), batch_first=True)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Shared(nn.Module):
    """A layer that is used twice, so that what it reads and what it writes are the same units."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.twice(self.twice(self.first(x).relu()).relu()).relu())


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(2, 6)


def vgg():
    first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    last = nn.Linear(24, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3)
    return nn.Sequential(*first, *second, *last), torch.randn(1, 3, 8, 8)


def resnet():
    resnet = pytest.importorskip("torchvision").models.resnet
    return resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], 5), torch.randn(1, 3, 32, 32)


def resnext():
    resnet = pytest.importorskip("torchvision").models.resnet
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 5, groups=32, width_per_group=4)
    return model, torch.randn(1, 3, 16, 16)


def mobilenet():
    blocks = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 2, 2]]
    models = pytest.importorskip("torchvision").models
    return models.MobileNetV2(5, 0.5, blocks), torch.randn(1, 3, 32, 32)


def mobilenet_v3():  # with squeeze and excitation
    models = pytest.importorskip("torchvision").models
    block = functools.partial(models.mobilenetv3.InvertedResidualConfig, width_mult=1.0)
    blocks = [block(8, 3, 16, 8, True, "RE", 2, 1), block(8, 3, 24, 8, True, "HS", 1, 1)]
    return models.MobileNetV3(blocks, 16, 5), torch.randn(1, 3, 32, 32)


def densenet():
    models = pytest.importorskip("torchvision").models
    return models.DenseNet(8, (2, 2), 16, num_classes=4), torch.randn(1, 3, 32, 32)


def vit():
    vision_transformer = pytest.importorskip("timm").models.vision_transformer
    model = vision_transformer.VisionTransformer(16, 8, 3, 4, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2)
    return model, torch.randn(2, 3, 16, 16)


def convnext():
    models = pytest.importorskip("timm").models.convnext
    return models.ConvNeXt(3, 4, depths=(1, 1, 1, 1), dims=(8, 8, 12, 12)), torch.randn(2, 3, 32, 32)


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.BertConfig(**sizes, intermediate_size=20, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=12, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def llama():  # pairs of queries share keys and values
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def encoder():
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 12)


def tokens():
    return torch.randint(0, 20, (2, 7))


MODELS = {
    "mlp": mlp,
    "vgg": vgg,
    "resnet": resnet,
    "resnext": resnext,
    "mobilenet": mobilenet,
    "mobilenet v3": mobilenet_v3,
    "densenet": densenet,
    "unet": lambda: (UNet(), torch.randn(1, 3, 8, 8)),
    "gated": lambda: (Gated(), torch.randn(2, 2, 4)),
    "shared layer": lambda: (Shared(), torch.randn(2, 4)),
    "recurrent": lambda: (Recurrent(), torch.randn(2, 1, 4, 6)),
    "vit": vit,
    "convnext": convnext,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "attention": lambda: (Attention(), torch.randn(2, 5, 12)),
    "encoder": encoder,
    "lstm": lambda: (Tagger(nn.LSTM, num_layers=2, bidirectional=True), tokens()),
    "gru": lambda: (Tagger(nn.GRU, num_layers=2, bidirectional=True), tokens()),
    "last state": lambda: (Tagger(nn.GRU, last=True), tokens()),
}


@functools.cache
def coupled(name):
    """The model in float64 with all its parameters at random, a function that runs it, its sets and what is left."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.double()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    args = tuple(x.double() if x.is_floating_point() else x for x in args)
    sets, left = coupled_units(model, kwargs or args)
    model.eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else None
        few_dead = 3.0 if "bias" in key else 1.0
        parameter.copy_(torch.randn(parameter.shape) / fan_in**0.5 if fan_in else few_dead)
    return model, functools.partial(run, args, kwargs), sets, left


def run(args, kwargs, model):
    out = model(*args, **kwargs)
    return out.logits if hasattr(out, "logits") else out


def fill(slices, unit, value=None):
    """Set the slices of a unit: to a value, or at random."""
    for part in slices:
        parameter, index = getattr(part.module, part.key).data, part.index[unit]
        new = torch.randn_like(parameter.index_select(part.dim, index))
        parameter.index_copy_(part.dim, index, new if value is None else torch.full_like(new, value))


@pytest.fixture
def restored():
    """Gives models back as they were: `restored(model)` before they are changed."""
    before = []

    def remember(model):
        before.append((model, copy.deepcopy(model.state_dict())))

    yield remember
    for model, state in before:
        model.load_state_dict(state)


def some(units):
    return sorted({0, min(1, units.count - 1), units.count // 2, units.count - 1})


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-10 * a.abs().max())


# What a unit is


@pytest.mark.parametrize("name", MODELS)
def test_nothing_misses_a_unit_whose_members_are_zero(name, restored):
    model, run, sets, _ = coupled(name)
    restored(model)
    state = copy.deepcopy(model.state_dict())
    assert sets
    for units in sets:
        read = False
        for unit in some(units):
            fill(units.readers, unit)
            alive = run(model)
            fill(units.members, unit, 0.0)
            one = run(model)
            fill(units.readers, unit)
            fill(units.members, unit, 0.0)  # of a recurrent layer, members lie in its readers
            assert close(run(model), one), (units.name, unit)
            read |= not close(alive, one)
            model.load_state_dict(state)
        assert read, units.name


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_the_readers_reads_a_unit(name, restored):
    model, run, sets, _ = coupled(name)
    restored(model)
    state = copy.deepcopy(model.state_dict())
    for units in sets:
        for unit in some(units):
            fill(units.readers, unit, 0.0)
            one = run(model)
            fill(units.members, unit)
            fill(units.readers, unit, 0.0)
            assert close(run(model), one), (units.name, unit)
            model.load_state_dict(state)


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "unet", "densenet", "gated"])
def test_cutting_the_slices_of_a_zero_unit_keeps_the_outputs(name, restored):
    model, run, sets, _ = coupled(name)
    restored(model)
    names = {module: name for name, module in model.named_modules()}
    for units in sets:
        fill(units.members, 1, 0.0)
        smaller = copy.deepcopy(model)
        for part in (*units.members, *units.readers):
            module = smaller.get_submodule(names[part.module])
            is_norm = isinstance(module, nn.BatchNorm2d) and part.key == "weight"
            for key in (part.key, *(("running_mean", "running_var") if is_norm else ())):
                tensor = getattr(module, key).data
                kept = [i for i in range(tensor.shape[part.dim]) if i not in part.index[1]]
                getattr(module, key).data = tensor.index_select(part.dim, torch.tensor(kept))
        assert close(run(smaller), run(model)), units.name


# Which elements are in units


@pytest.mark.parametrize("name", MODELS)
def test_no_element_is_in_two_units(name):
    seen, dims = Counter(), {}
    for units in coupled(name)[2]:
        for part in units.members:
            assert len(part.index) == units.count
            for index in part.index.flatten().tolist():
                seen[part.module, part.key, index] += 1
            dims.setdefault((part.module, part.key), set()).add(part.dim)
    assert all(len(found) == 1 for found in dims.values())
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("name", MODELS)
def test_each_weight_is_in_a_unit_or_its_layer_is_named(name):
    model, _, sets, left = coupled(name)
    covered = Counter()
    for part in (part for units in sets for part in units.members):
        covered[part.module, part.key] += part.index.numel()
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding):
            members = (part for units in sets for part in units.members)
            dim = next((part.dim for part in members if (part.module, part.key) == (module, "weight")), 0)
            whole = covered[module, "weight"] == module.weight.shape[dim]
            assert whole != (module_name in left), module_name


def test_a_unit_of_a_residual_stream_spans_all_that_writes_it():
    model, _, sets, left = coupled("resnet")
    stream = next(units for units in sets if units.name == "conv1")
    writers = {part.module for part in stream.members if part.key == "weight" and part.module.weight.ndim > 1}
    block1, block2 = model.layer1
    assert writers == {model.conv1, block1.conv2, block2.conv2}
    assert {part.module for part in stream.readers} == {
        block1.conv1,
        block2.conv1,
        model.layer2[0].conv1,
        model.layer2[0].downsample[0],
    }
    assert left == {"fc": "its units are outputs of the model"}


def test_a_unit_of_a_grouped_convolution_is_a_whole_group():
    model, _, sets, _ = coupled("resnext")
    units = next(units for units in sets if units.name == "layer1.0.conv1")
    assert units.count == 32
    assert {part.module: part.index.shape[1] for part in units.members if part.key == "weight"} == {
        model.layer1[0].conv1: 4,
        model.layer1[0].bn1: 4,
        model.layer1[0].conv2: 4,
        model.layer1[0].bn2: 4,
    }


@pytest.mark.parametrize(
    ("name", "layer", "members"),
    [
        ("attention", "attention", 2),
        ("vit", "blocks.0.attn.qkv", 2),
        ("bert", "bert.encoder.layer.0.attention.self.query", 6),
        ("gpt2", "transformer.h.0.attn.c_attn", 2),
    ],
)
def test_a_head_is_one_unit_over_queries_keys_and_values(name, layer, members):
    heads = next(units for units in coupled(name)[2] if units.name == layer)
    assert heads.count == 3
    assert len(heads.members) == members
    assert sum(part.index.shape[1] for part in heads.members) == 2 * 3 * 4  # weights and biases of q, k and v
    assert [part.index.shape for part in heads.readers] == [(3, 4)]


def test_queries_that_share_keys_and_values_leave_with_them():
    heads = next(units for units in coupled("llama")[2] if units.name.endswith("q_proj"))
    assert [tuple(part.index.shape) for part in heads.members] == [(2, 8), (2, 4), (2, 4)]


@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3)])
def test_a_recurrent_unit_has_the_rows_of_all_gates(name, gates):
    model, _, sets, _ = coupled(name)
    by_name = {units.name: units for units in sets}
    assert set(by_name) == {"embedding", "rnn.l0", "rnn.l0_reverse", "rnn.l1", "rnn.l1_reverse"}
    unit = by_name["rnn.l0_reverse"]
    assert [part.key for part in unit.members] == [
        f"{key}_l0_reverse" for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    assert all(part.index[2].tolist() == [2 + 5 * gate for gate in range(gates)] for part in unit.members)
    assert [part.key for part in unit.readers] == ["weight_hh_l0_reverse", "weight_ih_l1", "weight_ih_l1_reverse"]
    assert by_name["rnn.l1_reverse"].readers[-1].module is model.out
    assert by_name["rnn.l1_reverse"].readers[-1].index[:, 0].tolist() == [5, 6, 7, 8, 9]


# What is left


def reason(model, inputs, layer):
    return coupled_units(model, inputs)[1].get(layer, "")


def test_units_under_a_layer_norm_are_left_and_the_norm_is_named():
    left = coupled("vit")[3]
    assert "LayerNorm" in left["blocks.0.mlp.fc2"]
    assert "mean" in left["patch_embed.proj"]
    assert left["head"] == "its units are outputs of the model"


def test_units_under_a_norm_of_the_users_own_are_left():
    class RMS(nn.Module):
        def forward(self, x):
            return x * x.pow(2).mean(-1, keepdim=True).rsqrt()

    model = nn.Sequential(nn.Linear(4, 6), RMS(), nn.Linear(6, 2))
    assert "read by more than columns" in reason(model, torch.randn(3, 4), "0")


def test_units_that_are_not_zero_where_their_members_are_are_left():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    assert "zero still reaches" in reason(model, torch.randn(3, 4), "0")


def test_units_before_a_batch_norm_without_scales_are_left():
    # Its running mean need not be zero, and is what a zero unit would put out.
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 2))
    assert "zero still reaches" in reason(model, torch.randn(3, 4), "0")


def test_units_added_to_the_inputs_are_left():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(x + self.inner(x))

    assert "zero still reaches" in reason(Residual(), torch.randn(3, 4), "inner")


def test_parametrized_shared_and_unused_layers_are_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    parametrizations.weight_norm(model[0])
    model[4].weight = model[2].weight
    model.unused = nn.Linear(4, 4)
    model.forward = lambda x: nn.Sequential(*list(model)[:6])(x)
    assert "parametrized" in reason(model, torch.randn(3, 4), "0")
    assert "several layers" in reason(model, torch.randn(3, 4), "2")
    assert "does not call" in reason(model, torch.randn(3, 4), "unused")


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_layers_whose_units_are_not_known_are_left():
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.lstm, self.out = nn.GRUCell(3, 4), nn.LSTM(4, 6, proj_size=4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.lstm(self.cell(x).unsqueeze(0))[0])

    sets, left = coupled_units(Cells(), torch.randn(5, 3))
    assert sets == []
    assert set(left) == {"cell", "lstm", "out"}


def test_channels_that_are_shuffled_between_groups_are_followed():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.first(x)
            return self.out(x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2))

    (units,) = coupled_units(Shuffled(), torch.randn(1, 3, 4, 4))[0]
    assert units.readers[0].index.flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


# The model stays as it is


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones(2, 4)
    calls = []
    hook = model[4].register_forward_hook(lambda *_: calls.append(1))
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sets, _ = coupled_units(model, torch.randn(1, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
    assert [units.name for units in sets] == ["0"]  # what is frozen now is a member nevertheless
    assert [module.training for module in model] == [True, False, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert [p.grad is None for p in model.parameters()] == [True, True, True, True, False, True]
    assert torch.equal(model[4].weight.grad, torch.ones(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model[4]._forward_hooks) == [hook.id]
    assert not any(module._forward_hooks for module in list(model)[:4])
    assert torch.equal(torch.get_rng_state(), rng)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_run_as_before_afterwards(kind):
    model, x = Tagger(kind), tokens()
    expected = model(x)
    with torch.no_grad():
        coupled_units(model, x)
    assert "forward" not in model.rnn.__dict__
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert model.rnn.weight_hh_l0.grad is not None


def test_a_model_that_fails_is_restored():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="shape"):
        coupled_units(model, torch.randn(2, 4))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_example_inputs_take_any_form(form):
    sets, left = coupled_units(mlp()[0], form(torch.randn(2, 6)))
    assert [(units.name, units.count) for units in sets] == [("0", 8), ("2", 5)]
    assert list(left) == ["4"]


def test_other_example_inputs_are_refused():
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple or a dict, not int"):
        coupled_units(mlp()[0], 3)


def test_lazy_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialized"):
        coupled_units(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))


def test_without_torch_pruning_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"torch_regpen\[pruning\]"):
        coupled_units(*mlp())


class CachedBias(nn.Module):
    """It keeps what it made of its parameters in eval mode, as attentions of LeViT do."""

    def __init__(self):
        super().__init__()
        self.first, self.out, self.bias, self.cache = nn.Linear(4, 6), nn.Linear(6, 2), nn.Parameter(torch.ones(6)), {}

    def forward(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = 2 * self.bias
        return self.out(self.first(x) * self.cache["bias"])


def test_nothing_that_a_forward_pass_caches_stays():
    model = CachedBias().eval()
    sets, _ = coupled_units(model, torch.randn(2, 4))
    assert [units.name for units in sets] == ["first"]
    assert model.cache == {}


class Concatenated(nn.Module):
    def __init__(self, cat):
        super().__init__()
        self.one, self.other, self.out = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(11, 2)
        self.cat, self.dropout = cat, nn.Dropout()

    def forward(self, x):
        return self.out(self.dropout(self.cat([self.one(x), self.other(x)])))


@pytest.mark.parametrize("cat", [functools.partial(torch.cat, dim=1), torch.hstack, torch.column_stack])
def test_units_are_followed_through_a_concatenation_and_dropout(cat):
    sets, _ = coupled_units(Concatenated(cat), torch.randn(2, 4))
    assert {(units.name, units.count) for units in sets} == {("one", 6), ("other", 5)}
    assert [units.readers[0].index.flatten().tolist() for units in sets] == [list(range(6)), list(range(6, 11))]
