"""The penalty reaches the weights that are in use, or says that it does not."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils import parametrizations

from torch_regpen import L1, L2, ElasticNet, GroupLasso, Penalty, RegularizedOptimizer
from torch_regpen.export import dead_units


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(x))


def l1(*tensors):
    return sum(tensor.detach().abs().sum() for tensor in tensors)


def names(penalty):
    return [name for name, _ in penalty.named_parameters_penalized()]


# Layers that come and go


def test_a_layer_that_is_replaced_is_penalized_in_its_stead():
    model = Net()
    penalty = L1(model, 1.0)
    penalty()
    model.fc = nn.Linear(8, 2)
    torch.testing.assert_close(penalty().detach(), l1(model.body[0].weight, model.fc.weight))
    penalty().backward()
    assert model.fc.weight.grad is not None


def test_a_layer_that_is_added_is_judged_as_the_others_were():
    model = Net()
    default, heads = L1(model, 1.0), L1(model, 1.0, select="fc*")
    model.body.append(nn.Linear(8, 8))
    model.fc2 = nn.Linear(3, 3)
    assert names(default) == ["body.0.weight", "body.2.weight", "fc.weight", "fc2.weight"]
    assert names(heads) == ["fc.weight", "fc.bias", "fc2.weight", "fc2.bias"]


def test_a_layer_that_is_taken_away_is_penalized_no_more():
    model = Net()
    penalty = L1(model, 1.0)
    model.fc = nn.Identity()
    assert names(penalty) == ["body.0.weight"]
    model.body = nn.Identity()
    with pytest.raises(ValueError, match="none of the penalized parameters is left"):
        penalty()


def test_an_optimizer_that_does_not_own_an_added_layer_says_so():
    model = Net()
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), L1(model, 0.1), "proximal")
    model.extra = nn.Linear(3, 3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=r"does not own.*extra\.weight"):
        optimizer.step()
    optimizer.add_param_group({"params": model.extra.parameters()})
    before = model.extra.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.extra.weight.detach(), before - before.clamp(-0.01, 0.01))


def test_adapters_that_wrap_layers_are_penalized_where_they_train():
    """As peft does: the layer is replaced by one that holds it, frozen, and two small ones beside it."""
    model = Net()
    penalty = L1(model, 1.0)
    adapted = nn.ModuleDict({"base_layer": model.fc, "lora_A": nn.Linear(8, 2), "lora_B": nn.Linear(2, 3)})
    model.requires_grad_(False)
    model.fc = adapted
    assert names(penalty) == ["fc.lora_A.weight", "fc.lora_B.weight"]
    torch.testing.assert_close(penalty().detach(), l1(adapted["lora_A"].weight, adapted["lora_B"].weight))


def test_weights_go_by_the_name_of_a_replaced_layer_and_must_fit_it():
    model = Net()
    penalty = L1(model, 1.0, weights={"fc.weight": torch.full((3, 8), 2.0)})
    model.fc = nn.Linear(8, 3)
    torch.testing.assert_close(penalty().detach(), l1(model.body[0].weight) + 2 * l1(model.fc.weight))
    model.fc = nn.Linear(8, 2)
    with pytest.raises(ValueError, match="build the penalty anew"):
        penalty()


def test_the_center_of_a_replaced_layer_is_gone():
    model = Net()
    penalty = L2(model, 1.0, center="initial")
    model.fc = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="build the penalty anew"):
        penalty()


def test_a_restricted_penalty_takes_added_layers_of_its_optimizer_only():
    model = Net()
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    penalty = L1(model, 1.0).restricted_to(optimizer)
    model.other, model.mine = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer.add_param_group({"params": model.mine.parameters()})
    assert names(penalty) == ["fc.weight", "mine.weight"]


def test_a_changed_attribute_of_a_kind_holds_for_all_parameters():
    ws = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    penalty = ElasticNet(ws, 1.0, l1_ratio=0, groups="output")
    penalty()
    penalty.l1_ratio = 0.5
    expected = ElasticNet(ws, 1.0, l1_ratio=0.5, groups="output")
    for w in ws:
        w.grad = torch.zeros_like(w)
    penalty.add_grad_()
    torch.testing.assert_close([w.grad for w in ws], list(torch.autograd.grad(expected(), ws)))


def test_a_pickled_choice_by_a_lambda_goes_on_until_it_is_asked():
    model = Net()
    penalty = L1(model, 1.0, select=lambda name, p: name == "fc.weight")
    copied, of_copy = pickle.loads(pickle.dumps((model, penalty)))
    torch.testing.assert_close(of_copy(), penalty())
    assert names(copy.deepcopy(penalty)) == ["fc.weight"]
    copied.more = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"more\.weight.*build the penalty anew"):
        of_copy()


# Frozen models


def test_a_frozen_copy_has_a_prox_a_summary_and_no_penalty():
    model = Net()
    model.penalty = L1(model, 1.0)
    average = copy.deepcopy(model).requires_grad_(False)
    assert average.penalty() == 0
    assert "fc.weight" in average.penalty.summary()
    average.penalty.prox_(0.1)
    for p, q in ((average.fc.weight, model.fc.weight), (average.body[0].weight, model.body[0].weight)):
        torch.testing.assert_close(p, (q - q.clamp(-0.1, 0.1)).detach())
        assert (p == 0).any()


def test_a_frozen_layer_beside_others_is_left_alone_by_the_prox():
    model = Net()
    model.body.requires_grad_(False)
    before = model.body[0].weight.clone()
    L1(model, 1.0).prox_(0.1)
    assert torch.equal(model.body[0].weight, before)
    assert (model.fc.weight == 0).any()


# torch.func


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.penalty = L1(self.net, 0.5)

    def forward(self, x):
        return self.net(x).square().mean() + self.penalty()


def test_a_penalty_outside_of_what_is_differentiated_is_refused():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    penalty = L1(model, 0.5)
    params = dict(model.named_parameters())

    def loss(params):
        return functional_call(model, params, (x,)).square().mean() + penalty()

    for transform in (grad(loss), hessian(loss), lambda p: jvp(loss, (p,), (p,))):
        with pytest.raises(RuntimeError, match="part of the module"):
            transform(params)
    with pytest.raises(RuntimeError, match="part of the module"):
        vmap(grad(loss))({name: p.detach().expand(2, *p.shape) for name, p in params.items()})


def test_inside_of_the_module_that_is_called_it_is_differentiated():
    model, x = Loss(), torch.randn(5, 4)
    params = dict(model.named_parameters())
    found = grad(lambda params: functional_call(model, params, (x,)))(params)["net.weight"]
    model(x).backward()
    torch.testing.assert_close(found, model.net.weight.grad)
    assert vmap(lambda x: functional_call(model, params, (x,)))(x[:, None]).shape == (5,)  # nothing is differentiated


# As a part of a model


def test_in_a_sequential_it_hands_its_input_on():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(2, 4)
    expected = model(x)
    model.penalty = L1(model, 0.5)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.penalty().detach(), 0.5 * l1(model[0].weight))


def test_scripting_is_refused_with_a_way_out():
    model = Net()
    scripted = torch.jit.script(model)
    with pytest.raises(TypeError, match="the module that was scripted"):
        L1(scripted, 0.1)
    penalty = L1(model, 1.0)
    penalty.prox_(0.1)  # the two share their parameters
    assert torch.equal(scripted.fc.weight, model.fc.weight)
    model.penalty = penalty
    with pytest.raises(TypeError, match="take the penalty out"):
        torch.jit.script(model)


def test_a_model_is_freed_with_its_penalty_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        model = Net()
        penalty = L1(model, 0.1) + GroupLasso(model, 0.1)
        penalty().backward()
        penalty.prox_(0.1)
        gone = weakref.ref(model)
        del model, penalty
        assert gone() is None
    finally:
        gc.enable()


# Centers


def test_a_center_that_is_not_the_one_that_was_saved_is_refused():
    model = Net()
    penalty = L2(model, 1.0, center="initial")
    begun = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.fc.weight += 1
    value = penalty().item()
    saved, trained = penalty.state_dict(), model.state_dict()

    resumed = Net()
    resumed.load_state_dict(trained)
    with pytest.raises(ValueError, match="another center"):
        L2(resumed, 1.0, center="initial").load_state_dict(saved)
    again = L2(resumed, 0.1, center=begun)
    again.load_state_dict(saved)
    assert again().item() == pytest.approx(value)


def test_the_summary_counts_what_is_at_its_center():
    layer = nn.Linear(4, 2)
    penalty = L1(layer, 1.0, center="initial")
    with torch.no_grad():
        layer.weight[0] += 1
    assert "4/8" in penalty.summary()
    groups = GroupLasso(layer, 1.0, center={"weight": layer.weight.detach()})
    assert "8/8" in groups.summary()
    assert "2/2" in groups.summary()


# Weights under weight_norm


@pytest.mark.parametrize("dim", [0, 1, None])
def test_a_weight_under_weight_norm_becomes_zero_and_not_nan(dim):
    layer = parametrizations.weight_norm(nn.Linear(3, 2, bias=False), dim=dim)
    GroupLasso(layer, 10.0, groups="tensor").prox_(1.0)
    assert torch.equal(layer.weight, torch.zeros(2, 3))
    layer(torch.ones(1, 3)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("mode", ["decoupled", "proximal", "dual"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_training_under_weight_norm_shrinks_units_away_without_nan(mode, make):
    x = torch.randn(64, 5)
    y = x[:, :1] @ torch.ones(1, 3)
    layer = parametrizations.weight_norm(nn.Linear(5, 3))
    optimizer = RegularizedOptimizer(make(layer.parameters(), lr=0.05), GroupLasso(layer, 0.5), mode)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    assert layer.weight.isfinite().all()
    dead = dead_units(layer).get("parametrizations.weight.original1", [])
    assert dead == (layer.weight == 0).all(1).nonzero().flatten().tolist()
    assert dead or mode == "decoupled"


def test_a_frozen_zero_under_weight_norm_stays_zero():
    x = torch.randn(64, 5)
    layer = parametrizations.weight_norm(nn.Linear(5, 3))
    optimizer = RegularizedOptimizer(torch.optim.Adam(layer.parameters(), lr=0.05), GroupLasso(layer, 0.5), "proximal")
    for step in range(300):
        optimizer.zero_grad()
        (layer(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
        if step == 150:
            optimizer.freeze_zeros()
            dead = (layer.weight == 0).all(1)
    assert dead.any()
    assert torch.equal((layer.weight == 0).all(1), dead)


# Lambda


def test_a_bad_lambda_is_refused_however_it_is_set():
    penalty = L1(Net(), 0.1)
    group = penalty.param_groups[0]
    for update in (
        lambda: group.update(lam=-1),
        lambda: group.update({"lam": float("nan")}),
        lambda: group.__ior__({"lam": -1}),
    ):
        with pytest.raises(ValueError, match="0 or more"):
            update()
    for lam in (1e300, 4e38):
        with pytest.raises(ValueError, match="finite in float32"):
            penalty.lam = lam
    assert penalty.lam == 0.1


def test_a_number_times_a_penalty_is_the_same_with_lambda_scaled():
    model = Net()
    for penalty in (L1(model, 0.2), L1(model, 0.2) + L2(model, 0.4)):
        for scaled in (0.5 * penalty, penalty * 0.5):
            assert isinstance(scaled, Penalty)
            torch.testing.assert_close(scaled(), 0.5 * penalty())
    penalty = L1(model, 0.2)
    scaled = 0.5 * penalty
    penalty.lam = 3.0
    assert scaled.lam == 0.1
    with pytest.raises(TypeError):
        penalty * "2"
    with pytest.raises(ValueError, match="0 or more"):
        -1.0 * penalty


def test_positive_without_a_prox_is_refused():
    w = nn.Parameter(torch.randn(3, 2))
    penalty = L1([w], 0.1, positive=True)
    for mode in ("coupled", "decoupled"):
        with pytest.raises(ValueError, match=r"positive=True.*proximal"):
            RegularizedOptimizer(torch.optim.SGD([w], lr=0.1), penalty, mode)
    with pytest.raises(ValueError, match="positive=True"):
        penalty().backward()
    w.grad = torch.zeros_like(w)
    with pytest.raises(ValueError, match="positive=True"):
        penalty.add_grad_()
    penalty.prox_(0.1)
    assert (w >= 0).all()


# Zeros, by name and in all


def test_sparsity_and_totals_count_each_element_once():
    model = Net()
    with torch.no_grad():
        model.fc.weight[0] = 0
        model.body[0].weight[:, 1] = 0
    penalty = L1(model, 0.1) + GroupLasso(model, 0.1)
    zeros, elements = 8 + 8, 24 + 32
    assert penalty.sparsity().item() == pytest.approx(zeros / elements)
    total = penalty.summary().splitlines()[-1].split()
    assert total[0] == "total"
    assert total[2:] == [f"{zeros}/{elements}", "1/11"]
    assert float(total[1]) == pytest.approx(penalty().item(), rel=1e-4)
    with torch.device("meta"):
        assert L1(Net(), 0.1).sparsity().is_meta  # nothing is read back


def test_sparsity_does_not_depend_on_the_default_dtype():
    layer = nn.Linear(400, 300)
    with torch.no_grad():
        layer.weight[150:] = 0
    torch.set_default_dtype(torch.float16)
    try:
        assert L1(layer, 0.1).sparsity() == 0.5
        assert L1(layer, 0.1).stationarity().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_zero_groups_are_named_by_what_the_penalty_groups():
    model = Net()
    with torch.no_grad():
        model.body[0].weight[:, 1] = 0
        model.fc.weight[2] = 1e-30  # its square is 0
        model.fc.weight[1] = 0
    assert GroupLasso(model, 0.1).zero_groups() == {"body.0.weight": [], "fc.weight": [1]}
    assert GroupLasso(model, 0.1, groups="input").zero_groups() == {"body.0.weight": [1], "fc.weight": []}
    assert L1(model, 0.1).zero_groups() == {}
    assert "1/3" in GroupLasso(model.fc, 0.1).summary()
