"""The report of a checkpoint: what is zero, for files of torch.save and of safetensors, and nothing else."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from torch_regpen.report import load_tensors, report


@pytest.fixture
def model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(20, 30))
    with torch.no_grad():
        model[0].weight[2] = 0
        model[1].weight[:20] = 0
        model[1].weight[:, 3] = 0
    return model


def row(text, name):
    return next(line for line in text.splitlines() if line.split()[0] == name).split()


def run(*args):
    return subprocess.run([sys.executable, "-m", "torch_regpen", *args], capture_output=True, text=True, check=False)


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_a_row_for_each_tensor_says_what_is_zero(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    text = report(tmp_path / "model.pt")
    weight = model[1].weight
    cells = row(text, "1.weight")
    assert cells[1:3] == ["(30,", "20)"]
    assert int(cells[3]) == weight.numel()
    assert int(cells[4]) == (weight == 0).sum()
    assert float(cells[7]) == pytest.approx(torch.linalg.norm(weight.double()).item(), rel=1e-3)
    assert cells[8:10] == ["20/30", "1/20"]
    assert row(text, "0.weight")[-3:-1] == ["1/8", "0/3"]
    assert len(text.splitlines()) == 1 + len(model.state_dict()) + 1


def test_the_sparse_ratio_is_that_of_torchs_own_csr_format(tmp_path):
    weight = torch.randn(200, 300) * (torch.rand(200, 300) < 0.05)
    torch.save({"w": weight}, tmp_path / "w.pt")
    csr = weight.to_sparse_csr()
    indices = csr.crow_indices().numel() + csr.col_indices().numel()
    expected = weight.numel() * 4 / (csr.values().numel() * 4 + indices * 4)
    assert row(report(tmp_path / "w.pt"), "w")[-1] == f"{expected:.2f}x"


def test_small_is_not_zero(tmp_path):
    torch.save({"w": torch.tensor([1.0, 1e-13, 0.0, -1.0])}, tmp_path / "w.pt")
    assert row(report(tmp_path / "w.pt"), "w")[3:6] == ["1", "25.00", "1"]


def test_safetensors_says_the_same(model, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    lines = [sorted(report(tmp_path / name).splitlines()) for name in ("model.pt", "model.safetensors")]
    assert lines[0] == lines[1]


def test_nested_and_old_files_and_half_precision_are_read(model, tmp_path):
    torch.save({"epoch": 3, "model": model.half().state_dict()}, tmp_path / "checkpoint.pt")
    assert "model.1.weight" in load_tensors(tmp_path / "checkpoint.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert row(report(tmp_path / "old.pt"), "1.weight")[8] == "20/30"


def test_the_command_prints_the_report(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    done = run("report", str(tmp_path / "model.pt"))
    assert done.returncode == 0
    assert done.stdout.strip() == report(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "text", "empty", "truncated", "list", "module", "code", "pickle"]
)
def test_anything_else_is_one_line_that_names_the_file(kind, model, tmp_path):
    file, trap = tmp_path / f"{kind}.pt", tmp_path / "executed"
    if kind == "folder":
        file.mkdir()
    elif kind == "text":
        file.write_text("hello world")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated":
        torch.save(model.state_dict(), file)
        file.write_bytes(file.read_bytes()[:900])
    elif kind == "list":
        torch.save([1, 2], file)
    elif kind == "module":
        torch.save(model, file)
    elif kind == "code":
        torch.save({"w": Trap(str(trap))}, file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Trap(str(trap))))
    done = run("report", str(file))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(file) in done.stderr
    assert not trap.exists()


def test_a_broken_safetensors_file_is_one_line_too(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no header here")
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        report(tmp_path / "x.safetensors")
