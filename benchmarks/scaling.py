"""What a step costs over many ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Collective(NamedTuple):
    """One collective operation as this rank saw it.

    Attributes:
        name: As torch calls it, for example "allreduce_".
        bytes: Of this rank's tensors in it.
    """

    name: str
    bytes: int


class Collectives(TorchDispatchMode):
    """Lists every collective that is called within the block, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the call and let it pass."""
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("barrier", "wait_tensor"):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.calls.append(Collective(name, sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))))
        return func(*args, **(kwargs or {}))

    def reductions(self) -> list[int]:
        """Return the bytes of every all-reduce."""
        return [call.bytes for call in self.calls if call.name == "allreduce_"]
