"""Which weights of a model are regularized and pruned: one rule for both.

Weight concentration prepares exactly the weights that pruning may remove, so `param_groups` (for the optimizer) and
`wcr_optim.pruning` (for the masks) ask the same function, `prunable_weights`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wcr_optim.checks import check_number
from wcr_optim.layout import as_dtensor, in_memory_order

Selector: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | nn.Module | Tensor"
"""One entry of ``exclude`` or ``include``: a dotted name, a pattern, a module type, a module or a parameter."""

STRENGTHS = ("weight_decay", "weight_concentration", "l1_decay", "l2_decay", "hoyer_decay")
"""What the strengths of decay and of every penalty here are called in an optimizer's groups."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""The dtypes of weights that can be ranked by magnitude."""

LORA = re.compile(r"^lora(_|$)", re.IGNORECASE)
"""What the factors of a low-rank adapter, or the modules that hold them, are called."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
# Plain parameters of two and more dimensions that are no weights of a linear map: `bias_k` of nn.MultiheadAttention,
# `relative_position_bias_table` and `logit_scale` of Swin, `layer_scale` of ConvNeXt, `pos_embed` and `cls_token` of
# vision transformers.
_NO_WEIGHT = re.compile(r"(^|_)bias(_|$)|(^|_)(embed|embeddings?|tokens?|scale|gamma)$")


def prunable_weights(
    model: nn.Module,
    exclude: Iterable[Selector] | Selector = (),
    *,
    include: Iterable[Selector] | Selector | None = None,
) -> dict[str, nn.Parameter]:
    """Select the weights that are regularized and pruned.

    These are the floating-point parameters with at least two dimensions: of linear, convolutional, recurrent and
    attention layers, of GPT-2's ``Conv1D``, and plain parameters of a module. Left out are biases, the parameters of
    norm layers, embeddings (of ``nn.Embedding`` and ``nn.EmbeddingBag``, and an ``lm_head`` tied to one), and plain
    parameters that are called so (``rel_bias``, ``layer_scale``, ``pos_embed``, ``cls_token``). A tensor that several
    modules share is selected once and only if none of them leaves it out. Frozen weights are selected too: pruning
    does not ask for gradients.

    Args:
        model: The model; ``torch.compile`` and data-parallel wrappers around it are looked through.
        exclude: What to leave out: dotted names of modules or parameters, compiled patterns that are searched in the
            full names of parameters, module types, modules, parameters (default: ()).
        include: Select only below these, in the same forms. An embedding or a norm is selected only if its own
            module or parameter, or its type, is given here. None stands for the whole model (default: None).

    Returns:
        The parameters by the first of their names, in the order of ``model.named_parameters()``.

    Raises:
        ValueError: If an entry matches nothing in the model, or if a weight cannot be pruned by its magnitude: lazy,
            on the meta device, sparse, complex, quantized, parametrized, under ``torch.nn.utils.prune``, adapted
            (LoRA and its kin), of a TorchScript or exported module, or a part of another parameter's memory. The
            message says what to do.
        TypeError: If an entry is of no known form.
    """
    return _select(unwrapped(model), exclude, include, trainable_only=False)


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    weight_concentration: float = 1e-3,
    exclude: Iterable[Selector] | Selector = (),
    *,
    include: Iterable[Selector] | Selector | None = None,
) -> list[dict[str, Any]]:
    """Divide a model's parameters for an optimizer: weights to regularize, and the rest.

    The weights of `prunable_weights` get the given strengths; biases, norms, embeddings and what is excluded get
    zero, of every penalty here. The strengths stand in the groups, so they come before one that is given to the
    optimizer around them. Frozen parameters are in no group, shared ones in one group once.

    Args:
        model: The model; ``torch.compile`` and data-parallel wrappers around it are looked through.
        weight_decay: Decoupled or L2 decay of the weights, as the optimizer reads it. It stands in the groups, so that
            the optimizer's own default or argument is not used (default: 0.0)
        weight_concentration: Strength of the weight concentration regularizer (default: 1e-3)
        exclude: What not to regularize, in the forms that `prunable_weights` takes (default: ())
        include: Regularize only these, in the same forms; None stands for the whole model (default: None)

    Returns:
        One or two groups, ``{"params", "weight_decay", "weight_concentration"}``, the second with a zero for each of
        STRENGTHS; none of them empty.

    Raises:
        ValueError: If a strength is negative or not finite, if the model has nothing to train, and as
            `prunable_weights`.

    Example:
        >>> groups = param_groups(model, weight_decay=5e-4, weight_concentration=1e-3, exclude=("head",))
        >>> optimizer = WCR(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    """
    for option, value in (("weight_decay", weight_decay), ("weight_concentration", weight_concentration)):
        if not 0.0 <= check_number(option, value) < math.inf:
            raise ValueError(f"{option} must be a finite number of at least 0, got {value!r}")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: none of its parameters has requires_grad=True")
    selected = _select(unwrapped(model), exclude, include, trainable_only=True)
    chosen = {id(parameter) for parameter in selected.values()}
    rest = [parameter for parameter in trainable.values() if id(parameter) not in chosen]
    groups: list[dict[str, Any]] = [
        {
            "params": list(selected.values()),
            "weight_decay": weight_decay,
            "weight_concentration": weight_concentration,
        },
        {"params": rest, **dict.fromkeys(STRENGTHS, 0.0)},
    ]
    return [group for group in groups if group["params"]]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module below ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Names are then those of the plain model, whichever way it is run at the moment. A wrapper around a part of the model
    stays, and its name with it, as in the state dict: ``torch.compile`` of the first layer alone gives the names
    ``0._orig_mod.weight``; ``model[0].compile()``, which compiles in place, leaves ``0.weight``.
    """
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


@dataclass(frozen=True)
class _Site:
    """One place where a module holds a parameter; a shared parameter has several."""

    name: str
    parameter: nn.Parameter
    path: tuple[tuple[str, nn.Module], ...]  # names and modules from the model down to the owner

    @property
    def owner(self) -> nn.Module:
        return self.path[-1][1]

    @property
    def own_name(self) -> str:
        return self.name.rpartition(".")[2]


class _Selection:
    """The entries of ``exclude`` or ``include``, each checked to match something in the model."""

    def __init__(
        self, entries: Iterable[Selector] | Selector, model: nn.Module, sites: list[_Site], option: str
    ) -> None:
        if isinstance(entries, (str, re.Pattern, type, nn.Module, Tensor)):
            entries = (entries,)
        if not isinstance(entries, Iterable):
            raise TypeError(
                f"{option} takes names, compiled patterns, module types, modules and parameters, got {entries!r}"
            )
        modules = dict(model.named_modules(remove_duplicate=False))
        known = {*modules, *(site.name for site in sites)} - {""}
        self.names: set[str] = set()
        self.patterns: list[re.Pattern[str]] = []
        self.types: list[type[nn.Module]] = []
        self.identities: set[int] = set()
        for entry in entries:
            if isinstance(entry, str):
                found = entry in known
                self.names.add(entry)
            elif isinstance(entry, re.Pattern):
                found = any(entry.search(site.name) for site in sites)
                self.patterns.append(entry)
            elif isinstance(entry, type) and issubclass(entry, nn.Module):
                found = any(isinstance(module, entry) for module in modules.values())
                self.types.append(entry)
            elif isinstance(entry, nn.Module):
                entry = unwrapped(entry)
                found = any(module is entry for module in modules.values())
                self.identities.add(id(entry))
            elif isinstance(entry, Tensor):
                found = any(site.parameter is entry for site in sites)
                self.identities.add(id(entry))
            else:
                raise TypeError(
                    f"{option} takes names, compiled patterns, module types, modules and parameters, got {entry!r}"
                )
            if not found:
                raise ValueError(f"{option} matches nothing in the model: {_shown(entry)}{_hint(entry, known)}")

    def matches(self, site: _Site) -> bool:
        """Whether an entry names the parameter or any module above it."""
        return (
            self._names(site.name, site.parameter)
            or any(self._names(name, module) for name, module in site.path)
            or any(pattern.search(site.name) for pattern in self.patterns)
        )

    def names_directly(self, site: _Site) -> bool:
        """Whether an entry names the parameter or the very module that owns it."""
        return self._names(site.name, site.parameter) or self._names(*site.path[-1])

    def _names(self, name: str, thing: nn.Module | Tensor) -> bool:
        return name in self.names or id(thing) in self.identities or isinstance(thing, tuple(self.types))


def _shown(entry: Selector) -> str:
    if isinstance(entry, Tensor):
        return f"a parameter of shape {tuple(entry.shape)}"
    if isinstance(entry, nn.Module):
        return f"an instance of {type(entry).__name__}"
    return repr(entry)


def _hint(entry: Selector, known: set[str]) -> str:
    if not isinstance(entry, str):
        return ""
    near = sorted(name for name in known if entry.lower() in name.lower())
    if near:
        return (
            f"; names are given in full, as in {', '.join(map(repr, near[:3]))}, or as a pattern: re.compile({entry!r})"
        )
    return "; names of modules and parameters are given in full, as model.named_modules() does"


def _sites(model: nn.Module) -> Iterator[_Site]:
    for prefix, path in _paths(model):
        for name, parameter in path[-1][1]._parameters.items():
            if parameter is not None:
                yield _Site(f"{prefix}.{name}" if prefix else name, parameter, path)


def _paths(model: nn.Module) -> Iterator[tuple[str, tuple[tuple[str, nn.Module], ...]]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in modules:
        above = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        names = ["", *above, name] if name else [""]
        yield name, tuple((part, modules[part]) for part in names)


def _select(
    model: nn.Module,
    exclude: Iterable[Selector] | Selector,
    include: Iterable[Selector] | Selector | None,
    trainable_only: bool,
) -> dict[str, nn.Parameter]:
    sites = list(_sites(model))
    excluded = _Selection(exclude, model, sites, "exclude")
    included = None if include is None else _Selection(include, model, sites, "include")
    shared: dict[object, list[_Site]] = {}
    for site in sites:
        shared.setdefault(memory(site.parameter), []).append(site)
    selected: dict[str, nn.Parameter] = {}
    for places in shared.values():
        parameter = places[0].parameter
        if trainable_only and not parameter.requires_grad:
            continue
        if any(excluded.matches(site) for site in places):
            continue
        direct = False
        if included is not None:
            if not any(included.matches(site) for site in places):
                continue
            direct = any(included.names_directly(site) for site in places)
        if is_lazy(parameter):
            raise ValueError(
                f"{places[0].name} has no shape yet: run one batch through the model first, then select its weights"
            )
        if parameter.ndim < 2 or (not direct and any(_left_dense(site) for site in places)):
            continue
        for site in places:
            for check in (_hidden, _reparametrized, _adapter, _unrankable):
                reason, whole = check(site)
                if reason:
                    raise ValueError(f"{site.name} {reason}, or leave it out: exclude=[{whole or site.name!r}]")
        selected[places[0].name] = parameter
    _refuse_overlaps((places[0] for places in shared.values()), selected)
    if not trainable_only:
        _refuse_packed(model, excluded, included)
    return selected


def memory(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for tensors which are one and the same memory, read in the same way.

    Such are the names of a tied weight in a state dict, and two parameters after ``a.data = b.data``. A tensor whose
    memory cannot be told is equal to itself alone.
    """
    if not _has_address(tensor):
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()


def _has_address(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    return plain and tensor.numel() > 0  # all empty tensors have the address 0


def _refuse_overlaps(sites: Iterable[_Site], selected: Container[str]) -> None:
    """Refuse a weight that is only a part of another parameter, or another one read in another order."""
    spans = []
    for site in sites:
        parameter = site.parameter
        if _has_address(parameter):
            steps = zip(parameter.shape, parameter.stride(), strict=True)
            end = parameter.data_ptr() + (1 + sum((n - 1) * step for n, step in steps)) * parameter.element_size()
            # Where there are gaps, another one may lie in them: as the columns of one matrix in two parameters.
            gaps = not in_memory_order(parameter).is_contiguous()
            spans.append((str(parameter.device), parameter.data_ptr(), gaps, end, site.name))
    device, reach, owner = "", 0, ""
    for span in sorted(spans):
        if span[0] != device:
            device, reach = span[0], 0
        if span[1] < reach and (span[4] in selected or owner in selected):
            raise ValueError(
                f"{owner} and {span[4]} overlap in memory without being equal, so that pruning one of them changes the "
                f"other: give each a copy of its own, or leave both out: exclude=[{owner!r}, {span[4]!r}]"
            )
        if not span[2] and span[3] > reach:
            reach, owner = span[3], span[4]


def _left_dense(site: _Site) -> bool:
    return isinstance(site.owner, (*_NORMS, *_EMBEDDINGS)) or _NO_WEIGHT.search(site.own_name) is not None


def refusal(owner: nn.Module, own_name: str) -> str | None:
    """Return why a parameter is not itself a weight of the layer that owns it, and the way out.

    Args:
        owner: The module that holds the parameter.
        own_name: The parameter's name in it.

    Returns:
        The end of a sentence that begins with the parameter's name, or None when it is the weight.
    """
    if isinstance(owner, nn.utils.parametrize.ParametrizationList) or is_parametrized(owner, own_name):
        return (
            "is parametrized, so its magnitude is not the weight's: "
            "call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    stem, _, suffix = own_name.rpartition("_")
    if suffix == "orig" and hasattr(owner, f"{stem}_mask"):
        return (
            f"is under torch.nn.utils.prune: keep its mask with pruning.from_torch_prune(model), "
            f"make it permanent with torch.nn.utils.prune.remove(module, {stem!r})"
        )
    if suffix == "orig" and hasattr(owner, f"{stem}_u"):
        return f"is the factor of a spectral norm: call torch.nn.utils.remove_spectral_norm(module, {stem!r}) first"
    if suffix in ("g", "v") and {f"{stem}_g", f"{stem}_v"} <= owner._parameters.keys():
        return f"is the factor of a weight norm: call torch.nn.utils.remove_weight_norm(module, {stem!r}) first"
    return None


def hides_types(module: nn.Module) -> bool:
    """Say whether a module's layers have lost their types: TorchScript, and graphs of torch.export."""
    exported = any(kind.__module__.startswith("torch.export") for kind in type(module).__mro__)
    return exported or isinstance(module, torch.jit.ScriptModule)


def _hidden(site: _Site) -> tuple[str | None, str]:
    for name, module in site.path:
        if hides_types(module):
            return (
                "is of a TorchScript or exported module, which hides what its layers are: select and prune the eager "
                "model, then script or export it",
                name,
            )
    return None, ""


def _reparametrized(site: _Site) -> tuple[str | None, str]:
    """Return the refusal and the layer, as excluding one of its factors would only have the next one refused."""
    inside = isinstance(site.owner, nn.utils.parametrize.ParametrizationList)
    return refusal(site.owner, site.own_name), site.path[-3 if inside else -1][0]


def _adapter(site: _Site) -> tuple[str | None, str]:
    # By names, so that nothing need be installed: layers of peft have a base_layer that adapters merge into, others
    # (loralib, torchtune, diffusers) hold the factors or their layers beside the weight.
    for name, module in site.path:
        held = (*module._modules, *module._parameters)
        if any(LORA.search(own) for own in held) or (hasattr(module, "base_layer") and hasattr(module, "merge")):
            reason = (
                "belongs to a low-rank adapter, and pruning acts on the sum of weight and adapter: "
                "merge the adapter first (merge_and_unload() in peft)"
            )
            return reason, name
    return None, ""


def _unrankable(site: _Site) -> tuple[str | None, str]:
    return _no_rank(site.parameter), ""


def _no_rank(parameter: nn.Parameter) -> str | None:
    if parameter.is_quantized or (is_traceable_wrapper_subclass(parameter) and as_dtensor(parameter) is None):
        return f"is held as {type(parameter.data).__name__}: prune before quantizing"
    if parameter.is_complex():
        return f"is complex ({parameter.dtype}), and pruning has no rule for pairs of numbers: store two real tensors"
    if parameter.dtype not in DTYPES:
        return f"has dtype {parameter.dtype}: prune before quantizing, in bfloat16 or wider"
    if parameter.layout is not torch.strided:
        return f"is stored sparse ({parameter.layout}): replace it with its to_dense()"
    if parameter.is_meta:
        return "is on the meta device and has no values: load or initialize the weights first"
    return None


def _refuse_packed(model: nn.Module, excluded: _Selection, included: _Selection | None) -> None:
    """Refuse torch's quantized layers, which hold no parameters and would pass for having no weights."""
    for name, path in _paths(model):
        kind = type(path[-1][1])
        if not kind.__module__.startswith(_QUANTIZED) or "Embedding" in kind.__name__:
            continue
        packed = hasattr(path[-1][1], "_packed_params") or hasattr(path[-1][1], "_all_weight_values")
        site = _Site(f"{name}.weight", nn.Parameter(torch.empty(0)), path)
        if packed and not excluded.matches(site) and (included is None or included.matches(site)):
            raise ValueError(f"{name} is quantized: prune before quantizing, or leave it out: exclude=[{name!r}]")
