"""Dead units taken out of a model with Torch-Pruning."""

import runpy
import time
from pathlib import Path

import pytest
import torch
from helpers.nets import zero_
from torch import nn

from torch_regpen.export import dead_units

EXAMPLE = Path(__file__).parents[2] / "examples" / "export_pruned.py"
# Torch-Pruning: dead units taken out


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("torch_pruning")
    pytest.importorskip("sklearn")
    return runpy.run_path(str(EXAMPLE))


def with_dead_units(model, share=0.5):
    """The model in float64, `share` of the units of each layer but the last dead, with biases that say so."""
    layers = [layer for layer in model.double() if hasattr(layer, "weight")]
    for layer in layers:
        nn.init.normal_(layer.bias)
    for layer in layers[:-1]:
        zero_(layer.weight, 0, torch.randperm(len(layer.weight))[: int(share * len(layer.weight))].tolist())
    return model


@pytest.mark.parametrize("make", ["mlp", "convnet"])
def test_a_shrunk_model_gives_the_same_outputs(example, make):
    model, x = with_dead_units(example[make]()), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    before, size = model(x), sum(p.numel() for p in model.parameters())
    taken = example["shrink"](model, x[:1])
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert list(taken.values()) == {"mlp": [150, 50], "convnet": [16, 32, 50]}[make]
    assert sum(p.numel() for p in model.parameters()) < 0.5 * size
    assert not dead_units(model)


def test_folding_alone_changes_no_output_and_leaves_the_units_silent(example):
    model, x = with_dead_units(example["mlp"]()), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    before, units = model(x), dead_units(model)["1.weight"]
    example["fold"](model[1], model[2:3], model[3], units, x[:1].flatten(1))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert (model[:3](x)[:, units] == 0).all()


def test_the_constants_of_dead_units_matter(example, monkeypatch):
    model, x = with_dead_units(example["mlp"]()), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    before = model(x)
    monkeypatch.setitem(example["shrink"].__globals__, "fold", lambda *_: None)
    example["shrink"](model, x[:1])
    assert (model(x) - before).abs().max() > 0.1


def test_units_that_die_with_those_before_them_are_taken_out_too(example):
    model = with_dead_units(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), 0.25
    )
    alive = (model[0].weight != 0).any(dim=1)
    with torch.no_grad():
        model[2].weight[[0, 3]] *= ~alive  # these read only what is dead
    x = torch.randn(20, 3, dtype=torch.float64)
    before = model(x)
    assert example["shrink"](model, x[:1])[2] >= 2
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_of_a_layer_that_is_all_dead_one_unit_stays(example):
    model, x = with_dead_units(example["mlp"](), share=1), torch.randn(20, 1, 8, 8, dtype=torch.float64)
    before = model(x)
    assert example["shrink"](model, x[:1]) == {1: 299, 3: 99}
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_what_cannot_be_folded_is_refused(example):
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    padded = with_dead_units(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)))
    with pytest.raises(ValueError, match="padding"):
        example["shrink"](padded, x)
    shifted = with_dead_units(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3)))
    with pytest.raises(ValueError, match="zeros"):
        example["shrink"](shifted, x)


def test_a_shrunk_model_is_faster(example):
    layers = nn.Linear(64, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 10)
    model, x = with_dead_units(nn.Sequential(*layers), 0.9), torch.randn(50, 64, dtype=torch.float64)

    def seconds():
        times = []
        for _ in range(5):
            start = time.process_time()
            model(x)
            times.append(time.process_time() - start)
        return min(times)

    before = seconds()
    example["shrink"](model, x[:1])
    assert seconds() < before / 3


def test_the_example_says_so(example, capsys):
    example["main"](["--epochs", "2"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [row[0] for row in rows] == ["mlp", "without", "convnet", "without"]
    accuracies = [row[-1] for row in rows]
    assert accuracies[0] == accuracies[1]
    assert accuracies[2] == accuracies[3]
