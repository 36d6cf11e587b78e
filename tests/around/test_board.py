"""At 90% zeros the board still tells what matters: survivors, flips, the multiplier of lambda; the oracle is numpy."""

import re

import numpy as np
import pytest
import torch
from helpers.operations import LargestCopy
from torch import nn, optim
from torch._subclasses import FakeTensorMode

from torch_regpen import L1, ActivityPenalty, GroupLasso, RegularizedOptimizer
from torch_regpen.inspect import zero_bits
from torch_regpen.tensorboard import WeightLogger

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter


class Recorder:
    """A writer: what was written last for each tag, in the order of writing."""

    def __init__(self):
        self.scalars, self.histograms = {}, {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = value

    def add_histogram_raw(self, tag, **histogram):
        self.histograms[tag] = histogram


def holding(**tensors):
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(torch.as_tensor(tensor)))
    return model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(*shape, seed=0, zeros=0.9):
    chance = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return normal(*shape, seed=seed + 1).masked_fill(chance < zeros, 0)


def logged(source, **kw):
    writer = Recorder()
    WeightLogger(writer, source, **kw).step()
    return writer


# The survivors


def assert_histogram_is_of(histogram, w):
    w = np.asarray(w, dtype=np.float64)
    assert histogram["num"] == len(w)
    assert histogram["sum"] == pytest.approx(w.sum())
    assert histogram["sum_squares"] == pytest.approx((w**2).sum())
    edges = [histogram["min"], *histogram["bucket_limits"]]
    for left, right, count in zip(edges[:-1], edges[1:], histogram["bucket_counts"], strict=True):
        first = left == histogram["min"]
        inside = (w <= right) & ((w > left) | (first & (w == left))) if right > 0 else (w >= left) & (w < right)
        if right <= 0 and right == histogram["max"]:
            inside |= w == right
        assert count == inside.sum()


@pytest.mark.parametrize("side", ["both", "positive", "negative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_survivors_have_a_histogram_without_the_zeros(side, dtype):
    w = sparse(50, 40).to(dtype)
    w = {"both": w, "positive": w.abs(), "negative": -w.abs()}[side]
    writer = logged(holding(w=w))
    survivors = w[w != 0].double().numpy()
    assert 150 < len(survivors) < 250
    assert_histogram_is_of(writer.histograms["nonzero/w"], survivors)
    assert writer.histograms["weights/w"]["num"] == 2000


def test_where_nothing_survives_there_is_no_histogram_of_survivors():
    writer = logged(holding(w=[0.0, -0.0]))
    assert writer.histograms.keys() == {"weights/w"}


def test_what_is_not_finite_is_no_survivor():
    writer = logged(holding(w=[0.0, torch.nan, torch.inf, 2.0]))
    assert writer.histograms["nonzero/w"]["num"] == 1
    assert writer.histograms["nonzero/w"]["max"] == 2.0


def test_around_a_center_the_survivors_are_what_has_left_it():
    w = nn.Parameter(normal(30))
    penalty = L1([("w", w)], 0.1, center="initial")
    with torch.no_grad():
        w[:3] += torch.tensor([0.5, -0.25, 2.0])
    moved = logged(penalty).histograms["nonzero/w"]
    assert (moved["num"], moved["sum"]) == (3, pytest.approx(2.25))


# Flipped zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("shape", [(1,), (8,), (37,), (5, 7, 3, 3), (0, 3)])
def test_flipped_zeros_are_those_that_came_and_went(shape, dtype, monkeypatch):
    monkeypatch.setattr(zero_bits, "CHUNK", 16)
    before, after = (sparse(*shape, seed=seed, zeros=0.5).to(dtype) for seed in (0, 1))
    model = nn.Module()
    model.w = nn.Parameter(before.clone(), requires_grad=False)
    writer = Recorder()
    logger = WeightLogger(writer, model)
    logger.step()
    assert not [tag for tag in writer.scalars if tag.startswith("flipped")]
    model.w.copy_(after)
    logger.step()
    if before.numel():
        flipped = (before.bool() != after.bool()).double().mean().item()
        assert writer.scalars["flipped/w"] == writer.scalars["flipped/total"] == pytest.approx(flipped)
    logger.step()
    assert writer.scalars.get("flipped/total", 0) == 0


def test_flips_are_counted_since_the_last_log_and_over_all():
    model = holding(a=[0.0, 0.0, 1.0, 1.0], b=[0.0, 1.0])
    writer = Recorder()
    logger = WeightLogger(writer, model, every=2)
    logger.step()
    with torch.no_grad():
        model.a[0], model.a[1], model.b[1] = 1.0, 1.0, 0.0
        logger.step()
        model.a[0] = 0.0  # back again before the next log
    logger.step()
    assert writer.scalars["flipped/a"] == 0.25
    assert writer.scalars["flipped/b"] == 0.5
    assert writer.scalars["flipped/total"] == pytest.approx(2 / 6)


def test_a_parameter_in_another_layout_is_not_compared():
    model = holding(w=sparse(4, 3, 5, 5))
    writer = Recorder()
    logger = WeightLogger(writer, model)
    logger.step()
    model.to(memory_format=torch.channels_last)
    logger.step()
    assert "flipped/w" not in writer.scalars
    logger.step()
    assert writer.scalars["flipped/w"] == 0


def test_the_zeros_are_kept_in_one_bit_each():
    logger = WeightLogger(Recorder(), holding(w=sparse(101, 10)))
    logger.step()
    assert logger._zeros["w"].bits.nbytes == -(-1010 // 8)


# The multiplier of lambda


def trained(make, mode="proximal", steps=3, penalty=L1, **kw):
    model = holding(w=normal(30, 20), v=normal(7))
    optimizer = RegularizedOptimizer(make(model.parameters(), **kw), penalty([("w", model.w)], 1e-3), mode)
    for _ in range(steps):
        optimizer.zero_grad()
        (model.w.square().sum() + (model.w.sum() * model.v).sum()).backward()
        optimizer.step()
    return model, optimizer


def adam_step(optimizer, w, lr=0.01, beta=0.999, eps=1e-8):
    state = optimizer.state[w]
    return lr / ((state["exp_avg_sq"] / (1 - beta ** state["step"].item())).sqrt() + eps)


@pytest.mark.parametrize(
    ("make", "mode", "kw", "expected"),
    [
        (optim.SGD, "proximal", {"lr": 0.1}, lambda *_: 0.1),
        (optim.SGD, "proximal", {"lr": 0.1, "momentum": 0.9}, lambda *_: 1.0),
        (optim.SGD, "dual", {"lr": 0.1}, lambda *_: 0.3),
        (optim.SGD, "dual", {"lr": torch.tensor(0.1)}, lambda *_: 0.3),
        (optim.Adam, "proximal", {"lr": 0.01}, lambda optimizer, w: adam_step(optimizer, w).median().item()),
    ],
)
@pytest.mark.parametrize("penalty", [L1, GroupLasso])
def test_the_multiplier_is_the_step_and_in_the_dual_mode_their_sum(make, mode, kw, expected, penalty):
    model, optimizer = trained(make, mode, penalty=penalty, **kw)
    scalars = logged(optimizer).scalars
    assert scalars["multiplier/w"] == pytest.approx(expected(optimizer, model.w), rel=1e-5)
    assert "multiplier/v" not in scalars


def test_the_multiplier_times_lambda_is_by_what_the_prox_shrinks():
    model, optimizer = trained(optim.SGD, "proximal", steps=0, lr=0.1)
    before = model.w.detach().clone()
    model.w.grad = torch.zeros_like(model.w)
    optimizer.step()
    survivors = model.w != 0
    shrunk = (before.abs() - model.w.abs())[survivors]
    expected = logged(optimizer).scalars["multiplier/w"] * optimizer.penalty.lam
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, expected), rtol=2e-3, atol=0)


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.ASGD, optim.Adagrad])
def test_where_there_was_no_prox_there_is_no_multiplier(make):
    for optimizer in (trained(make, "coupled")[1], trained(make, steps=0)[1]):
        assert "multiplier/w" not in logged(optimizer).scalars
    _, optimizer = trained(make)
    assert "multiplier/w" in logged(optimizer).scalars
    assert "multiplier/w" not in logged(optimizer.penalty).scalars
    optimizer.freeze_zeros()
    assert "multiplier/w" not in logged(optimizer).scalars


def test_before_the_first_step_there_is_no_multiplier_though_there_is_a_gradient():
    for make in (optim.Adam, optim.ASGD):
        model, optimizer = trained(make, steps=0)
        model.w.grad = torch.ones_like(model.w)
        assert "multiplier/w" not in logged(optimizer).scalars


def test_each_param_group_has_its_own_multiplier():
    model = holding(w=normal(4), v=normal(7))
    groups = [{"params": [model.w], "lr": 0.1}, {"params": [model.v], "lr": 0.2}]
    optimizer = RegularizedOptimizer(optim.SGD(groups), L1(model, 0.1, select="all"), "proximal")
    model.w.grad, model.v.grad = torch.ones(4), torch.ones(7)
    optimizer.step()
    scalars = logged(optimizer).scalars
    assert (scalars["multiplier/w"], scalars["multiplier/v"]) == pytest.approx((0.1, 0.2))


def test_an_optimizer_shows_what_its_penalty_shows():
    _, optimizer = trained(optim.Adam, lr=0.01)
    one, other = logged(optimizer).scalars, logged(optimizer.penalty).scalars
    assert {tag: value for tag, value in one.items() if not tag.startswith("multiplier")} == other


def test_an_optimizer_that_accelerate_has_prepared_is_seen_through():
    wrapped = pytest.importorskip("accelerate.optimizer")
    pytest.importorskip("accelerate").Accelerator(cpu=True)
    _, optimizer = trained(optim.SGD, lr=0.1)
    assert logged(wrapped.AcceleratedOptimizer(optimizer)).scalars["multiplier/w"] == pytest.approx(0.1)


def test_a_plain_optimizer_is_refused():
    with pytest.raises(TypeError, match="a SGD holds no penalty; allowed are a RegularizedOptimizer"):
        WeightLogger(None, optim.SGD([torch.ones(1)], 0.1))


# The order, and the page of custom scalars


def board_of(folder, source):
    with SummaryWriter(str(folder)) as writer:
        logger = WeightLogger(writer, source)
        logger.step()
        logger.step()
    return EventAccumulator(str(folder)).Reload()


def test_the_sparsity_of_all_is_first_in_the_order_of_the_alphabet(tmp_path):
    board = board_of(tmp_path, trained(optim.SGD, lr=0.1)[1])
    tags = sorted(tag for kind in ("scalars", "histograms") for tag in board.Tags()[kind])
    assert tags[0] == "all/sparsity"
    assert board.Scalars("all/sparsity")[-1].value == board.Scalars("sparsity/total")[-1].value


def layout_of(board):
    (event,) = board.Tensors("custom_scalars__config__")  # written once
    return Layout.FromString(event.tensor_proto.string_val[0])


def test_the_custom_scalars_have_a_chart_for_each_kind_of_tag(tmp_path):
    board = board_of(tmp_path, trained(optim.SGD, lr=0.1)[1])
    tags = board.Tags()["scalars"]
    shown = [
        {tag for tag in tags if re.fullmatch(pattern, tag)}
        for category in layout_of(board).category
        for chart in category.chart
        for pattern in chart.multiline.tag
    ]
    assert set().union(*shown) == set(tags) - {"all/sparsity"}
    assert sum(map(len, shown)) == len(tags) - 1  # each in one chart


def test_of_a_model_no_chart_is_about_a_penalty(tmp_path):
    layout = layout_of(board_of(tmp_path, holding(w=[0.0, 1.0])))
    titles = [chart.title for category in layout.category for chart in category.chart]
    assert "fraction of exact zeros" in titles
    assert "lambda" not in titles


# Activations


@pytest.mark.parametrize(("kind", "size"), [("l1", torch.abs), ("l2", torch.square)])
def test_of_activations_their_penalty_and_their_size_are_written(kind, size, tmp_path):
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    activity = ActivityPenalty(model, 0.1, kind, select="1")
    a = model(normal(4, 5)).detach()
    board = board_of(tmp_path, activity)
    expected = size(a).sum().item() / 4
    assert board.Scalars("penalty/activity")[0].value == pytest.approx(expected)
    assert board.Scalars("penalty/value")[0].value == pytest.approx(0.1 * expected)
    assert board.Scalars("penalty/lam")[0].value == pytest.approx(0.1)
    assert not board.Tags()["histograms"]
    activity.lam = 0.0
    writer = logged(activity)
    assert writer.scalars == {"penalty/value": 0.0, "penalty/lam": 0.0}


def test_activations_before_a_forward_are_refused():
    with pytest.raises(RuntimeError, match="has not run yet"):
        logged(ActivityPenalty(nn.Linear(2, 2), 0.1))


# The device


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam])
@pytest.mark.parametrize("mode", ["proximal", "dual"])
def test_what_is_logged_is_found_without_reading_a_value(mode, make):
    with FakeTensorMode():  # has no values: reading one raises
        w = nn.Parameter(torch.empty(1000, 3))
        optimizer = RegularizedOptimizer(make([w], lr=0.1), L1([("w", w)], 0.1), mode)
        logger = WeightLogger(Recorder(), optimizer)
        for _ in range(2):
            w.grad = torch.empty_like(w)
            optimizer.step()
            with torch.no_grad():
                rows = logger._rows(logger._logged(), loss=torch.empty(()), stationarity=None)
        assert {"weights/w", "flipped/w", "multiplier/w", "penalty/value", "penalty/loss"} <= rows.keys()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_what_is_logged_is_found_without_waiting_for_the_gpu():
    w = nn.Parameter(torch.randn(1000, 3, device="cuda"))
    optimizer = RegularizedOptimizer(optim.Adam([w]), GroupLasso([("w", w)], 0.1), "dual")
    logger = WeightLogger(Recorder(), optimizer)
    for mode in ("default", "error"):
        w.grad = torch.randn_like(w)
        optimizer.step()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.no_grad():
                rows = logger._rows(logger._logged(), loss=torch.ones((), device="cuda"), stationarity=None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert "flipped/w" in rows


def test_a_log_takes_one_transfer_and_other_steps_none(monkeypatch):
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(len(x)) or cpu(x))
    _, optimizer = trained(optim.Adam)
    logger = WeightLogger(Recorder(), optimizer, every=3)
    for _ in range(7):
        logger.step()
    assert len(moved) == 3


def test_no_copy_is_larger_than_a_chunk(monkeypatch):
    monkeypatch.setattr(zero_bits, "CHUNK", 800)
    w = sparse(200, 40)
    with LargestCopy(w) as copies:
        old, new = zero_bits.zero_bits(w), zero_bits.zero_bits(w)
        zero_bits.count_flipped(old, new, w)
    assert copies.largest == 8000 // 8  # the bits themselves


# Shards
