"""Import this before anything that imports Triton: where there is no GPU, its kernels then run on the CPU."""

import os
import sys
import warnings
from contextlib import contextmanager

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("Triton was imported without TRITON_INTERPRET=1; set it for the whole run of pytest")
    os.environ["TRITON_INTERPRET"] = "1"


@contextmanager
def nothing_waits(mode="error"):
    """Raise where the host waits for the GPU within the block, or warn; yields the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # that this is a prototype is one of them
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")
