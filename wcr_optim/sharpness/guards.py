"""What a second pass over the same data must leave as the first one left it: running statistics and random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class RunningStatistics:
    """The running statistics of norm layers, and what spectral norms estimate their norm by, as they are now.

    Args:
        modules: The modules that keep some, as `with_statistics` found them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._saved: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for module in modules:
            for name, buffer in module.named_buffers(recurse=False):
                if _is_statistic(name) and not is_lazy(buffer):
                    self._saved.append((module, name, buffer, buffer.detach().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the statistics back; a layer that replaced a buffer by a new tensor gets its old one again."""
        for module, name, buffer, value in self._saved:
            buffer.copy_(value)
            setattr(module, name, buffer)


def with_statistics(model: nn.Module | None) -> list[nn.Module]:
    """Return the modules of a model that keep running statistics; None has none."""
    modules = () if model is None else model.modules()
    return [m for m in modules if any(_is_statistic(name) for name, _ in m.named_buffers(recurse=False))]


def _is_statistic(name: str) -> bool:
    # By the names that torch's norm layers and their relatives elsewhere give these buffers, so that momentum=None,
    # SyncBatchNorm and InstanceNorm need nothing of their own. The last two are spectral_norm's power iteration, in
    # both of torch's implementations: _u and weight_u.
    return name.startswith("running_") or name == "num_batches_tracked" or name.endswith(("_u", "_v"))


RandomStates = list[tuple[torch.device, Tensor]]


def random_states(devices: Iterable[torch.device]) -> RandomStates:
    """Return the states of the global random number generators of the CPU and of these devices."""
    states = [(torch.device("cpu"), torch.get_rng_state())]
    for device in sorted(set(devices), key=str):
        if device.type in ("cpu", "meta"):
            continue
        module = torch.get_device_module(device)
        states.append((device, module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)))
    return states


def set_random_states(states: RandomStates) -> None:
    """Set the generators to states that `random_states` returned."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        elif device.type == "mps":
            torch.get_device_module(device).set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def random_numbers_repeated(states: RandomStates) -> Iterator[None]:
    """Draw the numbers that were drawn since these states were taken; afterwards go on from where the generators are.

    Args:
        states: As `random_states` returned them earlier; empty for nothing to happen.
    """
    now = random_states(device for device, _ in states) if states else []
    try:
        set_random_states(states)
        yield
    finally:
        set_random_states(now)
