"""``wcr-optim``: look at a checkpoint, prune it, and store it in a small file or a dense one."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wcr_optim
from wcr_optim.checkpoints import prunable_names, read_checkpoint
from wcr_optim.files import write_safetensors
from wcr_optim.metrics import LARGEST, LayerConcentration, concentration
from wcr_optim.parameters import memory
from wcr_optim.pruning.sparse_file import encoded_size, save_sparse
from wcr_optim.pruning.threshold import check_sparsity, keep_masks
from wcr_optim.tables import aligned

_TOP = 0.05

_DESCRIPTION = """\
Look at a checkpoint, prune it by magnitude, and store it in a small file or a dense one.

FILE is .safetensors, dense or sparse, or a .pt, .pth or .bin of torch.save that holds tensors and plain containers
only; nothing in it is ever executed. Which tensors are weights is told by name and shape: floating-point matrices whose
name does not speak of a bias, a norm, an embedding, a table, a mask, scales or a low-rank adapter. Names of one and the
same tensor stay tied in a sparse file; tensors that overlap in memory otherwise become separate ones."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None stands for those of the process (default: None)

    Returns:
        0, or 2 after an error, which is explained on standard error.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as exit_:  # argparse has printed the help, the version, or what is wrong
        return int(exit_.code or 0)
    try:
        result, text = options.command(options)
        print(json.dumps(result, allow_nan=False) if options.json else text, flush=True)
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more when it closes the stream at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"wcr-optim: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for a failed allocation on the CPU.
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        print(f"wcr-optim: error: {options.file!r} does not fit into the memory", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wcr-optim", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"wcr-optim {wcr_optim.__version__}")
    commands = parser.add_subparsers(required=True, metavar="{inspect,prune,expand}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("file", metavar="FILE", help="checkpoint: .safetensors, .pt, .pth or .bin")
    common.add_argument("--key", help="entry of a pickled dict that holds the state dict (default: look for it)")
    common.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    weights = argparse.ArgumentParser(add_help=False)
    weights.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave tensors with such names dense; repeatable",
    )
    target = argparse.ArgumentParser(add_help=False)
    target.add_argument("--force", action="store_true", help="replace the output file if it exists")

    inspect = commands.add_parser(
        "inspect", parents=[common, weights], help="print every tensor's sparsity, energy and size"
    )
    inspect.set_defaults(command=_inspect)
    prune = commands.add_parser(
        "prune", parents=[common, weights, target], help="set the smallest weights to zero and write a sparse file"
    )
    prune.add_argument("--sparsity", type=float, required=True, help="share of the weights to prune, as in 0.95")
    prune.add_argument(
        "--scope",
        choices=["global", "layer"],
        default="global",
        help="rank all weights together or each tensor on its own (default: global)",
    )
    prune.add_argument("-o", "--output", metavar="OUT", help="default: FILE with the suffix .pruned.safetensors")
    prune.add_argument("--dense", action="store_true", help="write zeros like any other weight, for any reader")
    prune.set_defaults(command=_prune)
    expand = commands.add_parser("expand", parents=[common, target], help="write a dense .safetensors file")
    expand.add_argument("-o", "--output", metavar="OUT", required=True)
    expand.set_defaults(command=_expand)
    return parser


# ------------------------------------------------------------------------------------------------------ commands


def _inspect(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    state = _read(options)
    weights = prunable_names(state, options.exclude, strict=False)
    endless = {name: kind for name in weights if (kind := _endless(state[name]))}
    measured = concentration({name: state[name] for name in weights if name not in endless}, top=(_TOP,))
    layers = {layer.name: layer for layer in measured.layers}
    rows: list[dict[str, Any]] = []
    owners: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        owner = owners.setdefault(memory(tensor), name)
        row: dict[str, Any] = {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": _dtype(tensor),
            "prunable": name in weights,
        }
        if owner != name:
            rows.append({**row, "same_as": owner})
            continue
        encoding, size = encoded_size(tensor)
        rows.append(
            {
                **row,
                "sparsity": 1.0 - _nonzero(tensor) / tensor.numel() if tensor.numel() else 0.0,
                **(_energy(layers[name]) if name in layers else {}),
                **({"energy": endless[name]} if name in endless else {}),
                "dense_bytes": tensor.nbytes,
                "sparse_bytes": size,
                "encoding": encoding,
            }
        )
    total = _total(state, rows)
    if endless:
        total["energy"] = "NaN" if "NaN" in endless.values() else "inf"
    elif weights:
        total |= _energy(measured.total)
    result = {"file": options.file, "tail_energy": measured.tail_energy, "tensors": rows, "total": total}
    return result, _inspection(result)


def _total(state: Mapping[str, Tensor], rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    owned = [row for row in rows if "same_as" not in row]
    sizes = {row["name"]: state[row["name"]].numel() for row in owned}
    zeros = {row["name"]: row["sparsity"] * sizes[row["name"]] for row in owned}
    weights = [row["name"] for row in owned if row["prunable"]]
    prunable = sum(sizes[name] for name in weights)
    return {
        "elements": sum(sizes.values()),
        "sparsity": sum(zeros.values()) / max(1, sum(sizes.values())),
        "prunable": prunable,
        "sparsity_of_prunable": sum(zeros[name] for name in weights) / max(1, prunable),
        "dense_bytes": sum(row["dense_bytes"] for row in owned),
        "sparse_bytes": sum(row["sparse_bytes"] for row in owned),
    }


def _prune(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    sparsity = check_sparsity(options.sparsity)
    output = _output(options.output or Path(options.file).with_suffix(".pruned.safetensors"), options.force)
    state = _read(options)
    before = os.path.getsize(options.file)
    weights = {name: state[name] for name in prunable_names(state, options.exclude)}
    if not weights:
        raise ValueError(f"{options.file!r} holds no weights to prune; `wcr-optim inspect` says what it holds")
    keep = keep_masks(weights, sparsity, options.scope)
    # By memory, so that all names of a tied weight get the same pruned tensor.
    pruned = {memory(weight): weight.masked_fill(~keep[name], 0.0) for name, weight in weights.items()}
    _write({name: pruned.get(memory(tensor), tensor) for name, tensor in state.items()}, output, options.dense)
    layers = []
    for name, weight in weights.items():
        kept = int(keep[name].sum())
        share = 1.0 - kept / weight.numel()
        layers.append(
            {"name": name, "shape": list(weight.shape), "weights": weight.numel(), "kept": kept, "sparsity": share}
        )
    matrices = [name for name, tensor in state.items() if tensor.ndim >= 2 and tensor.is_floating_point()]
    distinct = {memory(tensor): tensor.numel() for tensor in state.values()}
    result = {
        "file": options.file,
        "output": os.fspath(output),
        "scope": options.scope,
        "layers": layers,
        "left_dense": [name for name in matrices if memory(state[name]) not in pruned],
        "weights": sum(weight.numel() for weight in weights.values()),
        "kept": sum(int(mask.sum()) for mask in keep.values()),
        "elements": sum(distinct.values()),
        "file_bytes": before,
        "output_bytes": os.path.getsize(output),
    }
    return result, _pruning(result)


def _expand(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    output = _output(options.output, options.force)
    state = _read(options)
    before = os.path.getsize(options.file)
    _write(state, output, dense=True)
    result = {
        "file": options.file,
        "output": os.fspath(output),
        "tensors": len(state),
        "file_bytes": before,
        "output_bytes": os.path.getsize(output),
    }
    return result, f"{output}: {len(state)} tensors, {_size(before)} -> {_size(os.path.getsize(output))}"


# --------------------------------------------------------------------------------------------------------- files


def _read(options: argparse.Namespace) -> dict[str, Tensor]:
    state, notices = read_checkpoint(options.file, options.key)
    for notice in notices:
        print(f"wcr-optim: {notice}", file=sys.stderr)
    return state


def _output(path: str | Path, force: bool) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"the output has to be a .safetensors file, got {os.fspath(path)!r}")
    if path.exists() and not force:
        raise FileExistsError(f"{os.fspath(path)!r} exists; use --force to replace it, or another name with -o")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(path.parent)!r}")
    return path


def _write(state: Mapping[str, Tensor], path: Path, dense: bool) -> None:
    if not dense:
        save_sparse(state, path)
        return
    # A dense safetensors file holds no shared memory: every name of a tied tensor gets a copy.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    write_safetensors(copies, path, {"format": "pt"})


# -------------------------------------------------------------------------------------------------------- tables


def _inspection(result: Mapping[str, Any]) -> str:
    rows = [["tensor", "shape", "dtype", "sparsity", f"top {100 * _TOP:g} %", "lossless", "dense", "sparse"]]
    for row in result["tensors"]:
        begin = [row["name"], _shape(row["shape"]), row["dtype"]]
        if "same_as" in row:
            rows.append([f"{row['name']} = {row['same_as']}", *begin[1:], "", "", "", "", ""])
        else:
            rows.append([*begin, *_cells(row)])
    total = result["total"]
    weights = {**total, "sparsity": total["sparsity_of_prunable"]}
    rows.append(["prunable weights", f"{total['prunable']:,}", "", *_cells(weights)[:3], "", ""])
    rest = {key: value for key, value in total.items() if not key.startswith(("top", "lossless", "energy"))}
    rows.append(["all tensors", f"{total['elements']:,}", "", *_cells(rest)])
    legend = (
        f"top {100 * _TOP:g} %: share of the energy in the largest {100 * _TOP:g} % of the weights; lossless: largest\n"
        f"sparsity whose pruned weights hold at most {result['tail_energy']:g} of it; sparse: bytes in a sparse file"
    )
    return f"{aligned(rows, rules=(1, len(rows) - 2))}\n{legend}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    shares = [f"{row[key]:.1%}" if key in row else "" for key in ("sparsity", "top_energy", "lossless_sparsity")]
    if "energy" in row:
        shares[1:] = [row["energy"]] * 2
    return [*shares, _size(row["dense_bytes"]), _size(row["sparse_bytes"])]


def _pruning(result: Mapping[str, Any]) -> str:
    rows = [["weight", "shape", "weights", "kept", "sparsity"]]
    for layer in result["layers"]:
        counts = [f"{layer['weights']:,}", f"{layer['kept']:,}", f"{layer['sparsity']:.2%}"]
        rows.append(
            [layer["name"] + ("" if layer["kept"] else "  (lost every weight)"), _shape(layer["shape"]), *counts]
        )
    weights, kept, elements = result["weights"], result["kept"], result["elements"]
    rows.append(["prunable weights", "", f"{weights:,}", f"{kept:,}", f"{1 - kept / weights:.2%}"])
    left = elements - weights + kept
    rows.append(["all tensors", "", f"{elements:,}", f"{left:,}", f"{1 - left / elements:.2%}"])
    before, after = result["file_bytes"], result["output_bytes"]
    dense = f"left dense: {', '.join(result['left_dense'])}\n" if result["left_dense"] else ""
    return (
        f"{aligned(rows, rules=(1, len(rows) - 2))}\n{dense}"
        f"{result['output']}: {_size(before)} -> {_size(after)} ({after / before:.1%})"
    )


def _energy(layer: LayerConcentration) -> dict[str, float]:
    return {"top_energy": layer.top[_TOP], "lossless_sparsity": layer.lossless_sparsity}


def _endless(tensor: Tensor) -> str | None:
    """Say what keeps the energy of a tensor from being a number, if anything does."""
    largest = float(tensor.abs().max())
    return "NaN" if math.isnan(largest) else "inf" if largest >= LARGEST else None


def _nonzero(tensor: Tensor) -> int:
    # torch does not count in 8-bit floats and in the wider unsigned integers; float64 has room for "not zero" of all.
    odd = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)
    odd |= tensor.is_floating_point() and tensor.element_size() == 1
    return int(torch.count_nonzero(tensor.double() if odd else tensor))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"


if __name__ == "__main__":
    sys.exit(main())
