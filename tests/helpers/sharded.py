"""Models sharded over ranks, and what they are compared with: the same in one process."""

import itertools
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers import nets
from helpers.kinds import VARIANTS
from torch_regpen import L1, GroupLasso, NuclearNorm, Orthogonal, RegularizedOptimizer
from torch_regpen.groups import Blocks, Heads

LAM = 0.02
STEPS = 3
IN_LOSS = ("before", "after")
BATCH = 16


def at_lam(name):
    return lambda model: VARIANTS[name](model, LAM)


PENALTIES = {
    **{
        name: at_lam(name)
        for name in (
            "L1", "L2", "tensors of L2", "ElasticNet", "MCP", "rows", "columns", "tensors", "sparse columns",
            "unscaled columns of LogSum", "center", "columns around a center", "weights", "weights of rows",
        )
    },
    "sum": at_lam("columns, elements and all squares"),
    "two lambdas": lambda m: L1([{"params": m[0]}, {"params": m[4], "lam": 2 * LAM}], LAM),
}  # fmt: skip
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
EACH_WAY = ("L1", "rows", "columns", "weights of rows", "sum", "blocks")


def kinds():
    """All on two ranks; on more, which all share the machine, one for each way."""
    return {name: penalty_on for name, penalty_on in ALL.items() if dist.get_world_size() == 2 or name in EACH_WAY}


def network(dtype=torch.float64):
    """Layers with 8, 7 and 3 rows: uneven shards, and on four ranks one that holds nothing of the last."""
    return nets.network(dtype=dtype, sizes=(6, 8, 7, 3))


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
