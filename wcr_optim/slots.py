"""One tensor per parameter that belongs in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer


class Slot:
    """A tensor per parameter, kept in the optimizer's state under a key of its own.

    Optimizers set up a parameter's state when they find none, so nothing may stand there before the base has. Until
    then the tensor is kept aside; `settle`, after the base's step, moves it to its place.

    Args:
        key: Key in the state of each parameter.
    """

    _keys: ClassVar[set[str]] = set()  # of all slots: what else stands in a state is the base's

    def __init__(self, key: str) -> None:
        self.key = key
        Slot._keys.add(key)
        self._aside: dict[Tensor, Tensor] = {}

    def get(self, optimizer: Optimizer, p: Tensor) -> Tensor | None:
        """Return a parameter's tensor, None if it has none."""
        value: Any = optimizer.state.get(p, {}).get(self.key)
        return self._aside.get(p) if value is None else value

    def put(self, optimizer: Optimizer, p: Tensor, value: Tensor) -> None:
        """Set a parameter's tensor."""
        if optimizer.state.get(p):
            optimizer.state[p][self.key] = value
        else:
            self._aside[p] = value

    def drop(self, optimizer: Optimizer, p: Tensor) -> None:
        """Forget a parameter's tensor."""
        self._aside.pop(p, None)
        optimizer.state.get(p, {}).pop(self.key, None)

    def settle(self, optimizer: Optimizer, stepped: Iterable[Tensor]) -> None:
        """Move to the state what was kept aside for parameters that the base has stepped, see `wrapper.stepped_by`.

        Around a base that makes no states, as SGD without momentum, the other parameters get an empty one, since
        torch.distributed.checkpoint loads states of all parameters or of none.
        """
        waiting = [p for p in dict.fromkeys(stepped) if p in self._aside]
        if not waiting:
            return
        state = optimizer.state
        for p in waiting:
            state[p][self.key] = self._aside.pop(p)
        every = [p for group in optimizer.param_groups for p in group["params"]]
        if all(state.get(p, {}).keys() <= Slot._keys for p in every):
            for p in every:
                state[p]  # a defaultdict

    @property
    def waits(self) -> bool:
        """Whether anything is kept aside."""
        return bool(self._aside)

    def clear(self) -> None:
        """Forget what is kept aside; the state is the optimizer's to replace."""
        self._aside.clear()
