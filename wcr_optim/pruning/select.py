"""Ways to choose the weights that stay: by magnitude, N of every M, at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from wcr_optim.parameters import Selector, prunable_weights, unwrapped
from wcr_optim.pruning.masks import Masks
from wcr_optim.pruning.patterns import check_not_nan, chunk_size, chunks, magnitude_bits
from wcr_optim.pruning.search import Cut, Stream, find_cuts
from wcr_optim.pruning.shards import common_mesh, find_sharded_cuts, whole
from wcr_optim.pruning.threshold import Keeper, Scope, check_scope

Selection: TypeAlias = "Iterable[Selector] | Selector"


def magnitude_masks(
    model: nn.Module,
    sparsity: float,
    scope: Scope = "global",
    exclude: Selection = (),
    *,
    include: Selection | None = None,
) -> Masks:
    """Keep the weights of largest magnitude, exactly as many as asked for.

    ``round(sparsity * n)`` of n weights are pruned; weights of equal magnitude are told apart by position, the earlier
    ones being kept, so that the same weights always give the same masks and a higher sparsity keeps a subset of what
    a lower one keeps. The sparsity is a share of all selected weights, those that are zero already among them: pruning
    an already pruned model at the same sparsity changes nothing.

    Weights that are DTensors (FSDP2, tensor parallelism) are ranked over all ranks of their mesh, which must all
    enter, and give every rank the same masks as the undivided weights would.

    Args:
        model: The model; ``torch.compile`` and data-parallel wrappers around it are looked through.
        sparsity: Share of the weights to prune, in [0, 1].
        scope: Rank the weights of all layers together (``"global"``) or each layer on its own (``"layer"``, which
            prunes every layer by the same share) (default: "global")
        exclude: Layers to leave dense, in the forms that `prunable_weights` takes (default: ())
        include: Prune only these; None stands for all prunable weights (default: None)

    Returns:
        Masks of the weights that `prunable_weights` selects.

    Raises:
        ValueError: If the sparsity lies outside [0, 1], the scope is unknown, a weight is NaN, there is nothing to
            prune, and as `prunable_weights`.
    """
    weights = selected(model, exclude, include)
    (cuts,) = weight_cuts(weights, (sparsity,), scope)
    marked = (keeper(whole(weight)) for weight, keeper in zip(weights.values(), weight_keepers(cuts), strict=True))
    return Masks.from_chunks(_shapes(weights), marked)


def stream_masks(stream: Stream, sparsity: float, scope: Scope = "global") -> Masks:
    """Keep the weights of largest magnitude among tensors that need not exist at the same time.

    For checkpoints larger than the memory: beside the masks themselves it takes no more than the tensor at hand.

    Args:
        stream: Called for every pass, returns the same weights in the same order each time. Ranking all together
            mostly takes three passes, and a few more for weights that a sample says little about; ranking by layer
            takes two.
        sparsity: Share of the weights to prune, in [0, 1].
        scope: As in `magnitude_masks` (default: "global")

    Returns:
        Masks of all tensors of the stream.

    Raises:
        ValueError: If the sparsity lies outside [0, 1], the scope is unknown, a weight is NaN, or the stream differs
            from one pass to the next.
    """
    check_scope(scope)
    shapes: dict[str, torch.Size] = {}

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream():
            shapes[name] = tensor.shape
            yield name, tensor
            del tensor  # before the next one is made

    if scope == "global":
        cuts = find_cuts(noted, (sparsity,)) * len(shapes)
    else:
        cuts = [find_cuts({name: tensor}.items, (sparsity,))[0] for name, tensor in noted()]

    def marked() -> Iterator[Iterator[Tensor]]:
        expected = iter(zip(shapes.items(), weight_keepers(cuts), strict=True))
        for name, tensor in stream():
            known, keeper = next(expected, (None, None))
            if keeper is None or known != (name, tensor.shape):
                raise ValueError(f"the stream yields {name} of shape {tuple(tensor.shape)} where it had {known} before")
            yield keeper(tensor)
            del tensor
        for (name, _), _ in expected:
            raise ValueError(f"the stream ends before {name}, which it had before")

    return Masks.from_chunks(shapes, marked())


def random_masks(
    model: nn.Module,
    sparsity: float,
    scope: Scope = "global",
    seed: int = 0,
    exclude: Selection = (),
    *,
    include: Selection | None = None,
) -> Masks:
    """Keep randomly chosen weights: the floor that every criterion has to beat.

    Args:
        model: The model.
        sparsity: Share of the weights to prune, in [0, 1].
        scope: Draw from all weights together, or the same share from each layer (default: "global")
        seed: Of the draw; global random state is neither used nor changed. With one seed, a higher sparsity keeps a
            subset of what a lower one keeps (default: 0)
        exclude: As in `magnitude_masks` (default: ())
        include: As in `magnitude_masks` (default: None)

    Returns:
        Masks with the counts of `magnitude_masks`.

    Raises:
        ValueError: As `magnitude_masks`.
    """
    shapes = _shapes(selected(model, exclude, include))

    def noise() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            yield name, torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    return stream_masks(noise, sparsity, scope)


def n_m_masks(
    model: nn.Module, n: int = 2, m: int = 4, exclude: Selection = (), *, include: Selection | None = None
) -> Masks:
    """Keep the n largest of every m consecutive weights along the input dimension.

    The pattern of sparse matrix units (2:4) and its relatives (4:8, 1:4). The input dimension is the second one of
    linear, convolutional, recurrent and attention weights, the first one of GPT-2's ``Conv1D`` and of transposed
    convolutions. Equal magnitudes are told apart by position, the earlier being kept. Layers whose input dimension is
    no multiple of m stay dense, as sparse kernels have no form for them: their masks keep everything.

    Args:
        model: The model.
        n: Weights to keep of every m (default: 2)
        m: Length of the groups (default: 4)
        exclude: Layers to leave dense, in the forms that `prunable_weights` takes (default: ())
        include: Prune only these; None stands for all prunable weights (default: None)

    Returns:
        Masks of the weights that `prunable_weights` selects.

    Raises:
        ValueError: If not 0 <= n <= m with m >= 1, a weight is NaN, no layer's input dimension is a multiple of m, a
            layer has no known input dimension, and as `prunable_weights`.
        TypeError: If n or m is no integer.
    """
    try:
        n, m = index(n), index(m)
    except TypeError as error:
        raise TypeError(f"an N:M pattern needs two integers, got {n!r}:{m!r}") from error
    if not (m >= 1 and 0 <= n <= m):
        raise ValueError(f"an N:M pattern needs 0 <= n <= m and m >= 1, got {n}:{m}")
    model = unwrapped(model)
    weights = selected(model, exclude, include)
    layouts = {name: input_dimension(model, name, tensor) for name, tensor in weights.items()}
    fitting = [name for name, (dim, groups) in layouts.items() if weights[name].shape[dim] // groups % m == 0]
    if not fitting:
        sizes = {name: weights[name].shape[dim] for name, (dim, _) in list(layouts.items())[:3]}
        raise ValueError(f"no layer's input dimension is a multiple of m={m}; the first ones are {sizes}")

    def marked() -> Iterator[Iterator[Tensor]]:
        for name, tensor in weights.items():
            if name in fitting and tensor.numel():
                yield chunks(_n_of_m(name, whole(tensor), layouts[name][0], n, m))
            else:
                yield chunks(torch.ones(tensor.shape, dtype=torch.bool, device="cpu"))

    return Masks.from_chunks(_shapes(weights), marked())


def selected(model: nn.Module, exclude: Selection, include: Selection | None) -> dict[str, Tensor]:
    """Return the prunable weights, of which there must be some."""
    weights: dict[str, Tensor] = dict(prunable_weights(model, exclude, include=include))
    if not weights:
        raise ValueError(
            "the model has no weights to prune: no floating-point parameter of two or more dimensions "
            "is left beside norms, embeddings and what was excluded"
        )
    return weights


def weight_cuts(weights: Mapping[str, Tensor], sparsities: Sequence[float], scope: Scope) -> list[list[Cut]]:
    """Return for every sparsity one cut per weight; it is the same object for weights that are ranked together."""
    check_scope(scope)
    mesh = common_mesh(weights)

    def find(tensors: Mapping[str, Tensor]) -> list[Cut]:
        return find_cuts(tensors.items, sparsities) if mesh is None else find_sharded_cuts(tensors, sparsities, mesh)

    if scope == "global":
        return [[cut] * len(weights) for cut in find(weights)]
    by_weight = [find({name: tensor}) for name, tensor in weights.items()]
    return [list(cuts) for cuts in zip(*by_weight, strict=True)]


def weight_keepers(cuts: Sequence[Cut]) -> list[Keeper]:
    """Return a keeper for every weight, shared by those that share a cut."""
    shared = {id(cut): Keeper(cut) for cut in cuts}
    return [shared[id(cut)] for cut in cuts]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def input_dimension(model: nn.Module, name: str, weight: Tensor) -> tuple[int, int]:
    """Return the dimension that a layer sums over, and the number of groups that lie along it."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, _ConvTransposeNd):
        return 0, owner.groups
    is_conv1d = any(kind.__name__ == "Conv1D" for kind in type(owner).__mro__)
    if is_conv1d and hasattr(owner, "nf"):  # GPT-2's, without importing transformers
        return 0, 1
    # What a layer calls its weight lies as in torch's own; a parameter by another name may be multiplied from either
    # side, as CLIP's projections are.
    known = isinstance(owner, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)) or name.endswith("weight")
    if isinstance(owner, _ConvNd) or (weight.ndim == 2 and known):
        return 1, 1
    raise ValueError(
        f"{name} of {type(owner).__name__} has {weight.ndim} dimensions, and which of them is the input is not known: "
        f"leave it dense with exclude=[{name!r}]"
    )


def _n_of_m(name: str, weight: Tensor, dim: int, n: int, m: int) -> Tensor:
    by_row = weight.movedim(dim, -1)
    keep = torch.empty(by_row.shape, dtype=torch.bool, device=weight.device)
    key_dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    rows = max(1, chunk_size(weight) // max(1, by_row[0].numel()))
    for part, marks in zip(torch.split(by_row, rows), torch.split(keep, rows), strict=True):
        bits = magnitude_bits(part.reshape(-1), key_dtype)
        check_not_nan(name, bits)
        group = bits.reshape(-1, m).T
        for place, values in enumerate(group):
            ahead = (group[:place] >= values).sum(0) + (group[place + 1 :] > values).sum(0)
            marks.view(-1, m)[:, place] = torch.as_tensor(ahead < n, device=part.device)
    return keep.movedim(-1, dim)
