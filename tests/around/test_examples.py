"""Each example runs from end to end, in a small setting, and shows what it promises to show."""

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, *argv: str) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"](argv)


def is_png(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG")


def test_five_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("five_weights.py", "--plot", str(tmp_path / "new" / "plot.png"))
    out = capsys.readouterr().out
    ends = re.findall("exactly 0|not 0", out)
    assert ends == ["not 0", "not 0", "not 0", "exactly 0", "exactly 0"]  # none, L1, L2, decoupled, proximal
    differences = re.findall(r"\d\.\de[+-]\d+", out)
    assert len(differences) == 5
    assert all(float(difference) < 1e-15 for difference in differences)
    assert is_png(tmp_path / "new" / "plot.png")


def test_existing_loop(capsys: pytest.CaptureFixture[str]) -> None:
    run("existing_loop.py", "--epochs", "3")
    without, with_penalty = capsys.readouterr().out.splitlines()
    zeros = r"zeros +([\d,]+) of 17,400 weights"
    assert re.search(zeros, without).group(1) == "0"
    assert re.search(zeros, with_penalty).group(1) != "0"


def test_compare_weight_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    run("compare_weight_decay.py", "--seeds", "2", "--epochs", "1", "--logdir", str(tmp_path))
    rows = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()}
    assert float(rows["weight_decay"][0]) > 0  # lambda
    assert rows["L2 coupled"][:7] == rows["weight_decay"][:7]
    assert is_png(tmp_path / "compare_weight_decay.png")
    assert len((tmp_path / "compare_weight_decay.csv").read_text().splitlines()) == 1 + 2 * (1 + 15 * 8)
    assert len(list((tmp_path / "chosen").iterdir())) == 16


def test_same_lambda_every_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("same_lambda_every_optimizer.py", "--steps", "500", "--plot", str(tmp_path / "plot.png"))
    out = capsys.readouterr().out
    same = dict(re.findall(r"(.+?) +auto +(\d+) of 16", out))
    assert len(same) == 5
    assert all(int(count) >= 15 for count in same.values())
    other = dict(re.findall(r"(.+?) +euclidean +(\d+) of 16", out))
    assert int(other["SGD"]) >= 15
    assert max(int(count) for name, count in other.items() if name != "SGD") <= 8
    assert is_png(tmp_path / "plot.png")


def test_choose_lambda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("choose_lambda.py", "--lambdas", "3", "--steps", "30", "--plot", str(tmp_path / "plot.png"))
    nonzeros = [int(count) for count in re.findall(r"e-\d+ +0\.\d+ +(\d+)", capsys.readouterr().out)]
    assert len(nonzeros) == 3
    assert nonzeros == sorted(nonzeros, reverse=True)
    assert is_png(tmp_path / "plot.png")
