"""How the device that something is measured on is set up."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def settle(device: str) -> None:
    """Let a CUDA device multiply float32 matrices in TF32, as trainings there do; the CPU stays as it is."""
    if device != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def mixed_precision(device: str) -> AbstractContextManager[Any]:
    """Return a context for a loss: on a CUDA device in bfloat16 wherever autocast finds it safe, else as it is."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
