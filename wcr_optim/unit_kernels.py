# ruff: noqa: N803, N806, SIM300  (Triton writes constants of a kernel in capitals)
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
"""Triton kernels of units: sums of every row w[i] of many tensors, and a shrink with a gain and a threshold for each.

As in `kernels`, nothing waits for the device, and equal weights give equal bits. The sums take tiles of whole rows,
padded to a power of two, so layers of rows that are padded alike share a launch. The shrink takes weights as the
layers' shrink does, whatever the rows, and looks up what belongs to each weight's row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcr_optim import kernels
from wcr_optim.kernels import (
    CHUNK,
    NARROW,
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
from wcr_optim.units import eager_shrink_units_, eager_unit_sums, number_of_units, of_layers
from wcr_optim.uploads import on, upload

# A program of the sums is one warp, which needs no other to add up a row.
TILE = 1024  # weights that it takes at a time
WIDTH = 256  # of a tile at most
STRETCH = 16  # tiles across that are added up in float32
# Rows this long, where there are few of them, go to many programs each, as a layer's weights do.
LONG, FEW = 2**14, 256
LOAD = 16  # bytes of weights that a thread takes side by side

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["layers"])
def _unit_sum_kernel(
    pointers, table, layers, layer_of, rows, lengths, firsts, sums,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the rows of a layer, ROWS to a program, in tiles of BLOCK weights, COLUMNS wide."""
    HEIGHT: tl.constexpr = BLOCK // COLUMNS
    layer, start, n = where(table, layers, layer_of, ROWS)
    row = tl.load(rows + layer)
    length, first = tl.load(lengths + row), tl.load(firsts + row)
    if ALIGNED:  # rows then begin where loads of 16 bytes can
        length = tl.multiple_of(length, 4 if DTYPE == tl.float32 else 8)
    w = stream(pointers, layers, layer, 0, DTYPE, ALIGNED)
    for tile in range(0, left(start, n, ROWS), HEIGHT):
        unit = start + tile + tl.arange(0, HEIGHT)
        magnitude, square = _tile_sums(w, unit, n, length, CHUNK, COLUMNS, HEIGHT)
        at = sums + 2 * (first + unit)
        tl.store(at, magnitude, mask=unit < n)
        tl.store(at + 1, square, mask=unit < n)


@triton.jit
def _tile_sums(w, unit, n, length, STRETCH: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr):
    """Sum m and m^2 over whole rows, in float32 over STRETCH weights, in float64 from there on."""
    magnitude = tl.zeros((HEIGHT,), tl.float64)
    square = tl.zeros((HEIGHT,), tl.float64)
    at = w + (unit * length)[:, None]  # 64 bits: a layer can have more than 2^31 weights
    for begin in range(0, length, STRETCH):
        magnitudes = tl.zeros((HEIGHT, COLUMNS), tl.float32)
        squares = tl.zeros((HEIGHT, COLUMNS), tl.float32)
        for column in range(begin, tl.minimum(begin + STRETCH, length), COLUMNS):
            columns = (column + tl.arange(0, COLUMNS))[None, :]
            inside = (unit < n)[:, None] & (columns < length)
            m = tl.abs(tl.load(at + columns, mask=inside, other=0.0).to(tl.float32))
            magnitudes += m
            squares += m * m
        magnitude += tl.sum(magnitudes.to(tl.float64), 1)
        square += tl.sum(squares.to(tl.float64), 1)
    return magnitude, square


@triton.jit(do_not_specialize=["layers"])
def _unit_shrink_kernel(
    pointers, table, layers, layer_of, rows, lengths, firsts, gains, thresholds, seed, EACH: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, start, n = where(table, layers, layer_of, CHUNK)
    row = tl.load(rows + layer)
    length, first = tl.load(lengths + row), tl.load(firsts + row)
    w = stream(pointers, layers, layer, 0, DTYPE, ALIGNED)
    if start + CHUNK <= n:
        for block in tl.static_range(0, CHUNK, BLOCK):
            _unit_shrink_block(
                w, start + block, n, length, gains + first, thresholds + first, seed, row,
                EACH, True, DTYPE, STOCHASTIC, BLOCK,
            )  # fmt: skip
    else:
        for block in range(0, left(start, n, CHUNK), BLOCK):
            _unit_shrink_block(
                w, start + block, n, length, gains + first, thresholds + first, seed, row,
                EACH, False, DTYPE, STOCHASTIC, BLOCK,
            )  # fmt: skip


@triton.jit
def _unit_shrink_block(
    w, start, n, length, gains, thresholds, seed, layer,
    EACH: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    first, beyond = _unit_of(start, length, EACH, BLOCK)
    inside = start + EACH * tl.arange(0, BLOCK // EACH) < n
    gain = _look_up(gains + first, beyond, inside, EACH, WHOLE, BLOCK)
    threshold = _look_up(thresholds + first, beyond, inside, EACH, WHOLE, BLOCK)
    before = read(w, at, n, WHOLE)
    x = shrunk(before, gain, threshold)
    if DTYPE != tl.float32:
        x = rounded(x, before, seed, layer, start, DTYPE, STOCHASTIC, BLOCK)
    x = tl.where((gain != 1.0) | (threshold != 0.0), x, before)  # for the sign of zeros, which the shrink loses
    write(w, at, n, x.to(DTYPE), WHOLE)


@triton.jit
def _look_up(values, index, inside, EACH: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Return what belongs to each weight of a block, given where it stands for every EACH of them."""
    found = tl.load(values + index) if WHOLE else tl.load(values + index, mask=inside, other=0.0)
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


def unit_sums(parts: Sequence[Tensor]) -> list[Tensor]:
    """Sum m = |w| and m^2 over every unit w[i] of plain tensors on one device, shape (units, 2) for each, float64."""
    device = parts[0].device
    units = [number_of_units(w) for w in parts]
    result = torch.zeros(sum(units), 2, dtype=torch.float64, device=device)
    memory = [_in_rows(w) for w in parts]  # copies live until the kernels are launched
    places = _places(memory, units)
    with on(device):
        for launch, options in _sum_launches(memory):
            _unit_sum_kernel[(launch.programs,)](*launch.place, launch.rows, *places, result, **options)
    sums = list(torch.split(result, units))
    long = [i for i, w in enumerate(memory) if _is_long(w)]
    if long:
        rows = kernels.sums([row for i in long for row in memory[i].unbind()])
        for i, own in zip(long, torch.split(rows, [units[i] for i in long]), strict=True):
            sums[i] = own
    rest = [i for i, w in enumerate(parts) if not fuses(w)]
    for i, own in zip(rest, eager_unit_sums([parts[i] for i in rest]), strict=True):
        sums[i] = own
    return sums


def shrink_units_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None) -> None:
    """Apply w[i] <- gain[i] * softshrink(w[i], threshold[i]) in place to every unit of plain tensors on one device."""
    device = parts[0].device
    units = [number_of_units(w) for w in parts]
    if not len(gain) == len(threshold) == sum(units):  # or the kernel would read what lies behind them
        raise ValueError(f"got {len(gain)} gains and {len(threshold)} thresholds for {sum(units)} units")
    rest = [i for i, w in enumerate(parts) if not fuses(w)]
    if rest:
        own_gain, own_threshold = (of_layers(values, units, rest) for values in (gain, threshold))
        eager_shrink_units_([parts[i] for i in rest], own_gain, own_threshold, seed)
    gains, thresholds = (values.float().contiguous() for values in (gain, threshold))
    memory = [_in_rows(w) for w in parts]
    places = _places(memory, units)
    live_seed = on_device(seed, device)
    with on(device):
        for launch, each in _shrink_launches(memory):
            _unit_shrink_kernel[(launch.programs,)](
                *launch.place, launch.rows, *places, gains, thresholds, live_seed, EACH=each,
                STOCHASTIC=seed is not None and launch.dtype in NARROW, **launch.options,
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
        yield make_launch([parts], index, CHUNK, aligned=aligned), each


def _sum_launches(parts: Sequence[Tensor]) -> Iterator[tuple[Launch, dict[str, Any]]]:
    """Divide layers into launches of the sums, with the constants of each.

    A program has one tile of rows, or several tiles where they are short.
    """
    groups: defaultdict[tuple[torch.dtype, bool, int], list[int]] = defaultdict(list)
    for i, w in enumerate(parts):
        if fuses(w) and w.numel() and not _is_long(w):
            length = _length(w, number_of_units(w))
            aligned = w.data_ptr() % LOAD == 0 and length * w.element_size() % LOAD == 0
            groups[w.dtype, aligned, min(WIDTH, triton.next_power_of_2(length))].append(i)
    for (_, aligned, columns), index in groups.items():
        rows = TILE // columns * (1 if columns == WIDTH else 4)
        launch = make_launch([parts], index, rows, [number_of_units(parts[i]) for i in index], aligned=aligned)
        constants = {"ROWS": rows, "COLUMNS": columns, "CHUNK": STRETCH * columns, "BLOCK": TILE, "num_warps": 1}
        yield launch, launch.options | constants


def _is_long(w: Tensor) -> bool:
    """Return whether a weight has so few and long rows that a program for each would leave a GPU idle."""
    units = number_of_units(w)
    return fuses(w) and units < FEW and _length(w, units) >= LONG
