"""Say the sparsity that you want: `SparsityTarget` drives a penalty's strength there, without a search."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from wcr_optim.checks import check_count, check_number
from wcr_optim.control import ROUNDING, Cost, Driven, Loop
from wcr_optim.decoupled import Place
from wcr_optim.layout import local
from wcr_optim.lr_compensation import NORMALIZED, LrCompensation, follows_the_gradient, usual_exponent
from wcr_optim.moments import Moments, across_devices
from wcr_optim.penalties import InverseVariance, Penalty, PerUnit
from wcr_optim.strength import Strengths, check_total_steps
from wcr_optim.tail import tails
from wcr_optim.trend import LossTrend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASUREMENTS = 100
"""How often the tail is measured in a run, unless `every` says otherwise."""

NORMALIZED_TAIL, PLAIN_TAIL = 3e-3, 1e-3  # goals around Adam, which moves what shall stay small as well, and around SGD
SPARED = 2.0  # times the magnitude below which weights will be pruned: from there on one threshold spares them
# Where most weights are in layers that do so, a deeper tail takes from none that is kept. Around Adam, whose goal is
# the shallower one, it falls on to here, by this share of the run.
SPARED_TAIL, SPARED_END = 1e-4, 0.9
# Share of the run at which the tail shall be at its goal; and where most weights are spared around SGD, if they are
# latent. What those hold at zero, a network that had only begun to learn does not get back.
END, LATENT_END = 0.4, 0.7
NO_WEIGHTS = "there were no weights to drive, or none that were finite and not all zero"
RECENT = 3  # measurements since which the smoothed loss shall have fallen


class _Measurement(NamedTuple):
    """What one copy from the device tells.

    Attributes:
        energies: Pruned and total energy of each loop.
        threshold: Magnitude below which the weights of the first loop are pruned.
        layers: Moments of each loop's layers.
        loss: Mean loss since the measurement before.
        seen_invariant: Whether the loss does not see the size of a layer's units, as the last step that looked saw it.
    """

    energies: list[tuple[float, float]]
    threshold: float
    layers: list[Moments]
    loss: float
    seen_invariant: dict[Place, bool]


class SparsityTarget:
    """Drive the strength of a decoupled penalty so that the network survives pruning at a wanted sparsity.

    The tail is the share of the weights' energy (sum of squares) that one-shot magnitude pruning at `sparsity` would
    remove. The object measures it every few steps and moves the strength by a bounded factor so that the tail's
    logarithm falls evenly, from what it is at the start to `tail_energy` when 40 % of the run are over; from then on it
    is held there, or falls on as said below, for as long as training goes on. It starts at a strength worked out from
    the weights and the learning rate after the first step, before which there is no penalty, so the one given to the
    penalty matters only as a ratio between groups; groups whose strength is 0 when this is made are neither driven nor
    measured. Nor are weights that are frozen, or have had no gradient in any step: nothing uses them, and no strength
    moves them. Pruning ranks both; of the latter a warning at `total_steps` says so.

        optimizer = WCR(torch.optim.SGD(param_groups(model), lr=0.1, momentum=0.9), form="per_unit")
        target = SparsityTarget(optimizer, sparsity=0.95, total_steps=epochs * len(batches))
        for batch in batches:
            loss = ...
            loss.backward()
            optimizer.step()
            target.step(loss)

    As fewer and fewer weights take part, the same learning rate moves the network less and less, so the base's is
    raised to make up for it. The measure is the effective density mu^2 / q, the share that takes part of a layer whose
    other weights are zero and whose own are all alike, in the geometric mean over a group's layers; as it falls, the
    group's "base_lr_factor" goes, by a tenth at a time, to

        (density at the start / density now) ^ lr_exponent,    at least 1, at most (1 / (1 - sparsity)) ^ lr_exponent

    as long as the smoothed loss goes on falling. While it does not, or where `step` is given none, exponents above 1/2
    count as 1/2, and the factor goes down there by a tenth at a time; where the loss is not well, it falls to 1. It
    multiplies the lr in the base's update and nowhere else: schedulers, logs, the penalty and AdamW's decay see the lr
    as it was.

    Units (rows) whose size the network does not see, since BatchNorm follows them, are kept from becoming so small
    beside the rest of their layer that pruning takes them whole: with form="per_unit", the step after a measurement
    enlarges those that hold less than a quarter of the mean unit's energy, by a tenth at most. It knows them by their
    gradient, see `invariance.invariant_units`. From the next measurement on, all units of such layers get one
    threshold, unless with scope="layer", see `invariance.one_threshold`, and it spares weights that pruning will keep:
    those of twice the magnitude below which it would prune now. Where most weights are in such layers, around Adam and
    unless you gave a `tail_energy`, the tail falls on from there, to 1e-4 when 90 % of the run are over: that takes
    from none that is kept. An `end` as late as that leaves no time for it. Should a later measurement find fewer in
    such layers, the tail stays where it is.

    Around SGD with latent weights, `lr_exponent` becomes 1 there and `end` 0.7, unless you gave them: with the first
    measurement that finds most weights in such layers, and for good. What is held at zero no raised lr can shake, but
    it comes back late, so that the network needs time to find out what it will use.

    It does not kill the network: the strength stops rising where more of it would do nothing (a form that saturates),
    where the penalty would take a layer's energy away or has done so (l1), and where the smoothed training loss rises
    too far above the best it has been: by `max_dense_cost`, or, without one, by most of what training gained (by as
    much as it was at the start, in fine-tuning).
    If the tail is more than 1.5 times `tail_energy` at `total_steps` (3e-3 where it falls on), a warning says how far
    it got and what stood in the way.

    A strength that you set afterwards, in a group that was driven, holds; groups that were added since the last `step`
    get no penalty. A `StrengthSchedule` made then takes over all of them.

    Every rank of a distributed run must call `step`, with or without a loss: the loss is averaged over the ranks at
    every step, the tail of sharded weights summed at every measurement. The state is the same on all ranks.

    Args:
        optimizer: Optimizer with a decoupled penalty in its chain (`WCR`, `HoyerDecay`, `L1Decay`, `Decoupled`).
        sparsity: Share of the driven weights that will be pruned, in (0, 1) (default: 0.95).
        total_steps: Optimizer steps of the whole run. Unknown? Give the number within which the goal shall be reached.
        tail_energy: Share of the energy, in (0, 1), that pruning may take. None stands for 1e-3 around SGD, which pays
            less for a deeper tail, and elsewhere for 3e-3, from which it falls on where BatchNorm follows most weights
            (default: None).
        max_dense_cost: Rise of the smoothed training loss above its best, in its own units, beyond which the strength
            is taken back; `step` then needs the loss. None stands for the automatic stop alone (default: None).
        scope: What is ranked together and driven together, as in `pruning`: "global", all weights at one strength, or
            "layer", every tensor on its own; each group then has a loop of its own, so put layers into groups
            (default: "global").
        start: Share of the run after which the tail begins to fall (default: 0.0).
        end: Share of the run at which the tail shall be at its goal. None stands for 0.4, and around SGD with latent
            weights where BatchNorm follows most of them for 0.7 (default: None).
        every: Steps between measurements; None measures 100 times in a run (default: None).
        lr_exponent: How far the base's lr makes up for the lost density, from 0, not at all, to 1; what is above 1/2
            only while the loss falls. None stands for 1 where updates have a size of their own (Adam and all that
            normalize them), for 1/4 around SGD (any class with SGD in its name but SignSGD), whose steps follow the
            gradient's size at the edge of stability, unless with latent weights BatchNorm follows most weights, and for
            0 around LBFGS (default: None).

    Attributes:
        last_tail: The tail as last measured, over all driven weights; NaN before the first step.
        history: A row for each measurement: step, tail, wanted tail, largest strength, smoothed loss (NaN without one).

    Raises:
        TypeError: If optimizer is no optimizer, or a value is no number.
        ValueError: If there is no penalty to drive, or a value is bad; the message names the way out.

    Source:
        The lr's exponent of 1 for Adam: Dey, Bergsma & Hestness, "Sparse maximal update parameterization",
        NeurIPS 2024 (SuPar), for static random sparsity; the measure of density, the exponents 1/4 and 1/2 and
        the loss's say in it are ours.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sparsity: float = 0.95,
        total_steps: int | None = None,
        tail_energy: float | None = None,
        max_dense_cost: float | None = None,
        *,
        scope: str = "global",
        start: float = 0.0,
        end: float | None = None,
        every: int | None = None,
        lr_exponent: float | None = None,
    ) -> None:
        given = {"sparsity": sparsity} | ({} if tail_energy is None else {"tail_energy": tail_energy})
        for name, value in given.items():
            if not 0.0 < check_number(name, value) < 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {value!r}")
        if scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
        start, until = check_number("start", start), END if end is None else check_number("end", end)
        if not 0.0 <= start < until <= 1.0:
            raise ValueError(f"start and end are shares of the run, 0 <= start < end <= 1, got {start!r} and {until!r}")
        if every is not None:
            every = check_count("every", every)
        if max_dense_cost is not None and not 0.0 < check_number("max_dense_cost", max_dense_cost) < math.inf:
            raise ValueError(
                f"max_dense_cost must be positive and finite, in units of the loss, got {max_dense_cost!r}"
            )
        if lr_exponent is not None and not 0.0 <= check_number("lr_exponent", lr_exponent) <= 1.0:
            raise ValueError(f"lr_exponent must lie in [0, 1], 0 to leave the lr alone, got {lr_exponent!r}")
        total_steps = check_total_steps(total_steps)
        self._strengths = Strengths(optimizer)
        base = self._strengths.decoupled
        follows = follows_the_gradient(base)
        usual = (PLAIN_TAIL, PLAIN_TAIL) if follows else (NORMALIZED_TAIL, SPARED_TAIL)
        self.tail_energy, self._last_goal = usual if tail_energy is None else (float(tail_energy), float(tail_energy))
        self.sparsity, self.total_steps = float(sparsity), total_steps
        self.max_dense_cost, self.scope, self.start, self.end = max_dense_cost, scope, start, until
        self.every = max(1, total_steps // MEASUREMENTS) if every is None else every
        self.lr_exponent = usual_exponent(base) if lr_exponent is None else float(lr_exponent)
        self._lr_compensation = LrCompensation(self._strengths, self.sparsity, self.lr_exponent)
        # What the two become around SGD with latent weights, once most are seen to be spared, and since when they are,
        # as a share of the run: for good, as a layer may be recognized at one measurement and not at the next.
        self._waits_for_latent = follows and base.latent_weights
        self._latent_end = LATENT_END if end is None else until
        self._latent_exponent = NORMALIZED if lr_exponent is None else self.lr_exponent
        self._latent_since: float | None = None
        # Where each layer has a goal of its own, units keep the thresholds of their own flow.
        self._one_threshold = scope == "global" and isinstance(self._penalty, PerUnit)
        self._strengths.take_over(type(self).__name__)
        base.reached = set()
        self.steps = 0
        self.last_tail = math.nan
        self.history: list[list[float]] = []
        self._loops: list[Loop] = []
        self._first_energy: dict[str, float] = {}
        self._loss = LossTrend()
        # How far the tail has been told to fall on: it does not climb back where a layer is taken for one that
        # BatchNorm follows at one measurement and not at the next, as around SAM, whose gradients are taken beside it.
        self._fallen = 0.0
        self._bound_steps()
        if isinstance(self._penalty, InverseVariance):
            warnings.warn(
                "the preprint's form of WCR cannot be driven far: its threshold is the layer's mean magnitude and its "
                "flow keeps that mean, so it amplifies the same share of the weights at any strength and the tail "
                'saturates; WCR(base, form="per_unit") concentrates as far as asked',
                stacklevel=2,
            )

    @property
    def _penalty(self) -> Penalty:
        return self._strengths.decoupled.penalty

    def strengths(self) -> list[float]:
        """Return every group's present strength, 0 for those that are not driven."""
        return self._strengths.values()

    def lr_factors(self) -> list[float]:
        """Return by what each group's lr is multiplied at present in the base's update."""
        return self._lr_compensation.values()

    def step(self, loss: float | Tensor | None = None) -> None:
        """Take note of one step of the optimizer; call it after each `optimizer.step()`.

        Args:
            loss: The step's training loss, one number, lower is better: minus the objective of a base that maximizes
                one. A tensor on a device is not waited for. Without it there is no guard on the loss, and exponents of
                the lr above 1/2 count as 1/2 (default: None).

        Raises:
            ValueError: If the loss is missing and max_dense_cost needs it, or is not one number.
            RuntimeError: If another object drives the optimizer by now, or groups were removed from it.

        """
        self._strengths.check_driving()
        if loss is None and self.max_dense_cost is not None:
            raise ValueError(f"max_dense_cost={self.max_dense_cost!r} needs the training loss: call step(loss)")
        self._find_loops()
        if loss is not None:
            self._loss.add(loss, self._strengths.device)
        self._strengths.decoupled.note_reached()  # of a step that a GradScaler skipped, too
        self.steps += 1
        self._lr_compensation.undo()
        for loop in self._loops:
            if loop.keep_step_length(self._lr(loop)):
                self._set(loop)
        begins = not self.history or any(self._begins(loop) for loop in self._loops)
        if begins or self.steps % self.every == 0 or self.steps == self.total_steps:
            with self._strengths.chain.true_weights():  # SSAM's, in a loop without closures, are others between steps
                self._control()
        self._bound_steps()
        self._ask_for_lifts()
        if self.steps == self.total_steps:
            self._warn_if_missed()
            self._warn_of_unreached()

    def path(self, first_tail: float) -> float:
        """Return the tail wanted at the present step of a run that began with a given one."""
        first = max(first_tail, self.tail_energy)  # if it is sparse already, what it rises by below is no excess
        wanted = first * math.pow(self.tail_energy / first, self._way())
        return wanted * math.pow(self._last_goal / self.tail_energy, max(self._fallen, self._fall()))

    def _way(self) -> float:
        """Return how much of the way to its goal the tail shall be by now."""
        run, since = self.steps / self.total_steps, self._latent_since
        if since is None:
            return _progress(run, self.start, self.end)
        before, start = _progress(since, self.start, self.end), max(since, self.start)
        return before if before == 1.0 else before + (1 - before) * _progress(run, start, self._last_end)

    @property
    def _last_end(self) -> float:
        return self.end if self._latent_since is None else self._latent_end

    def _fall(self) -> float:
        """Return how much of the way to its last goal the tail shall be by now, where most weights are spared."""
        if self._last_goal == self.tail_energy or self._last_end >= SPARED_END or not self._spares_most():
            return 0.0
        return _progress(self.steps / self.total_steps, self._last_end, SPARED_END)

    def _spares_most(self) -> bool:
        """Whether most weights are in layers where those that pruning will keep are spared."""
        spared = {f"{group}.{place}" for group, place in self._strengths.decoupled.scale_invariant}
        sizes = [(name, w.numel()) for loop in self._loops for name, _, w in self._layers(loop)]
        return 2 * sum(n for name, n in sizes if name in spared) > sum(n for _, n in sizes)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on exactly: numbers, strings and lists of them."""
        base, loops = self._strengths.decoupled, deepcopy(self._loops)
        return {
            "steps": self.steps,
            "last_tail": self.last_tail,
            "scope": self.scope,
            "given": list(self._strengths.given),
            "reference": self._strengths.reference,
            # In columns and pairs, since torch.distributed.checkpoint loads into the keys that a new object has, and
            # takes no list of dicts for a value.
            "loops": {field.name: [getattr(loop, field.name) for loop in loops] for field in fields(Loop)},
            "longest": [[index, *bound] for index, bound in (base.longest or {}).items()],
            "first_energy": [list(pair) for pair in self._first_energy.items()],
            **self._lr_compensation.state_dict(),
            "scale_invariant": [list(place) for place in base.scale_invariant],
            "cutoff": base.cutoff,
            "reached": [list(place) for place in sorted(base.reached or ())],
            "fallen": self._fallen,
            "latent_since": -1.0 if self._latent_since is None else self._latent_since,
            "seen_invariant": [
                [*place, bool(hidden)]
                for places, flags in base.seen_invariant
                for place, hidden in zip(places, flags.tolist(), strict=True)
            ],
            "loss": self._loss.state_dict(),
            "history": [list(row) for row in self.history],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`; before or after the optimizer's own is loaded.

        After it, if strengths were set by hand since the last measurement and shall be kept until the next one. Where
        another object has taken over since this one was made, nothing of the optimizer is changed.

        Raises:
            ValueError: If it had more groups than there are, or another scope; nothing is changed then.
        """
        columns = state_dict["loops"]
        loops = [Loop(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        history, energy = [list(row) for row in state_dict["history"]], dict(state_dict["first_energy"])
        steps, last_tail = state_dict["steps"], state_dict["last_tail"]
        several = len(loops) > 1 if self.scope == "global" else any(len(loop.groups) > 1 for loop in loops)
        if several or state_dict.get("scope", self.scope) != self.scope:  # states of earlier versions do not say it
            other = "layer" if self.scope == "global" else "global"
            raise ValueError(f"the state is that of scope={other!r}, and this object has scope={self.scope!r}")
        loss = LossTrend()
        loss.load_state_dict(state_dict["loss"])
        self._strengths.load(state_dict["given"], state_dict["reference"])
        self._loss, self.steps, self.last_tail = loss, steps, last_tail
        self._fallen = state_dict.get("fallen", 0.0)
        since = state_dict.get("latent_since", -1.0)
        self._latent_since = since if since >= 0.0 and self._waits_for_latent else None
        self._loops, self._first_energy, self.history = loops, energy, history
        if not self._strengths.drives:
            return
        for loop in self._loops:
            self._set(loop)
        self._lr_compensation.load_state_dict(state_dict)
        base = self._strengths.decoupled
        base.reached = {(group, place) for group, place in state_dict.get("reached", ())}
        if self._one_threshold:
            known, seen = (state_dict.get(key, ()) for key in ("scale_invariant", "seen_invariant"))  # from before them
            base.scale_invariant = [(group, place) for group, place in known]
            base.seen_invariant = [
                ([(group, place)], torch.tensor([invariant], device="cpu")) for group, place, invariant in seen
            ]
            base.cutoff = state_dict.get("cutoff", math.inf)
        self._bound_steps()
        if "longest" in state_dict:  # the lr may be loaded only later
            base.longest = {  # states of earlier versions do not say to which strength a bound belongs
                index: (most, of[0] if of else self._strengths.written.get(index, math.nan))
                for index, most, *of in state_dict["longest"]
            }
        self._ask_for_lifts()

    def _find_loops(self) -> None:
        """Give every driven group a loop, those that were added since too."""
        known = {index for loop in self._loops for index in loop.groups}
        new = [index for index in self._strengths.driven() if index not in known]
        if self.scope == "layer":
            self._strengths.separate()
            self._loops += [Loop([index]) for index in new]
        elif not self._loops:
            self._loops = [Loop(new)]
        elif new:
            self._loops[0].groups += new
            self._set(self._loops[0])

    def _begins(self, loop: Loop) -> bool:
        """Whether a loop waits for a first positive lr, has it by now, and was not measured in vain since."""
        return not loop.has_begun and not loop.obstacle and self._lr(loop) != 0.0

    def _lr(self, loop: Loop) -> float:
        """Return the largest lr of a loop's groups; NaN where reading it would wait for a device."""
        rates = [self._strengths.groups[index]["lr"] for index in loop.groups]
        if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates):
            return math.nan
        return max(map(float, rates))

    def _set(self, loop: Loop) -> None:
        if math.isfinite(loop.level):
            for index in loop.groups:
                if index < len(self._strengths.groups):
                    self._strengths.set(index, loop.level)

    def _bound_steps(self) -> None:
        """Let no group's step be longer than its loop has found, nor any while that has not begun."""
        groups, driven = self._strengths.groups, set(self._strengths.driven())
        longest = {index: (math.inf, 0.0) for index in range(len(groups)) if index not in driven}
        for loop in self._loops:
            lr = self._lr(loop)
            for index in loop.groups:
                if loop.has_begun and index < len(groups):
                    share = self._strengths.share(index) * (float(groups[index]["lr"]) / lr if lr > 0.0 else 1.0)
                    longest[index] = (ROUNDING * loop.longest * share, self._strengths.written.get(index, math.nan))
        self._strengths.decoupled.longest = longest

    def _ask_for_lifts(self) -> None:
        """Have the step after each measurement enlarge the units that fell behind."""
        self._strengths.decoupled.lift_units = (
            self._penalty.per_unit and self.steps > 0 and self.steps % self.every == 0
        )

    def _layers(self, loop: Loop) -> list[tuple[str, int, Tensor]]:
        """List a loop's weights: a name, the group, the tensor.

        Those that are frozen at present, or had no gradient in any step so far, are left out, since no strength moves
        them. Before any step was noted it is not known which had one, and all count.
        """
        reached = self._strengths.decoupled.reached
        return [
            (f"{index}.{place}", index, w.detach())
            for (index, place), w in self._under_penalty(loop)
            if w.requires_grad and (not reached or (index, place) in reached)
        ]

    def _under_penalty(self, loop: Loop) -> Iterator[tuple[Place, Tensor]]:
        for index in loop.groups:
            group = self._strengths.groups[index]
            min_ndim = group.get("min_ndim", self._penalty.min_ndim)
            for place, w in enumerate(group["params"]):
                if w.ndim >= min_ndim:
                    yield (index, place), w

    def _control(self) -> None:
        layers = [self._layers(loop) for loop in self._loops]
        if not any(layers) and any(pair for loop in self._loops for pair in self._under_penalty(loop)):
            return  # there are weights, but all are frozen at present or not used yet
        measured = self._measure(layers)
        if measured.seen_invariant:
            seen = measured.seen_invariant.items()
            self._strengths.decoupled.scale_invariant = [place for place, invariant in seen if invariant]
        if self._latent_since is None and self._waits_for_latent and self._spares_most():
            self._latent_since = self.steps / self.total_steps
        self._fallen = max(self._fallen, self._fall())
        self._lr_compensation.exponent = self.lr_exponent if self._latent_since is None else self._latent_exponent
        if self._one_threshold and 0.0 < measured.energies[0][1] < math.inf:
            self._strengths.decoupled.cutoff = SPARED * measured.threshold
        self._strengths.decoupled.seen_invariant = ()
        rise = self._loss.update(measured.loss)
        cost = Cost(rise, self._loss.allowed(self.max_dense_cost), self.max_dense_cost is not None)
        falling = len(self.history) >= RECENT and self._loss.smooth < self.history[-RECENT][4]
        pruned = total = 0.0
        for loop, named, of_layers, energies in zip(
            self._loops, layers, measured.layers, measured.energies, strict=True
        ):
            lr = max(float(self._strengths.groups[index]["lr"]) for index in loop.groups)
            finite = math.isfinite(energies[1]) and bool(of_layers.q.isfinite().all())
            if not (finite and energies[1] > 0.0 and lr >= 0.0):
                if lr > 0.0:
                    loop.obstacle = NO_WEIGHTS
                continue  # an overflow under way, or nothing to prune: no reason to move
            if loop.obstacle == NO_WEIGHTS:
                loop.obstacle = ""
            pruned, total = pruned + energies[0], total + energies[1]
            loop.tail = energies[0] / energies[1]
            if lr == 0.0 and not loop.has_begun:
                loop.first_tail = loop.tail
                continue  # what is remembered of the start is of the first positive lr, when it is known what is used
            names = [name for name, _, _ in named]
            energy = (of_layers.n * of_layers.q).tolist()
            first = [self._first_energy.setdefault(name, now) for name, now in zip(names, energy, strict=True)]
            groups = [index for _, index, _ in named]
            self._lr_compensation.update(of_layers, groups, well=not cost.is_high, falling=falling)
            driven = Driven(self._penalty, names, of_layers, first, self._shares(groups, lr), self.total_steps)
            if loop.has_begun:
                loop.follow(driven, self.path(loop.first_tail), lr, cost)
            else:
                loop.begin(driven, lr)
            self._set(loop)
        if total > 0.0:
            self.last_tail = pruned / total
        begun = [loop.first_tail for loop in self._loops if loop.first_tail > 0]
        wanted = self.path(begun[0]) if begun else math.nan
        self.history.append([self.steps, self.last_tail, wanted, max(self.strengths()), self._loss.smooth])

    def _shares(self, groups: Sequence[int], lr: float) -> Tensor:
        """Return each layer's step length over the loop's largest lr * level."""
        shares = [
            self._strengths.share(index) * (float(self._strengths.groups[index]["lr"]) / lr if lr else 1.0)
            for index in groups
        ]
        return torch.tensor(shares, dtype=torch.float64, device="cpu")

    def _measure(self, layers: Sequence[Sequence[tuple[str, int, Tensor]]]) -> _Measurement:
        """Measure all loops with one copy to the host."""
        sets: list[list[Tensor]] = []
        for named in layers:
            tensors = [w for _, _, w in named]
            sets += [[w] for w in tensors] if self.scope == "layer" else [tensors]
        every = [w for named in layers for _, _, w in named]
        if not every:
            raise ValueError("the driven groups hold no weights that could be pruned; check requires_grad and min_ndim")
        device = local(every[0]).device
        found = torch.stack(list(across_devices(every)))
        measured = tails([s for s in sets if s], self.sparsity).to(device, found.dtype)
        loss = self._loss.window(device, found.dtype)
        seen_invariant = self._strengths.decoupled.seen_invariant if self._one_threshold else ()
        flags = [of_step.to(device, found.dtype) for _, of_step in seen_invariant]
        together = torch.cat([loss.reshape(1), measured.flatten(), found.flatten(), *flags]).cpu().double()
        numbers, seen = together.tensor_split([len(together) - sum(map(len, flags))])
        of_sets = numbers[1 : 1 + measured.numel()].view(-1, 3)
        n, mu, q = numbers[1 + measured.numel() :].view(3, -1)
        of_loops, of_layers, first, first_set = [], [], 0, 0
        for named in layers:
            count = len(named)
            members = count if self.scope == "layer" else min(count, 1)
            summed = of_sets[first_set : first_set + members].sum(0)
            of_loops.append((float(summed[0]), float(summed[1])))
            span = slice(first, first + count)
            of_layers.append(Moments(n[span], mu[span], q[span]))
            first, first_set = first + count, first_set + members
        places = [place for of_step, _ in seen_invariant for place in of_step]
        hidden = dict(zip(places, seen.bool().tolist(), strict=True))
        return _Measurement(of_loops, float(of_sets[0, 2]), of_layers, float(numbers[0]), hidden)

    def _warn_if_missed(self) -> None:
        measured = [loop for loop in self._loops if not math.isnan(loop.tail)] or self._loops
        missed = [loop for loop in measured if not loop.tail <= 1.5 * self.tail_energy]
        if not missed:
            return
        if not any(self._layers(loop) for loop in missed):
            warnings.warn(
                "no weight of the driven groups was trained, so that none was driven; check requires_grad, and that "
                "the loss uses them",
                stacklevel=3,
            )
            return
        worst = max(missed, key=lambda loop: loop.tail)
        short = "the run was too short for the strength to get there"
        why = worst.obstacle or (short if worst.has_begun else "its learning rate was 0 at every measurement")
        warnings.warn(
            f"pruning at sparsity {self.sparsity:g} would still take {worst.tail:.3g} of the weights' energy, wanted "
            f"{self.tail_energy:g}: {why}. Ask for less sparsity, train longer, allow more dense cost, or drive "
            f'WCR(base, form="per_unit")',
            stacklevel=3,
        )

    def _warn_of_unreached(self) -> None:
        reached = self._strengths.decoupled.reached
        every = [pair for loop in self._loops for pair in self._under_penalty(loop) if pair[1].requires_grad]
        missing = [(place, w) for place, w in every if reached and place not in reached]
        if missing:
            (group, place), w = missing[0]
            warnings.warn(
                f"{len(missing)} weight tensors of the driven groups never had a gradient, such as "
                f"param_groups[{group}]['params'][{place}] of shape {tuple(w.shape)}: no strength moves them and the "
                f"tail leaves them out, but pruning ranks them. Leave them out of param_groups and of pruning "
                f"(exclude=), or take them out of the model",
                stacklevel=3,
            )

    def plot(
        self, path: str | os.PathLike[str] | None = None, accuracy: Sequence[tuple[int, float]] | None = None
    ) -> Figure:
        """Draw tail, strength, smoothed loss and, if given, accuracy over training.

        Args:
            path: Where to save the figure, in the format of its suffix (default: None)
            accuracy: Pairs of a step and what was measured there, for a panel of its own (default: None)

        Returns:
            The figure.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If nothing was measured yet.
        """
        from wcr_optim.plots import training_curves

        # Where the path has ended, or will if it goes on as it has begun to.
        fallen = 1.0 if self._fallen and self.steps < self.total_steps else self._fallen
        goal = self.tail_energy * math.pow(self._last_goal / self.tail_energy, fallen)
        return training_curves(self.history, path, accuracy, goal=goal)


def _progress(run: float, start: float, end: float) -> float:
    """Return how much of the way from start to end of a part of the run is behind, from 0 to 1."""
    return min(max((run - start) / (end - start), 0.0), 1.0)
