"""Smaller copies of modules that users write by hand: heads, images and states that are cut up and moved about."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_regpen import L0
from torch_regpen.export import shrink
from torch_regpen.groups import Coupled
from torch_regpen.penalties.coupling import coupled_units

pytest.importorskip("torch_pruning")


class Heads(nn.Module):
    """Attention of 3 heads of 4, in ways in which it is written down."""

    def __init__(self, how="sdpa"):
        super().__init__()
        self.n_heads, self.how = 3, how
        self.first, self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(4))
        self.fused, self.last = nn.Linear(12, 36), nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.ones(4))  # which all heads share

    def forward(self, x):
        if self.how == "fused":
            q, k, v = self.fused(x).chunk(3, -1)
        else:
            q, k, v = self.query(x), self.key(x), self.value(x)
        q, k, v = (part.unflatten(-1, (self.n_heads, 4)) for part in (q, k, v))  # batch, place, head, feature
        if self.how == "norm":
            q, k = (F.normalize(part, dim=-1) * self.scale for part in (q, k))
        if self.how == "einsum":
            weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
            y = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        elif self.how == "products":
            q, k, v = (part.transpose(1, 2).reshape(-1, part.shape[1], 4) for part in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).view(len(x), self.n_heads, -1, 4).transpose(1, 2)
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.last(y.flatten(2))


class OneHead(nn.Module):
    """Attention of one head, whose features can leave one by one."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return self.last((self.query(x) @ self.key(x).mT).softmax(-1) @ self.value(x))


class Moves(nn.Module):
    """A convolution whose channels are moved to where the next one reads them."""

    def __init__(self, move, channels):
        super().__init__()
        self.first, self.last, self.move = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(channels, 2, 1), move

    def forward(self, x):
        return self.last(self.move(self.first(x)))


class Square(nn.Module):
    """Pixels are as many as channels, and rows as many as columns, so that sizes do not tell the dimensions apart."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x.reshape(len(x), x.shape[1], -1).transpose(1, 2))


class Translator(nn.Module):
    """The state of one recurrent layer is where another begins."""

    def __init__(self, kind):
        super().__init__()
        self.encoder, self.decoder, self.last = kind(6, 8), kind(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.decoder(x, self.encoder(x)[1])[0])


def shuffle(x):
    return x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)


def blocks(x):  # the pixels of each block of 2 x 2 become channels
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def images(batch):
    return torch.randn(batch, 3, 8, 8)


def sequences(features):
    return lambda batch: torch.randn(batch, 5, features)


MODELS = {  # a model, its inputs, the set of units that were not found, and how many there are
    "fused heads": (lambda: Heads("fused"), sequences(12), "fused", 3),
    "separate heads": (Heads, sequences(12), "query", 3),
    "einsum": (lambda: Heads("einsum"), sequences(12), "query", 3),
    "batched products": (lambda: Heads("products"), sequences(12), "query", 3),
    "normalized heads": (lambda: Heads("norm"), sequences(12), "query", 3),
    "one head": (OneHead, sequences(6), "value", 6),
    "pixel shuffle": (lambda: Moves(lambda x: F.pixel_shuffle(x, 2), 4), images, "first", 4),
    "pixel unshuffle": (lambda: Moves(lambda x: F.pixel_unshuffle(x, 2), 64), images, "first", 16),
    "blocks": (lambda: Moves(blocks, 64), images, "first", 16),
    "roll": (lambda: Moves(lambda x: x.roll(3, 1), 16), images, "first", 16),
    "stack": (lambda: Moves(lambda x: torch.stack([x, x], 2).flatten(1, 2), 32), images, "first", 16),
    "repeat": (lambda: Moves(lambda x: x.repeat(1, 2, 1, 1), 32), images, "first", 16),
    "empty part": (lambda: Moves(lambda x: torch.cat([x[:, 16:], x], 1), 16), images, "first", 16),
    "square": (Square, images, "first", 8),
    "states of a GRU": (lambda: Translator(nn.GRU), sequences(6), "encoder.l0", 8),
    "states of an LSTM": (lambda: Translator(nn.LSTM), sequences(6), "encoder.l0", 8),
}


def without_half_of_its_units(name):
    torch.manual_seed(0)
    make, inputs, _, _ = MODELS[name]
    model = make().double().eval()
    x = inputs(2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / (p[0].numel() ** 0.5 if p.ndim > 1 else 1.0))
        for units in coupled_units(model, x)[0]:
            for part in units.members:
                zero = part.index[: max(units.count // 2, 1)].flatten()
                getattr(part.module, part.key).index_fill_(part.dim, zero, 0.0)
    return model, inputs, x


@pytest.mark.parametrize("name", MODELS)
def test_units_are_followed_to_where_they_are_read(name):
    model, inputs, x = without_half_of_its_units(name)
    _, _, units, count = MODELS[name]
    assert {each.name: each.count for each in coupled_units(model, x)[0]}[units] == count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smaller = shrink(model, x)
    assert {each.name: each.count for each in coupled_units(smaller, x)[0]}[units] == count - max(count // 2, 1)
    for batch in (1, 2, 3):
        y = inputs(batch).double()
        torch.testing.assert_close(smaller(y), model(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["sdpa", "fused", "einsum"])
def test_a_penalty_on_heads_written_by_hand_makes_them_leave(how):
    torch.manual_seed(0)
    model, x = Heads(how), torch.randn(2, 5, 12)
    layers = [model.fused] if how == "fused" else [model.query, model.key, model.value]
    with torch.no_grad():
        for layer in layers:
            layer.weight.view(-1, 3, 4, 12)[:, 1] *= 1e-3
            layer.bias.view(-1, 3, 4)[:, 1] *= 1e-3
    L0(model, 1e-4, groups=Coupled(model, x)).prox_(1.0)
    smaller = shrink(model.eval(), x)
    assert (smaller.n_heads, smaller.last.in_features) == (2, 8)
    torch.testing.assert_close(smaller(x), model(x))
    file = io.BytesIO()
    torch.save(smaller, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), smaller(x))
    assert torch.equal(torch.export.export(copy.deepcopy(smaller), (x,)).module()(x), smaller(x))


def test_channels_that_are_shuffled_leave_where_the_shuffle_allows_it():
    model, x = Moves(shuffle, 16).eval(), images(2)
    found = next(units for units in coupled_units(model, x)[0] if units.name == "first")
    assert found.readers[0].index.flatten().tolist() == [4 * (unit % 4) + unit // 4 for unit in range(16)]
    with torch.no_grad():
        for part in found.members:
            getattr(part.module, part.key)[[0, 4, 8, 12]] = 0  # one of each group
    torch.testing.assert_close(shrink(model, x)(x), model(x))
    assert shrink(model, x).first.out_channels == 12
    with torch.no_grad():
        for part in found.members:
            getattr(part.module, part.key)[1] = 0  # the groups are not of one size without it
    with pytest.warns(UserWarning, match="'first'"):
        smaller = shrink(model, x)
    torch.testing.assert_close(smaller(x), model(x))
