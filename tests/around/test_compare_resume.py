"""compare(resume=FILE): what is trained again, what is not, and which files are refused."""

import json
import math
from argparse import Namespace
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD

from torch_regpen import L1, L2, MCP
from torch_regpen.compare import compare
from torch_regpen.compare.resume import describe

pytestmark = pytest.mark.filterwarnings("ignore:the chosen lambda is at an end", "ignore:.* trainings failed")

LAMS = [0.01, 0.1]
METHODS = {"L1\n": (L1, "proximal")}
EPOCHS = 2
trained = []
ends = Namespace(after=None, by=KeyboardInterrupt)


def data(seed):
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))


def make_model(data, hidden=3):
    return nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 1))


def fit(model, optimizer, penalty, data):
    if len(trained) == ends.after:
        raise ends.by
    trained.append(optimizer)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        ((model(data[:4]) - 1).square().mean() + penalty()).backward()
        optimizer.step()


def score(model, data):
    return {"validation": -(model(data[4:8]) - 1).square().mean(), "test": -(model(data[8:]) - 1).square().mean()}


SETUP = {
    "data": data,
    "make_model": make_model,
    "make_optimizer": lambda params: SGD(params, lr=0.1),
    "fit": fit,
    "score": score,
    "seeds": [3, 4],
}


def run(file, methods=METHODS, lams=LAMS, **changes):
    """The comparison, and how many trainings it took, without those of the chosen models."""
    trained.clear()
    found = compare(methods, lams, resume=file, **SETUP | changes)
    return found, len(trained) - len(found.models)


def results(comparison):
    return [trial[:7] for trial in comparison.trials], comparison.chosen


@pytest.fixture
def done(tmp_path):
    """The file of a whole comparison."""
    run(tmp_path / "done.jsonl")
    return tmp_path / "done.jsonl"


@pytest.mark.parametrize("after", [0, 1, 7, 9])
def test_an_interrupted_comparison_goes_on_where_it_was(after, tmp_path, monkeypatch):
    file = tmp_path / "new folder" / "done.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(ends, "after", after)
        with pytest.raises(KeyboardInterrupt):
            run(file)
    assert len(file.read_text().splitlines()) == after
    found, count = run(file)
    assert count == 10 - after
    assert results(found) == results(compare(METHODS, LAMS, **SETUP))


def test_a_training_that_failed_is_tried_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ends, "after", 3)
        patch.setattr(ends, "by", MemoryError)
        found, count = run(tmp_path / "done.jsonl")
    assert (len(found.failures), count) == (10 - 3 + len(found.chosen), 3)
    found, count = run(tmp_path / "done.jsonl")
    assert (len(found.failures), count) == (0, 7)


def test_each_finished_training_is_a_line_of_json(done):
    lines = [json.loads(line) for line in done.read_text().splitlines()]
    trials = {trial.job: trial for trial in compare(METHODS, LAMS, **SETUP).trials}
    assert {(line["method"], line["lam"], line["seed"]) for line in lines} == trials.keys()
    for line in lines:
        trial = trials[line["method"], line["lam"], line["seed"]]
        assert (line["scores"], line["zeros"], line["steps"]) == (trial.scores, trial.zeros, trial.steps)


def test_more_methods_lambdas_and_seeds_train_only_what_is_new(done):
    assert run(done)[1] == 0
    assert run(done, METHODS | {"L2": (L2, "loss")})[1] == 2 * 2
    assert run(done, METHODS | {"L2": (L2, "loss")}, [*LAMS, 1.0])[1] == 2 * 3
    assert run(done, METHODS, seeds=[3, 4, 5])[1] == 1 + 2 * 2
    assert run(done, METHODS, [0.1], seeds=[4, 5])[1] == 0
    assert len(done.read_text().splitlines()) == 10 + 4 + 6 + 5


def test_scores_that_are_not_finite_are_found_again(tmp_path):
    def odd(model, data):
        return {"validation": -math.inf, "test": 1 / 3, "other": math.nan}

    first, _ = run(tmp_path / "done.jsonl", score=odd)
    again, count = run(tmp_path / "done.jsonl", score=odd)
    assert count == 0
    assert repr(results(again)) == repr(results(first))


@pytest.mark.parametrize("cut", [1, 12, 60, -2])
def test_a_line_that_was_cut_off_is_trained_again(cut, done):
    text = done.read_text()
    *others, last = text.splitlines(keepends=True)
    done.write_text("".join(others) + last[:cut])
    found, count = run(done)
    assert count == 1
    assert done.read_text().splitlines()[:-1] == [line.rstrip("\n") for line in others]
    assert results(found) == results(compare(METHODS, LAMS, **SETUP))


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b"{}\n", b"[1]\n", b"\x80\x02", b'{"method": "a"}\n', b"method,lam\nplain,0\n"]
)
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(content, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt' is not a file of finished trainings; give another name"):
        run(file)
    assert file.read_bytes() == content


def other_fit(model, optimizer, penalty, data):
    fit(model, optimizer, penalty, data)


def other_score(model, data):
    return {"validation": 0.0, "test": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": other_fit}, r"fit: fit#\w+ there, other_fit#\w+ here"),
        ({"score": other_score}, "score: "),
        ({"data": lambda seed: data(seed) * 2}, "data: "),
        (
            {"make_model": partial(make_model, hidden=4)},
            r"make_model: .* there, partial\(make_model#\w+, hidden=4\) here",
        ),
        ({"make_model": partial(make_model, hidden=4)}, "initial weights: "),
        ({"make_optimizer": lambda params: SGD(params, lr=0.2)}, "optimizer: .*lr: 0.1 .* there, .*lr: 0.2 .* here"),
        ({"methods": {"L1\n": (L1, "dual")}}, "how: proximal there, dual here"),
        ({"methods": {"L1\n": (MCP, "proximal")}}, "penalty: L1 there, MCP here"),
        (
            {"methods": {"L1\n": (L1, "proximal", {"metric": "euclidean"})}},
            "options: {} there, {'metric': 'euclidean'}",
        ),
    ],
)
def test_other_settings_are_refused_with_what_differs(changes, message, done):
    before = done.read_bytes()
    with pytest.raises(ValueError, match=f"resume=.*done.jsonl' has a training of .* with other settings.*{message}"):
        run(done, **changes)
    assert not trained
    assert done.read_bytes() == before


def test_a_constant_that_a_function_reads_is_a_setting(done, monkeypatch):
    monkeypatch.setitem(globals(), "EPOCHS", 3)
    with pytest.raises(ValueError, match=r"fit: fit#\w+ there, fit#\w+ here"):
        run(done)


def test_another_version_of_torch_is_another_setting(done, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99")
    with pytest.raises(ValueError, match=r"versions: Python \S+, torch \S+ there, Python \S+, torch 2\.99 here"):
        run(done)


def changed(source, **outside):
    scope = dict(outside)
    exec(source, scope)
    return scope["f"]


def test_functions_are_told_apart_by_what_they_do():
    sources = [
        "def f(x): return x + 1",
        "def f(x): return x + 2",
        "def f(x): return x * 2",
        "def f(x, y=1): return x + y",
        "def f(x, y=2): return x + y",
        "def f(x): return x.a",
        "def f(x): return x.b",
        "def f(x): return [y + 1 for y in x]",
        "def f(x): return [y + 2 for y in x]",
        "def f(x): return x in {'a', 'b'}",
        "def f(x): return x in {'a', 'c'}",
        "def g(y):\n  def f(x): return x + y\n  return f\nf = g(1)",
        "def g(y):\n  def f(x): return x + y\n  return f\nf = g(2)",
    ]
    described = [describe(changed(source)) for source in sources]
    assert len(set(described)) == len(sources)
    assert described == [describe(changed("\n\n# moved\n" + source)) for source in sources]
    read = [describe(changed("def f(x): return x + N", N=n)) for n in (1, 2, object(), object())]
    assert len(set(read)) == 3
    assert describe(partial(L1, select=["a"])) == "partial(L1, select=('a'))"
    assert describe({"b", "a"}) == "{'a', 'b'}"
    assert describe(nn.Linear(1, 1).forward) == f"Linear.{describe(nn.Linear.forward)}"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\n@torch.no_grad()\ndef f(x): return x + {}",
        "N = {}\ndef f(x):\n  def g(): return x + N\n  return g()",
        "def f(x): return g(x)\ndef g(x): return h(x)\ndef h(x): return f(x) + {}",
    ],
)
def test_what_a_function_calls_in_its_file_is_a_setting(source):
    described = [describe(changed(source.format(n))) for n in (1, 2, 1)]
    assert described[0] == described[2] != described[1]


def test_a_variable_that_is_not_assigned_yet_stops_no_description():
    def f():
        return later

    assert describe(f).startswith("test_a_variable")
    later = 1


def test_another_score_below_a_decorator_is_refused(tmp_path):
    def decorated(factor):
        @torch.no_grad()
        def score(model, data):
            return {"validation": factor * model(data).mean(), "test": 0.0}

        return score

    run(tmp_path / "done.jsonl", score=decorated(1.0))
    with pytest.raises(ValueError, match="score: "):
        run(tmp_path / "done.jsonl", score=decorated(2.0))
