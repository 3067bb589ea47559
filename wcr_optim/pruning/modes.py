"""How a model runs for the duration of a block."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own when the block is left in whatever way."""
    # Flag by flag: train() and eval() are often overridden, to keep norm layers frozen or to merge adapters.
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


def without_compilation() -> AbstractContextManager[object]:
    """Run compiled modules eagerly: compiled code does not see hooks and modes that are new to it."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
