"""The penalties: each a function of a layer's moments (n, mu, q), with its exact gradient flow.

A penalty that depends on the weights w only through n, mu = mean|w| and q = mean(w^2) has a gradient that is affine in
the magnitudes m = |w|. Its gradient flow dw/dt = -d(value)/dw therefore moves magnitudes by an affine map for any
length of time, and the whole flow over a step of length s is one operation,

    w <- gain * softshrink(w, threshold),    gain = sqrt(V'/V),    threshold = mu - mu'/gain,

where V = q - mu^2 and (mu', V') are the moments after the flow. `flow` returns these two scalars per layer. It is
exact while no weight reaches zero; weights that would cross zero stop there.

Sources: WCR from arXiv 2511.14282 (v1 gives the functional), Hoyer-square from DeepHoyer (Yang et al., ICLR 2020),
l1's flow is ISTA's proximal step, l2's is AdamW's decay. The flows and the scale-free form are this package's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wcr_optim.checks import check_number
from wcr_optim.moments import Moments

# Below this share of q, V = q - mu^2 is rounding noise of float32 sums: the magnitudes are all the same, and nothing
# tells which of them should grow.
MIN_RELATIVE_VARIANCE = 1e-6
# Beyond it a step has long had all its effect, and infinity would make NaN of it.
MAX_SIGMA = 1e100


class Penalty(ABC):
    """A penalty on a layer's weights that depends on them only through their moments.

    Subclass it with `value` and `flow` and give it to `Decoupled`.

    Attributes:
        option: Key of its strength in the optimizer's param_groups.
        min_ndim: Tensors with fewer dimensions are left alone, unless their group says otherwise.
        uses_moments: Whether `flow` reads mu and q. Where it does not, a pass over the weights is saved.
        per_unit: Whether every output unit, a row w[i] of a weight, is a layer of its own to the penalty.
    """

    option: ClassVar[str] = "strength"
    min_ndim: ClassVar[int] = 2
    uses_moments: ClassVar[bool] = True
    per_unit: ClassVar[bool] = False

    @abstractmethod
    def value(self, moments: Moments) -> Tensor:
        """Return the penalty of every layer, shape (layers,); differentiable where the moments are."""

    @abstractmethod
    def flow(self, moments: Moments, s: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return (gain, threshold) of every layer after gradient flow over a step of length s.

        Args:
            moments: The layers' moments.
            s: Step length, lr * strength, a number or a tensor of shape () or (layers,).

        Returns:
            gain, shape (layers,), without unit, and threshold, shape (layers,), in units of a weight. Exactly 1 and
            0 where s is 0.

        """


@dataclass(frozen=True)
class InverseVariance(Penalty):
    """WCR as the preprint has it: value = 1 / (V + eps), V the variance of the magnitudes.

    Flow: dm_i/dt = 2 (m_i - mu) / (n (V + eps)^2), so mu stays, V' = sqrt(V^2 + 8 s / n), and

        gain = (1 + 8 s / (n (V + eps)^2))^(1/4),    threshold = mu (1 - 1/gain).

    Magnitudes above mu grow, those below shrink. Exact for eps = 0 and to first order in s for any eps, which matters
    only where V is not far above eps. The preprint evaluates the value on m = sqrt(w^2 + 1e-8):
    `value(moments(weights, smoothing=1e-8))`.

    Source: arXiv 2511.14282 v1; the flow is ours.

    Args:
        eps: Added to V, in units of a weight squared (default: 1e-8).
        max_growth: Bound on the growth of one step, gain <= 1 + max_growth (default: 0.1).

    Raises:
        ValueError: If eps is negative or max_growth is not positive.
    """

    eps: float = 1e-8
    max_growth: float = 0.1
    option: ClassVar[str] = "weight_concentration"

    def __post_init__(self) -> None:
        if not 0.0 <= check_number("eps", self.eps) < math.inf:
            raise ValueError(f"eps must be finite and not negative, got {self.eps!r}")
        _check_max_growth(self.max_growth)

    def value(self, moments: Moments) -> Tensor:
        """Return 1 / (V + eps)."""
        return 1 / (moments.variance + self.eps)

    def flow(self, moments: Moments, s: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return ((1 + 8 s / (n (V + eps)^2))^(1/4), mu (1 - 1/gain))."""
        growth = 8 * s / (moments.n * (moments.variance + self.eps).square())
        log_gain = (growth.log1p() / 4).clamp(max=math.log1p(self.max_growth))
        return _where_spread(moments, log_gain.exp(), -moments.mu * torch.expm1(-log_gain))


@dataclass(frozen=True)
class _EnergyPreserving(Penalty):
    """A penalty invariant to the weights' scale: its flow keeps q and trades mu^2 for V.

    With x = mu^2 and r = x/q, all that differs between them is delta = ln(x'/x) as a function of r and of the
    dimensionless step length sigma = 4 s / q. From delta follow

        gain^2 = V'/V = 1 - (x/V) (e^delta - 1),    threshold = mu (1 - e^(delta/2) / gain).
    """

    max_growth: float = 0.1

    def __post_init__(self) -> None:
        _check_max_growth(self.max_growth)

    @abstractmethod
    def log_ratio(self, r: Tensor, sigma: Tensor) -> Tensor:
        """Return delta = ln(x'/x) <= 0 for 0 < r = x/q < 1 and sigma = 4 s / q, all of shape (layers,)."""

    def sigma(self, moments: Moments, s: float | Tensor) -> Tensor:
        """Return the dimensionless step length 4 s / q."""
        return 4 * s / moments.q

    def flow(self, moments: Moments, s: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return (sqrt(V'/V), mu - mu'/gain), max_growth bounding delta from below."""
        x, variance = moments.mu.square(), moments.variance
        most = self.max_growth * (2 + self.max_growth) * variance / x  # of x that V may take within max_growth
        sigma = self.sigma(moments, s).clamp(max=min(MAX_SIGMA, torch.finfo(moments.q.dtype).max))
        delta = self.log_ratio(x / moments.q, sigma).maximum((-most).clamp(min=-1).log1p())
        log_gain = (-x / variance * delta.expm1()).log1p() / 2
        return _where_spread(moments, log_gain.exp(), -moments.mu * torch.expm1(delta / 2 - log_gain))


@dataclass(frozen=True)
class ScaleFree(_EnergyPreserving):
    """WCR in scale-free form: value = n q / V, the same under w -> c w.

    Flow: x = mu^2 falls at rate dx/dt = -4 x / (q - x) while q stays, so

        q ln x' - x' = q ln x - x - 4 s    on (0, x],    V' = q - x'.

    Magnitudes above q/mu grow, the rest shrink. This form is this package's, not the paper's.

    Args:
        max_growth: Bound on the growth of one step, gain <= 1 + max_growth (default: 0.1).

    Raises:
        ValueError: If max_growth is not positive.
    """

    option: ClassVar[str] = "weight_concentration"

    def value(self, moments: Moments) -> Tensor:
        """Return n q / V."""
        return moments.n * moments.q / moments.variance

    def log_ratio(self, r: Tensor, sigma: Tensor) -> Tensor:
        """Solve delta - r (e^delta - 1) = -sigma by Newton's method."""
        # The root for small delta, where r (e^delta - 1) = r (delta + delta^2 / 2). The function is concave and
        # increasing, so every Newton step from anywhere lands left of the root and climbs to it from there.
        slack = 1 - r
        delta = -2 * sigma / (slack + (slack.square() + 2 * r * sigma).sqrt())
        for _ in range(4):  # no r and sigma are further than that from round-off
            fallen = r * delta.expm1()
            delta = delta - (delta - fallen + sigma) / (slack - fallen)
        return delta


@dataclass(frozen=True)
class PerUnit(ScaleFree):
    """WCR in scale-free form for every output unit apart: the sum of n q / V over the rows w[i] of a weight.

    Each unit concentrates the weights that it reads its inputs with and keeps their energy. Over a whole layer the
    units compete: those with the smaller weights lose theirs altogether, and where a normalization follows, which
    makes up for a unit's scale, what pruning takes there counts in full. Of weights that are stored the other way round
    (torch's transposed convolutions, transformers' Conv1D) a row is what one input is passed on with. This form is this
    package's, not the paper's.

    Args:
        max_growth: Bound on the growth of one step, gain <= 1 + max_growth (default: 0.1).

    Raises:
        ValueError: If max_growth is not positive.
    """

    per_unit: ClassVar[bool] = True


@dataclass(frozen=True)
class Relative(ScaleFree):
    """WCR in scale-free form, its step measured in units of the layer's own energy: s becomes s q, so sigma = 4 s.

    The gradient of a scale-invariant value falls as 1/|w|, so how far `ScaleFree` turns a layer depends on how large
    its weights happen to be; times q it does not, nor on the layer's size. The flow keeps q, therefore it is still
    exact, that of q n q / V with the q of the step's start held fixed. For small s a step removes about 2 s of the
    mean magnitude. This form is this package's, not the paper's.

    Args:
        max_growth: Bound on the growth of one step, gain <= 1 + max_growth (default: 0.1).

    Raises:
        ValueError: If max_growth is not positive.
    """

    def sigma(self, moments: Moments, s: float | Tensor) -> Tensor:
        """Return the dimensionless step length 4 s."""
        return 4 * s * torch.ones_like(moments.q)


@dataclass(frozen=True)
class HoyerSquare(_EnergyPreserving):
    """DeepHoyer's Hoyer-square: value = (sum |w|)^2 / sum w^2 = n mu^2 / q.

    Flow: x = mu^2 falls logistically while q stays,

        x'/(q - x') = x/(q - x) exp(-4 s / q),    V' = q - x'.

    Magnitudes above q/mu grow, the rest shrink.

    Source: Yang et al., "DeepHoyer", ICLR 2020, for the value; the flow is ours.

    Args:
        max_growth: Bound on the growth of one step, gain <= 1 + max_growth (default: 0.1).

    Raises:
        ValueError: If max_growth is not positive.
    """

    option: ClassVar[str] = "hoyer_decay"

    def value(self, moments: Moments) -> Tensor:
        """Return n mu^2 / q."""
        return moments.n * moments.mu.square() / moments.q

    def log_ratio(self, r: Tensor, sigma: Tensor) -> Tensor:
        """Return -sigma - ln(1 + r (e^-sigma - 1))."""
        return -sigma - (r * torch.expm1(-sigma)).log1p()


@dataclass(frozen=True)
class L1(Penalty):
    """The l1 norm: value = sum |w| = n mu.

    Flow: gain = 1, threshold = s, the proximal step of ISTA, lr * strength and not preconditioned.
    """

    option: ClassVar[str] = "l1_decay"
    uses_moments: ClassVar[bool] = False

    def value(self, moments: Moments) -> Tensor:
        """Return n mu."""
        return moments.n * moments.mu

    def flow(self, moments: Moments, s: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return (1, s)."""
        return torch.ones_like(moments.n), torch.zeros_like(moments.n) + s


@dataclass(frozen=True)
class L2(Penalty):
    """Weight decay: value = sum w^2 / 2 = n q / 2.

    Flow: gain = 1 - s (not below 0), threshold = 0. That is AdamW's decay rather than exp(-s), so that Adam with it is
    AdamW bit for bit; and like AdamW's it decays tensors of any number of dimensions.
    """

    option: ClassVar[str] = "l2_decay"
    min_ndim: ClassVar[int] = 0
    uses_moments: ClassVar[bool] = False

    def value(self, moments: Moments) -> Tensor:
        """Return n q / 2."""
        return moments.n * moments.q / 2

    def flow(self, moments: Moments, s: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 - s, 0)."""
        return (torch.ones_like(moments.n) - s).clamp(min=0), torch.zeros_like(moments.n)


def _check_max_growth(max_growth: float) -> None:
    if not check_number("max_growth", max_growth) > 0.0:
        raise ValueError(f"max_growth must be positive, got {max_growth!r}; 0.1 lets a weight grow by 10 % a step")


def _where_spread(moments: Moments, gain: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Leave layers alone whose magnitudes are all the same, zero, a single one, NaN or infinite."""
    spread = (moments.variance > MIN_RELATIVE_VARIANCE * moments.q) & moments.q.isfinite()
    return torch.where(spread, gain, 1.0), torch.where(spread, threshold, 0.0)
