"""What every optimizer here asks of its base and of its groups, refused before anything is changed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from wcr_optim.layout import as_dtensor, local
from wcr_optim.wrapper import innermost, runs_closure


def check_base(name: str, base: Any) -> None:
    """Raise unless gradients can be taken away from the base's weights.

    Raises:
        TypeError: If the innermost optimizer runs its closure itself.
        ValueError: If it has an option of its own called rho.
    """
    inner = innermost(base)
    if not isinstance(inner, Optimizer):
        return  # OptimizerWrapper has the words for it
    kind = type(inner).__name__
    if runs_closure(inner):
        raise TypeError(
            f"{name} cannot go around {kind}, which evaluates its closure itself, at weights of its own choosing: "
            f"there is no moment at which to perturb them. Wrap an optimizer that steps on the gradients in .grad"
        )
    if "rho" in inspect.signature(type(inner).__init__).parameters:
        raise ValueError(
            f"{kind} has a 'rho' of its own, and {name}'s radius rho would overwrite it in the param_groups: "
            f"wrap another optimizer"
        )


def check_model(name: str, model: Any) -> None:
    """Raise TypeError unless model is None or a module."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"{name} takes the model as model=, a torch.nn.Module whose norm layers keep running statistics; "
            f"got {type(model).__name__}"
        )


def check_rho(group: Mapping[str, Any], index: int) -> None:
    """Raise unless a group's rho is a finite number, not negative."""
    rho = group["rho"]
    where = f"param_groups[{index}]"
    if isinstance(rho, bool) or not isinstance(rho, Real):
        raise TypeError(f"rho must be a number, got {rho!r} in {where}")
    if not 0.0 <= float(rho) < math.inf:
        raise ValueError(f"rho must be finite and not negative, got {rho!r} in {where}")


def refuse_complex(what: str, group: Mapping[str, Any], index: int) -> None:
    """Raise TypeError if a group has complex parameters, which `what` is not defined for."""
    params = group["params"]
    for entry in [params] if isinstance(params, Tensor) else params:
        p = entry[1] if isinstance(entry, tuple) else entry  # torch takes (name, parameter) pairs too
        if isinstance(p, Tensor) and p.is_complex():
            raise TypeError(
                f"{what} ranks real numbers, and param_groups[{index}] has a {p.dtype} parameter of shape "
                f"{tuple(p.shape)}: keep it in an optimizer of its own, or as torch.view_as_real"
            )


def with_gradient(group: Mapping[str, Any]) -> list[Tensor]:
    """Return a group's parameters that have a gradient, which then lies over ranks as its parameter does.

    Raises:
        TypeError: If a gradient is sparse.
    """
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        if p.grad.is_sparse:
            raise TypeError(
                f"perturbations are dense, and the gradient of a parameter of shape {tuple(p.shape)} is sparse: "
                f"build its layer with sparse=False"
            )
    lay_out_gradients(params)
    return params


def lay_out_gradients(params: Iterable[Tensor]) -> None:
    """Lay gradients out over ranks as their parameters, for arithmetic on each rank's parts of both.

    Sequence parallelism leaves those of norms as sums that are still to be taken over the ranks.
    """
    for p in params:
        weight, grad = as_dtensor(p), None if p.grad is None else as_dtensor(p.grad)
        if weight is not None and grad is not None and grad.placements != weight.placements:
            p.grad = grad.redistribute(weight.device_mesh, weight.placements)


class ClosureWatch:
    """Notices a closure that adds to gradients which were there before it.

    Those were taken at other weights, or of batches that a second pass would leave out: the step would be a wrong one,
    and nobody would see it. One small gradient is watched, the device is not waited for.

    Args:
        params: The parameters of all groups.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.cleared = False
        held = [(p, p.grad) for p in params if p.grad is not None and not p.grad.is_sparse and p.numel()]
        self._held = min(held, key=lambda pair: pair[0].numel(), default=None)
        self._nonzero = None if self._held is None else local(self._held[1]).count_nonzero()

    def check(self, name: str) -> None:
        """Raise RuntimeError if the closure, which has run, left these gradients uncleared."""
        if self.cleared or self._held is None or self._held[0].grad is not self._held[1] or not self._nonzero:
            return
        raise RuntimeError(
            f"the closure of {name}.step() did not clear the gradients that were there before it, or cleared them in "
            f"place by something else than the optimizer, which cannot be seen: have it call optimizer.zero_grad() and "
            f"run all batches of the step, forward and backward. In Lightning, where "
            f"batches are accumulated outside the closure, "
            f"add wcr_optim.integrations.lightning.SharpnessCallback() to the trainer"
        )


def ascent(group: Mapping[str, Any]) -> float:
    """Return a group's rho, negative where the base maximizes: a worse objective lies against the gradient there."""
    return -float(group["rho"]) if group.get("maximize") else float(group["rho"])


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters that have one."""
    return [p.grad for p in params if p.grad is not None]
