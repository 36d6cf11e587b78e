"""The penalty of a sharded model, and all that is read of it, are those of one process.

Each check runs on all ranks of one process group, all checks of a file in one start of the processes.
"""

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import check_cases, shared_folder
from helpers.sharded import ALL, GATHERED, LAM, PENALTIES, batch, kinds, network, own_rows, sharded, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from torch_regpen import L0, L1, GroupLasso, RegularizedOptimizer
from torch_regpen.groups import NM, Blocks
from torch_regpen.tensorboard import WeightLogger


def the_value_is_that_of_one_process_and_takes_one_collective():
    model = sharded(network())
    for name, penalty_on in PENALTIES.items():
        with CommDebugMode() as communication:
            value = penalty_on(model)()
        assert type(value) is torch.Tensor, name
        torch.testing.assert_close(value, penalty_on(network())(), msg=lambda text, name=name: f"{name}: {text}")
        assert communication.get_total_counts() == 1, name
    for name, penalty_on in GATHERED.items():
        expected = penalty_on(network())()
        torch.testing.assert_close(penalty_on(model)(), expected, msg=lambda text, name=name: f"{name}: {text}")


def its_gradient_is_that_of_one_process():
    for name, penalty_on in ALL.items():
        alone, model = network(), sharded(network())
        (3.0 * penalty_on(alone)()).backward()
        (3.0 * penalty_on(model)()).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert p.grad.placements == p.placements, name
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda text, name=name: f"{name}: {text}")


def its_second_derivative_is_that_of_one_process():
    def curvature(model):
        p = model[0].weight
        value = GroupLasso(model, LAM, groups="input")()
        (grad,) = torch.autograd.grad(value, [p], create_graph=True)
        (product,) = torch.autograd.grad((grad * grad).sum(), [p])
        return whole(product)

    torch.testing.assert_close(curvature(sharded(network())), curvature(network()))


def stationarity_is_the_largest_over_all_ranks():
    for name, penalty_on in kinds().items():
        if name == "orthogonal":
            continue
        distances = []
        for m, rows in ((network(), slice(None)), (sharded(network()), own_rows())):
            penalty = penalty_on(m)
            penalty.prox_(20.0) if len(penalty.parts) == 1 else None
            x, y = batch(0, rows)
            (m(x) - y).square().mean().backward()
            distances.append(penalty.stationarity())
        torch.testing.assert_close(*distances, msg=lambda text, name=name: f"{name}: {text}")


def a_nan_on_one_rank_is_seen_on_all():
    model = sharded(network())
    penalty = L1(model, LAM)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if dist.get_rank() == 0:
        model[0].weight.grad.to_local()[0, 0] = torch.nan
    assert penalty.stationarity().isnan()
    if dist.get_rank() == 0:
        model[0].weight.to_local().detach()[0, 0] = torch.nan
    assert penalty().isnan()


def n_of_m_survive_where_the_shards_cut_through_rows():
    mesh = init_device_mesh("cpu", (2,))
    w = torch.randn(3, 6)
    whole, optimizers = [], []
    for placement in (Replicate(), Shard(0), Shard(1)):
        p = nn.Parameter(distribute_tensor(w.clone(), mesh, [placement]))
        penalty = L0([p], LAM, groups=NM(2, 6))
        optimizers.append(RegularizedOptimizer(torch.optim.Adam([p]), penalty, "dual"))
        for _ in range(2):
            p.grad = distribute_tensor(w.sign(), mesh, [placement])
            optimizers[-1].step()
        assert penalty().item() == pytest.approx(6 * LAM)
        whole.append(p.full_tensor())
    assert torch.equal(whole[0] != 0, w.abs() >= w.abs().sort(dim=1).values[:, 4:5])
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0], whole[2])


class Writer:
    """Holds what was written last for each tag."""

    def __init__(self):
        self.seen = {}

    def add_scalar(self, tag, value, step):
        self.seen[tag] = value

    def add_histogram_raw(self, tag, num, **kw):
        self.seen[tag] = num


def summary_and_logger_are_called_by_every_rank():
    for penalty_on in kinds().values():
        tables, written = [], []
        for m in (network(), sharded(network())):
            penalty = penalty_on(m)
            tables.append(penalty.summary())
            alone = m is not None and not isinstance(m[0].weight, DTensor)
            writer = Writer() if alone or dist.get_rank() == 0 else None
            WeightLogger(writer, penalty).step()
            if writer:
                written.append(writer.seen)
        assert tables[0] == tables[1]
        if dist.get_rank() == 0:
            assert written[0].keys() == written[1].keys()
            assert all(written[1][tag] == pytest.approx(value, rel=1e-6) for tag, value in written[0].items())


def the_board_counts_over_all_ranks():
    """What plain tensors have there is in test_histograms.py."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    mesh = init_device_mesh("cpu", (2,))
    values = torch.randn(5, 4)
    values[0, :2] = values[2:4] = values[:, 3] = 0
    values[4, 0], values[4, 1], values[1, 1] = 3.0, torch.nan, -2.0
    boards = []
    for plain in (True, False):
        model = nn.Module()
        for name, tensor, placement in (
            ("rows", values, Shard(0)),
            ("columns", values, Shard(1)),
            ("replicas", values, Replicate()),
            ("one_row", values[:1], Shard(0)),
        ):
            w = tensor.clone() if plain else distribute_tensor(tensor, mesh, [placement])
            model.register_parameter(name, nn.Parameter(w))
        model.register_parameter("plain", nn.Parameter(values.clone()))
        folder = str(shared_folder() / ("plain" if plain else "sharded"))
        writer = SummaryWriter(folder) if dist.get_rank() == 0 else None
        WeightLogger(writer, L1(model, 0.1, select="all")).step()
        for step, groups in enumerate(("output", "input", Blocks(4)), start=1):
            WeightLogger(writer, GroupLasso(model, 0.1, groups=groups, select="all")).step(step)
        if writer is not None:
            writer.close()
            board = EventAccumulator(folder, size_guidance={"scalars": 0, "histograms": 0}).Reload()
            scalars = {
                (tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)
            }
            histograms = {
                (tag, event.step): [getattr(event.histogram_value, name) for name in ("bucket_limit", "bucket")]
                for tag in board.Tags()["histograms"]
                for event in board.Histograms(tag)
            }
            boards.append((scalars, histograms))
    if dist.get_rank() == 0:
        (scalars, histograms), (of_shards, histograms_of_shards) = boards
        assert of_shards == pytest.approx(scalars, rel=1e-6, nan_ok=True)
        assert {"dead_groups/rows", "nonfinite/columns", "sparsity/one_row"} <= {tag for tag, _ in scalars}
        assert histograms_of_shards == histograms


def the_board_counts_flips_over_all_ranks():
    mesh = init_device_mesh("cpu", (2,))
    before, after = (torch.randn(7, 3) * (torch.rand(7, 3) < 0.5) for _ in range(2))
    model = nn.Module()
    for dim in (0, 1):
        model.register_parameter(f"w{dim}", nn.Parameter(distribute_tensor(before, mesh, [Shard(dim)])))
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, 0.1), "proximal")
    writer = Writer() if dist.get_rank() == 0 else None
    logger = WeightLogger(writer, optimizer)
    logger.step()
    with torch.no_grad():
        for dim, w in enumerate(model.parameters()):
            w.copy_(distribute_tensor(after, mesh, [Shard(dim)]))
            w.grad = torch.zeros_like(w)
    logger.step()
    if writer is not None:
        flipped = ((before == 0) != (after == 0)).double().mean().item()
        for name in ("w0", "w1"):
            assert writer.seen[f"flipped/{name}"] == pytest.approx(flipped)
            assert writer.seen[f"multiplier/{name}"] == pytest.approx(0.1)


CHECKS = {
    2: [
        the_value_is_that_of_one_process_and_takes_one_collective,
        its_gradient_is_that_of_one_process,
        its_second_derivative_is_that_of_one_process,
        stationarity_is_the_largest_over_all_ranks,
        a_nan_on_one_rank_is_seen_on_all,
        n_of_m_survive_where_the_shards_cut_through_rows,
        summary_and_logger_are_called_by_every_rank,
        the_board_counts_over_all_ranks,
        the_board_counts_flips_over_all_ranks,
    ],
    4: [
        the_value_is_that_of_one_process_and_takes_one_collective,
        its_gradient_is_that_of_one_process,
        stationarity_is_the_largest_over_all_ranks,
        summary_and_logger_are_called_by_every_rank,
    ],
}


@check_cases(CHECKS)
def test_on_ranks(world, check, failures):
    assert not failures[world][check], failures[world][check]
