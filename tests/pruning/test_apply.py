"""Masks on a model: exact zeros, nothing else changed, and everything back at the end of a block."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from wcr_optim.pruning import Masks, applied, apply_, magnitude_masks, report, sweep
from wcr_optim.pruning.apply import weights_restored


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def contents(model):
    return copy.deepcopy(model.state_dict())


def assert_holds(model, state):
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert torch.equal(torch.signbit(tensor), torch.signbit(state[name])), name


def test_pruned_weights_are_zero_and_the_rest_untouched():
    model = network()
    before, masks = contents(model), magnitude_masks(model, 0.7)
    apply_(model, masks)
    for name, tensor in model.state_dict().items():
        expected = torch.where(masks[name], before[name], 0.0) if name in masks else before[name]
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zeros_are_positive_and_infinities_go(dtype):
    layer = nn.Linear(4, 2, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-1.0, math.inf, -math.inf, -0.0]] * 2))
    apply_(layer, Masks({"weight": torch.zeros(2, 4, dtype=torch.bool)}))
    assert torch.equal(layer.weight, torch.zeros(2, 4, dtype=dtype))
    assert not torch.signbit(layer.weight).any()


def test_the_model_stays_what_it_was():
    model = network()
    parameters = [(name, id(p), p.data_ptr(), p.stride(), p.requires_grad) for name, p in model.named_parameters()]
    keys, buffers, hooks = list(model.state_dict()), list(model.named_buffers()), model._forward_pre_hooks.copy()
    apply_(model, magnitude_masks(model, 0.5))
    after = [(name, id(p), p.data_ptr(), p.stride(), p.requires_grad) for name, p in model.named_parameters()]
    assert parameters == after
    assert keys == list(model.state_dict())
    assert [name for name, _ in buffers] == [name for name, _ in model.named_buffers()]
    assert hooks == model._forward_pre_hooks


def test_idempotent_and_applicable_after_further_training():
    model = network()
    masks = magnitude_masks(model, 0.9)
    apply_(model, masks)
    once = contents(model)
    apply_(model, masks)
    assert_holds(model, once)
    assert magnitude_masks(model, 0.9) == masks  # a share of all weights, not of those that are left
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        apply_(model, masks)
    for name, mask in masks.items():
        assert not model.state_dict()[name][~mask].any()


def test_autograd_notices_the_change():
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    loss = layer(x).sum()
    apply_(layer, magnitude_masks(layer, 0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_stay_independent():
    model = network()
    copied = copy.deepcopy(model)
    before = contents(model)
    apply_(copied, magnitude_masks(model, 0.5))
    assert_holds(model, before)
    apply_(copy.deepcopy(copied), magnitude_masks(copied, 0.9))


def test_a_compiled_model_sees_the_pruned_weights():
    model = network().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        dense = compiled(x)
        apply_(compiled, magnitude_masks(compiled, 0.8))
        pruned = compiled(x)
        assert torch.equal(pruned, model(x))
    assert not torch.equal(pruned, dense)


def test_shared_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    masks = magnitude_masks(model, 0.5)
    assert list(masks) == ["0.weight"]
    apply_(model, masks)
    assert int((model[1].weight == 0).sum()) == 4
    apply_(model, Masks({"1.weight": torch.zeros(3, 3, dtype=torch.bool)}))  # by its other name
    assert not model[0].weight.any()


# ------------------------------------------------------------------------------------- errors before anything changes


def assert_refused(model, masks, kind, message):
    before = contents(model)
    with pytest.raises(kind, match=message):
        apply_(model, masks)
    with pytest.raises(kind, match=message), applied(model, masks):
        raise AssertionError("the block must not be entered")
    assert_holds(model, before)


def everything_pruned(model, **others):
    return Masks({"0.weight": torch.zeros(model[0].weight.shape, dtype=torch.bool), **others})


def test_an_unknown_name():
    model = network()
    assert_refused(model, everything_pruned(model, **{"9.weight": torch.ones(1) > 0}), ValueError, "no such parameter")
    assert_refused(model, everything_pruned(model, **{"6.wait": torch.ones(1) > 0}), ValueError, "Linear has no such")


def test_a_wrong_shape():
    model = network()
    masks = everything_pruned(model, **{"6.weight": torch.ones(8, 4, dtype=torch.bool)})
    assert_refused(model, masks, ValueError, r"6.weight has shape \(8, 4\), the parameter has shape \(4, 8\)")


def test_two_masks_of_one_parameter():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    masks = everything_pruned(model, **{"1.weight": torch.ones(3, 3, dtype=torch.bool)})
    assert_refused(model, masks, ValueError, "are the same parameter")


def test_a_parametrized_weight():
    model = nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3)))
    masks = everything_pruned(model, **{"1.weight": torch.ones(3, 3, dtype=torch.bool)})
    assert_refused(model, masks, ValueError, "remove_parametrizations")


def test_a_weight_under_torch_prune():
    model = nn.Sequential(nn.Linear(3, 3), prune.identity(nn.Linear(3, 3), "weight"))
    masks = everything_pruned(model, **{"1.weight": torch.ones(3, 3, dtype=torch.bool)})
    assert_refused(model, masks, ValueError, "from_torch_prune")


# --------------------------------------------------------------------------------------------------- for a block only


def test_weights_come_back_exactly():
    model = network()
    with torch.no_grad():
        model[6].weight[0, :3] = torch.tensor([-0.0, math.nan, math.inf])
    bits = {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}
    masks = Masks({name: torch.rand(p.shape) < 0.2 for name, p in model.named_parameters() if p.ndim > 1})
    with applied(model, masks):
        assert not model[0].weight[~masks["0.weight"]].any()
        with torch.no_grad():
            model[0].weight.mul_(3)  # whatever is done to them
    for name, p in model.named_parameters():
        assert torch.equal(p.view(torch.int32), bits[name]), name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_weights_come_back_after_an_exception(error):
    model = network()
    before = contents(model)
    with pytest.raises(error), applied(model, magnitude_masks(model, 0.9)):
        raise error
    assert_holds(model, before)


def test_blocks_nest():
    model = network()
    before = contents(model)
    with applied(model, magnitude_masks(model, 0.5)):
        half = contents(model)
        with applied(model, magnitude_masks(model, 0.9)):
            assert not model[6].weight.all()
        assert_holds(model, half)
    assert_holds(model, before)


def test_restoring_in_between():
    model = nn.Linear(5, 2)
    weight, before = model.weight, model.weight.detach().clone()
    with weights_restored(model, [weight]) as restore, torch.no_grad():
        weight.zero_()
        restore()
        assert torch.equal(weight, before)
        weight.zero_()
    assert torch.equal(weight, before)


def replace(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def fold_a_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")


@pytest.mark.parametrize("change", [replace, fold_a_weight_norm, nn.Module.half, nn.Module.double])
def test_weights_that_a_block_replaces_or_converts_come_back(change):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    weight, before = model[0].weight, model[0].weight.detach().clone()
    with applied(model, {"0.weight": torch.rand(8, 8) > 0.5}):
        change(model)
    assert model[0].weight is weight
    assert model[1].weight is weight
    assert torch.equal(weight, before)
    zeros = []

    def evaluate(model):
        zeros.append(int((model[0].weight == 0).sum()))
        change(model)
        return 0.0

    sweep(model, evaluate, [0.9, 0.5, 0.0], progress=False)
    assert zeros == [58, 32, 0]
    assert model[0].weight is weight
    assert torch.equal(weight, before)


def test_two_masks_on_the_same_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data = model[0].weight.data
    before = contents(model)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"1\.weight and 0\.weight are the same parameter"):
        apply_(model, Masks({"0.weight": mask, "1.weight": mask}))
    assert_holds(model, before)


def frozen_for_good(model):
    with torch.inference_mode():
        model[6].weight = nn.Parameter(torch.randn(4, 8), requires_grad=False)


def expanded(model):
    model[6].weight = nn.Parameter(torch.randn(4, 1).expand(4, 8))


@pytest.mark.parametrize(("spoil", "message"), [(frozen_for_good, "inference_mode"), (expanded, "is expanded")])
def test_a_weight_that_cannot_be_written_leaves_all_as_they_were(spoil, message):
    model = network()
    masks = magnitude_masks(model, 0.5)
    spoil(model)
    before = contents(model)
    with pytest.raises(ValueError, match=rf"6\.weight .*{message}"):
        apply_(model, masks)
    with pytest.raises(ValueError, match=rf"6\.weight .*{message}"), applied(model, masks):
        raise AssertionError("entered")
    with pytest.raises(ValueError, match=rf"6\.weight .*{message}"):
        sweep(model, lambda pruned: 0.0, [0.5])
    assert_holds(model, before)


def test_inference_tensors_are_pruned_where_they_can_be():
    model = network()
    frozen_for_good(model)
    with torch.inference_mode():
        masks = magnitude_masks(model, 0.5)
        apply_(model, masks)
    assert int((model[6].weight == 0).sum()) == int((~masks["6.weight"]).sum()) > 0


def test_boolean_tensors_by_name_serve_as_masks():
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    masks = magnitude_masks(model, 0.5)
    plain = dict(masks)
    assert report(model, plain) == report(model, masks)
    with applied(model, plain):
        inside = contents(model)
    apply_(model, plain)
    apply_(other, masks)
    assert_holds(model, contents(other))
    assert_holds(other, inside)
    for wrong, message in ((0.5, "got 0.5"), ({"6.weight": torch.ones(4, 8)}, "must be a boolean tensor")):
        with pytest.raises(TypeError, match=message):
            apply_(model, wrong)
