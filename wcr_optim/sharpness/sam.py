"""SAM, and ASAM with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from wcr_optim.checks import check_count, check_number
from wcr_optim.layout import local
from wcr_optim.sharpness.checks import ascent, gradients
from wcr_optim.sharpness.memory import add_, global_norm
from wcr_optim.sharpness.two_pass import TwoPass

EPS = 1e-12


class SAM(TwoPass):
    """Sharpness-Aware Minimization: the gradient at the weights that are worst nearby.

        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=model)
        loss = optimizer.step(closure)

    With g the gradient at the weights w and ||.|| over all parameters of all groups,

        e = a^2 g rho / (||a g|| + 1e-12),    a = 1, or |w| + eta with adaptive=True (ASAM),

    and the base steps from w with the gradient at w + e, two passes over the data in all. rho is per group and may be
    scheduled: each group's scales its own e, and 0 leaves the group where it is. Penalties and weight decay act at w.

    See `TwoPass` for manual loops, clipping, mixed precision and DistributedDataParallel.

    Args:
        base: The optimizer instance to wrap.
        rho: Radius of the neighbourhood, in units of a weight; also the key in the groups. The authors use 0.05 for
            CIFAR-10 and ImageNet, 0.1 for CIFAR-100, and 0.5 to 2 for ASAM (default: 0.05).
        adaptive: Measure the neighbourhood relative to each weight, as ASAM does. Parameters of fewer than two
            dimensions, biases and norms, are no weights in this respect: a = 1 (default: False).
        eta: Added to |w| in ASAM; its authors use 0.01 (default: 0.0).
        model: The model, so that the running statistics of its norm layers, and the power iteration of its spectral
            norms, come from the first pass alone. Only these layers are kept, as they are now: pickled or copied with
            the optimizer they bring no other (default: None).
        interval: Take the second pass in every interval-th step only, the first one among them; the steps between are
            the base's own (default: 1).
        same_dropout: Draw the same random numbers in both passes of step(closure), so that dropout has the same mask
            in both. The global generators go on from where the first pass left them (default: True).
        scaler: The GradScaler that scales the losses. The scale cancels here up to the 1e-12 (default: None).

    Raises:
        TypeError: If base is no optimizer instance or runs its closure itself (LBFGS), model is no module, a number
            is none, or a gradient is sparse.
        ValueError: If a rho is negative, NaN or infinite, eta negative, interval below 1, or the base has an option
            rho already.
        RuntimeError: If step() comes without a closure and without first_step().

    Source:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021; Kwon et al.,
        "ASAM", ICML 2021.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        model: nn.Module | None = None,
        *,
        interval: int = 1,
        same_dropout: bool = True,
        scaler: GradScaler | None = None,
    ) -> None:
        if not 0.0 <= check_number("eta", eta) < math.inf:
            raise ValueError(f"eta must be finite and not negative, got {eta!r}")
        self.adaptive = adaptive
        self.eta = eta
        self.interval = check_count("interval", interval)
        super().__init__(base, rho=rho, model=model, same_dropout=same_dropout, scaler=scaler)

    def _is_due(self) -> bool:
        return self._steps() % self.interval == 0

    def _norm(self, params: Sequence[Tensor]) -> float:
        if not self.adaptive:
            return super()._norm(params)
        return global_norm([torch.linalg.vector_norm(self._stretched(p)) for p in params], params)

    def _perturb(self, params: Sequence[Sequence[Tensor]], norm: float, scale: float) -> None:
        for group, members in zip(self.param_groups, params, strict=True):
            length = ascent(group) / ((norm + EPS) * scale)
            if length == 0.0 or not members:
                continue
            if self.adaptive:
                for p in members:
                    local(p).addcmul_(self._stretched(p), self._stretch(p), value=length)
            else:
                add_(members, gradients(members), length)

    def _stretch(self, p: Tensor) -> Tensor:
        """Return a = |w| + eta of a weight, 1 for a parameter that is no weight; in float32 at least."""
        size = local(p).abs()
        size = size.to(torch.promote_types(size.dtype, torch.float32))
        return size + self.eta if p.ndim >= 2 else size.new_ones(())

    def _stretched(self, p: Tensor) -> Tensor:
        """Return a g, in float32 at least."""
        (grad,) = gradients([p])
        g = local(grad)
        return g.to(torch.promote_types(g.dtype, torch.float32)) * self._stretch(p)

    def _describe(self) -> str:
        options = [f"adaptive=True, eta={self.eta}"] if self.adaptive else []
        options += [f"interval={self.interval}"] if self.interval > 1 else []
        return ", ".join(options)
