"""A model sharded by FSDP2 trains as it does in one process.

Each check runs on all ranks of one process group, all checks of a file in one start of the processes.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.optimizers import MODES
from helpers.ranks import check_cases, shared_folder
from helpers.sharded import (
    ADAM,
    EACH_WAY,
    FEW,
    IN_LOSS,
    LAM,
    PENALTIES,
    SGD,
    STEPS,
    assert_same_weights,
    assert_trains_alike,
    batch,
    kinds,
    network,
    optimizer_of,
    own_rows,
    sharded,
    step_alone,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from torch_regpen import L1, L2, GroupLasso, RegularizedOptimizer


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


def a_penalty_built_before_the_model_was_sharded_goes_on():
    model = network()
    penalty = GroupLasso(model, LAM, groups="input")
    expected = penalty().item()
    sharded(model)
    assert penalty().item() == pytest.approx(expected, rel=1e-12)


def the_penalty_is_in_full_precision_whatever_the_forward_is_in():
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


def low_precision_changes_the_forward_and_not_the_penalty():
    """With gradients made up, what is left is the penalty, on the float32 weights: it is that of one process."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for name in ("ElasticNet", "columns"):
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


def after_a_forward_alone_steps_still_act_on_the_sharded_weights():
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


def weights_that_stay_gathered_after_backward_are_penalized():
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


CHECKS = {
    2: [
        elementwise_steps_need_no_collective,
        fsdp_trains_as_one_process,
        each_kind_steps_on_shards_as_in_one_process,
        every_optimizer_steps_in_its_own_metric_on_shards,
        a_penalty_built_before_the_model_was_sharded_goes_on,
        the_penalty_is_in_full_precision_whatever_the_forward_is_in,
        low_precision_changes_the_forward_and_not_the_penalty,
        after_a_forward_alone_steps_still_act_on_the_sharded_weights,
        frozen_zeros_hold_on_shards,
        weights_materialized_after_sharding_are_penalized,
        weights_that_stay_gathered_after_backward_are_penalized,
        accumulated_and_clipped_gradients_have_the_penalty_once,
        checkpoints_of_shards_go_on_in_other_shards_and_in_one_process,
    ],
    4: [
        each_kind_steps_on_shards_as_in_one_process,
        frozen_zeros_hold_on_shards,
    ],
}


@check_cases(CHECKS)
def test_on_ranks(world, check, failures):
    assert not failures[world][check], failures[world][check]
