"""Penalties as a step of their own inside optimizer.step(), decoupled from the loss as AdamW decouples weight decay."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wcr_optim.layout import local
from wcr_optim.moments import Moments, accumulator, counts, moments
from wcr_optim.penalties import L1, L2, HoyerSquare, InverseVariance, Penalty, Relative, ScaleFree
from wcr_optim.shrink import shrink_
from wcr_optim.wrapper import OptimizerWrapper

BACKENDS = ("auto", "eager")
ROUNDING_SEED = "rounding_seed"


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

    Args:
        base: The optimizer instance to wrap; LBFGS, which runs its closure itself, gets the penalty after its step.
        penalty: The penalty, an instance such as `penalties.L1()`.
        strength: Default strength, not negative, a number or a tensor of one element.
        stochastic_rounding: Whether to round weights of less than 32 bits stochastically (default: True).
        backend: How moments and shrink are computed, "auto" or "eager" (default: "auto").

    Raises:
        TypeError: If base or penalty is no instance, or a weight under the penalty is complex, sparse or no float.
        ValueError: If a strength is negative, NaN, infinite or has several elements, a group is empty or has no lr,
            or another wrapper around the base has the same option.

    Source:
        The idea of decoupling: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    group_keys = ("min_ndim",)

    def __init__(
        self,
        base: Optimizer,
        penalty: Penalty,
        strength: float | Tensor,
        *,
        stochastic_rounding: bool = True,
        backend: str = "auto",
    ) -> None:
        if not isinstance(penalty, Penalty):
            kind = f"the class {penalty.__name__}" if isinstance(penalty, type) else f"{penalty!r}"
            raise TypeError(f"penalty must be an instance of penalties.Penalty such as penalties.L1(), got {kind}")
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(map(repr, BACKENDS))}")
        self.penalty = penalty
        self.stochastic_rounding = stochastic_rounding
        self.backend = backend
        super().__init__(base, **{penalty.option: strength})

    def update(self) -> None:
        """Apply the penalty, then the base's update."""
        self._regularize()
        super().update()

    def _regularize(self) -> None:
        weights: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
        lengths: defaultdict[torch.device, list[float | Tensor]] = defaultdict(list)
        for index, group in enumerate(self._filled_groups()):
            self._check_group(group, index)
            s = group["lr"] * group[self.penalty.option]
            if (not isinstance(s, Tensor) or s.device.type == "cpu") and s == 0:
                continue
            for w in self._regularized(group):
                device = local(w).device
                weights[device].append(w)
                lengths[device].append(s)
        seed = self._next_seed(weights)
        for device, layers in weights.items():
            gain, threshold = self.penalty.flow(self._moments(layers), _stack(lengths[device], device))
            shrink_(layers, gain, threshold, seed=seed)

    def _regularized(self, group: Mapping[str, Any]) -> list[Tensor]:
        min_ndim = group.get("min_ndim", self.penalty.min_ndim)
        return [p for p in group["params"] if p.grad is not None and p.ndim >= min_ndim]

    def _moments(self, layers: list[Tensor]) -> Moments:
        if self.penalty.uses_moments:
            return moments(layers)
        n = counts(layers)
        return Moments(n, torch.zeros_like(n), torch.zeros_like(n))

    def _next_seed(self, weights: Mapping[torch.device, list[Tensor]]) -> int | None:
        """Advance the counter of stochastic rounding, if any weight will be rounded."""
        if not self.stochastic_rounding or all(w.element_size() >= 4 for layers in weights.values() for w in layers):
            return None
        seed: int = max(group.get(ROUNDING_SEED, 0) for group in self.param_groups)
        for group in self.param_groups:
            group[ROUNDING_SEED] = seed + 1
        return seed

    def _check_group(self, group: Mapping[str, Any], index: int) -> None:
        super()._check_group(group, index)
        option, strength = self.penalty.option, group[self.penalty.option]
        where = f"param_groups[{index}]"
        if "lr" not in group:
            raise ValueError(f"{where} has no 'lr', and the penalty's step is lr * {option}; add one to the group")
        if isinstance(strength, Tensor):
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
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        for p in params:
            w = p[1] if isinstance(p, tuple) else p  # torch takes (name, parameter) pairs too
            if isinstance(w, Tensor) and w.ndim >= group.get("min_ndim", self.penalty.min_ndim):
                _check_weight(w, f"{option} in {where}")

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
        form: "inverse_variance", the preprint's 1 / (V + eps), "scale_free", n q / V, or "relative", the same with a
            step that does not depend on the weights' scale (default: "inverse_variance").
        eps: Added to V in the preprint's form; the scale-free form has none (default: 1e-8).
        max_growth: Bound on a weight's growth in one step, gain <= 1 + max_growth (default: 0.1).
        stochastic_rounding: Whether to round weights of less than 32 bits stochastically (default: True).
        backend: How moments and shrink are computed, "auto" or "eager" (default: "auto").

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
        backend: str = "auto",
    ) -> None:
        penalty = concentration_penalty(form, eps, max_growth)
        super().__init__(base, penalty, weight_concentration, stochastic_rounding=stochastic_rounding, backend=backend)


class L1Decay(Decoupled):
    """Decoupled l1 penalty, ISTA's step w <- softshrink(w, lr * l1_decay); see `Decoupled` for the rest.

    Args:
        base: The optimizer instance to wrap.
        l1_decay: Default strength; also the key in the groups (default: 1e-4).
        stochastic_rounding: Whether to round weights of less than 32 bits stochastically (default: True).
        backend: How the step is computed, "auto" or "eager" (default: "auto").
    """

    def __init__(
        self,
        base: Optimizer,
        l1_decay: float | Tensor = 1e-4,
        *,
        stochastic_rounding: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(base, L1(), l1_decay, stochastic_rounding=stochastic_rounding, backend=backend)


class L2Decay(Decoupled):
    """Decoupled weight decay, AdamW's w <- (1 - lr * l2_decay) w on every parameter; see `Decoupled` for the rest.

    Around Adam it is AdamW, bit for bit.

    Args:
        base: The optimizer instance to wrap.
        l2_decay: Default strength; also the key in the groups (default: 1e-2).
        stochastic_rounding: Whether to round weights of less than 32 bits stochastically (default: True).
        backend: How the step is computed, "auto" or "eager" (default: "auto").
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
        backend: How moments and shrink are computed, "auto" or "eager" (default: "auto").
    """

    def __init__(
        self,
        base: Optimizer,
        hoyer_decay: float | Tensor = 1e-3,
        max_growth: float = 0.1,
        *,
        stochastic_rounding: bool = True,
        backend: str = "auto",
    ) -> None:
        penalty = HoyerSquare(max_growth)
        super().__init__(base, penalty, hoyer_decay, stochastic_rounding=stochastic_rounding, backend=backend)


def concentration_penalty(form: str, eps: float, max_growth: float) -> Penalty:
    """Make the penalty behind a form of WCR."""
    if form == "inverse_variance":
        return InverseVariance(eps, max_growth)
    if form == "scale_free":
        return ScaleFree(max_growth)
    if form == "relative":
        return Relative(max_growth)
    raise ValueError(f"unknown form {form!r}; choose 'inverse_variance' (the preprint's), 'scale_free' or 'relative'")


def _check_weight(w: Tensor, where: str) -> None:
    what = "complex" if w.is_complex() else "sparse" if w.layout != torch.strided else None
    if what is None and not w.is_floating_point():
        what = str(w.dtype)
    if what is not None:
        raise TypeError(
            f"{where} needs real, dense, floating weights, got a {what} tensor of shape {tuple(w.shape)}; "
            f"put it into a group of its own with strength 0"
        )


def _stack(lengths: list[float | Tensor], device: torch.device) -> Tensor:
    """Gather step lengths, one per layer, in the precision of the moments."""
    dtype = accumulator(device)
    if not any(isinstance(s, Tensor) for s in lengths):
        return torch.tensor(lengths, dtype=dtype, device=device)
    return torch.stack([torch.as_tensor(s, dtype=dtype, device=device).reshape(()) for s in lengths])
