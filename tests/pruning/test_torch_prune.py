"""Masks to and from torch.nn.utils.prune."""

import copy

import pytest
import torch
from networks import NETWORKS
from torch import nn
from torch.nn.utils import prune

from wcr_optim.pruning import Masks, apply_, from_torch_prune, magnitude_masks, to_torch_prune


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_there_and_back():
    model = network()
    masks = magnitude_masks(model, 0.7)
    to_torch_prune(model, masks)
    assert prune.is_pruned(model)
    assert from_torch_prune(model) == masks
    assert {"0.weight_orig", "0.weight_mask"} <= model.state_dict().keys()


def test_the_forward_pass_is_that_of_the_pruned_weights():
    model = network().eval()
    masks = magnitude_masks(model, 0.7)
    pruned = copy.deepcopy(model)
    apply_(pruned, masks)
    to_torch_prune(model, masks)
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), pruned(x))
    for name in ("0", "2"):
        prune.remove(model.get_submodule(name), "weight")
    torch.testing.assert_close(model.state_dict(), pruned.state_dict())
    apply_(model, masks)  # the names fit again


def test_masks_of_torchs_own_making():
    model = network()
    prune.random_unstructured(model[0], "weight", 0.3)
    prune.l1_unstructured(model[0], "bias", 2)
    prune.ln_structured(model[2], "weight", 1, n=2, dim=0)
    prune.l1_unstructured(model[0], "weight", 0.5)  # on top of the first one
    masks = from_torch_prune(model)
    assert list(masks) == ["0.weight", "0.bias", "2.weight"]
    assert masks["0.bias"].sum() == 6
    assert torch.equal(masks["0.weight"], model[0].weight_mask.bool())
    assert masks["2.weight"].any(1).sum() == 2
    plain = network()
    apply_(plain, masks)
    assert torch.equal(plain[0].weight == 0, ~masks["0.weight"])


def test_reading_leaves_the_model_alone():
    model = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    keys = list(model.state_dict())
    from_torch_prune(model)
    assert list(model.state_dict()) == keys
    assert prune.is_pruned(model)


def test_shared_weights_are_masked_wherever_they_are_held():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    masks = magnitude_masks(model, 0.5)
    to_torch_prune(model, masks)
    assert model[0].weight_orig is model[1].weight_orig
    assert torch.equal(model[0].weight_mask, model[1].weight_mask)
    assert from_torch_prune(model) == masks
    model[1].weight_mask.fill_(1)
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one shared parameter with two different masks"):
        from_torch_prune(model)


def test_nothing_to_read():
    with pytest.raises(ValueError, match=r"no masks of torch\.nn\.utils\.prune"):
        from_torch_prune(network())


def test_errors_come_before_any_change():
    model = network()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="no such parameter"):
        to_torch_prune(model, Masks({**magnitude_masks(model, 0.5), "3.weight": torch.ones(1) > 0}))
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", list(NETWORKS))
def test_real_networks(name):
    model, inputs = NETWORKS[name]()
    model.eval()
    masks = magnitude_masks(model, 0.8)
    pruned = copy.deepcopy(model)
    apply_(pruned, masks)
    to_torch_prune(model, masks)
    assert from_torch_prune(model) == masks
    with torch.no_grad():
        outputs, expected = model(**inputs), pruned(**inputs)
    if name in ("gpt2", "llama"):
        outputs, expected = outputs.logits, expected.logits
    torch.testing.assert_close(outputs, expected)


def test_weights_tied_by_memory_are_masked_wherever_they_are_held():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data = model[0].weight.data
    masks = magnitude_masks(model, 0.5)
    to_torch_prune(model, masks)
    assert torch.equal(model[0].weight, model[1].weight)
    assert int((model[1].weight == 0).sum()) == 8
    assert from_torch_prune(model) == masks
