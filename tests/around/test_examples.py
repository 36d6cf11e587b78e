"""Each example runs from end to end, in a small setting, and shows what it promises to show."""

import re
import runpy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the chosen lambda is at an end")  # in a quick run some are
        run("compare_weight_decay.py", "--quick", "--plot", str(tmp_path / "plot.png"), "--logdir", str(tmp_path))
    out = capsys.readouterr().out
    parts = dict(
        re.findall(r"^([\w-]+): [^\n]*\n\n( +lambda.*?\n)(?=\n[\w-]+: |\nThe plot)", out, re.DOTALL | re.MULTILINE)
    )
    assert list(parts) == ["wrong-labels", "noise-inputs", "clean"]
    for name, part in parts.items():
        chosen = {method: float(lam) for method, lam in re.findall(r"^(\w.*?) {2,}([\d.]+) ", part, re.MULTILINE)}
        assert len(chosen) == 7
        assert chosen["L2 in the loss"] == chosen["weight_decay"]
        assert len(list((tmp_path / name / "chosen").iterdir())) == 7
    assert is_png(tmp_path / "plot.png")


def test_compare_weight_decay_maps_the_inputs_kept(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    example = runpy.run_path(str(EXAMPLES / "compare_weight_decay.py"))
    data = example["load_data"](example["SETTINGS"]["noise-inputs"], 0)
    model = example["make_model"](example["SETTINGS"]["noise-inputs"], data)
    with torch.no_grad():
        model.hidden1.weight.zero_()
        model.hidden1.weight[3, [0, 7, 8, 64 + 63]] = 1.0  # pixels in the first two lines, and a copy of the last pixel
    assert example["score"](model, data) | {"pixels": 3, "copies": 1} == example["score"](model, data)
    example["print_inputs"](example["kept_inputs"](model))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-9] == "3 of 64 pixels, the first map; 1 of 512 shuffled copies."
    assert lines[-8].startswith("#......# ........")
    assert lines[-7].startswith("#....... ........")
    assert lines[-1].startswith("........ .......# ........")


def test_compare_weight_decay_spoils_what_the_setting_says() -> None:
    pytest.importorskip("scipy")
    example = runpy.run_path(str(EXAMPLES / "compare_weight_decay.py"))
    load, settings = example["load_data"], example["SETTINGS"]
    wrong = load(settings["wrong-labels"], 0)
    clean = load(replace(settings["wrong-labels"], wrong_labels=0.0), 0)
    share = {name: (wrong[name].y != clean[name].y).double().mean().item() for name in wrong}
    assert share["train"] == pytest.approx(0.3, abs=0.06)
    assert share["validation"] == pytest.approx(0.3, abs=0.06)
    assert share["test"] == 0
    noise = torch.cat([split.x for split in load(settings["noise-inputs"], 0).values()]).view(-1, 9, 64)
    noise = noise[:, :, (noise.std(dim=0) > 0).all(dim=0)]  # not blank in the training images
    grey = noise - noise.amin(dim=0)
    grey = 16 * grey / grey.amax(dim=0)  # undoes the standardization
    torch.testing.assert_close(grey[:, 0].sort(dim=0).values, grey[:, 8].sort(dim=0).values)
    assert (grey[:, 0] - grey[:, 8]).abs().mean() > 1


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
