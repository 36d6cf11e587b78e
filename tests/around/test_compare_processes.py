"""compare(n_jobs=2): the same results in several processes, and errors where processes cannot be used."""

import os
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim import SGD

from torch_regpen import L1, LHalf
from torch_regpen.compare import compare

pytestmark = pytest.mark.filterwarnings("ignore:the chosen lambda is at an end", "ignore:.* trainings failed")


def data(seed):
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.get_default_dtype())


def make_model(data):
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def fit(model, optimizer, penalty, data):
    if getattr(optimizer, "mode", None) == "dual" and optimizer.penalty.lam == 0.1:
        raise ValueError("dual")
    for rows in torch.randperm(32).split(8):
        optimizer.zero_grad()
        ((model(data[rows]) - 1).square().mean() + penalty()).backward()
        optimizer.step()


def score(model, data):
    model.eval()
    errors = (model(data[32:]) - 1).square().flatten()
    return {"validation": -errors[:16].mean(), "test": -errors[16:].mean()}


def dying(*args):
    os._exit(1)


SETUP = {
    "data": data,
    "make_model": make_model,
    "make_optimizer": partial(SGD, lr=0.1),
    "fit": fit,
    "score": score,
    "seeds": [3, 4],
}
METHODS = {"L1": (partial(L1, select="*weight"), "proximal"), "L1/2": (LHalf, "dual")}


def where(model, data):
    """The scores, and the process and its settings."""
    settings = torch.get_num_threads(), torch.get_default_dtype() == torch.float64
    names = ("elsewhere", "threads", "float64")
    return score(model, data) | dict(zip(names, (os.getpid() != int(os.environ["PARENT"]), *settings), strict=True))


def results(comparison):
    return [(*trial.job, trial.scores["test"], trial.zeros, trial.steps) for trial in comparison.trials]


def test_the_results_are_those_of_one_process(monkeypatch):
    monkeypatch.setenv("PARENT", str(os.getpid()))
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    try:
        one = compare(METHODS, [0.01, 0.1], **SETUP | {"score": where})
        two = compare(METHODS, [0.01, 0.1], **SETUP | {"score": where}, n_jobs=2)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
    assert results(one) == results(two)
    assert one.chosen == two.chosen
    assert sorted(failure[:4] for failure in one.failures) == sorted(failure[:4] for failure in two.failures)
    assert {failure[:2] + failure[3:4] for failure in two.failures} == {("L1/2", 0.1, "ValueError: dual")}
    assert all("in fit" in failure.traceback for failure in two.failures)
    for comparison, elsewhere in ((one, 0.0), (two, 1.0)):
        for trial in comparison.trials:
            assert [trial.scores[name] for name in ("elsewhere", "threads", "float64")] == [elsewhere, 2.0, 1.0]


def test_a_process_that_dies_is_an_error_that_says_why():
    with pytest.raises(RuntimeError, match=r"n_jobs=2: a process ended\. .*memory.*__name__ == '__main__'"):
        compare({}, [0.1], **SETUP | {"fit": dying}, n_jobs=2)


@pytest.mark.parametrize("name", ["data", "make_model", "make_optimizer", "fit", "score", "methods"])
def test_what_no_other_process_can_import_is_refused_before_training(name):
    methods = {"L1": (lambda model, lam: L1(model, lam), "loss")} if name == "methods" else {}
    changes = {} if name == "methods" else {name: lambda *args: SETUP[name](*args)}
    with pytest.raises(TypeError, match=rf"but {name} cannot be imported .*top level of a file.*Or leave out n_jobs"):
        compare(methods, [0.1], **SETUP | changes, n_jobs=2)


SCRIPT = """
from test_compare_processes import *
def fit(model, optimizer, penalty, data): pass
compare({}, [0.1], **SETUP | {"fit": fit}, n_jobs=2)
"""


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        (None, TypeError, "n_jobs above 1 .* cannot be imported"),  # as of `python -c` and of a terminal
        ("script.py", RuntimeError, "n_jobs=2: a process ended"),
    ],
)
def test_programs_that_cannot_start_processes_are_told_what_to_do(file, error, message, tmp_path, monkeypatch):
    program = ModuleType("__main__")
    if file is not None:
        program.__file__ = str(tmp_path / file)
        (tmp_path / file).write_text(SCRIPT)
    monkeypatch.setitem(sys.modules, "__main__", program)
    with pytest.raises(error, match=message):
        exec(SCRIPT, program.__dict__)
