"""Sparse files: exact, small, whole, and read without trust."""

import copy
import json
import os
import tracemalloc

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from wcr_optim.files import WeightFileError, read_safetensors
from wcr_optim.pruning import sparse_file
from wcr_optim.pruning.sparse_file import encoded_size, is_sparse_file, load_sparse, read_sparse, save_sparse

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (torch.bool, torch.complex64, torch.float8_e4m3fnuz, torch.float8_e8m0fnu)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

in_a_shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(WIDTHS[tensor.element_size()])


def same_bits(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))


def same_state(a, b):
    return list(a) == list(b) and all(same_bits(a[name], b[name]) for name in a)


def pruned(*shape, sparsity=0.95, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return torch.where(torch.rand(*shape, generator=generator) < sparsity, torch.zeros(()), weight).to(dtype)


class Small(nn.Module):
    """One tensor of every encoding, no two of the same shape, a tie, and buffers of other kinds."""

    def __init__(self, seed=0):
        super().__init__()
        self.dense = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)))
        self.masked = nn.Parameter(pruned(20, 40, sparsity=0.6, seed=seed))
        self.gaps8 = nn.Parameter(pruned(50, 40, sparsity=0.95, seed=seed))
        self.gaps16 = nn.Parameter(pruned(3000, 41, sparsity=0.9999, seed=seed))
        self.tied = self.gaps8
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("flags", torch.arange(999) % 97 == 0)
        self.register_buffer("nothing", torch.zeros(4, 0))


def stored_encodings(path):
    table = json.loads(read_safetensors(path)[0]["tensors"])
    return {name: row.get("encoding", "tied") for name, row in table.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a sound file."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_sparse(Small(), path)
    return path.read_bytes()


# ---------------------------------------------------------------------------------------------------- round trips


def test_a_model_comes_back_bit_for_bit(path):
    model = Small()
    save_sparse(model, path)
    assert stored_encodings(path) == {
        "dense": "dense",
        "masked": "bitmask",
        "gaps8": "gaps8",
        "gaps16": "gaps16",
        "tied": "tied",
        "steps": "dense",
        "flags": "gaps8",
        "nothing": "dense",
    }
    state = read_sparse(path)
    assert same_state(state, model.state_dict())
    assert state["tied"].data_ptr() == state["gaps8"].data_ptr()
    other = Small(seed=1)
    identities = [id(parameter) for parameter in other.parameters()]
    assert load_sparse(other, path) is other
    assert same_state(other.state_dict(), model.state_dict())
    assert [id(parameter) for parameter in other.parameters()] == identities
    assert other.tied is other.gaps8
    assert is_sparse_file(path)


@given(data=st.data(), dtype=st.sampled_from((*FLOATS, *INTEGERS, *OTHERS)), size=st.integers(0, 700))
@in_a_shared_folder
def test_any_bits_of_any_dtype_come_back(tmp_path, data, dtype, size):
    width = torch.empty(0, dtype=dtype).element_size()
    # Random bytes hold NaNs of every payload, infinities, denormals and -0.0; most elements are zeroed.
    keep = data.draw(st.sampled_from([0.0, 0.004, 0.05, 0.5, 1.0]))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    raw = generator.integers(0, 2 if dtype == torch.bool else 256, (size, width), dtype=np.uint8)
    raw[generator.random(size) >= keep] = 0
    tensor = torch.from_numpy(raw.reshape(-1)).view(dtype).reshape(data.draw(st.sampled_from([(size,), (1, size, 1)])))
    path = tmp_path / "any.safetensors"
    save_sparse({"x": tensor, "y": tensor.clone()}, path)
    assert same_state(read_sparse(path), {"x": tensor, "y": tensor})


def test_a_view_that_is_conjugated_or_negated_later_is_stored_as_its_values(path):
    x = torch.tensor([[1 + 2j, 3 - 4j]])
    save_sparse({"conjugate": x.conj(), "imaginary": x.conj().imag}, path)
    read = read_sparse(path)
    assert torch.equal(read["conjugate"], torch.tensor([[1 - 2j, 3 + 4j]]))
    assert torch.equal(read["imaginary"], torch.tensor([[-2.0, 4.0]]))


@pytest.mark.parametrize("dtype", FLOATS[:4])
def test_special_values_survive_among_zeros(path, dtype):
    values = [-0.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).tiny, -torch.finfo(dtype).max]
    tensor = torch.zeros(3000, dtype=dtype)
    tensor[::500] = torch.tensor(values, dtype=dtype)
    tensor[7] = -torch.tensor(float("nan"), dtype=dtype)
    save_sparse({"x": tensor}, path)
    assert stored_encodings(path) == {"x": "gaps8"}
    read = read_sparse(path)["x"]
    assert same_bits(read, tensor)
    assert torch.signbit(read[0])


@pytest.mark.parametrize(
    "tensor", [torch.tensor(0.0), torch.tensor(-0.0), torch.tensor(True), torch.zeros(0), torch.zeros(2, 0, 3)]
)
def test_scalars_and_empty_tensors(path, tensor):
    save_sparse({"x": tensor}, path)
    assert same_bits(read_sparse(path)["x"], tensor)


def test_layouts_in_memory_do_not_matter(path):
    image = pruned(8, 16, 3, 3)
    state = {
        "transposed": pruned(60, 50).t(),
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "every_other": pruned(4000)[::2],
        "expanded": torch.ones(1).expand(500),
    }
    save_sparse(state, path)
    assert same_state(read_sparse(path), state)


def test_an_empty_state_and_names_of_any_kind(path):
    save_sparse({}, path)
    assert read_sparse(path) == {}
    state = {"": torch.ones(2), "mask/x": pruned(3000), "x": pruned(3000, seed=1), "__metadata__": torch.ones(3)}
    state['ü\n"{'] = torch.ones(1)
    save_sparse(state, path)
    assert same_state(read_sparse(path), state)


def test_views_of_one_storage_that_are_not_the_same_tensor(path):
    base = pruned(40, 40)
    state = {"base": base, "transposed": base.t(), "row": base[0], "again": base.view(40, 40), "half": base.view(1600)}
    save_sparse(state, path)
    assert stored_encodings(path)["again"] == "tied"
    read = read_sparse(path)
    assert same_state(read, state)
    assert read["half"].data_ptr() != read["base"].data_ptr()


def test_nothing_refers_to_the_file_afterwards(path):
    model = Small()
    save_sparse(model, path)
    state = read_sparse(path)
    size = path.stat().st_size
    path.write_bytes(b"\xff" * size)
    assert same_state(state, model.state_dict())


def test_networks_of_every_kind(path):
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    )
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        )
    )
    networks = (
        gpt2,
        llama,
        nn.LSTM(8, 16, num_layers=2, bidirectional=True),
        nn.MultiheadAttention(16, 2),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)),
    )
    for network in networks:
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(pruned(*parameter.shape))
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        save_sparse(network, path)
        other = copy.deepcopy(network)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.fill_(1.0)
        load_sparse(other, path)
        assert same_state(other.state_dict(), before)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    save_sparse(gpt2, path)
    assert stored_encodings(path)["lm_head.weight"] == "tied"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when torch.compile is first used
def test_names_are_those_of_the_plain_model(path):
    model = nn.Sequential(nn.Linear(4, 4))
    save_sparse(torch.compile(model), path)
    assert list(read_sparse(path)) == ["0.weight", "0.bias"]
    load_sparse(torch.compile(model), path)
    load_sparse(model, path)


# ----------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("sparsity", "dtype", "most"),
    [
        (0.9, torch.float32, 0.13),
        (0.95, torch.float32, 0.065),
        (0.99, torch.float32, 0.0145),
        (0.95, torch.bfloat16, 0.078),
    ],
)
def test_ratio_to_the_dense_file(path, sparsity, dtype, most):
    model = nn.Sequential(*(nn.Linear(768, 768) for _ in range(4)))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.copy_(pruned(768, 768, sparsity=sparsity, seed=i))
    model.to(dtype)
    save_sparse(model, path)
    dense = path.with_name("dense.safetensors")
    safetensors.torch.save_file(model.state_dict(), dense)
    assert path.stat().st_size <= most * dense.stat().st_size
    predicted = sum(encoded_size(tensor)[1] for tensor in model.state_dict().values())
    assert 0 <= path.stat().st_size - predicted < 4000


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("size", [64, 100])
def test_ratio_of_small_matrices_with_their_header(path, size, count):
    state = {f"layers.{i}.weight": pruned(size, size, sparsity=0.95, seed=i) for i in range(count)}
    save_sparse(state, path)
    dense = sum(tensor.nbytes for tensor in state.values())
    assert path.stat().st_size <= 0.09 * dense
    header = path.stat().st_size - sum(encoded_size(tensor)[1] for tensor in state.values())
    assert 200 * count <= header <= 200 + 300 * count


def test_a_dense_model_grows_by_no_more_than_the_header(path):
    tensor = torch.randn(1000, 100)
    save_sparse({"x": tensor}, path)
    assert path.stat().st_size < tensor.nbytes + 1000


def test_many_negative_zeros_are_pointed_out(path):
    weight = pruned(100, 100) * -1.0
    with pytest.warns(UserWarning, match=r"9\d{3} of 10000 elements are -0.0"):
        save_sparse({"x": weight}, path)
    assert same_bits(read_sparse(path)["x"], weight)
    save_sparse({"x": weight.add_(0.0)}, path)
    assert path.stat().st_size < 0.1 * weight.nbytes


# ---------------------------------------------------------------------------------------------------- strictness


def change(model, kind):
    if kind == "missing":
        model.register_buffer("another", torch.zeros(1))
    elif kind == "unexpected":
        del model.steps
    elif kind == "shape":
        model.gaps16 = nn.Parameter(torch.zeros(41, 3000))
    elif kind == "dtype":
        model.masked = nn.Parameter(model.masked.detach().bfloat16())
    elif kind == "tie":
        model.dense = nn.Parameter(torch.zeros(3000, 41))
        model.gaps16 = model.dense
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "it lacks another"),
        ("unexpected", "the model has no steps"),
        ("shape", r"gaps16 \(file torch.float32 \[3000, 41\], model torch.float32 \[41, 3000\]\)"),
        ("dtype", r"masked \(file torch.float32 \[20, 40\], model torch.bfloat16"),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(path, kind, message):
    save_sparse(Small(), path)
    model = change(Small(seed=1), kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightFileError, match=message):
        load_sparse(model, path)
    assert same_state(model.state_dict(), before)


def test_tensors_that_only_the_model_ties_must_be_equal(path):
    untied, tied = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    tied[1].weight = tied[0].weight
    save_sparse(untied, path)
    before = tied[0].weight.clone()
    with pytest.raises(WeightFileError, match=r"ties '1.weight' to '0.weight'"):
        load_sparse(tied, path)
    assert torch.equal(tied[0].weight, before)
    with torch.no_grad():
        untied[1].weight.copy_(untied[0].weight)
    save_sparse(untied, path)
    load_sparse(tied, path)
    assert torch.equal(tied[1].weight, untied[1].weight)
    save_sparse(tied, path)
    load_sparse(untied, path)
    assert untied[0].weight is not untied[1].weight


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"x": 3.0}, TypeError, "'x': float"),
        ({"x": torch.eye(2).to_sparse()}, ValueError, "layout torch.sparse_coo"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, ValueError, "dtype torch.complex128"),
        ({"x": torch.zeros(2, device="meta")}, ValueError, "meta device"),
        (nn.LazyLinear(3), ValueError, "not initialized"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(path, state, error, message):
    with pytest.raises(error, match=message):
        save_sparse(state, path)
    assert not path.exists()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_sharded_tensor_is_refused_with_the_way_to_gather_it(path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from wcr_optim.metrics import concentration

    rendezvous = f"file://{path.with_name('rendezvous')}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"'w' is sharded; gather the state with .*full_state_dict=True"):
            save_sparse({"w": sharded}, path)
        with pytest.raises(ValueError, match="w is sharded"):
            concentration({"w": sharded})
    finally:
        torch.distributed.destroy_process_group()
    assert not path.exists()


def test_a_model_without_memory_is_refused(path):
    save_sparse(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="to_empty"):
        load_sparse(nn.Linear(2, 2, device="meta"), path)


def test_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'wcr_optim\[files\]'"):
        save_sparse(nn.Linear(2, 2), path)


# ------------------------------------------------------------------------------------------------- damaged files


def outcome(raw, path):
    """The state of a model after loading the bytes, or None where they are refused."""
    path.write_bytes(raw)
    model = Small(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_sparse(model, path)
    except WeightFileError:
        assert same_state(model.state_dict(), before)
        with pytest.raises(WeightFileError):
            read_sparse(path)
        return None
    return model.state_dict()


@given(data=st.data())
@in_a_shared_folder
def test_changed_bytes_are_refused_or_without_effect(tmp_path, saved, data):
    raw = bytearray(saved)
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(raw) - 1))
        raw[place] ^= data.draw(st.integers(1, 255))
    state = outcome(bytes(raw), tmp_path / "changed")
    assert state is None or same_state(state, Small().state_dict())


@given(data=st.data())
@in_a_shared_folder
def test_truncated_extended_and_foreign_bytes_are_refused(tmp_path, saved, data):
    cut = data.draw(st.integers(0, len(saved) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=64))
    for raw in (saved[:cut], saved + junk, saved[:cut] + junk + saved[cut:], saved[cut:] if cut else junk, junk):
        assert outcome(raw, tmp_path / "changed") is None


def forge(saved, path, edit):
    """Rewrite a file with whatever ``edit(table, arrays)`` makes of it, and with the checksum that belongs to that."""
    path.write_bytes(saved)
    metadata, arrays = read_safetensors(path)
    arrays = {key: array.clone() for key, array in arrays.items()}
    table = json.loads(metadata["tensors"])
    text = edit(table, arrays)
    metadata["tensors"] = json.dumps(table) if text is None else text
    metadata["checksum"] = sparse_file._checksum(metadata["tensors"], arrays)
    forged = path.with_name("forged")
    safetensors.torch.save_file(arrays, forged, metadata=metadata)
    return forged.read_bytes()


extents = st.integers(0, 200) | st.sampled_from([2**31, 2**32 + 1, 2**62, 2**63, 2**64 + 1, 10**400])
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
fields = {
    "shape": st.lists(extents, max_size=4) | st.lists(st.integers(-3, 3) | st.booleans(), max_size=3) | anything,
    "dtype": st.sampled_from([*sparse_file._DTYPES, "complex64", "float33"]) | anything,
    "encoding": st.sampled_from(["dense", "bitmask", "gaps8", "gaps16", "gaps32"]) | anything,
    "same_as": st.sampled_from([*Small().state_dict(), "nobody"]) | anything,
}


@given(data=st.data())
@in_a_shared_folder
def test_a_forged_header_with_a_valid_checksum_gives_no_wrong_weight(tmp_path, saved, data):
    def edit(table, arrays):
        name = data.draw(st.sampled_from(list(table)))
        action = data.draw(st.sampled_from(["set", "add", "drop", "rename", "replace", "remove array"]))
        field = data.draw(st.sampled_from(list(fields)))
        if action == "set":
            table[name][field] = data.draw(fields[field])
        elif action == "add":
            table["new"] = {f: data.draw(fields[f]) for f in data.draw(st.sets(st.sampled_from(list(fields))))}
        elif action == "drop":
            table[name].pop(field, None)
        elif action == "rename":
            table["renamed"] = table.pop(name)
        elif action == "replace":
            table[name] = data.draw(anything)
        elif action == "remove array":
            arrays.pop(data.draw(st.sampled_from(list(arrays))))

    raw = forge(saved, tmp_path / "changed", edit)
    path = tmp_path / "changed"
    path.write_bytes(raw)
    model = Small(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original = Small().state_dict()
    try:
        load_sparse(model, path)
    except WeightFileError:
        assert same_state(model.state_dict(), before)
    else:
        assert same_state(model.state_dict(), original)
    tracemalloc.start()
    try:
        state = read_sparse(path)
    except WeightFileError:
        pass
    else:  # a sound file of another kind, no larger than its bytes
        assert sum(tensor.numel() for tensor in state.values()) < 2 * sum(
            tensor.numel() for tensor in original.values()
        )
    finally:
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()


@given(data=st.data())
@in_a_shared_folder
def test_forged_places_are_refused_or_keep_every_value(tmp_path, saved, data):
    def edit(table, arrays):
        key = data.draw(st.sampled_from([key for key in arrays if key.split("/")[0] in ("mask", "gaps", "values")]))
        array = arrays[key]
        action = data.draw(st.sampled_from(["element", "fill", "shorten", "lengthen", "dtype", "shape"]))
        if action == "element":
            if array.numel():
                array[data.draw(st.integers(0, array.numel() - 1))] = data.draw(st.integers(0, 127))
        elif action == "fill":
            array.view(torch.uint8).fill_(data.draw(st.sampled_from([0, 1, 127, 255])))
        elif action == "shorten":
            arrays[key] = array[: data.draw(st.integers(0, max(array.numel() - 1, 0)))].clone()
        elif action == "lengthen":
            arrays[key] = torch.cat([array, array[:1]])
        elif action == "dtype":
            arrays[key] = array.to(data.draw(st.sampled_from([torch.int8, torch.int32, torch.float64])))
        else:
            arrays[key] = array.unsqueeze(0)

    path = tmp_path / "changed"
    raw = forge(saved, path, edit)
    path.write_bytes(raw)
    try:
        state = read_sparse(path)
    except WeightFileError:
        return
    arrays = read_safetensors(path)[1]
    for name, tensor in Small().state_dict().items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape)
        values = arrays.get(f"values/{name}")
        if values is not None and bool((values != 0).all()):
            flat = state[name].reshape(-1)
            assert same_bits(flat[flat != 0], values)


def test_a_boolean_of_another_value_is_refused(tmp_path, saved):
    def edit(table, arrays):
        arrays["values/flags"].view(torch.uint8)[0] = 2

    path = tmp_path / "changed"
    path.write_bytes(forge(saved, path, edit))
    with pytest.raises(WeightFileError, match="neither 0 nor 1"):
        read_sparse(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "Expecting value"),
        ("[]", "named tensors"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "damaged"),
        ('{"x": 1}', "named tensors"),
        ('{"x": {"same_as": "x"}}', "same as 'x'"),
        ('{"x": {"same_as": "y"}, "y": {"same_as": "x"}}', "same as 'y'"),
        ('{"x": {"shape": [1], "shape": [2], "dtype": "int8", "encoding": "dense"}}', "occurs twice"),
        ('{"x": {"shape": [' + "9" * 5000 + '], "dtype": "int8", "encoding": "dense"}}', "damaged"),
        ('{"x": {"shape": [4294967296, 4294967296], "dtype": "int8", "encoding": "dense"}}', "64 bits"),
        ('{"x": {"shape": [0, 4294967296, 4294967296], "dtype": "int8", "encoding": "dense"}}', "64 bits"),
    ],
)
def test_tables_that_make_no_sense(tmp_path, saved, table, message):
    path = tmp_path / "changed"
    path.write_bytes(forge(saved, path, lambda *_: table))
    with pytest.raises(WeightFileError, match=message):
        read_sparse(path)


@pytest.mark.parametrize("encoding", ["bitmask", "gaps8", "gaps16"])
@pytest.mark.parametrize("shape", [[2**40], [2**31, 2**31], [2**62]])
def test_a_huge_shape_allocates_nothing(tmp_path, saved, encoding, shape):
    def edit(table, arrays):
        name = {"bitmask": "masked"}.get(encoding, encoding)
        table[name]["shape"] = shape

    path = tmp_path / "changed"
    path.write_bytes(forge(saved, path, edit))
    for limit in (None, 2**63):  # beyond the limit, and with the limit out of the way
        tracemalloc.start()
        with pytest.raises(WeightFileError):
            read_sparse(path, max_elements=limit)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**23
    with pytest.raises(WeightFileError, match="does not fit"):
        load_sparse(Small(), path)


def test_a_small_file_of_many_zeros_needs_consent(path):
    # 300 million zeros in 9 kilobytes: sound, but more than so few bytes may stand for without being asked.
    save_sparse({"x": torch.zeros(1, dtype=torch.int8)}, path)
    metadata, _ = read_safetensors(path)
    size = 300_000_000
    arrays = {
        "values/x": torch.zeros(0, dtype=torch.int8),
        "gaps/x": torch.full((size // 65535,), -1, dtype=torch.int16),
    }
    metadata["tensors"] = json.dumps({"x": {"shape": [size], "dtype": "int8", "encoding": "gaps16"}})
    metadata["checksum"] = sparse_file._checksum(metadata["tensors"], arrays)
    safetensors.torch.save_file(arrays, path, metadata=metadata)
    assert path.stat().st_size < 10_000
    with pytest.raises(WeightFileError, match="stands for 300000000 elements, more than 268435456; pass max_elements"):
        read_sparse(path)


def test_other_files_are_told_apart(path, saved):
    safetensors.torch.save_file({"x": torch.ones(2)}, path)
    assert not is_sparse_file(path)
    with pytest.raises(WeightFileError, match="not a sparse file"):
        read_sparse(path)
    with pytest.raises(WeightFileError, match="not a regular file"):
        read_sparse(path.parent)
    with pytest.raises(FileNotFoundError):
        read_sparse(path.parent / "nowhere")
    path.write_bytes(saved.replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(WeightFileError, match="version '2' of the format, this wcr_optim reads '1'"):
        read_sparse(path)
    path.write_bytes(saved.replace(b'"sha256:', b'"sha257:'))
    with pytest.raises(WeightFileError, match="checksum"):
        read_sparse(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(path):
    os.mkfifo(path)
    with pytest.raises(WeightFileError, match="not a regular file"):
        read_sparse(path)


# ------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("stage", ["write", "replace", "interrupt"])
def test_a_failure_leaves_the_old_file(path, monkeypatch, stage):
    save_sparse(Small(), path)
    old = path.read_bytes()

    def fail(*arguments, **options):
        if stage == "write":  # as a full disk does, half way through
            with open(arguments[1], "wb") as file:
                file.write(b"half")
            raise safetensors.SafetensorError("No space left on device")
        raise KeyboardInterrupt if stage == "interrupt" else PermissionError("replace")

    if stage == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(KeyboardInterrupt if stage == "interrupt" else OSError):
        save_sparse(Small(seed=1), path)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_and_links_stay(path):
    umask = os.umask(0o022)
    try:
        save_sparse(Small(), path)
        assert path.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(umask)
    path.chmod(0o600)
    link = path.with_name("latest")
    link.symlink_to(path)
    save_sparse(nn.Linear(2, 2), link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(read_sparse(path)) == ["weight", "bias"]


def test_a_model_that_cannot_be_written_is_left_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    save_sparse(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / "x.safetensors")
    with torch.inference_mode():
        model[1].weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1\.weight was made under torch\.inference_mode"):
        load_sparse(model, tmp_path / "x.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
