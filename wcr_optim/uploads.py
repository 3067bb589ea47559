"""Small tables on a device: sent there once, without waiting, and still there when a CUDA graph replays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class _Kept:
    """What was sent to devices, the latest so many of it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.entries: OrderedDict[tuple[Hashable, torch.device], Tensor] = OrderedDict()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        entry = (key, device)
        if entry in self.entries:
            self.entries.move_to_end(entry)
        elif is_capturing(device):
            raise RuntimeError(
                "a CUDA graph is being captured, and what its kernels read of the weights is not on the device yet; "
                "take a few plain steps with the same weights before, as torch.cuda.graph asks"
            )
        else:
            self.entries[entry] = make().pin_memory().to(device, non_blocking=True)
            if len(self.entries) > self.limit:
                self.entries.popitem(last=False)
        if is_capturing(device):
            _in_graphs.append(self.entries[entry])
        return self.entries[entry]


_tables = _Kept(2**14)
_addresses = _Kept(2**10)  # apart, since new gradients have new ones at every step, which would push out all tables
# A captured graph reads these at every replay, and nothing tells when it is gone.
_in_graphs: list[Tensor] = []


def upload(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on a device; not to be written, since equal requests share it."""
    return keep((values, dtype), device, lambda: torch.tensor(values, dtype=dtype, device="cpu"))


def keep(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """Return what `make` makes on the CPU, on a device; not to be written, since equal keys share it.

    Raises:
        RuntimeError: If a CUDA graph is being captured and the table is not there yet.

    """
    if device.type != "cuda":
        return make().to(device)
    return _tables.get(key, device, make)


def select(values: Tensor, index: list[int]) -> Tensor:
    """Return values[index] along the first dimension without waiting for the device."""
    if index == list(range(len(values))):
        return values
    return values.index_select(0, upload(tuple(index), torch.int64, values.device))


def is_capturing(device: torch.device) -> bool:
    """Return whether operations on a device are being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def pointers_to(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Return addresses on a device, for a kernel to read."""

    def make() -> Tensor:
        return torch.tensor(addresses, dtype=torch.int64, device="cpu")

    if device.type != "cuda":
        return make().to(device)
    if not is_capturing(device) or (addresses, device) in _addresses.entries:
        return _addresses.get(addresses, device, make)
    # Gradients get new addresses while a graph is captured. Numbers in a kernel's arguments are part of the graph,
    # those in the host's memory are not.
    table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), list(addresses))
    return table


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the one that kernels are launched on, for a block."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
