"""A step of two passes over the same data: one at the weights, one at weights moved by the first one's gradient."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from wcr_optim.layout import local, stamp
from wcr_optim.sharpness.checks import (
    ClosureWatch,
    check_base,
    check_model,
    check_rho,
    gradients,
    lay_out_gradients,
    with_gradient,
)
from wcr_optim.sharpness.guards import RunningStatistics, random_numbers_repeated, random_states, with_statistics
from wcr_optim.sharpness.memory import copies, copy_, global_norm, norms
from wcr_optim.wrapper import Closure, OptimizerWrapper, outside_graphs

COUNTER = "sharpness_steps"


class SecondPass:
    """What was there before the second pass and will be there after it.

    Args:
        params: The parameters that it moves.
        modules: The modules whose running statistics it must not touch.
    """

    def __init__(self, params: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
        self.params = list(params)
        self.others = copies(self.params)
        self.away = True
        self._stamps: list[tuple[int, ...]] = []
        self._statistics = RunningStatistics(modules)
        self.note()

    def note(self) -> None:
        """Take the weights that are in place as written by this pass."""
        self._stamps = [stamp(p) for p in self.params]
        # Inside one autocast region the next pass would run at copies that were made of the weights before.
        torch.clear_autocast_cache()

    def swap(self) -> None:
        """Put the true weights in place of the perturbed ones, or the other way around."""
        here = copies(self.params)
        copy_(self.params, self.others)
        self.others = here
        self.away = not self.away
        self.note()

    def restore(self) -> None:
        """Put everything back."""
        if self.away:
            copy_(self.params, self.others)
            torch.clear_autocast_cache()
        self._statistics.restore()

    def keep_written(self) -> None:
        """Have `restore` leave alone what somebody else wrote since: weights of a checkpoint, loaded meanwhile."""
        rows = zip(self.params, self.others, self._stamps, strict=True)
        kept = [(p, other, noted) for p, other, noted in rows if stamp(p) == noted]
        if len(kept) < len(self.params):
            self._statistics = RunningStatistics(())  # which came with the weights
        self.params = [p for p, _, _ in kept]
        self.others = [other for _, other, _ in kept]
        self._stamps = [noted for _, _, noted in kept]


class TwoPass(OptimizerWrapper):
    """Base class of optimizers whose gradient is taken at weights moved by another gradient at the same data.

    With a closure, `step(closure)` does it all. A manual loop says where the passes are:

        loss_fn(model(x), y).backward()      # at the weights
        optimizer.first_step()               # moves them
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()      # at the moved weights
        optimizer.second_step()              # moves them back, then the base's update
        optimizer.zero_grad()

    Several micro-batches may be accumulated in each pass, in the closure or before `first_step` and `second_step`.

    *Clipping* acts on the final gradient, with the true weights in place: in a pre-hook of the base's step, or between
    `gather` and `step`, which together are `step(closure)` or `second_step()`:

        loss = optimizer.gather(closure)     # in a manual loop: optimizer.gather() in place of second_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    *Mixed precision* with a GradScaler goes the same way. Overflow in either pass leaves a gradient that is not finite
    at the true weights, so that the scaler skips the step and lowers its scale:

        def closure():
            optimizer.zero_grad()
            with torch.autocast(device):
                loss = loss_fn(model(x), y)
            scaler.scale(loss).backward()
            return loss

        loss = optimizer.gather(closure)
        scaler.unscale_(optimizer)           # before clipping, if there is any
        scaler.step(optimizer)
        scaler.update()

    In a manual loop: scaled backward, `first_step()`, `zero_grad()`, scaled backward, `gather()`, `scaler.step`,
    `scaler.update()`. The gradients stay scaled until `gather` is done: `scaler.unscale_` works once per step. The
    constructor's scaler= is for methods that care about a gradient's length (CrAM).

    *DistributedDataParallel* needs to reduce a pass's gradients only where `needs_reduction` says so; in the others
    each replica perturbs its weights by the gradient of its own data, which is cheaper and undone everywhere alike:

        def closure():
            optimizer.zero_grad()
            with contextlib.nullcontext() if sam.needs_reduction else model.no_sync():
                loss = loss_fn(model(x), y)
                loss.backward()
            return loss

    A step without any of this would silently be the base's own, so `step()` refuses it. Whatever ends a pass, an
    exception or KeyboardInterrupt included, leaves the true weights in place; after one in a manual loop's second pass
    call `gather()` to bring them back. Between `first_step` and `second_step`, `state_dict` is that of the last step,
    and `eval` (or `with optimizer.true_weights()`) brings the true weights into place until `train`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        rho: float,
        model: nn.Module | None,
        same_dropout: bool,
        scaler: GradScaler | None,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        name = type(self).__name__
        check_base(name, base)
        check_model(name, model)
        self._norm_layers = with_statistics(model)  # the model itself would be pickled and copied with the optimizer
        self.same_dropout = same_dropout
        self.scaler = scaler
        self._second: SecondPass | None = None
        self._gathered = False  # whether .grad holds the final gradient, by the work of both passes
        self._overflow: list[RemovableHandle] | None = None
        self._watch: ClosureWatch | None = None
        self._progress = {COUNTER: 0, **(progress or {})}  # keys in the groups that say how far the training has come
        super().__init__(base, rho=rho, **self._progress)

    @property
    def needs_reduction(self) -> bool:
        """Whether the gradient of the pass that runs now, or next, enters the update, and must be that of all ranks."""
        return self._second is not None or not self._is_due()

    @outside_graphs
    def gather(self, closure: Closure | None = None) -> Any:
        """Run both passes; without a closure, end the second one. Leaves the final gradient at the true weights."""
        if closure is None:
            if self._second is not None:
                self._finish()
            elif not self._gathered:
                self._refuse_a_plain_step()
            return super().gather(None)
        if self._second is not None:
            raise RuntimeError("first_step() waits for its second_step(); call that, or gather() to only come back")
        self._check_groups()
        self._gathered = False
        states = random_states(self._devices()) if self.same_dropout else []
        loss = super().gather(closure)
        if self._watch is not None:
            self._watch.check(type(self).__name__)
            self._watch = None
        try:
            if self._begin():
                self.zero_grad()  # for closures that leave that to the loop, and would add to the first gradient
                with random_numbers_repeated(states):
                    super().gather(closure)
            self._finish()
        except BaseException:
            self._give_up()
            raise
        return loss

    @outside_graphs
    def first_step(self, zero_grad: bool = False) -> bool:
        """Move the weights by the first pass's gradient.

        Args:
            zero_grad: Clear the gradients afterwards, for the second pass to add its own (default: False).

        Returns:
            Whether the second pass differs from the first. If not, it may be left out, where the gradients were not
            cleared.

        Raises:
            RuntimeError: If the last first_step() still waits for its second_step().

        """
        if self._second is not None:
            raise RuntimeError("first_step() waits for its second_step(); call that, or gather() to only come back")
        self._check_groups()
        self._gathered = False
        try:
            due = self._begin()
            if zero_grad:
                self.zero_grad()
        except BaseException:
            self._give_up()
            raise
        return due

    def _check_second_step(self) -> None:
        if self._second is None and not self._gathered:
            raise RuntimeError("second_step() ends what first_step() begins; call that first")

    def _check_step_without_closure(self) -> None:
        if self._second is not None:
            self._check_unscaled("gather()")
        super()._check_step_without_closure()

    def _check_step_with_closure(self) -> None:
        self._check_unscaled("gather(closure)")
        super()._check_step_with_closure()
        self._watch = ClosureWatch(p for group in self.param_groups for p in group["params"])

    def _check_unscaled(self, instead: str) -> None:
        if self.scaler is not None and self.scaler.is_enabled():
            raise RuntimeError(f"the gradients are scaled: call {instead}, then scaler.step(optimizer)")

    @outside_graphs
    def update(self) -> None:
        """Let the base update the weights."""
        try:
            super().update()
            if self._gathered:
                steps = self._steps() + 1
                for group in self.param_groups:
                    group[COUNTER] = steps
        finally:
            self._gathered = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as torch.optim.Optimizer.zero_grad; what `gather` left is then no longer waiting."""
        super().zero_grad(set_to_none)
        self._gathered = False
        if self._watch is not None:
            self._watch.cleared = True

    def eval(self) -> None:
        """Bring the true weights into place."""
        if self._second is not None and self._second.away:
            self._second.swap()
        super().eval()

    def train(self) -> None:
        """Undo `eval`: between first_step() and second_step() the perturbed weights are back in place."""
        if self._second is not None and not self._second.away:
            self._second.swap()
        super().train()

    @contextmanager
    def true_weights(self) -> Iterator[None]:
        """Have the true weights in place for a block, and then what was there before."""
        second = self._second
        away = second is not None and second.away
        if second is not None and away:
            second.swap()
        try:
            with super().true_weights():
                yield
        finally:
            if second is not None and away and second is self._second and not second.away:
                second.swap()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict; a bare base's starts with step 0.

        A second pass that `first_step` began is given up: the true weights come back, but for those that were written
        since then, a checkpoint's.
        """
        super().load_state_dict(state_dict)
        if self._second is not None:
            self._second.keep_written()
            self._end(self._second)
        self._gathered = False

    def _take_progress(self, saved_groups: Sequence[Mapping[str, Any]]) -> None:
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update((key, value) for key, value in self._progress.items() if key not in saved)

    def _is_due(self) -> bool:
        """Whether this step has a second pass."""
        return True

    def _norm(self, params: Sequence[Tensor]) -> float:
        """Return the norm that scales the perturbation; not finite where a gradient is not."""
        return global_norm(norms(gradients(params)), params)

    @abstractmethod
    def _perturb(self, params: Sequence[Sequence[Tensor]], norm: float, scale: float) -> None:
        """Move the weights.

        Args:
            params: The parameters with a gradient, group by group.
            norm: What `_norm` returned, finite, of the gradients without their scale.
            scale: Factor by which the gradients in .grad are scaled.
        """

    def _combine(self) -> None:
        """Make the final gradient of the second pass's; the perturbed weights are still in place."""

    @torch.no_grad()
    def _begin(self) -> bool:
        """Move the weights, if this step has a second pass."""
        if not self._is_due():
            self._second = SecondPass([], self._norm_layers)
            return False
        params = [with_gradient(group) for group in self.param_groups]
        everywhere = [p for group in params for p in group]
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        norm = self._norm(everywhere) / scale
        self._second = SecondPass(everywhere, self._norm_layers)
        if math.isfinite(norm):
            self._perturb(params, norm, scale)
            self._second.note()
        else:
            # The step has to be skipped, by whoever checks the final gradient: so that is not finite either. DDP
            # reduces what leaves autograd, and a gradient that is NaN by then lets all ranks skip it together.
            self._overflow = [_make_gradient_nan(p) for p in everywhere if p.requires_grad]
        return True

    @torch.no_grad()
    def _finish(self) -> None:
        """End the second pass: the true weights in place, the final gradient in .grad."""
        second = self._second
        assert second is not None
        if not second.away:
            second.swap()
        lay_out_gradients(second.params)
        if self._overflow is None:
            self._combine()
        else:
            for grad in gradients(second.params):  # those that no hook saw: sharded ones, and the first pass's own
                local(grad).mul_(math.nan)
        self._end(second)
        self._gathered = True

    @torch.no_grad()
    def _give_up(self) -> None:
        """Put everything back after an exception."""
        if self._second is not None:
            self._end(self._second)

    def _end(self, second: SecondPass) -> None:
        second.restore()
        for handle in self._overflow or ():
            handle.remove()
        self._overflow = None
        self._second = None

    def _refuse_a_plain_step(self) -> None:
        """Raise unless all gradients are zero, as when a checkpoint loader has the base make its state."""
        params = [p for group in self.param_groups for p in with_gradient(group)]
        if global_norm(norms(gradients(params)), params) != 0.0:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.step() without a closure would be a step of {type(self.base).__name__} alone: "
                f"call step(closure), or first_step() and second_step() after a backward each; in Lightning, add "
                f"wcr_optim.integrations.lightning.SharpnessCallback() to the trainer; in a loop that takes no closure "
                f"(transformers' Trainer), use SSAM"
            )

    def _steps(self) -> int:
        """Return how many steps were taken."""
        return max(int(group[COUNTER]) for group in self._filled_groups())

    def _devices(self) -> set[torch.device]:
        return {local(p).device for group in self.param_groups for p in group["params"]}

    def _check_groups(self) -> None:
        for index, group in enumerate(self._filled_groups()):
            self._check_group(group, index)

    def _check_group(self, group: Mapping[str, Any], index: int) -> None:
        super()._check_group(group, index)
        check_rho(group, index)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state_dict, that of the last whole step."""
        self._fill_options()  # which makes a rho that a schedule has set since a plain number
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        # Of hooks, a copy keeps that there were some: the overflow that they tell of.
        return super().__getstate__() | {"_overflow": None if self._overflow is None else [], "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._second is not None:
            self._second.note()


def _make_gradient_nan(p: Tensor) -> RemovableHandle:
    handle: RemovableHandle = p.register_hook(lambda grad: grad * math.nan)  # type: ignore[no-untyped-call]
    return handle
