"""Which weights each criterion keeps."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from torch import nn
from torch.nn.utils import prune

from wcr_optim.parameters import prunable_weights
from wcr_optim.pruning import apply_, magnitude_masks, n_m_masks, random_masks


def small():
    return nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 8), nn.Linear(8, 3))


# ---------------------------------------------------------------------------------------------------------- magnitude


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.95, 0.99, 1.0])
def test_global_masks_equal_torchs_where_no_weights_tie(sparsity):
    model = small()
    weights = prunable_weights(model)
    distinct = torch.randperm(sum(weight.numel() for weight in weights.values())) + 1.0
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(
                distinct[: weight.numel()].view(weight.shape) * torch.where(torch.rand(weight.shape) < 0.5, -1, 1)
            )
            distinct = distinct[weight.numel() :]
    masks = magnitude_masks(model, sparsity)
    other = copy.deepcopy(model)
    layers = [(other.get_submodule(name.removesuffix(".weight")), "weight") for name in masks]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=float(sparsity))
    for (layer, _), mask in zip(layers, masks.values(), strict=True):
        assert torch.equal(layer.weight_mask.bool(), mask)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95, 1.0])
def test_layer_masks_equal_torchs(sparsity):
    model = small()
    masks = magnitude_masks(model, sparsity, "layer")
    for name, mask in masks.items():
        layer = copy.deepcopy(model.get_submodule(name.removesuffix(".weight")))
        prune.l1_unstructured(layer, "weight", amount=float(sparsity))
        assert torch.equal(layer.weight_mask.bool(), mask)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.sampled_from(["global", "layer"]))
def test_counts_are_exact_and_pruning_is_idempotent(sparsity, scope):
    torch.manual_seed(1)
    model = small().to(torch.bfloat16)  # many ties
    masks = magnitude_masks(model, sparsity, scope)
    sizes = [weight.numel() for weight in prunable_weights(model).values()]
    groups = [sum(sizes)] if scope == "global" else sizes
    assert masks.total - masks.kept == sum(round(sparsity * size) for size in groups)
    apply_(model, masks)
    assert magnitude_masks(model, sparsity, scope).kept == masks.kept
    again = copy.deepcopy(model)
    apply_(again, magnitude_masks(model, sparsity, scope))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_mixed_dtypes():
    model = small()
    model[0].bfloat16()
    model[2].double()
    masks = magnitude_masks(model, 0.6)
    magnitudes = torch.cat([weight.detach().double().abs().view(-1) for weight in prunable_weights(model).values()])
    keep = torch.cat([mask.view(-1) for mask in masks.values()])
    assert magnitudes[keep].min() >= magnitudes[~keep].max()
    assert int(keep.sum()) == len(keep) - round(0.6 * len(keep))


def test_norms_biases_and_excluded_layers_have_no_mask():
    model = small()
    assert list(magnitude_masks(model, 0.5)) == ["0.weight", "2.weight", "3.weight"]
    assert list(magnitude_masks(model, 0.5, exclude="3")) == ["0.weight", "2.weight"]
    assert list(magnitude_masks(model, 0.5, include=[model[2]])) == ["2.weight"]
    assert list(n_m_masks(model, exclude=["0", "2"])) == ["3.weight"]
    assert list(random_masks(model, 0.5, include="0")) == ["0.weight"]


def test_errors():
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], got 1.5"):
        magnitude_masks(small(), 1.5)
    with pytest.raises(ValueError, match="scope must be"):
        magnitude_masks(small(), 0.5, "row")
    with pytest.raises(ValueError, match="no weights to prune"):
        magnitude_masks(nn.BatchNorm2d(3), 0.5)
    model = small()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    for select in (lambda m: magnitude_masks(m, 0.5), n_m_masks):
        with pytest.raises(ValueError, match=r"2\.weight holds NaN"):
            select(model)


def test_the_model_is_not_touched():
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    magnitude_masks(model, 0.5)
    n_m_masks(model, exclude="3")
    random_masks(model, 0.5)
    assert versions == [p._version for p in model.parameters()]
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# ------------------------------------------------------------------------------------------------------------- random


def test_random_masks_have_the_same_counts_and_are_reproducible():
    model = small()
    state = torch.get_rng_state()
    for scope in ("global", "layer"):
        masks = random_masks(model, 0.9, scope, seed=3)
        assert masks.kept == magnitude_masks(model, 0.9, scope).kept
        assert masks == random_masks(model, 0.9, scope, seed=3)
        assert masks != random_masks(model, 0.9, scope, seed=4)
        fewer = random_masks(model, 0.95, scope, seed=3)
        assert not any((fewer[name] & ~masks[name]).any() for name in masks)
    assert torch.equal(state, torch.get_rng_state())


def test_masks_do_not_depend_on_torchs_defaults(set_default):
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    found = []
    for prepare in (lambda: None, set_default):
        prepare()
        masks = [random_masks(model, 0.9), magnitude_masks(model, 0.9), n_m_masks(model)]
        found.append([dict(each.items()) for each in masks])
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_random_masks_do_not_look_at_the_weights():
    model = nn.Linear(100, 100)
    keep = random_masks(model, 0.5)["weight"]
    magnitudes = model.weight.detach().abs()
    assert float(magnitudes[keep].mean()) == pytest.approx(float(magnitudes.mean()), rel=0.05)
    rows = keep.sum(1)
    assert rows.min() > 30
    assert rows.max() < 70


# ---------------------------------------------------------------------------------------------------------- n of m


def n_of_m_by_hand(weight, dim, n, m):
    """Group by group, largest first and equal ones by position."""
    keep = torch.zeros(weight.shape, dtype=torch.bool).movedim(dim, -1)
    by_row = weight.detach().movedim(dim, -1)
    for index in itertools.product(*map(range, by_row.shape[:-1])):
        for start in range(0, by_row.shape[-1], m):
            group = by_row[index][start : start + m].abs().tolist()
            for place in sorted(range(m), key=lambda i: (-group[i], i))[:n]:
                keep[index][start + place] = True
    return keep.movedim(-1, dim)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 8)


def own_conv1d():
    class Mine(type(conv1d())):
        pass

    return Mine(6, 8)


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), {"weight": 1}),
    "conv": (lambda: nn.Conv2d(8, 4, 3), {"weight": 1}),
    "grouped conv": (lambda: nn.Conv1d(16, 4, 3, groups=2), {"weight": 1}),
    "transposed conv": (lambda: nn.ConvTranspose2d(8, 3, 3), {"weight": 0}),
    "lstm": (lambda: nn.LSTM(8, 4), {"weight_ih_l0": 1, "weight_hh_l0": 1}),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {"in_proj_weight": 1, "out_proj.weight": 1}),
    "gpt2": (conv1d, {"weight": 0}),
    "a subclass of gpt2's": (own_conv1d, {"weight": 0}),
}


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (0, 4), (4, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_n_of_m_along_the_input(layer, pattern):
    make, dims = LAYERS[layer]
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).round(decimals=1))  # ties
    if layer == "lstm" and pattern[1] == 8:
        masks = n_m_masks(model, *pattern, exclude="weight_hh_l0")
        dims = {"weight_ih_l0": 1}
    else:
        masks = n_m_masks(model, *pattern)
    assert set(masks) == set(dims)
    for name, dim in dims.items():
        assert torch.equal(masks[name], n_of_m_by_hand(model.get_parameter(name), dim, *pattern)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_n_of_m_of_other_dtypes_and_layouts(dtype):
    layer = nn.Conv2d(8, 4, 3).to(dtype).to(memory_format=torch.channels_last)
    assert torch.equal(n_m_masks(layer)["weight"], n_of_m_by_hand(layer.weight, 1, 2, 4))


def test_n_of_m_over_many_chunks():
    layer = nn.Linear(1000, 150)
    masks = n_m_masks(layer, 2, 4)
    groups = layer.weight.detach().abs().view(-1, 4)
    kept = groups.sort(dim=1, descending=True).values[:, :2].sum()
    assert groups[masks["weight"].view(-1, 4)].sum() == pytest.approx(kept.item(), rel=1e-4)
    assert (masks["weight"].view(-1, 4).sum(1) == 2).all()


def test_layers_that_do_not_divide_stay_dense():
    model, _ = NETWORKS["resnet"]()
    masks = n_m_masks(model)
    assert masks["conv1.weight"].all()  # three colours
    assert masks["fc.weight"].float().mean() == 0.5
    with pytest.raises(ValueError, match="no layer's input dimension is a multiple of m=7"):
        n_m_masks(nn.Linear(8, 7), 2, 7)
    grouped = nn.ModuleDict({"a": nn.ConvTranspose1d(8, 8, 3, groups=4), "b": nn.Linear(4, 4)})
    assert n_m_masks(grouped)["a.weight"].all()  # two inputs to each group


def test_an_unknown_input_dimension_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4))
    with pytest.raises(ValueError, match=r"1\.weight of Bilinear has 3 dimensions") as error:
        n_m_masks(model)
    assert "exclude=['1.weight']" in str(error.value)
    assert list(n_m_masks(model, exclude=["1.weight"])) == ["0.weight"]
    model[0].register_parameter("proj", nn.Parameter(torch.randn(4, 4)))  # x @ proj or x @ proj.T?
    with pytest.raises(ValueError, match=r"0\.proj of Linear has 2 dimensions, and which of them is the input is not"):
        n_m_masks(model, exclude=["1.weight"])


@pytest.mark.parametrize("pattern", [(5, 4), (-1, 4), (0, 0), (1, -2)])
def test_patterns_are_validated(pattern):
    with pytest.raises(ValueError, match="needs 0 <= n <= m"):
        n_m_masks(small(), *pattern)


def test_values_of_the_wrong_type_are_named():
    model = nn.Linear(4, 4)
    for sparsity in ("0.5", None):
        with pytest.raises(TypeError, match=f"sparsity must be a number in .*, got {sparsity!r}"):
            magnitude_masks(model, sparsity)
    with pytest.raises(TypeError, match=r"needs two integers, got 2:4\.0"):
        n_m_masks(model, 2, 4.0)
    with pytest.raises(TypeError, match=r"exclude takes names, .*, got None"):
        magnitude_masks(model, 0.5, exclude=None)
