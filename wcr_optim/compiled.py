"""The CPU's kernels through torch.compile: each one pass over memory, on all cores."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from wcr_optim.layout import flat, is_dense
from wcr_optim.moments import eager_sums
from wcr_optim.rounding import Noise, saturate, stochastic_round
from wcr_optim.shrink import NARROW_CHUNK, eager_shrink_, make_noise, shrink_piece_

# Sums run in float32 over a row, whose few additions in each vector lane lose nothing, and in float64 over rows.
ROW = 128
# Weights of one call, which costs some 100 us: bounds the sums by row to half a mebibyte.
SLAB = 2**23
# Layers of fewer weights are left to the eager implementation, as a call costs too much.
LARGE = 2**17
Update = Callable[..., Any]


def why_not() -> str | None:
    """Return why nothing can be compiled here, or None where it can; tries, once."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return _why_not(os.environ.get("CXX", default))


@lru_cache(maxsize=4)
def _why_not(compiler: str) -> str | None:
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler {compiler!r}; install one, name one in CXX, or choose backend='eager'"
    probe = torch.ones(4, ROW)
    try:
        with torch.no_grad():
            _run(_sums, [probe])
            _run(_shrink, [probe.view(-1)], torch.tensor(1.0), torch.tensor(0.0))
    except Exception as error:  # whatever a toolchain can fail with, the eager implementation is there
        return f"torch.compile failed ({str(error).strip().splitlines()[0]}); choose backend='eager'"
    return None


def sums(parts: Sequence[Tensor]) -> Tensor:
    """Sum m = |w| and m^2 of plain CPU tensors, shape (layers, 2), float64."""
    result = torch.zeros(len(parts), 2, dtype=torch.float64)
    rest = [i for i, w in enumerate(parts) if not suits(w)]
    if rest:
        result[rest] = eager_sums([parts[i] for i in rest])
    pieces = _Pieces()
    for i, w in enumerate(parts):
        if suits(w):
            for slab in torch.split(flat(w), SLAB):
                whole, remainder = _rows([slab])
                if whole[0].numel():
                    pieces.add(i, _run(_sums, whole))
                if remainder[0].numel():
                    pieces.add(i, _sums(*remainder))
    return pieces.into(result)


def shrink_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None) -> None:
    """Apply w <- gain * softshrink(w, threshold) in place to plain CPU tensors."""
    noise = make_noise(parts, seed)
    g, t = gain.float(), threshold.float()
    rest = []
    for i, (w, *scalars) in enumerate(zip(parts, gain.tolist(), threshold.tolist(), strict=True)):
        if not suits(w) or (w.dtype != torch.float32 and noise is None):
            rest.append(i)
        elif scalars == [1.0, 0.0]:
            continue
        elif noise is None or w.dtype == torch.float32:
            for slab in torch.split(flat(w), SLAB):
                _run(_shrink, [slab], g[i], t[i])
        else:
            _shrink_and_round(w, g[i], t[i], noise)
    if rest:
        eager_shrink_([parts[i] for i in rest], gain[rest], threshold[rest], noise)


def adamw_(
    streams: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    maximize: bool,
    seed: int | Tensor | None,
) -> Tensor:
    """Shrink weights, take AdamW's step and measure the new weights, as `kernels.adamw_`, in float32."""
    constants = torch.tensor([-1.0 if maximize else 1.0, 1 - betas[0], betas[1], 1 - betas[1], eps])
    return _each_slab(_adamw, streams, coefficients, constants)


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
    """Shrink weights, take SGD's step and measure the new weights, as `kernels.sgd_`, in float32."""
    constants = torch.tensor([-1.0 if maximize else 1.0, weight_decay, momentum, 1 - dampening])
    return _each_slab(_sgd, streams, coefficients, constants, nesterov=nesterov)


def suits(w: Tensor) -> bool:
    """Return whether a layer gains from a compiled kernel."""
    return w.numel() >= LARGE and w.dtype in (torch.float32, torch.bfloat16) and is_dense(w)


def fuses(w: Tensor) -> bool:
    """Return whether a layer's update is worth fusing with its shrink."""
    return suits(w) and w.dtype == torch.float32


class _Pieces:
    """Sums of m and m^2 of pieces of layers, float64, brought together once."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.sums: list[Tensor] = []

    def add(self, layer: int, sums: tuple[Tensor, Tensor]) -> None:
        self.layers.append(layer)
        self.sums += sums

    def into(self, result: Tensor) -> Tensor:
        """Add every piece to its layer's row."""
        if not self.sums:
            return result
        return result.index_add_(0, torch.tensor(self.layers), torch.stack(self.sums).view(-1, 2))


def _rows(streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Cut flat tensors into rows of length ROW and what is left, one shorter row."""
    rows = streams[0].numel() // ROW
    whole = rows * ROW if rows > 1 else 0  # torch.compile would make kernels of their own for one row
    return [x[:whole].view(-1, ROW) for x in streams], [x[whole:].view(1, -1) for x in streams]


def _shrink_and_round(w: Tensor, gain: Tensor, threshold: Tensor, noise: Noise) -> None:
    memory = flat(w)
    rest = 0
    for slab in torch.split(memory, SLAB):
        rows = slab.numel() // NARROW_CHUNK
        if rows > 1:
            constants = torch.tensor([[noise.constant()] for _ in range(rows)], dtype=torch.int32)
            whole = slab[: rows * NARROW_CHUNK].view(rows, NARROW_CHUNK)
            _run(_shrink_rounding, [whole, constants], gain, threshold, noise.pool)
            rest += whole.numel()
    for piece in torch.split(memory[rest:], NARROW_CHUNK):
        shrink_piece_(piece, gain, threshold, None, noise)


def _each_slab(
    update: Update, streams: Sequence[Sequence[Tensor]], coefficients: Tensor, constants: Tensor, **kind: bool
) -> Tensor:
    """Run a fused update over layers, slab by slab, and return the sums of the new weights, shape (layers, 2)."""
    # A gain for every row, though a layer has but one, keeps the loop over rows apart from the loop within a row, so
    # that torch.compile makes one kernel of the update and the sums by row.
    gains = torch.empty(SLAB // ROW, 1)
    pieces = _Pieces()
    for i, layer in enumerate(zip(*streams, strict=True)):
        scalars = coefficients[i], constants
        gains.fill_(coefficients[i, 0])
        for slab in zip(*[torch.split(flat(x), SLAB) for x in layer], strict=True):
            whole, rest = _rows(slab)
            if rows := len(whole[0]):
                pieces.add(i, _run(update, [*whole, gains[:rows]], *scalars, **kind))
            if rest[0].numel():
                pieces.add(i, update(*rest, gains[:1], *scalars, **kind))
    return pieces.into(torch.zeros(len(coefficients), 2, dtype=torch.float64))


def _run(function: Update, rows: Sequence[Tensor], *others: Tensor, **kind: bool) -> Any:
    """Run a function compiled for any number of rows."""
    variant = function, rows[0].dtype, len(rows), *kind.items()
    if variant not in _begun:
        _begun.add(variant)
        for x in rows:
            torch._dynamo.mark_dynamic(x, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own parts
        return _compiled(function)(*rows, *others, **kind)


_begun: set[Hashable] = set()


@cache
def _compiled(function: Update) -> Update:
    # Scalars are tensors, so a changing lr compiles nothing anew; threads are counted when the kernel runs, since
    # torch.set_num_threads may be called after it was compiled.
    return torch.compile(function, options={"cpp.dynamic_threads": True})


# --- what is compiled, on tensors of shape (rows, ROW) ---------------------------------------------------------------


def _sums(w: Tensor) -> tuple[Tensor, Tensor]:
    m = w.float().abs()
    return m.sum(1).sum(dtype=torch.float64), m.square().sum(1).sum(dtype=torch.float64)


def _shrunk(w: Tensor, gain: Tensor, threshold: Tensor) -> Tensor:
    # The same as w - clamp(w) elsewhere, in instructions of which a processor needs fewer.
    return (torch.relu(w - threshold) - torch.relu(-w - threshold)) * gain


def _shrink(w: Tensor, gain: Tensor, threshold: Tensor) -> None:
    w.copy_(_shrunk(w, gain, threshold))


def _shrink_rounding(w: Tensor, constants: Tensor, gain: Tensor, threshold: Tensor, pool: Tensor) -> None:
    before = w.float()
    x = _shrunk(before, gain, threshold)
    w.copy_(saturate(stochastic_round(x, w.dtype, pool ^ constants), w.dtype, before))


def _adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, gains: Tensor, coefficients: Tensor, constants: Tensor
) -> tuple[Tensor, Tensor]:
    _, threshold, decay, step, root = coefficients.unbind()
    sign, rate1, beta2, rate2, eps = constants.unbind()
    w = _shrunk(p, gains, threshold)
    gradient = sign * g
    mean = m + (gradient - m) * rate1
    square = beta2 * v + rate2 * gradient * gradient
    w = w * decay - step * mean / (square.sqrt() * root + eps)
    p.copy_(w)
    m.copy_(mean)
    v.copy_(square)
    return _sums(w)


def _sgd(p: Tensor, g: Tensor, *others: Tensor, nesterov: bool) -> tuple[Tensor, Tensor]:
    *buffers, gains, coefficients, constants = others  # with no buffer, or one
    _, threshold, lr = coefficients.unbind()
    sign, weight_decay, momentum, fresh = constants.unbind()
    w = _shrunk(p, gains, threshold)
    direction = sign * g + weight_decay * w
    for buffer in buffers:
        mean = momentum * buffer + fresh * direction
        direction = direction + momentum * mean if nesterov else mean
        buffer.copy_(mean)
    w = w - lr * direction
    p.copy_(w)
    return _sums(w)
