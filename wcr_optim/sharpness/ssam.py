"""SSAM: sharpness-aware minimization at the price of one pass, by the last step's gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wcr_optim.layout import stamp
from wcr_optim.sharpness.checks import ClosureWatch, ascent, check_base, check_rho, gradients, with_gradient
from wcr_optim.sharpness.memory import copy_, exchange_, exchange_back_, global_norm, norms, scale_
from wcr_optim.slots import Slot
from wcr_optim.wrapper import Closure, OptimizerWrapper, check_keeps_state, outside_graphs, stepped_by

EPS = 1e-12
PERTURBED = "ssam_perturbed"


class SSAM(OptimizerWrapper):
    """Single-step sharpness-aware minimization (S2SAM): one forward and one backward a step.

        optimizer = SSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)

    The gradient g_t is taken at weights that the previous step's gradient has moved,

        e_t = rho g_{t-1} / (||g_{t-1}|| + 1e-12),    g_t = the gradient at w_t + e_t,

    and the base steps from w_t with g_t; ||.|| is over all parameters of all groups. The first step is unperturbed,
    and so is the one after gradients that are all zero. A step whose gradient is not finite leaves e as it is.

    With a closure, step(closure) perturbs, runs it and leaves the true weights in place. The loss that it returns is
    the one at w_t + e_t: there is no pass at w_t. An exception in it leaves w_t in place, bit for bit; e_t may then
    differ in its last bits.

    Without one it is a plain swap for the base: backward(), step(), zero_grad(). For your own forward to see w + e,
    *the weights stay perturbed between steps*, and what evaluates, saves or edits them needs the true ones:

        optimizer.eval()                     # w in place
        validate(model); torch.save(...)
        optimizer.train()                    # w + e again, to the last bit

        with optimizer.true_weights():
            torch.save(model.state_dict(), path)

    Each is safe to call twice, or without the other. Weights edited between eval() and train() get the perturbation
    added. Weights that were loaded or edited while they were perturbed are taken as the true weights, with a warning,
    since nothing tells the one from the other: the perturbation is then part of what was edited. Edits in place through
    `.data` (`p.data.clamp_()`) cannot be seen, nor can those between `load_state_dict` and the step after it; they are
    lost when the true weights come back. `p.data = ...` is seen. Embeddings with max_norm= write their weights in every
    forward: give the step a closure, in which that goes with the perturbation.

    A checkpoint of model and optimizer may be taken in either state, both of them in the same, and resumes bit for
    bit. Loading one of the bare base starts with an unperturbed step.

    *Clipping* goes where it goes without SSAM; the perturbation's length does not depend on the gradient's. *Mixed
    precision* with a GradScaler is torch's usual loop; with a closure, call `loss = optimizer.gather(closure)` and then
    `scaler.step(optimizer)` and `scaler.update()`. *DistributedDataParallel* needs nothing: the gradients are reduced,
    so that the perturbations are equal.

    rho is per group; the group's rho at the time of a step makes the perturbation of the next. Penalties and weight
    decay act at w. One copy of the parameters is kept beside the base's state: e, or w where w + e is in place.

    Args:
        base: The optimizer instance to wrap.
        rho: Length of the perturbation, in units of a weight; also the key in the groups (default: 0.05).

    Raises:
        TypeError: If base is no optimizer instance, runs its closure itself (LBFGS) or keeps its state elsewhere
            (ZeroRedundancyOptimizer), rho is no number, or a gradient is sparse.
        ValueError: If a rho is negative, NaN or infinite, or the base has an option rho already.

    Source:
        Ji et al., "A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate
        Sparse Training", NeurIPS 2024.
    """

    def __init__(self, base: Optimizer, rho: float = 0.05) -> None:
        check_base(type(self).__name__, base)
        check_keeps_state(type(self).__name__, base, "use SAM, which keeps nothing")
        self._kept = Slot("ssam")  # e where the true weights are in place, the true weights where they are not
        # Of perturbed weights, to notice that somebody else wrote them.
        self._stamps: dict[Tensor, tuple[int, ...]] = {}
        self._gathered = False  # whether .grad holds a gradient that a closure left there
        self._norm = 0.0  # of the last gradient
        self._watch: ClosureWatch | None = None
        super().__init__(base, rho=rho, **{PERTURBED: False})

    @outside_graphs
    def gather(self, closure: Closure | None = None) -> Any:
        """Run the closure at the perturbed weights, and leave its gradient at the true ones."""
        if closure is None:
            if not self._gathered:
                self._keep()
            return super().gather(None)
        for index, group in enumerate(self._filled_groups()):
            self._check_group(group, index)
        self._gathered = False
        try:
            self._perturb()
            try:
                loss = super().gather(closure)
            finally:
                self._note()  # what a forward writes into weights, as embeddings with max_norm= do, goes with w + e
            if self._watch is not None:
                self._watch.check(type(self).__name__)
                self._watch = None
            self._keep()
        except BaseException:
            self._return()
            raise
        self._gathered = True
        return loss

    def _check_step_with_closure(self) -> None:
        super()._check_step_with_closure()
        self._watch = ClosureWatch(p for group in self.param_groups for p in group["params"])

    @outside_graphs
    def update(self) -> None:
        """Let the base update the true weights; in a loop without closures, perturb them for the next forward."""
        try:
            with stepped_by(self) as stepped:
                super().update()
            self._kept.settle(self, stepped)
            if not self._gathered and self._norm != 0.0:
                self._perturb()
        finally:
            self._gathered = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as torch.optim.Optimizer.zero_grad; what a closure left is then no longer waiting."""
        super().zero_grad(set_to_none)
        self._gathered = False
        if self._watch is not None:
            self._watch.cleared = True

    def eval(self) -> None:
        """Bring the true weights into place, to evaluate, save or edit them; `train` undoes it."""
        self._return()
        super().eval()

    def train(self) -> None:
        """Bring the perturbed weights into place, for forward passes that are not in a closure."""
        self._perturb()
        super().train()

    @contextmanager
    def true_weights(self) -> Iterator[None]:
        """Have the true weights in place for a block, and then what was there before."""
        perturbed = any(group[PERTURBED] for group in self._filled_groups())
        self._return()
        try:
            with super().true_weights():
                yield
        finally:
            if perturbed:
                self._perturb()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict; the weights that belong to it, perturbed or not, are loaded into the model.

        Before that, perturbed weights that nobody else wrote go back to the true ones.
        """
        perturbed = any(group[PERTURBED] for group in self._filled_groups())
        self._return(quietly=True)  # weights may have been loaded before the state that belongs to them
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            if perturbed:
                self._perturb()
            raise
        self._kept.clear()
        self._stamps.clear()
        self._gathered = False

    @torch.no_grad()
    def _perturb(self) -> None:
        """(w, e) -> (w + e, w), where that has not been done."""
        groups = [group for group in self._filled_groups() if not group[PERTURBED]]
        params, kept = self._kept_by(groups)
        try:
            for group in groups:
                group[PERTURBED] = True
            exchange_(params, kept)
        except BaseException:
            self._forget(groups, params)
            raise
        self._stamps.update((p, stamp(p)) for p in params)
        torch.clear_autocast_cache()  # of copies that were made of other weights; so below

    @torch.no_grad()
    def _return(self, quietly: bool = False) -> None:
        """(w + e, w) -> (w, e), where that has not been done."""
        groups = [group for group in self._filled_groups() if group[PERTURBED]]
        self._adopt(groups, quietly)
        params, kept = self._kept_by(groups)
        before = [stamp(p) for p in params]
        try:
            exchange_back_(params, kept)
            for group in groups:
                group[PERTURBED] = False
        except BaseException:
            if before != [stamp(p) for p in params]:  # else w + e is in place still, and w is kept
                self._forget(groups, params)
            raise
        self._stamps.clear()
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _keep(self) -> None:
        """Bring the true weights into place, and keep the perturbation that this gradient makes."""
        members = [with_gradient(group) for group in self._filled_groups()]
        for index, group in enumerate(self.param_groups):
            self._check_group(group, index)
        everywhere = [p for params in members for p in params]
        norm = self._norm = global_norm(norms(gradients(everywhere)), everywhere)
        if not math.isfinite(norm):
            self._return()
            return
        perturbed = [group for group in self._filled_groups() if group[PERTURBED]]
        self._adopt(perturbed)
        params, kept = self._kept_by(perturbed)
        copy_(params, kept)
        torch.clear_autocast_cache()
        buffers = {p: self._kept.get(self, p) for group in self.param_groups for p in group["params"]}
        self._forget(perturbed, buffers)  # until they hold the new perturbation: an interruption finds none
        self._stamps.clear()
        for group, params in zip(self.param_groups, members, strict=True):
            length = ascent(group) / (norm + EPS)
            perturbations = [_buffer(buffers[p], p) for p in params]
            scale_(perturbations, gradients(params), length)
            for p, perturbation in zip(params, perturbations, strict=True):
                self._kept.put(self, p, perturbation)

    def _note(self) -> None:
        """Take what is in place of perturbed weights as written by this class."""
        self._stamps = {p: stamp(p) for p in self._stamps}

    def _kept_by(self, groups: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters of these groups for which something is kept, and what that is."""
        found = []
        for p in (p for group in groups for p in group["params"]):
            kept = self._kept.get(self, p)
            if kept is None:
                continue
            if kept.dtype != p.dtype:  # the model was cast since, and what is exchanged with it has its precision
                kept = kept.to(p.dtype)
                self._kept.put(self, p, kept)
            found.append((p, kept))
        return [p for p, _ in found], [kept for _, kept in found]

    def _adopt(self, groups: Sequence[Mapping[str, Any]], quietly: bool = False) -> None:
        """Take perturbed weights that somebody else wrote as the true ones."""
        written = [p for group in groups for p in group["params"] if p in self._stamps and stamp(p) != self._stamps[p]]
        for p in written:
            self._kept.drop(self, p)
            del self._stamps[p]
        if written and not quietly:
            warnings.warn(
                f"{len(written)} parameters were written while they held SSAM's perturbation, and are taken as the "
                f"true weights now; load or edit weights between optimizer.eval() and optimizer.train(), "
                f"or inside `with optimizer.true_weights():`",
                stacklevel=3,
            )

    def _forget(self, groups: Sequence[dict[str, Any]], params: Sequence[Tensor] | Mapping[Tensor, Any]) -> None:
        for group in groups:
            group[PERTURBED] = False
        for p in params:
            self._kept.drop(self, p)

    def _check_group(self, group: Mapping[str, Any], index: int) -> None:
        super()._check_group(group, index)
        check_rho(group, index)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state_dict, which says whether the weights are perturbed."""
        self._fill_options()  # which makes a rho that a schedule has set since a plain number
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_stamps": {}, "_watch": None}  # stamps are counted anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        params, _ = self._kept_by([group for group in self.param_groups if group.get(PERTURBED)])
        self._stamps.update((p, stamp(p)) for p in params)


def _buffer(present: Tensor | None, p: Tensor) -> Tensor:
    """Return memory for a tensor like p."""
    return torch.empty_like(p, requires_grad=False) if present is None or present.dtype != p.dtype else present
