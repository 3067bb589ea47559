"""Latent weights: what a penalty took to zero stays there until the updates outweigh the penalty, not for one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from wcr_optim.eager_units import number_of_units, rows_at_once, rows_of
from wcr_optim.layout import as_dtensor, local
from wcr_optim.precision import compute_dtype
from wcr_optim.slots import Slot


class _Held(NamedTuple):
    """A weight that is under way between the penalty's step and the end of the base's."""

    weight: Tensor
    latent: Tensor
    sum: Tensor
    signs: Tensor  # of the shrunk weight on this rank, int8


class LatentWeights:
    """Latent weights of the layers under a penalty, kept in the optimizer's state.

    Around a penalty whose shrink has thresholds t and a base whose update of the shrunk weights is d, they are those of
    regularized dual averaging: a latent weight z collects the updates, T the thresholds, and the weight is

        T <- T + t,    z <- z + d,    w = softshrink(z, T) = sign(z) max(|z| - T, 0).

    Without them a weight at zero is moved by every single update and taken back by the next threshold: what it does in
    between is noise, and only one update at a time can bring it back. With them it is exactly zero until the updates
    since then add up to more than the thresholds since then do, and a weight that would pass through zero stops there.

    z says nothing of a weight that is not zero, and is 0 there; the weight itself then moves as without all this, with
    the penalty's gain and what its threshold spares.

    A step is `take`, the penalty's shrink, `hold`, the base's update and `release`.

    Args:
        key: Begins the names in each weight's state: key of z, in the weight's shape, in float32 or wider, and key_sum
            of T, one for each row.

    Source:
        Xiao, "Dual averaging methods for regularized stochastic learning and online optimization", JMLR 2010. That the
        base's update takes the gradient's place, and the penalty's own gain, are ours.
    """

    def __init__(self, key: str) -> None:
        self._latent, self._sum = Slot(key), Slot(f"{key}_sum")
        self._taken: list[Tensor] = []
        self._held: list[_Held] = []

    def begin(self) -> None:
        """Forget what an interrupted step left."""
        self._taken, self._held = [], []

    def take(self, optimizer: Optimizer, layers: Sequence[Tensor], thresholds: Sequence[Tensor | float]) -> None:
        """Note weights before they are shrunk.

        Args:
            optimizer: Whose state they are kept in.
            layers: Weights.
            thresholds: What each is shrunk by: a number, or one for each of its rows on this rank.

        """
        for w, threshold in zip(layers, thresholds, strict=True):
            z, total = self._state(optimizer, w)
            for x, latent, reach in _pieces(local(w), local(z), local(total)):
                moved = x.to(latent.dtype)
                _replace_(latent, moved.sign(), reach).add_(moved)
            local(total).add_(threshold)
        self._taken += layers

    def hold(self, optimizer: Optimizer) -> None:
        """Note shrunk weights before the base moves them."""
        for w in self._taken:
            z, total = self._state(optimizer, w)
            signs = torch.empty_like(local(w), dtype=torch.int8, requires_grad=False)
            for x, latent, reach, sign in _pieces(local(w), local(z), local(total), signs):
                direction = x.sign().to(latent.dtype)
                _replace_(latent, direction, reach)
                sign.copy_(direction)
            self._held.append(_Held(w, z, total, signs))
        self._taken = []

    def release(self, optimizer: Optimizer, stepped: Iterable[Tensor] = ()) -> None:
        """Bring the weights that were zero, or passed through it, to where their latent ones say.

        Args:
            optimizer: Whose state they are kept in.
            stepped: Parameters that the base has stepped and that had no state before (default: none).

        """
        for w, z, total, signs in self._held:
            for x, latent, reach, sign in _pieces(local(w), local(z), local(total), signs):
                latent.add_(x)
                beyond = latent - latent.minimum(reach).maximum(-reach)
                # What was not zero and kept its sign is left as it is: rounding has no part in it.
                torch.where(x * sign > 0, x, beyond.to(x.dtype), out=x)
                latent.masked_fill_(x != 0, 0.0)
        self._latent.settle(optimizer, stepped)
        self._sum.settle(optimizer, stepped)
        self._held = []

    @property
    def waits(self) -> bool:
        """Whether a weight has no state of its base yet."""
        return self._latent.waits

    def load(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Take what a checkpoint has as it is: torch casts state to the weights' dtype, which may be too narrow."""
        self.begin()
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        for slot in (self._latent, self._sum):
            slot.clear()
            for name, w in zip(names, weights, strict=True):
                saved = state_dict["state"].get(name, {}).get(slot.key)
                if isinstance(saved, Tensor) and saved.dtype != w.dtype:
                    optimizer.state[w][slot.key] = saved.to(device=w.device, copy=True)

    def _state(self, optimizer: Optimizer, w: Tensor) -> tuple[Tensor, Tensor]:
        z, total = self._latent.get(optimizer, w), self._sum.get(optimizer, w)
        if z is None or total is None:
            z = torch.zeros_like(w, dtype=compute_dtype(w), requires_grad=False)
            total = _zero_for_each_row(w)
            self._latent.put(optimizer, w, z)
            self._sum.put(optimizer, w, total)
        return z, total


def _replace_(latent: Tensor, sign: Tensor, reach: Tensor) -> Tensor:
    """Put sign * reach where there is a sign, and leave the rest; several times as fast as torch.where on the CPU."""
    return latent.addcmul_(latent, sign * sign, value=-1.0).addcmul_(sign, reach)


def _pieces(part: Tensor, latent: Tensor, total: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut what lies on this rank into pieces of whole rows that fit the cache; the sum's broadcast over them."""
    rows = rows_of(part)
    reach = total.view(-1, *[1] * (rows.ndim - 1))
    at_once = rows_at_once(rows)
    yield from zip(
        *(torch.split(x, at_once) for x in (rows, rows_of(latent), reach, *map(rows_of, others))), strict=True
    )


def _zero_for_each_row(w: Tensor) -> Tensor:
    """Return zeros, shape (rows,), that lie over the ranks as the rows do."""
    part = local(w)
    zeros = torch.zeros(number_of_units(w), dtype=compute_dtype(w), device=part.device)
    sharded = as_dtensor(w)
    if sharded is None:
        return zeros
    from torch.distributed.tensor import DTensor, Replicate

    placements = [p if getattr(p, "dim", None) == 0 else Replicate() for p in sharded.placements]
    return DTensor.from_local(
        zeros, sharded.device_mesh, placements, run_check=False, shape=torch.Size((w.shape[0],)), stride=(1,)
    )
