"""What is compared: bases, and what of weight concentration goes around them, each in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wcr_optim import SAM, SSAM, WCR, CrAM, SparseSAM, param_groups

Groups = list[dict[str, Any]]


def sgd(groups: Groups, model: nn.Module) -> Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def adamw(groups: Groups, model: nn.Module) -> Optimizer:
    """AdamW."""
    return torch.optim.AdamW(groups, lr=2e-3)


BASES: dict[str, Callable[[Groups, nn.Module], Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "sam": lambda groups, model: SAM(sgd(groups, model), rho=0.05, model=model),
    "asam": lambda groups, model: SAM(sgd(groups, model), rho=0.5, adaptive=True, eta=0.01, model=model),
    "ssam": lambda groups, model: SSAM(sgd(groups, model), rho=0.05),
    "sparse_sam": lambda groups, model: SparseSAM(sgd(groups, model), rho=0.05, model=model),
    "cram": lambda groups, model: CrAM(sgd(groups, model), rho=0.05, model=model),
}
LABELS = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "sam": "SAM",
    "asam": "ASAM",
    "ssam": "SSAM",
    "sparse_sam": "SparseSAM",
    "cram": "CrAM+",
}
FORMS = {"wcr": ("inverse_variance", "WCR"), "scale_free": ("scale_free", "scale-free WCR")}


@dataclass(frozen=True)
class Method:
    """A base optimizer with or without weight concentration.

    Attributes:
        base: Key of BASES.
        form: Key of FORMS, or None for the bare base.
        strength: weight_concentration; 0 for the bare base.
        weight_decay: The base's own, on the weights that are pruned.
    """

    base: str
    form: str | None = None
    strength: float = 0.0
    weight_decay: float = 5e-4

    @property
    def name(self) -> str:
        """Name in tables of results, such as sgd+wcr."""
        return self.base if self.form is None else f"{self.base}+{self.form}"

    @property
    def label(self) -> str:
        """Name in pictures, such as SGD + WCR."""
        return LABELS[self.base] if self.form is None else f"{LABELS[self.base]} + {FORMS[self.form][1]}"

    def with_strength(self, strength: float) -> Method:
        """Return the same method at another strength."""
        return replace(self, strength=strength)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Build the optimizer of a model's parameters."""
        groups = param_groups(model, weight_decay=self.weight_decay, weight_concentration=self.strength)
        base = BASES[self.base](groups, model)
        return base if self.form is None else WCR(base, form=FORMS[self.form][0])
