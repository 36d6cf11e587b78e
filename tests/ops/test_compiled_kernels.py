"""`compile=True` and `penalty.compile()`: the results of eager operations, to rounding, from kernels of torch.compile.

Most tests compile with the backend "aot_eager", which takes no C++ compiler and little time; some with Inductor.
"""

import warnings
from functools import partial

import pytest
import torch
from helpers.kinds import KINDS
from torch import nn, optim

from torch_regpen import L1, L2, GroupLasso, RegularizedOptimizer
from torch_regpen.ops import compiled, compiled_groups, kernels

PENALTIES = {**KINDS, "GroupLasso": GroupLasso, "L0 over groups": partial(KINDS["L0"], groups="output")}
MODES = ["coupled", "decoupled", "proximal", "dual"]
OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.1),
    "Adam": partial(optim.Adam, lr=0.01),
    "AdamW": partial(optim.AdamW, lr=0.01, fused=True),
}
SHAPE = (12, 30)


@pytest.fixture(autouse=True)
def _works(monkeypatch):
    monkeypatch.setattr(compiled, "_failed", False)


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that were called; they are compiled by "aot_eager"."""
    names, functions = [], {}

    def compile_one(kernel):
        if kernel not in functions:
            functions[kernel] = torch.compile(kernel, dynamic=True, backend="aot_eager")
        return lambda *args: names.append(kernel.__name__) or functions[kernel](*args)

    monkeypatch.setattr(compiled, "_compiled", compile_one)
    return names


def trained(make_penalty, mode, make_optimizer, compile, *, dtype=torch.float32, device="cpu", shape=SHAPE, steps=4):
    """Weights and gaps after some steps on random gradients, of which some elements never have any."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape, device=device).to(dtype))
    unseen = torch.rand(shape, device=device) < 0.1
    optimizer = RegularizedOptimizer(make_optimizer([w]), make_penalty([w], 0.02), mode, compile=compile)
    for _ in range(steps):
        w.grad = torch.randn(shape, device=device).masked_fill(unseen, 0).to(dtype)
        optimizer.step()
    return w.detach(), optimizer.state[w].get("gap", torch.zeros(()))


def assert_same(results, expected, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1e-2)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=tolerance, atol=tolerance)
        assert torch.equal(result == 0, other == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", PENALTIES)
def test_steps_are_those_of_the_eager_mode(kind, mode, optimizer, dtype, calls):
    run = partial(trained, PENALTIES[kind], mode, OPTIMIZERS[optimizer], dtype=dtype)
    try:
        expected = run(compile=False)
    except ValueError:
        pytest.skip("not a step of this kind in this mode and metric")
    assert_same(run(compile=True), expected, dtype)


@pytest.mark.parametrize(
    ("kind", "mode", "optimizer", "kernel"),
    [
        ("L1", "coupled", "Adam", kernels.add_gradient_),
        ("L1", "proximal", "Adam", kernels.soft_threshold_each_),
        ("L1", "dual", "SGD", kernels.threshold_latent_),
        ("L1", "dual", "Adam", kernels.threshold_latent_each_),
        ("GroupLasso", "proximal", "Adam", kernels.shrink_),
        ("GroupLasso", "dual", "SGD", kernels.scale_latent_),
        ("L0 over groups", "dual", "SGD", kernels.scale_latent_),
        ("GroupLasso", "dual", "Adam", kernels.shrink_latent_),
    ],
)
def test_the_kernel_is_called(kind, mode, optimizer, kernel, calls):
    trained(PENALTIES[kind], mode, OPTIMIZERS[optimizer], True)
    assert kernel.__name__ in calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("lr", [0.01, 0.0])
def test_one_kernel_for_all_newton_steps_has_the_same_results(mode, dtype, lr, calls, monkeypatch):
    """As on CUDA, here on a CPU."""
    monkeypatch.setattr(compiled_groups, "_one_kernel_is_faster", lambda x: True)
    run = partial(trained, PENALTIES["GroupLasso"], mode, partial(optim.Adam, lr=lr), dtype=dtype)
    assert_same(run(compile=True), run(compile=False), dtype)
    assert "shrink_all_" in calls or "average_all_" in calls


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("kind", ["L1", "GroupLasso"])
def test_inductor_has_the_results_of_the_eager_mode(kind, mode, device):
    run = partial(trained, PENALTIES[kind], mode, OPTIMIZERS["Adam"], device=device)
    assert_same(run(compile=True), run(compile=False), torch.float32)
    assert not compiled._failed


@pytest.mark.parametrize("kind", ["L1", "ElasticNet", "GroupLasso"])
def test_a_compiled_penalty_has_the_value_and_gradient(kind, calls):
    w = nn.Parameter(torch.randn(SHAPE))
    penalty = PENALTIES[kind]([w], 0.3)
    (expected,) = torch.autograd.grad(penalty(), [w])
    value = penalty()
    penalty.compile()
    torch.testing.assert_close(penalty(), value)
    torch.testing.assert_close(torch.autograd.grad(penalty(), [w])[0], expected)
    assert ("gradient" in calls) == (kind != "GroupLasso")


def test_a_compiled_value_is_as_exact_as_the_eager_one():
    w = 0.02 * torch.randn(1 << 22)
    penalty = L1([w], 1.0, select="all")
    penalty.compile()
    exact = w.double().abs().sum()
    assert abs(penalty().double() / exact - 1) < 1e-6


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("kind", ["L1", "GroupLasso"])
def test_a_learning_rate_of_0_changes_nothing(kind, mode, calls):
    w = nn.Parameter(torch.randn(SHAPE))
    before = w.detach().clone()
    optimizer = RegularizedOptimizer(optim.Adam([w], lr=0.0), PENALTIES[kind]([w], 0.1), mode, compile=True)
    for _ in range(2):
        w.grad = torch.randn(SHAPE)
        w.grad[:, 0] = 0
        optimizer.step()
    assert calls
    torch.testing.assert_close(w.detach(), before)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("kind", ["L1", "GroupLasso"])
def test_nan_and_infinity_stay_visible(kind, mode):
    w = nn.Parameter(torch.randn(SHAPE))
    optimizer = RegularizedOptimizer(optim.Adam([w], lr=0.01), PENALTIES[kind]([w], 0.1), mode, compile=True)
    w.grad = torch.randn(SHAPE)
    with torch.no_grad():
        w[0, 0], w[1, 1] = torch.nan, torch.inf
    optimizer.step()
    assert w[0, 0].isnan()
    assert not w[1, 1].isfinite()
    assert w[2:].isfinite().all()


def test_infinite_weights_have_the_value_and_gradient_of_the_eager_mode(calls):
    w = nn.Parameter(torch.randn(SHAPE))
    with torch.no_grad():
        w[0, 0], w[1, 1] = torch.inf, -torch.inf
    results = []
    for compile in (False, True):
        penalty = L1([w], 0.3)
        if compile:
            penalty.compile()
        w.grad = torch.zeros(SHAPE)
        penalty.add_grad_()
        value = penalty()
        results.append([value.detach(), torch.autograd.grad(value, [w])[0], w.grad])
    assert_same(*results, torch.float32)
    assert {"total", "gradient", "add_gradient_"} <= set(calls)


@pytest.mark.parametrize("mode", ["proximal", "dual"])
@pytest.mark.parametrize("kind", ["L1", "GroupLasso"])
def test_other_lambdas_shapes_and_models_compile_nothing_anew(kind, mode, calls):
    counters = torch._dynamo.utils.counters["stats"]
    torch.manual_seed(0)
    before = None
    for shape, lam in (((12, 30), 0.1), ((7, 11, 3), 0.2), ((4, 6, 3, 3), 0.3), ((5, 50), 0.4)):
        w = nn.Parameter(torch.randn(shape))
        penalty = PENALTIES[kind]([w], lam)
        optimizer = RegularizedOptimizer(optim.Adam([w], lr=lam), penalty, mode, compile=True)
        for factor in (1, 200):  # so that every kernel is called on the first model
            penalty.lam = lam * factor
            w.grad = torch.randn(shape)
            optimizer.step()
        before = counters["unique_graphs"] if before is None else before
    assert counters["unique_graphs"] == before


def test_channels_last_weights_are_taken_as_they_lie(calls):
    run = partial(channels_last, "proximal")
    assert_same(run(compile=True), run(compile=False), torch.float32)
    assert "soft_threshold_each_" in calls


def channels_last(mode, compile):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = RegularizedOptimizer(optim.Adam([w], lr=0.01), L1([w], 0.02), mode, compile=compile)
    for _ in range(3):
        w.grad = torch.randn(8, 4, 3, 3)
        optimizer.step()
    return [w.detach()]


def test_without_a_compiler_one_warning_and_the_eager_results(monkeypatch):
    def no_compiler(kernel):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(compiled, "_compiled", no_compiler)
    run = partial(trained, L1, "proximal", OPTIMIZERS["Adam"])
    with pytest.warns(UserWarning, match="No working C\\+\\+ compiler found") as caught:
        results = run(compile=True)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results, run(compile=True), torch.float32)
    assert_same(results, run(compile=False), torch.float32)


def test_it_goes_together_with_a_compiled_step():
    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(SHAPE))
        optimizer = RegularizedOptimizer(optim.AdamW([w], lr=0.01), L1([w], 0.1), "proximal", compile=compile)
        step = torch.compile(optimizer.step, backend="aot_eager")
        for _ in range(3):
            w.grad = torch.randn(SHAPE)
            step()
        results.append([w.detach()])
    assert_same(*results, torch.float32)


def test_a_sum_and_a_model_with_two_groups_are_compiled_too(calls):
    model = nn.Sequential(nn.Linear(30, 12), nn.Linear(12, 12))
    penalty = L1(model, 0.1) + L2(model, 0.2)
    value = penalty()
    penalty.compile()
    torch.testing.assert_close(penalty(), value)


@pytest.mark.parametrize("kind", ["L1", "GroupLasso"])
def test_autograd_notices_weights_that_a_kernel_changed(kind, calls):
    w = nn.Parameter(torch.randn(SHAPE))
    optimizer = RegularizedOptimizer(OPTIMIZERS["Adam"]([w]), PENALTIES[kind]([w], 0.1), "proximal", compile=True)
    w.grad = torch.randn(SHAPE)
    optimizer.step()
    loss, version = w.square().sum(), w._version
    optimizer.zeroing_penalty.terms()  # reading changes nothing
    assert w._version == version
    optimizer.step()
    assert w._version >= version + 2  # by the update and by the prox
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sums_and_restrictions_of_compiled_penalties_are_compiled(calls):
    model = nn.Linear(30, 12)
    plain = optim.SGD(model.parameters(), lr=0.1)

    def parts():
        return L1(model, 0.1), L2(model, 0.2)

    whole, (one, other) = L1(model, 0.1) + L2(model, 0.2), parts()
    whole.compile()
    one.compile()
    made = [whole, 0.5 * whole, whole.restricted_to(plain), whole + L2(model, 0.3), one + other, sum(parts(), one)]
    for i, penalty in enumerate(made):
        calls.clear()
        value = penalty()
        assert calls == ["total"], i
        expected = 0.0
        for part in penalty.parts:
            factor = model.weight.abs().sum() if type(part) is L1 else model.weight.square().sum()
            expected = expected + part.lam * factor
        torch.testing.assert_close(value, expected)


def test_a_compiled_penalty_is_compiled_in_an_optimizer_too(calls):
    w = nn.Parameter(torch.randn(SHAPE))
    penalty = L1([w], 0.1)
    penalty.compile()
    optimizer = RegularizedOptimizer(optim.Adam([w], lr=0.01), penalty, "proximal")
    w.grad = torch.randn(SHAPE)
    optimizer.step()
    assert calls == ["soft_threshold_each_"]


def test_the_default_device_makes_no_difference(calls):
    w = nn.Parameter(torch.randn(SHAPE))
    penalty = L1([w], 0.1)
    penalty.compile()
    try:
        torch.set_default_device("meta")
        value = penalty()
    finally:
        torch.set_default_device(None)
    assert calls
    torch.testing.assert_close(value, 0.1 * w.abs().sum())


def test_running_out_of_memory_is_no_failure_to_compile(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled, "_compiled", lambda kernel: out_of_memory)
    penalty = L1([nn.Parameter(torch.randn(SHAPE))], 0.1)
    penalty.compile()
    with pytest.raises(torch.OutOfMemoryError):
        penalty()
    assert not compiled._failed
