"""Orthogonal: rows that are orthogonal, by its definition."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from torch_regpen import L1, Orthogonal, Penalty, RegularizedOptimizer

SHAPES = [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (4, 2, 3, 3)]


def gram(w):
    rows = w.flatten(1)
    n = min(rows.shape)
    product = rows @ rows.mH if rows.shape[0] <= rows.shape[1] else rows.mH @ rows
    return torch.linalg.matrix_norm(product - torch.eye(n, dtype=w.dtype)) ** 2


def cosine(w):
    rows = list(w.flatten(1))
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    cosines = [(a @ b.conj()).abs() / (a.norm() * b.norm()) for a, b in pairs]
    return sum(cosines) / max(len(pairs), 1)


MEASURES = {"gram": gram, "cosine": cosine}
EACH = pytest.mark.parametrize("measure", MEASURES)


# Orthogonal


@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_value_and_gradient_are_those_of_the_definition(measure, shape, dtype):
    w = nn.Parameter(torch.randn(shape, dtype=dtype))
    penalty = Orthogonal([w], 0.3, measure)
    expected = 0.3 * torch.as_tensor(MEASURES[measure](w), dtype=torch.float64)
    torch.testing.assert_close(penalty(), expected)
    (gradient,) = torch.autograd.grad(penalty(), w)
    if expected.requires_grad:
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, w)[0])
    w.grad = torch.ones_like(w)
    penalty.add_grad_()
    torch.testing.assert_close(w.grad - 1, gradient)
    assert gradcheck(lambda _: penalty(), (w,), fast_mode=True)
    if dtype == torch.float64:
        assert gradgradcheck(lambda _: penalty(), (w,), fast_mode=True)


@EACH
def test_it_is_zero_where_rows_are_orthogonal(measure):
    square = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    for w in (square, square[:2], square[:, :2]):
        p = nn.Parameter(w.clone())
        penalty = Orthogonal([p], 1.0, measure)
        if measure == "gram" or w.shape[0] <= w.shape[1]:
            assert penalty() < 1e-15
        (gradient,) = torch.autograd.grad(penalty(), p)
        assert measure == "cosine" or gradient.abs().max() < 1e-14


@EACH
def test_rows_that_are_zero_or_alone_give_no_nan(measure):
    for shape in ((3, 4), (1, 4), (4, 1)):
        w = nn.Parameter(torch.zeros(shape))
        penalty = Orthogonal([w], 1.0, measure)
        assert penalty().item() == (min(shape) if measure == "gram" else 0)
        penalty().backward()
        assert torch.equal(w.grad, torch.zeros(shape))


@EACH
def test_half_types_are_computed_in_float32(measure):
    w = torch.randn(32, 64).half()
    values = []
    for v in (w, w.float()):
        p = nn.Parameter(v)
        values.append(Orthogonal([p], 1e-3, measure)())
        values[-1].backward()
        assert p.grad.dtype == v.dtype
    torch.testing.assert_close(*values)
    assert values[0].dtype == torch.float32


def test_it_is_a_penalty_on_the_weights_of_a_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    penalty = Orthogonal(model, 0.5)
    assert isinstance(penalty, Penalty)
    assert [name for name, _ in penalty.named_parameters_penalized()] == ["0.weight", "3.weight"]
    torch.testing.assert_close(penalty(), 0.5 * (gram(model[0].weight) + gram(model[3].weight)))
    assert Orthogonal(model, 0.5, select="3.weight")() < penalty()
    assert "Orthogonal" in penalty.summary()
    assert "groups" not in repr(penalty)
    assert list(penalty.parameters()) == []
    both = copy.deepcopy((model, penalty))
    both[0][3].weight.data.zero_()
    assert both[1]() != penalty()


@EACH
def test_coupled_is_the_loss_and_the_other_modes_say_why_not(measure):
    start = torch.randn(3, 5, dtype=torch.float64)
    ends = []
    for coupled in (True, False):
        w = nn.Parameter(start.clone())
        penalty = Orthogonal([w], 0.1, measure)
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        wrapped = RegularizedOptimizer(optimizer, penalty) if coupled else optimizer
        for _ in range(5):
            wrapped.zero_grad()
            (w.square().sum() + (0 if coupled else penalty())).backward()
            wrapped.step()
        ends.append(w.detach())
    torch.testing.assert_close(*ends)
    for mode, why in (("decoupled", "not a sum over"), ("proximal", "no proximal map"), ("dual", "no proximal map")):
        for other in (penalty, penalty + L1([w], 0.1)):
            with pytest.raises(ValueError, match=f"Orthogonal.*{why}"):
                RegularizedOptimizer(optimizer, other, mode)
    with pytest.raises(ValueError, match="no proximal map"):
        penalty.prox_(0.1)


@EACH
def test_the_audit_is_the_distance_to_its_gradient(measure):
    w = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
    penalty = Orthogonal([w], 0.1, measure)
    w.grad = -torch.autograd.grad(penalty(), w)[0]
    assert penalty.stationarity() < 1e-15
    w.grad[1, 2] += 0.25
    assert penalty.stationarity().item() == pytest.approx(0.25)


def test_what_orthogonal_refuses():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="'gram' or 'cosine'"):
        Orthogonal(model, 0.1, measure="rows")
    with pytest.raises(ValueError, match=r"bias.*no rows"):
        Orthogonal(model, 0.1, select="all")
    for option in ({"groups": "output"}, {"center": "initial"}, {"weights": {}}, {"scale": False}, {"positive": True}):
        with pytest.raises(TypeError, match="Orthogonal takes"):
            Orthogonal(model, 0.1, **option)


def test_orthogonal_training_makes_rows_orthogonal():
    w = nn.Parameter(torch.randn(4, 8))
    penalty = Orthogonal([w], 0.05)
    optimizer = RegularizedOptimizer(torch.optim.SGD([w], lr=0.5), penalty)
    for _ in range(300):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    torch.testing.assert_close(w.detach() @ w.detach().T, torch.eye(4), atol=1e-4, rtol=0)
