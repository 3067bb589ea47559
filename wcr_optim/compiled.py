"""The CPU's compiled kernels: moments, shrink and fused steps of all layers in one call each, see native.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_optim import toolchain
from wcr_optim.layout import is_dense
from wcr_optim.moments import eager_sums
from wcr_optim.shrink import eager_shrink_, make_noise

DTYPES = (torch.float32, torch.bfloat16)


def why_not() -> str | None:
    """Return why the kernels cannot be compiled here, or None where they can; compiles them, the first time."""
    try:
        toolchain.load()
    except toolchain.BuildError as error:
        return str(error)
    return None


def fuses(w: Tensor) -> bool:
    """Return whether a layer's update can be fused with its shrink."""
    return w.dtype in DTYPES


def sums(parts: Sequence[Tensor]) -> Tensor:
    """Sum m = |w| and m^2 of plain CPU tensors, shape (layers, 2), float64."""
    result = torch.zeros(len(parts), 2, dtype=torch.float64)
    for dtype, index in _by_dtype(parts).items():
        layers = [parts[i] for i in index]
        if dtype is None:
            result[index] = eager_sums(layers)
        else:
            result[index] = _call("wcr_sums", [layers], returns=True)
    return result


def shrink_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None) -> None:
    """Apply w <- gain * softshrink(w, threshold) in place to plain CPU tensors."""
    for dtype, index in _by_dtype(parts).items():
        layers = [parts[i] for i in index]
        if dtype is None:
            eager_shrink_(layers, gain[index], threshold[index], make_noise(layers, seed))
        else:
            _call("wcr_shrink", [layers], gain[index].float(), threshold[index].float(), *_rounding(seed))
            _written(layers)


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
    constants = torch.tensor([-1.0 if maximize else 1.0, 1 - betas[0], betas[1], 1 - betas[1], eps])
    return _fused("wcr_adamw", streams, coefficients, constants, *_rounding(seed))


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
    constants = torch.tensor([-1.0 if maximize else 1.0, weight_decay, momentum, 1 - dampening])
    return _fused("wcr_sgd", streams, coefficients, constants, ctypes.c_int(nesterov), *_rounding(seed))


Argument = Tensor | ctypes.c_int | ctypes.c_uint64


def _fused(
    function: str, streams: Sequence[Sequence[Tensor]], coefficients: Tensor, constants: Tensor, *others: Argument
) -> Tensor:
    result = torch.empty(len(coefficients), 2, dtype=torch.float64)
    for index in _by_dtype(streams[0]).values():
        own = [[stream[i] for i in index] for stream in streams]
        result[index] = _call(function, own, coefficients[index], constants, *others, returns=True)
    _written(streams[0], *streams[2:])
    return result


def _by_dtype(parts: Sequence[Tensor]) -> dict[torch.dtype | None, list[int]]:
    """Group layers by dtype; None stands for those that the kernels cannot work on."""
    groups: dict[torch.dtype | None, list[int]] = {}
    for i, w in enumerate(parts):
        groups.setdefault(w.dtype if w.dtype in DTYPES and is_dense(w) else None, []).append(i)
    return groups


def _call(function: str, streams: Sequence[Sequence[Tensor]], *arguments: Argument, returns: bool = False) -> Tensor:
    """Call a function of the library on dense layers of one dtype; it may return their sums, shape (layers, 2)."""
    layers = streams[0]
    addresses = torch.tensor([[w.data_ptr() for w in stream] for stream in streams])
    sizes = torch.tensor([w.numel() for w in layers])
    result = torch.zeros(len(layers), 2, dtype=torch.float64)
    getattr(toolchain.load(), function)(
        ctypes.c_int64(len(layers)),
        _pointer(addresses),
        _pointer(sizes),
        ctypes.c_int(layers[0].dtype == torch.bfloat16),
        ctypes.c_int(torch.get_num_threads()),
        *[_pointer(argument) if isinstance(argument, Tensor) else argument for argument in arguments],
        *([_pointer(result)] if returns else []),
    )
    return result


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _rounding(seed: int | Tensor | None) -> tuple[ctypes.c_int, ctypes.c_uint64]:
    return ctypes.c_int(seed is not None), ctypes.c_uint64(0 if seed is None else int(seed))


def _written(*streams: Sequence[Tensor]) -> None:
    """Tell autograd, and whoever watches versions, that a kernel wrote into tensors."""
    for stream in streams:
        for w in stream:
            torch.autograd.graph.increment_version(w)
