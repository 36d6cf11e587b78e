"""DDP, tensor parallelism and meshes of two dimensions train as one process does.

Each check runs on all ranks of one process group, all checks of a file in one start of the processes.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from helpers.optimizers import MODES
from helpers.ranks import check_cases
from helpers.sharded import (
    ADAM,
    ALL,
    FEW,
    IN_LOSS,
    LAM,
    PENALTIES,
    SGD,
    STEPS,
    assert_same_weights,
    assert_trains_alike,
    batch,
    network,
    optimizer_of,
    own_rows,
    sharded,
    step_alone,
    train,
    whole,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from torch_regpen import L1, GroupLasso, RegularizedOptimizer


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


CHECKS = {
    2: [
        ddp_trains_as_one_process,
        ddp_accumulates_without_synchronising_and_has_the_penalty_once,
        tensor_parallelism_trains_as_one_process,
        a_loss_that_is_a_dtensor_takes_the_penalty,
    ],
    4: [
        a_mesh_of_replicas_and_shards_trains_as_one_process,
        a_mesh_of_shards_and_tensor_parallelism_trains_as_one_process,
    ],
}


@check_cases(CHECKS)
def test_on_ranks(world, check, failures):
    assert not failures[world][check], failures[world][check]
