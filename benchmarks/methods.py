"""What is compared, in a few lines each: bases, what goes around them, penalties, and ways to prune.

A method's name says what it is made of, from the inside out: ``sgd``, ``adamw+hoyer``, ``sgd+sam+wcr``, ``sgd+random``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.gradual import GradualPruning
from benchmarks.tasks import Task
from benchmarks.variants import ExplicitStep, InLoss, Window
from wcr_optim import (
    SAM,
    SSAM,
    WCR,
    CrAM,
    Decoupled,
    HoyerDecay,
    L1Decay,
    L2Decay,
    SparseSAM,
    SparsityTarget,
    param_groups,
)
from wcr_optim.penalties import InverseVariance, ScaleFree

Groups = list[dict[str, Any]]

BASES: dict[str, Callable[[Groups, float], Optimizer]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
}
SHARPNESS: dict[str, Callable[[Optimizer, float, nn.Module], Optimizer]] = {
    "sam": lambda base, rho, model: SAM(base, rho=rho, model=model),
    "asam": lambda base, rho, model: SAM(base, rho=rho, adaptive=True, eta=0.01, model=model),
    "ssam": lambda base, rho, model: SSAM(base, rho=rho),
    "sparse_sam": lambda base, rho, model: SparseSAM(base, rho=rho, model=model),
    "cram": lambda base, rho, model: CrAM(base, rho=rho, model=model),
}
PENALTIES: dict[str, Callable[[Optimizer, float], Optimizer]] = {
    "l1": L1Decay,
    "l2": L2Decay,
    "hoyer": HoyerDecay,
    "wcr": WCR,
    "scale_free": lambda base, strength: WCR(base, strength, form="scale_free"),
    "relative": lambda base, strength: WCR(base, strength, form="relative"),
    "per_unit": lambda base, strength: WCR(base, strength, form="per_unit"),
    "wcr_unguarded": lambda base, strength: Decoupled(base, InverseVariance(max_growth=math.inf), strength),
    "scale_free_unguarded": lambda base, strength: Decoupled(base, ScaleFree(max_growth=math.inf), strength),
    "wcr_in_loss": lambda base, strength: InLoss(base, InverseVariance(), strength),
    "wcr_explicit": lambda base, strength: ExplicitStep(base, InverseVariance(), strength),
    "scale_free_in_loss": lambda base, strength: InLoss(base, ScaleFree(), strength),
    "scale_free_explicit": lambda base, strength: ExplicitStep(base, ScaleFree(), strength),
    "target": lambda base, strength: WCR(base, form="per_unit"),  # which finds its strength
    "target_latent": lambda base, strength: WCR(base, form="per_unit", latent_weights=True),
}
DRIVEN = ("target", "target_latent")
"""Penalties whose strength SparsityTarget finds."""
OURS = ("wcr", "scale_free", "relative", "per_unit", *DRIVEN)
"""Forms of WCR, as they are compared with all other penalties."""
PRUNING = ("random", "gradual")
"""Other ways to prune than once by magnitude: at random, or step by step during training (not one-shot)."""

LAYERS = ("weights", "inner", "all")
"""What a penalty reaches: the weights that are pruned; those but the first and the last; biases and norms too."""

OPTION = {"l1": "l1_decay", "l2": "l2_decay", "hoyer": "hoyer_decay"}
RHO = {"sam": 0.05, "asam": 0.5, "ssam": 0.05, "sparse_sam": 0.05, "cram": 0.05}
"""The authors' defaults."""

LOWEST: dict[str, dict[str, float]] = {
    "sgd": {
        "l1": 1e-4,
        "l2": 1e-4,
        "hoyer": 1e-4,
        "wcr": 3e-4,
        "scale_free": 1e-4,
        "relative": 1e-1,
        "per_unit": 1e-5,
        "prox": 3e-5,
    },
    "adamw": {
        "l1": 1e-3,
        "l2": 1e-2,
        "hoyer": 1e-3,
        "wcr": 1e-2,
        "scale_free": 1e-3,
        "relative": 3e-1,
        "per_unit": 1e-4,
        "prox": 3e-3,
    },
}
"""Where the grid of each penalty's strength begins: so that the best one lies inside on the digits, at REFERENCE_LR."""
REFERENCE_LR = {"sgd": 0.1, "adamw": 1e-3}

LABELS = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "sam": "SAM",
    "asam": "ASAM",
    "ssam": "SSAM",
    "sparse_sam": "SparseSAM",
    "cram": "CrAM+",
    "hoyer": "Hoyer-square",
    "wcr": "WCR",
    "scale_free": "scale-free WCR",
    "relative": "relative WCR",
    "per_unit": "per-unit WCR",
    "target": "SparsityTarget",
    "target_latent": "SparsityTarget, latent weights",
    "prox": "ProxLasso (torchao)",
    "random": "pruned at random",
    "gradual": "gradual pruning (not one-shot)",
}


BRIEF = (None, "l1", "prox", "hoyer", "wcr", "scale_free", "target", "target_latent")
"""Penalties of the tables of all tasks."""


def penalty_label(penalty: str | None) -> str:
    """Name a penalty, or that there is none, in tables and pictures."""
    return "no penalty" if penalty is None else LABELS.get(penalty, penalty)


class Follower(Protocol):
    """What follows the optimizer through training, called after each of its steps."""

    def step(self, loss: Any = None) -> None:
        """Take note of one step of the optimizer and its loss."""


@dataclass(frozen=True)
class Method:
    """What a method's name says.

    Attributes:
        base: Key of BASES.
        sharpness: Key of SHARPNESS, or None.
        penalty: Key of PENALTIES, "prox", or None.
        pruning: One of PRUNING, or None for one-shot pruning by magnitude.
    """

    base: str
    sharpness: str | None = None
    penalty: str | None = None
    pruning: str | None = None

    @staticmethod
    def of(name: str) -> Method:
        """Read a name.

        Raises:
            ValueError: If a part of it is unknown, comes twice, in the wrong place or beside one that it does not fit.

        """
        base, *rest = name.split("+")
        rooms = {"sharpness": SHARPNESS, "penalty": [*PENALTIES, "prox"], "pruning": PRUNING}
        parts = {room: part for part in rest for room, known in rooms.items() if part in known}
        if base not in BASES or len(parts) != len(rest) or Method(base, **parts).name != name:
            known = " ".join([*BASES, *SHARPNESS, *PENALTIES, "prox", *PRUNING])
            raise ValueError(f"there is no method {name!r}; a name is a base and parts in this order: {known}")
        if "pruning" in parts and len(parts) > 1:
            raise ValueError(
                f"method {name!r} is not measured: {parts['pruning']} is a yardstick around a bare base, {base}+"
                f"{parts['pruning']}"
            )
        if parts.get("penalty") == "prox" and "sharpness" in parts:
            raise ValueError(
                f"method {name!r} is not measured: torchao's optimizer takes no second pass; use {base}+prox"
            )
        return Method(base, **parts)

    @property
    def name(self) -> str:
        """Name in tables of results, such as sgd+wcr."""
        return "+".join(part for part in (self.base, self.sharpness, self.penalty, self.pruning) if part)

    @property
    def label(self) -> str:
        """Name in pictures, such as SGD + WCR."""
        return " + ".join(LABELS.get(part, part) for part in self.name.split("+"))

    @property
    def searched(self) -> str | None:
        """What is searched on the validation split: "strength", "rho", or nothing."""
        if self.penalty is not None and not self.is_driven:
            return "strength"
        return "rho" if self.sharpness is not None and self.penalty is None else None

    @property
    def is_driven(self) -> bool:
        """Whether SparsityTarget drives the penalty."""
        return self.penalty in DRIVEN

    @property
    def has_goal(self) -> bool:
        """Whether the method is told the sparsity that is wanted, so that each one takes a run of its own."""
        return self.is_driven or self.pruning == "gradual"

    def optimizer(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float,
        strength: float = 0.0,
        rho: float = 0.0,
        *,
        exclude: Any = (),
        layers: str = "weights",
    ) -> Optimizer:
        """Build the optimizer of a model's parameters.

        Args:
            model: The model.
            lr: Learning rate.
            weight_decay: The base's, on the weights that are pruned.
            strength: Of the penalty (default: 0.0)
            rho: Of the sharpness-aware method; 0 stands for its authors' default (default: 0.0)
            exclude: What is not pruned, and gets neither decay nor penalty (default: ())
            layers: Which parameters the penalty reaches, one of LAYERS (default: "weights")
        """
        if self.is_driven:
            strength = 1.0  # the ratio between groups is all that SparsityTarget keeps of it
        groups = param_groups(model, weight_decay=weight_decay, weight_concentration=strength, exclude=exclude)
        if layers == "inner":
            groups = _inner(groups)
        for group in groups:
            del group["weight_concentration"]
            if self.penalty == "prox" and group is groups[0]:
                group.update(prox_type="ProxLasso", group_type="ElemGrouper")
            elif self.penalty is not None and self.penalty != "prox":
                reached = group is groups[0] or layers == "all"
                group[OPTION.get(self.penalty, "weight_concentration")] = strength if reached else 0.0
                if layers == "all":
                    group["min_ndim"] = 1
        optimizer = BASES[self.base](groups, lr)
        if self.penalty == "prox":
            return _prox(optimizer, strength)
        if self.sharpness is not None:
            optimizer = SHARPNESS[self.sharpness](optimizer, rho or RHO[self.sharpness], model)
        return optimizer if self.penalty is None else PENALTIES[self.penalty](optimizer, strength)

    def follower(
        self, optimizer: Optimizer, model: nn.Module, task: Task, goal: float, steps: int, options: Mapping[str, Any]
    ) -> Follower | None:
        """Build what follows the optimizer through training, None for most methods."""
        if self.is_driven:
            return SparsityTarget(optimizer, goal, steps, **options)
        if self.pruning == "gradual":
            return GradualPruning(model, goal, steps, exclude=task.exclude)
        if options:
            option = OPTION.get(self.penalty or "", "weight_concentration")
            return Window(optimizer, option, steps, options.get("from", 0.0), options.get("until", 1.0))
        return None


def _inner(groups: Groups) -> Groups:
    """Put the first and the last of the weights into the group of what is not regularized; they still decay."""
    first, *rest = groups
    weights = first["params"]
    outer = first | {"params": [weights[0], weights[-1]]}
    return [first | {"params": weights[1:-1]}, outer, *rest]


def _prox(base: Optimizer, strength: float) -> Optimizer:
    try:
        from torchao.prototype.pat.optim import PruneOptimizer
    except ImportError as error:
        raise ImportError("the method prox needs torchao: pip install torchao") from error

    class ProxLasso(PruneOptimizer):  # type: ignore[misc]
        """torchao's, with closures that see the pruned weights.

        Its own step(closure) brings the latent weights back before it calls the closure; the method wants the gradient
        of the pruned ones, as loops without closures give it.
        """

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None if closure is None else closure()
            super().step()
            return loss

    optimizer: Optimizer = ProxLasso(base, reg_lambda=strength)
    return optimizer
