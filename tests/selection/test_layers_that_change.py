"""Layers that are replaced, added, taken away or frozen."""

import copy
import pickle

import pytest
import torch
from helpers.kinds import l1
from helpers.nets import Classifier, names
from torch import nn
from torch.nn.utils import prune

from torch_regpen import L1, L2, ElasticNet, RegularizedOptimizer

# Layers that come and go


def test_a_layer_that_is_replaced_is_penalized_in_its_stead():
    model = Classifier()
    penalty = L1(model, 1.0)
    penalty()
    model.fc = nn.Linear(8, 2)
    torch.testing.assert_close(penalty().detach(), l1(model.body[0].weight, model.fc.weight))
    penalty().backward()
    assert model.fc.weight.grad is not None


def test_a_layer_that_is_added_is_judged_as_the_others_were():
    model = Classifier()
    default, heads = L1(model, 1.0), L1(model, 1.0, select="fc*")
    model.body.append(nn.Linear(8, 8))
    model.fc2 = nn.Linear(3, 3)
    assert names(default) == ["body.0.weight", "body.2.weight", "fc.weight", "fc2.weight"]
    assert names(heads) == ["fc.weight", "fc.bias", "fc2.weight", "fc2.bias"]


def test_a_layer_that_is_taken_away_is_penalized_no_more():
    model = Classifier()
    penalty = L1(model, 1.0)
    model.fc = nn.Identity()
    assert names(penalty) == ["body.0.weight"]
    model.body = nn.Identity()
    with pytest.raises(ValueError, match="has none of the penalized parameters any more"):
        penalty()


def test_an_optimizer_that_does_not_own_an_added_layer_says_so():
    model = Classifier()
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
    model = Classifier()
    penalty = L1(model, 1.0)
    adapted = nn.ModuleDict({"base_layer": model.fc, "lora_A": nn.Linear(8, 2), "lora_B": nn.Linear(2, 3)})
    model.requires_grad_(False)
    model.fc = adapted
    assert names(penalty) == ["fc.lora_A.weight", "fc.lora_B.weight"]
    torch.testing.assert_close(penalty().detach(), l1(adapted["lora_A"].weight, adapted["lora_B"].weight))


def test_weights_go_by_the_name_of_a_replaced_layer_and_must_fit_it():
    model = Classifier()
    penalty = L1(model, 1.0, weights={"fc.weight": torch.full((3, 8), 2.0)})
    model.fc = nn.Linear(8, 3)
    torch.testing.assert_close(penalty().detach(), l1(model.body[0].weight) + 2 * l1(model.fc.weight))
    model.fc = nn.Linear(8, 2)
    with pytest.raises(ValueError, match="build a new penalty"):
        penalty()


def test_the_center_of_a_replaced_layer_is_gone():
    model = Classifier()
    penalty = L2(model, 1.0, center="initial")
    model.fc = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="build a new penalty"):
        penalty()


def test_a_restricted_penalty_takes_added_layers_of_its_optimizer_only():
    model = Classifier()
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
    model = Classifier()
    penalty = L1(model, 1.0, select=lambda name, p: name == "fc.weight")
    copied, of_copy = pickle.loads(pickle.dumps((model, penalty)))
    torch.testing.assert_close(of_copy(), penalty())
    assert names(copy.deepcopy(penalty)) == ["fc.weight"]
    copied.more = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"more\.weight.*build a new penalty"):
        of_copy()


# Frozen models


def test_a_frozen_copy_has_a_prox_a_summary_and_no_penalty():
    model = Classifier()
    model.penalty = L1(model, 1.0)
    average = copy.deepcopy(model).requires_grad_(False)
    assert average.penalty() == 0
    assert "fc.weight" in average.penalty.summary()
    average.penalty.prox_(0.1)
    for p, q in ((average.fc.weight, model.fc.weight), (average.body[0].weight, model.body[0].weight)):
        torch.testing.assert_close(p, (q - q.clamp(-0.1, 0.1)).detach())
        assert (p == 0).any()


def test_a_frozen_layer_beside_others_is_left_alone_by_the_prox():
    model = Classifier()
    model.body.requires_grad_(False)
    before = model.body[0].weight.clone()
    L1(model, 1.0).prox_(0.1)
    assert torch.equal(model.body[0].weight, before)
    assert (model.fc.weight == 0).any()


@pytest.mark.parametrize("late", [False, True])
def test_a_layer_pruned_or_restored_in_training_keeps_its_penalty(late):
    model = Classifier()
    if late:  # the penalty is built on the pruned model
        prune.l1_unstructured(model.fc, "weight", 0.5)
    penalty = L1(model, 0.1, select="fc.weight*")
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), penalty, "proximal")
    penalty()
    for change in (prune.remove, prune.random_unstructured, prune.remove) if late else (prune.random_unstructured,):
        change(model.fc, "weight", **({"amount": 0.5} if change is prune.random_unstructured else {}))
        weight = dict(model.fc.named_parameters()).get("weight_orig", model.fc.weight)
        before = weight.detach().clone()
        torch.testing.assert_close(penalty().detach(), 0.1 * before.abs().sum())
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), nn.functional.softshrink(before, 0.1))
        model.body.append(nn.ReLU())  # all layers are looked up again
        assert len(names(penalty)) == 1
