"""What a step of weight concentration costs over many ranks: counted and measured here, modelled for large runs.

Counted: every collective of a step, of SparsityTarget and of sharded masks, in its order and size. Measured: the pass
over this rank's weights, the all-reduce of the moments, and the whole penalty step, in 1, 2 and 4 gloo processes on
this machine. Modelled: the same by `cost`, first for this machine, from what one and two processes took, then for
models of 1 billion to 1 trillion parameters on 8 to 4,096 ranks of the machine that `CLUSTER` assumes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wcr_optim import SSAM, WCR, SparsityTarget, pruning
from wcr_optim.layout import local
from wcr_optim.moments import measure
from wcr_optim.shrink import shrink_
from wcr_optim.tables import aligned

MOMENTS = 16  # bytes per tensor: sums of m and m^2 in float64
NORM = 8  # bytes per tensor: a gradient's squared norm in float64
HISTOGRAM = 2**13 * 8  # bytes of SparsityTarget's counts, of all tensors that are ranked together and laid out alike
# Of the search for a magnitude of given rank, see pruning.search: whether a rank failed; bins of 2^15 bit patterns of
# finite float32 numbers; their patterns one by one.
FLAG, FIRST_BINS, SECOND_BINS = 8, (0x7F80_0000 >> 15) + 1, 2**15
ADAMW_BYTES = 28  # per weight: reads p, g, m, v; writes p, m, v; float32
PENALTY_BYTES = 12  # per weight: a read for the moments; a read and a write to shrink; float32
STATE_BYTES = 16  # per weight: p, g, m, v in float32
FSDP_BYTES = 8  # per weight, through a rank's links: bfloat16 gathered for forward and backward, float32 reduced
LAUNCHES = 3  # per tensor, of the eager shrink on a GPU


class Collective(NamedTuple):
    """One collective operation as this rank saw it.

    Attributes:
        name: As torch calls it, for example "allreduce_".
        bytes: Of this rank's tensors in it.
    """

    name: str
    bytes: int


class Collectives(TorchDispatchMode):
    """Lists every collective that is called within the block, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the call and let it pass."""
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("barrier", "wait_tensor"):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.calls.append(Collective(name, sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))))
        return func(*args, **(kwargs or {}))

    def reductions(self) -> list[int]:
        """Return the bytes of every all-reduce."""
        return [call.bytes for call in self.calls if call.name == "allreduce_"]


@dataclass(frozen=True)
class Link:
    """A connection between two ranks.

    Attributes:
        latency: Seconds from a rank to another, launch included.
        bandwidth: Bytes per second.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """What the model has to know of a machine.

    Attributes:
        memory: Bytes per second that a rank's pass over its weights reaches.
        launch: Seconds that each operation of a pass costs, whatever its size.
        inside: Between ranks of one node.
        across: Between nodes.
        node: Ranks per node.
    """

    memory: float
    launch: float
    inside: Link
    across: Link
    node: int = 8

    def all_reduce(self, ranks: int, size: int) -> float:
        """Return the seconds of an all-reduce: of a tree or a ring, whichever is faster, as libraries choose."""
        if ranks == 1:
            return 0.0
        near = math.ceil(math.log2(min(ranks, self.node)))
        far = math.ceil(math.log2(max(ranks / self.node, 1)))
        slowest = self.across if far else self.inside
        tree = sum(2 * hops * (link.latency + size / link.bandwidth) for hops, link in self._hops(near, far))
        ring = 2 * (ranks - 1) * (slowest.latency + size / ranks / slowest.bandwidth)
        return min(tree, ring)

    def _hops(self, near: int, far: int) -> list[tuple[int, Link]]:
        return [(near, self.inside), (far, self.across)]


# H100 nodes: 3.35 TB/s of memory, of which elementwise kernels reach some 80 %; NVLink 450 GB/s each way; an adapter of
# 400 Gbit/s for each GPU. The latencies and the launch are round numbers of the usual size, on the slow side.
CLUSTER = Machine(0.8 * 3.35e12, 5e-6, Link(5e-6, 450e9), Link(15e-6, 50e9))


class Size(NamedTuple):
    """A model: its parameters and the number of tensors that they are regularized in."""

    name: str
    parameters: float
    tensors: int


MODELS = (
    Size("1 B", 1e9, 16 * 7),
    Size("70 B", 70e9, 80 * 7),
    Size("1 T dense", 1e12, 128 * 7),
    Size("1 T, 256 experts", 1e12, 61 * (256 * 3 + 4)),  # each expert's matrices tensors of their own
)
RANKS = (8, 64, 512, 4096)


class Cost(NamedTuple):
    """What weight concentration adds to a step on every rank, and what stands beside it.

    Attributes:
        size: Bytes of the all-reduce of the moments.
        exchange: Seconds of it.
        memory: Bytes that the passes over this rank's weights read and write.
        eager: Seconds of these passes, operation by operation.
        kernels: The same with one launch for all tensors.
        adamw: Seconds of AdamW's own pass.
        links: Bytes that FSDP2 moves through a rank's links in a step.
        state: Bytes of weights, gradients and AdamW's state on a rank.
        target: Seconds of the all-reduces of one measurement of SparsityTarget.
        masks: Bytes of the masks that every rank holds after pruning.
    """

    size: int
    exchange: float
    memory: float
    eager: float
    kernels: float
    adamw: float
    links: float
    state: float
    target: float
    masks: float


def cost(model: Size, ranks: int, machine: Machine = CLUSTER) -> Cost:
    """Return the cost of a model that FSDP2 shards over all ranks, in float32."""
    own = model.parameters / ranks
    memory = PENALTY_BYTES * own
    return Cost(
        size=sum(step_exchanges(model.tensors)),
        exchange=sum(machine.all_reduce(ranks, size) for size in step_exchanges(model.tensors)),
        memory=memory,
        eager=memory / machine.memory + LAUNCHES * model.tensors * machine.launch,
        kernels=memory / machine.memory + 2 * machine.launch,
        adamw=ADAMW_BYTES * own / machine.memory,
        links=FSDP_BYTES * model.parameters * (ranks - 1) / ranks,
        state=STATE_BYTES * own,
        target=sum(machine.all_reduce(ranks, size) for size in target_exchanges(model.tensors)),
        masks=model.parameters / 8,
    )


def step_exchanges(tensors: int) -> list[int]:
    """Return the bytes of every all-reduce of a penalty's step, under FSDP2."""
    return [MOMENTS * tensors]


def perturbation_exchanges(parameters: int) -> list[int]:
    """Return the bytes of every all-reduce of a perturbation, SAM's or SSAM's; biases and norms have gradients too."""
    return [NORM * parameters]


def target_exchanges(tensors: int) -> list[int]:
    """Return the bytes of every all-reduce of a measurement of SparsityTarget, but for the loss, 8 bytes a step."""
    return [MOMENTS * tensors, HISTOGRAM]


def mask_exchanges(weights: int) -> list[int]:
    """Return the bytes of every all-reduce of magnitude_masks over all layers of float32 weights."""
    if weights < SECOND_BINS:
        raise ValueError(f"the search takes other windows for fewer than {SECOND_BINS} weights, got {weights}")
    return [FLAG, 8 * (1 + FIRST_BINS), FLAG, 8 * (1 + SECOND_BINS)]


class Still(torch.optim.Optimizer):
    """A base that does nothing, so that what is measured is the wrapper alone."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-6) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Do nothing."""


class Spread(NamedTuple):
    """Seconds: the least, which others on the machine disturbed least, the median and the quartiles."""

    least: float
    middle: float
    low: float
    high: float


def timed(body: Callable[[], object], rounds: int) -> Spread:
    """Time a body on this rank, all ranks beginning together."""
    seconds = []
    for number in range(rounds + 3):
        dist.barrier()
        start = time.perf_counter()
        body()
        if number >= 3:
            seconds.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Spread(min(seconds), middle, low, high)


def sharded(tensors: int, side: int) -> nn.ParameterList:
    """Make square weights, each sharded by rows over all ranks, with a gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = side // dist.get_world_size()
    weights = nn.ParameterList(DTensor.from_local(torch.randn(rows, side), mesh, [Shard(0)]) for _ in range(tensors))
    for w in weights:
        w.grad = torch.zeros_like(w)
    return weights


def counted(tensors: int, side: int) -> dict[str, list[int]]:
    """Count the all-reduces of a step, a perturbation, a measurement and masks."""
    weights = sharded(tensors, side)
    found = {}
    wcr = WCR(Still(weights), form="scale_free")
    # Of an optimizer of its own, since the first step of one that is driven has no penalty.
    target = SparsityTarget(WCR(Still(weights), form="scale_free"), 0.9, 1000)
    ssam = SSAM(Still(weights))
    bodies = {
        "step": wcr.step,
        "perturbation": ssam.step,
        "target": target.step,
        "masks": lambda: pruning.magnitude_masks(weights, 0.9),
    }
    for name, body in bodies.items():
        with Collectives() as collectives:
            body()
        found[name] = collectives.reductions()
    return found


def measurements(tensors: int, side: int, rounds: int) -> dict[str, Any]:
    """Measure on this rank."""
    weights = sharded(tensors, side)
    parts = [local(w.detach()) for w in weights]
    gain, threshold = torch.ones(tensors, dtype=torch.float64) * 1.0001, torch.full((tensors,), 1e-6).double()

    def pass_over() -> None:
        measure(parts, "eager")
        shrink_(parts, gain, threshold)

    wcr = WCR(Still(weights), 1e-6, form="scale_free", backend="eager")
    sums = {size: torch.zeros(size, 2, dtype=torch.float64) for size in (tensors, 560, 2**16)}
    return {
        "pass": timed(pass_over, rounds),
        "step": timed(wcr.step, rounds),
        "reduce": {
            MOMENTS * size: timed(lambda part=part: dist.all_reduce(part), rounds) for size, part in sums.items()
        },
    }


def _worker(rank: int, ranks: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{ranks}", rank=rank, world_size=ranks)
    try:
        torch.manual_seed(0)
        found = {
            "counted": counted(8, 128),
            "large": measurements(options.tensors, options.side, options.rounds),
            "small": measurements(options.tensors, 32, options.rounds),
        }
        if rank == 0:
            Path(folder, f"{ranks}.json").write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measured(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in several processes; return what the first one found."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (ranks, folder, options), nprocs=ranks, start_method="spawn")
        found: dict[str, Any] = json.loads(Path(folder, f"{ranks}.json").read_text())
    return found


def fitted(one: dict[str, Any], two: dict[str, Any], options: argparse.Namespace) -> Machine:
    """Fit the model to this machine: its memory to one process, its links to two."""
    large, small = one["large"]["pass"][0], one["small"]["pass"][0]
    size = PENALTY_BYTES * options.tensors * (options.side**2 - 32**2)
    memory = size / max(large - small, 1e-9)
    launch = max(small - PENALTY_BYTES * options.tensors * 32**2 / memory, 0.0) / (LAUNCHES * options.tensors)
    sizes = {int(size): seconds[0] for size, seconds in two["large"]["reduce"].items()}
    least, most = min(sizes), max(sizes)
    # A ring of two: 2 (latency + size / 2 / bandwidth).
    bandwidth = (most - least) / max(sizes[most] - sizes[least], 1e-9)
    link = Link(max((sizes[least] - least / bandwidth) / 2, 1e-9), bandwidth)
    return Machine(memory, launch, link, link)


def predicted(machine: Machine, ranks: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of a rank's pass and of the whole step on this machine.

    A step ends when the last rank has had a core; a pass, at its least, had one from beginning to end.
    """
    model = Size("here", options.tensors * options.side**2, options.tensors)
    waiting = max(1.0, ranks / (os.cpu_count() or 1))
    found = cost(model, ranks, machine)
    return found.eager, waiting * (found.eager + found.exchange)


Row = dict[str, Any]
COLUMNS = ("what", "ranks", "unit", "measured", "median", "low", "high", "model")


def counted_rows(results: dict[int, dict[str, Any]]) -> list[Row]:
    """Compare the collectives that were counted with the model's."""
    model = {
        "step": step_exchanges(8),
        "perturbation": perturbation_exchanges(8),
        "target": target_exchanges(8),
        "masks": mask_exchanges(8 * 128**2),
    }
    rows = []
    for ranks, found in results.items():
        for name, calls in found["counted"].items():
            expected = model[name] if ranks > 1 else []
            shown = {"what": f"all-reduces of: {name}", "ranks": ranks}
            rows.append(shown | {"unit": "bytes", "measured": "+".join(map(str, calls)) or "none"})
            rows[-1]["model"] = "+".join(map(str, expected)) or "none"
    return rows


def measured_rows(results: dict[int, dict[str, Any]], machine: Machine, options: argparse.Namespace) -> list[Row]:
    """Compare the times that were measured with the model's."""
    rows = []
    for ranks, found in results.items():
        passes, whole = predicted(machine, ranks, options)
        times = {
            "pass over the shards": (found["large"]["pass"], passes),
            "whole step": (found["large"]["step"], whole),
        }
        for size, spread in found["large"]["reduce"].items():
            if ranks > 1:
                times[f"all-reduce of {int(size):,} bytes"] = (spread, machine.all_reduce(ranks, int(size)))
        for what, (spread, seconds) in times.items():
            row = {"what": what, "ranks": ranks, "unit": "ms"}
            names = ("measured", "median", "low", "high")
            row |= {name: f"{1e3 * number:.3f}" for name, number in zip(names, spread, strict=True)}
            rows.append(row | {"model": f"{1e3 * seconds:.3f}"})
    return rows


def model_rows(machine: Machine = CLUSTER) -> list[Row]:
    """Return the modelled cost of every model on every number of ranks."""
    rows = []
    for model in MODELS:
        for ranks in RANKS:
            c = cost(model, ranks, machine)
            cells = {
                "state, GB": c.state / 1e9,
                "links, GB": c.links / 1e9,
                "moments, kB": c.size / 1e3,
                "all-reduce, ms": 1e3 * c.exchange,
                "passes, GB": c.memory / 1e9,
                "eager, ms": 1e3 * c.eager,
                "Triton, ms": 1e3 * c.kernels,
                "AdamW, ms": 1e3 * c.adamw,
                "target, ms": 1e3 * c.target,
                "masks, GB": c.masks / 1e9,
            }
            named = {"model": model.name, "tensors": f"{model.tensors:,}", "ranks": f"{ranks:,}"}
            rows.append(named | {name: _three_digits(value) for name, value in cells.items()})
    return rows


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """Set rows in columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return aligned([names, *([str(row.get(name, "")) for name in names] for row in rows)], rules=(1,))


def main(argv: Sequence[str] | None = None) -> int:
    """Count, measure, model, print, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=int, default=64, help="weights of the measured model (default: %(default)s)")
    parser.add_argument("--side", type=int, default=512, help="rows and columns of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/scaling.csv"), help="(default: %(default)s)")
    options = parser.parse_args(argv)
    for name, least in (("tensors", 1), ("side", 64), ("rounds", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    results = {ranks: measured(ranks, options) for ranks in (1, 2, 4)}
    machine = fitted(results[1], results[2], options)
    counts, times, models = counted_rows(results), measured_rows(results, machine, options), model_rows()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, gloo, one thread a process")
    print(f"\nCollectives, 8 tensors of 128 x 128\n\n{table(counts)}")
    print(f"\nTimes, {options.tensors} tensors of {options.side} x {options.side}: least of {options.rounds}, median,")
    print(f"quartiles; the model knows one process's passes and two processes' all-reduces\n\n{table(times)}")
    print(f"\nModelled: per rank and step, float32, FSDP2 over all ranks\n\n{table(models)}")
    write(options.output, counts + times, models)
    print(f"\n{options.output}")
    return 0


def write(path: Path, here: Sequence[Row], models: Sequence[Row]) -> None:
    """Write all rows to one file, a line for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, ["kind", *COLUMNS], restval="")
        lines.writeheader()
        for row in here:
            lines.writerow({"kind": "here", **row})
        for row in models:
            for name, value in list(row.items())[3:]:
                what, _, unit = name.rpartition(", ")
                named = {"what": f"{row['model']}: {what}", "ranks": row["ranks"].replace(",", "")}
                lines.writerow({"kind": "cluster", **named, "unit": unit, "model": value})


if __name__ == "__main__":
    raise SystemExit(main())
