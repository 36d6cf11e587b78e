"""A model sharded over ranks trains as it does in one process: FSDP2, tensor parallelism, both; and DDP.

The checks run on two and on four processes, all in one process group; each is a test of its own here.
"""

import itertools
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import failures_on, shared_folder
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from torch_regpen import (
    L1,
    L2,
    MCP,
    ElasticNet,
    GroupLasso,
    LogSum,
    NuclearNorm,
    Orthogonal,
    RegularizedOptimizer,
    SparseGroupLasso,
)
from torch_regpen.groups import Blocks, Heads
from torch_regpen.tensorboard import WeightLogger

LAM = 0.02
STEPS = 3
IN_LOSS = ("before", "after")
MODES = ("coupled", "decoupled", "proximal", "dual")
BATCH = 16


def center_of(model):
    return {name: torch.full(p.shape, 0.1, dtype=p.dtype) for name, p in model.named_parameters()}


def row_weights(model):
    return {name: torch.linspace(0.5, 2.0, len(p), dtype=p.dtype) for name, p in model.named_parameters() if p.ndim > 1}


def element_weights(model):
    return {
        name: torch.linspace(0.5, 2.0, p.numel(), dtype=p.dtype).view(p.shape)
        for name, p in model.named_parameters()
        if p.ndim > 1
    }


PENALTIES = {
    "L1": lambda m: L1(m, LAM),
    "L2": lambda m: L2(m, LAM),
    "L2 of rows": lambda m: L2(m, LAM, groups="tensor"),
    "elastic net": lambda m: ElasticNet(m, LAM, l1_ratio=0.3),
    "MCP": lambda m: MCP(m, LAM, knee=0.2),
    "rows": lambda m: GroupLasso(m, LAM),
    "columns": lambda m: GroupLasso(m, LAM, groups="input"),
    "tensors": lambda m: GroupLasso(m, LAM, groups="tensor", select="all"),
    "columns, unscaled": lambda m: LogSum(m, LAM, groups="input", scale=False),
    "sparse columns": lambda m: SparseGroupLasso(m, LAM, groups="input"),
    "sum": lambda m: L1(m, LAM) + GroupLasso(m, LAM, groups="input") + L2(m, LAM, select="all"),
    "two lambdas": lambda m: L1([{"params": m[0]}, {"params": m[4], "lam": 2 * LAM}], LAM),
    "center": lambda m: L1(m, LAM, center=center_of(network())),
    "columns, center": lambda m: GroupLasso(m, LAM, groups="input", center=center_of(network())),
    "element weights": lambda m: L1(m, LAM, weights=element_weights(network())),
    "row weights": lambda m: GroupLasso(m, LAM, weights=row_weights(network())),
}
# These see a tensor only as a whole: it is gathered.
GATHERED = {
    "blocks": lambda m: GroupLasso(m[0], LAM, groups=Blocks(4)),
    "heads": lambda m: GroupLasso(m[0], LAM, groups=Heads(3, dim=1)),
    "nuclear norm": lambda m: NuclearNorm(m, LAM),
    "orthogonal": lambda m: Orthogonal(m, LAM) + L1(m, LAM),
}


ALL = PENALTIES | GATHERED
FEW = ("L1", "columns", "sum", "orthogonal")  # for loops with a forward
# One for each way in which shards are put together.
EACH_WAY = ("L1", "rows", "columns", "row weights", "sum", "blocks")


def kinds():
    """All on two ranks; on more, which all share the machine, one for each way."""
    return {name: penalty_on for name, penalty_on in ALL.items() if dist.get_world_size() == 2 or name in EACH_WAY}


def network(dtype=torch.float64):
    """Layers with 8, 7 and 3 rows: uneven shards, and on four ranks one that holds nothing of the last."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def sharded(model, **kw):
    """Two modules of its own, and the rest with the root, whose weights stay gathered from forward to backward."""
    for layer in (model[0], model[2]):
        fully_shard(layer, **kw)
    return fully_shard(model, **kw)


def batch(step, rows=slice(None), dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(BATCH, n, generator=generator, dtype=dtype) for n in (6, 3))
    return x[rows], y[rows]


def own_rows():
    return slice(dist.get_rank(), None, dist.get_world_size())


SGD = "SGD"
ADAM = "Adam"


def optimizer_of(name, model):
    if name == SGD:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=0.05)


def train(model, penalty, optimizer, mode, rows=slice(None)):
    """Some steps, with the penalty in the optimizer, or in the loss, before the forward or after it."""
    if mode not in IN_LOSS:
        optimizer = RegularizedOptimizer(optimizer, penalty, mode)
    for step in range(STEPS):
        x, y = batch(step, rows)
        term = penalty() if mode == "before" else 0.0
        loss = (model(x) - y).square().mean() + term
        if mode == "after":
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def step_alone(model, penalty, optimizer, mode):
    """Some steps with gradients made up from the weights: no forward, so that many kinds can be tried."""
    optimizer = RegularizedOptimizer(optimizer, penalty, mode)
    for step in range(2):
        for p in model.parameters():
            p.grad = torch.sin(5 * p.detach() + step)
        optimizer.step()


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_same_weights(model, expected, tolerance=1e-9, what=""):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            whole(p.detach()),
            q.detach(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{what}, {name}: {text}",
        )


@cache
def in_one_process(loop, name, optimizer, mode):
    """The weights that a loop ends with, and the penalty's value there; None where the penalty cannot do that."""
    model = network()
    penalty = ALL[name](model)
    try:
        loop(model, penalty, optimizer_of(optimizer, model), mode)
    except ValueError:
        return None
    return model, penalty()


def assert_trains_alike(wrap, loop, names, modes, optimizers, *rows):
    """`wrap(network())`, on some rows, goes the way of `network()` on all."""
    for name, mode, optimizer in itertools.product(names, modes, optimizers):
        expected = in_one_process(loop, name, optimizer, mode)
        if expected is None:
            continue
        what = f"{name}, {mode}, {optimizer}"
        model = network()
        penalty = ALL[name](model)
        model = wrap(model)
        loop(model, penalty, optimizer_of(optimizer, model), mode, *rows)
        assert_same_weights(model, expected[0], what=what)
        torch.testing.assert_close(penalty(), expected[1], msg=lambda text, what=what: f"{what}: {text}")


# Checks, each on all ranks.


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


def elementwise_steps_need_no_collective():
    for mode in ("coupled", "decoupled", "proximal", "dual"):
        for optimizer in (SGD, ADAM):
            model = sharded(network())
            wrapped = RegularizedOptimizer(optimizer_of(optimizer, model), L1(model, LAM) + L2(model, LAM), mode)
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            with CommDebugMode() as communication:
                wrapped.step()
            assert communication.get_total_counts() == 0, (mode, optimizer)


def fsdp_trains_as_one_process():
    assert_trains_alike(sharded, train, FEW, (*IN_LOSS, "coupled", "proximal"), [SGD], own_rows())
    assert_trains_alike(sharded, train, ["sum"], MODES, [ADAM], own_rows())


def each_kind_steps_on_shards_as_in_one_process():
    assert_trains_alike(sharded, step_alone, kinds(), ("coupled", "decoupled", "proximal"), [SGD])
    assert_trains_alike(sharded, step_alone, kinds(), ["proximal"], [ADAM])
    assert_trains_alike(sharded, step_alone, EACH_WAY, ["dual"], [SGD])


def every_optimizer_steps_in_its_own_metric_on_shards():
    for kind in (
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adadelta,
        torch.optim.AdamW,
    ):
        alone, model = network(), sharded(network())
        for m in (alone, model):
            penalty = L1(m, LAM) + GroupLasso(m, LAM, groups="input")
            kw = {"weight_decay": 0.0} if kind is torch.optim.AdamW else {}
            step_alone(m, penalty, kind(m.parameters(), lr=0.05, **kw), "proximal")
        assert_same_weights(model, alone, what=kind.__name__)


def a_penalty_that_was_there_before_the_model_was_sharded_goes_on():
    model = network()
    penalty = GroupLasso(model, LAM, groups="input")
    expected = penalty().item()
    sharded(model)
    assert penalty().item() == pytest.approx(expected, rel=1e-12)


def low_precision_in_the_forward_leaves_the_penalty_in_full_precision():
    """FSDP2 keeps the root's weights in bfloat16 between forward and backward; the penalty is on the float32 ones."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for penalty_on in (PENALTIES["L1"], PENALTIES["columns"]):
        alone = network(torch.float32)
        expected = penalty_on(alone)()
        expected.backward()
        model = sharded(network(torch.float32), mp_policy=policy)
        penalty = penalty_on(model)
        output = model(batch(0, dtype=torch.float32)[0])
        value = penalty()
        assert output.dtype == torch.bfloat16
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        (0.0 * output.float().sum() + value).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-6, atol=1e-7)


def low_precision_trajectories_differ_from_one_process_by_the_forward_alone():
    """With gradients made up, what is left is the penalty, on the float32 weights: it is that of one process."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for name in ("elastic net", "columns"):
        for mode in MODES:
            alone, model = network(torch.float32), sharded(network(torch.float32), mp_policy=policy)
            for m in (alone, model):
                optimizer = RegularizedOptimizer(optimizer_of(ADAM, m), PENALTIES[name](m), mode)
                for step in range(STEPS):
                    m(batch(step, dtype=torch.float32)[0])
                    m.reshard() if m is model else None
                    for p in m.parameters():
                        p.grad = torch.sin(5 * p.detach() + step)
                    optimizer.step()
            assert_same_weights(model, alone, 1e-6, f"{name}, {mode}")


def what_is_done_after_a_forward_without_a_backward_is_done_to_the_sharded_weights():
    """An evaluation leaves the root's weights gathered; what then only changed those copies would be lost."""
    alone, model = network(), sharded(network())
    for m in (alone, model):
        penalty = L1(m, LAM)
        optimizer = RegularizedOptimizer(optimizer_of(SGD, m), penalty)
        with torch.no_grad():
            m(batch(0)[0])
        penalty.prox_(5.0)
        if m is model:
            m.reshard()
        assert [name for name, _ in penalty.named_parameters_penalized()] == ["0.weight", "2.weight", "4.weight"]
        m(batch(0)[0]).square().mean().backward()
        with torch.no_grad():
            m(batch(0)[0])
        optimizer.step()
    model.reshard()
    assert_same_weights(model, alone)


def frozen_zeros_hold_on_shards():
    alone, model = network(), sharded(network())
    for m, rows in ((alone, slice(None)), (model, own_rows())):
        optimizer = RegularizedOptimizer(optimizer_of(ADAM, m), GroupLasso(m, 0.3, groups="input"), "proximal")
        for step in range(8):
            if step == 4:
                optimizer.freeze_zeros()
            x, y = batch(step, rows)
            optimizer.zero_grad()
            (m(x) - y).square().mean().backward()
            optimizer.step()
    assert (alone[4].weight == 0).any()
    assert_same_weights(model, alone)


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


def summary_and_logger_are_called_by_every_rank():
    class Writer:
        def __init__(self):
            self.seen = {}

        def add_scalar(self, tag, value, step):
            self.seen[tag] = value

        def add_histogram_raw(self, tag, num, **kw):
            self.seen[tag] = num

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
    """What plain tensors have there is in test_tensorboard.py."""
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


def weights_materialized_after_sharding_are_penalized():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    penalty = L1(model, LAM) + GroupLasso(model, LAM, groups="input")
    sharded(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p, q in zip(model.parameters(), network().parameters(), strict=True):
            p.copy_(distribute_tensor(q, p.device_mesh, p.placements))
    alone = network()
    train(alone, L1(alone, LAM) + GroupLasso(alone, LAM, groups="input"), optimizer_of(ADAM, alone), "proximal")
    train(model, penalty, optimizer_of(ADAM, model), "proximal", own_rows())
    assert_same_weights(model, alone)


def weights_that_stay_gathered_after_backward_are_penalized_where_the_optimizer_sees_them():
    alone, model = network(), sharded(network())
    model.set_reshard_after_backward(False)
    for m, rows in ((alone, slice(None)), (model, own_rows())):
        optimizer = RegularizedOptimizer(optimizer_of(SGD, m), L1(m, LAM), "proximal")
        x, y = batch(0, rows)
        (m(x) - y).square().mean().backward()
        optimizer.step()
    for module in (model, model[0], model[2]):
        module.reshard()
    assert_same_weights(model, alone)


def accumulated_and_clipped_gradients_have_the_penalty_once():
    alone, model = network(), sharded(network())
    for m, rows in ((alone, slice(None)), (model, own_rows())):
        penalty = GroupLasso(m, 0.5, groups="input")
        optimizer = optimizer_of(SGD, m)
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in (0, 1):
                if m is model:
                    m.set_requires_gradient_sync(part == 1)
                x, y = batch(2 * step + part, rows)
                ((m(x) - y).square().mean() / 2).backward()
            penalty.add_grad_()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.3)
            optimizer.step()
    assert_same_weights(model, alone)


def ddp_trains_as_one_process():
    for mode in ("before", "after", "coupled", "decoupled", "proximal", "dual"):
        alone, model = network(), network()
        train(alone, L1(alone, LAM) + GroupLasso(alone, LAM), optimizer_of(ADAM, alone), mode)
        wrapped = DistributedDataParallel(model)
        penalty = L1(wrapped, LAM) + GroupLasso(wrapped, LAM)  # of the wrapper or of the model in it
        train(wrapped, penalty, optimizer_of(ADAM, wrapped), mode, own_rows())
        assert_same_weights(model, alone, what=mode)


def ddp_accumulates_without_synchronising_and_has_the_penalty_once():
    for mode in MODES:
        alone, model = network(), network()
        for m, rows in ((alone, slice(None)), (model, own_rows())):
            forward = DistributedDataParallel(m) if m is model else m
            optimizer = RegularizedOptimizer(optimizer_of(SGD, m), PENALTIES["sum"](m), mode)
            for step in range(STEPS):
                optimizer.zero_grad()
                for part in (0, 1):
                    x, y = batch(2 * step + part, rows)
                    with forward.no_sync() if m is model and part == 0 else nullcontext():
                        ((forward(x) - y).square().mean() / 2).backward()
                optimizer.step()
        assert_same_weights(model, alone, what=mode)


def checkpoints_of_shards_go_on_in_other_shards_and_in_one_process():
    class WithPenalty(nn.Module):
        def __init__(self, lam):
            super().__init__()
            self.net = network()
            self.penalty = L1(self.net, lam) + GroupLasso(self.net, lam, groups="input")

        def forward(self, x):
            return self.net(x)

    def run(shard, mode, lam=LAM):
        model = WithPenalty(lam)
        if shard is not None:
            shard(model)
        adam = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, RegularizedOptimizer(adam, model.penalty, mode)

    def steps(model, optimizer, numbers, rows):
        for number in numbers:
            x, y = batch(number, rows)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

    def state(model, optimizer):
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    def load(model, optimizer, folder, **kw):
        loaded = state(model, optimizer)
        dcp.load(loaded, checkpoint_id=folder, **kw)
        set_model_state_dict(model, loaded["model"])
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
        assert [part.lam for part in model.penalty.parts] == [LAM, LAM]

    for mode in MODES:
        folder = shared_folder() / mode
        straight = run(lambda model: sharded(model.net) and fully_shard(model), mode)
        steps(*straight, (0, 1, 2), own_rows())
        dcp.save(state(*straight), checkpoint_id=folder)
        steps(*straight, (3, 4), own_rows())
        resumed = run(fully_shard, mode, lam=7.0)
        load(*resumed, folder)
        steps(*resumed, (3, 4), own_rows())
        alone = run(None, mode, lam=7.0)
        load(*alone, folder, no_dist=True)
        steps(*alone, (3, 4), slice(None))
        for model in (straight[0], resumed[0]):
            assert_same_weights(model, alone[0], what=mode)


def tensor_parallel(model, mesh=None):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def tensor_parallelism_trains_as_one_process():
    """The last layer is not parallelized: some parameters are plain tensors."""
    assert_trains_alike(tensor_parallel, train, FEW, (*IN_LOSS, "coupled"), [SGD])
    assert_trains_alike(tensor_parallel, step_alone, FEW, ["decoupled", "dual"], [SGD])
    assert_trains_alike(tensor_parallel, step_alone, ALL, ["proximal"], [ADAM])


def a_loss_that_is_a_dtensor_takes_the_penalty():
    alone, model = network(), tensor_parallel(network())
    mesh = model[0].weight.device_mesh
    parallelize_module(model[4], mesh, ColwiseParallel(output_layouts=Replicate(), use_local_output=False))
    x, y = batch(0)
    ((alone(x) - y).square().mean() + PENALTIES["sum"](alone)()).backward()
    loss = (model(x) - distribute_tensor(y, mesh, [Replicate()])).square().mean()
    assert type(loss) is DTensor
    (loss + PENALTIES["sum"](model)()).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad)


def a_mesh_of_replicas_and_shards_trains_as_one_process():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    assert_trains_alike(lambda m: sharded(m, mesh=mesh), train, ["sum"], (*IN_LOSS, "proximal"), [SGD], own_rows())
    assert_trains_alike(lambda m: sharded(m, mesh=mesh), step_alone, ALL, ["decoupled"], [SGD])
    model = sharded(network(), mesh=mesh)
    with CommDebugMode() as communication:
        PENALTIES["sum"](model)()
    assert communication.get_total_counts() == 1


def a_mesh_of_shards_and_tensor_parallelism_trains_as_one_process():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def both(model):
        return sharded(tensor_parallel(model, mesh["tensor"]), mesh=mesh["data"])

    rows = slice(mesh.get_local_rank("data"), None, 2)
    assert_trains_alike(both, train, ["sum"], (*IN_LOSS, "coupled"), [SGD], rows)
    assert_trains_alike(both, step_alone, ALL, ["proximal"], [ADAM])


ON_TWO = [
    the_value_is_that_of_one_process_and_takes_one_collective,
    its_gradient_is_that_of_one_process,
    its_second_derivative_is_that_of_one_process,
    elementwise_steps_need_no_collective,
    fsdp_trains_as_one_process,
    each_kind_steps_on_shards_as_in_one_process,
    every_optimizer_steps_in_its_own_metric_on_shards,
    a_penalty_that_was_there_before_the_model_was_sharded_goes_on,
    low_precision_in_the_forward_leaves_the_penalty_in_full_precision,
    low_precision_trajectories_differ_from_one_process_by_the_forward_alone,
    what_is_done_after_a_forward_without_a_backward_is_done_to_the_sharded_weights,
    frozen_zeros_hold_on_shards,
    stationarity_is_the_largest_over_all_ranks,
    a_nan_on_one_rank_is_seen_on_all,
    summary_and_logger_are_called_by_every_rank,
    the_board_counts_over_all_ranks,
    weights_materialized_after_sharding_are_penalized,
    weights_that_stay_gathered_after_backward_are_penalized_where_the_optimizer_sees_them,
    accumulated_and_clipped_gradients_have_the_penalty_once,
    ddp_trains_as_one_process,
    ddp_accumulates_without_synchronising_and_has_the_penalty_once,
    checkpoints_of_shards_go_on_in_other_shards_and_in_one_process,
    tensor_parallelism_trains_as_one_process,
    a_loss_that_is_a_dtensor_takes_the_penalty,
]
ON_FOUR = [
    the_value_is_that_of_one_process_and_takes_one_collective,
    its_gradient_is_that_of_one_process,
    each_kind_steps_on_shards_as_in_one_process,
    frozen_zeros_hold_on_shards,
    stationarity_is_the_largest_over_all_ranks,
    summary_and_logger_are_called_by_every_rank,
    a_mesh_of_replicas_and_shards_trains_as_one_process,
    a_mesh_of_shards_and_tensor_parallelism_trains_as_one_process,
]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return failures_on(2, ON_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return failures_on(4, ON_FOUR, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("check", [check.__name__ for check in ON_TWO])
def test_on_two_ranks(check, two_ranks):
    assert not two_ranks[check], two_ranks[check]


@pytest.mark.parametrize("check", [check.__name__ for check in ON_FOUR])
def test_on_four_ranks(check, four_ranks):
    assert not four_ranks[check], four_ranks[check]
