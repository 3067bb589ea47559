"""Finding and setting the strengths of a decoupled penalty, and the schedules that people expect of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.optim import Optimizer

from wcr_optim.checks import check_number, check_whole
from wcr_optim.decoupled import Decoupled
from wcr_optim.layout import local
from wcr_optim.penalties import L2
from wcr_optim.wrapper import OptimizerWrapper, no_penalty, outermost

SHAPES = ("constant", "linear", "cosine")


class Strengths:
    """The strengths of a decoupled penalty, group by group, set as shares of one level.

    A group whose strength is 0 is left at 0. Of the others, the strengths at hand are read as shares of the largest
    one: a group that starts with half the strength of another keeps half of it. Groups that are added later take part
    in the same way.

    Args:
        optimizer: The optimizer, or wrappers around it, with a decoupled penalty in the chain; of several, the
            outermost one but for weight decay.

    Raises:
        TypeError: If it is no optimizer.
        ValueError: If there is no such penalty in the chain, or every group's strength is 0.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.decoupled = concentrating(optimizer)
        self.chain: OptimizerWrapper = outermost(optimizer) or self.decoupled
        self.option = self.decoupled.penalty.option
        self.given = [_number(group[self.option]) for group in self.groups]
        self.written: dict[int, float] = {}
        """The strength that each group was last set to; NaN where reading it back would wait for a device."""
        self.reference = max(self.given)
        if self.reference == 0.0:
            raise ValueError(
                f"{self.option} is 0 in every group, so there is nothing to drive; give the groups of the weights to "
                f"prune a positive one, of any size: param_groups(model, ...) does"
            )

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.decoupled.param_groups

    @property
    def device(self) -> torch.device:
        """That of the first weight; the CPU where there is none."""
        every = (local(w).device for group in self.groups for w in group["params"])
        return next(every, torch.device("cpu"))

    def driven(self) -> list[int]:
        """Return the indices of the groups that have a strength, new ones included.

        Raises:
            RuntimeError: If there are fewer groups than before.
        """
        if len(self.groups) < len(self.given):
            raise RuntimeError(
                f"the optimizer had {len(self.given)} parameter groups and has {len(self.groups)}: a strength belongs "
                f"to a place among them, so after groups were removed make a new object to drive the rest"
            )
        self.given += [_number(group[self.option]) for group in self.groups[len(self.given) :]]
        return [index for index, given in enumerate(self.given) if given > 0.0]

    def share(self, index: int) -> float:
        """Return a group's share of the level."""
        return self.given[index] / self.reference

    def set(self, index: int, level: float) -> None:
        """Set a group's strength to its share of a level."""
        present, strength = self.groups[index][self.option], level * self.share(index)
        if isinstance(present, Tensor):
            present.fill_(strength)
            strength = float(present) if present.device.type == "cpu" else math.nan
        else:
            self.groups[index][self.option] = strength
        self.written[index] = strength

    def take_over(self, kind: str) -> None:
        """Drive the optimizer's strengths from now on, for an object of some class.

        The bounds and thresholds that another one told the optimizer are forgotten; the groups' "base_lr_factor" is
        left as it is, since it may be anybody's. Not part of making this: that object's other arguments may still turn
        out to be wrong.
        """
        self._name = f"{kind} {uuid4().hex}"
        self.decoupled.driver = self._name
        self.decoupled.longest, self.decoupled.lift_units = None, False
        self.decoupled.scale_invariant = self.decoupled.seen_invariant = ()
        self.decoupled.cutoff, self.decoupled.reached = math.inf, None

    @property
    def drives(self) -> bool:
        """Whether no other object has taken over since."""
        return self.decoupled.driver == self._name

    def check_driving(self) -> None:
        """Raise RuntimeError if another object has taken over since."""
        if not self.drives:
            kind, own = (name.partition(" ")[0] for name in (self.decoupled.driver, self._name))
            raise RuntimeError(
                f"{'another' if kind == own else 'a'} {kind} was made for this optimizer since, and both would set its "
                f"strengths: call step() of that one alone"
            )

    def separate(self) -> None:
        """Give each group a tensor of its own where one was given for several, which are to go different ways."""
        seen: set[int] = set()
        for group in self.groups:
            present = group[self.option]
            if isinstance(present, Tensor):
                if id(present) in seen:
                    group[self.option] = present.clone()
                seen.add(id(present))

    def load(self, given: Sequence[float], reference: float) -> None:
        """Take what another object was given, that of a run to go on with.

        Raises:
            ValueError: If it had more groups than there are.
        """
        if len(given) > len(self.groups):
            raise ValueError(
                f"the state is that of {len(given)} parameter groups, and the optimizer has {len(self.groups)}; "
                f"add the groups that are missing first"
            )
        self.given, self.reference = list(given), reference

    def values(self) -> list[float]:
        """Return every group's present strength."""
        return [_number(group[self.option]) for group in self.groups]


class StrengthSchedule:
    """Move the strength of a decoupled penalty along a given curve: warm-up, then constant, linear or cosine.

    Call `step()` after `optimizer.step()`, as with a scheduler of the learning rate. The penalty's step is lr times
    the strength, so a schedule of the learning rate already acts on it; this one comes on top.

        schedule = StrengthSchedule(optimizer, total_steps=10_000, warmup=1_000, shape="cosine")

    To resume, make it before the optimizer's state is loaded, since it takes the strengths that it finds for the
    largest ones, and then load its own.

    After a run that SparsityTarget drove, it takes over; the "base_lr_factor" that was reached stays in the groups, so
    set that to 1.0 where the lr shall be what it says.

    A schedule of one's own needs no class: set `group["weight_concentration"]` (or the key of another penalty) before
    each `optimizer.step()`.

    Args:
        optimizer: The optimizer with a decoupled penalty in its chain; its groups hold the largest strengths.
        total_steps: Optimizer steps of the whole run; the last factor is kept beyond them.
        warmup: Steps over which the strength rises linearly from 0 (default: 0).
        shape: "constant", or "linear" or "cosine" from 1 after the warm-up to `final` at the end (default: "constant").
        final: Factor at the end, at least 0 (default: 0.0).

    Raises:
        TypeError: If the optimizer is none or a value is no number.
        ValueError: If there is no penalty to drive or a value is bad.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: int = 0, shape: str = "constant", final: float = 0.0
    ) -> None:
        self.total_steps = check_total_steps(total_steps)
        if not 0 <= check_whole("warmup", warmup) <= self.total_steps:
            raise ValueError(f"warmup must lie between 0 and total_steps={total_steps}, got {warmup!r}")
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(map(repr, SHAPES))}")
        if not 0.0 <= check_number("final", final) < math.inf:
            raise ValueError(f"final must be a finite number of at least 0, got {final!r}")
        self._strengths = Strengths(optimizer)
        self._strengths.take_over(type(self).__name__)
        self.warmup, self.shape, self.final = int(warmup), shape, float(final)
        self.steps = 0
        self._set()

    def step(self, loss: Any = None) -> None:
        """Go to the next step's strengths; the loss is taken for the sake of loops that pass one, and not used.

        Raises:
            RuntimeError: If another object drives the optimizer by now, or groups were removed from it.
        """
        self._strengths.check_driving()
        self.steps += 1
        self._set()

    def factor(self) -> float:
        """Return the factor at the present step."""
        if self.steps < self.warmup:
            return self.steps / self.warmup
        span = self.total_steps - self.warmup
        progress = min((self.steps - self.warmup) / span, 1.0) if span else 0.0
        if self.shape == "constant":
            return 1.0
        fallen = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return 1.0 + (self.final - 1.0) * fallen

    def strengths(self) -> list[float]:
        """Return every group's present strength."""
        return self._strengths.values()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on exactly."""
        return {"steps": self.steps, "given": list(self._strengths.given), "reference": self._strengths.reference}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            ValueError: If it had more groups than there are; nothing is changed then.
        """
        steps = state_dict["steps"]
        self._strengths.load(state_dict["given"], state_dict["reference"])
        self.steps = steps
        if self._strengths.drives:
            self._set()

    def _set(self) -> None:
        for index in self._strengths.driven():
            self._strengths.set(index, self._strengths.reference * self.factor())


def check_total_steps(total_steps: int | None) -> int:
    """Return a number of steps; raise ValueError unless it is known and positive."""
    steps: Any = total_steps
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(
            f"total_steps must be the number of optimizer steps of the whole run, epochs * batches, got "
            f"{total_steps!r}; if it is not known, give the number within which the end shall be reached: what is "
            f"reached is kept for as long as training goes on"
        )
    return int(steps)


def concentrating(optimizer: Optimizer) -> Decoupled:
    """Return the outermost decoupled penalty but for weight decay, which changes no weight's share of the energy.

    An optimizer that Accelerate has prepared is looked through.

    Raises:
        TypeError: If it is no optimizer.
        ValueError: If there is no such penalty in its chain.
    """
    below = outermost(optimizer)
    while below is not None:
        if isinstance(below, Decoupled) and not isinstance(below.penalty, L2):
            return below
        below = outermost(below.base)
    raise no_penalty(optimizer)


def _number(strength: float | Tensor) -> float:
    return float(strength)
