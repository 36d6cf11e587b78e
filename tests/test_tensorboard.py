"""What WeightLogger writes, read back from the event files with TensorBoard's own reader; the oracle is numpy."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from copies import LargestCopy
from torch import nn
from torch._subclasses import FakeTensorMode

from torch_regpen import (
    L0,
    L1,
    L2,
    MCP,
    SCAD,
    ElasticNet,
    GroupLasso,
    LHalf,
    LogSum,
    NuclearNorm,
    Orthogonal,
    SparseGroupLasso,
)
from torch_regpen.groups import Blocks, Heads, Slices
from torch_regpen.inspect import histogram
from torch_regpen.tensorboard import WeightLogger
from torch_regpen.ops.zero_groups import zero_groups

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

TINIEST = 2.0**-149  # the smallest float32


class Board:
    """A writer, and what is on the board."""

    def __init__(self, path):
        self.path = str(path)
        self.writer = SummaryWriter(self.path)

    def read(self):
        self.writer.flush()
        return EventAccumulator(self.path, size_guidance={"scalars": 0, "histograms": 0}).Reload()

    def tags(self):
        tags = self.read().Tags()
        return set(tags["scalars"]) | set(tags["histograms"])

    def steps(self, tag):
        return [event.step for event in self.read().Scalars(tag)]

    def scalar(self, tag):
        return self.read().Scalars(tag)[-1].value

    def histogram(self, name="w"):
        return self.read().Histograms(f"weights/{name}")[-1].histogram_value

    def bins(self, name="w"):
        """(left, right, count) of each bin that is not empty."""
        histogram = self.histogram(name)
        limits = histogram.bucket_limit
        pairs = zip([histogram.min, *limits[:-1]], limits, histogram.bucket, strict=True)
        return [(left, right, count) for left, right, count in pairs if count]


@pytest.fixture
def board(tmp_path):
    board = Board(tmp_path)
    yield board
    board.writer.close()


def holding(**tensors):
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(torch.as_tensor(tensor)))
    return model


def log(board, source, loss=None, **kw):
    WeightLogger(board.writer, source, **kw).step(loss=loss)


def normal(*shape, scale=0.1, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def expected_counts(w):
    """How many of the finite weights `w` (float64) lie in each bin, by the sign and the outer edge of the bin."""
    w = w[np.isfinite(w)]
    mantissa, exponent = np.frexp(np.abs(w))
    eighths = np.ceil((2 * mantissa - 1) * 8)
    return Counter(np.where(w == 0, 0, np.sign(w) * np.ldexp(1 + eighths / 8, exponent - 1)).tolist())


def assert_histogram_is_of(board, w, name="w"):
    """The histogram `name` on the board is that of the float64 array `w`."""
    finite = w[np.isfinite(w)]
    histogram, bins = board.histogram(name), board.bins(name)
    counts = expected_counts(w)
    outer = sorted(counts)
    assert [count for _, _, count in bins] == [counts[edge] for edge in outer]
    # The edges are those of the grid, but the first and the last bin end where the weights end.
    assert [right for edge, (_, right, _) in zip(outer[:-1], bins[:-1], strict=True) if edge > 0] == [
        edge for edge in outer[:-1] if edge > 0
    ]
    assert [left for edge, (left, _, _) in zip(outer[1:], bins[1:], strict=True) if edge < 0] == [
        edge for edge in outer[1:] if edge < 0
    ]
    assert all(left <= right for left, right, _ in bins)
    assert histogram.num == len(finite)
    assert histogram.sum == pytest.approx(finite.sum(), rel=1e-5, abs=1e-5 * np.abs(finite).sum())
    assert histogram.sum_squares == pytest.approx((finite**2).sum(), rel=1e-5)
    if np.isfinite(w).all():
        assert (histogram.min, histogram.max) == (w.min(), w.max())


# What is written


def test_histogram_is_symmetric_logarithmic_and_exact(board):
    w = normal(50, 40)
    log(board, holding(w=w))
    assert_histogram_is_of(board, w.double().numpy().ravel())


def test_bin_edges_belong_to_the_bin_towards_zero(board):
    w = [-2.0, -1.0, 1.0, 1.125, 1.126, 2.0]
    log(board, holding(w=w))
    assert board.bins() == [
        (-2.0, -1.875, 1),
        (-1.0, -0.9375, 1),
        (0.9375, 1.0, 1),
        (1.0, 1.125, 1),
        (1.125, 1.25, 1),
        (1.875, 2.0, 1),
    ]


@pytest.mark.parametrize("small", [1e-13, 1e-40, TINIEST])
def test_exact_zeros_have_a_bin_of_their_own(board, small):
    log(board, holding(w=[0.0, -0.0, 0.0, small, -small, -small, 0.5]))
    assert (0.0, 0.0, 3) in board.bins()
    negative = sum(count for left, _, count in board.bins() if left < 0)
    positive = sum(count for _, right, count in board.bins() if right > 0)
    assert (negative, positive) == (2, 2)
    assert board.scalar("sparsity/w") == pytest.approx(3 / 7)


def test_sparsity_is_the_fraction_of_exact_zeros_in_each_parameter_and_in_all(board):
    log(board, holding(a=[0.0, -0.0, 1.0, 1e-30], b=[[0.0, 2.0], [3.0, 4.0], [5.0, 6.0]], c=[7.0]))
    assert board.scalar("sparsity/a") == 0.5
    assert board.scalar("sparsity/b") == pytest.approx(1 / 6)
    assert board.scalar("sparsity/c") == 0
    assert board.scalar("sparsity/total") == pytest.approx(3 / 11)


def test_norms_are_those_of_all_finite_weights(board):
    a, b = normal(30, 20), normal(1000, seed=1)
    b[3] = math.inf
    log(board, holding(a=a, b=b))
    finite = np.concatenate([a.double().numpy().ravel(), np.delete(b.double().numpy(), 3)])
    assert board.scalar("norm/l1") == pytest.approx(np.abs(finite).sum(), rel=1e-6)
    assert board.scalar("norm/l2") == pytest.approx(np.sqrt((finite**2).sum()), rel=1e-6)


def test_not_finite_weights_are_counted_and_left_out_of_the_histogram(board):
    w = normal(100) + 1  # all positive: 0 in their place would show as the smallest
    w[:4] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    w[4] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN of all ones, as uninitialized memory has
    w[5:7] = torch.tensor([0.0, 3e38])
    log(board, holding(w=w))
    assert_histogram_is_of(board, w.double().numpy())
    assert board.scalar("nonfinite/w") == 5
    assert board.scalar("sparsity/w") == pytest.approx(1 / 100)


def test_not_finite_weights_do_not_widen_the_histogram(board):
    log(board, holding(w=[math.nan, 1.5, 2.0], v=[math.inf, -1.5, -2.0]))
    assert (board.histogram("w").min, board.histogram("w").max) == (1.375, 2.0)
    assert (board.histogram("v").min, board.histogram("v").max) == (-2.0, -1.375)


def test_nothing_is_said_of_not_finite_weights_where_there_are_none(board):
    log(board, holding(w=[1.0, 0.0]))
    assert not [tag for tag in board.tags() if tag.startswith("nonfinite")]


def test_weights_that_are_all_nan_write_no_histogram(board):
    log(board, L1([("w", torch.full((3,), math.nan, requires_grad=True))], 1.0))
    assert board.scalar("nonfinite/w") == 3
    assert board.scalar("sparsity/w") == 0
    assert math.isnan(board.scalar("penalty/value"))
    assert "weights/w" not in board.tags()


def test_an_empty_parameter_writes_no_histogram_and_no_fraction(board):
    log(board, holding(empty=torch.empty(0, 3), w=[0.0, 1.0]))
    assert {tag for tag in board.tags() if tag.endswith(("/empty", "/w"))} == {"weights/w", "nonzero/w", "sparsity/w"}
    assert board.scalar("sparsity/total") == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_point_type_is_counted_in_its_own_precision(board, dtype):
    w = normal(3000).to(dtype)
    w[:10] = 0
    log(board, holding(w=w))
    assert_histogram_is_of(board, w.double().numpy())
    assert board.scalar("sparsity/w") == pytest.approx((w == 0).double().mean().item())


def test_float64_beyond_the_range_of_float32_is_neither_zero_nor_infinite(board):
    w = torch.tensor([1e-300, -1e-200, 1e100, 0.0], dtype=torch.float64)
    log(board, holding(w=w))
    assert_histogram_is_of(board, w.numpy())
    assert board.scalar("sparsity/w") == 0.25


def test_the_largest_finite_weights_are_finite(board):
    largest = torch.finfo(torch.float32).max
    log(board, holding(w=[-largest, largest]))
    assert [count for _, _, count in board.bins()] == [1, 1]
    assert np.isfinite(board.histogram().bucket_limit).all()


def test_complex_weights_go_by_modulus(board):
    w = torch.complex(normal(200), normal(200, seed=1))
    w[:3] = 0
    log(board, holding(w=w))
    assert_histogram_is_of(board, w.abs().double().numpy())
    assert board.scalar("norm/l1") == pytest.approx(w.abs().double().sum().item(), rel=1e-6)


def test_memory_layout_does_not_matter(board):
    w = normal(4, 3, 5, 5)
    log(board, holding(w=w.to(memory_format=torch.channels_last), v=w[:, ::2].transpose(0, 3)))
    assert_histogram_is_of(board, w.double().numpy().ravel())
    assert_histogram_is_of(board, w[:, ::2].double().numpy().ravel(), "v")


def test_a_large_tensor_goes_through_in_chunks(board, monkeypatch):
    monkeypatch.setattr(histogram, "CPU_CHUNK", 7)
    w = normal(10, 10)
    w[0, 0] = math.nan
    log(board, holding(w=w))
    assert_histogram_is_of(board, w.double().numpy().ravel())
    assert board.scalar("nonfinite/w") == 1


def test_counting_reads_nothing_back_from_the_device():
    with FakeTensorMode():  # has no values: reading one raises
        histogram.histogram_counts(torch.empty(100, 3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_counting_copies_no_more_than_a_chunk_at_once(layout, monkeypatch):
    monkeypatch.setattr(histogram, "CPU_CHUNK", 5000)
    w = normal(20, 20, 10, 10).to(memory_format=layout)
    with LargestCopy(w) as copies:
        histogram.histogram_counts(w)
    assert copies.largest == 5000


def test_logging_leaves_the_weights_alone(board):
    model = holding(w=[-0.0, math.nan, math.inf, 1.0])
    before = model.w.detach().clone()
    log(board, model)
    assert torch.equal(model.w.detach().view(torch.int32), before.view(torch.int32))
    assert model.w.grad is None
    assert model.w.requires_grad


# Dead groups

HALF_DEAD = [[0.0, 1e-30, 0.0, 0.0], [0.0, -0.0, 0.0, 0.0], [math.nan, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]]
DEAD = {"output": 1 / 4, "input": 1 / 2, "tensor": 0, 1: 1 / 2, Blocks(2): 5 / 8, Heads(2): 0, Heads(2, dim=1): 1 / 2}


@pytest.mark.parametrize("groups", DEAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_of_a_group_penalty_its_groups_are_counted_that_are_exactly_zero(groups, dtype, board):
    w = torch.tensor(HALF_DEAD).to(dtype).requires_grad_()
    log(board, GroupLasso([("w", w)], 0.1, groups=groups))
    assert board.scalar("dead_groups/w") == DEAD[groups]


def test_singular_values_can_be_dead_too(board):
    w = (normal(4, 1) @ normal(1, 3, seed=1)).requires_grad_()
    log(board, NuclearNorm([("w", w)], 0.1))
    assert board.scalar("dead_groups/w") == pytest.approx(2 / 3)


def test_without_groups_they_are_the_output_units_of_each_weight(board):
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 4),
            "conv": nn.Conv2d(2, 4, 3),
            "transposed": nn.ConvTranspose2d(3, 4, 2),
            "embedding": nn.Embedding(4, 3),
            "norm": nn.LayerNorm(4),
        }
    )
    with torch.no_grad():
        for name, dim in {"linear": 0, "conv": 0, "transposed": 1, "embedding": 0}.items():
            model[name].weight.index_fill_(dim, torch.tensor([2]), 0)
    log(board, model)
    WeightLogger(board.writer, L1(model, 0.1)).step(1)
    dead = [tag for tag in board.tags() if tag.startswith("dead_groups/")]
    assert sorted(dead) == [f"dead_groups/{name}.weight" for name in ("conv", "embedding", "linear", "transposed")]
    for tag in dead:
        assert [event.value for event in board.read().Scalars(tag)] == [0.25, 0.25]


def test_of_a_sum_the_groups_of_the_part_that_has_any(board):
    w = torch.tensor(HALF_DEAD, requires_grad=True)
    log(board, L1([("w", w)], 0.1) + GroupLasso([("w", w)], 0.1, groups="input") + L2([("w", w)], 0.1))
    assert board.scalar("dead_groups/w") == 0.5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64, torch.bool])
def test_quantized_weights_of_a_bare_model_are_counted(dtype, board):
    w = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1]]).to(dtype)
    model = nn.Module()
    model.w = nn.Parameter(w, requires_grad=False)
    log(board, model)
    assert board.scalar("dead_groups/w") == pytest.approx(1 / 3)
    assert board.scalar("sparsity/w") == pytest.approx(5 / 9)


@pytest.mark.parametrize("dim", [0, 1])
def test_dead_groups_are_found_without_a_copy_and_read_nothing_back(dim):
    w = normal(40, 50, 3, 3)
    with LargestCopy(w) as copies:
        zero_groups(w, Slices(dim))
    assert copies.largest <= 50 * 9
    with FakeTensorMode():
        zero_groups(torch.empty(40, 50, 3, 3), Slices(dim))


# What is said of the penalty


@pytest.mark.parametrize(
    "loss", [0.5, torch.tensor(0.5, requires_grad=True), torch.tensor([0.5]).half(), np.float32(0.5)]
)
def test_the_ratio_of_the_penalty_to_the_loss(board, loss):
    penalty = L1([torch.ones(3, requires_grad=True)], 0.1)
    log(board, penalty, loss)
    assert board.scalar("penalty/ratio") == pytest.approx(0.6)


@pytest.mark.parametrize(("loss", "ratio"), [(0.0, math.inf), (math.nan, math.nan), (math.inf, 0.0)])
def test_no_loss_is_so_bad_that_it_stops_a_run(board, loss, ratio):
    log(board, L1([torch.ones(3, requires_grad=True)], 0.1), loss)
    assert board.scalar("penalty/ratio") == pytest.approx(ratio, nan_ok=True)


@pytest.mark.parametrize("name", ["loss", "stationarity"])
def test_a_loss_or_distance_that_is_none_is_refused(board, name):
    logger = WeightLogger(board.writer, L1([torch.ones(3, requires_grad=True)], 0.1))
    with pytest.raises(ValueError, match=rf"{name} has shape \(4,\).*one element"):
        logger.step(**{name: torch.ones(4)})
    with pytest.raises(ValueError, match=f"{name}= .*bare model"):
        WeightLogger(board.writer, nn.Linear(2, 2)).step(**{name: 1.0})


def test_the_distance_to_a_stationary_point_is_shown_as_it_was_at_the_gradient(board):
    w = torch.ones(3, requires_grad=True)
    penalty = L1([w], 0.1)
    optimizer = torch.optim.SGD([w], lr=0.5)
    logger = WeightLogger(board.writer, penalty)
    w.square().sum().backward()
    stationarity = penalty.stationarity()
    optimizer.step()
    logger.step(stationarity=stationarity)
    assert board.scalar("penalty/stationarity") == pytest.approx(2.1)


def test_of_a_penalty_its_value_its_lambda_and_its_parameters_are_written(board):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    penalty = L1(model, lam=0.01)
    log(board, penalty)
    assert board.scalar("penalty/value") == pytest.approx(penalty().item())
    assert board.scalar("penalty/lam") == pytest.approx(0.01)
    assert {tag for tag in board.tags() if tag.startswith("weights/")} == {"weights/0.weight", "weights/1.weight"}


def test_of_a_bare_model_all_parameters_are_written_and_no_penalty(board):
    log(board, nn.Linear(3, 4))
    assert board.tags() == {
        *("weights/weight", "weights/bias", "nonzero/weight", "nonzero/bias", "sparsity/weight", "sparsity/bias"),
        *("dead_groups/weight", "all/sparsity", "sparsity/total", "norm/l1", "norm/l2"),
    }


def test_frozen_parameters_are_left_out_with_the_penalty(board):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    log(board, L1(model, 0.1))
    assert "weights/0.weight" not in board.tags()
    assert "weights/1.weight" in board.tags()


def test_a_parameter_in_two_parts_of_a_sum_is_written_once(board):
    w = torch.tensor([[0.0, 1.0]], requires_grad=True)
    log(board, L1([("w", w)], 0.1) + L2([("w", w)], 0.2))
    assert board.steps("sparsity/w") == [0]
    assert board.scalar("norm/l1") == 1
    assert board.scalar("penalty/value") == pytest.approx(0.1 + 0.2)


def test_several_lambdas_are_numbered(board):
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "lam": 0.2}]
    log(board, L1(groups, 0.1) + L2([("a", a)], 0.3))
    assert [board.scalar(f"penalty/lam/{i}") for i in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert "penalty/lam" not in board.tags()


def test_a_lambda_that_changes_is_followed(board):
    penalty = L1([torch.ones(2, requires_grad=True)], 0.0)
    logger = WeightLogger(board.writer, penalty)
    for lam in (0.0, 0.5, 1.0):
        penalty.lam = lam
        logger.step()
    assert [event.value for event in board.read().Scalars("penalty/lam")] == [0.0, 0.5, 1.0]


def test_two_models_with_the_same_names_are_both_written(board):
    log(board, L1(nn.Linear(2, 3), 0.1) + L1(nn.Linear(4, 5), 0.1))
    assert {tag for tag in board.tags() if tag.startswith("weights/")} == {"weights/weight", "weights/weight_"}
    assert board.histogram("weight_").num == 20


@pytest.mark.parametrize("penalized", [False, True])
def test_lazy_parameters_are_written_once_they_are_there(board, penalized):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    logger = WeightLogger(board.writer, L1(model, 0.1) if penalized else model)
    logger.step()
    model(torch.ones(1, 3))
    logger.step()
    assert board.steps("sparsity/0.weight") == [1]
    assert board.steps("sparsity/1.weight") == [0, 1]


@pytest.mark.parametrize("select", ["*.weight", ["0.weight", "1.w*"], "weights", lambda name, w: w.ndim == 2])
def test_select_says_which_parameters_of_a_model(board, select):
    log(board, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), select=select)
    assert {tag for tag in board.tags() if tag.startswith("weights/")} == {"weights/0.weight", "weights/1.weight"}


def test_select_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"'wieght' matches none.*near matches: weight"):
        WeightLogger(None, nn.Linear(2, 2), select="wieght")
    with pytest.raises(ValueError, match="beside a penalty"):
        WeightLogger(None, L1(nn.Linear(2, 2), 0.1), select="weight")


def test_a_parameter_that_two_layers_share_is_written_once(board):
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    log(board, model)
    assert {tag for tag in board.tags() if tag.startswith("weights/")} == {"weights/embedding.weight"}


KINDS = [L0, L1, L2, MCP, SCAD, ElasticNet, LHalf, LogSum, GroupLasso, NuclearNorm, SparseGroupLasso, Orthogonal]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_no_weight_is_so_bad_that_it_stops_a_run(kind, bad, everywhere, board):
    model = holding(w=normal(5, 4))
    with torch.no_grad():
        model.w[slice(None) if everywhere else 2] = bad
    log(board, kind(model, 0.1), loss=math.nan)
    assert board.scalar("nonfinite/w") == (20 if everywhere else 4)
    assert not math.isfinite(board.scalar("penalty/value")) or kind in (L0, MCP, SCAD)
    assert board.scalar("dead_groups/w") == 0


# When it is written


def test_it_writes_at_step_0_and_each_every_steps(board):
    logger = WeightLogger(board.writer, nn.Linear(2, 2), every=3)
    for _ in range(8):
        logger.step()
    assert board.steps("norm/l1") == [0, 3, 6]
    assert [event.step for event in board.read().Histograms("weights/weight")] == [0, 3, 6]


def test_a_given_step_counts_and_the_count_goes_on_from_it(board):
    logger = WeightLogger(board.writer, nn.Linear(2, 2), every=5)
    logger.step(100)
    for _ in range(6):
        logger.step()
    logger.step(7)
    assert board.steps("norm/l1") == [100, 105]


def test_two_loggers_write_one_penalty_to_two_boards(board, tmp_path):
    penalty, other = L1(nn.Linear(2, 2), 0.1), Board(tmp_path / "other")
    loggers = [WeightLogger(board.writer, penalty), WeightLogger(other.writer, penalty, every=2)]
    for _ in range(3):
        for logger in loggers:
            logger.step()
    other.writer.close()
    assert (board.steps("penalty/value"), other.steps("penalty/value")) == ([0, 1, 2], [0, 2])


def test_a_run_that_was_resumed_reads_as_if_it_had_never_stopped(tmp_path):
    w = torch.ones(3, requires_grad=True)

    def train(steps, value):
        board = Board(tmp_path)
        board.writer = SummaryWriter(board.path, purge_step=steps[0])
        logger = WeightLogger(board.writer, L1([("w", w)], value), every=2)
        for step in steps:
            logger.step(step)
        board.writer.close()
        return board

    train(range(7), 1.0)  # writes 0, 2, 4, 6 and dies; the last checkpoint is from before step 3
    board = train(range(3, 9), 2.0)
    events = board.read().Scalars("penalty/lam")
    assert [(event.step, event.value) for event in events] == [(0, 1.0), (2, 1.0), (4, 2.0), (6, 2.0), (8, 2.0)]
    assert [event.step for event in board.read().Histograms("weights/w")] == [0, 2, 4, 6, 8]


def test_a_step_that_is_no_whole_number_is_refused(board):
    with pytest.raises(TypeError, match="float"):
        WeightLogger(board.writer, nn.Linear(2, 2)).step(1.5)


def test_a_rank_without_writer_computes_the_penalty_too_and_no_graph():
    values = []
    penalty = L1(nn.Linear(2, 2), 0.1)
    penalty.register_forward_hook(lambda module, args, value: values.append(value))
    logger = WeightLogger(None, penalty, every=2)
    for _ in range(3):
        logger.step()
    assert [value.requires_grad for value in values] == [False, False]


# What is refused


class ScalarsOnly:
    def add_scalar(self, *_):
        """As a writer without histograms has it."""


@pytest.mark.parametrize("writer", ["runs", ScalarsOnly()])
def test_something_that_cannot_write_is_refused(writer):
    with pytest.raises(TypeError, match=r"add_histogram_raw.*None") as error:
        WeightLogger(writer, nn.Linear(2, 2))
    assert type(writer).__name__ in str(error.value)
    assert 'pip install "torch_regpen[tensorboard]"' in str(error.value)


@pytest.mark.parametrize("source", [None, [nn.Linear(2, 2).weight], nn.Linear])
def test_something_that_is_neither_penalty_nor_model_is_refused(source):
    with pytest.raises(TypeError, match="penalty"):
        WeightLogger(None, source)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_every_must_be_a_positive_int(every, error):
    with pytest.raises(error, match=rf"every={every}.*int, 1 or more"):
        WeightLogger(None, nn.Linear(2, 2), every=every)


def test_a_frozen_copy_shows_on_the_board(tmp_path):
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[0] = 0
    penalty = L1(model.requires_grad_(False), 0.1)
    board = Board(tmp_path)
    WeightLogger(board.writer, penalty).step()
    assert board.scalar("sparsity/weight") == 0.5
    assert "weights/weight" in board.tags()


def test_around_a_center_zeros_are_what_is_at_the_center(tmp_path):
    model = nn.Linear(4, 2)
    penalty = GroupLasso(model, 0.1, center="initial")
    with torch.no_grad():
        model.weight[0, 0] += 1
    board = Board(tmp_path)
    WeightLogger(board.writer, penalty).step()
    assert board.scalar("sparsity/weight") == board.scalar("sparsity/total") == 7 / 8
    assert board.scalar("dead_groups/weight") == 0.5
