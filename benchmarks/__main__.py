"""``python -m benchmarks NAME [OPTIONS]`` runs a measurement; ``python -m benchmarks`` lists them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "demo": "accuracy after one-shot pruning, a small CNN on scikit-learn's digits",
    "pruning": "time and memory of exact magnitude masks against torch.nn.utils.prune",
    "inference": "speed of pruned layers in sparse formats against dense ones",
    "target": "SparsityTarget against tuned strengths, on digits and a small language model",
    "vision": "all methods on image classification: digits and textures",
    "language": "all methods on the fine-tuning of a language model",
    "segmentation": "all methods on segmentation: mosaics of textures and stained tissue",
    "ablations": "what each part of the method is worth",
    "convergence": "the gradient's norm over training with and without a penalty",
    "report": "tables and pictures of the stored results of vision, language and segmentation",
    "overhead": "what a penalty adds to an optimizer's step, around it and inside it",
    "scaling": "what a step costs at large sizes: collectives counted, steps measured, large runs modelled",
    "sharpness-cost": "a training step of SAM and SSAM against their base's",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement that the first argument names."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, end="\n\n")
        print("\n".join(f"  {name:16}{what}" for name, what in BENCHMARKS.items()))
        return 0
    name, *rest = arguments
    if name not in BENCHMARKS:
        print(f"unknown benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    try:
        suite = name in ("vision", "language", "segmentation")
        benchmark = importlib.import_module("benchmarks.suites" if suite else f"benchmarks.{name.replace('-', '_')}")
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] in ("benchmarks", "wcr_optim"):
            raise
        print(f"{missing}; install it with: pip install 'wcr_optim[bench]'", file=sys.stderr)
        return 2
    return (benchmark.main(name, rest) if suite else benchmark.main(rest)) or 0


if __name__ == "__main__":
    sys.exit(main())
