"""Checkpoints as named tensors, without the model that they belong to and without running anything they contain."""

from __future__ import annotations

import os
import pickle
import re
import stat
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from wcr_optim.files import WeightFileError, check_uncompressed, read_safetensors
from wcr_optim.parameters import DTYPES, LORA, memory
from wcr_optim.pruning import sparse_file

PICKLES = (".pt", ".pth", ".bin")

# Views of one stored tensor can claim any number of elements in a file of a few bytes. Real checkpoints come near their
# own size, or to a few times of it where layers share their weights under several names.
_BYTES_PER_BYTE = 64
_ALWAYS_ALLOWED = 2**28

# What training scripts call the model's part of a checkpoint, most specific first.
_STATE_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params")

# Matrices that are no weights of a linear map, by the last part of their name: biases, norms, embeddings, tables,
# masks, scales of quantized weights, low-rank adapters. "wte" and "wpe" are GPT-2's embeddings, "shared" is T5's.
_DENSE_NAME = re.compile(
    r"(^|_)(bias|norm|layernorm|batchnorm|ln|bn|embed|embeds|embedd?ings?|emb|embedder|tokens?|pe|wte|wpe|shared|table"
    r"|mask|scales?|zeros|qzeros|lora)(_|\d|$)",
    re.IGNORECASE,
)


def read_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of a checkpoint.

    A ``.safetensors`` file may be dense or of `wcr_optim.pruning.save_sparse`. A ``.pt``, ``.pth`` or ``.bin`` file is
    read by ``torch.load(weights_only=True)``, which builds tensors and plain containers and runs no code; a state dict
    inside a dict of a training script is found. Its tensors may take 64 times the file's bytes together, and at least
    2**28 bytes: more than that, claimed by views of few stored numbers, no training script writes.

    Args:
        path: The file.
        key: Which entry of the file's dict holds the state dict, "outer.inner" for one within another; None looks for
            it (default: None)

    Returns:
        CPU tensors by name, those that share memory in the file still sharing it, and notices of what was left out.

    Raises:
        WeightFileError: If the file is damaged, of an unknown kind, holds objects that only code could rebuild,
            holds no state dict or several, or claims more than it stores.
        ValueError: If a tensor is of a kind that `wcr_optim.pruning.save_sparse` cannot store.
        OSError: If it cannot be read.
        ImportError: If it is a safetensors file and safetensors is not installed.
    """
    state, notices = _read(path, key)
    return {name: sparse_file.plain(name, tensor) for name, tensor in state.items()}, notices


def prunable_names(state: Mapping[str, Tensor], exclude: Iterable[str] = (), *, strict: bool = True) -> list[str]:
    """Select the weights of a state dict that are pruned, by name and shape, as no module tells what they are.

    These are the floating-point tensors of at least two dimensions, unless the last part of their name (before
    ``.weight``) speaks of a bias, a norm, an embedding, a table, a mask, scales or a low-rank adapter. A tensor that
    has several names is selected once, by its first name, and only if none of the names leaves it out. Where the
    architecture is at hand, `wcr_optim.pruning.prunable_weights` knows better.

    Args:
        state: Tensors by name.
        exclude: Regular expressions that are searched in the full names of what to leave out (default: ())
        strict: Refuse a tensor that a weight is only computed from; False leaves it out (default: True)

    Returns:
        Names, in the order of the state dict.

    Raises:
        ValueError: If an expression is invalid or matches no name, or if weights are under ``torch.nn.utils.prune``, a
            parametrization, or an old weight norm or spectral norm.
    """
    patterns = []
    for expression in exclude:
        try:
            patterns.append(re.compile(expression))
        except re.error as error:
            raise ValueError(f"exclude is not a regular expression: {expression!r}: {error}") from error
        if not any(patterns[-1].search(name) for name in state):
            raise ValueError(f"exclude matches no name: {expression!r}; `wcr-optim inspect` lists them")
    names: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in state.items():
        reason = _factor(name, state)
        if reason is not None:
            if strict and not any(pattern.search(name) for pattern in patterns):
                raise ValueError(f"{name!r} {reason} and save again, or leave it out: --exclude '{re.escape(name)}'")
            continue
        if tensor.ndim >= 2 and tensor.dtype in DTYPES and tensor.numel():
            names.setdefault(memory(tensor), []).append(name)
    return [
        places[0]
        for places in names.values()
        if not any(_named_dense(name) or any(pattern.search(name) for pattern in patterns) for name in places)
    ]


def _factor(name: str, state: Mapping[str, Tensor]) -> str | None:
    """Say what a weight is computed from this tensor by, and the way out; None if it may be a weight itself."""
    stem, _, suffix = name.rpartition("_")
    if suffix == "orig" and f"{stem}_mask" in state:
        return "is under torch.nn.utils.prune; make its mask permanent with torch.nn.utils.prune.remove,"
    if suffix == "orig" and f"{stem}_u" in state:
        return "is the factor of a spectral norm; call torch.nn.utils.remove_spectral_norm,"
    if re.search(r"(^|\.)parametrizations\.\w+\.original\d*$", name):
        return "is parametrized; call torch.nn.utils.parametrize.remove_parametrizations,"
    if suffix in ("g", "v") and {f"{stem}_g", f"{stem}_v"} <= state.keys():
        lengths, directions = state[f"{stem}_g"], state[f"{stem}_v"]
        if lengths.numel() == max(lengths.shape, default=1) < directions.numel():  # one for each row, or for all
            return "is the factor of a weight norm; call torch.nn.utils.remove_weight_norm,"
    return None


def _named_dense(name: str) -> bool:
    parts = name.split(".")
    own = parts[-2] if len(parts) > 1 and parts[-1] == "weight" else parts[-1]
    return _DENSE_NAME.search(own) is not None or any(LORA.search(part) for part in parts)


def _read(path: str | os.PathLike[str], key: str | None) -> tuple[dict[str, Tensor], list[str]]:
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        if key is not None:
            raise WeightFileError(f"{os.fspath(path)!r} holds tensors only and no entry {key!r}")
        if sparse_file.is_sparse_file(path):
            return sparse_file.read_sparse(path), []
        return read_safetensors(path)[1], []
    if suffix not in PICKLES:
        known = ", ".join((".safetensors", *PICKLES))
        raise WeightFileError(f"{os.fspath(path)!r} is of an unknown kind; the suffix has to be one of {known}")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise WeightFileError(f"{os.fspath(path)!r} is not a regular file")
    with open(path, "rb"):  # the usual OSError if it may not be read
        pass
    state, notices = _state_dict(os.fspath(path), _unpickled(path), key)
    _check_size(path, state)
    return state, notices


def _check_size(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    # Every name counts, as a dense file gets a copy for each.
    claimed = {name: t.numel() * t.element_size() for name, t in state.items() if t.layout is torch.strided}
    allowed = max(_ALWAYS_ALLOWED, _BYTES_PER_BYTE * os.path.getsize(path))
    if sum(claimed.values()) > allowed:
        largest = max(claimed, key=claimed.__getitem__)
        raise WeightFileError(
            f"refused {os.fspath(path)!r}: it has {os.path.getsize(path)} bytes and its tensors claim "
            f"{sum(claimed.values())}, of which {largest!r} {claimed[largest]}; store its tensors with contiguous()"
        )


def _unpickled(path: str | os.PathLike[str]) -> object:
    check_uncompressed(path)
    # torch's own messages advise to load the file without protection: they are not passed on.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class) (\w+(?:\.\w+)+)", str(error))
        what = f"an object of {found[1]}" if found else "something else than tensors and plain containers"
        raise WeightFileError(
            f"refused {os.fspath(path)!r}: it holds {what}, which only running its code could rebuild; none was run. "
            "If you trust its source, load it there and save the state dict alone, best as safetensors"
        ) from error
    except Exception as error:  # a damaged file can fail in every way that a parser can
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightFileError(f"{os.fspath(path)!r} is damaged or not a file of torch.save: {reason}") from error


def _state_dict(path: str, loaded: object, key: str | None, place: str = "") -> tuple[dict[str, Tensor], list[str]]:
    """Find the state dict in what a file holds, or in the entry at a place of it."""
    if not isinstance(loaded, Mapping):
        raise WeightFileError(f"{path!r} holds a {type(loaded).__name__}, not a state dict")
    if key is not None:
        return _state_dict(path, _entry(path, loaded, key), None, f"{key}.")
    state = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    inner = {name: value for name, value in loaded.items() if isinstance(value, Mapping) and _has_tensors(value)}
    chosen = next((name for name in _STATE_KEYS if name in inner), None)
    if chosen is None and state:  # numbers of a training script may be tensors, too, beside its model's state dict
        others = [str(name) for name in loaded if name not in state]
        return state, [f"left out: {_listed(others)}"] if others else []
    if chosen is None and len(inner) == 1:
        (chosen,) = inner
    if chosen is None:
        places = [f"{place}{name}" for name in inner]
        several = f"several, {_listed(places)}; choose one with --key" if inner else f"none, but {_listed(loaded)}"
        raise WeightFileError(f"{path!r} should hold one state dict; it holds {several if loaded else 'an empty dict'}")
    state, notices = _state_dict(path, inner[chosen], None, f"{place}{chosen}.")
    rest = [str(name) for name in loaded if name != chosen]
    return state, [f"read {chosen!r}" + (f", left out {_listed(rest)}" if rest else ""), *notices]


def _entry(path: str, loaded: Mapping[object, object], key: str) -> Mapping[object, object]:
    """Return the mapping at a key, of which dots may lead into mappings within mappings."""
    found = loaded.get(key)
    if isinstance(found, Mapping):
        return found
    outer, _, rest = key.partition(".")
    within = loaded.get(outer)
    if rest and isinstance(within, Mapping):
        return _entry(f"{path}: {outer}", within, rest)
    raise WeightFileError(f"{path!r} has no state dict {key!r}; its entries are {_listed(loaded)}")


def _has_tensors(value: Mapping[object, object]) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, Mapping) and _has_tensors(v)) for v in value.values())


def _listed(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "") or "nothing"
