"""CrAM: training for weights whose compressed neighbours have a low loss."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from wcr_optim.checks import check_count, check_share, check_whole
from wcr_optim.layout import local
from wcr_optim.pruning.shards import common_mesh, find_sharded_cuts
from wcr_optim.pruning.threshold import keep_masks
from wcr_optim.sharpness.checks import ascent, gradients, refuse_complex
from wcr_optim.sharpness.memory import add_, copies
from wcr_optim.sharpness.two_pass import SecondPass, TwoPass


class CrAM(TwoPass):
    """Compression-Aware Minimizer: the gradient at perturbed and then pruned weights.

        optimizer = CrAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=model)
        loss = optimizer.step(closure)

    With g the gradient at the weights w and C one-shot magnitude pruning,

        w' = C(w + rho g),    h = the gradient at w',

    and the base steps from w with h, or with h + g in the authors' CrAM+, whose dense model is better. rho g is not
    normalised. C prunes all tensors of two or more dimensions that have a gradient, together, to exactly one of the
    given sparsities, drawn for each step (CrAM-Multi); of DTensors it keeps all weights that equal the smallest kept
    one, of which bfloat16 has many. With a pattern, it prunes each on its own to n of every m weights along its input
    dimension, the second one, where that is a multiple of m. Other parameters are perturbed and not pruned.

    Clipping before first_step() changes the method, since rho g is not normalised. So does a GradScaler's scale:
    give it as scaler=. Under DDP both passes' gradients are reduced, as `needs_reduction` says: all ranks must prune
    the same weights.

    See `TwoPass` for manual loops, clipping, mixed precision and DistributedDataParallel.

    Args:
        base: The optimizer instance to wrap.
        rho: Length of the perturbation per gradient; also the key in the groups. The authors use 0.05 for ImageNet,
            0.15 to 0.2 for a ResNet-20 on CIFAR-10 (default: 0.05).
        sparsities: Shares of the weights to prune, one of which is drawn in every step (default: (0.5, 0.7, 0.9)).
        plus: Step with h + g, not with h alone (default: True).
        sparse_grad: Take h only where w' is not zero (default: True).
        pattern: (n, m) to keep n of every m weights instead of a global share, for example (2, 4) (default: None).
        model: As in `SAM` (default: None).
        same_dropout: As in `SAM` (default: True).
        scaler: The GradScaler that scales the losses, if there is one (default: None).
        seed: Of the drawn sparsities, which are the same on all ranks and after a resume; the global generators are
            not touched (default: 0).

    Raises:
        TypeError: As `SAM`, or if a parameter is complex.
        ValueError: As `SAM`, if there are no sparsities or one lies outside [0, 1], n of pattern is above m, or,
            without a pattern, a weight to prune is NaN though its gradients are not; the weights are as before then.
        RuntimeError: As `SAM`.

    Source:
        Peste et al., "CrAM: A Compression-Aware Minimizer", ICLR 2023.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        sparsities: Sequence[float] = (0.5, 0.7, 0.9),
        plus: bool = True,
        sparse_grad: bool = True,
        pattern: tuple[int, int] | None = None,
        model: nn.Module | None = None,
        *,
        same_dropout: bool = True,
        scaler: GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(sparsities, Sequence) or isinstance(sparsities, str):
            raise TypeError(f"sparsities must be a list of numbers such as (0.5, 0.9), got {sparsities!r}")
        if not sparsities:
            raise ValueError("sparsities is empty; give at least one, for example (0.9,)")
        self.sparsities = tuple(check_share("sparsity", sparsity) for sparsity in sparsities)
        self.plus = plus
        self.sparse_grad = sparse_grad
        self.pattern = None if pattern is None else _check_pattern(pattern)
        self.seed = check_whole("seed", seed)
        self._pruned: list[Tensor] = []
        self._clean: list[tuple[Tensor, Tensor]] = []  # parameters and their g
        super().__init__(base, rho=rho, model=model, same_dropout=same_dropout, scaler=scaler)

    @property
    def needs_reduction(self) -> bool:
        """Whether the pass's gradient must be that of all ranks: g too where it enters the update or chooses masks."""
        return self.plus or self.sparse_grad or super().needs_reduction

    def _perturb(self, params: Sequence[Sequence[Tensor]], norm: float, scale: float) -> None:
        everywhere = [p for members in params for p in members]
        for group, members in zip(self.param_groups, params, strict=True):
            if members and group["rho"]:
                add_(members, gradients(members), ascent(group) / scale)
        self._pruned = self._compress([p for p in everywhere if p.ndim > 1])
        if self.plus:
            self._clean = list(zip(everywhere, copies(gradients(everywhere)), strict=True))

    def _compress(self, weights: list[Tensor]) -> list[Tensor]:
        """Prune weights in place; return those that were."""
        if self.pattern is not None:
            n, m = self.pattern
            weights = [w for w in weights if local(w).numel() and local(w).shape[1] % m == 0]
            for w in weights:
                local(w).masked_fill_(~_n_of_m(local(w), n, m), 0.0)
        elif weights:
            masks = _largest(self._named(weights), self._draw())
            for w, mask in zip(weights, masks, strict=True):
                local(w).masked_fill_(~mask, 0.0)
        return weights

    def _named(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name weights for error messages by their place in the groups."""
        places = {
            p: f"param_groups[{g}]['params'][{i}]"
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
        }
        return {f"{places[w]} of shape {tuple(w.shape)}": w.detach() for w in weights}

    def _draw(self) -> float:
        """Return this step's sparsity, a function of the seed and of the number of steps alone."""
        place = random.Random(self.seed * 1_000_003 + self._steps()).random()
        return self.sparsities[int(place * len(self.sparsities))]

    def _combine(self) -> None:
        if self.sparse_grad:
            for w in self._pruned:
                for h in gradients([w]):
                    local(h).mul_(local(w) != 0.0)  # which keeps NaN for a scaler to see, unlike masked_fill_
        while self._clean:
            p, g = self._clean.pop()
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=g.dtype)
            local(p.grad).add_(g)

    def _end(self, second: SecondPass) -> None:
        super()._end(second)
        self._pruned = []
        self._clean = []

    def _check_group(self, group: Mapping[str, Any], index: int) -> None:
        super()._check_group(group, index)
        refuse_complex("pruning", group, index)

    def _describe(self) -> str:
        chosen = f"sparsities={self.sparsities}" if self.pattern is None else f"pattern={self.pattern}"
        return f"{chosen}, plus={self.plus}, sparse_grad={self.sparse_grad}"


def _check_pattern(pattern: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(pattern, Sequence) or len(pattern) != 2:
        raise TypeError(f"pattern must be two numbers such as (2, 4), got {pattern!r}")
    n, m = pattern
    n, m = check_count("pattern's n", n), check_count("pattern's m", m)
    if n > m:
        raise ValueError(f"pattern keeps n of every m weights, so n must not be above m; got {pattern!r}")
    return n, m


def _largest(named: Mapping[str, Tensor], sparsity: float) -> list[Tensor]:
    """Mark the weights of largest magnitude, all tensors together; this rank's part of them."""
    mesh = common_mesh(named)
    if mesh is None:
        return list(keep_masks(named, sparsity).values())
    (cut,) = find_sharded_cuts(named, (sparsity,), mesh)
    # Equal magnitudes at the threshold are all kept: telling them apart by position would take one more exchange.
    return [local(w).abs() >= cut.threshold for w in named.values()]


def _n_of_m(weights: Tensor, n: int, m: int) -> Tensor:
    """Mark the n largest of every m weights along the second dimension, of equal ones the first."""
    groups = weights.detach().abs().movedim(1, -1)
    order = groups.reshape(*groups.shape[:-1], -1, m).sort(stable=True, dim=-1, descending=True).indices
    mask = torch.zeros(order.shape, dtype=torch.bool, device=weights.device)
    mask.scatter_(-1, order[..., :n], True)
    return mask.view(groups.shape).movedim(-1, 1)
