"""What a magnitude is: each grouping against the groups written out."""

import math

import pytest
import torch
from helpers.kinds import GROUPED, GROUPS, KINDS, KNEE, RHO, magnitudes, members, omega, proxed, value_of
from helpers.oracles import least
from torch import nn

from torch_regpen import L0, L1, L2, MCP, GroupLasso, NuclearNorm, SparseGroupLasso
from torch_regpen import functional as F
from torch_regpen.groups import Blocks, Elements, Heads, SingularValues, resolve

EACH = pytest.mark.parametrize("name", GROUPS)
WITH_NORMS = pytest.mark.parametrize("name", GROUPED)
SHAPES = [(4, 6), (2, 4, 6), (6, 2, 2, 3)]


def weight(shape=(4, 6), dtype=torch.float64):
    w = torch.randn(shape, dtype=dtype)
    w[0] *= 0.1
    w[-1] = 0
    return w


# Magnitudes, and the way back


@EACH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("scale", [True, False])
def test_magnitudes_are_those_of_the_groups_written_out(name, shape, dtype, scale):
    w = weight(shape, dtype)
    grouping = resolve(GROUPS[name], scale=scale)
    u, rebuild = grouping.polar(w)
    expected, count = magnitudes(w, GROUPS[name], scale)
    torch.testing.assert_close(u.flatten(), expected, atol=1e-14, rtol=1e-12)
    assert grouping.count(w.shape) == count
    assert u.shape == grouping.magnitudes_shape(w.shape)
    torch.testing.assert_close(rebuild(u), w, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(rebuild(2 * u), 2 * w, atol=1e-14, rtol=1e-12)
    assert torch.equal(rebuild(u + 1)[-1] != 0, w[-1] != 0) or name in ("singular values", *GROUPED)


@WITH_NORMS
def test_a_zero_group_has_no_direction_and_stays_zero(name):
    grouping = resolve(GROUPS[name])
    w = torch.zeros(4, 6, requires_grad=True)
    u, rebuild = grouping.polar(w)
    v = rebuild(u + 1)
    assert torch.equal(v, torch.zeros(4, 6))
    (gradient,) = torch.autograd.grad(v.sum(), w)
    assert gradient.isfinite().all()


@WITH_NORMS
def test_one_number_for_each_group_is_spread_over_its_elements(name):
    w = torch.randn(4, 6)
    grouping = resolve(GROUPS[name])
    u, _ = grouping.polar(w)
    index = torch.arange(24).view(4, 6)
    spread = grouping.spread(torch.arange(u.numel()).view(u.shape), w)
    for i, part in enumerate(members(index, GROUPS[name])):
        assert (spread.flatten()[part] == i).all()


@pytest.mark.parametrize("name", [*GROUPED, "singular values"])
def test_the_layout_in_memory_makes_no_difference(name):
    w = torch.randn(6, 2, 2, 3)
    groups = GROUPS[name]
    for v in (w.to(memory_format=torch.channels_last), w.transpose(0, 3).contiguous().transpose(0, 3)):
        assert not v.is_contiguous()
        torch.testing.assert_close(value_of(GroupLasso, v, groups=groups), value_of(GroupLasso, w, groups=groups))
        v = proxed(GroupLasso, v, 0.1, groups=groups)
        torch.testing.assert_close(v, F.group_lasso_prox(w, 0.1, groups), atol=1e-6, rtol=1e-6)


@EACH
def test_bool_and_other_things_are_no_groups(name):
    assert resolve(GROUPS[name]) == resolve(GROUPS[name])
    assert hash(resolve(GROUPS[name])) is not None
    for wrong in (True, 1.5, ("output",), [0]):
        with pytest.raises(TypeError, match="groups"):
            L1(nn.Linear(2, 2), 0.1, groups=wrong)
    with pytest.raises(ValueError, match="'output', 'input' and 'tensor'"):
        L1(nn.Linear(2, 2), 0.1, groups="row")


# What the definition says of groups


@pytest.mark.parametrize("name", [*GROUPED, "singular values"])
def test_l1_over_groups_is_the_group_lasso_with_its_root_of_the_size(name):
    w = weight()
    groups = GROUPS[name]
    u, n = magnitudes(w, groups)
    expected = u.sum() if name == "singular values" else math.sqrt(n) * sum(part.norm() for part in members(w, groups))
    torch.testing.assert_close(value_of(L1, w, groups=groups), expected)
    torch.testing.assert_close(value_of(GroupLasso, w, groups=groups), expected)
    torch.testing.assert_close(F.group_lasso_value(w, groups), expected)
    torch.testing.assert_close(proxed(L1, w, 0.2, groups=groups), F.group_lasso_prox(w, 0.2, groups))


@EACH
@pytest.mark.parametrize("scale", [True, False])
def test_l2_is_l2_whatever_the_groups(name, scale):
    w = weight()
    how = {"groups": GROUPS[name], "scale": scale}
    torch.testing.assert_close(value_of(L2, w, **how), w.square().sum())
    torch.testing.assert_close(proxed(L2, w, 0.15, **how), w / 1.3)


@WITH_NORMS
def test_l0_counts_the_elements_of_groups_that_are_not_zero(name):
    w = torch.zeros(4, 6)
    assert value_of(L0, w, groups=GROUPS[name]) == 0
    w[1, 2] = 1e-3
    first = members(torch.arange(24).view(4, 6), GROUPS[name])
    assert value_of(L0, w, groups=GROUPS[name]) == next(len(part) for part in first if 8 in part)
    assert value_of(L0, w, groups=GROUPS[name], scale=False) == 1


@WITH_NORMS
def test_a_knee_is_in_units_of_a_weight(name):
    for size, expected in ((KNEE, KNEE / 2), (10 * KNEE, KNEE / 2), (KNEE / 2, KNEE / 2 - KNEE / 8)):
        w = torch.full((4, 6), size, dtype=torch.float64)
        assert value_of(KINDS["MCP"], w, groups=GROUPS[name]).item() == pytest.approx(24 * expected)


@WITH_NORMS
def test_without_scale_the_norm_counts_and_each_group_once(name):
    w = weight()
    norms = torch.stack([part.norm() for part in members(w, GROUPS[name])])
    grouping = resolve(GROUPS[name], scale=False)
    torch.testing.assert_close(value_of(L1, w, groups=GROUPS[name], scale=False), norms.sum())
    torch.testing.assert_close(value_of(L1, w, groups=grouping), norms.sum())
    torch.testing.assert_close(F.group_lasso_value(w, grouping), norms.sum())
    v = F.group_lasso_prox(w, 0.4, grouping)
    after = torch.stack([part.norm() for part in members(v, GROUPS[name])])
    torch.testing.assert_close(after, (norms - 0.4).clamp_min(0))


def test_scale_makes_no_difference_to_elements_and_singular_values():
    w = weight()
    for groups in (None, SingularValues()):
        assert value_of(MCP, w, groups=groups, scale=False) == value_of(MCP, w, groups=groups) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*GROUPED, "singular values"])
@pytest.mark.parametrize("scale", [True, False])
def test_prox_is_the_scalar_prox_along_the_ray(kind, name, scale):
    """With the same t: the size of a group stands in front of both terms."""
    w, t = weight(), 0.25
    groups = GROUPS[name]
    v = proxed(KINDS[kind], w, t, groups=groups, scale=scale)
    u, _ = magnitudes(w, groups, scale)
    after, _ = magnitudes(v, groups, scale)
    torch.testing.assert_close(after, proxed(KINDS[kind], u, t), atol=1e-12, rtol=1e-10)
    if name == "singular values":
        for singular in (lambda x: torch.linalg.svd(x)[0][:, :3], lambda x: torch.linalg.svd(x)[2][:3].T):
            a, b = singular(w), singular(v)
            kept = (after > 1e-9)[:3]
            torch.testing.assert_close((a * b).sum(0).abs()[kept], torch.ones(int(kept.sum()), dtype=w.dtype))
    else:
        for before, now in zip(members(w, groups), members(v, groups), strict=True):
            torch.testing.assert_close(now * before.norm(), before * now.norm(), atol=1e-12, rtol=1e-10)
            assert (now == 0).all() or now.norm() > 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("scale", [True, False])
def test_the_radius_that_prox_leaves_is_the_best_on_a_fine_grid(kind, name, scale):
    w, t = 0.5 * weight(), 0.15
    groups = GROUPS[name]
    v = proxed(KINDS[kind], w, t, groups=groups, scale=scale)
    total = 0.5 * (v - w).square().sum() + t * omega(kind, v, groups, scale)
    zero = torch.zeros(1, dtype=w.dtype)
    best = 0.0
    for part in members(w, groups):
        norm, n = part.norm().reshape(1), part.numel() if scale else 1

        def objective(radius, norm=norm, n=n):
            return 0.5 * (radius - norm) ** 2 + t * n * RHO[kind](radius / math.sqrt(n))

        best += torch.minimum(least(objective, zero, norm), objective(zero)).item()
    assert total.item() <= best + 1e-9


@pytest.mark.parametrize("name", [*GROUPED, "singular values"])
def test_known_names_for_known_products(name):
    w = weight()
    groups = GROUPS[name]
    mixed = value_of(SparseGroupLasso, w, l1_ratio=0.25, groups=groups)
    torch.testing.assert_close(mixed, 0.25 * w.abs().sum() + 0.75 * value_of(GroupLasso, w, groups=groups))
    torch.testing.assert_close(F.sparse_group_lasso_value(w, 0.25, groups), mixed)
    assert SparseGroupLasso([w], 1.0, l1_ratio=0.25, groups=groups).l1_ratio == 0.25
    if name == "singular values":
        nuclear = torch.linalg.matrix_norm(w, "nuc")
        torch.testing.assert_close(value_of(NuclearNorm, w), nuclear)
        torch.testing.assert_close(F.nuclear_norm_value(w), nuclear)
        torch.testing.assert_close(F.nuclear_norm_prox(w, 0.3), F.group_lasso_prox(w, 0.3, groups))
        torch.testing.assert_close(F.nuclear_norm_grad(w), F.group_lasso_grad(w, groups))
    else:
        expected = F.group_lasso_prox(F.soft_threshold(w, 0.05), 0.15, groups)
        torch.testing.assert_close(proxed(SparseGroupLasso, w, 0.2, l1_ratio=0.25, groups=groups), expected)
        torch.testing.assert_close(F.sparse_group_lasso_prox(w, 0.2, 0.25, groups), expected)


def test_the_defaults_of_the_known_products():
    model = nn.Linear(4, 3)
    assert SparseGroupLasso(model, 1.0)() == SparseGroupLasso(model, 1.0, l1_ratio=0.5, groups="output")()
    assert GroupLasso(model, 1.0)() == L1(model, 1.0, groups=0)()
    torch.testing.assert_close(SparseGroupLasso(model, 1.0, l1_ratio=1)(), L1(model, 1.0)())
    torch.testing.assert_close(SparseGroupLasso(model, 1.0, l1_ratio=0)(), GroupLasso(model, 1.0)())
    with pytest.raises(ValueError, match="l1_ratio"):
        SparseGroupLasso(model, 1.0, l1_ratio=1.5)
    with pytest.raises(ValueError, match="weights"):
        SparseGroupLasso(model, 1.0, weights={"weight": torch.ones(3)})


# Groups that do not fit


@pytest.mark.parametrize(
    ("groups", "shape", "message"),
    [
        (Blocks(5), (4, 6), "blocks of 5 do not divide the 24 elements"),
        (Heads(5), (4, 6), "5 heads do not divide dimension 0"),
        (Heads(2, dim=2), (4, 6), "dimension 2"),
        (Heads(4, dim=1), (4, 6), "4 heads do not divide dimension 1"),
        (3, (4, 6), "dimension 3"),
        (-3, (4, 6), "dimension -3"),
        ("input", (4,), "dimension 1"),
        (SingularValues(), (4,), "no singular values"),
        ("output", (), "dimension 0"),
    ],
)
def test_a_tensor_that_does_not_divide_into_the_groups_is_refused(groups, shape, message):
    w = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        L1([("layer.weight", w)], 0.1, groups=groups)
    with pytest.raises(ValueError, match=r"layer\.weight"):
        L1([("layer.weight", w)], 0.1, groups=groups)
    with pytest.raises(ValueError, match=message):
        F.group_lasso_value(w, groups)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None, "2"])
def test_a_size_that_is_no_whole_number_is_refused(size):
    with pytest.raises(ValueError, match="whole number"):
        Blocks(size)
    with pytest.raises(ValueError, match="whole number"):
        Heads(size)


def test_what_fits_every_shape():
    for shape in ((), (5,), (2, 3)):
        w = torch.randn(shape)
        torch.testing.assert_close(value_of(GroupLasso, w, groups="tensor"), math.sqrt(w.numel()) * w.norm())
        torch.testing.assert_close(value_of(GroupLasso, w, groups=Blocks(1)), w.abs().sum())
    bias = torch.randn(5)
    torch.testing.assert_close(value_of(GroupLasso, bias), bias.abs().sum())
    torch.testing.assert_close(value_of(GroupLasso, bias, groups=Heads(1)), math.sqrt(5) * bias.norm())


@EACH
def test_empty_tensors(name):
    w = torch.empty(4, 0) if name == "heads of dim 1" else torch.empty(0, 6)
    for make in KINDS.values():
        assert value_of(make, w, groups=GROUPS[name]) == 0
        assert proxed(make, w, 0.1, groups=GROUPS[name]).shape == w.shape


# Dtypes, NaN


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(name, dtype):
    w = torch.randn(48, 96).to(dtype)
    groups = GROUPS[name]
    for make in (L1, KINDS["MCP"]):
        torch.testing.assert_close(value_of(make, w, groups=groups), value_of(make, w.float(), groups=groups))
        expected = proxed(make, w.float(), 0.02, groups=groups).to(dtype)
        assert torch.equal(proxed(make, w, 0.02, groups=groups), expected)
    large = torch.full((48, 96), 3e4).to(dtype)
    expected = value_of(L1, large.double(), groups=groups)
    torch.testing.assert_close(value_of(L1, large, groups=groups).double(), expected, rtol=1e-4, atol=0)


@EACH
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_show_and_raise_nothing(name, kind):
    for bad in (math.nan, math.inf):
        w = nn.Parameter(torch.randn(4, 6))
        with torch.no_grad():
            w[1, 2] = bad
        penalty = KINDS[kind]([w], 0.3, groups=GROUPS[name])
        flat = kind in ("MCP", "SCAD", "L0", "Capped") and bad == math.inf and name != "singular values"
        assert flat or not penalty().isfinite()
        if kind != "L0":
            w.grad = torch.zeros(4, 6)
            penalty.add_grad_()
            # Of a number by itself the sign of NaN is 0; where others depend on it they show it.
            assert name == "elements" or bad == math.inf or not w.grad.isfinite().all()
            penalty.stationarity()
        penalty.prox_(0.1)
        assert not w[1, 2].isfinite()
    w = nn.Parameter(torch.randn(4, 6))
    w.grad = torch.full((4, 6), math.nan)
    assert KINDS[kind]([w], 0.3, groups=GROUPS[name]).stationarity().isnan()


def test_singular_values_that_rounding_makes_of_zeros_count_as_zero():
    for dtype in (torch.float32, torch.float64):
        low_rank = torch.randn(30, 3, dtype=dtype) @ torch.randn(3, 50, dtype=dtype)
        assert (SingularValues().polar(low_rank)[0] > 0).sum() == 3
        assert value_of(L0, low_rank, groups=SingularValues()) == 3
        w = proxed(NuclearNorm, torch.randn(30, 50, dtype=dtype), 6.0)
        assert (SingularValues().polar(w)[0] > 0).sum() == (torch.linalg.svdvals(w) > 1e-3).sum() < 30
    wide = torch.randn(256, 256).bfloat16()  # whose eps times 256 is 1
    torch.testing.assert_close(value_of(NuclearNorm, wide), torch.linalg.svdvals(wide.float()).sum())


def test_elements_are_what_no_groups_are():
    assert resolve(None) == Elements()
    w = weight()
    assert value_of(L1, w, groups=Elements()) == value_of(L1, w) == w.abs().sum()
