"""The examples of activations, units of an LSTM, and BatchNorm run in a small setting and show what they promise."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed(name, capsys, *argv):
    runpy.run_path(str(EXAMPLES / name))["main"](argv)
    return capsys.readouterr().out


def test_the_sparse_autoencoder_has_fewer_active_units(capsys):
    pytest.importorskip("sklearn")
    out = printed("sparse_autoencoder.py", capsys, "--epochs", "3", "--lam", "0.3")
    without, with_penalty = map(float, re.findall(r"active units +([\d.]+) of 256", out))
    assert with_penalty < without / 2


def test_the_lstm_tagger_has_dead_units(capsys):
    out = printed("lstm_tagger.py", capsys, "--steps", "60", "--lam", "1e-3")
    without, with_penalty = map(int, re.findall(r"dead units +(\d+) of 64", out))
    assert without == 0
    assert with_penalty > 0


def test_the_batchnorm_cnn_ends_at_90_percent_zeros(capsys):
    pytest.importorskip("sklearn")
    out = printed("batchnorm_cnn.py", capsys, "--epochs", "6")
    dense, sparse = map(float, re.findall(r"test accuracy ([\d.]+)%", out))
    (zeros,) = map(float, re.findall(r"at ([\d.]+)%", out))
    assert zeros == pytest.approx(90, abs=0.5)
    assert sparse > dense - 10


def test_the_language_model_compares_the_variants_of_decay(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    size = ["--steps", "6", "--width", "16", "--layers", "1", "--files", "10", "--quick"]
    files = ["--plot", str(tmp_path / "plot.png"), "--resume", str(tmp_path / "done.jsonl")]
    out = printed("language_model.py", capsys, *size, *files)
    rows = re.findall(r"^(\S[\w ]+%?) +[\d.e-]+ +([\d.]+) +([\d.]+) +([\d.]+)", out, re.M)
    assert len(rows) == 10
    zeros = {name.strip(): float(share) for name, *_, share in rows}
    assert zeros["L0 80%"] == pytest.approx(80, abs=4)
    assert zeros["L0 50%"] == pytest.approx(50, abs=4)
    losses = {name.strip(): loss for name, loss, *_ in rows}
    assert losses["L2 lr"] == losses["weight_decay"]
    assert (tmp_path / "plot.png").exists()
    assert len((tmp_path / "done.jsonl").read_text().splitlines()) == 20


def test_the_shrunk_resnet_is_smaller_and_as_large_as_the_pruned_one(capsys, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("torch_pruning")
    pytest.importorskip("matplotlib")
    file = tmp_path / "picture.png"
    argv = ("--epochs", "6", "--width", "8", "--targets", "0.5", "--round-to", "1", "--plot", str(file))
    out = printed("shrink_resnet.py", capsys, *argv)
    errors = list(map(float, re.findall(r"no output differs by more than (\S+)", out)))
    assert max(errors) < 1e-4
    dense, shrunk, pruned = ([float(x) for x in row] for row in re.findall(r"([\d.]+)% +[\d,]+ +([\d.]+)M", out))
    assert shrunk[1] < 0.6 * dense[1]
    assert pruned[1] == pytest.approx(shrunk[1], rel=0.3)
    assert shrunk[0] > 60
    assert file.stat().st_size > 1000
