"""Smaller copies of models. The oracle is the original model: its outputs, and the units that were made zero."""

import copy
import functools
import warnings

import pytest
import torch
from helpers.nets import Scale
from torch import nn
from torch.nn.utils import prune

from torch_regpen import L0, GroupLasso, RegularizedOptimizer
from torch_regpen.export import prune_masks, shrink
from torch_regpen.groups import Coupled
from torch_regpen.penalties.coupling import coupled_units
from torch_regpen.schedules import TargetSparsity

pytest.importorskip("torch_pruning")


class Tagger(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(20, 6), kind(6, 8, batch_first=True, **options)
        self.out = nn.Linear(8 * (1 + self.rnn.bidirectional), 4)

    def forward(self, x):
        return self.out(self.rnn(self.embedding(x))[0])


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


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def vgg():
    first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(2)
    second = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    last = nn.Linear(24, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3)
    return nn.Sequential(*first, *second, *last)


def norms():
    first = nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.InstanceNorm2d(6), nn.ReLU()
    second = nn.Conv2d(6, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Conv2d(6, 2, 1))


def grouped():
    first = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3, groups=4), nn.ReLU()
    return nn.Sequential(*first, nn.ConvTranspose2d(24, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1))


def resnet():
    resnet = pytest.importorskip("torchvision").models.resnet
    return resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], 10)


def squeezenet():
    return pytest.importorskip("torchvision").models.squeezenet1_1(num_classes=10)


def mobilenet_v2():
    blocks = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 2, 2]]
    return pytest.importorskip("torchvision").models.MobileNetV2(10, 0.5, blocks)


def vit():
    vision_transformer = pytest.importorskip("timm").models.vision_transformer
    return vision_transformer.VisionTransformer(16, 8, 3, 4, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2)


def convnext():
    convnext = pytest.importorskip("timm").models.convnext
    return convnext.ConvNeXt(3, 4, depths=(1, 1, 1, 1), dims=(8, 8, 12, 12))


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.BertConfig(**sizes, intermediate_size=20, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def llama():  # pairs of queries share keys and values
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def distilbert():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "dim": 12, "n_layers": 1, "n_heads": 3, "hidden_dim": 20}
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**sizes, max_position_embeddings=16)
    )


def images(size):
    return lambda batch: torch.randn(batch, 3, size, size)


def tokens(batch):
    return torch.randint(0, 50, (batch, 7))


MODELS = {
    "mlp": (mlp, lambda batch: torch.randn(batch, 6)),
    "vgg": (vgg, images(8)),
    "norms": (norms, images(9)),
    "grouped": (grouped, images(9)),
    "unet": (UNet, images(8)),
    "resnet": (resnet, images(32)),
    "mobilenet_v2": (mobilenet_v2, images(32)),
    "squeezenet": (squeezenet, images(32)),
    "vit": (vit, images(16)),
    "convnext": (convnext, images(32)),
    "bert": (bert, tokens),
    "gpt2": (gpt2, tokens),
    "llama": (llama, tokens),
    "distilbert": (distilbert, tokens),
    "lstm": (Tagger, lambda batch: tokens(batch) % 20),
    "gru": (lambda: Tagger(nn.GRU, num_layers=2, bidirectional=True), lambda batch: tokens(batch) % 20),
}


@torch.no_grad()
def zero(units, chosen):
    for part in units.members:
        index = part.index[torch.as_tensor(chosen)].flatten()
        getattr(part.module, part.key).index_fill_(part.dim, index, 0.0)


@torch.no_grad()
def zero_half(model, x):
    """Make all parameters and running statistics random, and about half of the units of each set zero."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and "rotary" not in name:
            tensor.copy_(torch.randn(tensor.shape) / (tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 1.0))
    sets, _ = coupled_units(model, x)
    for units in sets:
        zero(units, torch.randperm(units.count)[: max(units.count // 2, 1)])
    return sets


def out(model, x):
    with torch.no_grad():
        y = model(x)
    return y.logits if hasattr(y, "logits") else y


def close(a, b):
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def count(model):
    return sum(p.numel() for p in model.parameters())


@functools.cache
def case(name):
    """A model with zero units, a function that makes inputs, the sets of units, its state, the smaller copy."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make().eval(), inputs(2)
    sets = zero_half(model, x)
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smaller = shrink(model, x)
    return model, inputs, sets, state, smaller


# What comes out


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_are_those_of_the_original(name):
    model, inputs, _, _, smaller = case(name)
    assert count(smaller) < count(model)
    for batch in (1, 2, 5):
        x = inputs(batch)
        assert close(out(smaller, x), out(model, x)), batch


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_of_torchvision_keep_their_outputs(name):
    model = getattr(pytest.importorskip("torchvision").models, name)(num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    zero_half(model, x)
    smaller = shrink(model, x)
    assert count(smaller) < 0.35 * count(model)
    assert close(out(smaller, x), out(model, x))


@pytest.mark.parametrize("name", MODELS)
def test_each_zero_unit_is_gone(name):
    _, inputs, sets, _, smaller = case(name)
    again, _ = coupled_units(smaller, inputs(2))
    left = {units.name: max(units.count - max(units.count // 2, 1), 1) for units in sets}
    assert {units.name: units.count for units in again} == left


@pytest.mark.parametrize("name", MODELS)
def test_the_original_is_not_changed(name):
    model, _, _, state, smaller = case(name)
    now = model.state_dict()
    assert all(torch.equal(now[key], state[key]) for key in state)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in smaller.parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in smaller.modules())


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_the_copy_and_its_state_can_be_loaded(name, tmp_path):
    _, inputs, _, _, smaller = case(name)
    torch.save(smaller, tmp_path / "model.pt")
    loaded, x = torch.load(tmp_path / "model.pt", weights_only=False), inputs(2)
    assert torch.equal(out(loaded, x), out(smaller, x))
    other = copy.deepcopy(smaller)
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(smaller.state_dict())
    assert torch.equal(out(other, x), out(smaller, x))


@pytest.mark.parametrize("name", ["vgg", "grouped", "unet", "resnet", "norms", "lstm"])
def test_its_modules_print_the_sizes_that_they_have(name):
    _, _, _, _, smaller = case(name)
    for module in smaller.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            kind, bias = type(module), module.bias is not None
            args = module.in_channels, module.out_channels, module.kernel_size
            same = kind(*args, groups=module.groups, bias=bias)
        elif isinstance(module, nn.Linear):
            same = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, nn.BatchNorm2d):
            same = nn.BatchNorm2d(module.num_features)
        elif isinstance(module, nn.GroupNorm):
            same = nn.GroupNorm(module.num_groups, module.num_channels)
        elif isinstance(module, nn.LSTM):
            same = nn.LSTM(module.input_size, module.hidden_size)
        else:
            continue
        assert [(k, v.shape) for k, v in same.state_dict().items()] == [
            (k, v.shape) for k, v in module.state_dict().items()
        ]


def test_norms_without_parameters_adopt_the_size_of_their_input():
    smaller = case("norms")[-1]
    assert [smaller[4].num_features, smaller[3].out_channels] == [3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smaller(torch.randn(2, 3, 9, 9))


def test_tied_weights_stay_tied():
    model = case("gpt2")[-1]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_heads_that_are_left_are_counted_by_their_modules():
    attention = case("vit")[-1].blocks[0].attn
    assert (attention.num_heads, attention.attn_dim, attention.qkv.out_features) == (2, 8, 24)
    attention = case("bert")[-1].bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (2, 8)
    attention = case("gpt2")[-1].transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf) == (2, 8, 24)


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_it_can_be_exported_scripted_and_compiled(name):
    _, inputs, _, _, smaller = case(name)
    x = inputs(2)
    exported = torch.export.export(smaller, (x,)).module()
    for other in (exported, torch.jit.script(smaller), torch.compile(smaller, backend="eager")):
        assert close(out(other, x), out(smaller, x))


def test_nothing_that_a_forward_pass_caches_is_in_the_copy():
    class CachedBias(nn.Module):  # as attentions of LeViT do in eval mode
        def __init__(self):
            super().__init__()
            self.first, self.out, self.bias, self.cache = (
                nn.Linear(4, 6),
                nn.Linear(6, 2),
                nn.Parameter(torch.ones(6)),
                {},
            )

        def forward(self, x):
            if "bias" not in self.cache:
                self.cache["bias"] = 2 * self.bias
            return self.out(self.first(x) * self.cache["bias"])

    model, x = CachedBias().eval(), torch.randn(2, 4)
    zero_half(model, x)
    smaller = shrink(model, x)
    assert model.cache == smaller.cache == {}
    assert (smaller.first.out_features, smaller.bias.shape) == (3, (3,))
    assert close(out(smaller, x), out(model, x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_onnxruntime_agrees(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    _, inputs, _, _, smaller = case(name)
    x = inputs(2)
    torch.onnx.export(smaller, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert close(torch.from_numpy(y), out(smaller, x))


@pytest.mark.parametrize("name", ["vgg", "lstm", "vit", "mobilenet_v2"])
def test_it_can_be_trained_further(name):
    _, inputs, _, _, smaller = case(name)
    model, x = copy.deepcopy(smaller).train(), inputs(4)
    before = out(smaller, x)
    model(x).square().sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert not torch.equal(out(model.eval(), x), before)


def test_frozen_parameters_and_modes_are_kept():
    model, x = mlp(), torch.randn(2, 6)
    zero_half(model, x)
    model[0].requires_grad_(False)
    model[1].eval()
    model(x).sum().backward()
    smaller = shrink(model, x)
    assert [p.requires_grad for p in smaller.parameters()] == [False, False, True, True, True, True]
    assert [module.training for module in smaller] == [True, False, True, True, True]
    assert all(p.grad is None for p in smaller.parameters())
    assert model[2].weight.grad is not None


def test_a_model_without_zero_units_is_copied():
    model, x = mlp(), torch.randn(2, 6)
    smaller = shrink(model, x)
    assert count(smaller) == count(model)
    assert torch.equal(smaller(x), model(x))


def test_one_unit_stays_where_all_are_zero():
    model, x = mlp(), torch.randn(2, 6)
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    smaller = shrink(model, x)
    assert smaller[0].weight.shape == (1, 6)
    assert close(smaller(x), model(x))


@pytest.mark.parametrize("make", [lambda m, c: L0(m, 1e-4, groups=c), lambda m, c: GroupLasso(m, 1e-3, groups=c)])
def test_a_trained_model_with_zero_units_becomes_smaller(make):
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 6, 6), torch.randint(3, (64,))
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 3)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped = RegularizedOptimizer(optimizer, make(model, Coupled(model, x[:1])), "proximal")
    schedule = TargetSparsity(wrapped, 0.5, steps=100, freeze=True)
    for _ in range(120):
        wrapped.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        wrapped.step()
        schedule.step()
    smaller = shrink(model, x[:2])
    assert smaller[0].out_channels + smaller[5].out_features <= 19
    assert count(smaller) < 0.8 * count(model)
    model.eval(), smaller.eval()
    assert close(smaller(x), model(x))


# What stays


def test_zero_outputs_and_streams_under_a_layer_norm_stay_and_are_named():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(2, 6)
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias, model[1].weight, model[1].bias, model[2].weight, model[2].bias):
            p[0] = 0
    with pytest.warns(UserWarning, match=r"1 of '0': 1 \(LayerNorm\).*1 of '2': its units are outputs of the model"):
        smaller = shrink(model, x)
    assert count(smaller) == count(model)


def test_heads_of_multi_head_attention_stay_and_are_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 2)

        def forward(self, x):
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    model, x = Model(), torch.randn(2, 5, 12)
    zero_half(model, x)
    with pytest.warns(UserWarning, match=r"1 of 'attention': nn.MultiheadAttention requires"):
        smaller = shrink(model, x)
    assert close(out(smaller, x), out(model, x))


def test_feed_forward_units_of_an_encoder_layer_leave():
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 12)
    with torch.no_grad():
        for each in model.layers:
            each.linear1.weight[:7] = each.linear1.bias[:7, None] = 0
    smaller = shrink(model, x)
    assert [each.linear1.out_features for each in smaller.layers] == [13, 13]
    assert close(out(smaller, x), out(model, x))


def test_layers_of_an_lstm_keep_the_same_number_of_units():
    torch.manual_seed(0)
    model, x = Tagger(num_layers=2), torch.randint(0, 20, (2, 7))
    sets = {units.name: units for units in coupled_units(model, x)[0]}
    zero(sets["rnn.l0"], [1, 4, 5])
    zero(sets["rnn.l1"], [0, 7])
    with pytest.warns(UserWarning, match=r"1 of 'rnn\.l0': the layers and directions .* the same number"):
        smaller = shrink(model, x)
    assert smaller.rnn.hidden_size == 6
    assert close(out(smaller, x), out(model, x))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projecting_lstm_reads_fewer_units():
    class Projecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.rnn = nn.Embedding(20, 6), nn.LSTM(6, 8, proj_size=3, batch_first=True)

        def forward(self, x):
            return self.rnn(self.embedding(x))[0]

    model, x = Projecting(), torch.randint(0, 20, (2, 7))
    zero_half(model, x)
    smaller = shrink(model, x)
    assert (smaller.rnn.input_size, smaller.rnn.hidden_size, smaller.rnn.proj_size) == (3, 8, 3)
    assert close(out(smaller, x), out(model, x))


class FixedView(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.out = nn.Conv2d(3, 4, 3), nn.Linear(16, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.hidden(self.conv(x).relu().view(len(x), 16)).relu())


def test_units_whose_number_the_forward_pass_holds_stay_and_the_others_leave():
    model, x = FixedView(), torch.randn(2, 3, 4, 4)
    sets = zero_half(model, x)
    assert {units.name for units in sets} == {"conv", "hidden"}
    with pytest.warns(UserWarning, match=r"2 of 'conv': the forward pass fails without them: shape"):
        smaller = shrink(model, x)
    assert (smaller.conv.out_channels, smaller.hidden.out_features) == (4, 3)
    assert close(out(smaller, x), out(model, x))


def test_units_that_only_change_the_outputs_stay():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x)
            return self.out(x) / x.shape[-1]

    model, x = Mean(), torch.randn(2, 4)
    zero_half(model, x)
    with pytest.warns(UserWarning, match=r"3 of 'first': the outputs differ without them"):
        smaller = shrink(model, x)
    assert torch.equal(smaller(x), model(x))


def test_units_of_an_unknown_module_that_holds_their_number_stay():
    model, x = nn.Sequential(nn.Linear(4, 6), Scale(), nn.Linear(6, 2)), torch.randn(2, 4)
    zero_half(model, x)
    with pytest.warns(UserWarning, match=r"3 of '0': it is not known what 1\.size = 6 of Scale means"):
        smaller = shrink(model, x)
    assert count(smaller) == count(model)
    del model[1].size
    smaller = shrink(model, x)
    assert (smaller[0].out_features, len(smaller[1].scale), smaller[2].in_features) == (3, 3, 3)


def test_what_is_no_model_and_no_input_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not a dict"):
        shrink({}, torch.ones(1))
    with pytest.raises(TypeError, match="a tensor, a tuple or a dict, not str"):
        shrink(mlp(), "x")


def test_a_sharded_model_is_refused(one_rank):
    from torch.distributed.tensor import distribute_tensor

    model = mlp()
    model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), one_rank))
    with pytest.raises(ValueError, match=r"'2\.weight' is sharded"):
        shrink(model, torch.randn(2, 6))


def test_a_model_with_masks_is_refused_until_they_are_permanent():
    model, x = mlp(), torch.randn(2, 6)
    zero_half(model, x)
    prune_masks(model)
    model(x)
    with pytest.raises(ValueError, match=r"torch\.nn\.utils\.prune\.remove first"):
        shrink(model, x)
    for layer in model[::2]:
        if prune.is_pruned(layer):
            prune.remove(layer, "weight")
    assert shrink(model, x)[0].out_features == 4


def test_a_compiled_model_is_shrunk():
    model, x = mlp(), torch.randn(2, 6)
    zero_half(model, x)
    assert type(shrink(torch.compile(model, backend="eager"), x)) is nn.Sequential


# The number of units that stay


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "mobilenet_v2", "vit", "gpt2", "gru"])
def test_round_to_leaves_a_multiple_of_units_and_the_outputs(name):
    model, inputs, sets, _, smallest = case(name)
    x = inputs(2)
    smaller = shrink(model, x, round_to=5)
    assert count(smallest) <= count(smaller) <= count(model)
    assert close(out(smaller, x), out(model, x))
    before, after = ({units.name: units.count for units in some} for some in (sets, coupled_units(smaller, x)[0]))
    assert before.keys() == after.keys()
    assert all(after[name] % 5 == 0 or after[name] == before[name] for name in before)


def test_round_to_counts_constant_units_too():
    model, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(3, 4)
    with torch.no_grad():
        model[0].weight[:7] = 0  # of these 7 units, 3 are zero and 4 have a constant output
        model[0].bias[:3] = 0
    widths = [shrink(model, x, round_to=n)[0].out_features for n in (1, 3, 4, 8, 10, 16, 32)]
    assert widths == [9, 9, 12, 16, 10, 16, 16]
    assert close(out(shrink(model, x, round_to=10), x), out(model, x))


@pytest.mark.parametrize("bad", [0, -8, 2.0, True, "8"])
def test_round_to_must_be_a_whole_number(bad):
    with pytest.raises(ValueError, match="round_to must be a whole number, 1 or more"):
        shrink(mlp(), torch.randn(1, 6), round_to=bad)
