import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_moments

from wcr_optim.eager import CHUNK
from wcr_optim.moments import moments

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 3e-7, torch.float16: 3e-7}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (), (3, 5), (2, 3, 4, 5), (CHUNK + 3,), (3, CHUNK - 1)])
def test_equals_plain_sums(dtype, shape):
    w = torch.randn(shape).to(dtype)
    n, mu, q = moments([w])
    expected = torch.tensor(plain_moments(w), dtype=torch.float64)
    torch.testing.assert_close(torch.cat([n, mu, q]), expected, rtol=TOLERANCE[dtype], atol=0)


def test_one_row_per_tensor_whatever_its_strides_and_dtype():
    base = torch.randn(8, 6, 5, 4)
    layers = [
        base,
        base.to(memory_format=torch.channels_last),
        base.transpose(0, 2),
        base[::2, :, 1:],  # gaps in memory
        base.double(),
        base.expand(2, 8, 6, 5, 4),
    ]
    measured = torch.stack(moments(layers))
    for layer, column in zip(layers, measured.unbind(1), strict=True):
        torch.testing.assert_close(column.tolist(), list(plain_moments(layer)), rtol=3e-7, atol=0)


def test_no_tensors_and_empty_tensors():
    assert moments([]).n.shape == (0,)
    assert [x.item() for x in moments([torch.empty(0, 3)])] == [0.0, 0.0, 0.0]


def test_equal_magnitudes_have_a_variance_of_rounding_noise():
    for n in (2, 1000, CHUNK, 3 * CHUNK + 11):
        m = moments([torch.full((n,), 0.1)])
        assert abs(m.variance / m.q) < 5e-7


def test_huge_weights_overflow_to_inf_and_never_to_nan():
    m = moments([torch.full((4, 4), 1e30), torch.tensor([[1.0, float("inf")]])])
    assert m.q.isinf().all()


def test_smoothing_is_the_preprints():
    w = torch.tensor([[0.0, 1e-4, -2e-4], [1.0, 0.0, 3e-5]], dtype=torch.float64)
    m = moments([w], smoothing=1e-8)
    smooth = (w.square() + 1e-8).sqrt()
    torch.testing.assert_close(m.mu.item(), smooth.mean().item(), rtol=1e-14, atol=0)
    torch.testing.assert_close(m.q.item(), smooth.square().mean().item(), rtol=1e-14, atol=0)


def test_differentiable():
    w = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: torch.stack(moments([w])[1:]), (w,))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=2, max_size=5))
def test_sums_add_over_parts(sizes):
    parts = [torch.randn(k, dtype=torch.float64) for k in sizes]
    n, mu, q = moments(parts)
    whole = moments([torch.cat(parts)])
    torch.testing.assert_close((n * mu).sum() / n.sum(), whole.mu[0])
    torch.testing.assert_close((n * q).sum() / n.sum(), whole.q[0])
