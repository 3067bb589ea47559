"""How the device that something is measured on is set up."""

from __future__ import annotations

import torch


def settle(device: str) -> None:
    """Let a CUDA device multiply float32 matrices in TF32, as trainings there do; the CPU stays as it is."""
    if device != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
