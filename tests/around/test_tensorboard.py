"""TensorBoard: dead groups, the penalty beside the loss, when it is written and what is refused."""

import math

import numpy as np
import pytest
import torch
from helpers.boards import Board, SummaryWriter, log, normal
from helpers.kinds import CLASSES
from helpers.nets import holding
from helpers.operations import LargestCopy
from torch import nn
from torch._subclasses import FakeTensorMode

from torch_regpen import L0, L1, L2, MCP, SCAD, GroupLasso, NuclearNorm
from torch_regpen.groups import Blocks, Heads, Slices
from torch_regpen.ops.zero_groups import zero_groups
from torch_regpen.tensorboard import WeightLogger

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


def test_the_distance_to_stationarity_is_shown_as_of_the_gradient(board):
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
    with pytest.raises(ValueError, match="with a penalty"):
        WeightLogger(None, L1(nn.Linear(2, 2), 0.1), select="weight")


def test_a_parameter_that_two_layers_share_is_written_once(board):
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    log(board, model)
    assert {tag for tag in board.tags() if tag.startswith("weights/")} == {"weights/embedding.weight"}


@pytest.mark.parametrize("kind", CLASSES)
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
