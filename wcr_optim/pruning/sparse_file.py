"""A pruned network in a small file.

The file is an ordinary safetensors file. Every tensor is stored as its kept values and their places, in whichever of
the `encodings` is smallest for it, and its metadata holds four strings:

    format    "wcr_optim.sparse"
    version   "1"
    tensors   JSON: {name: {"shape": [...], "dtype": "float32", "encoding": "gaps8"} or {"same_as": other name}}
    checksum  "sha256:" + hex digest over version, tensors and every stored array

The arrays of tensor ``x`` are called ``dense/x``, or ``values/x`` and ``mask/x`` or ``gaps/x``. Gaps of 16 bits are
stored as I16 and read as unsigned, because not every supported version of safetensors knows U16.

Reading trusts nothing. The header, the names, types and lengths of all arrays, their agreement with the model, and the
checksum are verified in this order; only then is a tensor of its full size made, and never one larger than the stored
bytes account for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wcr_optim.files import WeightFileError, check_shape, read_safetensors, write_safetensors
from wcr_optim.layout import as_dtensor
from wcr_optim.parameters import memory, unwrapped
from wcr_optim.pruning import encodings
from wcr_optim.pruning.apply import check_writable

Module = TypeVar("Module", bound=nn.Module)

FORMAT = "wcr_optim.sparse"
VERSION = "1"

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.complex64, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []),  # from torch 2.7 on
    )
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLACES = {"mask": torch.uint8, "gaps8": torch.uint8, "gaps16": torch.int16}

# What one more array costs in the header; below this saving a dense array is the smaller choice, and the readable one.
_HEADER_ENTRY = 128

# Streams of 16-bit gaps are the only encoding that may stand for more elements than this per byte of the file.
_ELEMENTS_PER_BYTE = 256
_ALWAYS_ALLOWED = 2**28


class _Entry(NamedTuple):
    """A tensor as the header describes it; ``same_as`` names the tensor whose memory it shares, if any."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: str
    same_as: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def save_sparse(model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a model's state as kept values and their places.

    Kept is every element whose bit pattern is not zero, so that `load_sparse` restores the state bit for bit, ``-0.0``
    and NaN payloads included. Tensors that share their memory are stored once. Buffers, integers and dense tensors are
    stored too; the file replaces the dense checkpoint. Large fp32 matrices at 90 / 95 / 99 % sparsity take 0.125 /
    0.063 / 0.013 of their dense bytes. The header adds some 200 bytes to a file and 200 to 300 a tensor: at 95 %
    a file stays below 0.09 of the dense bytes where its matrices have 64 x 64 weights or more.

    The file appears at ``path`` complete or not at all: it is written beside it and moved there.

    Args:
        model: A module, or a state dict. Tensors of any device; sharded ones (DTensor) have to be gathered first.
        path: Where to write, by custom ``*.safetensors``. An existing file is replaced.

    Raises:
        ValueError: If a tensor is not a plain dense one (sharded, sparse, quantized, complex, on the meta device).
        TypeError: If the state holds something other than tensors.
        ImportError: If safetensors is not installed.

    Warns:
        UserWarning: If more than one element in a hundred (and in all a thousand) is ``-0.0``, which costs as much as
            any other value. Multiplying by a mask leaves ``-0.0`` wherever the weight was negative.
    """
    state = _plain_state(model)
    entries: dict[str, _Entry] = {}
    arrays: dict[str, Tensor] = {}
    owners: dict[tuple[object, ...], str] = {}
    negative_zeros = 0
    for name, tensor in state.items():
        owner = owners.setdefault(memory(tensor), name)
        if owner != name:
            entries[name] = entries[owner]._replace(same_as=owner)
            continue
        flat = tensor.cpu().contiguous().reshape(-1)
        encoding, _ = _smallest(flat)
        entries[name] = _Entry(tuple(tensor.shape), tensor.dtype, encoding)
        arrays |= _encode(name, tensor, flat, encoding)
        if tensor.is_floating_point():
            bits = _bits(flat).numpy()
            negative_zeros += int(np.count_nonzero(bits.view(f"u{bits.itemsize}") == 1 << (8 * bits.itemsize - 1)))
    elements = sum(entry.numel for entry in entries.values() if entry.same_as is None)
    if negative_zeros > max(1000, elements // 100):
        warnings.warn(
            f"{negative_zeros} of {elements} elements are -0.0 and are kept, as the file is exact bit for bit; "
            "if they are pruned weights, `weight.add_(0.0)` makes them +0.0, which takes no space",
            stacklevel=2,
        )
    table = json.dumps({name: _to_json(entry) for name, entry in entries.items()}, separators=(",", ":"))
    metadata = {"format": FORMAT, "version": VERSION, "tensors": table, "checksum": _checksum(table, arrays)}
    write_safetensors(arrays, path, metadata)


def load_sparse(model: Module, path: str | os.PathLike[str]) -> Module:
    """Load a file of `save_sparse` into a model, bit for bit, or change nothing.

    Names, shapes and dtypes have to agree exactly, and tensors that the model ties have to be equal in the file.

    Args:
        model: A module of the same architecture, on any device.
        path: The file.

    Returns:
        The model, for chaining.

    Raises:
        WeightFileError: If the file is damaged or does not fit the model; the model is as before.
        ValueError: If a tensor of the model cannot be written, as one that was made under ``torch.inference_mode()``;
            the model is as before.
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is not installed.
    """
    target = _plain_state(model)
    for name, tensor in target.items():
        check_writable(name, tensor)
    entries, arrays, metadata = _open(path)
    _check_fit(path, entries, target)
    _check_content(path, metadata, arrays)
    state = _decode(entries, arrays)
    tied: dict[tuple[object, ...], str] = {}
    for name, tensor in target.items():
        owner = tied.setdefault(memory(tensor), name)
        if owner != name and not torch.equal(_bits(state[name].reshape(-1)), _bits(state[owner].reshape(-1))):
            raise WeightFileError(
                f"the model ties {name!r} to {owner!r}, but they differ in the file; untie them first"
            )
    unwrapped(model).load_state_dict(state, strict=True)
    return model


def read_sparse(path: str | os.PathLike[str], *, max_elements: int | None = None) -> dict[str, Tensor]:
    """Read a file of `save_sparse` as a dense state dict.

    Tied tensors come back as one tensor under several names. Nothing refers to the file afterwards.

    Args:
        path: The file.
        max_elements: The most elements that the tensors may have together (default: 256 for every byte of the file, and
            at least 2**28). Only tensors that are nearly empty can reach the default: a file of a few kilobytes may
            stand for gigabytes of zeros.

    Returns:
        Tensors on the CPU by name, in the order of the state that was saved.

    Raises:
        WeightFileError: If the file is damaged, of another kind, or larger than ``max_elements``.
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is not installed.
    """
    entries, arrays, metadata = _open(path)
    if max_elements is None:
        max_elements = max(_ALWAYS_ALLOWED, _ELEMENTS_PER_BYTE * os.path.getsize(path))
    elements = sum(entry.numel for entry in entries.values() if entry.same_as is None)
    if elements > max_elements:
        raise WeightFileError(
            f"{os.fspath(path)!r} stands for {elements} elements, more than {max_elements}; "
            "pass max_elements to read_sparse, or load it into a model, if you trust it"
        )
    _check_content(path, metadata, arrays)
    return _decode(entries, arrays)


def is_sparse_file(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file claims to be of this format; dense ones do not.

    Args:
        path: A safetensors file.

    Returns:
        True if it has this format's metadata; whether it is sound, reading will tell.

    Raises:
        WeightFileError: If it is not a safetensors file at all.
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is not installed.
    """
    return read_safetensors(path)[0].get("format") == FORMAT


def encoded_size(tensor: Tensor) -> tuple[str, int]:
    """How `save_sparse` would store a tensor.

    Args:
        tensor: Any plain dense tensor.

    Returns:
        The encoding's name and the bytes of its arrays, without the file's header (some 100 bytes per array).
    """
    return _smallest(plain("tensor", tensor).cpu().contiguous().reshape(-1))


# ------------------------------------------------------------------------------------------------------- tensors


def _plain_state(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = unwrapped(model).state_dict() if isinstance(model, nn.Module) else model
    return {name: plain(name, value) for name, value in state.items()}


def plain(name: str, value: object) -> Tensor:
    """Return the tensor without its graph, or raise an error that says why it cannot be stored."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise TypeError(f"a sparse file holds named tensors only, got {name!r}: {type(value).__name__}")
    if is_lazy(value):
        raise ValueError(f"{name!r} is not initialized yet; run the model once first")
    if as_dtensor(value) is not None:
        raise ValueError(
            f"{name!r} is sharded; gather the state with torch.distributed.checkpoint.state_dict.get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True)) and pass that"
        )
    if value.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no values; use model.to_empty(device=...) first")
    if value.layout != torch.strided or value.is_nested or value.dtype not in _DTYPES.values():
        raise ValueError(f"{name!r} cannot be stored: layout {value.layout}, dtype {value.dtype}")
    return value.detach().resolve_conj().resolve_neg()  # views that are lazily so have other bits than values


def _bits(flat: Tensor) -> Tensor:
    return flat.view(_BITS[flat.element_size()])


def _smallest(flat: Tensor) -> tuple[str, int]:
    sizes = encodings.sizes(_bits(flat).numpy())
    encoding = min(sizes, key=sizes.__getitem__)
    if sizes["dense"] <= sizes[encoding] + _HEADER_ENTRY:
        encoding = "dense"
    return encoding, sizes[encoding]


def _encode(name: str, tensor: Tensor, flat: Tensor, encoding: str) -> dict[str, Tensor]:
    arrays = {}
    for part, array in encodings.encode(_bits(flat).numpy(), encoding).items():
        if part in ("mask", "gaps"):
            dtype = _PLACES[encoding if part == "gaps" else part]
            arrays[f"{part}/{name}"] = torch.from_numpy(array).view(dtype)
        else:
            stored = torch.from_numpy(array).view(tensor.dtype)
            arrays[f"{part}/{name}"] = stored.reshape(tensor.shape) if part == "dense" else stored
    return arrays


def _decode(entries: Mapping[str, _Entry], arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if entry.same_as is not None:
            continue
        parts = {}
        for part in encodings.PARTS[entry.encoding]:
            array = _bits(arrays[f"{part}/{name}"].reshape(-1)).numpy()
            parts[part] = array.view("<u2") if part == "gaps" and entry.encoding == "gaps16" else array
        try:
            bits = encodings.decode(entry.encoding, parts, entry.numel)
            if entry.dtype == torch.bool and bits.max(initial=0) > 1:
                raise ValueError("a boolean is neither 0 nor 1")
        except ValueError as error:
            raise WeightFileError(f"{name!r} is damaged: {error}") from error
        state[name] = torch.from_numpy(bits).view(entry.dtype).reshape(entry.shape)
    return {name: state[entry.same_as or name] for name, entry in entries.items()}


# --------------------------------------------------------------------------------------------------------- files


def _open(path: str | os.PathLike[str]) -> tuple[dict[str, _Entry], dict[str, Tensor], dict[str, str]]:
    """Open a sparse file and check it as far as its header alone allows."""
    metadata, arrays = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise WeightFileError(
            f"{os.fspath(path)!r} is not a sparse file of wcr_optim; its metadata name no such format"
        )
    if metadata.get("version") != VERSION:
        raise WeightFileError(
            f"{os.fspath(path)!r} has version {metadata.get('version')!r} of the format, this wcr_optim reads "
            f"{VERSION!r}; a newer wcr_optim may read it"
        )
    try:
        entries = _parse(metadata.get("tensors", ""))
        _check_arrays(entries, arrays)
    except (ValueError, RecursionError) as error:
        raise WeightFileError(f"{os.fspath(path)!r} is damaged: {error}") from error
    return entries, arrays, metadata


def _parse(table: str) -> dict[str, _Entry]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice in its table")
        return result

    rows = json.loads(table, object_pairs_hook=unique)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError("its table is not one of named tensors")
    entries = {name: _entry(name, row) for name, row in rows.items() if set(row) != {"same_as"}}
    for name, row in rows.items():
        if name not in entries:
            owner = row["same_as"]
            if not isinstance(owner, str) or set(rows.get(owner, {"same_as"})) == {"same_as"}:
                raise ValueError(f"{name!r} is the same as {owner!r}, which it does not hold")
            entries[name] = entries[owner]._replace(same_as=owner)
    return {name: entries[name] for name in rows}  # in the order in which they were saved


def _entry(name: str, row: dict[str, Any]) -> _Entry:
    if set(row) != {"shape", "dtype", "encoding"}:
        raise ValueError(f"the entry of {name!r} has the fields {sorted(row)}")
    shape, dtype, encoding = row["shape"], row["dtype"], row["encoding"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if not isinstance(encoding, str) or encoding not in encodings.PARTS:
        raise ValueError(f"{name!r} has the unknown encoding {encoding!r}")
    # type() rather than isinstance: True is an int, too.
    if not isinstance(shape, list) or not all(type(extent) is int and extent >= 0 for extent in shape):
        raise ValueError(f"{name!r} has the impossible shape {shape!r}")
    check_shape(repr(name), shape)
    return _Entry(tuple(shape), _DTYPES[dtype], encoding)


def _check_arrays(entries: Mapping[str, _Entry], arrays: Mapping[str, Tensor]) -> None:
    """Exactly the arrays of the table are there, with the right types and dimensions."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {}
    for name, entry in entries.items():
        if entry.same_as is None:
            for part in encodings.PARTS[entry.encoding]:
                dtype = _PLACES.get(entry.encoding if part == "gaps" else part, entry.dtype)
                expected[f"{part}/{name}"] = dtype, entry.shape if part == "dense" else None
    if different := sorted(expected.keys() ^ arrays.keys()):
        raise ValueError(f"its table and its arrays disagree about {_some(different)}")
    for key, (dtype, shape) in expected.items():
        array = arrays[key]
        if array.dtype != dtype or (tuple(array.shape) != shape if shape is not None else array.ndim != 1):
            raise ValueError(f"{key!r} is stored as {array.dtype} {tuple(array.shape)}, which its table does not say")


def _check_fit(path: str | os.PathLike[str], entries: Mapping[str, _Entry], target: Mapping[str, Tensor]) -> None:
    problems = []
    if missing := sorted(target.keys() - entries.keys()):
        problems.append(f"it lacks {_some(missing)}")
    if unexpected := sorted(entries.keys() - target.keys()):
        problems.append(f"the model has no {_some(unexpected)}")
    wrong = [
        f"{name} (file {entry.dtype} {list(entry.shape)}, model {target[name].dtype} {list(target[name].shape)})"
        for name, entry in entries.items()
        if name in target and (entry.dtype, entry.shape) != (target[name].dtype, tuple(target[name].shape))
    ]
    if wrong:
        problems.append(f"these differ: {_some(wrong)}")
    if problems:
        raise WeightFileError(f"{os.fspath(path)!r} does not fit the model: {'; '.join(problems)}")


def _check_content(path: str | os.PathLike[str], metadata: Mapping[str, str], arrays: Mapping[str, Tensor]) -> None:
    if metadata.get("checksum") != _checksum(metadata["tensors"], arrays):
        raise WeightFileError(f"{os.fspath(path)!r} is damaged: its content does not match its checksum")


def _checksum(table: str, arrays: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {VERSION} {table}".encode())
    for key in sorted(arrays):
        array = arrays[key]
        digest.update(f"\n{key} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(_bits(array.reshape(-1)).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _to_json(entry: _Entry) -> dict[str, object]:
    if entry.same_as is not None:
        return {"same_as": entry.same_as}
    return {"shape": entry.shape, "dtype": str(entry.dtype).removeprefix("torch."), "encoding": entry.encoding}


def _some(names: Sequence[str]) -> str:
    """Name a few, for an error message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
