"""What pruning leaves of a model: weights, operations and bytes, per layer and in all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wcr_optim.layout import as_dtensor, local
from wcr_optim.parameters import memory, unwrapped
from wcr_optim.pruning.apply import matched
from wcr_optim.pruning.masks import Masks, as_masks
from wcr_optim.pruning.modes import evaluation_mode, without_compilation
from wcr_optim.pruning.patterns import chunks
from wcr_optim.pruning.select import Selection, selected
from wcr_optim.pruning.shards import whole
from wcr_optim.pruning.sparse_file import encoded_size
from wcr_optim.tables import aligned


@dataclass(frozen=True)
class LayerReport:
    """What pruning leaves of one weight.

    Attributes:
        name: The parameter's name.
        shape: Its shape.
        weights: Number of weights.
        kept: How many of them are kept.
        dense_bytes: What they take in memory or in an ordinary checkpoint.
        sparse_bytes: What they take in a sparse file, in the smallest encoding.
        dense_macs: Multiply-accumulate operations that involve this weight in one pass over the example; None without
            an example.
        sparse_macs: Those of them that involve a kept weight.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    dense_bytes: int
    sparse_bytes: int
    dense_macs: int | None = None
    sparse_macs: int | None = None

    @property
    def sparsity(self) -> float:
        """The share of pruned weights."""
        return 1.0 - self.kept / self.weights if self.weights else 0.0

    @property
    def emptied(self) -> bool:
        """Whether every weight is pruned, so that the layer's output no longer depends on its input."""
        return self.weights > 0 and self.kept == 0


@dataclass(frozen=True)
class PruningReport:
    """What pruning leaves of a model.

    Attributes:
        layers: The prunable weights, in the model's order.
        parameters: Number of all parameters, shared ones counted once.
        dense_bytes: What an ordinary checkpoint takes: parameters and buffers.
        sparse_bytes: What a sparse file takes, without its header.
        dense_macs: Multiply-accumulate operations of one pass over the example; None without an example.
        sparse_macs: Those of them that do not involve a pruned weight.
    """

    layers: tuple[LayerReport, ...]
    parameters: int
    dense_bytes: int
    sparse_bytes: int
    dense_macs: int | None = None
    sparse_macs: int | None = None

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        """How many of the prunable weights are kept."""
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The share of pruned weights among the prunable ones."""
        return 1.0 - self.kept / self.weights if self.weights else 0.0

    @property
    def sparsity_of_all(self) -> float:
        """The share of pruned weights among all parameters."""
        return (self.weights - self.kept) / self.parameters if self.parameters else 0.0

    @property
    def emptied(self) -> list[str]:
        """Names of the layers that lost every weight."""
        return [layer.name for layer in self.layers if layer.emptied]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        derived = {
            "weights": self.weights,
            "kept": self.kept,
            "sparsity": self.sparsity,
            "sparsity_of_all": self.sparsity_of_all,
            "emptied": self.emptied,
        }
        layers = [
            {**asdict(layer), "shape": list(layer.shape), "sparsity": layer.sparsity, "emptied": layer.emptied}
            for layer in self.layers
        ]
        return {**asdict(self), **derived, "layers": layers}

    def __str__(self) -> str:
        with_macs = self.dense_macs is not None
        head = ["layer", "shape", "weights", "kept", "sparsity", *(["MACs", "sparse MACs"] if with_macs else []), ""]
        rows = [head]
        for layer in self.layers:
            macs = [_short(layer.dense_macs), _short(layer.sparse_macs)] if with_macs else []
            shape = " x ".join(map(str, layer.shape))
            counts = [f"{layer.weights:,}", f"{layer.kept:,}", f"{layer.sparsity:.2%}"]
            rows.append([layer.name, shape, *counts, *macs, "lost every weight" if layer.emptied else ""])
        of_layers = [
            _short(sum(layer.dense_macs or 0 for layer in self.layers)),
            _short(sum(layer.sparse_macs or 0 for layer in self.layers)),
        ]
        macs = of_layers if with_macs else []
        rows.append(["prunable weights", "", f"{self.weights:,}", f"{self.kept:,}", f"{self.sparsity:.2%}", *macs, ""])
        rest = self.parameters - self.weights
        everything = [f"{self.parameters:,}", f"{self.kept + rest:,}", f"{self.sparsity_of_all:.2%}"]
        macs = [_short(self.dense_macs), _short(self.sparse_macs)] if with_macs else []
        rows.append(["all parameters", "", *everything, *macs, ""])
        return (
            f"{aligned(rows, left=(0, len(head) - 1))}\n"
            f"file: {_short(self.dense_bytes, 'B')} dense, {_short(self.sparse_bytes, 'B')} sparse "
            f"({self.sparse_bytes / max(1, self.dense_bytes):.1%})"
        )


def report(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example: Any = None,
    *,
    exclude: Selection = (),
    include: Selection | None = None,
) -> PruningReport:
    """Count what masks, or the zeros that a model holds already, leave of it.

    Args:
        model: The model.
        masks: Masks of its parameters, or boolean tensors by name, applied or not; None counts the zeros of its
            prunable weights (default: None)
        example: An input to count operations with, in one pass in evaluation mode: a tensor, a tuple of positional
            arguments, or a mapping of keyword arguments. None counts none (default: None)
        exclude: Without masks: layers not to speak of, in the forms that `prunable_weights` takes (default: ())
        include: Without masks: speak of these only (default: None)

    Returns:
        Counts per layer and in all.

    Raises:
        ValueError: If the model has no parameter of a mask's name and shape, operations are to be counted of weights
            that are spread over processes, and as `prunable_weights`.
    """
    model = unwrapped(model)
    if masks is None:
        weights = selected(model, exclude, include)
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        packed = Masks.from_chunks(shapes, ((part != 0 for part in chunks(whole(t))) for t in weights.values()))
    else:
        packed = as_masks(masks)
        weights = dict(matched(model, packed))
    flops = None if example is None else _flops(model, weights, example)
    kept = packed.kept_by_name
    layers: list[LayerReport] = []
    sparse_bytes: dict[tuple[object, ...], int] = {}
    for name, tensor in weights.items():
        numel = tensor.numel()
        macs = None if flops is None else flops[name] // 2
        layers.append(
            LayerReport(
                name=name,
                shape=tuple(tensor.shape),
                weights=numel,
                kept=kept[name],
                dense_bytes=numel * tensor.element_size(),
                sparse_bytes=sparse_bytes.setdefault(memory(tensor), _sparse_bytes(tensor, packed[name])),
                dense_macs=macs,
                sparse_macs=None if macs is None else round(macs * kept[name] / max(1, numel)),
            )
        )
    parameters = {memory(parameter): parameter for parameter in model.parameters()}
    state = {**parameters, **{memory(buffer): buffer for buffer in _saved_buffers(model)}}
    dense_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    dense_macs = None if flops is None else flops[None] // 2
    return PruningReport(
        layers=tuple(layers),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        dense_bytes=dense_bytes,
        sparse_bytes=sum(
            sparse_bytes[key] if key in sparse_bytes else _bytes_beside(tensor) for key, tensor in state.items()
        ),
        dense_macs=dense_macs,
        sparse_macs=None
        if dense_macs is None
        else dense_macs - sum((layer.dense_macs or 0) - (layer.sparse_macs or 0) for layer in layers),
    )


def _sparse_bytes(weight: Tensor, mask: Tensor) -> int:
    return encoded_size(whole(weight).cpu().masked_fill(~mask, 0))[1]


def _bytes_beside(tensor: Tensor) -> int:
    """Return what a tensor takes that no mask is for; as it is, if it is of a kind that no sparse file holds."""
    try:
        # Of a copy: what numpy has seen of a CPU tensor, FSDP cannot free any more.
        return encoded_size(whole(tensor).clone())[1]
    except ValueError:
        return tensor.numel() * tensor.element_size()


def _saved_buffers(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _short(count: int | None, unit: str = "") -> str:
    value, prefixes = float(count or 0), ["", "k", "M", "G", "T"]
    while value >= 1000 and len(prefixes) > 1:
        value /= 1000
        del prefixes[0]
    return f"{value:.4g} {prefixes[0]}{unit}".rstrip()


class _ByWeight:
    """The flop counter's formulas, which also attribute what they count to the weight that an operation involves."""

    def __init__(self, weights: Mapping[str, Tensor], registry: Mapping[Any, Callable[..., int]]) -> None:
        self.flops: Counter[str] = Counter()
        self.formulas: dict[Any, _Formula] = {op: _Formula(self, formula) for op, formula in registry.items()}
        # Autocast computes with a copy of the weight. Copies are kept alive, so that none inherits another's address.
        self.formulas[torch.ops.aten._to_copy] = _Formula(self, self._follow)
        self._places: defaultdict[int, list[tuple[int, int, str]]] = defaultdict(list)
        self._copies: list[Tensor] = []
        for name, tensor in weights.items():
            self._note(local(tensor.detach()), name)

    def name_of(self, values: Iterable[Any]) -> str | None:
        """Return the weight whose memory one of the values is, seen in whatever shape."""
        for value in values:
            if isinstance(value, Tensor):
                at = value.data_ptr()
                for first, end, name in self._places.get(_storage(value), ()):
                    if first <= at < end:
                        return name
        return None

    def _follow(self, source: Tensor, *, out_val: Tensor, **_: Any) -> int:
        name = self.name_of((source,))
        if name is not None:
            self._copies.append(out_val)
            self._note(out_val, name)
        return 0

    def _note(self, tensor: Tensor, name: str) -> None:
        """Remember where a weight lies: several may share one storage, as those of recurrent layers do on CUDA."""
        last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
        first = tensor.data_ptr()
        self._places[_storage(tensor)].append((first, first + (last + 1) * tensor.element_size(), name))


class _Formula:
    _get_raw = True  # asks FlopCounterMode for tensors rather than shapes

    def __init__(self, owner: _ByWeight, formula: Callable[..., int]) -> None:
        self._owner = owner
        self._formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        flops = self._formula(*args, **kwargs)
        name = self._owner.name_of(args)
        if name is not None:
            self._owner.flops[name] += flops
        return flops


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _without(stack: ExitStack, backend: Any) -> None:
    # Not backend.flags(), which sets other options of the backend too.
    stack.callback(setattr, backend, "enabled", backend.enabled)
    backend.enabled = False


def _flops(model: nn.Module, weights: Mapping[str, Tensor], example: Any) -> dict[str | None, int]:
    """Return the floating-point operations of one pass by weight, and those of the whole pass under None."""
    from torch.utils.flop_counter import FlopCounterMode, flop_registry  # which also brings all of Triton

    if any(as_dtensor(tensor) is not None for tensor in weights.values()):
        raise ValueError("operations are counted on undivided weights: give the example to a report of the plain model")
    by_weight = _ByWeight(weights, flop_registry)
    counter = FlopCounterMode(display=False, custom_mapping=by_weight.formulas)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(without_compilation())
        stack.enter_context(torch.inference_mode(False))  # in which layers do not come apart into counted operations
        stack.enter_context(torch.no_grad())
        # Fused recurrent and attention kernels hide their matrix products from the counter.
        _without(stack, torch.backends.mkldnn)
        _without(stack, torch.backends.cudnn)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(counter)
        if isinstance(example, Mapping):
            model(**example)
        elif isinstance(example, tuple):
            model(*example)
        else:
            model(example)
    return {None: counter.get_total_flops(), **{name: by_weight.flops[name] for name in weights}}
