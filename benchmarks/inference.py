"""Speed of a pruned network's linear layers in sparse layouts, against the same pruned network dense.

On a CPU the layout is CSR, on a GPU also 2:4 semi-structured. Dense and sparse take turns in one process, on the same
input; each time is a median over rounds, each speed-up the median of the ratios within a round. Below 1 it is a
slow-down, and the table says so.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks import arguments
from wcr_optim import pruning
from wcr_optim.metrics import aligned
from wcr_optim.pruning.inference import to_csr, to_semi_structured

_SAMPLE_SECONDS = 5e-3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements and print a table."""
    options = _arguments(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    processor = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{processor}, {options.threads} threads, torch {torch.__version__}, {options.dtype}")
    print(f"{options.layers} x nn.Linear({options.width}, {options.width}), medians of {options.rounds} rounds")
    rows = [["layout", "sparsity", "batch", "dense ms", "sparse ms", "speed-up", "", "deviation"]]
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Linear(options.width, options.width) for _ in range(options.layers)))
    dense.to(device, getattr(torch, options.dtype)).eval()
    for layout, sparsity, pruned, sparse in _networks(dense, options.sparsities):
        for batch in options.batches:
            x = torch.randn(batch, options.width, device=device, dtype=getattr(torch, options.dtype))
            rows.append([layout, f"{sparsity:.0%}", str(batch), *_compared(pruned, sparse, x, options.rounds)])
    print(aligned(rows, rules=(1,)))
    return 0


def _networks(dense: nn.Sequential, sparsities: Sequence[float]) -> list[tuple[str, float, nn.Module, nn.Module]]:
    """Pairs of the same pruned network, dense and sparse."""
    networks: list[tuple[str, float, nn.Module, nn.Module]] = []
    for sparsity in sparsities:
        pruned = copy.deepcopy(dense)
        pruning.apply_(pruned, pruning.magnitude_masks(pruned, sparsity, scope="layer"))
        networks.append(("CSR", sparsity, pruned, to_csr(pruned, min_sparsity=0.0)))
    if dense[0].weight.is_cuda:
        pruned = copy.deepcopy(dense)
        pruning.apply_(pruned, pruning.n_m_masks(pruned, 2, 4))
        networks.append(("2:4", 0.5, pruned, to_semi_structured(pruned)))
    return networks


def _compared(dense: nn.Module, sparse: nn.Module, x: Tensor, rounds: int) -> list[str]:
    with torch.inference_mode():
        expected, found = dense(x).double(), sparse(x).double()
        deviation = float((found - expected).norm() / expected.norm())
        calls = max(1, round(_SAMPLE_SECONDS / _seconds(lambda: dense(x), 1)))
        pairs = [(_seconds(lambda: dense(x), calls), _seconds(lambda: sparse(x), calls)) for _ in range(rounds)]
    speedup = statistics.median(before / after for before, after in pairs)
    times = [f"{1e3 * statistics.median(column):.3f}" for column in zip(*pairs, strict=True)]
    return [*times, f"{speedup:.2f}", "" if speedup >= 1 else "slower", f"{deviation:.0e}"]


def _seconds(run: Callable[[], Tensor], calls: int) -> float:
    """Time of one call, after one that warms up."""
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks inference", description=__doc__)
    parser.add_argument("--width", type=arguments.count, default=1024, help="features of every layer (default: 1024)")
    parser.add_argument("--layers", type=arguments.count, default=4, help="number of layers (default: 4)")
    parser.add_argument("--sparsities", type=arguments.sparsity, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
    parser.add_argument(
        "--batches", type=arguments.count, nargs="+", default=[1, 16, 128], help="rows of input (default: 1 16 128)"
    )
    parser.add_argument("--rounds", type=arguments.count, default=15, help="measurements of each pair (default: 15)")
    parser.add_argument(
        "--threads", type=arguments.count, default=torch.get_num_threads(), help="(default: torch's choice)"
    )
    parser.add_argument("--device", type=arguments.device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "float64", "float16", "bfloat16"], default="float32")
    options = parser.parse_args(argv)
    if options.device == "cpu" and options.dtype in ("float16", "bfloat16"):
        parser.error(f"--dtype {options.dtype} needs --device cuda: on a CPU torch multiplies no sparse matrices of it")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
