"""compare: trainings that fail, settings for each method, the ends of lams, the module; the oracle is a plain loop."""

import csv
import math
import pickle
import re
import sys
import warnings
from functools import partial
from html.parser import HTMLParser
from importlib import reload

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import torch_regpen
from torch_regpen import L0, L1, L2, MCP, RegularizedOptimizer
from torch_regpen.compare import Comparison, Failure, compare
from torch_regpen.groups import NM
from torch_regpen.schedules import TargetSparsity

pytestmark = pytest.mark.filterwarnings("ignore:the chosen lambda is at an end")

LAMS = [0.01, 0.1]
SEEDS = [3, 4, 5]


def data(seed):
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :1] - x[:, 1:2].square()


def make_model(data):
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def fit(model, optimizer, penalty, data):
    x, y = data
    for rows in torch.randperm(8).split(2):
        optimizer.zero_grad()
        ((model(x[rows]) - y[rows]).square().mean() + penalty()).backward()
        optimizer.step()


@torch.no_grad()
def score(model, data):
    errors = (model(data[0]) - data[1]).square().flatten()
    return {"validation": -errors[8:16].mean(), "test": -errors[16:].mean()}


SETUP = {
    "data": data,
    "make_model": make_model,
    "make_optimizer": partial(SGD, lr=0.1),
    "fit": fit,
    "score": score,
    "seeds": SEEDS,
}


def by_hand(seed, wrap):
    """The test score of a training, with none of compare's code."""
    torch.manual_seed(seed)
    model = make_model(None)
    optimizer = wrap(model)
    torch.manual_seed(seed)
    fit(model, optimizer, lambda: 0.0, data(seed))
    return score(model, data(seed))["test"].item()


def failing(when):
    """A fit that raises where `when(lambda, seed of the data)`."""

    def fit_or_fail(model, optimizer, penalty, data):
        lam = optimizer.penalty.lam if isinstance(optimizer, RegularizedOptimizer) else 0.0
        if when(lam, next(seed for seed in SEEDS if torch.equal(data[0], globals()["data"](seed)[0]))):
            raise FloatingPointError("the loss is <NaN>")
        fit(model, optimizer, penalty, data)

    return fit_or_fail


def test_a_training_that_fails_leaves_all_others_as_they_are():
    expected = compare({"L1": (L1, "proximal")}, LAMS, **SETUP)
    with pytest.warns(UserWarning, match=r"1 trainings failed\. .*\n  'L1' at lambda 0\.1, seed 4: FloatingPointError"):
        found = compare({"L1": (L1, "proximal")}, LAMS, **SETUP | {"fit": failing(lambda *at: at == (0.1, 4))})
    assert [failure[:4] for failure in found.failures] == [("L1", 0.1, 4, "FloatingPointError: the loss is <NaN>")]
    assert "fit_or_fail" in found.failures[0].traceback
    kept = [trial for trial in expected.trials if trial.job != ("L1", 0.1, 4)]
    assert [trial[:6] for trial in found.trials] == [trial[:6] for trial in kept]


def test_a_lambda_at_which_a_training_failed_is_not_chosen():
    everywhere = {"score": lambda *_: {"validation": 1.0, "test": 1.0}}
    with pytest.warns(UserWarning, match="failed"):
        found = compare(
            {"L1": (L1, "proximal")}, LAMS, **SETUP | everywhere | {"fit": failing(lambda *at: at == (0.1, 4))}
        )
    assert found.chosen == {"plain": 0.0, "weight_decay": 0.1, "L1": 0.01}


def test_where_each_lambda_failed_once_the_seeds_that_finished_are_compared(tmp_path):
    pytest.importorskip("scipy")
    with pytest.warns(UserWarning, match="2 trainings failed"):
        found = compare({"L1": (L1, "proximal")}, LAMS, **SETUP | {"fit": failing(lambda lam, seed: lam and seed == 4)})
    lam, decay = found.chosen["L1"], found.chosen["weight_decay"]
    differences = [
        by_hand(seed, lambda model: RegularizedOptimizer(SGD(model.parameters(), lr=0.1), L1(model, lam), "proximal"))
        - by_hand(seed, lambda model: decayed(model, decay))
        for seed in (3, 5)
    ]
    assert found.difference("L1").mean == pytest.approx(sum(differences) / 2, rel=1e-6)
    assert str(found).splitlines()[0].split()[-1] == "failed"
    assert [line.split()[-1] for line in str(found).splitlines()[1:]] == ["0", "0", "2"]


def decayed(model, lam):
    groups = [{"params": [model[0].weight, model[2].weight], "weight_decay": 2 * lam}]
    return SGD([*groups, {"params": [model[0].bias, model[2].bias]}], lr=0.1)


def test_a_method_that_always_fails_says_so_and_is_left_out(tmp_path):
    with pytest.warns(UserWarning, match=r"6 trainings failed; all of 'L1'\. .*(\n.*){5}\n  and 1 more"):
        found = compare({"L1": (L1, "proximal")}, LAMS, **SETUP | {"fit": failing(lambda lam, _: lam > 0)})
    assert found.chosen.keys() == found.models.keys() == {"plain", "weight_decay"}
    assert [line.split() for line in str(found).splitlines()][3] == ["L1", "6"]
    found.to_csv(tmp_path / "trials.csv")
    with open(tmp_path / "trials.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["error"] for row in rows] == [""] * 9 + ["FloatingPointError: the loss is <NaN>"] * 6
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "plot.png")


@pytest.mark.parametrize("baseline", ["plain", "weight_decay"])
def test_a_baseline_may_fail_too(baseline, tmp_path):
    def breaking(model, optimizer, penalty, data):
        kind = "plain" if len(optimizer.param_groups) == 1 else "weight_decay"
        if baseline == kind and not isinstance(optimizer, RegularizedOptimizer):
            raise ValueError
        fit(model, optimizer, penalty, data)

    with pytest.warns(UserWarning, match=f"all of '{baseline}'"):
        found = compare({"L1": (L1, "proximal")}, LAMS, **SETUP | {"fit": breaking})
    assert len(str(found).splitlines()) == 4
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "plot.png")


def test_where_all_trainings_fail_the_first_traceback_is_raised():
    with pytest.raises(RuntimeError, match=r"all 9 trainings failed(.|\n)*in fit_or_fail(.|\n)*the loss is <NaN>"):
        compare({}, LAMS, **SETUP | {"fit": failing(lambda *_: True)})


def test_an_interrupt_is_no_failure():
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({}, LAMS, **SETUP | {"fit": interrupted})


def test_each_method_has_its_lambdas_and_options_of_its_own():
    optimizer = partial(Adam, lr=0.05)
    methods = {
        "auto": (L1, "proximal"),
        "euclidean": (L1, "proximal", {"metric": "euclidean"}),
        "MCP": (partial(MCP, knee=0.3), "dual", {}),
    }
    lams = {"auto": [0.1, 0.2], "euclidean": [0.2], "MCP": iter([0.05])}
    found = compare(methods, lams, **SETUP | {"make_optimizer": optimizer})
    assert {name: found.lams(name) for name in found.chosen} == {
        "plain": [0.0],
        "weight_decay": [0.05, 0.1, 0.2],
        "auto": [0.1, 0.2],
        "euclidean": [0.2],
        "MCP": [0.05],
    }
    for name, metric in (("auto", "auto"), ("euclidean", "euclidean")):
        expected = [
            by_hand(
                seed,
                lambda model, metric=metric: RegularizedOptimizer(
                    optimizer(model.parameters()), L1(model, 0.2), "proximal", metric=metric
                ),
            )
            for seed in SEEDS
        ]
        assert [trial.scores["test"] for trial in found.at(name, 0.2)] == expected


def test_weight_decay_may_have_lambdas_of_its_own():
    found = compare({"L1": (L1, "loss")}, {"L1": [0.1], "weight_decay": [0.3]}, **SETUP)
    assert found.lams("weight_decay") == [0.3]
    expected = [by_hand(seed, lambda model: decayed(model, 0.3)) for seed in SEEDS]
    assert [trial.scores["test"] for trial in found.at("weight_decay")] == expected


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"methods": {"a": (L1, "proximal", {"metrik": "auto"})}},
            ValueError,
            r"'a' has the options \['metrik'\]; .*metric",
        ),
        ({"methods": {"a": (L1, "loss", {"metric": "auto"})}}, ValueError, "with 'loss' allowed are none"),
        ({"methods": {"a": (L1, "proximal", "auto")}}, TypeError, "'a' has options 'auto', a str; allowed is a dict"),
        ({"methods": {"a": (L1, "proximal", {"metric": "x"})}}, ValueError, "metric must be"),
        ({"methods": {"a": (L1, "proximal", {}, 1)}}, TypeError, "not 'a': "),
        ({"lams": 0.1}, TypeError, "lams has 0.1; it needs a list of lambdas"),
        ({"lams": {"a": 0.1}}, TypeError, "lams has 0.1; it needs a list"),
        ({"lams": {}}, ValueError, r"lams has no lambdas for \['a'\]"),
        ({"lams": {"a": []}}, ValueError, r"no lambdas for \['a'\]; "),
        ({"lams": {"a": [0.1], "b": [0.1]}}, ValueError, r"lambdas for \['b'\], which are not methods"),
        ({"lams": {"a": [0.1], "plain": [0.1]}}, ValueError, r"\['plain'\], which are not methods"),
        ({"seeds": [1, 1]}, ValueError, "has a seed twice"),
        ({"seeds": [1, 0.5]}, TypeError, "seeds has 0.5, a float; allowed are ints"),
        ({"n_jobs": 0}, ValueError, "n_jobs=0; allowed is a number of processes, 1 or more"),
        ({"n_jobs": "all"}, ValueError, "n_jobs='all'; allowed"),
        ({"score": lambda *_: {"validation": None, "test": 1}}, ValueError, "'validation': None; allowed is a number"),
        ({"score": lambda *_: {"validation": torch.ones(2), "test": 1}}, ValueError, "allowed is a number"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_training(changes, error, message):
    settings = {"methods": {"a": (L1, "proximal")}, "lams": LAMS} | SETUP | {"fit": lambda *_: pytest.fail("trained")}
    with pytest.raises(error, match=message):
        compare(**settings | changes)


@pytest.mark.parametrize(
    ("best", "lams", "message"),
    [
        (0.1, [0.01, 0.1], r"'weight_decay' 0\.1 \(largest\), 'L1' 0\.1 \(largest\)"),
        (0.1, [0.1, 1.0], r"'L1' 0\.1 \(smallest\)"),
        (0.1, [0.01, 0.1, 1.0], None),
        (0.1, [0.1], None),
        (0.0, [0.0, 1.0], None),
    ],
)
def test_a_lambda_chosen_at_the_end_of_the_grid_warns(best, lams, message, recwarn):
    def told(model, data):
        return {"validation": -abs(getattr(model, "lam", 0.0) - best), "test": 0.0}

    def remembering(model, lam):
        model.lam = lam
        return L1(model, lam)

    def fit(model, optimizer, penalty, data):
        if not hasattr(model, "lam"):
            model.lam = optimizer.param_groups[0]["weight_decay"] / 2

    compare({"L1": (remembering, "proximal")}, lams, **SETUP | {"fit": fit, "score": told})
    found = [warning for warning in recwarn if "at an end of lams" in str(warning.message)]
    assert len(found) == (message is not None)
    for warning in found:
        assert re.search(message, str(warning.message))
        assert warning.filename == __file__


METHODS_WITHOUT_LAM = {
    "N:M": (partial(L0, groups=NM(1, 2), select="*0.weight"), "proximal"),
    "target": (L1, "dual", {"schedule": partial(TargetSparsity, target=0.5, steps=4)}),
}


@pytest.mark.parametrize("name", METHODS_WITHOUT_LAM)
def test_where_lambda_means_nothing_no_end_of_the_grid_warns(name, recwarn):
    methods = {name: METHODS_WITHOUT_LAM[name], "L1": (L1, "proximal")}
    comparison = compare(methods, [0.01, 0.1], **SETUP | {"score": lambda *_: {"validation": 0.0, "test": 0.0}})
    assert len({trial.zeros for trial in comparison.trials if trial.method == name}) == 1
    (found,) = [str(warning.message) for warning in recwarn if "at an end of lams" in str(warning.message)]
    assert "'L1' 0.1 (largest)" in found
    assert repr(name) not in found


def test_that_there_will_be_no_intervals_is_said_before_training(monkeypatch):
    def fit(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    message = "without SciPy the table will have no intervals: pip install"
    with pytest.warns(UserWarning, match=message), pytest.raises(KeyboardInterrupt):
        compare({}, LAMS, **SETUP | {"fit": fit})


class Table(HTMLParser):
    """The cells of an HTML table."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text


def test_a_notebook_shows_the_table_with_its_names_escaped():
    found = compare({"<b>L1 & co": (L1, "proximal")}, LAMS, **SETUP)
    table = Table(found._repr_html_())
    assert not table.open
    text = [line.split() for line in str(found).splitlines()]
    assert [" ".join(row).split() for row in table.rows] == text
    assert table.rows[3][0] == "<b>L1 & co"


def test_progress_counts_all_trainings_and_the_time_left(capsys):
    pytest.importorskip("tqdm")
    compare({}, LAMS, **SETUP, progress=True)
    bars = capsys.readouterr().err
    assert "comparing: 100%" in bars
    assert "9/9 [" in bars
    assert "<00:00" in bars
    assert "training the models: 100%" in bars


def test_a_short_training_has_two_points_and_each_method_one_file(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    compare({"L1": (L1, "proximal"), "L2": (L2, "loss")}, LAMS, **SETUP, logdir=tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("flipped/")]  # since the log before
        counts = {tag: len(events.Scalars(tag)) for tag in tags}
        assert min(counts.values()) >= 2, counts


def test_a_training_without_steps_logs_none(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    compare({}, [0.1], **SETUP | {"fit": lambda *_: None}, logdir=tmp_path)
    assert EventAccumulator(str(tmp_path / "chosen" / "plain")).Reload().Tags()["scalars"] == []


def test_the_table_of_hyperparameters_shows_each_method_with_its_last_scores(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    found = compare({"L1": (L1, "proximal")}, LAMS, **SETUP, logdir=tmp_path)
    events = EventAccumulator(str(tmp_path / "chosen" / "L1")).Reload()
    experiment = metadata.parse_experiment_plugin_data(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    )
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags == ["score/validation", "score/test", "sparsity/total"]
    last = {tag: events.Scalars(tag)[-1].value for tag in tags}
    (trial,) = (trial for trial in found.at("L1") if trial.seed == SEEDS[0])
    assert last == pytest.approx({"sparsity/total": trial.zeros} | {f"score/{k}": x for k, x in trial.scores.items()})


# The module that can be called.


def test_the_module_can_be_called_whatever_was_imported_first():
    module = sys.modules["torch_regpen.compare"]
    for again in (lambda: None, lambda: reload(module), lambda: reload(torch_regpen)):
        again()
        from torch_regpen import compare as top
        from torch_regpen.compare import compare as function

        assert top is torch_regpen.compare is sys.modules["torch_regpen.compare"]
        assert function is module.compare
        with pytest.raises(ValueError, match="given 0 lambdas"):
            torch_regpen.compare({}, [], **SETUP)
        with pytest.raises(ValueError, match="given 0 lambdas"):
            function({}, [], **SETUP)
    found = torch_regpen.compare({}, [0.1], **SETUP)
    assert type(found).__name__ == "Comparison"


def test_the_function_and_its_results_are_pickled():
    assert pickle.loads(pickle.dumps(compare)) is compare
    found = compare({}, [0.1], **SETUP)
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again, Comparison)
    assert (again.trials, again.chosen, again.failures) == (found.trials, found.chosen, found.failures)
    failure = Failure("a", 0.1, 3, "ValueError: x", "")
    assert pickle.loads(pickle.dumps(failure)) == failure
    assert math.isfinite(again.trials[0].seconds)


# Arguments that cannot be meant, and what a score draws.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seeds": 5}, TypeError, r"seeds has 5; it needs two or more ints, such as range\(5\)"),
        ({"log_every": 0}, ValueError, "log_every=0; allowed is a number of steps, 1 or more"),
        ({"data": torch.ones(2)}, TypeError, "data must be a function, not a Tensor"),
        ({"make_model": make_model(None)}, TypeError, "make_model must be a function, not a Sequential"),
        ({"make_model": lambda _: 3}, TypeError, "make_model must return a module, not a int"),
        ({"make_optimizer": lambda _: None}, TypeError, "make_optimizer must return an optimizer, not a NoneType"),
        ({"fit": None}, TypeError, "fit must be a function, not a NoneType"),
        ({"make_optimizer": partial(torch.optim.Rprop, lr=0.1)}, ValueError, "a Rprop, which has no weight_decay"),
    ],
)
def test_wrong_arguments_are_refused_before_training(changes, error, message):
    with pytest.raises(error, match=message):
        compare({}, LAMS, **SETUP | {"fit": lambda *_: pytest.fail("trained")} | changes)


def test_a_model_that_is_not_made_anew_is_refused():
    model, frozen = make_model(None), nn.Linear(4, 4).requires_grad_(False)
    for shared in (model, model[0]):
        with pytest.raises(ValueError, match="make_model returned the same parameters twice"):
            compare({}, LAMS, **SETUP | {"make_model": lambda _, shared=shared: nn.Sequential(shared, nn.Linear(3, 1))})
    compare({}, [0.1], **SETUP | {"make_model": lambda _: nn.Sequential(frozen, nn.Linear(4, 1))})


def test_what_a_score_draws_changes_no_training_on_a_board(tmp_path):
    pytest.importorskip("tensorboard")

    def fit_twice(*args):
        fit(*args)
        fit(*args)

    def drawing(model, data):
        torch.rand(1)  # as iterating over a DataLoader does
        return score(model, data)

    plain, logged = (
        compare({}, [0.1], **SETUP | {"fit": fit_twice, "score": drawing}, logdir=logdir, log_every=1)
        for logdir in (None, tmp_path)
    )
    for name, model in plain.models.items():
        assert all(map(torch.equal, model.parameters(), logged.models[name].parameters()))


def test_a_decay_that_stays_on_in_plain_is_named():
    with pytest.warns(UserWarning, match=r"AdamW with weight_decay=0\.01 .* acts in 'plain' and beside each penalty"):
        compare({}, [0.1], **SETUP | {"make_optimizer": torch.optim.AdamW})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "make_optimizer makes")
        compare({}, [0.1], **SETUP | {"make_optimizer": partial(torch.optim.AdamW, weight_decay=0)})
