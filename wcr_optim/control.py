"""The feedback loop behind `SparsityTarget`: from a tail, the layers' moments and the loss to the next strength.

Nothing here knows an optimizer or its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from wcr_optim.moments import Moments
from wcr_optim.penalties import Penalty

# The loop acts on logarithms, of the strength and of the tail's excess over its path. The tail answers a strength by
# its rate of change, so integral action alone would swing around the path; the proportional part damps it.
PROPORTIONAL, INTEGRAL = 2.0, 0.3
MAX_CHANGE = 0.5  # of the strength's logarithm from one measurement to the next: a factor of 1.65
MAX_ERROR = 2.0  # of the tail's logarithm
FLOOR = 0.1  # of the starting strength: what is below does nothing and only takes long to come back from
LAST_RESORT = 1e-4  # of the starting strength: how far it is taken back where it does harm
FIRST_PULL = 5.0  # mean magnitudes that the thresholds of the whole run would add up to at the starting strength
MAX_ENERGY_LOSS, MAX_ENERGY_GROWTH = 10.0, 3.0  # as logarithms, of any layer over the whole run, by the penalty alone
RECOVERY = 1.1  # of a ceiling, from one measurement to the next at which the loss is well
DEAD = 1e-4  # of its energy at the start: a layer that the penalty has all but taken away
AT_PEAK = "at the largest learning rate that there was"
ROUNDING = 1 + 1e-6  # of a product of lr, level and share, which round one way or another
USELESS = 1.01  # a larger step that raises the thresholds by less than this has no effect left to give


class Driven(NamedTuple):
    """What a loop drives, as last measured.

    Attributes:
        penalty: Whose strength is driven.
        names: Of the layers, "group.place".
        layers: Their moments.
        first_energy: Their energies when they were first measured.
        shares: Their step lengths over the largest lr * level.
        total_steps: Steps of the whole run, which the bounds on what the penalty may do are spread over.
    """

    penalty: Penalty
    names: Sequence[str]
    layers: Moments
    first_energy: Sequence[float]
    shares: Tensor
    total_steps: int


class Cost(NamedTuple):
    """What the penalty has cost.

    Attributes:
        now: Rise of the smoothed loss above its best.
        allowed: Rise from which on the strength is taken back; NaN while there was no loss.
        was_asked_for: Whether that was `max_dense_cost`.
    """

    now: float
    allowed: float
    was_asked_for: bool

    @property
    def is_high(self) -> bool:
        """Whether it is known to be above half of what is allowed."""
        return self.now > self.allowed / 2

    @property
    def is_low(self) -> bool:
        """Whether it is known to be below half of what is allowed."""
        return self.now < self.allowed / 2


class _Effect(NamedTuple):
    """What a step does to layers.

    Attributes:
        pull: The share of the mean magnitude that the thresholds take off, averaged over weights.
        loss: The largest share of its energy that a layer loses.
        growth: The largest share of its energy that a layer gains.
    """

    pull: float
    loss: float
    growth: float


@dataclass
class Loop:
    """One feedback loop: the groups that it drives together, and what it remembers of them.

    Attributes:
        groups: Indices of the groups.
        level: The largest strength of the groups.
        lr_peak: The largest lr that there has been; 0 until the loop has begun.
        first_level: The level that it began with.
        first_tail: The tail that it began with.
        tail: The tail as last measured.
        error: How far ln(tail) was from its path then.
        ceiling: What the level stays below since the loss last rose too far.
        harmful: Whether the last measurement took the level back.
        obstacle: What keeps the level from rising, "" if nothing does.
    """

    groups: list[int]
    level: float = math.nan
    lr_peak: float = 0.0
    first_level: float = math.nan
    first_tail: float = math.nan
    tail: float = math.nan
    error: float = 0.0
    ceiling: float = math.inf
    harmful: bool = False
    obstacle: str = ""

    @property
    def has_begun(self) -> bool:
        """Whether there was a positive lr at a measurement."""
        return self.lr_peak > 0.0

    def begin(self, driven: Driven, lr: float) -> None:
        """Start where the thresholds of the whole run would add up to a few mean magnitudes."""
        self.first_tail = self.tail
        if lr == 0.0:
            return  # a warm-up from zero: the next step may tell
        low, high = math.log(1e-20), math.log(1e6)
        # In a run of a few dozen steps the bound on one step's growth can forbid that: then where the bound begins.
        most = _effect(driven, math.exp(high)).pull
        wanted = min(FIRST_PULL / driven.total_steps, most / USELESS)
        for _ in range(50):
            middle = (low + high) / 2
            pull = _effect(driven, math.exp(middle)).pull
            low, high = (middle, high) if pull < wanted else (low, middle)
        self.level = self.first_level = math.exp(low) / lr
        self.lr_peak, self.obstacle = lr, ""

    @property
    def longest(self) -> float:
        """The longest step that was worked out, as lr * level: that at the lr's peak, 0 until the loop has begun."""
        return self.lr_peak * self.level if self.has_begun else 0.0

    def keep_step_length(self, lr: float) -> bool:
        """Where lr rises above what it has been, in a warm-up, keep lr * level; return whether that moved the level."""
        if not (self.has_begun and lr > self.lr_peak):
            return False
        shrunk = self.lr_peak / lr
        self.level, self.first_level, self.ceiling = (x * shrunk for x in (self.level, self.first_level, self.ceiling))
        self.lr_peak = lr
        return True

    def follow(self, driven: Driven, wanted: float, lr: float, cost: Cost) -> None:
        """Move the level towards what brings the tail to the wanted one."""
        self.keep_step_length(lr)
        excess = math.log(max(self.tail, 1e-30) / wanted)
        error = min(max(excess, -MAX_ERROR), MAX_ERROR)
        change = PROPORTIONAL * (error - self.error) + INTEGRAL * error
        self.error = error
        change = min(max(change, -MAX_CHANGE), MAX_CHANGE)
        limit = self._limit(driven, cost)
        if limit < 0.0 and not self.harmful:  # the loss answers late: without this the level would overshoot each time
            self.ceiling = self.level / 2
        elif cost.is_low:
            self.ceiling *= RECOVERY
        self.harmful = limit < 0.0
        if limit < change:
            change = limit
        if error <= 0.0:
            self.obstacle = ""
        floor = self.first_level * (LAST_RESORT if limit < 0.0 else FLOOR)
        self.level = min(max(self.level * math.exp(change), min(floor, self.level)), self.ceiling)

    def _limit(self, driven: Driven, cost: Cost) -> float:
        """Bound the change of the level's logarithm, and note why."""
        if cost.now > cost.allowed:
            self.obstacle = (
                f"the training loss rose by max_dense_cost={cost.allowed:g} above its best"
                if cost.was_asked_for
                else "the training loss gave back most of what training had gained"
            )
            return -MAX_CHANGE
        energy = driven.layers.n * driven.layers.q
        for name, now, first in zip(driven.names, energy.tolist(), driven.first_energy, strict=True):
            if now < DEAD * first:
                group, place = name.split(".")
                self.obstacle = f"parameter {place} of group {group} lost nearly all of its energy"
                return -MAX_CHANGE
        # At the peak of the lr, also where it is lower by now: else the strength would rise as the lr falls, and the
        # penalty go on as before where the gradient that holds against it no longer does.
        s = self.lr_peak * self.level
        effect = _effect(driven, s * math.exp(MAX_CHANGE))
        if effect.pull < USELESS * _effect(driven, s).pull:
            self.obstacle = f"the penalty saturates: {AT_PEAK}, a larger strength has no further effect"
            return 0.0
        if effect.loss > MAX_ENERGY_LOSS / driven.total_steps:
            self.obstacle = f"{AT_PEAK}, a larger strength would take the energy of whole layers away"
            return 0.0
        if effect.growth > MAX_ENERGY_GROWTH / driven.total_steps:
            self.obstacle = f"{AT_PEAK}, a larger strength would make the weights of whole layers grow without bound"
            return 0.0
        if cost.was_asked_for:  # come to rest at the allowed cost rather than swing around it
            return MAX_CHANGE * min(max(2 * (1 - cost.now / cost.allowed), 0.0), 1.0)
        return MAX_CHANGE


def _effect(driven: Driven, largest: float) -> _Effect:
    """Return what a step does to layers whose largest length is given."""
    penalty, layers = driven.penalty, driven.layers
    gain, threshold = penalty.flow(layers, largest * driven.shares)
    alive = (layers.mu > 0) & layers.q.isfinite()
    if not alive.any():
        return _Effect(0.0, 0.0, 0.0)
    n, mu, q = (x[alive] for x in layers)
    gain, threshold = gain[alive], threshold[alive]
    taken = threshold.minimum(mu)  # beyond it, so many weights would cross zero that the next line is wrong
    kept = gain.square() * (1 - (2 * taken * mu - taken.square()) / q)
    return _Effect(float((n * threshold / mu).sum() / n.sum()), float((1 - kept).max()), float((kept - 1).max()))
