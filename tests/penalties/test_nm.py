"""N:M sparsity: of each m consecutive weights of a row the n largest survive."""

import copy
import math

import pytest
import torch
from helpers.nets import network
from torch import nn

import torch_regpen.functional as F
from torch_regpen import L0, L1, ElasticNet, GroupLasso, RegularizedOptimizer, SparseGroupLasso, TargetSparsity
from torch_regpen.groups import NM, Units, WholeTensor

OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=1e-2),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.5),
}


def projected(rows, n, m):
    """By the definition: a loop over the rows, which are lists, and their pieces."""
    found = []
    for row in rows:
        for start in range(0, len(row), m):
            piece = row[start : start + m]
            order = sorted(range(m), key=lambda i: (-abs(piece[i]), i))
            found += [x if i in order[:n] else 0.0 for i, x in enumerate(piece)]
    return torch.tensor(found, dtype=torch.float64)


def proxed(w, n=2, m=4, step=1.0, lam=1e-4, **kw):
    w = w.clone()
    L0([w], lam, groups=NM(n, m, **kw)).prox_(step)
    return w


def counts(w, m=4):
    """The nonzero elements of each m consecutive ones."""
    return (w.reshape(-1, m) != 0).sum(1).unique().tolist()


# The projection


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 6), (4, 12)])
@pytest.mark.parametrize("shape", [(5, 12), (24,), (3, 4, 3, 3), (1, 12)])
def test_the_n_largest_of_each_m_survive(n, m, shape):
    w = torch.randn(shape, dtype=torch.float64)
    rows = (w if w.ndim < 2 else w.flatten(1)).reshape(-1, w.numel() if w.ndim < 2 else w[0].numel())
    assert torch.equal(proxed(w, n, m).flatten(), projected(rows.tolist(), n, m))


def test_it_is_the_projection_of_torchao():
    group = pytest.importorskip("torchao.prototype.pat.group")
    prox = pytest.importorskip("torchao.prototype.pat.optim.min_sparsity").NMSparseConstraint(0.0, n_nonzero=2)
    for shape in ((6, 8), (4, 8, 3, 3)):
        w = torch.randn(shape)
        theirs = nn.Parameter(w.clone())
        with group.KElementGrouper(theirs, 4) as grouper, torch.no_grad():
            for piece in grouper.p:
                prox.apply_(piece, 1.0)
        assert torch.equal(proxed(w), theirs.detach())


def test_it_is_the_mask_of_the_weight_norm_sparsifier():
    from torch.ao.pruning import WeightNormSparsifier

    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    w = model[0].weight.detach().clone()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(proxed(w), model[0].weight.detach())


def test_the_step_and_lambda_make_no_difference_unless_one_is_zero():
    w = torch.randn(4, 8)
    for step, lam in ((1e-12, 1e-12), (1e12, 1e12), (torch.tensor(0.5), 1.0)):
        assert torch.equal(proxed(w, step=step, lam=lam), proxed(w))
    assert torch.equal(proxed(w, lam=0.0), w)
    assert torch.equal(proxed(w, step=0.0), w)


def test_of_equal_elements_the_first_survive():
    w = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, 2.0, 2.0, -2.0]])
    assert proxed(w).tolist() == [[1, -1, 0, 0, 0, 2, 2, 0]]
    assert proxed(torch.zeros(2, 8)).count_nonzero() == 0


def test_nan_and_infinity_stay_visible():
    w = torch.tensor([[1.0, math.nan, math.inf, 5.0]])
    assert str(proxed(w).tolist()) == "[[0.0, nan, inf, 0.0]]"
    assert proxed(torch.full((1, 4), math.nan)).isnan().sum() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_other_dtypes_are_kept(dtype):
    w = torch.randn(4, 8).to(dtype)
    new = proxed(w)
    assert new.dtype == dtype
    assert counts(new) == [2]
    assert torch.equal(new[new != 0], w[new != 0])


def test_large_tensors_are_projected_in_chunks():
    w = torch.randn(520, 1024)
    whole = w.reshape(-1, 4)
    keep = torch.zeros_like(whole, dtype=torch.bool).scatter_(1, whole.abs().topk(2, 1).indices, True)
    assert torch.equal(proxed(w), (whole * keep).reshape(w.shape))
    assert torch.equal(proxed(w.T.contiguous().T), proxed(w))


# Layers


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (nn.Linear(8, 3), lambda w: w),
        (nn.Conv2d(4, 3, 3), lambda w: w.flatten(1)),
        (nn.Conv2d(8, 4, 3, groups=2), lambda w: w.flatten(1)),
        (nn.ConvTranspose2d(4, 3, 3), lambda w: w.transpose(0, 1).flatten(1)),
        (
            nn.ConvTranspose2d(8, 6, 3, groups=2),
            lambda w: w.unflatten(0, (2, 4)).transpose(1, 2).flatten(2).flatten(0, 1),
        ),
        (nn.Embedding(5, 8), lambda w: w),
        (nn.MultiheadAttention(8, 2), lambda w: w),
    ],
    ids=lambda x: str(x)[:45] if isinstance(x, nn.Module) else "",
)
def test_it_goes_along_what_an_output_unit_reads(layer, rows):
    layer = layer.double()
    w = next(p for p in layer.parameters() if p.ndim > 1)
    expected = projected(rows(w).tolist(), 2, 4)
    L0(layer, 1e-4, groups=NM(2, 4)).prox_(1.0)
    assert torch.equal(rows(w).flatten(), expected)


def test_a_row_of_one_gate_of_an_lstm_is_a_row():
    layer = nn.LSTM(4, 8)
    L0(layer, 1e-4, groups=NM(2, 4)).prox_(1.0)
    assert counts(layer.weight_ih_l0) == counts(layer.weight_hh_l0) == [2]
    with pytest.raises(ValueError, match=r"NM\(2, 4\) does not divide the rows of 6 elements"):
        L0(nn.LSTM(6, 8), 1e-4, groups=NM(2, 4))


def test_the_transposed_weight_of_transformers_is_divided_along_its_inputs():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(6, 8)
    L0(layer, 1e-4, groups=NM(2, 4)).prox_(1.0)
    assert counts(layer.weight.T) == [2]


def test_the_rows_can_be_given():
    w = torch.randn(4, 6)
    assert torch.equal(proxed(w, rows=WholeTensor()), proxed(w.flatten()).reshape(4, 6))
    assert torch.equal(proxed(w, rows=Units((4, 6), kept=(1,))), proxed(w.T.contiguous()).T)


# As a penalty


def test_its_value_is_the_number_of_nonzero_elements():
    w = torch.randn(4, 8)
    assert L0([w], 0.5, groups=NM(2, 4))() == 16
    penalty = L0([proxed(w)], 0.5, groups=NM(2, 4))
    assert penalty() == 8
    assert penalty.sparsity() == 0.5
    assert penalty.zero_groups() == {}
    assert "16/32" in penalty.summary()
    assert repr(penalty) == "L0(lam=0.5, groups=NM(2, 4), 1 parameters: 0)"


def test_its_stationarity_is_the_largest_gradient_of_a_survivor():
    w = nn.Parameter(torch.tensor([[0.0, 3.0, 0.0, 1.0]]))
    w.grad = torch.tensor([[9.0, -0.5, 7.0, 0.25]])
    assert L0([w], 0.1, groups=NM(2, 4)).stationarity() == 0.5


def test_a_center_is_what_the_survivors_differ_from():
    w, center = torch.randn(4, 8), torch.randn(4, 8)
    expected = center + proxed(w - center)
    penalty = L0([("w", w)], 1e-4, groups=NM(2, 4), center={"w": center})
    penalty.prox_(1.0)
    torch.testing.assert_close(w, expected)
    assert penalty.sparsity() == 0.5


# Training


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_leaves_n_of_m(name, mode):
    model = network(sizes=(4, 6, 2))
    optimizer = RegularizedOptimizer(OPTIMIZERS[name](model.parameters()), L0(model, 1e-12, groups=NM(1, 2)), mode)
    for step in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        assert all(counts(p, 2) == [1] for p in model.parameters() if p.ndim > 1), step


def test_weights_without_a_gradient_yet_have_no_limit_on_the_change():
    for mode in ("proximal", "dual"):
        layer = nn.Embedding(6, 4)
        before = layer.weight.detach().clone()
        wrapped = RegularizedOptimizer(torch.optim.Adam(layer.parameters()), L0(layer, 1e-6, groups=NM(2, 4)), mode)
        layer(torch.tensor([1, 2])).sum().backward()
        wrapped.step()
        assert torch.equal(layer.weight[3:], proxed(before)[3:])
        assert counts(layer.weight) == [2]


def test_lambda_zero_is_the_bare_optimizer_bit_for_bit():
    model = network(sizes=(4, 6, 2))
    other = copy.deepcopy(model)
    optimizers = [
        RegularizedOptimizer(torch.optim.Adam(model.parameters()), L0(model, 0.0, groups=NM(1, 2)), "proximal"),
        torch.optim.Adam(other.parameters()),
    ]
    x = torch.randn(8, 4)
    for net, optimizer in zip((model, other), optimizers, strict=True):
        net(x).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_dual_averaging_lets_weights_come_back():
    target = torch.tensor([[0.1, 0.1, 3.0, 4.0]])
    for mode, expected in (("dual", [0, 0, 3, 4]), ("proximal", [0.1, 0.1, 0, 0])):
        w = nn.Parameter(torch.tensor([[0.5, 0.4, 0.0, 0.0]]))
        optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=0.01), L0([w], 1.0, groups=NM(2, 4)), mode)
        for _ in range(600):
            w.grad = w.detach() - target
            optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor([expected]).float(), atol=1e-2, rtol=0)


def test_frozen_zeros_stay_n_of_m():
    model = network(sizes=(4, 6, 2))
    optimizer = RegularizedOptimizer(torch.optim.Adam(model.parameters()), L0(model, 1e-3, groups=NM(1, 2)), "dual")
    for step in range(4):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        if step == 1:
            optimizer.freeze_zeros()
            zero = [p == 0 for p in model.parameters()]
    assert all(torch.equal(p == 0, z) for p, z in zip(model.parameters(), zero, strict=True) if p.ndim > 1)


def test_it_survives_a_checkpoint():
    model = network(sizes=(4, 6, 2))
    penalty = L0(model, 1e-3, groups=NM(1, 2))
    again = copy.deepcopy((model, penalty))[1]
    again.load_state_dict(penalty.state_dict())
    again.prox_(1.0)
    assert again.sparsity() == 0.5
    assert penalty.sparsity() == 0


# What is refused


@pytest.mark.parametrize("args", [(4, 4), (0, 4), (-1, 4), (5, 4), (2.0, 4), (2, True), ("2", 4)])
def test_n_and_m_that_mean_nothing_are_refused(args):
    with pytest.raises(ValueError, match=r"NM\(n, m\)"):
        NM(*args)


@pytest.mark.parametrize("kind", [L1, ElasticNet, GroupLasso, SparseGroupLasso])
def test_other_kinds_than_l0_are_refused(kind):
    with pytest.raises(ValueError, match=rf"groups=NM\(2, 4\) is for L0 alone, not for {kind.__name__}"):
        kind([torch.ones(4, 4)], 0.1, groups=NM(2, 4))


def test_functions_of_tensors_refuse_it():
    for function in (F.group_lasso_value, F.group_lasso_grad):
        with pytest.raises(ValueError, match="is for L0 alone"):
            function(torch.ones(4, 4), NM(2, 4))


def test_a_remainder_is_refused_at_construction_with_the_name():
    with pytest.raises(ValueError, match=r"'0.weight': NM\(2, 4\) does not divide the rows of 27 elements .*`exclude`"):
        L0(nn.Sequential(nn.Conv2d(3, 8, 3)), 0.1, groups=NM(2, 4))
    with pytest.raises(ValueError, match="rows of 6 elements"):
        L0([torch.ones(6)], 0.1, groups=NM(2, 4))
    with pytest.raises(ValueError, match="rows of 18 elements"):  # 36 divides by 4, but a channel group reads 18
        L0(nn.ConvTranspose2d(4, 4, 3, groups=2), 0.1, groups=NM(2, 4))


def test_weights_the_loss_and_a_target_are_refused():
    w = nn.Parameter(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"not supported with groups=NM\(2, 4\)"):
        L0([("w", w)], 0.1, groups=NM(2, 4), weights={"w": torch.ones(4, 8)})
    penalty = L0([w], 0.1, groups=NM(2, 4))
    with pytest.raises(ValueError, match="no gradient"):
        penalty.add_grad_()
    for mode in ("coupled", "decoupled"):
        with pytest.raises(ValueError, match="no gradient"):
            RegularizedOptimizer(torch.optim.SGD([w], 0.1), penalty, mode)
    with pytest.raises(ValueError, match=r"groups=NM\(2, 4\): it is 1 - n/m at once"):
        TargetSparsity(RegularizedOptimizer(torch.optim.SGD([w], 0.1), penalty, "dual"), 0.5, steps=100)


def test_a_sharded_parameter_is_projected_by_whole_rows(one_rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    w = torch.randn(4, 8)
    for dim in (0, 1):
        sharded = distribute_tensor(w.clone(), one_rank, [Shard(dim)])
        L0([sharded], 1e-4, groups=NM(2, 4)).prox_(1.0)
        assert torch.equal(sharded.full_tensor(), proxed(w))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured kernels need CUDA")
def test_the_semi_structured_kernels_take_the_weights():
    layer = nn.Linear(128, 256, bias=False).half().cuda()
    L0(layer, 1e-4, groups=NM(2, 4)).prox_(1.0)
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    dense = layer(x)
    layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    torch.testing.assert_close(layer(x), dense, rtol=1e-2, atol=1e-2)
