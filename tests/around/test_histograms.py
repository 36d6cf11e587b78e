"""TensorBoard: histograms, sparsity and norms of weights, exactly as they are."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.boards import log, normal
from helpers.nets import holding
from helpers.operations import LargestCopy
from torch._subclasses import FakeTensorMode

from torch_regpen import L1
from torch_regpen.inspect import histogram

TINIEST = 2.0**-149  # the smallest float32


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


def test_sparsity_is_the_share_of_exact_zeros_in_each_parameter_and_all(board):
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
