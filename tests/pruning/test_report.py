"""Counts, operations and bytes, against counts by hand."""

import copy
import json
import os

import pytest
import torch
from networks import NETWORKS
from torch import nn

from wcr_optim.pruning import Masks, apply_, magnitude_masks, report, save_sparse


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))


def halves(model):
    """The convolution without weights, the linear layer with every second one."""
    return Masks(
        {
            "0.weight": torch.zeros(model[0].weight.shape, dtype=torch.bool),
            "3.weight": torch.arange(model[3].weight.numel()).view(model[3].weight.shape) % 2 == 0,
        }
    )


def test_counts_and_both_denominators():
    model = network()
    found = report(model, halves(model))
    conv, linear = found.layers
    assert (conv.name, conv.shape, conv.weights, conv.kept, conv.sparsity) == ("0.weight", (4, 3, 3, 3), 108, 0, 1.0)
    assert (linear.weights, linear.kept, linear.sparsity) == (2560, 1280, 0.5)
    assert (found.weights, found.kept) == (2668, 1280)
    assert found.parameters == sum(p.numel() for p in model.parameters()) == 2668 + 4 + 8 + 10
    assert found.sparsity == pytest.approx(1 - 1280 / 2668)
    assert found.sparsity_of_all == pytest.approx((2668 - 1280) / found.parameters)
    assert found.emptied == ["0.weight"]
    assert (conv.emptied, linear.emptied) == (True, False)
    assert found.dense_macs is found.sparse_macs is conv.dense_macs is None


def test_without_masks_the_zeros_count():
    model = network()
    masks = halves(model)
    apply_(model, masks)
    assert report(model) == report(model, masks)
    assert report(model, exclude="0").weights == 2560
    assert report(model, include="0").weights == 108


def test_operations():
    model = network().train()
    x = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    found = report(model, halves(model), x)
    conv, linear = found.layers
    assert (conv.dense_macs, conv.sparse_macs) == (2 * 8 * 8 * 108, 0)
    assert (linear.dense_macs, linear.sparse_macs) == (2 * 2560, 2560)
    assert found.dense_macs == conv.dense_macs + linear.dense_macs
    assert found.sparse_macs == 2560
    assert model.training
    assert model[1].training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert report(model, halves(model), (x,)) == report(model, halves(model), {"input": x}) == found


def test_operations_of_recurrent_and_attention_layers():
    lstm = nn.LSTM(6, 5, batch_first=True)
    found = report(lstm, magnitude_masks(lstm, 0.5), torch.randn(3, 7, 6))
    assert {layer.name: layer.dense_macs for layer in found.layers} == {
        "weight_ih_l0": 3 * 7 * 20 * 6,
        "weight_hh_l0": 3 * 7 * 20 * 5,
    }
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 7, 8)
    found = report(attention, magnitude_masks(attention, 0.5), (x, x, x))
    macs = {layer.name: layer.dense_macs for layer in found.layers}
    assert macs == {"in_proj_weight": 3 * 7 * 24 * 8, "out_proj.weight": 3 * 7 * 8 * 8}
    scores = 2 * 3 * 7 * 7 * 8  # query times key, attention times value: no weight is involved
    assert found.dense_macs == sum(macs.values()) + scores
    assert found.sparse_macs == sum(layer.sparse_macs for layer in found.layers) + scores


def test_operations_of_weights_that_share_one_storage():
    """As cuDNN has those of recurrent layers."""
    lstm = nn.LSTM(6, 5)
    x = torch.randn(3, 7, 6)
    expected = report(lstm, magnitude_masks(lstm, 0.5), x)
    flat, start = torch.cat([p.detach().flatten() for p in lstm.parameters()]), 0
    for p in lstm.parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    assert [layer.dense_macs for layer in expected.layers] == [3 * 7 * 20 * 6, 3 * 7 * 20 * 5]
    assert report(lstm, magnitude_masks(lstm, 0.5), x) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert report(lstm, magnitude_masks(lstm, 0.5), x).dense_macs == expected.dense_macs


def test_operations_under_autocast_and_of_a_compiled_model():
    model = network()
    x = torch.randn(2, 3, 8, 8)
    expected = report(model, halves(model), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert report(model, halves(model), x) == expected
    with torch.inference_mode():
        assert report(model, halves(model), x) == expected
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert report(compiled, halves(model), x) == expected


def test_counting_leaves_the_backends_alone():
    def settings():
        backends = torch.backends
        return backends.mkldnn.enabled, backends.cudnn.enabled, backends.mha.get_fastpath_enabled()

    before = settings()
    with pytest.raises(RuntimeError):
        report(network(), example=torch.randn(1, 2))
    assert settings() == before


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_sizes_are_those_of_the_files(tmp_path, sparsity, dtype):
    model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 50)).to(dtype)
    masks = magnitude_masks(model, sparsity)
    found = report(model, masks)
    assert found.dense_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    apply_(model, masks)
    save_sparse(model, tmp_path / "file")
    header = 4096
    assert 0 <= os.path.getsize(tmp_path / "file") - found.sparse_bytes < header


def test_file_sizes_count_zeros_outside_of_what_is_reported(tmp_path):
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 300), nn.Linear(300, 300))
    nn.init.zeros_(model[0].weight)
    apply_(model, magnitude_masks(model, 0.95))
    before = report(model).sparse_bytes
    model.register_buffer("wide", torch.zeros(4, dtype=torch.complex128))  # which no sparse file holds
    assert report(model).sparse_bytes == before + 64
    del model.wide
    save_sparse(model, tmp_path / "file")
    found = report(model, include="1")
    assert [layer.name for layer in found.layers] == ["1.weight"]
    assert 0 <= os.path.getsize(tmp_path / "file") - found.sparse_bytes < 4096


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = report(model, example=torch.randn(1, 3))
    assert (found.weights, found.parameters) == (9, 15)
    assert found.layers[0].dense_macs == 18
    assert found.dense_bytes == 15 * 4


def test_text():
    model = network()
    lines = str(report(model, halves(model), torch.randn(1, 3, 8, 8))).splitlines()
    assert lines[0].split() == ["layer", "shape", "weights", "kept", "sparsity", "MACs", "sparse", "MACs"]
    flat = [" ".join(line.split()) for line in lines]
    assert flat[1] == "0.weight 4 x 3 x 3 x 3 108 0 100.00% 6.912 k 0 lost every weight"
    assert flat[2] == "3.weight 10 x 256 2,560 1,280 50.00% 2.56 k 1.28 k"
    assert flat[3] == "prunable weights 2,668 1,280 52.02% 9.472 k 1.28 k"
    assert flat[4] == "all parameters 2,690 1,302 51.60% 9.472 k 1.28 k"
    assert flat[5].startswith("file: 10.8 kB dense, ")
    assert "MACs" not in str(report(model))


def test_to_dict_is_json():
    model = network()
    found = json.loads(json.dumps(report(model, halves(model), torch.randn(1, 3, 8, 8)).to_dict()))
    assert found["weights"] == 2668
    assert found["emptied"] == ["0.weight"]
    assert found["layers"][0]["shape"] == [4, 3, 3, 3]
    assert found["layers"][1]["sparsity"] == 0.5


def test_errors():
    with pytest.raises(ValueError, match="no such parameter"):
        report(nn.Linear(2, 2), Masks({"wait": torch.ones(1) > 0}))
    with pytest.raises(ValueError, match="no weights to prune"):
        report(nn.LayerNorm(2))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers_count_as_by_hand(name):
    model, inputs = NETWORKS[name]()
    found = report(model, magnitude_masks(model, 0.9), inputs)
    tokens = inputs["input_ids"].numel()
    for layer in found.layers:
        assert layer.dense_macs == tokens * layer.weights, layer.name


def test_tensors_tied_by_memory_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data = model[0].weight.data
    found = report(model)
    assert (found.parameters, found.weights, found.dense_bytes) == (16, 16, 64)
    assert found.sparsity_of_all == 0
    model[0].register_buffer("view", model[0].weight.data)
    assert report(model).dense_bytes == 64
