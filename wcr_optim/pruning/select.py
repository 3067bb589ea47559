"""Ways to choose the weights that stay: by magnitude, N of every M, at random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from torch import Tensor, nn

from wcr_optim.parameters import Selector, prunable_weights
from wcr_optim.pruning.masks import Masks, pack
from wcr_optim.pruning.threshold import Scope, keepers

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
    bits = {name: pack(keeper(tensor), tensor.numel()) for name, tensor, keeper in keepers(weights, sparsity, scope)}
    return Masks.from_bits(bits, {name: tensor.shape for name, tensor in weights.items()})


def selected(model: nn.Module, exclude: Selection, include: Selection | None) -> dict[str, Tensor]:
    """Return the prunable weights, of which there must be some."""
    weights: dict[str, Tensor] = dict(prunable_weights(model, exclude, include=include))
    if not weights:
        raise ValueError(
            "the model has no weights to prune: no floating-point parameter of two or more dimensions "
            "is left beside norms, embeddings and what was excluded"
        )
    return weights
