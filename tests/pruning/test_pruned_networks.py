"""GPT-2, a Llama-shaped model, a ResNet and an LSTM go through everything."""

import copy

import pytest
import torch
from networks import NETWORKS

from wcr_optim.parameters import param_groups, prunable_weights
from wcr_optim.pruning import (
    Masks,
    applied,
    apply_,
    load_sparse,
    magnitude_masks,
    n_m_masks,
    recalibrate_batchnorm,
    report,
    save_sparse,
    sweep,
)

DENSE = {
    "resnet": {"bn1", "bn2", "downsample.1", "fc.bias"},
    "lstm": {"embed", "bias"},
    "gpt2": {"wte", "wpe", "ln_", "bias", "lm_head"},
    "llama": {"embed_tokens", "norm"},
}


def outputs(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.fixture(params=list(NETWORKS))
def network(request):
    model, inputs = NETWORKS[request.param]()
    return request.param, model.eval(), inputs


def test_the_selection(network):
    name, model, _ = network
    selected = set(prunable_weights(model))
    for parameter, _ in model.named_parameters():
        assert (parameter in selected) == (not any(part in parameter for part in DENSE[name])), parameter
    regularized, rest = param_groups(model)
    assert {id(p) for p in regularized["params"]} == {id(p) for p in prunable_weights(model).values()}
    assert len(regularized["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_mask_apply_save_load(network, scope, tmp_path):
    _, model, inputs = network
    dense = copy.deepcopy(model.state_dict())
    masks = magnitude_masks(model, 0.9, scope)
    masks.save(tmp_path / "masks")
    with applied(model, Masks.load(tmp_path / "masks")):
        inside = outputs(model, inputs)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, dense[name])
    apply_(model, masks)
    assert torch.equal(outputs(model, inputs), inside)
    assert report(model).kept == report(model, masks).kept == masks.kept
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    save_sparse(model, tmp_path / "sparse")
    load_sparse(fresh, tmp_path / "sparse")
    assert torch.equal(outputs(fresh, inputs), inside)


def test_two_of_four(network):
    name, model, inputs = network
    masks = n_m_masks(model)
    assert masks.sparsity == pytest.approx(0.5, abs=0.02)  # but for the first layer of the ResNet
    dense = {layer.name for layer in report(model, masks).layers if not layer.sparsity}
    assert dense == ({"conv1.weight"} if name == "resnet" else set())
    apply_(model, masks)
    assert outputs(model, inputs).isfinite().all()


def test_sweep_and_report(network):
    name, model, inputs = network
    reference = outputs(model, inputs)
    before = copy.deepcopy(model.state_dict())

    def agreement(pruned):
        return float((outputs(pruned, inputs).argmax(-1) == reference.argmax(-1)).float().mean())

    calibration = [inputs] * 2 if name == "resnet" else None
    result = sweep(model, agreement, [0, 0.5, 0.99, 1.0], calibration=calibration)
    assert result.values()[0] == 1.0 or calibration
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    found = report(model, magnitude_masks(model, 0.99), inputs)
    assert found.sparse_macs < found.dense_macs
    assert found.sparse_bytes < found.dense_bytes
    assert all(layer.dense_macs for layer in found.layers)


def test_recalibration_is_for_norms_with_statistics_only(network):
    name, model, inputs = network
    before = copy.deepcopy(model.state_dict())
    recalibrate_batchnorm(model, [inputs])
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert bool(changed) == (name == "resnet")
    assert all(key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for key in changed)
