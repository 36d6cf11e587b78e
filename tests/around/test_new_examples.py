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
