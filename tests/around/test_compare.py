"""compare: what it trains, which lambda it takes, and what it shows, against torch.optim, SciPy and TensorBoard."""

import csv
import math
import sys
from functools import partial

import pytest
import torch
from torch import nn

from torch_regpen import L0, L1, L2, MCP, ActivityPenalty, GroupLasso, Penalty, RegularizedOptimizer
from torch_regpen.compare import Comparison, Trial, compare
from torch_regpen.schedules import Bound

LAMS = [0.1, 0.01]


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator)
    y = x[:, :1] - 2 * x[:, 1:2] + torch.randn(60, 1, generator=generator)
    return {"train": (x[:20], y[:20]), "validation": (x[20:40], y[20:40]), "test": (x[40:], y[40:])}


def make_model(data):
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def fit(model, optimizer, penalty, data):
    x, y = data["train"]
    for _ in range(2):
        for batch in torch.randperm(len(x)).split(5):
            loss = (model(x[batch]) - y[batch]).square().mean() + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def score(model, data):
    return {name: -(model(x) - y).square().mean().item() for name, (x, y) in data.items()}


SETUP = {
    "data": data,
    "make_model": make_model,
    "make_optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "fit": fit,
    "score": score,
    "seeds": [3, 4, 5],
}


def scores(comparison, method, lam=None):
    return [trial.scores for trial in comparison.at(method, lam)]


def test_each_method_tries_each_lambda_with_each_seed_and_plain_has_none():
    comparison = compare({"sparse": (L1, "proximal")}, LAMS, **SETUP)
    tried = [(trial.method, trial.lam, trial.seed) for trial in comparison.trials]
    assert tried == [
        *(("plain", 0.0, seed) for seed in (3, 4, 5)),
        *((method, lam, seed) for method in ("weight_decay", "sparse") for lam in (0.01, 0.1) for seed in (3, 4, 5)),
    ]
    assert all(trial.steps == 8 and trial.seconds > 0 for trial in comparison.trials)
    assert comparison.lams("sparse") == [0.01, 0.1]


def test_the_baselines_are_torch_alone():
    comparison = compare({}, [0.05], **SETUP)
    for method, weight_decay in (("plain", 0.0), ("weight_decay", 0.1)):
        for trial in comparison.at(method):
            torch.manual_seed(trial.seed)
            model = make_model(None)
            biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
            weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
            groups = [{"params": weights, "weight_decay": weight_decay}, {"params": biases}]
            torch.manual_seed(trial.seed)
            fit(model, torch.optim.SGD(groups, lr=0.05, momentum=0.9), lambda: 0.0, data(trial.seed))
            assert trial.scores == score(model, data(trial.seed))


def test_l2_is_weight_decay_and_in_the_loss_what_it_is_in_the_optimizer():
    comparison = compare({"coupled": (L2, "coupled"), "loss": (L2, "loss")}, LAMS, **SETUP)
    for lam in LAMS:
        assert scores(comparison, "coupled", lam) == scores(comparison, "weight_decay", lam)
        for ours, theirs in zip(scores(comparison, "loss", lam), scores(comparison, "weight_decay", lam), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    assert comparison.difference("coupled") == (0, 0, 0)


def test_all_see_the_same_initial_weights_and_the_same_batches():
    seen = {}

    def fit_and_look(model, optimizer, penalty, data):
        what = torch.cat([*(p.detach().flatten() for p in model.parameters()), torch.rand(3)])
        seen.setdefault(data["train"][0][0, 0].item(), []).append(what)
        optimizer.step()

    class Drawing(L1):
        def __init__(self, *args):
            torch.rand(1)
            super().__init__(*args)

    compare({"drawing": (Drawing, "coupled")}, LAMS, **SETUP | {"fit": fit_and_look})
    assert len(seen) == 3
    for draws in seen.values():
        assert len(draws) >= 5
        assert all(torch.equal(draw, draws[0]) for draw in draws)
    first, second, third = (draws[0] for draws in seen.values())
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_zeros_and_dead_units_are_those_of_the_weights():
    class Ones(Penalty):
        def rho(self, u):
            return u

        def rho_prox(self, u, t):
            return 0 * u

    comparison = compare({"nothing left": (Ones, "proximal")}, LAMS, **SETUP)
    assert [(trial.zeros, trial.dead) for trial in comparison.at("nothing left")] == [(1.0, 5)] * 3
    assert [(trial.zeros, trial.dead) for trial in comparison.at("plain")] == [(0.0, 0)] * 3


def test_lambda_is_the_largest_within_one_standard_error_of_the_best():
    validation = {0.01: [1.0, 2.0, 3.0], 0.1: [1.5, 1.5, 1.5], 1.0: [1.4, 1.4, 1.4]}

    def told(model, data):
        return {"validation": validation[model.lam][data - 3] if hasattr(model, "lam") else 0.0, "test": 0.0}

    def remembering(model, lam):
        model.lam = lam
        return L1(model, lam)

    setup = SETUP | {"data": lambda seed: seed, "fit": lambda *_: None, "score": told}
    comparison = compare({"told": (remembering, "proximal")}, [0.01, 0.1, 1.0], **setup)
    assert comparison.chosen["told"] == 0.1  # the best is 2 with an error of 1/sqrt(3): 1.5 is within it, 1.4 is not
    assert comparison.chosen["plain"] == 0.0


def test_a_lambda_at_which_training_diverges_is_not_chosen():
    def exploding(model, optimizer, penalty, data):
        fit(model, optimizer, penalty, data)
        if optimizer.param_groups[0]["weight_decay"] > 0.1:
            with torch.no_grad():
                model[0].weight[0, 0] = torch.nan

    comparison = compare({}, LAMS, **SETUP | {"fit": exploding})
    assert comparison.chosen["weight_decay"] == 0.01
    assert all(math.isnan(trial["test"]) for trial in scores(comparison, "weight_decay", 0.1))


def test_the_interval_is_that_of_a_paired_t_test():
    stats = pytest.importorskip("scipy.stats")
    comparison = compare({"sparse": (L1, "proximal"), "flat": (MCP, "proximal")}, LAMS, **SETUP)
    for baseline in ("weight_decay", "plain", "flat"):
        ours, theirs = ([trial["test"] for trial in scores(comparison, name)] for name in ("sparse", baseline))
        expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        mean, low, high = comparison.difference("sparse", baseline)
        assert (low, high) == pytest.approx((expected.low, expected.high))
        assert mean == pytest.approx((low + high) / 2)


def test_the_table_shows_mean_deviation_and_interval_at_the_chosen_lambda():
    pytest.importorskip("scipy")

    def trials(method, lam, tests):
        return [Trial(method, lam, i, {"validation": 0.0, "test": t}, 0.5, i, 10, 0.02) for i, t in enumerate(tests)]

    plain, decayed = trials("plain", 0.0, [90, 91, 92]), trials("weight_decay", 0.1, [91, 91, 91])
    header, row, other = str(Comparison(plain + decayed, {"plain": 0.0, "weight_decay": 0.1}, {})).splitlines()
    assert header.split() == ["lambda", "test", "test", "-", "weight_decay", "zeros", "%", "dead", "ms/step"]
    assert row.split() == ["plain", "0", "91.00", "±", "1", "+0", "[-2.5,", "+2.5]", "50.00", "1.0", "2.000"]
    assert other.split() == ["weight_decay", "0.1", "91.00", "±", "0", "50.00", "1.0", "2.000"]


def test_the_file_has_a_row_for_each_trial(tmp_path):
    comparison = compare({"sparse": (L1, "proximal")}, LAMS, **SETUP)
    comparison.to_csv(tmp_path / "trials.csv")
    with open(tmp_path / "trials.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(comparison.trials)
    for row, trial in zip(rows, comparison.trials, strict=True):
        assert (row["method"], float(row["lam"]), int(row["seed"])) == (trial.method, trial.lam, trial.seed)
        assert {name: float(row[name]) for name in trial.scores} == trial.scores
        assert float(row["zeros"]) == trial.zeros


def test_tensorboard_has_weights_of_the_chosen_and_settings_of_all(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    def scoring(model, data):
        model.eval()
        return score(model, data)

    def watched(model, *args):
        fit(model, *args)
        assert model.training

    setup = SETUP | {"score": scoring, "fit": watched, "logdir": tmp_path, "log_every": 4}
    comparison = compare({"L1 proximal": (L1, "proximal")}, LAMS, **setup)
    for method in ("plain", "weight_decay", "L1 proximal"):
        events = EventAccumulator(str(tmp_path / "chosen" / method.replace(" ", "_"))).Reload()
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        hparams = metadata.parse_session_start_info_plugin_data(content).hparams
        assert hparams["method"].string_value == method
        assert hparams["lambda"].number_value == comparison.chosen[method]
        if method != "plain":
            assert [event.value for event in events.Scalars("by_lambda/lambda")] == pytest.approx([0.01, 0.1])
            for lam, event in zip(comparison.lams(method), events.Scalars("by_lambda/test"), strict=True):
                tests = [trial["test"] for trial in scores(comparison, method, lam)]
                assert event.value == pytest.approx(sum(tests) / 3, rel=1e-5)
        weights = [tag for tag in events.Tags()["histograms"] if tag.startswith("weights/")]
        assert weights == ["weights/0.weight", "weights/2.weight"]
        assert [event.step for event in events.Scalars("score/validation")] == [0, 4, 7]
        assert [event.step for event in events.Scalars("sparsity/total")] == [0, 4, 7]
        assert events.Scalars("penalty/lam")[0].value == pytest.approx(comparison.chosen[method])
        (last,) = (trial for trial in comparison.at(method) if trial.seed == 3)
        assert events.Scalars("score/test")[-1].value == pytest.approx(last.scores["test"])


def test_what_it_writes_to_tensorboard_changes_no_training(tmp_path):
    pytest.importorskip("tensorboard")
    with_board, without = (
        compare({"sparse": (L1, "dual")}, LAMS, **SETUP, logdir=logdir).models for logdir in (tmp_path, None)
    )
    for method in ("plain", "weight_decay", "sparse"):
        ours, theirs = with_board[method].state_dict(), without[method].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    comparison = compare({"sparse": (L1, "proximal")}, LAMS, **SETUP)
    comparison.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("methods", "lams", "seeds", "message"),
    [
        ({"plain": (L1, "loss")}, LAMS, [1, 2], "'plain' is the name of a baseline"),
        ({"a": (L1, "sideways")}, LAMS, [1, 2], "'a' has the mode 'sideways'; allowed are 'loss', 'coupled'"),
        ({"a": (L0, "loss")}, LAMS, [1, 2], "L0"),
        ({"a": (L0, "coupled")}, LAMS, [1, 2], "L0"),
        ({"a": (L1, "loss")}, [], [1, 2], "given 0 lambdas and 2 seeds"),
        ({"a": (L1, "loss")}, LAMS, [1], "given 2 lambdas and 1 seeds"),
        ({"a": (L1, "loss")}, [-1.0], [1, 2], "-1"),
        ({"a": (partial(L1, select="nowhere"), "loss")}, LAMS, [1, 2], "nowhere"),
        ({"a": ("proximal", L1)}, LAMS, [1, 2], "'a' has the mode <class"),
    ],
)
def test_what_cannot_work_is_refused_before_training(methods, lams, seeds, message):
    def never(*_):
        pytest.fail("trained")

    with pytest.raises(ValueError, match=message):
        compare(methods, lams, **SETUP | {"fit": never, "seeds": seeds})


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": L1}, r"a method is a name and \(penalty, how\), as in 'sparse': \(L1, 'proximal'\); not 'a': <class"),
        ({"a": (L1,)}, "not 'a': "),
        ({"a": "L1"}, "not 'a': 'L1'"),
        ({3: (L1, "loss")}, "not 3: "),
        ([("a", L1, "loss")], "a dict of name to .*, not a list"),
        (
            {"a": (L1(nn.Linear(2, 2), 0.1), "proximal")},
            "'a' has a L1; it needs a callable that makes a penalty .* such as L1",
        ),
        ({"a": (0.1, "proximal")}, "'a' has a float; it needs"),
        ({"a": (lambda model, lam: None, "loss")}, "'a' must make a penalty, but made a NoneType"),
        ({"a": (lambda model, lam: L1, "proximal")}, "'a' must make a penalty, but made a "),
    ],
)
def test_what_is_no_method_is_refused_before_training(methods, message):
    with pytest.raises(TypeError, match=message):
        compare(methods, LAMS, **SETUP | {"fit": lambda *_: pytest.fail("trained")})


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ({"test": 1.0}, ValueError, r"it returned \['test'\], without \['validation'\]"),
        ({"validation": 1.0}, ValueError, r"without \['test'\]"),
        ({}, ValueError, r"without \['validation', 'test'\]"),
        (0.5, TypeError, "a dict of numbers by name, not a float"),
        (None, TypeError, "a dict of numbers by name, not a NoneType"),
        ({"validation": 1.0, "test": "good"}, ValueError, "good"),
    ],
)
def test_a_score_that_cannot_be_used_shows_before_training(result, error, message):
    with pytest.raises(error, match=message):
        compare({}, LAMS, **SETUP | {"score": lambda *_: result, "fit": lambda *_: pytest.fail("trained")})


def test_scores_may_be_tensors(tmp_path):
    def tensors(model, data):
        return {name: torch.tensor(value) for name, value in score(model, data).items()}

    comparison, expected = (compare({}, [0.1], **SETUP | {"score": f}) for f in (tensors, score))
    assert [trial.scores for trial in comparison.trials] == [trial.scores for trial in expected.trials]
    comparison.to_csv(tmp_path / "trials.csv")
    assert "tensor" not in (tmp_path / "trials.csv").read_text()


def test_an_error_says_in_which_training_it_was_raised():
    def breaking(model, optimizer, penalty, data):
        if optimizer.param_groups[0]["weight_decay"] > 0.1:
            raise FloatingPointError("the loss is NaN")

    with pytest.warns(
        UserWarning, match=r"'weight_decay' at lambda 0\.1, seed \d: FloatingPointError: the loss is NaN"
    ):
        compare({}, LAMS, **SETUP | {"fit": breaking})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight_decay", "everywhere"])
def test_scores_and_weights_that_are_not_finite_stop_nothing(bad, where, tmp_path):
    def scoring(model, data):
        broken = where == "everywhere" or not model[0].weight.isfinite().all()
        return {"validation": bad, "test": bad} if broken else score(model, data)

    def diverging(model, optimizer, penalty, data):
        if optimizer.param_groups[0]["weight_decay"] > 0:
            with torch.no_grad():
                model[0].weight[0] = bad
        optimizer.step()

    def run():
        return compare({"sparse": (L1, "proximal")}, LAMS, **SETUP | {"fit": diverging, "score": scoring})

    if math.isnan(bad):
        with pytest.warns(UserWarning, match="'weight_decay' has a validation score of NaN at each lambda"):
            comparison = run()
    else:
        comparison = run()
    assert comparison.chosen["weight_decay"] == (0.01 if math.isnan(bad) else 0.1)
    assert str(bad) in str(comparison)
    assert all(trial.scores.keys() == comparison.trials[0].scores.keys() for trial in comparison.trials)
    comparison.to_csv(tmp_path / "trials.csv")
    pytest.importorskip("matplotlib")
    comparison.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_scipy_the_table_has_no_intervals(monkeypatch):
    comparison = compare({"sparse": (L1, "proximal")}, LAMS, **SETUP)
    mean = comparison.difference("sparse").mean
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert f"{mean:+.2g} [no SciPy]" in str(comparison)


def test_dead_units_are_those_of_the_methods_own_penalty():
    class Ones(Penalty):
        def rho(self, u):
            return u

        def rho_prox(self, u, t):
            return 0 * u

    def killing(model, *args):
        fit(model, *args)
        with torch.no_grad():
            model[2].weight.zero_()

    comparison = compare({"first": (partial(Ones, select="0.weight"), "proximal")}, LAMS, **SETUP | {"fit": killing})
    assert [trial.dead for trial in comparison.at("first")] == [4] * 3  # the layer after it is not asked
    assert [trial.dead for trial in comparison.at("plain")] == [1] * 3


def test_activities_are_a_method_too(tmp_path):
    pytest.importorskip("tensorboard")
    comparison = compare({"activity": (ActivityPenalty, "loss")}, LAMS, **SETUP, logdir=tmp_path)
    assert scores(comparison, "activity", 0.1) != scores(comparison, "plain")


ODD = ["a b", "a_b", "A_B", "a/b", "..", "", "x" * 300, "x" * 299 + "y", "L1: 5%\n\x1b[2J", "\u00fc" * 200, "a_b_2"]


def test_every_name_has_a_folder_of_its_own(tmp_path):
    pytest.importorskip("tensorboard")
    methods = dict.fromkeys(ODD, (L1, "loss"))
    compare(methods, [0.1, 0.1 + 1e-9], **SETUP | {"fit": lambda *_: None}, logdir=tmp_path / "runs")
    folders = {folder.name.casefold() for folder in (tmp_path / "runs" / "chosen").iterdir()}
    assert len(folders) == len(ODD) + 2
    assert all(any(folder.iterdir()) for folder in (tmp_path / "runs" / "chosen").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("scipy.stats", lambda comparison, file: comparison.difference("plain")),
        ("matplotlib", lambda comparison, file: comparison.plot(file)),
        ("tensorboard", lambda comparison, file: compare({}, LAMS, **SETUP, logdir=file)),
    ],
)
def test_a_missing_extra_is_named(module, use, tmp_path, monkeypatch):
    comparison = compare({}, LAMS, **SETUP)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install"):
        use(comparison, tmp_path / "file.png")


def test_that_tensorboard_is_missing_shows_before_training(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="logdir needs TensorBoard"):
        compare({}, LAMS, **SETUP | {"fit": lambda *_: pytest.fail("trained")}, logdir=tmp_path)


def test_dead_inputs_are_counted_where_the_groups_are_inputs():
    def killing(model, *args):
        fit(model, *args)
        with torch.no_grad():
            model[0].weight[:, 2] = 0

    methods = {"inputs": (partial(GroupLasso, groups="input"), "proximal")}
    comparison = compare(methods, [1e-6], **SETUP | {"fit": killing})
    assert [trial.dead for trial in comparison.at("inputs")] == [1] * 3
    assert [trial.dead for trial in comparison.at("plain")] == [0] * 3


# Options of a method


def bounded_by_lambda(optimizer):
    factor, optimizer.penalty.lam = optimizer.penalty.lam, 1.0
    return Bound(optimizer, "initial", factor=factor)


def by_hand(lam, **options):
    """The scores of seed 3 after a training that the user wrote, with what the options stand for."""
    dataset = data(3)
    torch.manual_seed(3)
    model = make_model(dataset)
    penalty = L2(model, lam)
    optimizer = RegularizedOptimizer(SETUP["make_optimizer"](model.parameters()), penalty, "decoupled", **options)
    return dataset, model, optimizer


def test_rate_cautious_and_a_schedule_go_in_as_one_dict():
    options = {"rate": "schedule", "cautious": True, "schedule": bounded_by_lambda}
    comparison = compare({"bounded": (L2, "decoupled", options)}, [0.3, 0.6], **SETUP)
    dataset, model, optimizer = by_hand(0.3, rate="schedule", cautious=True)
    bound = bounded_by_lambda(optimizer)
    optimizer.register_step_post_hook(lambda *_: bound.step())
    torch.manual_seed(3)
    fit(model, optimizer, lambda: 0.0, dataset)
    assert all(m > 0 for m in bound.multipliers.values())
    (found,) = [trial.scores for trial in comparison.at("bounded", 0.3) if trial.seed == 3]
    assert found == score(model, dataset)
    plain = [trial.scores for trial in comparison.at("plain", 0.0) if trial.seed == 3]
    assert [found] != plain


def test_each_option_makes_a_difference():
    methods = {
        "usual": (L2, "decoupled"),
        "schedule": (L2, "decoupled", {"rate": "schedule"}),
        "corrected": (L2, "decoupled", {"rate": lambda optimizer, group: 3 * group["lr"]}),
        "cautious": (L2, "decoupled", {"cautious": True}),
        "bound": (L2, "decoupled", {"schedule": partial(Bound, bound=0.01)}),
    }
    comparison = compare(methods, [0.1, 0.2], **SETUP)
    assert len({str(scores(comparison, name, 0.1)) for name in methods}) == len(methods)


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        ((L2, "decoupled", {"schedule": 3}), TypeError, "has the schedule 3; allowed is a callable"),
        ((L2, "decoupled", {"schedule": lambda optimizer: 3}), TypeError, "made a int, which has no step"),
        ((L2, "loss", {"schedule": partial(Bound, bound=0.1)}), ValueError, "allowed are none"),
        ((L2, "proximal", {"cautious": True}), ValueError, "option of mode 'decoupled'"),
    ],
)
def test_wrong_options_are_refused_before_any_training(method, error, text):
    with pytest.raises(error, match=text):
        compare({"a": method}, [0.1], **SETUP)
