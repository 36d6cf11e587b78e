"""The report of a checkpoint: what is zero, for files of torch.save and of safetensors, and nothing else."""

import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.operations import LargestCopy
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torch_regpen import report as module
from torch_regpen.__main__ import main
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


FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]
WHOLE = [torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE, *COMPLEX])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_type_of_numbers_is_counted(dtype, suffix, tmp_path):
    w = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, -0.0, 0.0, 0.0], [4.0, 0.0, 1.0, 1.0]]).to(dtype)
    file = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save({"w": w}, file)
    elif dtype == torch.complex128:
        pytest.skip("safetensors has no such type")
    else:
        pytest.importorskip("safetensors.torch").save_file({"w": w}, file)
    norm = torch.linalg.norm(w.to(torch.complex128)).item()
    assert row(report(file), "w")[3:10] == ["12", "6", "50.00", "0", f"{norm:.4g}", "1/3", "1/4"]


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr])
def test_sparse_tensors_say_what_they_would_if_they_were_dense(layout, tmp_path):
    w = torch.eye(4) * (torch.arange(4) > 1)
    blocks = {"blocksize": (2, 2)} if layout == torch.sparse_bsr else {}
    torch.save({"dense": w, "sparse": w.to_sparse(layout=layout, **blocks)}, tmp_path / "w.pt")
    text = report(tmp_path / "w.pt")
    assert row(text, "sparse")[1:] == row(text, "dense")[1:]


def test_odd_tensors_have_their_row_and_stop_nothing(tmp_path):
    odd = {
        "empty": torch.empty(0),
        "no_rows": torch.empty(0, 3),
        "no_columns": torch.empty(3, 0),
        "scalar": torch.tensor(0.0),
        "nan": torch.tensor([torch.nan, 1.0, 0.0]),
        "infinite": torch.tensor([torch.inf, 1.0, 0.0]),
        "large": torch.tensor([3e38, 4e38, 0.0]).clamp_max(3e38),
        "small": torch.tensor([3e-40, 4e-40, 0.0]),
        "quantized": torch.quantize_per_tensor(torch.tensor([[0.0, 1.0]]), 0.1, 0, torch.qint8),
        "parameter": nn.Parameter(torch.tensor([[3.0, 0.0], [4.0, 0.0]])),
        "strided": torch.tensor([[3.0, 9.0, 0.0], [4.0, 9.0, 0.0]])[:, ::2].t(),
        "meta": torch.empty(3, 2, device="meta"),
    }
    if hasattr(torch, "float4_e2m1fn_x2"):  # two numbers in a byte, for which torch has no arithmetic
        odd["four_bits"] = torch.zeros(3, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save(odd, tmp_path / "odd.pt")
    text = report(tmp_path / "odd.pt")
    for name in ("empty", "no_rows", "no_columns"):
        assert row(text, name)[-7:] == ["0", "0.00", "0", "0", "-", "-", "-"]
    assert row(text, "scalar")[-6:-3] == ["100.00", "0", "0"]
    assert [row(text, name)[-4] for name in ("nan", "infinite", "large", "small")] == [
        *("nan", "inf", "4.243e+38", "5e-40")
    ]
    assert {row(text, name)[-7] for name in ("nan", "infinite", "large", "small")} == {"1"}
    assert row(text, "quantized")[-7:-1] == ["1", "50.00", "0", "1", "0/1", "1/2"]
    assert row(text, "parameter")[-7:-1] == ["2", "50.00", "0", "5", "0/2", "1/2"]
    assert row(text, "strided")[-7:-1] == ["2", "50.00", "0", "5", "1/2", "0/2"]
    for name in odd.keys() & {"meta", "four_bits"}:
        assert row(text, name)[-8:] == ["6", *["-"] * 7]
    assert row(text, "total")[1] == "23"


def test_a_large_tensor_is_looked_at_part_by_part(tmp_path, monkeypatch):
    w = torch.rand(50, 40) + 1
    w[3] = 0
    w[4, 4] = 1e-6
    torch.save({"w": w}, tmp_path / "w.pt")
    before = report(tmp_path / "w.pt")
    monkeypatch.setattr(module, "CHUNK", 70)
    assert report(tmp_path / "w.pt") == before
    with LargestCopy(w) as copies:
        module._row("w", w)
    assert copies.largest == 70
    assert row(before, "w")[4:7] == ["40", "2.00", "1"]


def test_nested_and_old_files_and_half_precision_are_read(model, tmp_path):
    torch.save({"epoch": 3, "model": model.half().state_dict()}, tmp_path / "checkpoint.pt")
    assert "model.1.weight" in load_tensors(tmp_path / "checkpoint.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert row(report(tmp_path / "old.pt"), "1.weight")[8] == "20/30"


def test_the_command_prints_the_report(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    command = [sys.executable, "-m", "torch_regpen", "report", str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.strip() == report(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "text", "empty", "truncated", "list", "module", "code", "pickle"]
)
def test_anything_else_is_one_line_that_names_the_file(kind, model, tmp_path, monkeypatch, capsys):
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
    monkeypatch.setattr(sys, "argv", ["torch_regpen", "report", str(file)])
    assert main() == 1
    done = capsys.readouterr()
    assert done.out == ""
    assert len(done.err.strip().splitlines()) == 1
    assert str(file) in done.err
    assert not trap.exists()


def test_a_dict_that_holds_itself_is_one_line_too(tmp_path):
    saved = {"w": torch.ones(2)}
    saved["self"] = saved
    torch.save(saved, tmp_path / "self.pt")
    with pytest.raises(ValueError, match=r"self\.pt: it cannot be read"):
        report(tmp_path / "self.pt")


def test_a_sharded_checkpoint_says_how_to_make_a_file_of_it(model, tmp_path):
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "sharded", no_dist=True)
    for part in (tmp_path / "sharded", tmp_path / "sharded" / "__0_0.distcp"):
        with pytest.raises(ValueError, match=r"sharded.*dcp_to_torch"):
            report(part)
    dcp_to_torch_save(tmp_path / "sharded", tmp_path / "whole.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert sorted(report(tmp_path / "whole.pt").splitlines()) == sorted(report(tmp_path / "model.pt").splitlines())


def test_one_ranks_part_of_sharded_tensors_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        w = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        torch.save({"w": w}, tmp_path / "w.pt")
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"one rank's part.*\(w, \.\.\.\).*full_state_dict"):
        report(tmp_path / "w.pt")


def test_a_broken_safetensors_file_is_one_line_too(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no header here")
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        report(tmp_path / "x.safetensors")


def test_a_reader_that_has_enough_ends_the_command_quietly(tmp_path, monkeypatch):
    torch.save({f"layer{i}": torch.ones(1) for i in range(3000)}, tmp_path / "many.pt")  # more than a pipe holds
    torch.save({"w": torch.ones(1)}, tmp_path / "one.pt")  # less: all of it is written at the end
    for file in ("many.pt", "one.pt"):
        reader, writer = os.pipe()
        os.close(reader)
        stderr = io.StringIO()
        with open(writer, "w") as stdout:
            assert run_main(tmp_path / file, monkeypatch, stdout, stderr) == 0
        assert stderr.getvalue() == ""


def test_a_reader_that_has_enough_ends_the_process_quietly(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "one.pt")
    command = [sys.executable, "-m", "torch_regpen", "report", str(tmp_path / "one.pt")]
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # what is left in the buffer is written at exit
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def run_main(file, monkeypatch, stdout, stderr):
    """The command in this process, on streams of its own."""
    monkeypatch.setattr(sys, "argv", ["torch_regpen", "report", str(file)])
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    return main()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_that_the_report_cannot_be_written_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    stderr = io.StringIO()
    with open("/dev/full", "w") as full:
        assert run_main(tmp_path / "w.pt", monkeypatch, full, stderr) == 1
    assert stderr.getvalue().startswith(f"{tmp_path / 'w.pt'}: ")
    assert len(stderr.getvalue().splitlines()) == 1


def test_an_ascii_terminal_shows_what_it_can(tmp_path, monkeypatch):
    file = tmp_path / "gewichte_\u00fc.pt"

    def shown():
        """What there is in the two streams, which are as Python makes them of an ASCII terminal."""
        out, err = io.BytesIO(), io.BytesIO()
        stderr = io.TextIOWrapper(err, "ascii", "backslashreplace", write_through=True)
        code = run_main(file, monkeypatch, io.TextIOWrapper(out, "ascii", write_through=True), stderr)
        return code, out.getvalue().decode(), err.getvalue().decode()

    torch.save({"schl\u00fcssel": torch.ones(1)}, file)
    code, out, err = shown()
    assert (code, err) == (0, "")
    assert row(out, "schl\\xfcssel")[2] == "1"
    file.write_bytes(b"")
    code, _, err = shown()
    assert code == 1
    assert "gewichte_\\xfc.pt" in err


@pytest.mark.parametrize("odd", ["a\nb", "a\rb", "a\x1b[2Jb", "a\u202eb", "a\u2028b", "a\x9b31mb", "a\ud800b"])
def test_no_name_reaches_the_terminal_as_a_command(odd, tmp_path, capsys, monkeypatch):
    torch.save({odd: torch.ones(3), "inner": {odd: torch.ones(2)}}, tmp_path / "odd.pt")
    escaped = odd.encode("unicode_escape").decode()
    text = report(tmp_path / "odd.pt")
    assert len(text.splitlines()) == 4
    assert row(text, escaped)[2] == "3"
    assert row(text, f"inner.{escaped}")[2] == "2"
    assert list(load_tensors(tmp_path / "odd.pt")) == [odd, f"inner.{odd}"]
    with pytest.raises(ValueError, match="there is no such file") as error:
        report(tmp_path / f"{odd}.pt".replace("\ud800", "\n"))
    assert str(error.value).isprintable()


MILLION, TRILLION = 10**6, 10**12


@pytest.mark.parametrize(
    ("w", "expected"),
    [
        (torch.zeros(1, 1).expand(MILLION, MILLION), f"{TRILLION} {TRILLION} 100.00 0 0 {MILLION}/{MILLION}"),
        (torch.full((1,), 2.0).expand(TRILLION), f"{TRILLION} 0 0.00 0 2e+06 - -"),
        (torch.tensor([[0.0], [3.0], [4.0]]).expand(3, TRILLION), f"{3 * TRILLION} {TRILLION} 33.33 0 5e+06 1/3 0/"),
        (torch.tensor([1.0, 1e-9]).expand(TRILLION, 2), f"{2 * TRILLION} 0 0.00 {TRILLION} 1e+06 0/{TRILLION} 0/2"),
    ],
)
def test_an_expanded_tensor_of_any_size_is_counted(w, expected, tmp_path):
    torch.save({"w": w}, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 3000
    assert " ".join(row(report(tmp_path / "w.pt"), "w")[1 + w.ndim :]).startswith(expected)


@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (4, 1), (1, 1), (2, 1, 4), (1, 3, 1), (5,), (1,), ()])
def test_repetitions_change_nothing_that_is_counted(shape):
    thin = torch.randn(shape).relu()
    w = thin.expand([3 if size == 1 else size for size in shape])
    for expanded in (w, w.T if w.ndim == 2 else w):
        assert module._row("w", expanded) == module._row("w", expanded.clone())


def test_a_sparse_tensor_of_any_size_is_counted(tmp_path):
    indices, values = torch.tensor([[0, 7, 7, 10**6 - 1], [5, 5, 5, 0]]), torch.tensor([3.0, 1.0, 3.0, 0.0])
    w = torch.sparse_coo_tensor(indices, values, (10**6, 10**7))
    csr = torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), torch.tensor([5, 5]), values[:2] * 2, (2, 10**12))
    torch.save({"coo": w, "csr": csr}, tmp_path / "w.pt")
    text = report(tmp_path / "w.pt")
    assert row(text, "coo")[3:10] == [
        *(str(10**13), str(10**13 - 2), "100.00", "0", "5"),
        *(f"{10**6 - 2}/{10**6}", f"{10**7 - 1}/{10**7}"),
    ]
    assert row(text, "csr")[3:10] == [
        *(str(2 * 10**12), str(2 * 10**12 - 2), "100.00", "0", "6.325"),
        *("0/2", f"{10**12 - 1}/{10**12}"),
    ]


def test_elements_that_overlap_in_other_ways_have_dashes(tmp_path):
    w = torch.ones(1000).as_strided((500, 500), (1, 1))
    torch.save({"w": w, "v": torch.ones(2)}, tmp_path / "w.pt")
    text = report(tmp_path / "w.pt")
    assert row(text, "w")[3:] == ["250000", *["-"] * 7]
    assert row(text, "total")[1] == "2"


def test_names_that_are_the_same_with_dots_are_both_there(tmp_path):
    saved = {"a.b": torch.ones(1), "a": {"b": torch.ones(2)}, 1: torch.ones(3), "1": torch.ones(4)}
    torch.save(saved, tmp_path / "twice.pt")
    tensors = load_tensors(tmp_path / "twice.pt")
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"a.b": 1, "a.b#2": 2, "1": 3, "1#2": 4}
    assert row(report(tmp_path / "twice.pt"), "total")[1] == "10"


def test_tensors_in_lists_and_tuples_are_there_by_index(tmp_path):
    saved = {"layers": [torch.ones(1), (torch.ones(2), {"w": torch.ones(3)})], "epoch": [1, 2]}
    torch.save(saved, tmp_path / "nested.pt")
    assert list(load_tensors(tmp_path / "nested.pt")) == ["layers.0", "layers.1.0", "layers.1.1.w"]
    torch.save([torch.ones(1), torch.ones(2)], tmp_path / "list.pt")
    assert list(load_tensors(tmp_path / "list.pt")) == ["0", "1"]
