"""SAM with a perturbation that is zero in most entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from wcr_optim.checks import check_count, check_share, check_whole
from wcr_optim.layout import local
from wcr_optim.pruning.threshold import keep_masks, pruned_count
from wcr_optim.sharpness.checks import ascent, refuse_complex
from wcr_optim.sharpness.guards import RunningStatistics
from wcr_optim.sharpness.memory import add_
from wcr_optim.sharpness.two_pass import TwoPass
from wcr_optim.slots import Slot
from wcr_optim.wrapper import check_keeps_state, outside_graphs, stepped_by

EPS = 1e-7
MADE = "sparse_sam_made"


class SparseSAM(TwoPass):
    """SAM that perturbs only a share of the entries, those where it matters most.

        optimizer = SparseSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsity=0.8)
        loss = optimizer.step(closure)

    With g the gradient at the weights w and ||g|| its whole norm, over all parameters and not only where the mask is,

        e = mask * rho * g / (||g|| + 1e-7),

    and the base steps from w with the gradient at w + e. Of n entries, `round(sparsity * n)` are not perturbed.

    mask="fisher" keeps the entries with the largest sum of squared gradients, a diagonal Fisher information. The
    authors sum over single samples; so does `update_mask(losses)`, with losses of yours:

        optimizer.update_mask(loss_fn(model(x[None]), y[None]) for x, y in samples)

    Without that, the squared gradients of the num_samples steps up to a refresh stand for them. They are gradients of
    batch means: the squared mean of a batch's gradients rather than the mean of their squares, an estimate that costs
    nothing but a sum. The very first mask is that of the first step's gradient, unless `update_mask` came before.

    mask="dynamic" starts at random. A refresh at step t drops the share

        drop_rate (1 + cos(pi t / total_steps)) / 2

    of the perturbed entries, those with the smallest |g|, and takes as many others at random.

    Refreshes happen every update_freq steps, with that step's gradient and before its perturbation. Parameters without
    a gradient are not counted. Masks are saved in the state, and so are the roots of the sums for the next Fisher mask,
    one more copy of the parameters (two for the length of a step that adds to them), which update_freq=None does
    without. A step that fails or is skipped leaves both as they were. Under DDP without reduced first gradients, and
    with sharded parameters, each rank has masks of its own, of the entries that it holds.

    See `TwoPass` for manual loops, clipping, mixed precision and DistributedDataParallel.

    Args:
        base: The optimizer instance to wrap.
        rho: Radius, in units of a weight; also the key in the groups (default: 0.05).
        sparsity: Share of the entries that are not perturbed (default: 0.5).
        mask: "fisher" or "dynamic" (default: "fisher").
        update_freq: Steps between refreshes, the authors' being an epoch; None leaves them to `update_mask`
            (default: 100).
        num_samples: Steps whose gradients make up a Fisher mask, up to update_freq of them (default: 16).
        drop_rate: Share of entries that a dynamic mask exchanges at first (default: 0.5).
        total_steps: Length of the training, over which the exchanged share falls to zero; None keeps it at drop_rate
            (default: None).
        seed: Of dynamic masks; the global generators are not touched (default: 0).
        model: As in `SAM` (default: None).
        same_dropout: As in `SAM` (default: True).
        scaler: As in `SAM` (default: None).

    Raises:
        TypeError: As `SAM`, if a parameter of a Fisher mask is complex, or base keeps its state elsewhere
            (ZeroRedundancyOptimizer).
        ValueError: As `SAM`, if a share lies outside [0, 1], a count is below 1, or mask is unknown.
        RuntimeError: As `SAM`.

    Source:
        Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach", NeurIPS 2022. Its
        SSAM is another algorithm than this package's `SSAM`.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        sparsity: float = 0.5,
        mask: str = "fisher",
        *,
        update_freq: int | None = 100,
        num_samples: int = 16,
        drop_rate: float = 0.5,
        total_steps: int | None = None,
        seed: int = 0,
        model: nn.Module | None = None,
        same_dropout: bool = True,
        scaler: GradScaler | None = None,
    ) -> None:
        if mask not in ("fisher", "dynamic"):
            raise ValueError(f"unknown mask {mask!r}; choose 'fisher' or 'dynamic'")
        self.sparsity = check_share("sparsity", sparsity)
        self.mask = mask
        self.update_freq = None if update_freq is None else check_count("update_freq", update_freq)
        self.num_samples = check_count("num_samples", num_samples)
        self.drop_rate = check_share("drop_rate", drop_rate)
        self.total_steps = None if total_steps is None else check_count("total_steps", total_steps)
        self.seed = check_whole("seed", seed)
        self._masks = Slot("sparse_sam_mask")
        self._fisher = Slot("sparse_sam_fisher")
        check_keeps_state(type(self).__name__, base, "use SAM, which keeps nothing")
        # Of the step under way, for the state to be that of the last one until it is taken; a root to forget is None.
        self._next_masks: dict[Tensor, Tensor] = {}
        self._next_fisher: dict[Tensor, Tensor | None] = {}
        super().__init__(base, rho=rho, model=model, same_dropout=same_dropout, scaler=scaler, progress={MADE: False})

    def update_mask(self, losses: Iterable[Tensor]) -> None:
        """Make a Fisher mask of the squared gradients of single samples' losses.

        Neither .grad nor, given model=, running statistics are touched. Give a generator, so that one graph lives at
        a time, and the bare model where it is wrapped for distributed training.

        Args:
            losses: One loss per sample, each a tensor of one element with a graph.

        Raises:
            ValueError: If mask is not "fisher", there are no losses, or a gradient is not finite; the mask is as
                before then.

        """
        if self.mask != "fisher":
            raise ValueError(f"update_mask() makes Fisher masks, and this is SparseSAM with mask={self.mask!r}")
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        sums: dict[Tensor, Tensor] = {}
        statistics = RunningStatistics(self._norm_layers)
        try:
            with torch.enable_grad():
                for loss in losses:
                    found = torch.autograd.grad(loss, params, allow_unused=True)
                    for p, grad in zip(params, found, strict=True):
                        if grad is not None:
                            # In half precision, squares of small gradients would all be zero.
                            wide = torch.promote_types(p.dtype, torch.float32)
                            total = sums.setdefault(p, torch.zeros_like(p, dtype=wide, requires_grad=False))
                            local(total).add_(local(grad).to(wide).square())
        finally:
            statistics.restore()
        if not sums:
            raise ValueError("no losses to make a mask of; an exhausted iterator gives none")
        scores = [local(total) for total in sums.values()]
        if not all(bool(score.isfinite().all()) for score in scores):
            raise ValueError("a gradient of the losses is not finite; the mask stays as it is")
        self._set_masks(list(sums), _keep_largest(scores, self.sparsity))

    @outside_graphs
    def update(self) -> None:
        """Let the base update the weights."""
        # Listed before, since a hook of the base may clear the gradients.
        stepped = [p for group in self._filled_groups() for p in group["params"] if p.grad is not None]
        is_next = self._gathered
        with stepped_by(self) as first:
            super().update()
        if is_next:
            self._set_masks(list(self._next_masks), list(self._next_masks.values()))
            for p, root in self._next_fisher.items():
                if root is None:
                    self._fisher.drop(self, p)
                else:
                    self._fisher.put(self, p, root)
        self._forget_next()
        if stepped and self._has_masks():
            self._note_made()
        self._hold_places(stepped, first)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict, masks included; without any in it, they are made anew."""
        super().load_state_dict(state_dict)
        self._masks.clear()
        self._fisher.clear()
        self._forget_next()
        for state in self.state.values():
            if self._masks.key in state:  # which torch has cast to the parameter's dtype
                state[self._masks.key] = state[self._masks.key].bool()

    def _begin(self) -> bool:
        self._forget_next()
        return super()._begin()

    def _perturb(self, params: Sequence[Sequence[Tensor]], norm: float, scale: float) -> None:
        self._prepare(scale)
        for group, members in zip(self.param_groups, params, strict=True):
            length = ascent(group) / ((norm + EPS) * scale)
            for p in members:
                mask = self._next_masks.get(p)
                if mask is None and (saved := self._masks.get(self, p)) is not None:
                    mask = local(saved)
                if mask is not None and p.grad is not None and length != 0.0:
                    add_([p], [local(p.grad) * mask], length)

    def _prepare(self, scale: float) -> None:
        """Collect this step's squared gradients, and refresh the masks if it is time to."""
        step = self._steps()
        params = self._masked()
        first = not self._has_masks()
        remaining = 0 if first else self._steps_to_refresh(step)
        if self.mask == "dynamic":
            if remaining == 0:
                masks = self._start(params, step) if first else self._evolve(params, step)
                self._next_masks = dict(zip(params, masks, strict=True))
            return
        if remaining < self.num_samples:
            self._collect(params, scale)
        if remaining == 0:
            roots = [self._next_fisher.get(p, self._fisher.get(self, p)) for p in params]
            scores = [
                torch.zeros_like(local(p)) if root is None else local(root)
                for p, root in zip(params, roots, strict=True)
            ]
            self._next_masks = dict(zip(params, _keep_largest(scores, self.sparsity), strict=True))
            for p, root in zip(params, roots, strict=True):
                if root is not None:
                    self._next_fisher[p] = None if self.update_freq is None else torch.zeros_like(root)

    def _steps_to_refresh(self, step: int) -> float:
        if self.update_freq is None:
            return math.inf
        return -step % self.update_freq if step else self.update_freq  # not what update_mask() made before training

    def _collect(self, params: Sequence[Tensor], scale: float) -> None:
        """Add this step's squared gradients to the Fisher sums.

        What is kept is their root, which has the gradients' own range: it ranks the entries as the sum does, and
        optimizers load their state in the parameters' dtype, in which small gradients' squares may all be zero.
        """
        for p in params:
            if p.grad is not None:
                saved = self._fisher.get(self, p)
                root = torch.zeros_like(p, requires_grad=False) if saved is None else saved.clone()
                local(root).hypot_(local(p.grad) if scale == 1.0 else local(p.grad) / scale)
                self._next_fisher[p] = root

    def _hold_places(self, stepped: Iterable[Tensor], first: Iterable[Tensor]) -> None:
        """Give parameters that were stepped without a mask, by a checkpoint loader's probe, the keys of one.

        torch.distributed.checkpoint loads only keys that it finds after such a step; MADE tells that they hold nothing.
        """
        for p in stepped:
            if self._masks.get(self, p) is None:
                self._masks.put(self, p, torch.zeros_like(p, dtype=torch.bool, requires_grad=False))
            if self.mask == "fisher" and self.update_freq is not None and self._fisher.get(self, p) is None:
                self._fisher.put(self, p, torch.zeros_like(p, requires_grad=False))
        self._masks.settle(self, first)
        self._fisher.settle(self, first)

    def _start(self, params: Sequence[Tensor], step: int) -> list[Tensor]:
        generator = self._generator(step)
        scores = [_drawn(local(p).shape, generator).to(local(p).device) for p in params]
        return _keep_largest(scores, self.sparsity)

    def _evolve(self, params: Sequence[Tensor], step: int) -> list[Tensor]:
        """Drop the perturbed entries with the smallest |g|, and take as many others at random."""
        saved = [self._masks.get(self, p) for p in params]
        masks = [
            torch.zeros_like(local(p), dtype=torch.bool) if mask is None else local(mask).clone()
            for p, mask in zip(params, saved, strict=True)
        ]
        total = sum(mask.numel() for mask in masks)
        live = sum(int(mask.sum()) for mask in masks)
        wanted = total - pruned_count(self.sparsity, total)
        # No more than leaves enough others to take: layers may have come, and the sparsity may be another.
        dropped = max(min(int(self._drop_share(step) * live), total - wanted), live - wanted)
        generator = self._generator(step)
        noise = [_drawn((int((~mask).sum()),), generator).to(mask.device) for mask in masks]
        gradients = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in params]
        kept = _keep_largest([g[mask].abs() for g, mask in zip(gradients, masks, strict=True)], dropped / max(live, 1))
        grown = _keep_largest(noise, 1.0 - (wanted - (live - dropped)) / max(total - live, 1))
        for mask, keep, grow in zip(masks, kept, grown, strict=True):
            places, others = mask.clone(), ~mask
            mask[places] = keep
            mask[others] = grow
        return masks

    def _drop_share(self, step: int) -> float:
        if self.total_steps is None:
            return self.drop_rate
        return self.drop_rate * (1 + math.cos(math.pi * min(step / self.total_steps, 1.0))) / 2

    def _generator(self, step: int) -> torch.Generator:
        # Numbers are drawn on the CPU, from the step's own seed, so that they are the same on all ranks and devices
        # and after a resume.
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def _masked(self) -> list[Tensor]:
        """Return the parameters whose entries are chosen from: those with a gradient, in this step or earlier."""
        return [
            p for group in self.param_groups for p in group["params"] if p.grad is not None or self._was_chosen_from(p)
        ]

    def _was_chosen_from(self, p: Tensor) -> bool:
        found = (slot.get(self, p) for slot in (self._masks, self._fisher))
        return any(bool(local(value).any()) for value in found if value is not None)  # places held are all zero

    def _set_masks(self, params: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        for p, mask in zip(params, masks, strict=True):
            value = torch.empty_like(p, dtype=torch.bool)
            local(value).copy_(mask)
            self._masks.put(self, p, value)
        if any(self.state.get(p) for p in params):
            self._note_made()

    def _has_masks(self) -> bool:
        return self._masks.waits or any(group[MADE] for group in self._filled_groups())

    def _forget_next(self) -> None:
        self._next_masks.clear()
        self._next_fisher.clear()

    def _note_made(self) -> None:
        for group in self.param_groups:
            group[MADE] = True

    def _check_group(self, group: Mapping[str, Any], index: int) -> None:
        super()._check_group(group, index)
        if self.mask == "fisher":
            refuse_complex("a Fisher mask", group, index)

    def _describe(self) -> str:
        return f"sparsity={self.sparsity}, mask={self.mask!r}"


def _keep_largest(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Mark all but the share `sparsity` of scores of smallest magnitude, over all tensors together."""
    named: Mapping[str, Tensor] = {str(index): score for index, score in enumerate(scores)}
    return list(keep_masks(named, sparsity).values())


def _drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw numbers in [0, 1), the same whatever torch's default dtype and device are."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
