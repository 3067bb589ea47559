"""Drop-in replacements of torch's optimizers: the same arguments, and weight_concentration beside weight_decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from wcr_optim.decoupled import WCR
from wcr_optim.fused import FusedAdamW, FusedSGD


class _DropIn(WCR):
    """What stands in for torch's class takes groups without parameters, as that does.

    Training frameworks make such groups: transformers' Trainer one for the biases and norms that an adapter has not.
    """

    def _check_group(self, group: Mapping[str, Any], index: int) -> None:
        if isinstance(group["params"], Tensor) or len(group["params"]):
            super()._check_group(group, index)


class SGD(_DropIn):
    """torch.optim.SGD with decoupled weight concentration.

    All arguments of torch.optim.SGD with their defaults; with `fused=True` one kernel shrinks, updates and measures
    the weights, see `fused`. And

    Args:
        weight_concentration: Strength of WCR; 0 is torch.optim.SGD, bit for bit (default: 0.0).
        form: "inverse_variance", "scale_free", "per_unit" or "relative", see `WCR` (default: "inverse_variance").
        latent_weights: Whether weights that were taken to zero are held there, see `Decoupled`; the shrink then has a
            pass of its own (default: False).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        weight_concentration: float | Tensor = 0.0,
        form: str = "inverse_variance",
        latent_weights: bool = False,
    ) -> None:
        base = (FusedSGD if fused else torch.optim.SGD)(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(base, weight_concentration, form, latent_weights=latent_weights)


class AdamW(_DropIn):
    """torch.optim.AdamW with decoupled weight concentration.

    All arguments of torch.optim.AdamW with their defaults; with `fused=True` one kernel shrinks, updates and measures
    the weights, see `fused`. And

    Args:
        weight_concentration: Strength of WCR; 0 is torch.optim.AdamW, bit for bit (default: 0.0).
        form: "inverse_variance", "scale_free", "per_unit" or "relative", see `WCR` (default: "inverse_variance").
        latent_weights: Whether weights that were taken to zero are held there, see `Decoupled`; the shrink then has a
            pass of its own (default: False).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        weight_concentration: float | Tensor = 0.0,
        form: str = "inverse_variance",
        latent_weights: bool = False,
    ) -> None:
        base = (FusedAdamW if fused else torch.optim.AdamW)(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(base, weight_concentration, form, latent_weights=latent_weights)
