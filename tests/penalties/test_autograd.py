"""The gradient of a penalty: of higher order, under torch.func, and where it is frozen."""

import copy

import pytest
import torch
from helpers.kinds import BASIC, OMEGA
from helpers.nets import Regularized, by_definition, detached
from torch import nn
from torch.func import functional_call, stack_module_state

from torch_regpen import L1, GroupLasso

LAM = 0.3
EACH = pytest.mark.parametrize("kind", BASIC)


@pytest.fixture
def x(device):
    return torch.randn(5, 3, dtype=torch.float64, device=device)


# Eager


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_is_that_of_the_definition(kind, dtype, device):
    ws = [torch.randn(4, 3, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    value = BASIC[kind](ws, LAM)()
    expected = LAM * sum(OMEGA[kind](w) for w in ws)
    torch.testing.assert_close(value, expected)
    grads = torch.autograd.grad(3 * value, ws)
    torch.testing.assert_close(grads, torch.autograd.grad(3 * expected, ws))


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck_and_gradgradcheck(kind, dtype):
    ws = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 2), (2,))]
    penalty = BASIC[kind](ws, LAM)
    assert torch.autograd.gradcheck(lambda *_: penalty(), ws, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda *_: penalty(), ws, check_batched_grad=True)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_subgradient_at_zero_is_zero_and_never_nan(kind, dtype, device):
    w = torch.randn(4, 3, dtype=dtype, device=device)
    w[1] = 0
    w[2, 0] = 0
    w.requires_grad_()
    v = torch.zeros(3, 3, dtype=dtype, device=device, requires_grad=True)
    grads = torch.autograd.grad(BASIC[kind]([w, v], LAM)(), [w, v], create_graph=True)
    assert not grads[1].any()
    assert not grads[0][1].any()
    assert not grads[0][2, 0].any()
    assert grads[0][0].all()
    seconds = torch.autograd.grad(sum(g.abs().square().sum() for g in grads), [w, v])
    assert all(second.isfinite().all() for second in seconds)


@EACH
def test_negative_zero_is_zero(kind):
    w = torch.tensor([[-0.0, 0.0]], requires_grad=True)
    BASIC[kind]([w], LAM)().backward()
    assert not w.grad.any()


@EACH
def test_gradient_penalty_style_double_backward(kind):
    """A loss made of the gradient of loss + penalty."""
    module, x = Regularized(kind), torch.randn(5, 3, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    ours = torch.autograd.grad(module(x), list(parameters.values()), create_graph=True)
    theirs = torch.autograd.grad(by_definition(module, parameters, x), list(parameters.values()), create_graph=True)
    second = [
        torch.autograd.grad(sum(g.square().sum() for g in gs), list(parameters.values())) for gs in (ours, theirs)
    ]
    torch.testing.assert_close(second[0], second[1])


@EACH
def test_backward_twice_over_a_retained_graph_and_accumulation(kind):
    w = torch.randn(4, 3, requires_grad=True)
    value = BASIC[kind]([w], LAM)()
    value.backward(retain_graph=True)
    once = w.grad.clone()
    value.backward()
    torch.testing.assert_close(w.grad, 2 * once)


@EACH
def test_changing_a_weight_between_forward_and_backward_is_noticed(kind):
    w = torch.randn(4, 3, requires_grad=True)
    value = BASIC[kind]([w], LAM)()
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_half_types_is_rounded_once_after_the_loss_scale(kind, dtype, device):
    w = torch.randn(4, 8, device=device).to(dtype).requires_grad_()
    scale, lam = 2.0**14, 3e-7  # lambda alone would vanish in float16
    (BASIC[kind]([w], lam)() * scale).backward()
    wide = w.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(lam * scale * OMEGA[kind](wide), wide)
    assert w.grad.dtype == dtype
    torch.testing.assert_close(w.grad, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@EACH
def test_large_and_small_tensors_together(kind, device):
    shapes = [(400, 300)] + [(3, 4)] * 30 + [(300, 250)]
    ws = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    ours = torch.autograd.grad(BASIC[kind](ws, LAM)(), ws)
    theirs = torch.autograd.grad(LAM * sum(OMEGA[kind](w) for w in ws), ws)
    torch.testing.assert_close(ours, theirs)


@EACH
def test_no_graph_without_grad_mode(kind):
    penalty = BASIC[kind](nn.Linear(3, 2), LAM)
    with torch.no_grad():
        assert not penalty().requires_grad
    with torch.inference_mode():
        assert not penalty().requires_grad


@EACH
def test_hooks_see_the_whole_gradient_once(kind, device):
    module = Regularized(kind, device=device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(by_definition(module, parameters, x), list(parameters.values()))
    seen = {}

    def hook_for(name):
        def hook(parameter):
            assert name not in seen
            seen[name] = parameter.grad.clone()
            parameter.grad = None

        return hook

    for name, parameter in parameters.items():
        parameter.register_post_accumulate_grad_hook(hook_for(name))
    module(x).backward()
    torch.testing.assert_close([seen[name] for name in parameters], list(expected))


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_it(kind, dtype, device):
    model = nn.Linear(30, 20, device=device)
    penalty = BASIC[kind](model, LAM)
    expected = penalty()
    (gradient,) = torch.autograd.grad(expected, model.weight)
    with torch.autocast(device.type, dtype=dtype):
        value = penalty()
        value.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.equal(model.weight.grad, gradient)


@EACH
def test_activation_checkpointing(kind):
    module, x = Regularized(kind), torch.randn(5, 3, dtype=torch.float64)
    expected = torch.autograd.grad(module(x), module.first.weight)
    value = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(value, module.first.weight), expected)


# torch.func


@EACH
def test_func_grad_with_detached_parameters(kind, device, x):
    module = Regularized(kind, device=device)
    parameters = detached(module)
    ours = torch.func.grad(lambda ps: functional_call(module, ps, (x,)))(parameters)
    torch.testing.assert_close(ours, torch.func.grad(lambda ps: by_definition(module, ps, x))(parameters))


@EACH
def test_functional_call_takes_the_parameters_that_it_is_given(kind, device, x):
    module = Regularized(kind, device=device)
    others = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    torch.testing.assert_close(functional_call(module, others, (x,)), by_definition(module, others, x))
    torch.testing.assert_close(module(x), by_definition(module, detached(module), x))  # and gives them back


@EACH
def test_vmap_over_an_ensemble(kind, device, x):
    models = [Regularized(kind, device=device) for _ in range(3)]
    stacked, _ = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    ours = torch.vmap(lambda ps: functional_call(base, ps, (x,)))(stacked)
    torch.testing.assert_close(ours, torch.stack([model(x) for model in models]))
    gradients = torch.vmap(torch.func.grad(lambda ps: functional_call(base, ps, (x,))))(
        {name: p.detach() for name, p in stacked.items()}
    )
    for i, model in enumerate(models):
        expected = torch.autograd.grad(model(x), list(model.parameters()))
        for name, gradient in zip(dict(model.named_parameters()), expected, strict=True):
            torch.testing.assert_close(gradients[name][i], gradient)


@EACH
def test_per_sample_gradients(kind, device, x):
    module = Regularized(kind, device=device)
    parameters = detached(module)
    ours = torch.vmap(torch.func.grad(lambda ps, row: functional_call(module, ps, (row,))), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = torch.func.grad(lambda ps, row=row: by_definition(module, ps, row))(parameters)
        torch.testing.assert_close({name: g[i] for name, g in ours.items()}, expected)


@EACH
def test_jvp_and_hessian(kind, device, x):
    module = Regularized(kind, device=device)
    parameters = detached(module)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def ours(ps):
        return functional_call(module, ps, (x,))

    def theirs(ps):
        return by_definition(module, ps, x)

    for function in (torch.func.jvp, lambda f, *args: torch.func.jvp(torch.func.grad(f), *args)):
        torch.testing.assert_close(
            function(ours, (parameters,), (tangents,)), function(theirs, (parameters,), (tangents,))
        )
    torch.testing.assert_close(torch.func.hessian(ours)(parameters), torch.func.hessian(theirs)(parameters))


@EACH
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float16, torch.bfloat16])
def test_jvp_in_other_dtypes(kind, dtype):
    layer = nn.Linear(3, 4, bias=False, dtype=dtype)
    layer.penalty = BASIC[kind](layer, LAM)
    layer.forward = lambda: layer.penalty()
    w = layer.weight.detach()
    tangent = torch.randn_like(w)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    ours = torch.func.jvp(lambda w: functional_call(layer, {"weight": w}, ()), (w,), (tangent,))
    theirs = torch.func.jvp(lambda w: LAM * OMEGA[kind](w), (w.to(wide),), (tangent.to(wide),))
    torch.testing.assert_close([out.double() for out in ours], [out.double() for out in theirs], rtol=1e-5, atol=1e-6)


@EACH
def test_hessian_at_zero_is_finite(kind):
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    layer.penalty = BASIC[kind](layer, LAM)
    layer.forward = lambda: layer.penalty()
    w = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert torch.func.hessian(lambda w: functional_call(layer, {"weight": w}, ()))(w).isfinite().all()


@pytest.mark.parametrize("frozen_when", ["before construction", "after construction", "after a use"])
@pytest.mark.parametrize("copied", [False, True])
def test_what_is_frozen_is_judged_on_the_registered_parameter(frozen_when, copied, x, device):
    """Detached parameters in its place neither switch the penalty off nor a frozen parameter on."""
    module = Regularized("L1", device=device)
    if frozen_when == "before construction":
        module.first.weight.requires_grad_(False)
        module.penalty = L1(module, LAM)
    if frozen_when == "after a use":
        module(x)
    module.first.weight.requires_grad_(False)
    if copied:
        module = copy.deepcopy(module)
    parameters = detached(module)
    expected = by_definition(module, parameters, x, frozen=("first.weight",))
    torch.testing.assert_close(functional_call(module, parameters, (x,)), expected)
    gradients = torch.func.grad(lambda ps: functional_call(module, ps, (x,)))(parameters)
    plain = torch.func.grad(lambda ps: by_definition(module, ps, x, frozen=("first.weight",)))(parameters)
    torch.testing.assert_close(gradients, plain)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    torch.testing.assert_close(torch.vmap(lambda ps: functional_call(module, ps, (x,)))(stacked)[0], expected)
    module.first.weight.requires_grad_(True)
    torch.testing.assert_close(functional_call(module, parameters, (x,)), by_definition(module, parameters, x))


def test_a_frozen_parameter_stays_out_where_the_registered_one_is_gone(x, device):
    module = Regularized("L1", device=device)
    module.first.weight.requires_grad_(False)
    module(x)
    parameters = detached(module)
    expected = by_definition(module, parameters, x, frozen=("first.weight",))
    functional = functional_call(module.to("meta"), parameters, (x,))
    torch.testing.assert_close(functional, expected)


def test_a_frozen_parameter_stays_out_of_an_ensemble_whose_base_is_on_meta(x, device):
    models = [Regularized("L1", device=device) for _ in range(2)]
    for model in models:
        model.first.weight.requires_grad_(False)
    stacked, _ = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    ours = torch.vmap(lambda ps: functional_call(base, ps, (x,)))(stacked)
    torch.testing.assert_close(ours, torch.stack([model(x) for model in models]))


def test_tensors_of_a_transform_can_be_penalized_as_such():
    w = torch.randn(3, 2, dtype=torch.float64)
    ours = torch.func.grad(lambda w: GroupLasso([w], LAM)())(w)
    torch.testing.assert_close(ours, torch.func.grad(lambda w: LAM * OMEGA["GroupLasso"](w))(w))
