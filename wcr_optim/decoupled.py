"""Penalties as a step of their own inside optimizer.step(), decoupled from the loss as AdamW decouples weight decay."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from wcr_optim import backends, layer_numbers
from wcr_optim.eager_units import number_of_units
from wcr_optim.fused import FusedUpdate
from wcr_optim.invariance import invariant_units, one_threshold
from wcr_optim.latent import LatentWeights
from wcr_optim.layout import local, random_streams
from wcr_optim.moments import Moments, across_devices, counts, moments, of_sums
from wcr_optim.penalties import L1, L2, HoyerSquare, InverseVariance, Penalty, PerUnit, Relative, ScaleFree
from wcr_optim.precision import accumulator
from wcr_optim.shrink import shrink_
from wcr_optim.units import shrink_keeping_energy_, shrink_units_, spread, unit_moments
from wcr_optim.uploads import select
from wcr_optim.wrapper import (
    OptimizerWrapper,
    check_keeps_state,
    innermost,
    outside_graphs,
    runs_closure,
    stepped_by,
)

ROUNDING_SEED = "rounding_seed"
# Between the seeds of streams of random numbers: steps count up from one, fused calls by 2^32 (see `fused`).
STREAM = 2**40
# From those of other layers, for layers that are rounded in a call of their own.
APART = 2**39

Place = tuple[int, int]
"""Where a weight stands: its group, and which of the group's parameters it is."""


class _Units(NamedTuple):
    """The units of layers that draw one stream of random numbers, and what the flow does to them."""

    layers: list[Tensor]
    moments: Moments
    lengths: Tensor
    gain: Tensor
    threshold: Tensor
    lift: Tensor | float
    stream: int


class Decoupled(OptimizerWrapper):
    """Apply a penalty's exact gradient flow to the weights at every step, then let the base update them.

    Each layer's weights w, one parameter tensor, become

        w <- gain * softshrink(w, threshold),    (gain, threshold) = penalty.flow(moments(w), lr * strength)

    with the group's current lr, so the strength follows an LR schedule as AdamW's weight decay does. The gradients are
    those at the weights before the penalty. Parameters without a gradient are left alone, and so are tensors of fewer
    than two dimensions (biases, norms) unless their group sets `min_ndim`. Layers whose magnitudes are all the same,
    zero, a single one, NaN or infinite are left alone by the penalties that concentrate.

    The strength stands in the param_groups under the penalty's `option` ("weight_concentration" for WCR): set it per
    group, schedule it, find it in checkpoints.

    bfloat16 and float16 weights are computed in float32 and rounded stochastically, since a relative change of 1e-4
    would otherwise be rounded away at every step. Draws depend on a counter that is saved in the groups
    ("rounding_seed"), so a resumed run repeats them; torch's global generators are not touched.

    With `latent_weights`, weights that the flow takes to zero stay exactly there until the base's updates since add up
    to more than the thresholds since do, see `latent.LatentWeights`. Adam moves what shall stay small as far as all
    other weights, at every step; so held, it cannot. Two more tensors are in each weight's state, one of the weight's
    size, and a base cannot take the shrink along in its own pass.

    Args:
        base: The optimizer instance to wrap; LBFGS, which runs its closure itself, gets the penalty after its step.
        penalty: The penalty, an instance such as `penalties.L1()`.
        strength: Default strength, not negative, a number or a tensor of one element.
        latent_weights: Whether weights at zero are held there (default: False).
        stochastic_rounding: Whether to round weights of less than 32 bits stochastically (default: True).
        backend: How moments and shrink are computed: "auto", "eager", "compiled" or "triton", see `backends`
            (default: "auto").

    Raises:
        TypeError: If base or penalty is no instance, a weight under the penalty is complex, sparse or no float, or
            latent weights are asked for around a base that keeps its state elsewhere (ZeroRedundancyOptimizer).
        ValueError: If a strength is negative, NaN, infinite or has several elements, a group is empty or has no lr,
            another wrapper around the base has the same option, the backend asked for cannot run, or latent weights are
            asked for around a base that runs its closure itself.

    Source:
        The idea of decoupling: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    group_keys = (*OptimizerWrapper.group_keys, "min_ndim")
    lift_units = False
    """Whether the next step of a per-unit form enlarges units that fell behind, see `invariance.invariant_units`.

    SparsityTarget asks for it, and the step takes it back. Inside a graph of torch.compile units are left as they are.
    """
    seen_invariant: Sequence[tuple[list[Place], Tensor]] = ()
    """What that step saw: layers, and whether the loss does not see the size of their units."""
    scale_invariant: Sequence[Place] = ()
    """Layers whose units all get one threshold and keep their energy, see `invariance.one_threshold`.

    SparsityTarget says which. Inside a graph of torch.compile they get their own.
    """
    driver: str = ""
    """Name of the SparsityTarget or StrengthSchedule that drives the strength, "" if none does."""
    longest: Mapping[int, tuple[float, float]] | None = None
    """Of each group the longest step lr * strength, and the strength that it belongs to; None for no bounds.

    SparsityTarget sets them: a strength is worked out for an lr, and a scheduler may have raised it since. A group
    whose bound is 0, or that is not among them, waits for its strength; one that has another strength by now was given
    it by somebody else, and has no bound. On a device and inside a graph of torch.compile steps are taken as they are.
    """
    reached: set[Place] | None = None
    """Places of weights that had a gradient in a step with a positive lr; None if nobody asks.

    SparsityTarget sets it to an empty set, and the steps fill it. Steps in which every lr is 0 do not count: a
    checkpoint loader's probe gives all weights a gradient of zeros.
    """
    cutoff: float = math.inf
    """Magnitude from which that one threshold spares weights; SparsityTarget sets it by what pruning will keep."""

    def __init__(
        self,
        base: Optimizer,
        penalty: Penalty,
        strength: float | Tensor,
        backend: str = "auto",
        *,
        stochastic_rounding: bool = True,
        latent_weights: bool = False,
    ) -> None:
        if not isinstance(penalty, Penalty):
            kind = f"the class {penalty.__name__}" if isinstance(penalty, type) else f"{penalty!r}"
            raise TypeError(f"penalty must be an instance of penalties.Penalty such as penalties.L1(), got {kind}")
        backends.check(backend)
        self.penalty = penalty
        self.stochastic_rounding = stochastic_rounding
        self.backend = backend
        if latent_weights and isinstance(base, Optimizer) and runs_closure(base):
            raise ValueError(
                f"{type(base).__name__} moves weights before the penalty's step, so none can be held at zero; leave "
                f"latent_weights out"
            )
        if latent_weights:
            check_keeps_state(
                f"{type(self).__name__} with latent_weights=True",
                base,
                "have it take the penalty inside, optimizer_class=wcr_optim.AdamW with latent_weights=True",
            )
        self._latent = LatentWeights(f"{penalty.option}_latent") if latent_weights else None
        own = [group.get(penalty.option) for group in getattr(base, "param_groups", ())]  # before those without get it
        super().__init__(base, **{penalty.option: strength})
        self._warn_of_no_use(strength, own)

    def _warn_of_no_use(self, strength: float | Tensor, own: Sequence[Any]) -> None:
        """Warn where a strength that somebody chose is that of no group, since all have one of their own."""
        option = self.penalty.option
        usual = inspect.signature(type(self).__init__).parameters.get(option)
        if usual is None or isinstance(strength, Tensor) or strength == usual.default:
            return
        if own and not any(isinstance(x, Tensor) or x is None or x == strength for x in own):
            warnings.warn(
                f"{option}={strength!r} is used by no group, since all have one of their own, "
                f"{', '.join(map(repr, own))}: set it there, as param_groups(model, weight_concentration=...) does",
                stacklevel=3 + type(self).__mro__.index(Decoupled),
            )

    @property
    def latent_weights(self) -> bool:
        """Whether weights that were taken to zero are held there."""
        return self._latent is not None

    def update(self) -> None:
        """Apply the penalty, then the base's update, in one pass over the weights where the base can fuse them."""
        if self.reached is not None:
            self.note_reached()
        if self._rounds() or self._latent is not None:
            # Fresh random bits at every step are nothing that a graph of torch.compile can hold.
            type(self)._outside_graphs(self._regularize)
        else:
            self._regularize()
        if self._latent is not None and self._latent.waits:
            self._update_first()
        else:
            super().update()
            if self._latent is not None:
                self._release()
        if isinstance(self.base, FusedUpdate):
            self.base.forget()

    def concentration(self) -> Tensor:
        """Measure how concentrated each layer under this penalty is, or, as l2 concentrates nothing, under the next."""
        if isinstance(self.penalty, L2):
            return super().concentration()
        having = [group for group in self.param_groups if not _is_zero(group[self.penalty.option])]
        weights = [
            w.detach()
            for group in having or self.param_groups
            for w in group["params"]
            if w.requires_grad and w.ndim >= group.get("min_ndim", self.penalty.min_ndim)
        ]
        if not weights:
            raise ValueError("the optimizer holds no weights under its penalty; check requires_grad and min_ndim")
        with self.true_weights():
            _, mu, q = across_devices(weights)
        return torch.where(q == 0, 0.0, 1 - mu.square() / q).clamp_(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state_dict, the options in its groups included.

        The counter of stochastic rounding is a number there, wherever it lives: read from a GPU it waits for it once.
        """
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            if isinstance(group.get(ROUNDING_SEED), Tensor):
                group[ROUNDING_SEED] = int(group[ROUNDING_SEED])  # as a template has it that took no step yet
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict as `OptimizerWrapper.load_state_dict`, latent weights included."""
        if self._latent is None:
            super().load_state_dict(state_dict)
            return
        seen = [state_dict]
        # After hooks of others, which may put another dict in its place, as torch's recipe for other orders of groups.
        last = innermost(self).register_load_state_dict_pre_hook(lambda _, adapted: seen.append(adapted))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        self._latent.load(self, seen[-1])

    def _regularize(self) -> None:
        if self._latent is not None:
            self._latent.begin()
        if isinstance(self.base, FusedUpdate):
            self.base.forget()  # what an interrupted step left
        weights: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
        places: defaultdict[torch.device, list[Place]] = defaultdict(list)
        lengths: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
        for number, group in enumerate(self._filled_groups()):
            s = self._bounded(group["lr"] * group[self.penalty.option], number)
            if _is_zero(s):
                self._hold_at_zero(group)
                continue
            for device, chosen in self._regularized(group).items():
                weights[device] += chosen.values()
                places[device] += [(number, place) for place in chosen]
                lengths[device].append(_repeat(s, len(chosen), device))
        lifts = self.lift_units and not torch.compiler.is_compiling()
        if lifts and weights:  # not in a step of length 0, such as a checkpoint loader's probe
            self.seen_invariant = ()
        where = {device: backends.choose(self.backend, device, layers) for device, layers in weights.items()}
        seed = self._next_seed(weights, where)
        for device, layers in weights.items():
            backend = where[device]
            s = _joined(lengths[device])
            if self.penalty.per_unit:
                self._shrink_units(layers, places[device], s, seed, backend)
                continue
            gain, threshold = self._flow(self._moments(layers, backend), s, backend)
            if seed is None:
                self._shrink(layers, gain, threshold, None, backend)
                continue
            for stream, index in random_streams(layers):
                own = [layers[i] for i in index]
                self._shrink(own, select(gain, index), select(threshold, index), _apart(seed, stream * STREAM), backend)
        if lifts and weights:
            self.lift_units = False
        if self._latent is not None:
            self._latent.hold(self)

    @outside_graphs  # a set that grows would have a graph compiled anew
    def note_reached(self) -> None:
        """Note which weights have a gradient, see `reached`."""
        groups = self.param_groups
        if self.reached is not None and not all(_is_zero(group["lr"]) for group in groups):
            for number, group in enumerate(groups):
                self.reached.update((number, place) for place, w in enumerate(group["params"]) if w.grad is not None)

    @outside_graphs
    def _update_first(self) -> None:
        """Update weights of which some have no state of the base yet, for which their latent ones wait."""
        with stepped_by(self) as stepped:
            super().update()
        self._release(stepped)

    @outside_graphs
    def _release(self, stepped: Sequence[Tensor] = ()) -> None:
        if self._latent is not None:
            with self.true_weights():  # SSAM's, in a loop without closures, are others from here on
                self._latent.release(self, stepped)

    def _hold_at_zero(self, group: Mapping[str, Any]) -> None:
        """Hold the latent weights of a group through a step of length 0, such as a checkpoint loader's probe."""
        if self._latent is not None and not _is_zero(group[self.penalty.option]):
            for chosen in self._regularized(group).values():
                self._latent.take(self, list(chosen.values()), [0.0] * len(chosen))

    def _bounded(self, s: float | Tensor, number: int) -> float | Tensor:
        """Return a group's step length, no longer than `longest` says."""
        if torch.compiler.is_compiling() or self.longest is None:
            return s
        if isinstance(s, Tensor) and s.device.type != "cpu":
            return s
        most, worked_out = self.longest.get(number, (0.0, 0.0))
        if most > 0.0 and float(self.param_groups[number][self.penalty.option]) != worked_out:
            return s
        return s.clamp(max=most) if isinstance(s, Tensor) else min(s, most)

    def _flow(self, moments: Moments, s: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return self.penalty.flow(moments, s)
        return layer_numbers.implementation(backend).flow(self.penalty, moments, s)

    def _shrink(
        self, layers: list[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None, backend: str
    ) -> None:
        """Shrink layers now, or have the base do so on its way."""
        rest = list(range(len(layers)))
        if self._latent is not None:
            self._latent.take(self, layers, threshold.unbind())
        elif isinstance(self.base, FusedUpdate) and not torch.compiler.is_compiling():
            rest = self.base.take_over(layers, gain, threshold, seed, backend)
        if rest:
            left = [layers[i] for i in rest]
            shrink_(left, select(gain, rest), select(threshold, rest), seed=seed, backend=backend)

    def _shrink_units(
        self, layers: list[Tensor], places: list[Place], s: Tensor, seed: int | Tensor | None, backend: str
    ) -> None:
        known = frozenset() if torch.compiler.is_compiling() else frozenset(self.scale_invariant)
        for together in (False, True):
            index = [i for i, place in enumerate(places) if (place in known) == together]
            if index:
                shrink = self._shrink_by_one_threshold if together else self._shrink_by_own_thresholds
                own = self._units([layers[i] for i in index], [places[i] for i in index], select(s, index), backend)
                shrink(own, seed, backend)

    def _units(self, layers: list[Tensor], places: list[Place], s: Tensor, backend: str) -> Iterator[_Units]:
        """Work out what the flow does to the units of each stream's layers."""
        for stream, index in random_streams(layers):
            own = [layers[i] for i in index]
            measured = unit_moments(own, backend=backend)
            lengths = spread(select(s, index), own)
            gain, threshold = self._flow(measured, lengths, backend)
            lift: Tensor | float = 1.0
            if self.lift_units and not torch.compiler.is_compiling():
                seen = invariant_units(own, measured)
                lift = seen.lifts
                self.seen_invariant = [*self.seen_invariant, ([places[i] for i in index], seen.layers)]
            yield _Units(own, measured, lengths, gain, threshold, lift, stream)

    def _shrink_by_own_thresholds(self, units: Iterator[_Units], seed: int | Tensor | None, backend: str) -> None:
        """Shrink every unit as its own flow has it."""
        for own in units:
            gain = own.gain if isinstance(own.lift, float) else own.gain * own.lift
            own_seed = _apart(seed, own.stream * STREAM)
            self._take_units(own.layers, own.threshold)
            shrink_units_(own.layers, gain, own.threshold, seed=own_seed, backend=backend)

    def _shrink_by_one_threshold(self, units: Iterator[_Units], seed: int | Tensor | None, backend: str) -> None:
        """Shrink all units by one threshold and let each keep its energy."""
        every = list(units)
        layers = [w for own in every for w in own.layers]
        measured = Moments(*(torch.cat(columns) for columns in zip(*(own.moments for own in every), strict=True)))
        thresholds, lengths = torch.cat([own.threshold for own in every]), torch.cat([own.lengths for own in every])
        common = one_threshold(layers, measured, thresholds, lengths)
        for own, threshold in zip(every, torch.split(common, [len(own.threshold) for own in every]), strict=True):
            own_seed = _apart(seed, own.stream * STREAM + APART)
            lift = own.lift if isinstance(own.lift, Tensor) else torch.ones_like(threshold)
            self._take_units(own.layers, threshold)
            shrink_keeping_energy_(
                own.layers, own.moments, threshold, lift, cutoff=self.cutoff, seed=own_seed, backend=backend
            )

    def _take_units(self, layers: Sequence[Tensor], threshold: Tensor) -> None:
        if self._latent is not None:
            self._latent.take(self, layers, torch.split(threshold, [number_of_units(w) for w in layers]))

    def _regularized(self, group: Mapping[str, Any]) -> dict[torch.device, dict[int, Tensor]]:
        """Return the weights of a group that the penalty acts on, by device and by their place in the group."""
        min_ndim = group.get("min_ndim", self.penalty.min_ndim)
        layers: dict[torch.device, dict[int, Tensor]] = {}
        for place, w in enumerate(group["params"]):
            if w.grad is not None and w.ndim >= min_ndim:
                layers.setdefault(local(w).device, {})[place] = w
        return layers

    def _moments(self, layers: list[Tensor], backend: str) -> Moments:
        if self.penalty.uses_moments:
            if isinstance(self.base, FusedUpdate) and not torch.compiler.is_compiling():
                return of_sums(self.base.sums(layers, backend), layers)
            return moments(layers, backend=backend)
        n = counts(layers)
        return Moments(n, torch.zeros_like(n), torch.zeros_like(n))

    def _rounds(self) -> bool:
        narrow = any(w.dtype.itemsize < 4 for group in self.param_groups for w in group["params"])
        return self.stochastic_rounding and narrow

    def _next_seed(
        self, weights: Mapping[torch.device, list[Tensor]], chosen: Mapping[torch.device, str]
    ) -> int | Tensor | None:
        """Advance the counter of stochastic rounding, if any weight will be rounded."""
        narrow = [d for d, layers in weights.items() if any(w.element_size() < 4 for w in layers)]
        if not self.stochastic_rounding or not narrow:
            return None
        counters = [group.get(ROUNDING_SEED, 0) for group in self.param_groups]
        live = [d for d in narrow if chosen[d] == "triton"]
        seed: int | Tensor
        following: int | Tensor
        if live:  # on the device, where a CUDA graph advances it at every replay
            started = [c for c in counters if isinstance(c, Tensor)]
            following = started[0].to(live[0]) if started else torch.tensor(max(counters), device=live[0])
            seed = following.clone()
            following.add_(1)
        else:
            seed = max(map(int, counters))
            following = seed + 1
        for group in self.param_groups:
            group[ROUNDING_SEED] = following
        return seed

    def _fill_options(self, present: Sequence[Mapping[str, Any]] = ()) -> None:
        super()._fill_options(present)
        if self._rounds():
            # From the start, so that a checkpoint that is loaded through a template (DCP) finds a place for it.
            for group in self.param_groups:
                group.setdefault(ROUNDING_SEED, 0)

    def _check_group(self, group: Mapping[str, Any], index: int) -> None:
        super()._check_group(group, index)
        option, strength = self.penalty.option, group[self.penalty.option]
        where = f"param_groups[{index}]"
        if "lr" not in group:
            raise ValueError(f"{where} has no 'lr', and the penalty's step is lr * {option}; add one to the group")
        min_ndim = group.get("min_ndim", 0)
        if isinstance(min_ndim, bool) or not isinstance(min_ndim, int):
            raise TypeError(f"min_ndim must be a whole number, got {min_ndim!r} in {where}")
        if isinstance(strength, Tensor):
            if not strength.is_floating_point():
                raise TypeError(
                    f"{option} must be a floating-point number, got a tensor of {strength.dtype} in {where}"
                )
            if strength.numel() != 1:
                raise ValueError(
                    f"{option} must be one number, got a tensor of shape {tuple(strength.shape)} in {where}; "
                    f"put layers of different strength into groups of their own"
                )
            if strength.device.type != "cpu":
                strength = 0.0  # reading it would wait for the device
        elif isinstance(strength, bool) or not isinstance(strength, (int, float)):
            raise TypeError(f"{option} must be a number, got {strength!r} in {where}")
        strength = float(strength)
        if not 0.0 <= strength < math.inf:
            raise ValueError(f"{option} must be finite and not negative, got {strength} in {where}")
        if strength == 0.0:
            return
        _check_lr(group["lr"], where)
        if group.get("differentiable"):
            raise ValueError(
                f"differentiable=True in {where}: autograd does not see the penalty's step, so gradients through "
                f"step() would be wrong; set {option} to 0 there or differentiable to False"
            )
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        least = group.get("min_ndim", self.penalty.min_ndim)
        devices = set()
        for p in params:
            w = p[1] if isinstance(p, tuple) else p  # torch takes (name, parameter) pairs too
            if isinstance(w, Tensor) and w.ndim >= least:
                if w.layout != torch.strided or not w.is_floating_point():
                    _refuse_weight(w, f"{option} in {where}")
                devices.add(w.device)
        if self.backend not in ("auto", "eager"):
            for device in devices:
                backends.check_available(self.backend, device)

    def _describe(self) -> str:
        return repr(self.penalty)


class WCR(Decoupled):
    """Weight Concentration Regularizer, decoupled, around any optimizer.

    Makes a few weights of each layer large and drives the rest to zero, so that magnitude pruning removes only what
    does not matter.

        opt = WCR(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), weight_concentration=1e-3)

    Args:
        base: The optimizer instance to wrap.
        weight_concentration: Default strength; also the key in the groups (default: 1e-3).
        form: "inverse_variance", the preprint's 1 / (V + eps), "scale_free", n q / V, "per_unit", the same for every
            output unit of a layer apart, or "relative", the scale-free one with a step that does not depend on the
            weights' scale (default: "inverse_variance").
        eps: Added to V in the preprint's form; the scale-free form has none (default: 1e-8).
        max_growth: Bound on a weight's growth in one step, gain <= 1 + max_growth (default: 0.1).
        stochastic_rounding: Whether to round weights of less than 32 bits stochastically (default: True).
        latent_weights: Whether weights that were taken to zero are held there, see `Decoupled` (default: False).
        backend: How moments and shrink are computed: "auto", "eager", "compiled" or "triton", see `backends`
            (default: "auto").

    Raises:
        TypeError: As `Decoupled`.
        ValueError: As `Decoupled`, or if the form is unknown, eps negative or max_growth not positive.

    Source:
        arXiv 2511.14282; see `penalties.InverseVariance` and `penalties.ScaleFree` for what is from there.
    """

    def __init__(
        self,
        base: Optimizer,
        weight_concentration: float | Tensor = 1e-3,
        form: str = "inverse_variance",
        eps: float = 1e-8,
        max_growth: float = 0.1,
        *,
        stochastic_rounding: bool = True,
        latent_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        penalty = concentration_penalty(form, eps, max_growth)
        super().__init__(
            base,
            penalty,
            weight_concentration,
            stochastic_rounding=stochastic_rounding,
            latent_weights=latent_weights,
            backend=backend,
        )


class L1Decay(Decoupled):
    """Decoupled l1 penalty, ISTA's step w <- softshrink(w, lr * l1_decay); see `Decoupled` for the rest.

    Args:
        base: The optimizer instance to wrap.
        l1_decay: Default strength; also the key in the groups (default: 1e-4).
        stochastic_rounding: Whether to round weights of less than 32 bits stochastically (default: True).
        latent_weights: Whether weights that were taken to zero are held there, see `Decoupled` (default: False).
        backend: How the step is computed: "auto", "eager", "compiled" or "triton" (default: "auto").
    """

    def __init__(
        self,
        base: Optimizer,
        l1_decay: float | Tensor = 1e-4,
        *,
        stochastic_rounding: bool = True,
        latent_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            base,
            L1(),
            l1_decay,
            stochastic_rounding=stochastic_rounding,
            latent_weights=latent_weights,
            backend=backend,
        )


class L2Decay(Decoupled):
    """Decoupled weight decay, AdamW's w <- (1 - lr * l2_decay) w on every parameter; see `Decoupled` for the rest.

    Around Adam it is AdamW, bit for bit: in float32 and float64 with an lr that is a number or of the weights' dtype,
    in bfloat16 and float16 unfused and with stochastic_rounding=False.

    Args:
        base: The optimizer instance to wrap.
        l2_decay: Default strength; also the key in the groups (default: 1e-2).
        stochastic_rounding: Whether to round weights of less than 32 bits stochastically (default: True).
        backend: How the step is computed: "auto", "eager", "compiled" or "triton" (default: "auto").
    """

    def __init__(
        self,
        base: Optimizer,
        l2_decay: float | Tensor = 1e-2,
        *,
        stochastic_rounding: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(base, L2(), l2_decay, stochastic_rounding=stochastic_rounding, backend=backend)


class HoyerDecay(Decoupled):
    """Decoupled Hoyer-square penalty of DeepHoyer, (sum |w|)^2 / sum w^2 per layer; see `Decoupled` for the rest.

    Args:
        base: The optimizer instance to wrap.
        hoyer_decay: Default strength; also the key in the groups (default: 1e-3).
        max_growth: Bound on a weight's growth in one step, gain <= 1 + max_growth (default: 0.1).
        stochastic_rounding: Whether to round weights of less than 32 bits stochastically (default: True).
        latent_weights: Whether weights that were taken to zero are held there, see `Decoupled` (default: False).
        backend: How moments and shrink are computed: "auto", "eager", "compiled" or "triton", see `backends`
            (default: "auto").
    """

    def __init__(
        self,
        base: Optimizer,
        hoyer_decay: float | Tensor = 1e-3,
        max_growth: float = 0.1,
        *,
        stochastic_rounding: bool = True,
        latent_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        penalty = HoyerSquare(max_growth)
        super().__init__(
            base,
            penalty,
            hoyer_decay,
            stochastic_rounding=stochastic_rounding,
            latent_weights=latent_weights,
            backend=backend,
        )


def concentration_penalty(form: str, eps: float, max_growth: float) -> Penalty:
    """Make the penalty behind a form of WCR."""
    if form == "inverse_variance":
        return InverseVariance(eps, max_growth)
    if form == "scale_free":
        return ScaleFree(max_growth)
    if form == "per_unit":
        return PerUnit(max_growth)
    if form == "relative":
        return Relative(max_growth)
    raise ValueError(
        f"unknown form {form!r}; choose 'inverse_variance' (the preprint's), 'scale_free', 'per_unit' or 'relative'"
    )


def _check_lr(lr: Any, where: str) -> None:
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or torch.compiler.is_compiling()):
        return  # reading it would wait for its device, or break the graph
    if isinstance(lr, bool) or not isinstance(lr, (Real, Tensor)):
        raise TypeError(f"lr must be a number, got {lr!r} in {where}")
    if not 0.0 <= float(lr) < math.inf:
        raise ValueError(
            f"lr must be finite and not negative where a penalty acts, got {float(lr)} in {where}; a scheduler that is "
            f"stepped beyond its end can do that"
        )


def _refuse_weight(w: Tensor, where: str) -> None:
    what = "complex" if w.is_complex() else "sparse" if w.layout != torch.strided else str(w.dtype)
    raise TypeError(
        f"{where} needs real, dense, floating weights, got a {what} tensor of shape {tuple(w.shape)}; "
        f"put it into a group of its own with strength 0"
    )


def _is_zero(s: float | Tensor) -> bool:
    """Return whether a step length is known to be zero without waiting for a device or for what is being traced."""
    if torch.compiler.is_compiling() or (isinstance(s, Tensor) and s.device.type != "cpu"):
        return False
    return bool(s == 0)


def _repeat(s: float | Tensor, layers: int, device: torch.device) -> Tensor:
    """Give each of a group's layers its step length, in the moments' precision, without waiting for the device."""
    dtype = accumulator(device)
    if isinstance(s, Tensor):
        s = s.reshape(()) if s.device.type == "cpu" else s.to(device).reshape(())
    elif not torch.compiler.is_compiling():
        return torch.full((layers,), s, dtype=dtype, device=device)  # the number travels in the kernel's arguments
    # torch.compile keeps a factor variable, where torch.full would make it a constant and each new lr a new graph.
    return torch.ones(layers, dtype=dtype, device=device) * s


def _apart(seed: int | Tensor | None, distance: int) -> int | Tensor | None:
    """Return the seed of other draws than those from a seed itself; what is on a device costs it a launch."""
    return seed if seed is None or distance == 0 else seed + distance


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
