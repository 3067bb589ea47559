"""How concentrated the weights of a model are: what pruning would take away, before anything is pruned.

The energy of weights is the sum of their squares. A model survives pruning when a small share of its weights holds
nearly all of its energy; these measures say how small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wcr_optim.layout import as_dtensor, flat
from wcr_optim.parameters import Selector, prunable_weights
from wcr_optim.tables import aligned
from wcr_optim.wrapper import no_penalty, outermost

TAIL_ENERGY = 3e-3
"""Share of the energy that a model is expected to lose without noticing; see `LayerConcentration.lossless_sparsity`."""

LARGEST = 1e300
"""Magnitudes are measured below this, so that sums of them stay finite."""

_DENSITIES = tuple(float(density) for density in np.logspace(-4, 0, 161))
_CHUNK = 2**20

# Magnitudes that agree in exponent and 16 bits of mantissa are counted together. That is exact for bfloat16 and float16
# and within 2**-16 of those magnitudes for wider types, and it bounds the memory whatever the number of weights.
_DROPPED_BITS = 52 - 16


@dataclass(frozen=True)
class EnergyCurve:
    """Share of the energy that the largest weights hold, as a function of how many they are.

    Attributes:
        density: Shares of the weights in (0, 1], ascending.
        energy: Shares of the energy in [0, 1] that so many of the largest weights hold.
    """

    density: tuple[float, ...]
    energy: tuple[float, ...]


@dataclass(frozen=True)
class LayerConcentration:
    """Measures of one layer's weights, or of all layers' together.

    A layer without energy has nothing to lose: its shares of energy and its lossless sparsity are 1, the rest is 0.

    Attributes:
        name: The parameter's name, or ``"total"``.
        weights: Number of weights n.
        nonzero: How many of them are not zero.
        top: Share of the energy in the top k of the weights, by k. A fraction of a weight counts as that fraction.
        gini: Gini coefficient of the magnitudes: 0 when all are equal, (n - 1) / n when a single one is not zero.
        effective_weights: (sum w^2)^2 / sum w^4: n when all magnitudes are equal, k when k are and the rest is zero.
        lossless_sparsity: The largest sparsity whose pruned weights hold at most ``tail_energy`` of the energy. A
            prediction from weights alone: evaluation (`wcr_optim.pruning.sweep`) has the last word.
        curve: The share of energy at densities from 1e-4 to 1.
    """

    name: str
    weights: int
    nonzero: int
    top: dict[float, float]
    gini: float
    effective_weights: float
    lossless_sparsity: float
    curve: EnergyCurve


@dataclass(frozen=True)
class Concentration:
    """Measures of a model; ``str()`` gives a table.

    Attributes:
        layers: One per prunable weight, in the model's order.
        total: All of them together, ranked by magnitude across layers.
        tail_energy: The share of energy that `LayerConcentration.lossless_sparsity` gives up.
    """

    layers: tuple[LayerConcentration, ...]
    total: LayerConcentration
    tail_energy: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON knows; the shares in ``top`` become strings."""
        result = asdict(self)
        for row in (*result["layers"], result["total"]):
            row["top"] = {f"{share:g}": energy for share, energy in row["top"].items()}
            row["curve"] = {name: list(values) for name, values in row["curve"].items()}
        return {**result, "layers": list(result["layers"])}

    def __str__(self) -> str:
        shares = [f"top {100 * share:g} %" for share in self.total.top]
        rows = [["layer", "weights", "nonzero", *shares, "Gini", "effective", "lossless"]]
        for row in (*self.layers, self.total):
            n = max(row.weights, 1)
            rows.append(
                [
                    row.name,
                    f"{row.weights:,}",
                    f"{100 * row.nonzero / n:.1f} %",
                    *(f"{100 * energy:.1f} %" for energy in row.top.values()),
                    f"{row.gini:.3f}",
                    f"{100 * row.effective_weights / n:.2f} %",
                    f"{100 * row.lossless_sparsity:.1f} %",
                ]
            )
        note = f"lossless: largest sparsity whose pruned weights hold at most {self.tail_energy:g} of the energy"
        return f"{aligned(rows, rules=(1, len(rows) - 1))}\n{note}"


def concentration(
    model: nn.Module | Mapping[str, Tensor],
    top: Sequence[float] = (0.01, 0.05, 0.1),
    exclude: Iterable[Selector] | Selector = (),
    *,
    tail_energy: float = TAIL_ENERGY,
) -> Concentration:
    """Measure how concentrated a model's prunable weights are, layer by layer and together.

    Works through chunks of the weights; its memory does not grow with their number.

    Args:
        model: A module, of which the `wcr_optim.pruning.prunable_weights` are measured, or weights by name, all of
            which are.
        top: Shares of the weights, in [0, 1], whose share of the energy to report (default: (0.01, 0.05, 0.1))
        exclude: Which weights of a module to leave out, as in `wcr_optim.pruning.prunable_weights` (default: ())
        tail_energy: Share of the energy in [0, 1] that a lossless sparsity may give up (default: 3e-3)

    Returns:
        The measures; ``print`` them for a table.

    Raises:
        ValueError: If a share lies outside [0, 1], or if a weight is not finite, not real or sharded; the message
            names it.
    """
    if not isinstance(top, Iterable):
        raise TypeError(f"top must be a sequence of shares such as ({top!r},), got {top!r}")
    for option, value in (*(("top", share) for share in top), ("tail_energy", tail_energy)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{option} must lie in [0, 1], got {value!r}")
    if isinstance(model, nn.Module):
        tensors: Mapping[str, Tensor] = prunable_weights(model, exclude)
    elif exclude != ():
        raise ValueError("exclude applies to a module; of named weights, leave out those that are not to be measured")
    else:
        tensors = model
    layers = []
    total = _Spectrum()
    for name, tensor in tensors.items():
        spectrum = _Spectrum()
        for chunk in _magnitudes(name, tensor):
            spectrum.add(chunk)
        layers.append(_measures(name, spectrum, top, tail_energy))
        total.merge(spectrum)
    return Concentration(tuple(layers), _measures("total", total, top, tail_energy), tail_energy)


def optimizer_concentration(optimizer: Optimizer) -> Tensor:
    """Measure how concentrated the weights under an optimizer's penalty are, cheaply enough to log while it trains.

    Of each layer the share of its energy that is variance of the magnitudes,

        c = V / q = 1 - mu^2 / q

    which a penalty sees and raises: 0 where all magnitudes are equal, 1 - 2/pi = 0.36 for normally distributed weights,
    1 - k/n where k of n weights are equal and the rest is zero. It costs one pass over the weights, and nothing waits
    for a device until the result is read: read it when you log, not at every step.

    Args:
        optimizer: An optimizer with a decoupled penalty in its chain (`WCR`, `HoyerDecay`, ...); of several, the
            outermost one but for weight decay counts. One that Accelerate has prepared is looked through. The weights
            are those of the groups with a strength, or of all groups if none has one, as in a run without a penalty
            to compare with. All ranks must call this where weights are sharded.

    Returns:
        c of each layer, shape (layers,), on the device of the first, in the order of the groups and of their
        parameters; 0 where a layer has no energy, NaN where its weights are not finite.

    Raises:
        ValueError: If there is no penalty in the chain.

    Example:
        >>> if step % 100 == 0:
        ...     writer.add_scalar("concentration", metrics.optimizer_concentration(optimizer).mean(), step)
    """
    wrapper = outermost(optimizer)
    if wrapper is None:
        raise no_penalty(optimizer)
    return wrapper.concentration()


class _Spectrum:
    """How many weights have which magnitude: runs of nearly equal ones, ascending."""

    def __init__(self) -> None:
        self.keys: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.counts: npt.NDArray[np.float64] = np.zeros(0)
        self.sums: npt.NDArray[np.float64] = np.zeros(0)

    def add(self, magnitudes: npt.NDArray[np.float64]) -> None:
        """Add a chunk of weights."""
        magnitudes.sort()
        keys = magnitudes.view(np.int64) >> _DROPPED_BITS
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        self._extend(keys[starts], np.diff(starts, append=keys.size), np.add.reduceat(magnitudes, starts))

    def merge(self, other: _Spectrum) -> None:
        """Add all weights of another one."""
        self._extend(other.keys, other.counts, other.sums)

    def _extend(self, keys: npt.NDArray[Any], counts: npt.NDArray[Any], sums: npt.NDArray[Any]) -> None:
        if self.keys.size:
            keys, run = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
            counts = np.bincount(run, np.concatenate([self.counts, counts]))
            sums = np.bincount(run, np.concatenate([self.sums, sums]))
        self.keys, self.counts, self.sums = keys, counts.astype(np.float64), sums


def _magnitudes(name: str, tensor: Tensor) -> Iterator[npt.NDArray[np.float64]]:
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(f"{name} has no magnitudes to rank: dtype {tensor.dtype}, {tensor.layout}, on {tensor.device}")
    if as_dtensor(tensor) is not None:
        raise ValueError(f"{name} is sharded, and its energy is spread over ranks: measure a gathered state dict")
    for chunk in torch.split(flat(tensor.detach()), _CHUNK):
        magnitudes: npt.NDArray[np.float64] = chunk.to("cpu", torch.float64).abs().numpy()
        if magnitudes.size:
            if not magnitudes.max() < LARGEST:
                raise ValueError(f"{name} holds NaN, infinity or the like: repair the weights before measuring them")
            yield magnitudes


def _measures(name: str, spectrum: _Spectrum, top: Sequence[float], tail_energy: float) -> LayerConcentration:
    counts = spectrum.counts
    n = counts.sum()
    means = spectrum.sums / counts
    nonzero = counts[means > 0].sum()
    if nonzero:
        means = np.ldexp(means, -math.frexp(means[-1])[1])  # exact, and the fourth powers neither overflow nor vanish
    ranks = np.cumsum(counts)
    energies = np.cumsum(counts * means**2)
    energy = float(energies[-1]) if nonzero else 0.0

    def held(density: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Share of the energy in the largest weights."""
        if not energy:
            return np.ones_like(density, dtype=np.float64)
        smaller = (1.0 - np.asarray(density, dtype=np.float64)) * n
        lost: npt.NDArray[np.float64] = np.interp(smaller, np.append(0.0, ranks), np.append(0.0, energies))
        return 1.0 - lost / energy

    shares = np.asarray(top, dtype=np.float64)
    return LayerConcentration(
        name=name,
        weights=int(n),
        nonzero=int(nonzero),
        top=dict(zip(map(float, top), held(shares).tolist(), strict=True)),
        gini=float((means * counts * (2 * ranks - counts - n)).sum() / (n * (means * counts).sum())) if energy else 0.0,
        effective_weights=float(energy**2 / (counts * means**4).sum()) if energy else 0.0,
        lossless_sparsity=_prunable_count(counts, means, energies, tail_energy * energy) / int(n) if energy else 1.0,
        curve=EnergyCurve(_DENSITIES, tuple(held(_DENSITIES).tolist())),
    )


def _prunable_count(
    counts: npt.NDArray[np.float64], means: npt.NDArray[np.float64], energies: npt.NDArray[np.float64], budget: float
) -> int:
    """Count the smallest weights whose energy together stays within a budget."""
    full = int(np.searchsorted(energies, budget, side="right"))
    if full == len(counts):
        return int(counts.sum())
    spent = float(energies[full - 1]) if full else 0.0
    return int(counts[:full].sum()) + int((budget - spent) // means[full] ** 2)
