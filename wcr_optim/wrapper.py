"""An optimizer around another one, split into gathering gradients and updating weights so that wrappers compose."""

from __future__ import annotations

import functools
import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

Closure = Callable[[], Any]
P = ParamSpec("P")
T = TypeVar("T")

LR_FACTOR = "base_lr_factor"
"""Key of a group whose weights the base is to update with lr * base_lr_factor; all others see lr alone."""


DECAYS_BY_LR = ("AdamW", "Muon", "Adafactor", "Lion")
"""In the names of optimizers whose weight decay is a step of lr * weight_decay of its own, whatever the gradient."""


def already_gathered() -> None:
    """Closure with which a wrapper steps the wrapper below it: the gradients are in place, only update.

    Going through the inner wrapper's `step` rather than its `update` fires its hooks and tells its LR schedulers that
    it stepped.
    """


def outside_graphs(method: Callable[P, T]) -> Callable[P, T]:
    """Have a method, and what it calls, run outside of the graphs of torch.compile: one ends before it.

    For methods that store flags or numbers on the optimizer for a later phase of the step: such a store, made while the
    step is traced, can be lost where the graph breaks. What the user compiled, and a closure calls, stays compiled.
    """

    @functools.wraps(method)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        return OptimizerWrapper._outside_graphs(functools.partial(method, *args, **kwargs))  # type: ignore[no-any-return]

    return outside


class OptimizerWrapper(Optimizer):
    """Base class of optimizers that wrap an optimizer instance.

    A step has two phases that subclasses extend:

    - `gather(closure)` runs what must run at the current weights and leaves the gradient to use in `.grad`, the
      weights where they were.
    - `update()` changes the weights.

    Every phase of the outer wrapper runs the same phase of the inner one, so wrappers compose in any order, and each
    sees gradients taken at the weights that it changes. A base that must run the closure itself (LBFGS) takes its
    whole step while gathering; what a wrapper adds in `update` then comes after it.

    `param_groups`, `state` and `defaults` are the base's own; options of the wrapper live in the groups under their
    own keys, so they can be set per group, scheduled, and are saved with the base's. A group's
    "base_lr_factor" multiplies its lr in the base's update and nowhere else (`SparsityTarget` sets it); one that is a
    tensor on an accelerator, or any tensor inside a graph of torch.compile, multiplies AdamW's decay, too.

    Args:
        base: The optimizer to wrap.
        **options: The wrapper's options and their defaults, filled into groups that do not set them.

    Raises:
        TypeError: If base is no optimizer instance.
        ValueError: If a group is empty, an option has a bad value, or another wrapper around this base uses it.
    """

    base: Optimizer
    #: Keys without a default that a group may have and that a checkpoint which lacks them must not take away.
    group_keys: ClassVar[tuple[str, ...]] = (LR_FACTOR,)
    _outside_graphs: ClassVar[Callable[[Callable[[], Any]], Any]]

    # Optimizer.__init__ is not called: it would make groups and state of its own beside the base's.
    def __init__(self, base: Optimizer, **options: Any) -> None:
        name = type(self).__name__
        if isinstance(base, type):
            raise TypeError(
                f"{name} wraps an optimizer instance, got the class {base.__name__}; "
                f"write {name}({base.__name__}(params, lr=...))"
            )
        if not isinstance(base, Optimizer):
            raise TypeError(
                f"{name} wraps an instance of torch.optim.Optimizer, got {type(base).__name__}; "
                f"write {name}(torch.optim.SGD(params, lr=...))"
            )
        self.base = base
        self.option_names = tuple(options)
        for option in options:
            if option in base.defaults:
                raise ValueError(
                    f"{option!r} is already an option of this {type(base).__name__}, maybe through another wrapper "
                    f"around it; wrap it once, and change the option in its param_groups"
                )
        options = {option: _plain(value) for option, value in options.items()}
        for index, group in enumerate(base.param_groups):
            self._check_group({key: _plain(value) for key, value in {**options, **group}.items()}, index)
        # As defaults of the base they reach groups that are added to the base behind our back. A tensor is the groups'
        # to write: the default stays what was given.
        base.defaults.update((option, _copy(value)) for option, value in options.items())
        self._fill_options([options] * len(base.param_groups))
        self._base_runs_closure = not isinstance(base, OptimizerWrapper) and runs_closure(base)
        self._create_hooks()

    def _create_hooks(self) -> None:
        # Made here, since torch.compile cannot trace the making, and not with the module, since it imports what only
        # optimizers need.
        OptimizerWrapper._outside_graphs = staticmethod(torch.compiler.disable(_call))  # type: ignore[no-untyped-call]
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()

    # load_state_dict and schedulers rebind these on the base, so they are looked up each time.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults, the wrapper's options among them."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, runs forward and backward and returns the loss. Without one, the gradients
                in `.grad` are used (default: None).

        Returns:
            The closure's loss, at the weights before the step; None without a closure.

        """
        if closure is already_gathered:
            self.update()
            return None
        self._check_options()  # of all levels, before any of them changes a weight
        if closure is None:
            self._check_step_without_closure()
        else:
            self._check_step_with_closure()
        loss = self.gather(closure)
        self.update()
        return loss

    def _check_step_without_closure(self) -> None:
        if isinstance(self.base, OptimizerWrapper):
            self.base._check_step_without_closure()

    def _check_step_with_closure(self) -> None:
        if isinstance(self.base, OptimizerWrapper):
            self.base._check_step_with_closure()

    def gather(self, closure: Closure | None = None) -> Any:
        """Leave the gradient to use in `.grad` and the weights where they were; return the loss.

        What step() begins with, for loops that do something to that gradient before `step()`, then without a closure:
        unscale it, clip it, or skip the step.
        """
        if isinstance(self.base, OptimizerWrapper):
            return self.base.gather(closure)
        if self._base_runs_closure:
            if closure is None:
                raise ValueError(f"{type(self.base).__name__} needs a closure: call step(closure)")
            with self._lr_of_base():
                return self.base.step(closure)
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def update(self) -> None:
        """Change the weights, given the gradients."""
        if isinstance(self.base, OptimizerWrapper):
            self.base.step(already_gathered)
        elif not self._base_runs_closure:
            with self._lr_of_base():
                self.base.step()

    @contextmanager
    def _lr_of_base(self) -> Iterator[None]:
        """Have lr * base_lr_factor for lr in the groups that have a factor, for a block.

        AdamW decays as without it, but where a factor is a tensor that is not at hand, on an accelerator or in a graph.
        """
        given: dict[tuple[int, str], tuple[Any, Any]] = {}  # what was there, and what took its place
        try:
            for index, group in enumerate(self.param_groups):
                factor = group.get(LR_FACTOR, 1.0)
                if _is_one(factor):
                    continue
                changes = {"lr": group["lr"] * factor}
                if _is_at_hand(factor) and factor > 0.0 and self._decays_by_lr(group):
                    changes["weight_decay"] = group["weight_decay"] / float(factor)
                for key, value in changes.items():
                    given[index, key] = group[key], value
                    group[key] = value
            yield
        finally:
            for (index, key), (before, value) in given.items():
                group = self.param_groups[index]  # looked up again: a base may have put another in its place
                if group[key] is value:
                    group[key] = before
                elif key == "lr":  # the base, or a scheduler in a hook of it, multiplied it meanwhile
                    group[key] = group[key] / group[LR_FACTOR]

    def _decays_by_lr(self, group: Mapping[str, Any]) -> bool:
        """Return whether the base's weight decay is a step of lr * weight_decay of its own, as AdamW's."""
        known = any(name in kind.__name__ for kind in type(self.base).__mro__ for name in DECAYS_BY_LR)
        return bool(group.get("decoupled_weight_decay", known))

    def first_step(self, zero_grad: bool = False) -> bool:
        """Move to the weights of the second pass, where an optimizer below takes two (SAM, SparseSAM, CrAM).

        Args:
            zero_grad: Clear the gradients afterwards, for the second pass to add its own (default: False).

        Returns:
            Whether there is a second pass to run, at other weights than the first.

        Raises:
            RuntimeError: If no optimizer below takes two passes, or they are under way already.

        """
        return self._wrapper_below().first_step(zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """Take the step that `first_step` began, given the second pass's gradients.

        Args:
            zero_grad: Clear the gradients afterwards (default: False).

        Raises:
            RuntimeError: If no first_step() came before.

        """
        self._check_second_step()
        self.step()
        if zero_grad:
            self.zero_grad()

    def _check_second_step(self) -> None:
        self._wrapper_below()._check_second_step()

    def _wrapper_below(self) -> OptimizerWrapper:
        if not isinstance(self.base, OptimizerWrapper):
            raise RuntimeError(f"{type(self.base).__name__} takes one pass over the data a step: call step()")
        return self.base

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as torch.optim.Optimizer.zero_grad."""
        self.base.zero_grad(set_to_none=set_to_none)

    def train(self) -> None:
        """Tell every optimizer below that training goes on; see `eval`."""
        if hasattr(self.base, "train"):
            self.base.train()

    def eval(self) -> None:
        """Bring the true weights into place for evaluation, where an optimizer below trains at others (SSAM)."""
        if hasattr(self.base, "eval"):
            self.base.eval()

    @contextmanager
    def true_weights(self) -> Iterator[None]:
        """Have the true weights in place for a block, as between `eval` and `train`, and then what was there before."""
        with self.base.true_weights() if isinstance(self.base, OptimizerWrapper) else nullcontext():
            yield

    def concentration(self) -> Tensor:
        """Measure how concentrated each layer under the penalty is, as `metrics.optimizer_concentration` says.

        Nothing waits for a device until the result is read.

        Returns:
            The share of each layer's energy that is variance of its magnitudes, shape (layers,).

        Raises:
            ValueError: If there is no penalty in the chain.
        """
        below = outermost(self.base)
        if below is None:
            raise no_penalty(self)
        with self.true_weights():  # SSAM's, in a loop without closures, are others between steps
            return below.concentration()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state_dict, the options in its groups included."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._fill_options()  # a numpy scalar put into a group since the last step would not load again
        state_dict = self.base.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this wrapper or of a bare base.

        Options that the checkpoint does not know, a bare base's, keep their present values, group by group.

        Raises:
            ValueError: If an option's saved value is bad or the groups do not match; nothing is changed then.

        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        known = self.option_names + self.group_keys
        present = [{key: group[key] for key in known if key in group} for group in self._filled_groups()]
        saved_groups = state_dict["param_groups"]
        for index, (saved, kept, group) in enumerate(zip(saved_groups, present, self.param_groups, strict=False)):
            self._check_group(kept | saved | {"params": group["params"]}, index)
        self.base.load_state_dict(state_dict)
        self._take_progress(saved_groups)
        self._fill_options(present)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take_progress(self, saved_groups: Sequence[Mapping[str, Any]]) -> None:
        """Set what in the groups says how far the training has come, where these groups do not say it."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim.Optimizer.add_param_group; the wrapper's options can stand in it.

        Raises:
            ValueError: If the group is empty or an option's value is bad.

        """
        if isinstance(param_group, dict) and isinstance(param_group.get("params"), Iterator):
            param_group["params"] = list(param_group["params"])  # to be read twice
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), (set, type(None))):
            group = {key: _plain(value) for key, value in {**self.defaults, **param_group}.items()}
            self._check_group(group, len(self.param_groups))
        self.base.add_param_group(param_group)  # torch has its own words for what is no group at all
        self._fill_options()

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and an LR scheduler's patch of `step` belong to this process; torch's optimizers drop them too.
        return {
            key: value for key, value in self.__dict__.items() if key != "step" and not key.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._create_hooks()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._describe()}) around {self.base!r}"

    def _describe(self) -> str:
        return ""

    def _check_options(self) -> None:
        for index, group in enumerate(self._filled_groups()):
            self._check_group(group, index)
        if isinstance(self.base, OptimizerWrapper):
            self.base._check_options()

    def _check_group(self, group: Mapping[str, Any], index: int) -> None:
        """Raise if a group is empty or one of the wrapper's options in it has a bad value."""
        params = group["params"]
        if not isinstance(params, Tensor) and not len(params) and not _is_one_of_several():
            raise ValueError(f"param_groups[{index}] has no parameters; leave the group out")
        factor = group.get(LR_FACTOR, 1.0)
        if isinstance(factor, Tensor):
            if not factor.is_floating_point():
                raise TypeError(f"{LR_FACTOR} must be a floating-point number, got a tensor of {factor.dtype}")
            return  # reading it would wait for its device
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"{LR_FACTOR} must be a number, got {factor!r} in param_groups[{index}]")
        if not 0.0 <= factor < math.inf:
            raise ValueError(f"{LR_FACTOR} must be finite and not negative, got {factor!r} in param_groups[{index}]")

    def _filled_groups(self) -> list[dict[str, Any]]:
        """Return the groups after filling in what a load or an addition straight to the base left out."""
        self._fill_options()
        return self.param_groups

    def _fill_options(self, present: Sequence[Mapping[str, Any]] = ()) -> None:
        """Set what groups lack: to the values given for each group, else to the defaults."""
        defaults = {option: self.defaults[option] for option in self.option_names}
        for index, group in enumerate(self.param_groups):
            values = present[index] if present else {}
            for key, value in {**defaults, **values}.items():
                group[key] = _plain(group[key] if key in group else value if key in values else _copy(value))
            for key in self.group_keys:
                if key in group:
                    group[key] = _plain(group[key])


def _call(function: Callable[[], T]) -> T:
    return function()


def _plain(value: Any) -> Any:
    """Turn a numpy scalar, as a search over np.logspace gives, into the number that a safe checkpoint can hold."""
    return value.item() if isinstance(value, np.generic) else value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_one(factor: float | Tensor) -> bool:
    """Return whether a factor changes nothing; of a tensor that is not known without waiting for its device."""
    return not isinstance(factor, Tensor) and factor == 1.0


def _is_at_hand(factor: float | Tensor) -> bool:
    """Return whether a factor can be read without waiting for a device or breaking a graph."""
    return not isinstance(factor, Tensor) or (factor.device.type == "cpu" and not torch.compiler.is_compiling())


def _is_one_of_several() -> bool:
    """Whether this process may have no part of a group, as under ZeroRedundancyOptimizer, that others have."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def runs_closure(optimizer: Optimizer) -> bool:
    """Return whether an optimizer, or the innermost of a chain of ours, evaluates its closure itself, as LBFGS.

    A step that cannot go without a closure evaluates it as often as it likes, at weights of its choosing.
    """
    closure = inspect.signature(type(innermost(optimizer)).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def innermost(optimizer: Any) -> Any:
    """Return what a chain of our wrappers is around; anything else as it is."""
    while isinstance(optimizer, OptimizerWrapper):
        optimizer = optimizer.base
    return optimizer


class _Noted(OrderedDict[Any, Any]):
    """Hooks of an optimizer with those of `stepped_by` among them, once for each of nested wrappers.

    Attributes:
        own: The optimizer's own, without.
    """

    own: OrderedDict[Any, Any]


@contextmanager
def stepped_by(optimizer: Optimizer) -> Iterator[list[Tensor]]:
    """Collect the parameters without state that the innermost optimizer of a chain steps in a block.

    Those are they that have a gradient when its step begins: hooks before it may have taken some, and hooks after it
    may clear all.
    """
    params = [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and not optimizer.state.get(p)
    ]
    stepped: list[Tensor] = []
    if not params:  # as after the first step: a fused base does not fuse where there are hooks
        yield stepped
        return
    inner = innermost(optimizer)
    hooks = inner._optimizer_step_pre_hooks
    own = hooks.own if isinstance(hooks, _Noted) else hooks
    # In a copy, since a hook may remove itself, which torch's iteration over them bears in the last of them alone.
    noted = inner._optimizer_step_pre_hooks = _Noted(hooks)
    noted.own = own

    def note(*_: Any) -> None:
        stepped.extend(p for p in params if p.grad is not None)
        inner._optimizer_step_pre_hooks = own  # at once: what the step or a hook after it registers shall stay

    noted[object()] = note
    try:
        yield stepped
    finally:
        if inner._optimizer_step_pre_hooks is noted:  # the step has not begun
            inner._optimizer_step_pre_hooks = hooks


def check_keeps_state(what: str, base: Any, instead: str) -> None:
    """Raise TypeError if the innermost optimizer keeps no state here that a checkpoint would hold.

    Args:
        what: What is refused, beginning the message.
        base: The optimizer, or a chain of ours around it.
        instead: A second way out, ending it.
    """
    inner = innermost(base)
    if hasattr(inner, "consolidate_state_dict"):
        raise TypeError(
            f"{what} keeps a tensor per parameter in its base's state, and {type(inner).__name__} saves what its own "
            f"optimizer keeps: shard with torch.distributed.fsdp.fully_shard instead, or {instead}"
        )


def outermost(optimizer: Optimizer) -> OptimizerWrapper | None:
    """Return the outermost wrapper of ours, None if there is none; what Accelerate has prepared is looked through.

    Raises:
        TypeError: If it is no optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected an optimizer instance, got {optimizer!r}")
    below: Any = optimizer
    while not (below is None or isinstance(below, OptimizerWrapper)):
        below = getattr(below, "optimizer", None)
    return below


def no_penalty(optimizer: Optimizer) -> ValueError:
    """Make the error for an optimizer that has no penalty in its chain."""
    name = type(optimizer).__name__
    return ValueError(
        f'{name} has no decoupled penalty that could be driven or measured; wrap it: WCR({name}(...), form="per_unit")'
    )
