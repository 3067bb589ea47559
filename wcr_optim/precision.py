"""In which precision what is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(device: torch.device) -> torch.dtype:
    """Precision of a layer's few numbers: V = q - mu^2 cancels, so float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(w: Tensor) -> torch.dtype:
    """Precision of arithmetic on weights: their own, at least float32."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32
