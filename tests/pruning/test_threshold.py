"""The search for the largest magnitudes, against a sort of all weights brought together."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wcr_optim.pruning import patterns, search, stream_masks
from wcr_optim.pruning.search import RankSearch, find_cuts
from wcr_optim.pruning.threshold import Keeper, keep_masks

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def reference(tensors, sparsity):
    """Sort all magnitudes, largest first and equal ones by position, and keep the first so many."""
    magnitudes = torch.cat([tensor.reshape(-1).double().abs() for tensor in tensors.values()])
    order = magnitudes.argsort(descending=True, stable=True)
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[: len(order) - round(sparsity * len(order))]] = True
    masks, start = {}, 0
    for name, tensor in tensors.items():
        masks[name] = keep[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return masks


def assert_same(masks, expected):
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        assert mask.dtype is torch.bool
        assert torch.equal(mask, expected[name]), name


@st.composite
def weights(draw):
    """A few tensors of any dtypes, with ties, zeros of both signs, subnormals and infinities, in any memory layout."""
    tensors = {}
    for index in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
        size = math.prod(shape)
        kind = draw(st.sampled_from(["any", "tied", "few", "spread"]))
        seed = draw(st.integers(0, 2**32 - 1))
        random = np.random.default_rng(seed)
        values = {
            "any": lambda random=random, size=size: random.standard_normal(size),
            "tied": lambda random=random, size=size: np.full(size, random.choice([0.0, -0.0, 1.0, -3.5, np.inf])),
            "few": lambda random=random, size=size: random.choice([0.0, -0.0, 1e-45, 2.0, -2.0, np.inf], size),
            "spread": lambda random=random, size=size: 2.0 ** random.uniform(-150, 120, size),
        }[kind]()
        tensor = torch.from_numpy(values).view(shape).to(dtype)
        if tensor.ndim == 4 and draw(st.booleans()):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        elif tensor.ndim >= 2 and draw(st.booleans()):
            tensor = tensor.transpose(0, 1)
        tensors[f"w{index}"] = tensor
    return tensors


@settings(max_examples=300, deadline=None)
@given(weights(), SPARSITIES, st.sampled_from([1, 3, 251]), st.sampled_from([8, 2**18]))
def test_equals_the_sort(tensors, sparsity, step, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_SAMPLE_STEP", step)
        patch.setattr(search, "_SAMPLE_SIZE", size)
        assert_same(keep_masks(tensors, sparsity), reference(tensors, sparsity))


@settings(max_examples=100, deadline=None)
@given(weights(), SPARSITIES)
def test_by_layer_equals_the_sort_of_each(tensors, sparsity):
    expected = {name: reference({name: tensor}, sparsity)[name] for name, tensor in tensors.items()}
    assert_same(keep_masks(tensors, sparsity, "layer"), expected)


@settings(max_examples=100, deadline=None)
@given(weights(), st.lists(SPARSITIES, min_size=1, max_size=5))
def test_many_sparsities_at_once_equal_one_by_one(tensors, sparsities):
    together = find_cuts(tensors.items, sparsities)
    assert together == [find_cuts(tensors.items, [sparsity])[0] for sparsity in sparsities]


@settings(max_examples=100, deadline=None)
@given(weights(), st.tuples(SPARSITIES, SPARSITIES))
def test_a_higher_sparsity_keeps_a_subset(tensors, sparsities):
    low, high = sorted(sparsities)
    more, fewer = keep_masks(tensors, low), keep_masks(tensors, high)
    for name in tensors:
        assert not (fewer[name] & ~more[name]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.999, 1.0])
def test_tensors_of_many_chunks(dtype, sparsity):
    tensors = {
        "a": torch.randn(300, 401).to(dtype),
        "b": (torch.randn(64, 32, 7, 7) / 8).to(dtype).to(memory_format=torch.channels_last),
        "c": torch.randn(90, 1000).to(dtype).t(),
        "d": torch.randn(100_001).round(decimals=1).to(dtype),  # mostly tied
    }
    assert_same(keep_masks(tensors, sparsity), reference(tensors, sparsity))


@pytest.mark.parametrize("value", [0.0, -1.5, math.inf])
def test_all_tied_keeps_the_first_ones(value):
    tensors = {"a": torch.full((3, 7), value), "b": torch.full((50_000,), value, dtype=torch.bfloat16)}
    masks = keep_masks(tensors, 0.9)
    kept = 50_021 - round(0.9 * 50_021)
    assert masks["a"].all()
    assert masks["b"][: kept - 21].all()
    assert not masks["b"][kept - 21 :].any()


@settings(max_examples=100, deadline=None)
@given(weights(), SPARSITIES, st.sampled_from(["global", "layer"]))
def test_the_way_of_other_devices_is_the_same(tensors, sparsity, scope):
    """With torch's operations instead of numpy's, as on an accelerator."""
    expected = keep_masks(tensors, sparsity, scope)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_uses_numpy", lambda tensor: False)
        patch.setattr(patterns, "_DEVICE_CHUNK", 64)
        patch.setattr(patterns, "_CPU_CHUNK", 16)
        assert_same(keep_masks(tensors, sparsity, scope), expected)


def test_a_misleading_sample_costs_passes_and_no_accuracy(monkeypatch):
    weights = torch.rand(100_000) + 1
    monkeypatch.setattr(search, "_SAMPLE_STEP", 100)
    weights[::100] *= 1e-6  # what the sample sees is far below everything else
    for sparsity in (0.001, 0.3, 0.9, 0.99999):
        assert_same(keep_masks({"w": weights}, sparsity), reference({"w": weights}, sparsity))
    weights[::100] *= 1e12
    for sparsity in (0.001, 0.3, 0.9, 0.99999):
        assert_same(keep_masks({"w": weights}, sparsity), reference({"w": weights}, sparsity))


def test_values_are_compared_exactly_across_dtypes():
    """Each float32 lies between two float64 neighbours that round to it."""
    middle = torch.tensor([1 / 3], dtype=torch.float32)
    above = middle.double() * (1 + 2**-40)
    below = middle.double() * (1 - 2**-40)
    tensors = {"below": below, "middle": middle, "above": above}
    assert [bool(mask) for mask in keep_masks(tensors, 1 / 3).values()] == [False, True, True]
    assert [bool(mask) for mask in keep_masks(tensors, 2 / 3).values()] == [False, False, True]


def test_the_count_is_pythons_round():
    for total in (1, 2, 3, 5, 10, 101):
        for sparsity in (0.0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.0):
            kept = int(keep_masks({"w": torch.randn(total)}, sparsity)["w"].sum())
            assert kept == total - round(sparsity * total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_nan_is_refused_by_name(dtype, sparsity, scope):
    spoiled = torch.randn(200, 300).to(dtype)
    spoiled[150, 7] = math.nan
    with pytest.raises(ValueError, match="second holds NaN"):
        keep_masks({"first": torch.randn(5).to(dtype), "second": spoiled}, sparsity, scope)


def test_nan_with_any_payload_is_refused():
    for bits in (0x7F80_0001, 0x7FC0_0000, -1, -0x0080_0000 + 1):
        spoiled = torch.ones(10)
        spoiled.view(torch.int32)[3] = bits
        assert spoiled.isnan().any()
        with pytest.raises(ValueError, match="w holds NaN"):
            keep_masks({"w": spoiled}, 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0001, math.nan, math.inf])
def test_a_sparsity_outside_zero_and_one_is_refused(sparsity):
    with pytest.raises(ValueError, match=rf"sparsity must lie in \[0, 1\], got {sparsity!r}"):
        keep_masks({"w": torch.ones(3)}, sparsity)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="'global' or 'layer', got 'row'"):
        keep_masks({"w": torch.ones(3)}, 0.5, "row")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e5m2])
def test_what_is_no_float_is_refused(dtype):
    with pytest.raises(TypeError, match="magnitudes are ranked for"):
        keep_masks({"w": torch.ones(3).to(dtype)}, 0.5)


def test_nothing_to_rank():
    assert keep_masks({}, 0.5) == {}
    assert keep_masks({"w": torch.zeros(0, 3)}, 0.5)["w"].shape == (0, 3)


def test_the_weights_are_only_read():
    weights = torch.randn(1000, requires_grad=True)
    before, version = weights.detach().clone(), weights._version
    keep_masks({"w": weights}, 0.5)
    assert torch.equal(weights, before)
    assert weights._version == version


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_of_parts_add_up(dtype):
    """Two searches, each over a part of the weights, that only exchange their counts."""
    parts = [{"a": torch.randn(1000)}, {"b": torch.randn(50, 60).round(decimals=1)}]
    sparsities = [0.1, 0.5, 0.99]
    states = [RankSearch(sparsities, dtype) for _ in parts]
    while not states[0].done:
        for state, part in zip(states, parts, strict=True):
            for name, tensor in part.items():
                state.count(name, tensor)
        total = sum(state.counts for state in states)
        for state in states:
            state.counts[:] = total
            state.advance()
    whole = parts[0] | parts[1]
    assert states[0].cuts() == states[1].cuts()
    for cut, expected in zip(states[0].cuts(), find_cuts(whole.items, sparsities), strict=True):
        assert (cut.threshold, cut.kept, cut.ties, cut.ties_kept) == (
            expected.threshold,
            expected.kept,
            expected.ties,
            expected.ties_kept,
        )


def test_weights_that_vanish_during_a_search():
    state = RankSearch([0.9])
    state.count("w", torch.rand(100_000) * 2.0**-100)
    state.advance()
    assert not state.done
    state.advance()  # finds nothing in the window and looks above it
    with pytest.raises(ValueError, match="weights were counted where there were 100,000 before"):
        state.advance()


def test_cuts_of_an_unfinished_search():
    with pytest.raises(RuntimeError, match="not done"):
        RankSearch([0.5]).cuts()


# ------------------------------------------------------------------------------------------------------------ streams


def made_on_the_fly(count=20, shape=(30, 41)):
    """Tensors that are made when asked for; none of them is held here."""
    for index in range(count):
        yield f"layer{index}", torch.randn(shape, generator=torch.Generator().manual_seed(index))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95, 1.0])
def test_a_stream_equals_the_same_tensors_together(scope, sparsity):
    masks = stream_masks(made_on_the_fly, sparsity, scope)
    assert_same(dict(masks), keep_masks(dict(made_on_the_fly()), sparsity, scope))


def test_one_tensor_of_a_stream_is_alive_at_a_time():
    import weakref

    alive = weakref.WeakSet()
    most = 0

    class Counted(torch.Tensor):
        pass

    def stream():
        for _, tensor in made_on_the_fly():
            yield make(tensor)

    def make(tensor):
        nonlocal most
        alive.add(counted := tensor.as_subclass(Counted))
        most = max(most, len(alive))
        return str(id(counted)), counted

    for scope in ("global", "layer"):
        names = iter(range(10**6))
        stream_masks(lambda names=names: ((f"{next(names) % 20}", tensor) for _, tensor in stream()), 0.5, scope)
    assert most <= 2  # the generator here holds one itself


def test_a_stream_that_changes_is_refused():
    calls = iter(range(10))

    def renamed():
        prefix = next(calls)
        return ((f"{prefix}.{name}", tensor) for name, tensor in made_on_the_fly())

    with pytest.raises(ValueError, match="where it had"):
        stream_masks(renamed, 0.5)

    def of_lengths(lengths):
        remaining = iter(lengths)
        return lambda: made_on_the_fly(next(remaining, lengths[-1]))

    for scope in ("global", "layer"):
        passes = itertools.count(1)
        stream_masks(lambda passes=passes: made_on_the_fly(20 + 0 * next(passes)), 0.9, scope)
        before_the_last = [20] * (next(passes) - 2)
        for lengths in ([*before_the_last, 19], [*before_the_last, 21], [20, 3], [5, 20]):
            with pytest.raises(ValueError, match="the stream"):
                stream_masks(of_lengths(lengths), 0.9, scope)


def test_keeper_yields_flat_pieces_in_row_major_order():
    weights = torch.randn(40, 30).t()
    (cut,) = find_cuts({"w": weights}.items, [0.5])
    pieces = torch.cat(list(Keeper(cut)(weights)))
    assert torch.equal(pieces, reference({"w": weights}, 0.5)["w"].reshape(-1))
