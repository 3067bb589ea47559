"""Which implementation of moments and shrink runs: torch's own kernels, compiled ones, or Triton's.

| backend | where | what |
|---|---|---|
| "eager" | anywhere | torch's kernels, on the CPU over chunks that stay in cache |
| "compiled" | CPU with a C++ compiler | all layers in one call: one read, one read and write |
| "triton" | CUDA with Triton | all layers in one launch, nothing waits for the device |
| "auto" | anywhere | "compiled" for large models on the CPU, "triton" for all but small ones on CUDA, else "eager" |

All give the same numbers up to rounding, of float32 weights down to 1e-18 and up to 1e16: beyond, their squares leave
float32, in which "eager" sums chunks, and it leaves the layer alone as one that is zero or infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module, util
from typing import Any, Protocol

import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "compiled", "triton")
MODULES = {"compiled": "wcr_optim.compiled", "triton": "wcr_optim.kernels"}
UNIT_MODULES = {"compiled": "wcr_optim.compiled", "triton": "wcr_optim.unit_kernels"}
# Compiling takes a second or two, once per process, and saves about half a fused AdamW step: some 10 ms a step at this
# many weights. Below it "auto" stays eager, so that nobody waits for a compiler to train a small network.
COMPILE_FROM = 2**25
# Triton's take two or three seconds, once per machine, as they are kept on disk, and a step on a GPU half the time or
# less.
TRITON_FROM = 2**20


class Implementation(Protocol):
    """What a backend other than "eager" provides, for plain tensors on one device."""

    def sums(self, parts: Sequence[Tensor]) -> Tensor:
        """Sum m = |w| and m^2, shape (layers, 2), float64."""
        ...

    def shrink_(self, parts: Sequence[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None) -> None:
        """Apply w <- gain * softshrink(w, threshold) in place."""
        ...

    def fuses(self, w: Tensor) -> bool:
        """Return whether a layer's update is worth fusing with its shrink."""
        ...

    def adamw_(self, streams: Sequence[Sequence[Tensor]], coefficients: Tensor, **options: Any) -> Tensor:
        """Shrink, take AdamW's step and return the sums of the new weights, shape (layers, 2), see `kernels.adamw_`."""
        ...

    def sgd_(self, streams: Sequence[Sequence[Tensor]], coefficients: Tensor, **options: Any) -> Tensor:
        """Shrink, take SGD's step and return the sums of the new weights, shape (layers, 2), see `kernels.sgd_`."""
        ...


class UnitImplementation(Protocol):
    """What a backend other than "eager" provides for the units of plain tensors on one device.

    A unit is an entry w[i] of a weight; those of all tensors follow each other.
    """

    def unit_sums(
        self, parts: Sequence[Tensor], threshold: Tensor | None = None, cutoff: float = math.inf
    ) -> list[Tensor]:
        """Sum m and m^2 over units, shape (units, 2) for each tensor, float64.

        m is |w|, or what a threshold leaves of it: max(|w| - threshold, 0) below the cutoff.
        """
        ...

    def shrink_units_(
        self,
        parts: Sequence[Tensor],
        gain: Tensor,
        threshold: Tensor,
        seed: int | Tensor | None,
        cutoff: float = math.inf,
    ) -> None:
        """Apply w[i] <- gain[i] * softshrink(w[i], threshold[i]) in place, without the threshold from the cutoff on."""
        ...


def implementation(backend: str) -> Implementation:
    """Return the module behind "compiled" or "triton"."""
    module: Implementation = import_module(MODULES[backend])
    return module


def unit_implementation(backend: str) -> UnitImplementation:
    """Return the module behind "compiled" or "triton" that works on units."""
    module: UnitImplementation = import_module(UNIT_MODULES[backend])
    return module


def check(backend: str) -> None:
    """Raise ValueError if there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(map(repr, BACKENDS))}")


def check_available(backend: str, device: torch.device) -> None:
    """Raise ValueError if a backend that was asked for by name cannot run on a device."""
    check(backend)
    if torch.compiler.is_compiling():
        return  # no backend runs in a graph of torch.compile, and none can be looked for from there
    reason = {"compiled": _why_not_compiled, "triton": _why_not_triton}.get(backend, lambda _: None)(device)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run on {device.type} weights here: {reason}")


def choose(backend: str, device: torch.device, layers: Sequence[Tensor]) -> str:
    """Decide between "eager", "compiled" and "triton" for layers on one device."""
    if backend != "auto":
        return backend
    if device.type == "cpu" and not torch.compiler.is_compiling():
        large = sum([w.numel() for w in layers]) >= COMPILE_FROM
        return "compiled" if large and _why_not_compiled(device) is None else "eager"
    # On ROCm Triton has to be asked for: none of this has run there.
    if device.type == "cuda" and torch.version.hip is None and not torch.compiler.is_compiling():
        large = sum([w.numel() for w in layers]) >= TRITON_FROM
        return "triton" if large and _why_not_triton(device) is None else "eager"
    return "eager"  # a graph of torch.compile gets plain operations to fuse


def _why_not_compiled(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it is for weights on the CPU; choose 'triton', or 'auto' for a model on several devices"
    from wcr_optim import compiled

    return compiled.why_not()


def _why_not_triton(device: torch.device) -> str | None:
    missing = _why_no_kernels()
    if missing is not None:
        return missing
    from wcr_optim import kernels

    return kernels.why_not(device)


@lru_cache(maxsize=1)
def _why_no_kernels() -> str | None:
    if util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton, or choose backend='eager'"
    try:
        import_module(MODULES["triton"])
    except Exception as error:  # whatever is wrong with the Triton that is there
        return f"Triton cannot be imported ({type(error).__name__}: {error}); choose backend='eager'"
    return None
