"""Paths of lambdas: against scikit-learn's lasso_path and LassoCV, and a cross-validation by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers.problems import LAMBDA_MAX, X, linear, sse, x_all, y, y_all
from sklearn.linear_model import LassoCV, lasso_path
from sklearn.model_selection import KFold
from torch import nn

from torch_regpen import L1, L2, ElasticNet, RegularizedOptimizer
from torch_regpen.path import Path, regularization_path

# The path.


def fit(model, penalty, indices, precision=1e-9):
    """Until the audit says that it is there."""
    a, b = (x_all, y_all) if indices is None else (x_all[indices], y_all[indices])
    hessian, slope = a.T @ a / len(b), a.T @ b / len(b)
    lr = 1 / torch.linalg.eigvalsh(hessian)[-1].item()
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), penalty, "proximal")
    for step in range(3000):
        model.weight.grad = model.weight.detach() @ hessian - slope
        if step % 20 == 0 and penalty.stationarity() < precision:
            break
        optimizer.step()
    fits.append(penalty.lam)


fits = []


def minus_mse(model, indices):
    return -(model(x_all[indices])[:, 0] - y_all[indices]).square().mean().item()


LAMS = np.geomspace(LAMBDA_MAX, LAMBDA_MAX / 100, 8)


@pytest.fixture(scope="module")
def cross_validated():
    torch.manual_seed(0)
    model = linear()
    folds = list(KFold(5, shuffle=True, random_state=0).split(X))
    with torch.no_grad():
        model.weight.zero_()
    return regularization_path(model, L1(model, 1.0), fit, LAMS, folds=folds, score=minus_mse), folds


def test_it_is_the_lasso_path(cross_validated):
    path, _ = cross_validated
    _, coefficients, _ = lasso_path(X, y, alphas=LAMS, tol=1e-12, max_iter=10**6)
    found = np.stack([state["weight"][0].numpy() for state in path.states], axis=1)
    np.testing.assert_allclose(found, coefficients, atol=1e-6)
    theirs = np.abs(coefficients) > 1e-12  # at the largest lambda theirs has one of the size of a rounding error
    assert path.nonzeros == theirs.sum(axis=0).tolist()
    assert path.lams == pytest.approx(LAMS)


def test_nonzeros_of_a_penalty_with_a_center_are_the_elements_off_it():
    torch.manual_seed(0)
    model = linear()
    center = torch.linspace(-1, 1, X.shape[1], dtype=model.weight.dtype)[None]
    with torch.no_grad():
        model.weight.copy_(center)
    path = regularization_path(model, L1(model, 1.0, center={"weight": center}), fit, LAMS)
    _, coefficients, _ = lasso_path(X, y - X @ center[0].numpy(), alphas=LAMS, tol=1e-12, max_iter=10**6)
    assert path.nonzeros == (np.abs(coefficients) > 1e-12).sum(axis=0).tolist()


def test_it_picks_the_lambda_of_lasso_cv(cross_validated):
    path, folds = cross_validated
    theirs = LassoCV(alphas=LAMS, cv=folds, fit_intercept=False, tol=1e-12, max_iter=10**6).fit(X, y)
    assert path.best == pytest.approx(theirs.alpha_)
    np.testing.assert_allclose(path.scores.numpy(), -theirs.mse_path_, atol=1e-6)


def test_the_one_standard_error_rule_by_hand(cross_validated):
    path, _ = cross_validated
    scores = path.scores.numpy()
    mean, error = scores.mean(axis=1), scores.std(axis=1, ddof=1) / 5**0.5
    top = mean.argmax()
    assert path.best_1se == max(lam for lam, m in zip(path.lams, mean, strict=True) if m >= mean[top] - error[top])
    assert path.best_1se > path.best


def test_one_standard_error_of_made_up_scores():
    path = Path([4.0, 2.0, 1.0, 0.5], scores=torch.tensor([[1.0, 1.0], [4.0, 6.0], [5.0, 7.0], [5.0, 7.0]]).double())
    assert path.best == 1.0  # of equals the largest
    assert path.best_1se == 2.0  # 5 >= 6 - sqrt(2)/sqrt(2)


def test_model_and_penalty_are_left_as_they_were():
    model = linear()
    penalty = L1(model, 0.123)
    before = model.weight.detach().clone()
    path = regularization_path(model, penalty, fit, [0.1, 0.3])
    assert torch.equal(model.weight, before)
    assert penalty.lam == 0.123
    assert path.scores is None
    with pytest.raises(ValueError, match="no best"):
        path.best  # noqa: B018


class Noted(nn.Module):
    """A model whose state dict holds what is no tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = linear(), linear()

    def get_extra_state(self):
        return {"note": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("broken", ["nothing", "fit", "score"])
def test_each_group_keeps_its_lambda_and_the_model_its_weights(broken):
    model = Noted()
    groups = [
        {"params": [("first.weight", model.first.weight)], "lam": 0.1},
        {"params": [("second.weight", model.second.weight)], "lam": 0.2},
    ]
    penalty = L1(groups, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    seen = []

    def change(model, penalty, indices):
        seen.append([group["lam"] for group in penalty.param_groups])
        with torch.no_grad():
            model.first.weight.fill_(7)
        if broken == "fit" and len(seen) == 2:
            raise KeyboardInterrupt

    def score(model, indices):
        if broken == "score":
            raise KeyboardInterrupt
        return 0.0

    def run():
        regularization_path(model, penalty, change, [0.3, 0.4], folds=[([0], [1])], score=score)

    if broken == "nothing":
        run()
    else:
        with pytest.raises(KeyboardInterrupt):
            run()
    assert seen[:2] == [[0.4, 0.4], [0.3, 0.3]]
    assert [group["lam"] for group in penalty.param_groups] == [0.1, 0.2]
    assert all(map(torch.equal, model.parameters(), before))


def test_a_penalty_inside_the_model_keeps_its_lambda():
    model = nn.Sequential(linear())
    model.penalty = L1([("0.weight", model[0].weight)], 0.5)
    with pytest.raises(ZeroDivisionError):
        regularization_path(model, model.penalty, lambda *_: 1 / 0, [0.3, 0.4])
    assert model.penalty.lam == 0.5


@pytest.mark.parametrize(("order", "expected"), [("down", [0.3, 0.2, 0.1]), ("up", [0.1, 0.2, 0.3])])
def test_each_is_warm_started_from_the_last_in_the_order_asked_for(order, expected):
    model = linear()
    seen = []

    def note(model, penalty, indices):
        seen.append((penalty.lam, model.weight.detach()[0, 0].item()))
        with torch.no_grad():
            model.weight.fill_(penalty.lam)

    start = model.weight.detach()[0, 0].item()
    path = regularization_path(model, L1(model, 1.0), note, [0.2, 0.1, 0.3], order=order)
    assert path.lams == expected
    assert seen == list(zip(expected, [start, *expected[:-1]], strict=True))


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_an_interrupted_path_goes_on_from_its_file(tmp_path, stop):
    lams, folds = [0.4, 0.2, 0.1], list(KFold(2).split(X))
    file = tmp_path / "path.pt"
    calls, roughly = [], partial(fit, precision=1e-2)

    def interrupted(model, penalty, indices):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        roughly(model, penalty, indices)

    def run(fit, file):
        model = linear()
        return regularization_path(model, L1(model, 1.0), fit, lams, folds=folds, score=minus_mse, checkpoint=file)

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, file)
    fits.clear()
    resumed, whole = run(roughly, file), run(roughly, None)
    assert len(fits) == (9 - stop) + 9
    assert torch.equal(resumed.scores, whole.scores)
    for one, two in zip(resumed.states, whole.states, strict=True):
        assert torch.equal(one["weight"], two["weight"])
    lams.append(0.05)
    with pytest.raises(ValueError, match="differs in lambdas"):
        run(roughly, file)


def accuracy(model, indices):
    return 1.0


def second_moment(model, indices):
    return 2.0


PLAIN = {"folds": [([0, 1], [2]), ([1, 2], [0])], "score": accuracy, "lams": [0.1, 0.2], "order": "down"}


def path_from(file, penalty=L1, model=linear, **changed):
    net = model()
    return regularization_path(net, penalty(net, 1.0), lambda *_: None, **PLAIN | changed, checkpoint=file)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"lams": [0.1, 0.3]}, "lambdas"),
        ({"order": "up"}, "lambdas"),
        ({"folds": [([0, 1], [3]), ([1, 2], [0])]}, "folds"),
        ({"folds": [([1, 2], [0]), ([0, 1], [2])]}, "folds"),
        ({"folds": [([0, 1], [2])]}, "folds"),
        ({"folds": None, "score": None}, "folds, score"),
        ({"score": second_moment}, "score"),
        ({"penalty": L2}, "penalty"),
        ({"penalty": lambda m, lam: L1([("renamed", m.weight)], lam)}, "penalty"),
        ({"penalty": lambda m, lam: ElasticNet(m, lam, l1_ratio=0.3)}, "penalty"),
        ({"model": lambda: linear(2)}, "model"),
    ],
)
def test_a_checkpoint_of_another_path_is_refused(changed, what, tmp_path):
    file = tmp_path / "path.pt"
    path_from(file, **({"penalty": ElasticNet} if "l1_ratio" in str(changed) else {}))
    with pytest.raises(ValueError, match=f"differs in .*{what}.*give another file"):
        path_from(file, **changed)


def test_a_checkpoint_of_before_it_said_what_it_is_of_is_refused(tmp_path):
    torch.save({"lams": [0.2, 0.1], "states": {}, "values": {}}, tmp_path / "path.pt")
    with pytest.raises(ValueError, match="give another file"):
        path_from(tmp_path / "path.pt")


class Opaque:
    """Indices that do not show what they are."""


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda x: slice(*x), lambda x: Opaque()])
def test_the_same_folds_in_another_process_go_on(make, tmp_path):
    calls = []

    def note(*_):
        calls.append(1)

    for _ in range(2):
        model, folds = linear(), [(make([0, 1]), make([2, 3]))]
        options = {"folds": folds, "score": accuracy, "checkpoint": tmp_path / "path.pt"}
        regularization_path(model, L1(model, 1.0), note, [0.1, 0.2], **options)
    assert len(calls) == 4


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("scores", "best", "best_1se"),
    [
        ([[NAN, 9.0], [4.0, 6.0], [5.0, 7.0]], 1.0, 2.0),
        ([[NAN, NAN], [-INF, -INF], [NAN, NAN]], 2.0, 2.0),
        ([[NAN, NAN], [-INF, 1.0], [1.0, 1.0]], 1.0, 1.0),
        ([[1.0, 1.0], [INF, INF], [NAN, INF]], 2.0, 2.0),
    ],
)
def test_a_score_of_nan_is_never_the_best(scores, best, best_1se):
    path = Path([4.0, 2.0, 1.0], scores=torch.tensor(scores, dtype=torch.float64))
    assert (path.best, path.best_1se) == (best, best_1se)


@pytest.mark.parametrize("folds", [1, 3])
def test_without_any_score_but_nan_there_is_no_best(folds, tmp_path):
    model = linear()
    splits = [([0], [1])] * folds
    path = regularization_path(model, L1(model, 1.0), lambda *_: None, [0.1, 0.2], folds=splits, score=lambda *_: NAN)
    for ask in (lambda: path.best, lambda: path.best_1se):
        with pytest.raises(ValueError, match="there is no best lambda, because each has a score of NaN"):
            ask()
    pytest.importorskip("matplotlib")
    path.plot(tmp_path / "nothing.png")
    for scores in ([NAN, 1.0], [INF, 1.0], [-INF, NAN]):
        path.scores = torch.tensor(scores, dtype=torch.float64)[:, None].expand(2, folds)
        path.plot(tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


def test_the_plots(tmp_path, cross_validated):
    pytest.importorskip("matplotlib")
    cross_validated[0].plot(tmp_path / "lasso.png")
    model = linear(20)
    regularization_path(model, L1(model, 1.0), lambda *_: None, [0.1, 0.2]).plot(tmp_path / "many.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("lasso.png", "many.png"))


def test_a_progress_bar(capsys):
    pytest.importorskip("tqdm")
    model = linear()
    regularization_path(model, L1(model, 1.0), lambda *_: None, [0.1, 0.2], progress=True)
    assert "2/2" in capsys.readouterr().err


def test_what_makes_no_sense_is_refused():
    model = linear()
    penalty = L1(model, 1.0)
    for lams, options, match in (
        ([], {}, "empty"),
        ([0.1, -0.1], {}, "0 or more"),
        ([0.1], {"order": "sideways"}, "order"),
        ([0.1], {"folds": [(None, None)]}, "go together"),
        ([0.1], {"score": minus_mse}, "go together"),
    ):
        with pytest.raises(ValueError, match=match):
            regularization_path(model, penalty, fit, lams, **options)


def test_the_audit_as_a_stopping_rule():
    model = linear()
    penalty = L1(model, 0.1)
    fit(model, penalty, None)
    model.weight.grad = None
    sse(model).backward()
    assert penalty.stationarity() < 1e-8
    _, coefficients, _ = lasso_path(X, y, alphas=[0.1], tol=1e-14, max_iter=10**6)
    np.testing.assert_allclose(model.weight.detach()[0].numpy(), coefficients[:, 0], atol=1e-8)


@pytest.mark.parametrize("params", [lambda net: net[0], lambda net: [net[0].weight]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_a_penalty_on_a_part_of_the_model_is_plotted(params, dtype, tmp_path):
    pytest.importorskip("matplotlib")
    net = nn.Sequential(nn.Linear(5, 2, dtype=dtype), nn.Linear(2, 1, dtype=dtype))
    path = regularization_path(net, L1(params(net), 1.0), lambda *_: None, [0.1, 0.2])
    assert path.penalized == ["0.weight"]
    path.plot(tmp_path / "path.png")


def test_a_penalty_on_another_model_is_refused():
    with pytest.raises(ValueError, match="the penalty is on weight, which the model does not have"):
        regularization_path(linear(), L1(linear(), 1.0), lambda *_: pytest.fail("fitted"), [0.1])


def test_a_score_that_sets_eval_leaves_each_fit_in_the_mode_it_had():
    net, seen = nn.Sequential(linear(), nn.Dropout()), []

    def score(net, indices):
        assert net.eval()[1].training is False
        return 0.0

    def note(net, *_):
        seen.append(net.training and net[1].training)

    regularization_path(net, L1(net, 1.0), note, [0.1, 0.2], folds=[([0], [1])] * 2, score=score)
    assert seen == [True] * 6
    assert net.training


@pytest.mark.parametrize("value", [None, {"test": 1.0}, "good", torch.ones(2)])
def test_a_score_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="score must return a number, not"):
        path_from(None, score=lambda *_: value)


@pytest.mark.parametrize(
    ("folds", "error", "match"),
    [
        (5, TypeError, "folds must be pairs .*, not 5"),
        (KFold(5), TypeError, "folds must be pairs .*, not KFold"),
        ([([0], [1], [2])], TypeError, "folds must be pairs"),
        ([[0, 1, 2]], TypeError, "folds must be pairs"),
        (iter([]), ValueError, "folds is empty; an iterator, such as .* can be used once only"),
    ],
)
def test_folds_of_another_form_are_refused(folds, error, match):
    with pytest.raises(error, match=match):
        path_from(None, folds=folds)


def test_a_lambda_in_place_of_a_list_is_refused():
    with pytest.raises(TypeError, match=r"lams must be a list of lambdas.*not 0\.1"):
        path_from(None, lams=0.1)


def constant(model, indices, value):
    return value


def with_setting(name, value):
    entry = {"weight": torch.full((1, 10), value, dtype=torch.float64)}
    return {"penalty": lambda m, lam: L1(m, lam, **{name: entry})}


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        *((with_setting(name, 1.0), with_setting(name, 2.0), "penalty") for name in ("weights", "center")),
        ({"score": lambda *_: 1.0}, {"score": lambda *_: 2.0}, "score"),
        ({"score": partial(constant, value=1.0)}, {"score": partial(constant, value=2.0)}, "score"),
    ],
)
def test_a_checkpoint_with_another_value_of_a_setting_is_refused(first, second, what, tmp_path):
    file = tmp_path / "new folder" / "path.pt"
    path_from(file, **first)
    path_from(file, **first)
    with pytest.raises(ValueError, match=f"differs in {what}; give another file"):
        path_from(file, **second)


@pytest.mark.parametrize("content", [b"hello", b"", [1]])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    file = tmp_path / "notes.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"notes\.pt is not the checkpoint of a path; give another file"):
        path_from(file)
    assert file.read_bytes() == before
