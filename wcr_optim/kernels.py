# ruff: noqa: N803, N806, SIM300  (Triton writes constants of a kernel in capitals)
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
"""Triton kernels behind moments, shrink and the fused optimizers: many tensors in one launch.

A launch works on one dtype. Its table says where every tensor lies, and each program takes a chunk of one of them, so a
network of a thousand layers is one launch like that of a single one. Sums are accumulated in float32 within a program
and in float64, in a fixed order, over programs: no atomics, so equal weights give equal bits. Nothing waits for the
device, and step lengths, seeds and steps are read there, so a CUDA graph replays with live values.

With TRITON_INTERPRET=1, set before this module is imported, everything runs on the CPU as well, slowly.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcr_optim import eager
from wcr_optim.layout import flat, has_address, in_memory_order
from wcr_optim.uploads import keep, on, pointers_to, select, upload

BLOCK = 512  # weights at a time, four for each of a program's threads
CHUNK = 8 * BLOCK  # weights of a program
SHRINK_BLOCK = 1024  # where a thread holds nothing else
SHRINK_CHUNK = 8 * SHRINK_BLOCK
WARPS = 4
PARTIALS = 4096  # partial sums at a time
# Philox with 7 rounds passes every statistical test that 10 rounds pass (Salmon et al., SC 2011).
ROUNDS = tl.constexpr(7)
NARROW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
DTYPES = NARROW | {torch.float32: tl.float32}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """Return why no kernel can run on a device, or None where it can."""
    if device.type == "cuda":
        return _why_not_on_gpu(device)
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"Triton has no kernels for {device.type}; choose backend='auto'"


@lru_cache(maxsize=16)
def _why_not_on_gpu(device: torch.device) -> str | None:
    if INTERPRETED:
        return "TRITON_INTERPRET=1 runs Triton's kernels on the CPU; unset it, or choose backend='eager'"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0; choose backend='eager'"
    try:  # Triton builds its launcher with a C compiler, and keeps what it compiles on disk
        sums([torch.ones(1, device=device)])
    except Exception as error:
        return f"Triton cannot launch a kernel here ({_first_line(error)}); choose backend='eager'"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def where(table, layers, layer_of, CHUNK: tl.constexpr):
    """Return this program's layer, the index of its first weight, and the layer's number of weights."""
    program = tl.program_id(0)
    layer = tl.load(layer_of + program)
    first = tl.load(table + layers + layer)
    start = (program.to(tl.int64) - first) * CHUNK  # 64 bits: a layer can have more than 2^31 weights
    return layer, start, tl.load(table + layer)


@triton.jit
def stream(pointers, layers, layer, STREAM: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to a layer's weights, or to its gradient or state."""
    pointer = tl.load(pointers + STREAM * layers + layer).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # what makes loads of 16 bytes
    return pointer


@triton.jit
def read(pointer, at, n, WHOLE: tl.constexpr):
    """Return a block of a layer's n weights, zeros beyond them."""
    if WHOLE:  # a mask that may end anywhere would cut loads into single elements
        return tl.load(pointer + at)
    return tl.load(pointer + at, mask=at < n, other=0.0)


@triton.jit
def write(pointer, at, n, value, WHOLE: tl.constexpr):
    """Store a block of a layer's n weights, nothing beyond them."""
    if WHOLE:
        tl.store(pointer + at, value)
    else:
        tl.store(pointer + at, value, mask=at < n)


@triton.jit
def shrunk(w, gain, threshold):
    """Return gain * softshrink(w, threshold)."""
    return (w - tl.minimum(tl.maximum(w, -threshold), threshold)) * gain


@triton.jit
def _bits(seed, layer, start, BLOCK: tl.constexpr):
    """Draw 16 uniform bits for each weight of a block, from the seed and the weight's place; eight a Philox call."""
    counter = start // 8 + tl.arange(0, BLOCK // 8)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero + layer.to(tl.uint32), zero, n_rounds=ROUNDS)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,)).to(tl.int32)


@triton.jit
def rounded(w, before, seed, layer, start, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):
    """Bring float32 values onto DTYPE's grid, to finite values where they were finite before."""
    LIMIT: tl.constexpr = 3.3895313892515355e38 if DTYPE == tl.bfloat16 else 65504.0
    w = tl.clamp(w, -LIMIT, LIMIT)  # which lies on the grid, so no bits lift it further
    if STOCHASTIC:
        bits = _bits(seed, layer, start, BLOCK)
        word = w.to(tl.int32, bitcast=True)
        if DTYPE == tl.bfloat16:  # float32 without its lower half
            w = ((word + bits) & -65536).to(tl.float32, bitcast=True)
        else:  # floor(w / u + z) u, u the spacing of the grid, that of subnormal numbers at least
            spacing = tl.maximum((word & 0x7F800000).to(tl.float32, bitcast=True) * 2.0**-10, 2.0**-24)
            w = tl.floor(w / spacing + (bits >> 3).to(tl.float32) * 2.0**-13) * spacing
    else:
        w = w.to(DTYPE).to(tl.float32)
    return tl.where(tl.abs(before) < float("inf"), w, before)


@triton.jit
def _add_up(partial, programs, magnitudes, squares):
    tl.store(partial + tl.program_id(0), tl.sum(magnitudes))
    tl.store(partial + programs + tl.program_id(0), tl.sum(squares))


@triton.jit
def left(start, n, CHUNK: tl.constexpr):
    """Count the weights that the last chunk of a layer has."""
    return tl.minimum(n - start, CHUNK).to(tl.int32)


@triton.jit(do_not_specialize=["layers", "programs"])
def _sum_kernel(
    pointers, table, layers, layer_of, partial, programs,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, start, n = where(table, layers, layer_of, CHUNK)
    w = stream(pointers, layers, layer, 0, DTYPE, ALIGNED)
    magnitudes = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    if start + CHUNK <= n:
        for block in tl.static_range(0, CHUNK, BLOCK):
            m = tl.abs(read(w, start + block + tl.arange(0, BLOCK), n, True).to(tl.float32))
            magnitudes += m
            squares = tl.fma(m, m, squares)
    else:
        for block in range(0, left(start, n, CHUNK), BLOCK):
            m = tl.abs(read(w, start + block + tl.arange(0, BLOCK), n, False).to(tl.float32))
            magnitudes += m
            squares = tl.fma(m, m, squares)
    _add_up(partial, programs, magnitudes, squares)


@triton.jit(do_not_specialize=["layers", "programs"])
def _finish_kernel(table, layers, partial, programs, rows, sums, CHUNK: tl.constexpr, PARTIALS: tl.constexpr):
    """Add up a layer's partial sums, in float64."""
    layer = tl.program_id(0)
    first = tl.load(table + layers + layer)
    last = first + (tl.load(table + layer) + CHUNK - 1) // CHUNK
    row = tl.load(rows + layer)
    for moment in tl.static_range(2):
        total = tl.zeros((PARTIALS,), tl.float64)
        for at in range(first, last, PARTIALS):
            index = at + tl.arange(0, PARTIALS)
            total += tl.load(partial + moment * programs + index, mask=index < last, other=0.0).to(tl.float64)
        tl.store(sums + 2 * row + moment, tl.sum(total))


# A kernel that writes reads the next block before it writes this one. The compiler does not, as what is written could
# be what is read next, and no thread would have anything under way while it waits for memory.


@triton.jit
def _shrink_block(
    w, at, start, n, before, gain, threshold, seed, layer,
    WHOLE: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    before = before.to(tl.float32)
    x = shrunk(before, gain, threshold)
    if DTYPE != tl.float32:
        x = rounded(x, before, seed, layer, start, DTYPE, STOCHASTIC, BLOCK)
    write(w, at, n, x.to(DTYPE), WHOLE)


@triton.jit(do_not_specialize=["layers"])
def _shrink_kernel(
    pointers, table, layers, layer_of, rows, gains, thresholds, seed,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, start, n = where(table, layers, layer_of, CHUNK)
    row = tl.load(rows + layer)
    gain, threshold = tl.load(gains + row).to(tl.float32), tl.load(thresholds + row).to(tl.float32)
    if (gain != 1.0) | (threshold != 0.0):
        w = stream(pointers, layers, layer, 0, DTYPE, ALIGNED)
        number = tl.load(seed) if STOCHASTIC else 0
        at = start + tl.arange(0, BLOCK)
        if start + CHUNK <= n:
            following = read(w, at, n, True)
            for block in tl.static_range(0, CHUNK, BLOCK):
                before = following
                if block + BLOCK < CHUNK:
                    following = read(w, at + (block + BLOCK), n, True)
                _shrink_block(
                    w, at + block, start + block, n, before, gain, threshold, number, row,
                    True, DTYPE, STOCHASTIC, BLOCK,
                )  # fmt: skip
        else:
            for block in range(0, left(start, n, CHUNK), BLOCK):
                _shrink_block(
                    w, at + block, start + block, n, read(w, at + block, n, False), gain, threshold, number, row,
                    False, DTYPE, STOCHASTIC, BLOCK,
                )  # fmt: skip


@triton.jit
def _adamw_reads(p, g, m, v, at, n, WHOLE: tl.constexpr):
    return read(p, at, n, WHOLE), read(g, at, n, WHOLE), read(m, at, n, WHOLE), read(v, at, n, WHOLE)


@triton.jit
def _adamw_block(
    p, m, v, at, start, n, before, gradient, mean, square,
    gain, threshold, decay, step, root, rate1, beta2, rate2, eps, seed, layer,
    MAXIMIZE: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Shrink and update a block of weights and return their magnitudes."""
    before = before.to(tl.float32)
    w = shrunk(before, gain, threshold)
    if DTYPE != tl.float32:
        w = rounded(w, before, seed, layer, start, DTYPE, STOCHASTIC, BLOCK)
    gradient = gradient.to(tl.float32)
    if MAXIMIZE:
        gradient = -gradient
    mean = mean.to(tl.float32)
    mean = tl.fma(gradient - mean, rate1, mean)
    square = tl.fma(rate2 * gradient, gradient, beta2 * square.to(tl.float32))
    w = tl.fma(w, decay, -(step * mean) / tl.fma(tl.sqrt(square), root, eps)).to(DTYPE)
    write(p, at, n, w, WHOLE)
    write(m, at, n, mean.to(DTYPE), WHOLE)
    write(v, at, n, square.to(DTYPE), WHOLE)
    magnitude = tl.abs(w.to(tl.float32))
    return magnitude if WHOLE else tl.where(at < n, magnitude, 0.0)


@triton.jit(do_not_specialize=["layers", "programs"])
def _adamw_kernel(
    pointers, table, layers, layer_of, rows, coefficients, partial, programs, rate1, beta2, rate2, eps, seed,
    MAXIMIZE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    layer, start, n = where(table, layers, layer_of, CHUNK)
    row = tl.load(rows + layer)
    p = stream(pointers, layers, layer, 0, DTYPE, ALIGNED)
    g = stream(pointers, layers, layer, 1, DTYPE, ALIGNED)
    m = stream(pointers, layers, layer, 2, DTYPE, ALIGNED)
    v = stream(pointers, layers, layer, 3, DTYPE, ALIGNED)
    c = coefficients + 5 * row
    gain, threshold, decay, step, root = tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3), tl.load(c + 4)
    number = tl.load(seed) if STOCHASTIC else 0
    magnitudes = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    at = start + tl.arange(0, BLOCK)
    if start + CHUNK <= n:
        p1, g1, m1, v1 = _adamw_reads(p, g, m, v, at, n, True)
        for block in tl.static_range(0, CHUNK, BLOCK):
            before, gradient, mean, square = p1, g1, m1, v1
            if block + BLOCK < CHUNK:
                p1, g1, m1, v1 = _adamw_reads(p, g, m, v, at + (block + BLOCK), n, True)
            magnitude = _adamw_block(
                p, m, v, at + block, start + block, n, before, gradient, mean, square,
                gain, threshold, decay, step, root, rate1, beta2, rate2, eps, number, row,
                MAXIMIZE, True, DTYPE, STOCHASTIC, BLOCK,
            )  # fmt: skip
            magnitudes += magnitude
            squares = tl.fma(magnitude, magnitude, squares)
    else:
        for block in range(0, left(start, n, CHUNK), BLOCK):
            before, gradient, mean, square = _adamw_reads(p, g, m, v, at + block, n, False)
            magnitude = _adamw_block(
                p, m, v, at + block, start + block, n, before, gradient, mean, square,
                gain, threshold, decay, step, root, rate1, beta2, rate2, eps, number, row,
                MAXIMIZE, False, DTYPE, STOCHASTIC, BLOCK,
            )  # fmt: skip
            magnitudes += magnitude
            squares = tl.fma(magnitude, magnitude, squares)
    _add_up(partial, programs, magnitudes, squares)


@triton.jit
def _sgd_reads(p, g, b, at, n, MOMENTUM: tl.constexpr, WHOLE: tl.constexpr):
    before, gradient = read(p, at, n, WHOLE), read(g, at, n, WHOLE)
    return before, gradient, read(b, at, n, WHOLE) if MOMENTUM else gradient


@triton.jit
def _sgd_block(
    p, b, at, start, n, before, gradient, buffer, gain, threshold, lr, weight_decay, momentum, fresh, seed, layer,
    MAXIMIZE: tl.constexpr, NESTEROV: tl.constexpr, MOMENTUM: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Shrink and update a block of weights and return their magnitudes."""
    before = before.to(tl.float32)
    w = shrunk(before, gain, threshold)
    if DTYPE != tl.float32:
        w = rounded(w, before, seed, layer, start, DTYPE, STOCHASTIC, BLOCK)
    gradient = gradient.to(tl.float32)
    if MAXIMIZE:
        gradient = -gradient
    direction = tl.fma(w, weight_decay, gradient)
    if MOMENTUM:
        buffer = tl.fma(buffer.to(tl.float32), momentum, fresh * direction)
        write(b, at, n, buffer.to(DTYPE), WHOLE)
        direction = tl.fma(buffer, momentum, direction) if NESTEROV else buffer
    w = tl.fma(direction, -lr, w).to(DTYPE)
    write(p, at, n, w, WHOLE)
    magnitude = tl.abs(w.to(tl.float32))
    return magnitude if WHOLE else tl.where(at < n, magnitude, 0.0)


@triton.jit(do_not_specialize=["layers", "programs"])
def _sgd_kernel(
    pointers, table, layers, layer_of, rows, coefficients, partial, programs, weight_decay, momentum, fresh, seed,
    MAXIMIZE: tl.constexpr, NESTEROV: tl.constexpr, MOMENTUM: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, start, n = where(table, layers, layer_of, CHUNK)
    row = tl.load(rows + layer)
    p = stream(pointers, layers, layer, 0, DTYPE, ALIGNED)
    g = stream(pointers, layers, layer, 1, DTYPE, ALIGNED)
    b = stream(pointers, layers, layer, 2 if MOMENTUM else 1, DTYPE, ALIGNED)
    c = coefficients + 3 * row
    gain, threshold, lr = tl.load(c), tl.load(c + 1), tl.load(c + 2)
    number = tl.load(seed) if STOCHASTIC else 0
    magnitudes = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    at = start + tl.arange(0, BLOCK)
    if start + CHUNK <= n:
        p1, g1, b1 = _sgd_reads(p, g, b, at, n, MOMENTUM, True)
        for block in tl.static_range(0, CHUNK, BLOCK):
            before, gradient, buffer = p1, g1, b1
            if block + BLOCK < CHUNK:
                p1, g1, b1 = _sgd_reads(p, g, b, at + (block + BLOCK), n, MOMENTUM, True)
            magnitude = _sgd_block(
                p, b, at + block, start + block, n, before, gradient, buffer,
                gain, threshold, lr, weight_decay, momentum, fresh, number, row,
                MAXIMIZE, NESTEROV, MOMENTUM, True, DTYPE, STOCHASTIC, BLOCK,
            )  # fmt: skip
            magnitudes += magnitude
            squares = tl.fma(magnitude, magnitude, squares)
    else:
        for block in range(0, left(start, n, CHUNK), BLOCK):
            before, gradient, buffer = _sgd_reads(p, g, b, at + block, n, MOMENTUM, False)
            magnitude = _sgd_block(
                p, b, at + block, start + block, n, before, gradient, buffer,
                gain, threshold, lr, weight_decay, momentum, fresh, number, row,
                MAXIMIZE, NESTEROV, MOMENTUM, False, DTYPE, STOCHASTIC, BLOCK,
            )  # fmt: skip
            magnitudes += magnitude
            squares = tl.fma(magnitude, magnitude, squares)
    _add_up(partial, programs, magnitudes, squares)


# --- launches --------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """What the kernels need to know of tensors of one dtype; `rows` says which of the caller's layers they are."""

    dtype: torch.dtype
    aligned: bool
    chunk: int
    layers: int
    programs: int
    rows: Tensor
    pointers: Tensor
    table: Tensor
    layer_of: Tensor

    @property
    def place(self) -> tuple[Tensor, Tensor, int, Tensor]:
        """First arguments of every kernel but the last one."""
        return self.pointers, self.table, self.layers, self.layer_of

    @property
    def options(self) -> dict[str, Any]:
        """Constants of every kernel."""
        return {
            "DTYPE": DTYPES[self.dtype],
            "ALIGNED": self.aligned,
            "CHUNK": self.chunk,
            "BLOCK": BLOCK,
            "num_warps": WARPS,
            # Sums are the same bits whether moments or an optimizer's kernel takes them.
            "enable_fp_fusion": False,
        }

    def partial(self) -> Tensor:
        """Make room for the sums of every program, shape (2, programs)."""
        return torch.empty(2, self.programs, dtype=torch.float32, device=self.rows.device)

    def finish(self, partial: Tensor, sums: Tensor) -> None:
        """Add up programs to layers, into sums of shape (caller's layers, 2)."""
        _finish_kernel[(self.layers,)](
            self.table, self.layers, partial, self.programs, self.rows, sums,
            CHUNK=self.chunk, PARTIALS=PARTIALS, num_warps=8,
        )  # fmt: skip


def sums(parts: Sequence[Tensor]) -> Tensor:
    """Sum m = |w| and m^2 of plain tensors on one device, shape (layers, 2), float64."""
    device = parts[0].device
    result = torch.zeros(len(parts), 2, dtype=torch.float64, device=device)
    rest = [i for i, w in enumerate(parts) if not fuses(w)]
    if rest:
        result.index_copy_(0, upload(tuple(rest), torch.int64, device), eager.sums([parts[i] for i in rest]))
    memory = [_without_gaps(w) for w in parts]  # copies, where memory has gaps, live until the kernels are launched
    with on(device):
        for launch in launches([memory]):
            partial = launch.partial()
            _sum_kernel[(launch.programs,)](*launch.place, partial, launch.programs, **launch.options)
            launch.finish(partial, result)
    return result


def shrink_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None) -> None:
    """Apply w <- gain * softshrink(w, threshold) in place to plain tensors on one device."""
    device = parts[0].device
    rest = [i for i, w in enumerate(parts) if not fuses(w)]
    if rest:
        left = [parts[i] for i in rest]
        eager.shrink_(left, select(gain, rest), select(threshold, rest), seed)
    memory = [_without_gaps(w) for w in parts]
    live_seed = on_device(seed, device)
    with on(device):
        for launch in launches([memory], SHRINK_CHUNK):
            options = launch.options | {"BLOCK": SHRINK_BLOCK}
            _shrink_kernel[(launch.programs,)](
                *launch.place, launch.rows, gain.contiguous(), threshold.contiguous(), live_seed,
                STOCHASTIC=seed is not None and launch.dtype in NARROW, **options,
            )  # fmt: skip
    for w, written in zip(parts, memory, strict=True):
        if fuses(w) and written.data_ptr() != w.data_ptr():
            ordered = in_memory_order(w)
            ordered.copy_(written.view(ordered.shape))
        elif fuses(w):
            torch.autograd.graph.increment_version(w)


def adamw_(
    streams: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    maximize: bool,
    seed: int | Tensor | None,
) -> Tensor:
    """Shrink weights, take AdamW's step and measure the new weights, all in one pass.

    Args:
        streams: Weights, gradients, exponential averages of the gradients and of their squares: four sequences of
            plain tensors, each layer's four alike in dtype and strides, without gaps.
        coefficients: For each layer (gain, threshold, 1 - lr weight_decay, lr / (1 - beta1^t), (1 - beta2^t)^(-1/2)),
            float32, shape (layers, 5).
        betas: AdamW's.
        eps: AdamW's.
        maximize: Whether to climb.
        seed: Of stochastic rounding after the shrink; None rounds to nearest.

    Returns:
        Sums of m = |w| and m^2 of the new weights, float64, shape (layers, 2).

    """
    constants = (1 - betas[0], betas[1], 1 - betas[1], eps)
    return _fused(_adamw_kernel, streams, coefficients, constants, seed, MAXIMIZE=maximize)


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
    """Shrink weights, take SGD's step and measure the new weights, all in one pass.

    Args:
        streams: Weights, gradients and, with momentum, its buffers, as for `adamw_`.
        coefficients: For each layer (gain, threshold, lr), float32, shape (layers, 3).
        momentum: SGD's.
        dampening: SGD's.
        weight_decay: SGD's, added to the gradient.
        nesterov: SGD's.
        maximize: Whether to climb.
        seed: Of stochastic rounding after the shrink; None rounds to nearest.

    Returns:
        Sums of m = |w| and m^2 of the new weights, float64, shape (layers, 2).

    """
    constants = (weight_decay, momentum, 1 - dampening)
    kind = {"MAXIMIZE": maximize, "NESTEROV": nesterov, "MOMENTUM": momentum != 0}
    return _fused(_sgd_kernel, streams, coefficients, constants, seed, **kind)


def _fused(
    kernel: Any,
    streams: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    constants: Sequence[float],
    seed: int | Tensor | None,
    **kind: bool,
) -> Tensor:
    """Run an optimizer's kernel over all layers and return the sums of the new weights, shape (layers, 2)."""
    device = coefficients.device
    live_seed = on_device(seed, device)
    result = torch.zeros(len(streams[0]), 2, dtype=torch.float64, device=device)
    with on(device):
        for launch in launches(streams):
            partial = launch.partial()
            kernel[(launch.programs,)](
                *launch.place, launch.rows, coefficients, partial, launch.programs, *map(float, constants), live_seed,
                STOCHASTIC=seed is not None and launch.dtype in NARROW, **kind, **launch.options,
            )  # fmt: skip
            launch.finish(partial, result)
    written(streams[0], *streams[2:])
    return result


def fuses(w: Tensor) -> bool:
    """Return whether the kernels know a layer's dtype, and its elements lie where they would look for them."""
    return w.dtype in DTYPES and has_address(w)


def on_device(seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """Bring a seed to the device without waiting for it."""
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        return seed.to(device, non_blocking=True)  # one counter serves the weights on all devices
    return torch.full((), seed, dtype=torch.int64, device=device)


def launches(streams: Sequence[Sequence[Tensor]], chunk: int = CHUNK) -> list[Launch]:
    """Divide layers into launches, by dtype and by whether every address allows loads of 16 bytes."""
    rows: defaultdict[tuple[torch.dtype, bool], list[int]] = defaultdict(list)
    for i, layer in enumerate(zip(*streams, strict=True)):
        w = layer[0]
        if fuses(w) and w.numel():
            rows[w.dtype, all(x.data_ptr() % 16 == 0 for x in layer)].append(i)
    return [make_launch(streams, index, chunk, aligned=aligned) for (_, aligned), index in rows.items()]


def make_launch(
    streams: Sequence[Sequence[Tensor]],
    index: Sequence[int],
    chunk: int,
    numbers: Sequence[int] | None = None,
    *,
    aligned: bool,
) -> Launch:
    """Prepare one launch.

    Args:
        streams: The caller's layers, and what else belongs to each of them.
        index: The layers that the launch works on, all of one dtype.
        chunk: How many things of a layer a program takes.
        numbers: How many each layer of `index` has; None stands for its weights (default: None).
        aligned: Whether loads of 16 bytes are possible.

    """
    layers = [streams[0][i] for i in index]
    numbers = tuple([w.numel() for w in layers] if numbers is None else numbers)
    device = layers[0].device
    table, layer_of = _table(numbers, chunk, device)
    return Launch(
        dtype=layers[0].dtype,
        aligned=aligned,
        chunk=chunk,
        layers=len(index),
        programs=sum([-(-n // chunk) for n in numbers]),
        rows=upload(tuple(index), torch.int64, device),
        pointers=pointers_to(tuple([stream[i].data_ptr() for stream in streams for i in index]), device),
        table=table,
        layer_of=layer_of,
    )


def _table(numbers: tuple[int, ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (number of weights, first program) of every layer, shape (2, layers), and every program's layer."""
    programs = [-(-n // chunk) for n in numbers]

    def table() -> Tensor:
        return torch.tensor([numbers, tuple(accumulate([0, *programs[:-1]]))], device="cpu")

    def layer_of() -> Tensor:
        layers = torch.arange(len(numbers), dtype=torch.int32, device="cpu")
        return layers.repeat_interleave(torch.tensor(programs, device="cpu"))

    return keep(("table", numbers, chunk), device, table), keep(("layer_of", numbers, chunk), device, layer_of)


def _without_gaps(w: Tensor) -> Tensor:
    """Return a tensor whose elements fill the memory from its address on: itself if possible."""
    return w if w.is_contiguous() or not fuses(w) else flat(w).contiguous()


def written(*streams: Sequence[Tensor]) -> None:
    """Tell autograd, and whoever watches versions, that a kernel wrote into tensors."""
    for stream in streams:
        for w in stream:
            torch.autograd.graph.increment_version(w)
