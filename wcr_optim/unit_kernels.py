# ruff: noqa: N803, N806, SIM300  (Triton writes constants of a kernel in capitals)
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
"""Triton kernels of units: sums of every row w[i] of many tensors, and a shrink with a gain and a threshold for each.

As in `kernels`, nothing waits for the device, and equal weights give equal bits. The sums take tiles of whole rows,
padded to a power of two, so layers of rows that are padded alike share a launch. The shrink takes weights as the
layers' shrink does, whatever the rows, and looks up what belongs to each weight's row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcr_optim import eager_units, kernels
from wcr_optim.eager_units import number_of_units, of_layers
from wcr_optim.kernels import (
    NARROW,
    SHRINK_BLOCK,
    SHRINK_CHUNK,
    Launch,
    fuses,
    left,
    make_launch,
    on_device,
    read,
    rounded,
    shrunk,
    stream,
    where,
    write,
    written,
)
from wcr_optim.layout import holds_rows_together
from wcr_optim.uploads import on, upload

# A program of the sums is one warp, which needs no other to add up a row.
TILE = 2048  # bytes of long rows that it takes at a time
WIDTH = 256  # weights across a tile at most
STRETCH = 16  # tiles across that are added up in float32
# Rows this long, where there are few of them, go to many programs each, as a layer's weights do.
LONG, FEW = 2**14, 256
LOAD = 16  # bytes of weights that a thread takes side by side

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["layers"])
def _unit_sum_kernel(
    pointers, table, layers, layer_of, rows, lengths, firsts, thresholds, cutoff, sums,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ABOVE: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the rows of a layer, ROWS to a program, in tiles of BLOCK weights, COLUMNS wide.

    Where ABOVE, m is what the row's threshold leaves of |w|, which is all of it from the cutoff on.
    """
    HEIGHT: tl.constexpr = BLOCK // COLUMNS
    layer, start, n = where(table, layers, layer_of, ROWS)
    row = tl.load(rows + layer)
    length, first = tl.load(lengths + row), tl.load(firsts + row)
    if ALIGNED:  # rows then begin where loads of 16 bytes can
        length = tl.multiple_of(length, 4 if DTYPE == tl.float32 else 8)
    w = stream(pointers, layers, layer, 0, DTYPE, ALIGNED)
    for tile in range(0, left(start, n, ROWS), HEIGHT):
        unit = start + tile + tl.arange(0, HEIGHT)
        bound = tl.load(thresholds + first + unit, mask=unit < n, other=0.0).to(tl.float32) if ABOVE else 0.0
        magnitude, square = _tile_sums(w, unit, n, length, bound, cutoff, ABOVE, CHUNK, COLUMNS, HEIGHT)
        at = sums + 2 * (first + unit)
        tl.store(at, magnitude, mask=unit < n)
        tl.store(at + 1, square, mask=unit < n)


@triton.jit
def _tile_sums(
    w, unit, n, length, bound, cutoff,
    ABOVE: tl.constexpr, STRETCH: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Sum m and m^2 over whole rows, in float32 over STRETCH weights, in float64 from there on."""
    magnitude = tl.zeros((HEIGHT,), tl.float64)
    square = tl.zeros((HEIGHT,), tl.float64)
    at = w + (unit * length)[:, None]  # 64 bits: a layer can have more than 2^31 weights
    columns = tl.arange(0, COLUMNS)[None, :]
    here = (unit < n)[:, None]
    following = tl.load(at + columns, mask=here & (columns < length), other=0.0)
    for begin in range(0, length, STRETCH):
        magnitudes = tl.zeros((HEIGHT, COLUMNS), tl.float32)
        squares = tl.zeros((HEIGHT, COLUMNS), tl.float32)
        for column in range(begin, tl.minimum(begin + STRETCH, length), COLUMNS):
            m = tl.abs(following.to(tl.float32))
            if ABOVE:
                above = tl.maximum(m - bound[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
                m = tl.where(m >= cutoff, m, above)
            ahead = columns + (column + COLUMNS)
            following = tl.load(at + ahead, mask=here & (ahead < length), other=0.0)
            magnitudes += m
            squares = tl.fma(m, m, squares)
        magnitude += tl.sum(magnitudes, 1).to(tl.float64)
        square += tl.sum(squares, 1).to(tl.float64)
    return magnitude, square


@triton.jit(do_not_specialize=["layers"])
def _unit_shrink_kernel(
    pointers, table, layers, layer_of, rows, lengths, firsts, gains, thresholds, cutoff, seed,
    EACH: tl.constexpr, SPARES: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, start, n = where(table, layers, layer_of, CHUNK)
    row = tl.load(rows + layer)
    length, first = tl.load(lengths + row), tl.load(firsts + row)
    w = stream(pointers, layers, layer, 0, DTYPE, ALIGNED)
    gains, thresholds = gains + first, thresholds + first
    number = tl.load(seed) if STOCHASTIC else 0
    if start + CHUNK <= n:
        w1, gain1, threshold1 = _unit_reads(w, start, n, length, gains, thresholds, EACH, True, BLOCK)
        for block in tl.static_range(0, CHUNK, BLOCK):
            before, gain, threshold = w1, gain1, threshold1
            if block + BLOCK < CHUNK:
                to = start + (block + BLOCK)
                w1, gain1, threshold1 = _unit_reads(w, to, n, length, gains, thresholds, EACH, True, BLOCK)
            _unit_shrink_block(
                w, start + block, n, before, gain, threshold, cutoff, number, row,
                EACH, SPARES, True, DTYPE, STOCHASTIC, BLOCK,
            )  # fmt: skip
    else:
        for block in range(0, left(start, n, CHUNK), BLOCK):
            to = start + block
            before, gain, threshold = _unit_reads(w, to, n, length, gains, thresholds, EACH, False, BLOCK)
            _unit_shrink_block(
                w, to, n, before, gain, threshold, cutoff, number, row,
                EACH, SPARES, False, DTYPE, STOCHASTIC, BLOCK,
            )  # fmt: skip


@triton.jit
def _unit_reads(
    w, start, n, length, gains, thresholds, EACH: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return a block of weights, and the gain and the threshold of every EACH of them."""
    first, beyond = _unit_of(start, length, EACH, BLOCK)
    inside = start + EACH * tl.arange(0, BLOCK // EACH) < n
    gain, threshold = gains + first + beyond, thresholds + first + beyond
    if WHOLE:
        return read(w, start + tl.arange(0, BLOCK), n, True), tl.load(gain), tl.load(threshold)
    before = read(w, start + tl.arange(0, BLOCK), n, False)
    return before, tl.load(gain, mask=inside, other=0.0), tl.load(threshold, mask=inside, other=0.0)


@triton.jit
def _unit_shrink_block(
    w, start, n, before, gain, threshold, cutoff, seed, layer,
    EACH: tl.constexpr, SPARES: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    before = before.to(tl.float32)
    gain, threshold = _of_each(gain.to(tl.float32), EACH, BLOCK), _of_each(threshold.to(tl.float32), EACH, BLOCK)
    x = shrunk(before, gain, threshold)
    if SPARES:
        x = tl.where(tl.abs(before) >= cutoff, before * gain, x)
    if DTYPE != tl.float32:
        x = rounded(x, before, seed, layer, start, DTYPE, STOCHASTIC, BLOCK)
    x = tl.where((gain != 1.0) | (threshold != 0.0), x, before)  # for the sign of zeros, which the shrink loses
    write(w, start + tl.arange(0, BLOCK), n, x.to(DTYPE), WHOLE)


@triton.jit
def _of_each(found, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Return what belongs to each weight of a block, given what belongs to every EACH of them."""
    if EACH == 1:
        return found
    return tl.reshape(tl.broadcast_to(tl.expand_dims(found, 1), (BLOCK // EACH, EACH)), (BLOCK,))


@triton.jit
def _unit_of(start, length, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the row in which a block begins, and how many rows further every EACH of its weights lie, int32.

    The division is one of floats, exact since x + 1/2 is half a weight off every whole row and x < 2 BLOCK. A block
    meets at most two rows that are longer than itself, so these may count as rows of BLOCK weights.
    """
    first = start // length
    span = tl.minimum(length, BLOCK)
    x = (span - tl.minimum((first + 1) * length - start, span)).to(tl.int32) + EACH * tl.arange(0, BLOCK // EACH)
    return first, ((x.to(tl.float32) + 0.5) * (1.0 / span.to(tl.float32))).to(tl.int32)


# --- launches --------------------------------------------------------------------------------------------------------


def unit_sums(parts: Sequence[Tensor], threshold: Tensor | None = None, cutoff: float = math.inf) -> list[Tensor]:
    """Sum m = |w| and m^2 over every unit w[i] of plain tensors on one device, shape (units, 2) for each, float64.

    With a threshold for every unit m is what it leaves of |w|: max(|w| - threshold, 0) below the cutoff.
    """
    device = parts[0].device
    units = [number_of_units(w) for w in parts]
    if threshold is not None and len(threshold) != sum(units):  # or the kernel would read what lies behind them
        raise ValueError(f"got {len(threshold)} thresholds for {sum(units)} units")
    result = torch.zeros(sum(units), 2, dtype=torch.float64, device=device)
    bounds = None if threshold is None else threshold.contiguous()
    memory = [_in_rows(w) for w in parts]  # copies live until the kernels are launched
    places = _places(memory, units)
    with on(device):
        for launch, options in _sum_launches(memory):
            _unit_sum_kernel[(launch.programs,)](
                *launch.place, launch.rows, *places, bounds, cutoff, result, ABOVE=bounds is not None, **options
            )
    sums = list(torch.split(result, units))
    long = [i for i, w in enumerate(memory) if _is_long(w)]
    rest = [i for i, w in enumerate(parts) if not fuses(w)]
    if threshold is not None:  # those have no kernel of their own for it, as few networks have any that would take it
        rest, long = sorted(rest + long), []
    if long:
        rows = kernels.sums([row for i in long for row in memory[i].unbind()])
        for i, own in zip(long, torch.split(rows, [units[i] for i in long]), strict=True):
            sums[i] = own
    if rest:
        own_bounds = None if threshold is None else of_layers(threshold, units, rest)
        for i, own in zip(rest, eager_units.unit_sums([parts[i] for i in rest], own_bounds, cutoff), strict=True):
            sums[i] = own
    return sums


def shrink_units_(
    parts: Sequence[Tensor],
    gain: Tensor,
    threshold: Tensor,
    seed: int | Tensor | None,
    cutoff: float = math.inf,
) -> None:
    """Apply w[i] <- gain[i] * softshrink(w[i], threshold[i]) in place to every unit of plain tensors on one device.

    From the cutoff on without the threshold.
    """
    device = parts[0].device
    units = [number_of_units(w) for w in parts]
    if not len(gain) == len(threshold) == sum(units):  # or the kernel would read what lies behind them
        raise ValueError(f"got {len(gain)} gains and {len(threshold)} thresholds for {sum(units)} units")
    rest = [i for i, w in enumerate(parts) if not fuses(w)]
    if rest:
        own_gain, own_threshold = (of_layers(values, units, rest) for values in (gain, threshold))
        eager_units.shrink_units_([parts[i] for i in rest], own_gain, own_threshold, seed, cutoff)
    gains, thresholds = gain.contiguous(), threshold.contiguous()
    memory = [_in_rows(w) for w in parts]
    places = _places(memory, units)
    live_seed = on_device(seed, device)
    with on(device):
        for launch, each in _shrink_launches(memory):
            options = launch.options | {"BLOCK": SHRINK_BLOCK}
            _unit_shrink_kernel[(launch.programs,)](
                *launch.place, launch.rows, *places, gains, thresholds, cutoff, live_seed, EACH=each,
                SPARES=cutoff < math.inf, STOCHASTIC=seed is not None and launch.dtype in NARROW, **options,
            )  # fmt: skip
    for w, changed in zip(parts, memory, strict=True):
        if changed is not w:
            w.copy_(changed)
        elif fuses(w):
            written([w])


def _in_rows(w: Tensor) -> Tensor:
    """Return a weight whose rows follow each other in memory, the weight itself where they do, else a copy."""
    return w if not fuses(w) or holds_rows_together(w) else w.contiguous()


def _length(w: Tensor, units: int) -> int:
    return w.numel() // max(1, units)


def _places(parts: Sequence[Tensor], units: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the length of every layer's rows, and the number of rows in the layers before it, shape (layers,)."""
    device = parts[0].device
    lengths = tuple([_length(w, u) for w, u in zip(parts, units, strict=True)])
    firsts = tuple(accumulate(units[:-1], initial=0))
    return upload(lengths, torch.int64, device), upload(firsts, torch.int64, device)


def _shrink_launches(parts: Sequence[Tensor]) -> Iterator[tuple[Launch, int]]:
    """Divide layers into launches of the shrink, each with the number of weights that are sure to share a row."""
    groups: defaultdict[tuple[torch.dtype, bool, int], list[int]] = defaultdict(list)
    for i, w in enumerate(parts):
        if fuses(w) and w.numel():
            together = LOAD // w.element_size()
            each = together if _length(w, number_of_units(w)) % together == 0 else 1
            groups[w.dtype, w.data_ptr() % LOAD == 0, each].append(i)
    for (_, aligned, each), index in groups.items():
        chunk = SHRINK_CHUNK if each > 1 else SHRINK_CHUNK // 4  # layers whose rows are odd are small
        yield make_launch([parts], index, chunk, aligned=aligned), each


def _sum_launches(parts: Sequence[Tensor]) -> Iterator[tuple[Launch, dict[str, Any]]]:
    """Divide layers into launches of the sums, with the constants of each.

    A program has one tile of rows, or several smaller ones where they are short.
    """
    groups: defaultdict[tuple[torch.dtype, bool, int], list[int]] = defaultdict(list)
    for i, w in enumerate(parts):
        if fuses(w) and w.numel() and not _is_long(w):
            length = _length(w, number_of_units(w))
            aligned = w.data_ptr() % LOAD == 0 and length * w.element_size() % LOAD == 0
            groups[w.dtype, aligned, min(WIDTH, triton.next_power_of_2(length))].append(i)
    for (dtype, aligned, columns), index in groups.items():
        # Short rows leave no room for more than that: a thread keeps the sums of many at once.
        tile, tiles = (TILE // dtype.itemsize, 1) if columns == WIDTH else (TILE // 4, 8)
        rows = tiles * tile // columns
        launch = make_launch([parts], index, rows, [number_of_units(parts[i]) for i in index], aligned=aligned)
        constants = {"ROWS": rows, "COLUMNS": columns, "CHUNK": STRETCH * columns, "BLOCK": tile, "num_warps": 1}
        yield launch, launch.options | constants


def _is_long(w: Tensor) -> bool:
    """Return whether a weight has so few and long rows that a program for each would leave a GPU idle."""
    units = number_of_units(w)
    return fuses(w) and units < FEW and _length(w, units) >= LONG
