"""ActivityPenalty: what counts of the outputs of recurrent layers, attention and models with several."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from torch_regpen import L1, ActivityPenalty


def size(kind, *outputs):
    return sum((a.abs() if kind == "l1" else a**2).sum() / len(a) for a in outputs)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_of_a_recurrent_layer_the_output_is_a_mean_over_the_sequences(make, batch_first):
    layer, sequences = make(3, 2, batch_first=batch_first), [torch.randn(4, 3) for _ in range(5)]
    expected = sum(layer(x)[0].abs().sum() for x in sequences) / 5
    model = nn.Sequential(layer)
    penalty = ActivityPenalty(model, 1.0)
    model(torch.stack(sequences, dim=0 if batch_first else 1))
    torch.testing.assert_close(penalty(), expected)
    model(sequences[0])
    torch.testing.assert_close(penalty(), layer(sequences[0])[0].abs().sum())
    shorter = [x[: 4 - i // 2] for i, x in enumerate(sequences)]
    expected = sum(layer(x)[0].abs().sum() for x in shorter) / 5
    model(pack_sequence(shorter))
    torch.testing.assert_close(penalty(), expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_of_attention_and_transformers_the_batch_is_where_they_say(batch_first):
    given = torch.randn(5, 4, 6) if batch_first else torch.randn(4, 5, 6)
    attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    for model, inputs in ((attention, 3), (layer, 1), (encoder, 1)):
        penalty = ActivityPenalty(model, 1.0, select="")
        for x, samples in ((given, 5), (given.select(0 if batch_first else 1, 0), 1)):
            out = model(*[x] * inputs)
            torch.testing.assert_close(penalty(), (out[0] if inputs == 3 else out).abs().sum() / samples)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Output(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, 2 * x),
        lambda x: Output(x, 2 * x),
        lambda x: (x, None),
        lambda x: {"loss": 0 * x, "last_hidden_state": x},
        lambda x: x > 0,
        lambda x: (10 * x).long(),
    ],
)
def test_of_several_outputs_the_first_or_the_last_hidden_state_counts(make):
    model, x = nn.Sequential(Returns(make)), torch.randn(4, 3)
    penalty = ActivityPenalty(model, 1.0)
    out = model(x)
    torch.testing.assert_close(penalty(), size("l1", out.float() if isinstance(out, torch.Tensor) else x))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda x: None, "NoneType"),
        (lambda x: (), "tuple"),
        (lambda x: ([x], x), "tuple"),
        (lambda x: [x, x], "list"),
        (lambda x: {"logits": x, "loss": x}, "a dict of 'logits', 'loss'"),
    ],
)
def test_an_output_that_cannot_be_meant_is_an_error(make, told):
    model = nn.Sequential(Returns(make))
    ActivityPenalty(model, 1.0)
    with pytest.raises(TypeError, match=f"'0' is {told}.*select"):
        model(torch.ones(2))


def test_the_kind_in_either_case_and_what_its_repr_says():
    model = nn.Sequential(*(nn.ReLU() for _ in range(6)))
    for kind in ("L1", "l1", "L2", "l2"):
        expected = f"ActivityPenalty(lam=0.25, kind={kind.lower()!r}, 6 modules: 0, 1, 2, 3 and 2 others)"
        assert repr(ActivityPenalty(model, 0.25, kind)) == expected
    for kind in (1, None, L1):
        with pytest.raises(ValueError, match="'l1' or 'l2'"):
            ActivityPenalty(model, 1.0, kind)


@pytest.mark.parametrize(
    "use",
    [
        lambda weights, activity: weights + activity,
        lambda weights, activity: activity + weights,
        lambda weights, activity: sum([weights, activity]),
        lambda weights, activity: sum([activity, weights]),
        lambda weights, activity: activity + activity,
        lambda weights, activity: 0.5 * activity,
        lambda weights, activity: activity * 0.5,
        lambda weights, activity: torch.ones(()) + activity,
        lambda weights, activity: weights() + activity,
    ],
)
def test_in_a_sum_it_says_that_it_is_to_be_called(use):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"penalty\(\) \+ activity\(\)"):
        use(L1(model, 0.1), ActivityPenalty(model, 0.1))
