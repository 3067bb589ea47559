"""Import this before anything that imports Triton: where there is no GPU, its kernels then run on the CPU."""

import os
import sys

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("Triton was imported without TRITON_INTERPRET=1; set it for the whole run of pytest")
    os.environ["TRITON_INTERPRET"] = "1"
