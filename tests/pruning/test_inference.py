"""Sparse layouts for inference: the same results, and a reason where there is none."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from wcr_optim.pruning.inference import CSRLinear, to_csr, to_semi_structured


def pruned_(model, sparsity=0.9):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.masked_fill_(torch.rand_like(module.weight) < sparsity, 0.0)
    return model


def types(model):
    return [type(module) for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (4, 24), (9, 24), (2, 5, 24), (2, 0, 24), (1, 1, 1, 24)])
def test_a_csr_layer_computes_what_the_dense_one_does(shape, bias, dtype):
    dense = pruned_(nn.Sequential(nn.Linear(24, 17, bias=bias))).to(dtype)
    sparse = to_csr(dense)
    assert types(sparse) == [CSRLinear]
    assert types(dense) == [nn.Linear]
    x = torch.randn(shape, dtype=dtype)
    with torch.inference_mode():
        output = sparse(x)
        torch.testing.assert_close(output, dense(x))
    assert output.is_contiguous()


def test_a_csr_model_is_copied_and_takes_another_dtype():
    dense = pruned_(nn.Sequential(nn.Linear(24, 17), nn.ReLU(), nn.Linear(17, 5)))
    sparse = to_csr(dense)
    x = torch.randn(6, 24)
    copied = copy.deepcopy(sparse)
    assert types(copied) == types(sparse) == [CSRLinear] * 2
    assert copied[0].weight.values().data_ptr() != sparse[0].weight.values().data_ptr()
    wide = copied.double()
    torch.testing.assert_close(wide(x.double()), dense.double()(x.double()))
    assert sparse[0].weight.dtype == torch.float32, "the copy's weights are its own"
    torch.testing.assert_close(sparse(x), dense.float()(x))
    with pytest.raises(ValueError, match="0: its weight is in compressed sparse rows already"):
        to_csr(sparse)


def test_a_csr_layer_under_autocast_multiplies_in_its_own_dtype():
    dense = pruned_(nn.Sequential(nn.Linear(24, 17), nn.ReLU(), nn.Linear(17, 5)))
    x = torch.randn(6, 24)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            torch.testing.assert_close(to_csr(dense)(given).float(), dense(given).float(), rtol=0.05, atol=0.05)


def test_only_what_is_sparse_and_plain_is_converted():
    class Scaled(nn.Linear):
        pass

    model = nn.Sequential(
        pruned_(nn.Linear(32, 32)),
        nn.Linear(32, 32),
        pruned_(Scaled(32, 32)),
        pruned_(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)),
        nn.MultiheadAttention(32, 2),
    )
    sparse = to_csr(model)
    assert types(sparse)[:3] == [CSRLinear, nn.Linear, Scaled]
    assert CSRLinear not in types(sparse)[3:]
    assert not sparse.training
    assert model.training
    x = torch.randn(4, 7, 32)
    with torch.inference_mode():
        torch.testing.assert_close(sparse[:4](x), model.eval()[:4](x))
    assert types(to_csr(model, min_sparsity=0.0))[:2] == [CSRLinear, CSRLinear]


def test_hooks_stay_and_the_beta_warning_does_not_appear():
    model = pruned_(nn.Sequential(nn.Linear(8, 8)))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.inference_mode():
        to_csr(model)(torch.randn(5, 8))
    assert seen == [(5, 8)]


def test_a_language_model_generates_the_same():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
        )
    ).eval()
    pruned_(model.model)
    sparse = to_csr(model)
    assert types(sparse).count(CSRLinear) == 14
    tokens = torch.randint(64, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(sparse(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(8, 8)), "0: its sparsity is 0.000, less than 0.8"),
        (
            pruned_(nn.Linear(8, 8)).bfloat16(),
            r"Linear: on a CPU torch does not .* torch.bfloat16; use model.float\(\)",
        ),
        (nn.Sequential(nn.Conv2d(3, 3, 3)), "no nn.Linear of its own"),
        (nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), "and 2 more layers"),
    ],
)
def test_csr_says_why_not(model, message):
    with pytest.raises(ValueError, match=message):
        to_csr(model)


def test_a_mask_has_to_be_permanent():
    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.9)
    model(torch.randn(1, 8)).sum().backward()  # the computed weight has a graph now, as after training
    for convert in (to_csr, to_semi_structured):
        with pytest.raises(ValueError, match=r"torch\.nn\.utils\.prune\.remove"):
            convert(model)


def test_min_sparsity_is_checked():
    with pytest.raises(ValueError, match=r"min_sparsity must lie in \[0, 1\], got 95"):
        to_csr(nn.Linear(2, 2), 95)


def two_of_four(out_features, in_features):
    layer = nn.Linear(in_features, out_features)
    with torch.no_grad():
        layer.weight.view(-1, 4)[:, [0, 2]] = 0.0
    return layer


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(8, 8)), r"0: it has more than two weights in some four.*n_m_masks\(model, 2, 4\)"),
        (nn.Sequential(nn.Linear(6, 8)), "more than two weights"),
        (nn.Sequential(two_of_four(64, 64)), "0: it is on cpu, and semi-structured sparsity needs a CUDA device"),
    ],
)
def test_semi_structured_says_why_not(model, message):
    with pytest.raises(ValueError, match=message):
        to_semi_structured(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_semi_structured_computes_what_the_dense_one_does():
    torch.manual_seed(0)
    dense = nn.Sequential(two_of_four(128, 256), nn.ReLU(), two_of_four(10, 128)).half().cuda()
    sparse = to_semi_structured(dense)
    assert type(dense[0].weight.data) is torch.Tensor
    assert isinstance(sparse[0].weight.data, torch.sparse.SparseSemiStructuredTensor)
    x = torch.randn(64, 256, dtype=torch.half, device="cuda")
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x), dense(x), rtol=1e-2, atol=1e-2)


def test_the_benchmark_measures_every_pair(capsys):
    from benchmarks import inference

    arguments = ["--width", "16", "--layers", "2", "--sparsities", "0.5", "0.9", "--batches", "1", "8", "--rounds", "1"]
    assert inference.main([*arguments, "--threads", str(torch.get_num_threads())]) == 0
    rows = capsys.readouterr().out.splitlines()[4:]
    assert [row.split()[:3] for row in rows] == [["CSR", s, b] for s in ("50%", "90%") for b in ("1", "8")]
    assert all(float(row.split()[-1]) < 1e-5 for row in rows)  # how far the results of the two are apart
