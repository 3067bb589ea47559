"""Time and memory of exact magnitude masks, beside torch.nn.utils.prune.global_unstructured on the same weights.

Every run is a process of its own, so that its peak memory is its own, and the two methods take turns. The weights are
distinct in magnitude, so that both must choose the same ones. Extra memory is the process's peak resident set less what
it held, weights included, when the method began.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import arguments
from wcr_optim import pruning

MIB = 2**20
MOST_MIB = 256  # of float32 weights: more cannot all be made distinct in magnitude here
LAYERS = 12
PIECE = 2**14  # weights made at a time, so that nothing but the weights is left when the measurement begins


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements and print a table."""
    options = _arguments(argv)
    if options.measure:
        print(json.dumps(_measure(options)))
        return 0
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    weights = options.mib * MIB
    runs: dict[str, list[dict[str, Any]]] = {"torch": [], "wcr_optim": []}
    for repeat in range(options.repeats):
        for method in runs:
            print(f"run {repeat + 1} of {options.repeats}: {method}", file=sys.stderr)
            runs[method].append(_in_own_process(method, options))
    print(f"\n{options.mib} MiB of float32 weights in {LAYERS} layers, {options.sparsity:.0%} pruned globally:\n")
    print(f"{'':24}{'seconds':>10}{'extra MiB':>11}{'x weights':>11}{'kept':>13}")
    for label, method in (("torch.nn.utils.prune", "torch"), ("wcr_optim", "wcr_optim")):
        seconds = statistics.median(run["seconds"] for run in runs[method])
        extra = max(run["extra_bytes"] for run in runs[method])
        print(f"{label:24}{seconds:10.2f}{extra / MIB:11.1f}{extra / weights:11.2f}{runs[method][0]['kept']:13,}")
    ratios = [slow["seconds"] / fast["seconds"] for slow, fast in zip(*runs.values(), strict=True)]
    print(
        f"\n{statistics.median(ratios):.0f} times as fast (run by run: {', '.join(f'{ratio:.0f}' for ratio in ratios)})"
    )
    same = len({run["masks"] for method in runs.values() for run in method}) == 1
    print(f"masks are {'equal' if same else 'DIFFERENT'}")
    if options.stream:
        run = _in_own_process("stream", options)
        print(f"\n{run['weights']:,} float32 weights, made and dropped one tensor at a time, {run['kept']:,} kept:")
        print(f"{run['seconds']:.0f} s, of which {run['making']:.0f} s go into making them three times over;")
        print(
            f"{run['extra_bytes'] / MIB:.0f} MiB extra, of which {run['mask_bytes'] / MIB:.0f} MiB are the masks "
            f"and {run['tensor_bytes'] / MIB:.0f} MiB one tensor"
        )
    return 0 if same else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks pruning", description=__doc__)
    parser.add_argument("--mib", type=arguments.count, default=192, help="size of the weights (default: %(default)s)")
    parser.add_argument("--sparsity", type=arguments.sparsity, default=0.95, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=arguments.count, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=arguments.count, default=os.cpu_count(), help="(default: %(default)s)")
    parser.add_argument(
        "--stream",
        type=arguments.number,
        default=1e9,
        help="weights of the streaming case, 0 to skip it (default: %(default)g)",
    )
    parser.add_argument("--measure", choices=("torch", "wcr_optim", "stream"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.mib > MOST_MIB:
        parser.error(f"--mib must be at most {MOST_MIB}, got {options.mib}: more weights cannot all be made distinct")
    return options


def _in_own_process(method: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.pruning", "--measure", method]
    for option in ("mib", "sparsity", "threads", "stream"):
        command += [f"--{option}", str(getattr(options, option))]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    return _stream(options) if options.measure == "stream" else _compare(options)


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    model = _distinct_model(options.mib * MIB // 4 // LAYERS)
    before = _resident_bytes()
    started = time.perf_counter()
    if options.measure == "torch":
        layers = [(layer, "weight") for layer in model]
        nn.utils.prune.global_unstructured(layers, nn.utils.prune.L1Unstructured, amount=options.sparsity)
    else:
        masks = pruning.magnitude_masks(model, options.sparsity)
        pruning.apply_(model, masks)
    seconds = time.perf_counter() - started
    extra = _peak_bytes() - before
    if options.measure == "torch":
        masks = pruning.from_torch_prune(model)
    digest = hashlib.sha256(b"".join(masks[name].numpy().tobytes() for name in masks)).hexdigest()
    return {"seconds": seconds, "extra_bytes": extra, "kept": masks.kept, "masks": digest}


def _distinct_model(per_layer: int) -> nn.Sequential:
    """Layers whose weights all differ in magnitude, spread evenly over eight octaves, half of them negative."""
    model = nn.Sequential()
    first = torch.tensor(2.0**-12).view(torch.int32).item()
    for index in range(LAYERS):
        layer = nn.utils.skip_init(nn.Linear, 1024, per_layer // 1024, bias=False)
        flat = layer.weight.detach().view(-1)
        for part in range(0, flat.numel(), PIECE):
            place = torch.arange(part, min(part + PIECE, flat.numel())) + index * flat.numel()
            bits = (first + place * 40_503_685 % 2**26).to(torch.int32)  # an odd factor permutes the residues
            flat[part : part + PIECE] = bits.view(torch.float32) * (1 - 2 * (place * 2_654_435_761 // 2**16 % 2))
        model.append(layer)
    return model


def _stream(options: argparse.Namespace) -> dict[str, Any]:
    size = 2**22
    count = max(1, round(options.stream / size))
    making = 0.0

    def make(index: int) -> Tensor:
        nonlocal making
        started = time.perf_counter()
        weights = torch.empty(1024, size // 1024).normal_(generator=torch.Generator().manual_seed(index))
        making += time.perf_counter() - started
        return weights

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for index in range(count):
            yield f"layer{index}.weight", make(index)

    make(0)
    before, making = _resident_bytes(), 0.0
    started = time.perf_counter()
    masks = pruning.stream_masks(tensors, options.sparsity)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "making": making,
        "extra_bytes": _peak_bytes() - before,
        "weights": masks.total,
        "kept": masks.kept,
        "mask_bytes": masks.total // 8,
        "tensor_bytes": 4 * size,
    }


def _peak_bytes() -> int:
    if (peak := _of_linux("VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident_bytes() -> int:
    now = _of_linux("VmRSS")
    return _peak_bytes() if now is None else now  # elsewhere the most until now is the best guess


def _of_linux(entry: str) -> int | None:
    # Not getrusage(), whose peak on Linux begins with that of the parent process.
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(entry))


if __name__ == "__main__":
    sys.exit(main())
