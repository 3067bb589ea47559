"""The CPU's compiled kernels: moments, shrink and fused steps of all layers, or all units, in one call each.

They are in native.cpp.

torch.compile's kernels of the same passes take longer in memory and some 30 us to call, once for every layer;
docs/speed.md has the comparison.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wcr_optim import eager, eager_units
from wcr_optim.eager_units import number_of_units, of_layers
from wcr_optim.layout import has_address, holds_rows_together, is_dense

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("c++", "g++", "clang++")
# Loops are vectorised for the processor at hand. Results stay IEEE's: a NaN is a NaN, and sums keep their order.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
X86_FLAGS = ("-mprefer-vector-width=512",)
PATIENCE = 120.0  # seconds for a compiler that takes two
ROW = 1024  # weights, as in native.cpp
BLOCK = 16 * ROW
DTYPES = (torch.float32, torch.bfloat16)
NO_CUTOFF = ctypes.c_float(math.inf)


class Layers(ctypes.Structure):
    """Dense layers of one dtype, as in native.cpp."""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("count", "blocks", "threads", "narrow")],
        *[
            (name, ctypes.c_void_p)
            for name in ("addresses", "sizes", "lengths", "first", "first_unit", "partial", "sums")
        ],
    )


def why_not() -> str | None:
    """Return why the kernels cannot be compiled here, or None where they can; compiles them, the first time."""
    library = _library(os.environ.get("CXX"))
    return library if isinstance(library, str) else None


def fuses(w: Tensor) -> bool:
    """Return whether a layer's update can be fused with its shrink."""
    return w.dtype in DTYPES and is_dense(w) and has_address(w)


def sums(parts: Sequence[Tensor]) -> Tensor:
    """Sum m = |w| and m^2 of plain CPU tensors, shape (layers, 2), float64."""
    result = torch.zeros(len(parts), 2, dtype=torch.float64, device="cpu")
    for dtype, index in _by_dtype(parts).items():
        layers = [parts[i] for i in index]
        result[index] = eager.sums(layers) if dtype is None else _call("wcr_sums", [layers], None, NO_CUTOFF)
    return result


def shrink_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None) -> None:
    """Apply w <- gain * softshrink(w, threshold) in place to plain CPU tensors."""
    for dtype, index in _by_dtype(parts).items():
        layers = [parts[i] for i in index]
        if dtype is None:
            eager.shrink_(layers, gain[index], threshold[index], seed)
        else:
            _writes(layers)
            _call("wcr_shrink", [layers], *_rounding(seed), gain[index].float(), threshold[index].float(), NO_CUTOFF)


def unit_sums(parts: Sequence[Tensor], threshold: Tensor | None = None, cutoff: float = math.inf) -> list[Tensor]:
    """Sum m = |w| and m^2 over every unit w[i] of plain CPU tensors, shape (units, 2) for each, float64.

    With a threshold for every unit m is what it leaves of |w|: max(|w| - threshold, 0) below the cutoff.
    """
    sizes = [number_of_units(w) for w in parts]
    result: dict[int, Tensor] = {}
    for dtype, index in _by_dtype(parts, _works_on_units).items():
        layers, units = [parts[i] for i in index], [sizes[i] for i in index]
        bounds = None if threshold is None else of_layers(threshold, sizes, index)
        if dtype is None:
            own = eager_units.unit_sums(layers, bounds, cutoff)
        else:
            bounds = None if bounds is None else bounds.float().contiguous()
            own = list(torch.split(_call("wcr_sums", [layers], bounds, ctypes.c_float(cutoff), units=units), units))
        result.update(zip(index, own, strict=True))
    return [result[i] for i in range(len(parts))]


def shrink_units_(
    parts: Sequence[Tensor],
    gain: Tensor,
    threshold: Tensor,
    seed: int | Tensor | None,
    cutoff: float = math.inf,
) -> None:
    """Apply w[i] <- gain[i] * softshrink(w[i], threshold[i]) in place to every unit of plain CPU tensors.

    From the cutoff on without the threshold.
    """
    sizes = [number_of_units(w) for w in parts]
    for dtype, index in _by_dtype(parts, _works_on_units).items():
        layers, units = [parts[i] for i in index], [sizes[i] for i in index]
        g, t = (of_layers(values, sizes, index) for values in (gain, threshold))
        if dtype is None:
            eager_units.shrink_units_(layers, g, t, seed, cutoff)
        else:
            _writes(layers)
            factors, bounds = (x.float().contiguous() for x in (g, t))
            _call("wcr_shrink", [layers], *_rounding(seed), factors, bounds, ctypes.c_float(cutoff), units=units)


def adamw_(
    streams: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    maximize: bool,
    seed: int | Tensor | None,
) -> Tensor:
    """Shrink weights, take AdamW's step and measure the new weights, as `kernels.adamw_`."""
    constants = [-1.0 if maximize else 1.0, 1 - betas[0], betas[1], 1 - betas[1], eps]
    return _fused("wcr_adamw", streams, coefficients, constants, seed)


def sgd_(
    streams: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    *,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    seed: int | Tensor | None,
) -> Tensor:
    """Shrink weights, take SGD's step and measure the new weights, as `kernels.sgd_`."""
    constants = [-1.0 if maximize else 1.0, weight_decay, momentum, 1 - dampening, float(nesterov)]
    return _fused("wcr_sgd", streams, coefficients, constants, seed)


def _fused(
    function: str,
    streams: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    constants: Sequence[float],
    seed: int | Tensor | None,
) -> Tensor:
    result = torch.zeros(len(coefficients), 2, dtype=torch.float64, device="cpu")
    numbers = torch.tensor(constants, dtype=torch.float32, device="cpu")
    _writes(streams[0], *streams[2:])
    for index in _by_dtype(streams[0]).values():
        own = [[stream[i] for i in index] for stream in streams]
        result[index] = _call(function, own, *_rounding(seed), coefficients[index], numbers)
    return result


def _by_dtype(
    parts: Sequence[Tensor], works_on: Callable[[Tensor], bool] = fuses
) -> dict[torch.dtype | None, list[int]]:
    """Group layers by dtype; None stands for those that the kernels cannot work on."""
    groups: defaultdict[torch.dtype | None, list[int]] = defaultdict(list)
    for i, w in enumerate(parts):
        groups[w.dtype if works_on(w) else None].append(i)
    return groups


def _works_on_units(w: Tensor) -> bool:
    return fuses(w) and holds_rows_together(w)


def _call(
    function: str, streams: Sequence[Sequence[Tensor]], *arguments: Any, units: Sequence[int] | None = None
) -> Tensor:
    """Call a function of the library on dense layers of one dtype.

    Args:
        function: Its name.
        streams: The layers, and what else belongs to each of them.
        arguments: What the function takes beside the layers.
        units: How many each layer has; None makes each layer one unit (default: None).

    Returns:
        The sums that the function leaves, shape (units, 2).

    """
    layers = streams[0]
    units = [1] * len(layers) if units is None else units
    numbers = [w.numel() for w in layers]
    lengths = [max(1, n // max(1, u)) for n, u in zip(numbers, units, strict=True)]
    *first, blocks = accumulate(map(_blocks, numbers, lengths), initial=0)
    *first_unit, rows = accumulate(units, initial=0)
    addresses = [[w.data_ptr() for w in stream] for stream in streams]
    # Nothing that C++ reads may follow torch's default device or dtype.
    tables = [
        torch.tensor(table, dtype=torch.int64, device="cpu")
        for table in (addresses, numbers, lengths, first, first_unit)
    ]
    partial, result = (torch.zeros(n, 2, dtype=torch.float64, device="cpu") for n in (blocks, rows))
    pointers = [table.data_ptr() for table in (*tables, partial, result)]
    described = Layers(len(layers), blocks, torch.get_num_threads(), layers[0].dtype == torch.bfloat16, *pointers)
    library = _library(os.environ.get("CXX"))
    if isinstance(library, str):
        raise RuntimeError(library)
    pointed = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
    getattr(library, function)(ctypes.byref(described), *pointed)
    return result


def _blocks(number: int, length: int) -> int:
    """Count the blocks of a layer with units of some length, as Cut in native.cpp does."""
    together = max(1, ROW // length) * length
    group = max(1, BLOCK // together) * together
    return -(-number // group) * -(-group // BLOCK)


def _rounding(seed: int | Tensor | None) -> tuple[ctypes.c_int, ctypes.c_uint64]:
    return ctypes.c_int(seed is not None), ctypes.c_uint64(0 if seed is None else int(seed))


def _writes(*streams: Sequence[Tensor]) -> None:
    """Tell autograd, and whoever watches versions, that a kernel is about to write into tensors.

    Before it does: Ctrl-C comes as soon as it returns, and must not leave written tensors that pass for untouched.
    """
    for stream in streams:
        for w in stream:
            torch.autograd.graph.increment_version(w)


@lru_cache(maxsize=4)
def _library(compiler: str | None) -> ctypes.CDLL | str:
    """Compile native.cpp and load it, or return why not; `compiler` is CXX, which torch's own extensions heed too."""
    commands = [_split(compiler)] if compiler else [[name] for name in COMPILERS]
    command = next((c for c in commands if c and shutil.which(c[0])), None)
    if command is None:
        named = repr(compiler) if compiler else "among " + ", ".join(COMPILERS)
        return f"there is no C++ compiler {named}; install one, name one in CXX, or choose backend='eager'"
    name = " ".join(command)
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    try:
        # A folder of its own, gone once the library is loaded: nothing stale, nothing that others put there.
        with tempfile.TemporaryDirectory(prefix="wcr_optim-", ignore_cleanup_errors=True) as folder:
            library = str(Path(folder, "native.so"))
            subprocess.run(
                [*command, *flags, str(SOURCE), "-o", library],
                capture_output=True, text=True, errors="replace", check=True, timeout=PATIENCE,
            )  # fmt: skip
            return ctypes.CDLL(library)
    except subprocess.CalledProcessError as error:
        return f"{name} failed: {_complaint(error.stderr)}; name another compiler in CXX, or choose backend='eager'"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{name} makes no library that loads: {error}; choose backend='eager'"


def _split(compiler: str) -> list[str]:
    """Split CXX into a command and its arguments; it can also be a path, with blanks or backslashes in it."""
    try:
        return [compiler] if shutil.which(compiler) else shlex.split(compiler)
    except ValueError:  # a quotation that does not end
        return [compiler]


def _complaint(stderr: str) -> str:
    """Return the first line of a compiler's output that names an error."""
    lines = stderr.strip().splitlines() or ["it says nothing"]
    return next((line for line in lines if "error" in line), lines[0]).strip()
