"""torch's AdamW and SGD whose one pass over the weights also shrinks them and measures what it writes.

The next step's penalty needs the moments of the weights that this step writes. With these measured on the way out, and
the shrink applied on the way in, a penalty costs no pass over memory of its own. Wherever the kernel cannot run, for
one layer or for all, torch's own update runs on weights that were shrunk before: the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from wcr_optim import backends, layer_numbers
from wcr_optim.layout import PLAIN, as_dtensor, has_address, is_dense, local, stamp
from wcr_optim.moments import measure
from wcr_optim.uploads import is_capturing, select


class Known(NamedTuple):
    """A row of sums of m and m^2, shape (layers, 2), and what shows whether anyone wrote into the layer since."""

    sums: Tensor
    row: int
    stamp: tuple[int, ...]


class Shrinks(NamedTuple):
    """What the next update is to do to layers on its way, a row of gain and threshold for each."""

    row: dict[Tensor, int]
    gain: Tensor
    threshold: Tensor
    seed: int | Tensor | None
    backend: str

    def of(self, layers: Sequence[Tensor], call: int) -> Shrinks:
        """Return those of some of the layers, in their order, for the call of a kernel of its own."""
        rows = [self.row[w] for w in layers]
        return self._replace(
            row={w: i for i, w in enumerate(layers)},
            gain=select(self.gain, rows),
            threshold=select(self.threshold, rows),
            # Calls count their layers from 0, so each draws from a seed of its own.
            seed=None if self.seed is None else self.seed + call * 2**32,
        )


class FusedUpdate(Optimizer):
    """Mixin before one of torch's optimizers: knows sums of weights, and takes shrinks along in its next step.

    Between `take_over` and the step nobody may write into the weights. Writes after the step are noticed by the
    tensors' version counters, which torch's in-place operations advance. Writes through `.data` are not, nor those of
    other processes, nor those of torch._foreach operations on DTensors, which advance none. Once a step was captured
    into a CUDA graph, every step measures the weights itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[Tensor, Known] = {}
        self._taken: list[Shrinks] = []
        self._calls = 0  # of kernels in this step
        self._in_graphs = False  # whether a step was captured: its replays write into weights, and no version tells

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known, self._taken, self._calls, self._in_graphs = {}, [], 0, False  # a copy works on other weights

    def sums(self, layers: Sequence[Tensor], backend: str) -> Tensor:
        """Return this rank's sums of m and m^2, shape (layers, 2), measuring those that the last step did not."""
        if _is_captured(layers):  # a replay does not know who wrote into the weights before it
            return measure([local(w) for w in layers], backend)
        known = [self._known[w] for w in layers if self._is_known(w)]
        if len(known) == len(layers) and all(k.sums is known[0].sums for k in known):
            return select(known[0].sums, [k.row for k in known])
        rows = {w: self._known[w].sums[self._known[w].row] for w in layers if self._is_known(w)}
        unknown = [w for w in layers if w not in rows]
        if unknown:
            measured = measure([local(w) for w in unknown], backend)
            if len(unknown) == len(layers):
                return measured
            rows.update(zip(unknown, measured.unbind(), strict=True))
        return torch.stack([rows[w] for w in layers])

    def _is_known(self, w: Tensor) -> bool:
        known = self._known.get(w)
        return known is not None and known.stamp == stamp(w)

    def take_over(
        self, layers: Sequence[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None, backend: str
    ) -> list[int]:
        """Take over the shrinks of layers whose update is fused with it, and return the others' indices."""
        rows: dict[Tensor, int] = {}
        hooks = self._optimizer_step_pre_hooks or torch_optimizer._global_optimizer_pre_hooks
        if backend != "eager" and not hooks:  # a hook before the update is to see shrunk weights
            groups = [group for group in self.param_groups if self._fuses(group)]
            group_of = {w: group for group in groups for w in group["params"]}
            fuses = backends.implementation(backend).fuses
            for i, w in enumerate(layers):
                streams = self._streams(w, group_of[w]) if w in group_of else None
                if streams is not None and _alike(streams) and fuses(local(w)):
                    rows[w] = i
        if rows:
            self._taken.append(Shrinks(rows, gain, threshold, seed, backend))
        return [i for i, w in enumerate(layers) if w not in rows]

    def forget(self) -> None:
        """Drop what was taken over and not done: the step is over, or failed."""
        self._taken, self._calls = [], 0

    def _fuses(self, group: dict[str, Any]) -> bool:
        """Return whether the updates of a group's layers can be fused with their shrinks."""
        return bool(group["fused"]) and not group["differentiable"] and getattr(self, "found_inf", None) is None

    def _init_group(self, group: dict[str, Any], *arguments: Any) -> Any:
        """Collect what torch's step will update; layers that were taken over are updated here, and left out."""
        result = super()._init_group(group, *arguments)  # type: ignore[misc]
        lists = [x for x in arguments if isinstance(x, list)]  # an older torch's AdamW has a flag among them
        for w in lists[0]:
            self._known.pop(w, None)  # for an interrupted update, and torch's, which counts no version of a DTensor
        for shrinks in self._taken:
            index = [i for i, w in enumerate(lists[0]) if w in shrinks.row]
            if not index:
                continue
            own = _take_out(lists, index)
            layers = own[0]
            self._calls += 1
            sums = self._update(group, own, shrinks.of(layers, self._calls))
            self._in_graphs = self._in_graphs or _is_captured(layers)
            if not self._in_graphs:
                self._known.update({w: Known(sums, row, stamp(w)) for row, w in enumerate(layers)})
        if group["fused"]:
            index = [i for i in range(len(lists[0])) if not self._suits(lists, i)]
            if index:
                self._update_plainly(group, _take_out(lists, index))
        return result

    def _suits(self, lists: list[list[Any]], i: int) -> bool:
        """Return whether torch's own fused kernel updates a layer rightly.

        On the CPU it takes element i of every tensor's memory for one and the same, whatever their strides, up to torch
        2.13.
        """
        return local(lists[0][i]).device.type != "cpu" or _alike(
            [stream[i] for stream in lists if stream and stream[i] is not None]
        )

    def _update_plainly(self, group: dict[str, Any], lists: list[list[Any]]) -> None:
        """Update layers by torch's plain kernels.

        A GradScaler leaves its work to optimizers that say they are fused.
        """
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and found_inf.item():
            return
        if scale is not None:
            torch._foreach_div_(lists[1], scale.to(lists[1][0].device))
        self._update_unfused(group, lists)

    def _update_unfused(self, group: dict[str, Any], lists: list[list[Any]]) -> None:
        """Have torch update layers of a group, one at a time."""
        raise NotImplementedError

    def _streams(self, w: Tensor, group: dict[str, Any]) -> list[Tensor] | None:
        """Return what a layer's fused update reads and writes, or None where there is none."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], lists: list[list[Any]], shrinks: Shrinks) -> Tensor:
        """Shrink and update layers of a group, and return the sums of their new weights, shape (layers, 2)."""
        raise NotImplementedError


class FusedAdamW(FusedUpdate, torch.optim.AdamW):
    """torch.optim.AdamW, its state and its options, see `FusedUpdate`."""

    def _fuses(self, group: dict[str, Any]) -> bool:
        numbers = (*group["betas"], group["weight_decay"], group["eps"])
        return super()._fuses(group) and not group["amsgrad"] and not any(isinstance(x, Tensor) for x in numbers)

    def _streams(self, w: Tensor, group: dict[str, Any]) -> list[Tensor] | None:
        state = self.state.get(w)
        if not state or w.grad is None:
            return None
        return [w, w.grad, state["exp_avg"], state["exp_avg_sq"]]

    def _suits(self, lists: list[list[Any]], i: int) -> bool:
        return super()._suits(lists[:-1], i)  # the last are counters of steps

    def _update_unfused(self, group: dict[str, Any], lists: list[list[Any]]) -> None:
        params, grads, means, squares, largest, steps = lists
        beta1, beta2 = group["betas"]
        options = {key: group[key] for key in ("amsgrad", "lr", "weight_decay", "eps", "maximize")}
        adamw(params, grads, means, squares, largest, steps, foreach=False, beta1=beta1, beta2=beta2, **options)

    def _update(self, group: dict[str, Any], lists: list[list[Any]], shrinks: Shrinks) -> Tensor:
        params, grads, means, squares, _, steps = lists
        torch._foreach_add_(steps, 1)
        coefficients = layer_numbers.implementation(shrinks.backend).adamw_coefficients(
            shrinks.gain, shrinks.threshold, steps, group["lr"], group["weight_decay"], group["betas"]
        )
        return backends.implementation(shrinks.backend).adamw_(
            [[local(x) for x in stream] for stream in (params, grads, means, squares)],
            coefficients,
            betas=group["betas"],
            eps=group["eps"],
            maximize=group["maximize"],
            seed=shrinks.seed,
        )


class FusedSGD(FusedUpdate, torch.optim.SGD):
    """torch.optim.SGD, its state and its options, see `FusedUpdate`.

    Where torch's own fused kernel would update bfloat16 or float16 weights on the CPU, its plain one does: up to torch
    2.13 the fused one skips whole vectors of them and takes garbage for their momentum (pytorch/pytorch#191763). On
    every device the plain kernel also updates a layer whose first gradient comes later than that of others in its
    group: torch's fused step raises where only some momentum buffers exist.
    """

    def _suits(self, lists: list[list[Any]], i: int) -> bool:
        w, momentum = lists[0][i], lists[2]
        is_late = bool(momentum) and momentum[i] is None and any(buffer is not None for buffer in momentum)
        is_wide = w.element_size() >= 4 or local(w).device.type != "cpu"
        return is_wide and not is_late and super()._suits(lists, i)

    def _update_unfused(self, group: dict[str, Any], lists: list[list[Any]]) -> None:
        params, grads, buffers = lists
        options = {key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")}
        sgd(params, grads, buffers, **options, has_sparse_grad=any(g.is_sparse for g in grads), foreach=False)
        for w, buffer in zip(params, buffers, strict=False):
            self.state[w]["momentum_buffer"] = buffer

    def _fuses(self, group: dict[str, Any]) -> bool:
        return super()._fuses(group) and not isinstance(group["weight_decay"], Tensor)

    def _streams(self, w: Tensor, group: dict[str, Any]) -> list[Tensor] | None:
        if w.grad is None:
            return None
        if group["momentum"] == 0:
            return [w, w.grad]
        buffer = self.state.get(w, {}).get("momentum_buffer")
        return None if buffer is None else [w, w.grad, buffer]

    def _update(self, group: dict[str, Any], lists: list[list[Any]], shrinks: Shrinks) -> Tensor:
        coefficients = layer_numbers.implementation(shrinks.backend).sgd_coefficients(
            shrinks.gain, shrinks.threshold, group["lr"]
        )
        return backends.implementation(shrinks.backend).sgd_(
            [[local(x) for x in stream] for stream in lists if stream],
            coefficients,
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            seed=shrinks.seed,
        )


def _is_captured(layers: Sequence[Tensor]) -> bool:
    """Return whether what is done to layers is captured into a CUDA graph, to be done at its replays."""
    return bool(layers) and is_capturing(local(layers[0]).device)


def _take_out(lists: Sequence[list[Any]], index: Sequence[int]) -> list[list[Any]]:
    """Take the same places out of lists side by side, and return what stood there; an empty list has nothing."""
    places = set(index)
    own = [[stream[i] for i in index] if stream else [] for stream in lists]
    for stream in lists:
        stream[:] = [x for i, x in enumerate(stream) if i not in places]
    return own


def _alike(streams: Sequence[Tensor]) -> bool:
    """Return whether element i of one stream's memory belongs to element i of every other's."""
    parts = streams
    if not all(type(x) in PLAIN for x in streams):
        placements = [None if x is None else x.placements for x in map(as_dtensor, streams)]
        parts = [local(x) for x in streams]
        if any(other != placements[0] for other in placements) or not all(map(has_address, parts)):
            return False
    w, *rest = parts
    if any(x.layout != w.layout or x.dtype != w.dtype or x.device != w.device for x in rest):
        return False
    if w.is_contiguous():  # spares most layers the comparison of shapes and strides, which takes longer
        n = w.numel()
        return all(x.is_contiguous() and x.numel() == n for x in rest)
    what = w.shape, w.stride()
    return is_dense(w) and all((x.shape, x.stride()) == what for x in rest)
