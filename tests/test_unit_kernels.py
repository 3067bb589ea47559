"""Triton's kernels of units, in the interpreter where there is no GPU, against the eager code and the formula."""

import math

import pytest
import torch
from reference import layouts, plain_moments, plain_shrink
from torch import nn
from triton_interpreter import DEVICE, GPU

from wcr_optim import WCR, eager_units
from wcr_optim.eager_units import number_of_units
from wcr_optim.moments import moments
from wcr_optim.shrink import shrink_
from wcr_optim.units import shrink_keeping_energy_, shrink_units_, spread, unit_moments

pytest.importorskip("triton")
from wcr_optim import kernels, unit_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = kernels.SHRINK_BLOCK
LENGTHS = [1, 3, 27, 147, BLOCK - 1, BLOCK, BLOCK + 1, 5000]
SHAPES = [
    *[(units, length) for length in LENGTHS for units in (1, 5)],
    *[(300, length) for length in LENGTHS[:4]],
    (kernels.SHRINK_CHUNK + 1, 1),
    (30, 64),  # rows that begin where loads of 16 bytes can
    (2, 2 * BLOCK),
    (2, kernels.SHRINK_CHUNK + 8),
    (3,),
    (),
    (5, 0),
    (0, 7),
    (8, 3, 3, 3),
]


def layers(dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


def views(base):
    return [
        *layouts(base),
        base[:, ::2],
        base.flatten()[1:].view(7, -1),  # no address that loads of 16 bytes could use
        base[3:4, :, :, 0],
    ]


def some(number):
    """Gains and thresholds; every third unit is to be left alone."""
    gain = torch.linspace(0.9, 1.3, number, dtype=torch.float64, device=DEVICE)
    threshold = torch.linspace(0.0, 0.3, number, dtype=torch.float64, device=DEVICE)
    gain[::3], threshold[::3] = 1.0, 0.0
    return gain, threshold


def rows_of(w):
    return w.reshape(number_of_units(w), -1) if w.numel() else [w.reshape(-1)] * number_of_units(w)


def bits(w):
    return w.view(torch.int32 if w.dtype is torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_any_shape(dtype):
    ws = layers(dtype)
    found = torch.stack(unit_moments(ws, backend="triton"), dim=1)
    torch.testing.assert_close(found, torch.stack(unit_moments(ws), dim=1), rtol=1e-6, atol=0)
    for w, own in zip(ws, torch.split(found, [number_of_units(w) for w in ws]), strict=True):
        if len(own) < 300:  # the formula is slow
            expected = [plain_moments(row.cpu()) if w.numel() else (0.0, 0.0, 0.0) for row in rows_of(w)]
            torch.testing.assert_close(own.tolist(), list(map(list, expected)), rtol=5e-7, atol=0)


@pytest.mark.parametrize("cutoff", [math.inf, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_what_a_threshold_leaves(dtype, cutoff):
    ws = [*layers(dtype), *layers(torch.float64, [(3, 5)])]
    _, threshold = some(sum(map(number_of_units, ws)))
    found, eager = unit_kernels.unit_sums(ws, threshold, cutoff), eager_units.unit_sums(ws, threshold, cutoff)
    torch.testing.assert_close(torch.cat(found), torch.cat(eager), rtol=2e-6, atol=1e-6)
    for w, t, own in zip(ws, torch.split(threshold, [number_of_units(w) for w in ws]), found, strict=True):
        if w.ndim == 2 and w.numel():
            m = w.double().abs()
            left = torch.where(m < cutoff, (m - t.double().unsqueeze(1)).clamp(min=0), m)
            expected = torch.stack([left.sum(1), left.square().sum(1)], dim=1)
            torch.testing.assert_close(own, expected, rtol=2e-6, atol=1e-6)


def test_a_nan_is_seen_above_a_threshold_and_thresholds_are_counted():
    w = torch.ones(3, 300, device=DEVICE)
    w[1, 7] = math.nan
    (sums,) = unit_kernels.unit_sums([w], torch.full((3,), 0.5, device=DEVICE))
    assert sums.isnan().any(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="got 2 thresholds for 3 units"):
        unit_kernels.unit_sums([w], torch.zeros(2, device=DEVICE))


@pytest.mark.parametrize("threshold", [0.0, math.nan])
def test_a_threshold_that_is_none_or_nan_leaves_weights_or_nan(threshold):
    w = torch.randn(3, 300, device=DEVICE)
    before, thresholds = w.clone(), torch.tensor([0.1, threshold, 0.1], dtype=torch.float64, device=DEVICE)
    shrink_keeping_energy_([w], unit_moments([w]), thresholds, torch.ones_like(thresholds), backend="triton")
    assert torch.equal(w[1], before[1]) if threshold == 0.0 else w[1].isnan().all()
    assert w[[0, 2]].isfinite().all()


@pytest.mark.parametrize("cutoff", [math.inf, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_that_keeps_energy(dtype, cutoff):
    found, eager = ([*layers(dtype), *layers(torch.float64, [(3, 5)])] for _ in range(2))
    gain, threshold = some(sum(map(number_of_units, found)))
    for ws, backend in ((found, "triton"), (eager, "eager")):
        shrink_keeping_energy_(ws, unit_moments(ws), threshold, gain, cutoff=cutoff, backend=backend)
    rtol = 2e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found, eager, rtol=rtol, atol=1e-7)


def test_weights_at_the_cutoff_are_spared():
    w = torch.full((1, 300), 0.5, device=DEVICE)
    w[0, ::2] = 0.25
    threshold = torch.tensor([0.1], dtype=torch.float64, device=DEVICE)
    (sums,) = unit_kernels.unit_sums([w], threshold, 0.5)
    torch.testing.assert_close(sums.cpu(), torch.tensor([[97.5, 40.875]], dtype=torch.float64), rtol=1e-6, atol=0)
    shrink_units_([w], torch.ones_like(threshold), threshold, cutoff=0.5, backend="triton")
    torch.testing.assert_close(w[0, :2].cpu(), torch.tensor([0.15, 0.5]))


def test_moments_of_any_strides_and_several_dtypes_at_once():
    base = torch.randn(8, 6, 5, 4, device=DEVICE)
    ws = [*views(base), *views(base.bfloat16()), base.double(), base.half(), base.double().transpose(0, 1)]
    measured = torch.stack(unit_moments(ws, backend="triton"))
    torch.testing.assert_close(measured, torch.stack(unit_moments(ws)), rtol=1e-6, atol=0)


def test_equal_magnitudes_have_a_variance_of_rounding_noise():
    ws = [torch.full((2, n), value, device=DEVICE) for value in (0.1, 1.7, 3e-5) for n in (2, 1000, BLOCK, 100_003)]
    m = unit_moments(ws, backend="triton")
    assert (m.variance / m.q).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_the_same_bits_every_time_and_in_any_company(dtype):
    ws = layers(dtype, [(300, 27), (5, 147), (3,), (30, 64), (5, BLOCK + 1), (2, kernels.SHRINK_CHUNK + 8)])
    together = unit_kernels.unit_sums(ws)
    assert all(map(torch.equal, together, unit_kernels.unit_sums(ws)))
    alone = [unit_kernels.unit_sums([w])[0] for w in reversed(ws)]
    assert all(map(torch.equal, together, reversed(alone)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_of_any_shape(dtype):
    found, eager = layers(dtype), layers(dtype)
    before = [w.clone() for w in found]
    gain, threshold = some(sum(map(number_of_units, found)))
    shrink_units_(found, gain, threshold, backend="triton")
    shrink_units_(eager, gain, threshold)
    rtol = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found, eager, rtol=rtol, atol=1e-7)
    sizes = [number_of_units(w) for w in found]
    for w, old, g, t in zip(found, before, torch.split(gain, sizes), torch.split(threshold, sizes), strict=True):
        if w.numel():
            for i in (0, len(g) // 2, len(g) - 1):
                expected = plain_shrink(rows_of(old)[i].float(), g[i].item(), t[i].item()).to(dtype)
                torch.testing.assert_close(rows_of(w)[i], expected, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_shrink_of_any_strides_and_nothing_beyond_the_tensor(dtype):
    for index in range(len(views(torch.empty(8, 6, 5, 4)))):
        whole = torch.randn(8, 6, 5, 4, device=DEVICE).to(dtype)
        ours, plain = whole.clone(), whole.clone()
        w = views(ours)[index]
        version = w._version
        shrink_units_([w], *some(len(w)), backend="triton")
        assert w._version > version
        shrink_units_([views(plain)[index]], *some(len(w)))
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, on the way to what is clamped
def test_nan_and_inf_stay_in_their_unit_and_are_never_made(dtype, seed):
    limit = torch.finfo(dtype).max if dtype is not torch.float32 else 1e30
    w = torch.tensor([[math.nan, 0.5], [math.inf, -math.inf], [limit, -limit], [0.0, 1.0]], device=DEVICE).to(dtype)
    gain, threshold = torch.full((4,), 1.125, device=DEVICE), torch.full((4,), 0.25, device=DEVICE)
    expected = w.clone()
    shrink_units_([expected], gain, threshold)
    shrink_units_([w], gain, threshold, seed=seed, backend="triton")
    torch.testing.assert_close(w[1:3], expected[1:3], rtol=1e-6, atol=0)
    assert w[0, 0].isnan()
    assert w[0, 1].isfinite()
    assert w[3, 0] == 0
    sums = unit_kernels.unit_sums([w])[0]
    assert sums[[0, 1, 3], 0].isfinite().tolist() == [False, False, True]  # two of the largest have no sum in float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, 1])
def test_a_unit_that_is_left_alone_keeps_its_bits(dtype, seed):
    ws = layers(dtype, [(300, 27), (5, BLOCK + 1)])
    # Triton's interpreter makes zeros of bfloat16's subnormal numbers.
    small = torch.finfo(dtype).tiny / (1 if dtype is torch.bfloat16 and not GPU else 4)
    for w in ws:
        w[0, :3] = torch.tensor([-0.0, small, math.inf])
    before = [w.clone() for w in ws]
    gain, threshold = some(305)
    shrink_units_(ws, gain, threshold, seed=seed, backend="triton")
    alone = ((gain == 1) & (threshold == 0)).cpu()
    for w, old, kept in zip(ws, before, torch.split(alone, [300, 5]), strict=True):
        same = (bits(w) == bits(old)).all(1).cpu()
        assert same[kept].all()
        assert not same[~kept].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [9, 3000])
def test_stochastic_rounding_is_unbiased_and_repeats(dtype, length):
    def rounded(seed):
        w = torch.full((18_000 // length, length), 0.7, device=DEVICE).to(dtype)
        gain = torch.full((len(w),), 0.9995, device=DEVICE)
        shrink_units_([w], gain, torch.zeros_like(gain), seed=seed, backend="triton")
        return w.double()

    exact = torch.tensor(0.7).to(dtype).double().item() * torch.tensor(0.9995).double().item()
    spacing = torch.finfo(dtype).eps / 2
    first = rounded(3)
    assert ((first - exact).abs() <= 1.0001 * spacing).all()
    assert abs(first.mean().item() - exact) <= 5 * spacing / math.sqrt(first.numel())
    assert torch.equal(first, rounded(torch.tensor(3, device=DEVICE)))
    assert not torch.equal(first, rounded(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_units_of_one_gain_are_a_layer_with_the_same_random_bits(dtype):
    of_units, of_layers = (layers(dtype, [(70, 50), (3, 5000), (9000,)]) for _ in range(2))
    gain, threshold = torch.tensor([1.1, 0.9, 1.2], device=DEVICE), torch.tensor([0.1, 0.2, 0.3], device=DEVICE)
    shrink_(of_layers, gain, threshold, seed=3, backend="triton")
    shrink_units_(of_units, spread(gain, of_units), spread(threshold, of_units), seed=3, backend="triton")
    assert all(map(torch.equal, of_units, of_layers))


def test_a_layer_of_one_unit_has_the_moments_of_a_layer():
    ws = layers(torch.float32, [(1, n) for n in (1, BLOCK + 1, kernels.SHRINK_CHUNK, 50_001)])
    torch.testing.assert_close(unit_moments(ws, backend="triton"), moments(ws, backend="triton"), rtol=3e-7, atol=0)


def test_gains_may_lie_anywhere_and_must_be_as_many_as_units():
    ones = torch.ones(4, 3, device=DEVICE)
    two = torch.tensor(2.0, device=DEVICE).expand(4)
    shrink_units_([ones], two, torch.zeros(8, device=DEVICE)[::2], backend="triton")
    assert (ones == 2).all()
    with pytest.raises(ValueError, match="got 3 gains and 4 thresholds for 4 units"):
        shrink_units_([ones], two[:3], two, backend="triton")


# --- index arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 3000, 2**13])
def test_more_than_two_to_the_31_weights_by_index_arithmetic(length):
    chunk = kernels.SHRINK_CHUNK
    far = -(-(2**31) // (chunk * length)) * chunk  # rows, whole programs of either kernel
    w = torch.randn(2, length, device=DEVICE)
    places = torch.tensor([length], device=DEVICE), torch.tensor([-far], device=DEVICE)
    ((launch, options),) = unit_kernels._sum_launches([w])
    sums = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    expected = unit_kernels.unit_sums([w])[0]
    first = torch.tensor([w.data_ptr() - far * length * w.element_size()], device=DEVICE)
    launch = launch._replace(
        pointers=first, table=torch.tensor([[far + 2], [-(far // options["ROWS"])]], device=DEVICE)
    )
    unit_kernels._unit_sum_kernel[(launch.programs,)](
        *launch.place, launch.rows, *places, None, math.inf, sums, ABOVE=False, **options
    )
    assert torch.equal(sums, expected)
    ((launch, each),) = unit_kernels._shrink_launches([w])
    table = torch.tensor([[(far + 2) * length], [-(far * length // launch.chunk)]], device=DEVICE)
    launch = launch._replace(pointers=first, table=table)
    gain, threshold = torch.tensor([1.5, 0.5], device=DEVICE), torch.tensor([0.2, 0.1], device=DEVICE)
    expected = torch.stack([plain_shrink(row, g, t) for row, g, t in zip(w, (1.5, 0.5), (0.2, 0.1), strict=True)])
    unit_kernels._unit_shrink_kernel[(launch.programs,)](
        *launch.place, launch.rows, *places, gain, threshold, math.inf, None,
        EACH=each, SPARES=False, STOCHASTIC=False, **launch.options,
    )  # fmt: skip
    torch.testing.assert_close(w, expected)


def test_a_row_of_more_than_two_to_the_31_weights_by_index_arithmetic():
    """The end of one row and the next row's beginning, which no block of theirs can mistake."""
    length = 2**31 + 2500
    start = 2**31 - kernels.SHRINK_CHUNK  # of the weights that exist
    border = length - start
    w = torch.randn(border + 1000, device=DEVICE)
    ((launch, each),) = unit_kernels._shrink_launches([w])
    launch = launch._replace(
        pointers=torch.tensor([w.data_ptr() - start * w.element_size()], device=DEVICE),
        table=torch.tensor([[start + len(w)], [-(start // launch.chunk)]], device=DEVICE),
    )
    places = torch.tensor([length], device=DEVICE), torch.tensor([0], device=DEVICE)
    gain, threshold = torch.tensor([1.5, 0.5], device=DEVICE), torch.tensor([0.2, 0.1], device=DEVICE)
    expected = torch.cat([plain_shrink(w[:border], 1.5, 0.2), plain_shrink(w[border:], 0.5, 0.1)])
    unit_kernels._unit_shrink_kernel[(launch.programs,)](
        *launch.place, launch.rows, *places, gain, threshold, math.inf, None,
        EACH=each, SPARES=False, STOCHASTIC=False, **launch.options,
    )  # fmt: skip
    torch.testing.assert_close(w, expected)


# --- whole steps -----------------------------------------------------------------------------------------------------


def stepped(backend, dtype=torch.float32, steps=3):
    ws = [nn.Parameter(w) for w in layers(dtype, [(8, 3, 3, 3), (20, 72), (2, 2500), (9,)])]
    ws[0].data = ws[0].data.to(memory_format=torch.channels_last)
    ws[1].data = ws[1].data.t().contiguous().t()
    opt = WCR(torch.optim.SGD(ws, lr=0.1, momentum=0.9), 1e-2, form="per_unit", backend=backend)
    for step in range(steps):
        for w in ws:
            w.grad = torch.cos(w.detach().float() * step).to(dtype)
        opt.step()
    return [w.detach() for w in ws], opt


def test_steps_equal_eager_ones():
    torch.testing.assert_close(stepped("triton")[0], stepped("eager")[0], rtol=1e-5, atol=1e-7)


def test_steps_on_bfloat16_repeat_with_the_counter_on_the_device():
    (found, opt), (again, _) = stepped("triton", torch.bfloat16), stepped("triton", torch.bfloat16)
    assert all(map(torch.equal, found, again))
    counter = opt.param_groups[0]["rounding_seed"]
    assert counter.device.type == DEVICE.type
    assert counter.item() == 3
