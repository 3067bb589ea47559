"""What weight concentration adds to an optimizer's step, beside what it adds in the loss or written naively.

All rows of one table work on one network's weights in one process and take turns, in an order that rotates from round
to round, so that whatever else the machine does hits all of them alike. A ratio is that of two steps of one round, its
figure the median of the rounds. Gradients are those of one real batch. A copy of memory is timed in the same rounds.
On CUDA a step's time is the device's, with all the step's work in its queue, as in a training that keeps it busy; what
the call takes the host stands beside it.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.devices import settle
from benchmarks.shapes import SHAPES, Shape
from wcr_optim import SGD, WCR, AdamW, L1Decay
from wcr_optim.moments import moments
from wcr_optim.penalties import InverseVariance
from wcr_optim.tables import aligned

MIB = 2**20
LR = 1e-5
STRENGTH = 1e-3
PENALTY = InverseVariance()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPIED = 256 * MIB  # bytes, more than caches hold
PASSES = 3  # forward and backward
AHEAD = 2e-3  # seconds at least that a CUDA device is kept waiting while the host fills its queue
CYCLES = 2e9  # of a second at most
DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- measured on {} -->", "<!-- end -->"


@dataclass
class Row:
    """One way to take a step.

    Attributes:
        name: What it is called in tables.
        base: Row whose step it is compared with.
        streams: Reads and writes of the weights' size that a step cannot do without.
        step: Takes one step.
        repeats: Steps in succession, of which the last is timed. A fused optimizer knows the moments from its own step
            before, unless another row has written the weights since.
        seconds: That the step took the device in each round.
        called: That the call took the host.
        peak: Bytes, see `peak_of`.
        ahead: Seconds, see `_timed`.
    """

    name: str
    base: str
    streams: int
    step: Callable[[], Any]
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)
    called: list[float] = field(default_factory=list)
    peak: int = 0
    ahead: float = 0.0


@dataclass
class Result:
    """A line of the table. Times are medians, `ratio` with quartiles that of paired rounds."""

    machine: str
    torch: str
    model: str
    parameters: int
    dtype: str
    method: str
    base: str
    step_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    extra_mib: float
    streams: int
    bandwidth: float
    copy_gb_s: float
    training: float
    batch: str
    host_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements, print them and write them to a file."""
    options = _arguments(argv)
    torch.set_num_threads(options.threads)
    settle(options.device)
    machine = _machine(options.device, options.threads)
    print(f"{machine}, torch {torch.__version__}, {options.rounds} rounds\n", flush=True)
    results: list[Result] = []
    for model in options.models:
        for dtype in options.dtypes:
            results += _measure(SHAPES[model], dtype, machine, options)
            print(_text([r for r in results if (r.model, r.dtype) == (SHAPES[model].label, dtype)]), flush=True)
            gc.collect()
    write_csv(results, options.output)
    if options.write_docs:
        write_docs(results, DOCS / "speed.md", options.device)
    return 0


# --- what is measured ------------------------------------------------------------------------------------------------


def rows(weights: Sequence[nn.Parameter], device: str) -> list[Row]:
    """Make all ways to take a step; those of one kind of optimizer share its state, as memory is short."""
    matrices = [w for w in weights if w.ndim >= 2]
    adamw = torch.optim.AdamW(weights, lr=LR, fused=True)
    sgd = torch.optim.SGD(weights, lr=LR, momentum=0.9, fused=True)
    adamw.step(), sgd.step()

    def sharing(base: Optimizer, optimizer: Optimizer) -> Callable[[], Any]:
        optimizer.state = base.state
        return optimizer.step

    def wcr(backend: str, form: str = "inverse_variance") -> Callable[[], Any]:
        return sharing(adamw, WCR(torch.optim.AdamW(weights, lr=LR, fused=True), STRENGTH, form, backend=backend))

    def l1(backend: str) -> Callable[[], Any]:
        return sharing(adamw, L1Decay(torch.optim.AdamW(weights, lr=LR, fused=True), STRENGTH, backend=backend))

    def in_loss() -> None:
        torch.autograd.backward(STRENGTH * PENALTY.value(moments(matrices, 1e-8)).sum())
        adamw.step()

    def naive() -> None:
        naive_(matrices, LR * STRENGTH)
        adamw.step()

    def fused(optimizer: WCR, base: Optimizer) -> Callable[[], Any]:
        optimizer.backend = kernels
        return sharing(base, optimizer)

    kernels = "triton" if device == "cuda" else "compiled"
    options: dict[str, Any] = {"lr": LR, "fused": True, "weight_concentration": STRENGTH}
    base, other = "torch AdamW, fused", "torch SGD, fused"
    return [
        Row(base, base, 7, adamw.step),
        Row("+ penalty in the loss", base, 11, in_loss),
        Row("+ naive step", base, 10, naive),
        Row("WCR(AdamW), eager", base, 10, wcr("eager")),
        Row(f"WCR(AdamW), {kernels}", base, 10, wcr(kernels)),
        *[Row(f"WCR per unit (AdamW), {name}", base, 10, wcr(name, "per_unit")) for name in ("eager", kernels)],
        Row("L1Decay(AdamW), eager", base, 9, l1("eager")),
        Row(f"L1Decay(AdamW), {kernels}", base, 9, l1(kernels)),
        Row("AdamW(fused=True)", base, 7, fused(AdamW(weights, **options), adamw), repeats=2),
        Row(other, other, 5, sgd.step),
        Row("SGD(fused=True)", other, 5, fused(SGD(weights, momentum=0.9, **options), sgd), repeats=2),
    ]


@torch.no_grad()
def naive_(weights: Iterable[Tensor], s: float) -> None:
    """Take WCR's step of length s the way one writes it down, a few lines for each tensor."""
    for w in weights:
        m = w.abs()
        mu, variance = m.mean(), m.square().mean() - m.mean().square()
        gain = (1 + 8 * s / (w.numel() * (variance + 1e-8) ** 2)) ** 0.25
        w.copy_(gain * w.sign() * (m - (mu - mu / gain)).relu())


def _measure(shape: Shape, dtype: str, machine: str, options: argparse.Namespace) -> list[Result]:
    torch.manual_seed(0)
    with torch.device(options.device):  # a billion random numbers take the host a while
        model = shape.build().to(DTYPES[dtype])
    passes = _forward_and_backward(model, shape, options.device)
    weights = list(model.parameters())
    number = sum(w.numel() for w in weights)
    table = rows(weights, options.device)
    source = torch.ones(COPIED, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    copy = Row("copy", "copy", 2, lambda: target.copy_(source))
    every = [copy, *table]
    for row in every:  # compiles, makes state, warms up
        row.step()
        row.peak = peak_of(row.step, options.device)
        row.ahead = 2 * _timed(row.step, options.device)[1]
    for number_of_round in range(options.rounds):
        first = number_of_round % len(every)
        for row in every[first:] + every[:first]:
            for _ in range(row.repeats):
                seconds, called = _timed(row.step, options.device, row.ahead)
            row.seconds.append(seconds)
            row.called.append(called)
        if sys.stderr.isatty():
            print(f"\r{shape.label}, {dtype}: round {number_of_round + 1} of {options.rounds}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    bandwidth = 2 * COPIED / statistics.median(copy.seconds)
    size = number * weights[0].element_size()
    named = {row.name: row for row in table}
    return [
        _result(row, named[row.base], size, bandwidth, passes, {
            "machine": machine, "torch": torch.__version__, "model": shape.label, "parameters": number, "dtype": dtype,
            "copy_gb_s": bandwidth / 1e9, "batch": shape.describe(options.device),
        })
        for row in table
    ]  # fmt: skip


def _result(
    row: Row, base: Row, size: int, bandwidth: float, passes: float, common: Mapping[str, Any]
) -> Result:  # fmt: skip
    ratios = [mine / theirs for mine, theirs in zip(row.seconds, base.seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    step = statistics.median(row.seconds)
    return Result(
        **common,
        method=row.name,
        base=base.name,
        step_ms=1e3 * step,
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
        extra_mib=max(0, row.peak - base.peak) / MIB,
        streams=row.streams,
        bandwidth=row.streams * size / step / bandwidth,
        host_ms=1e3 * statistics.median(row.called),
        training=(middle - 1) * statistics.median(base.seconds) / (passes + statistics.median(base.seconds)),
    )


def _forward_and_backward(model: nn.Module, shape: Shape, device: str) -> float:
    """Return the seconds that a batch takes, and leave its gradients."""
    batch = {
        key: value.to(device, next(model.parameters()).dtype if value.is_floating_point() else None)
        for key, value in shape.batch(shape.examples[device]).items()
    }

    def passes() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    passes()
    return statistics.median(_timed(passes, device)[0] for _ in range(PASSES))


def _timed(step: Callable[[], Any], device: str, ahead: float = 0.0) -> tuple[float, float]:
    """Return the seconds that a step takes the device, and those that the call takes the host.

    Args:
        step: Takes the step.
        device: Where.
        ahead: Seconds that a CUDA device waits at least before it starts, so that no launch comes too late for it.
    """
    if device != "cuda":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start,) * 2
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(max(ahead, AHEAD) * CYCLES))
    begin.record()
    start = time.perf_counter()
    step()
    called = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, called


def peak_of(step: Callable[[], Any], device: str) -> int:
    """Return the bytes that a step holds at most beyond what was there before, as torch's allocators count them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of its start and stop
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        step()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


# --- what is written -------------------------------------------------------------------------------------------------


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write all figures, to four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        writer.writeheader()
        for result in results:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(result).items()})


def write_docs(results: Sequence[Result], path: Path, device: str) -> None:
    """Put tables of the figures into a document, between its markers for a device."""
    begin = BEGIN.format(device)
    before, rest = path.read_text().split(begin)
    _, after = rest.split(END, maxsplit=1)
    path.write_text(f"{before}{begin}\n{markdown(results)}{END}{after}")


def markdown(results: Sequence[Result]) -> str:
    """Set the figures as a table for each model and dtype."""
    text = f"Measured on {results[0].machine}, torch {results[0].torch}.\n\n"
    for model, dtype in dict.fromkeys((r.model, r.dtype) for r in results):
        table = [r for r in results if (r.model, r.dtype) == (model, dtype)]
        header = _header(table[0])
        text += f"**{_title(table[0])}**\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}\n"
        text += "".join(f"| {' | '.join(_cells(r))} |\n" for r in table) + "\n"
    return text


def _header(r: Result) -> list[str]:
    names = ["step", "ms", "x base", "quartiles", "of training", "extra MiB", "streams", "bandwidth"]
    return [*names, "host ms"] if _is_queued(r) else names


def _is_queued(r: Result) -> bool:
    """Say whether the host only fills a device's queue."""
    return r.host_ms != r.step_ms


def _cells(r: Result) -> list[str]:
    compared = [f"{r.ratio:.2f}", f"{r.ratio_low:.2f}-{r.ratio_high:.2f}", f"{r.training:+.1%}", f"{r.extra_mib:.1f}"]
    if r.method == r.base:
        compared = ["1", "", "", ""]
    cells = [r.method, f"{r.step_ms:.{2 if _is_queued(r) else 1}f}", *compared, str(r.streams), f"{r.bandwidth:.0%}"]
    return [*cells, f"{r.host_ms:.2f}"] if _is_queued(r) else cells


def _title(r: Result) -> str:
    return f"{r.model}, {r.parameters / 1e6:.1f} M parameters, {r.dtype}; {r.batch} a step; copy {r.copy_gb_s:.1f} GB/s"


def _text(table: Sequence[Result]) -> str:
    return f"{_title(table[0])}\n{aligned([_header(table[0]), *map(_cells, table)], rules=(1,))}\n"


def _machine(device: str, threads: int) -> str:
    """Name the kind of machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    vectors = {"AVX512": " with AVX-512", "AVX2": " with AVX2"}.get(torch.backends.cpu.get_cpu_capability(), "")
    cores = f"{threads} cores" if threads > 1 else "1 core"
    return f"{cores}, {platform.machine().replace('_', '-')}{vectors}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument(
        "--models", help=f"comma-separated, of {','.join(SHAPES)} (default: all, llama_1b on cuda only)"
    )
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="table to write (default: docs/results/overhead[_cuda].csv)")
    parser.add_argument("--write-docs", action="store_true", help="also put the tables into docs/speed.md")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here; leave it out to measure the CPU")
    default = [name for name in SHAPES if name != "llama_1b" or options.device == "cuda"]
    options.models = options.models.split(",") if options.models else default
    options.dtypes = options.dtypes.split(",")
    for name, known in (("models", SHAPES), ("dtypes", DTYPES)):
        for value in getattr(options, name):
            if value not in known:
                parser.error(f"--{name}: unknown {value!r}; choose of {', '.join(known)}")
    for name, least in (("rounds", 2), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.output is None:
        options.output = DOCS / "results" / ("overhead_cuda.csv" if options.device == "cuda" else "overhead.csv")
    return options
