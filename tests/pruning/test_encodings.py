"""The encodings against a decoder that walks element by element."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wcr_optim.pruning import encodings

ALL = tuple(encodings.PARTS)


def walk(encoding, parts, size):
    """The definition of each encoding, one element at a time."""
    if encoding == "dense":
        return list(parts["dense"])
    values = list(parts["values"])
    if encoding == "bitmask":
        return [values.pop(0) if parts["mask"][i // 8] >> i % 8 & 1 else 0 for i in range(size)]
    escape = {"gaps8": 255, "gaps16": 65535}[encoding]
    result = []
    for gap in parts["gaps"].tolist():
        result += [0] * gap
        if gap != escape:
            result.append(values.pop(0))
    assert not values
    assert 0 <= size - len(result) < escape
    return result + [0] * (size - len(result))


def runs(lengths, dtype=np.int32):
    """Zeros of the given lengths between ones, and zeros after the last of them."""
    zeros = [np.zeros(length, dtype) for length in lengths]
    one = np.ones(1, dtype)
    return np.concatenate([part for zero in zeros[:-1] for part in (zero, one)] + [zeros[-1]])


gap = st.integers(0, 20) | st.sampled_from([253, 254, 255, 256, 509, 510, 511, 765])
arrays = st.builds(
    lambda lengths, values: runs(lengths, values.dtype) * np.resize(values, sum(lengths) + len(lengths) - 1),
    st.lists(gap, min_size=1, max_size=12),
    st.builds(
        np.array, st.lists(st.integers(1, 100), min_size=1, max_size=7), st.sampled_from(["u1", "i2", "i4", "i8"])
    ),
)
false_sizes = st.integers(-600, 600) | st.sampled_from([2**40, 2**62])


@given(arrays)
def test_every_encoding_is_what_its_definition_says(bits):
    for encoding in ALL:
        parts = encodings.encode(bits, encoding)
        assert set(parts) == set(encodings.PARTS[encoding])
        assert walk(encoding, parts, bits.size) == bits.tolist()
        decoded = encodings.decode(encoding, parts, bits.size)
        assert decoded.dtype == bits.dtype
        assert np.array_equal(decoded, bits)


@given(arrays)
def test_predicted_sizes_are_the_stored_bytes(bits):
    sizes = encodings.sizes(bits)
    for encoding, size in sizes.items():
        assert size == sum(part.nbytes for part in encodings.encode(bits, encoding).values())
    left_out = set(ALL) - set(sizes)
    for encoding in left_out:
        assert sum(part.nbytes for part in encodings.encode(bits, encoding).values()) >= min(sizes.values())


@pytest.mark.parametrize("rest", [0, 1, 65533, 65534, 65535, 65536, 131070])
@pytest.mark.parametrize("first", [0, 65534, 65535, 65536, 131071])
def test_gaps_around_the_escape(first, rest):
    for bits in (runs([first, rest]), np.zeros(first + rest, np.int32)):
        parts = encodings.encode(bits, "gaps16")
        assert walk("gaps16", parts, bits.size) == bits.tolist()
        assert np.array_equal(encodings.decode("gaps16", parts, bits.size), bits)


@pytest.mark.parametrize(
    ("sparsity", "smallest"), [(0.0, "dense"), (0.5, "bitmask"), (0.95, "gaps8"), (0.99, "gaps8"), (0.999, "gaps16")]
)
def test_the_smallest_at_each_sparsity(sparsity, smallest):
    generator = np.random.default_rng(0)
    bits = (generator.random(200_000) >= sparsity).astype(np.int32)
    sizes = encodings.sizes(bits)
    assert min(sizes, key=sizes.get) == smallest
    if sparsity >= 0.99:
        assert sizes["gaps16"] < sizes["bitmask"]


@given(
    arrays, st.sampled_from(["bitmask", "gaps8", "gaps16"]), st.integers(-600, 600) | st.sampled_from([2**40, 2**62])
)
def test_a_false_size_is_refused(bits, encoding, change):
    parts = encodings.encode(bits, encoding)
    size = max(bits.size + change, 0)
    # The bytes leave the length open by fewer than one byte of a mask or one escape; what is left open are zeros.
    try:
        decoded = encodings.decode(encoding, parts, size)
    except ValueError:
        assert size != bits.size
    else:
        assert abs(size - bits.size) < {"bitmask": 8, "gaps8": 255, "gaps16": 65535}[encoding]
        common = min(size, bits.size)
        assert np.array_equal(decoded[:common], bits[:common])
        assert not decoded[common:].any()
        assert not bits[common:].any()


@pytest.mark.parametrize(
    ("encoding", "parts", "message"),
    [
        ("dense", {"dense": np.ones(9, np.int32)}, "9 stored elements for a tensor of 10"),
        ("bitmask", {"values": np.ones(1, np.int32), "mask": np.array([1], np.uint8)}, "a bitmask of 1 bytes"),
        ("bitmask", {"values": np.ones(2, np.int32), "mask": np.array([1, 4], np.uint8)}, "beyond the last"),
        ("bitmask", {"values": np.ones(1, np.int32), "mask": np.array([3, 0], np.uint8)}, "2 places for 1 values"),
        ("gaps8", {"values": np.ones(1, np.int32), "gaps": np.array([0, 0], np.uint8)}, "2 places for 1 values"),
        ("gaps8", {"values": np.ones(1, np.int32), "gaps": np.array([10], np.uint8)}, "account for 11"),
        ("gaps8", {"values": np.ones(0, np.int32), "gaps": np.array([255], np.uint8)}, "account for 255"),
        ("gaps16", {"values": np.ones(0, np.int32), "gaps": np.array([65535], np.uint16)}, "account for 65535"),
    ],
)
def test_parts_that_disagree_are_refused(encoding, parts, message):
    with pytest.raises(ValueError, match=message):
        encodings.decode(encoding, parts, 10)
