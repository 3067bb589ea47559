"""How sharp a minimum is: the largest eigenvalue of the loss's Hessian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def largest_eigenvalue(
    network: nn.Module, loss: Callable[[], Tensor], iterations: int = 30, tolerance: float = 1e-2
) -> float:
    """Find the Hessian's eigenvalue of largest magnitude by power iteration on Hessian-vector products.

    v <- H v / |H v|, and the eigenvalue is v . H v (Rayleigh quotient); the network is in evaluation mode, so that
    BatchNorm and dropout are fixed maps.

    Args:
        network: The network.
        loss: Computes the loss with the network's present weights.
        iterations: At most this many products (default: 30)
        tolerance: Relative change of the eigenvalue at which the iteration ends (default: 1e-2)

    Returns:
        The eigenvalue, NaN where the loss is not finite.
    """
    weights = [p for p in network.parameters() if p.requires_grad]
    training = network.training
    network.eval()
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(w.shape, generator=generator).to(w) for w in weights]
    eigenvalue = 0.0
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            gradients = torch.autograd.grad(
                loss(), weights, create_graph=True, allow_unused=True, materialize_grads=True
            )
            for _ in range(iterations):
                length = torch.stack([v.square().sum() for v in vector]).sum().sqrt()
                vector = [v / length for v in vector]
                product = torch.autograd.grad(
                    gradients, weights, vector, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                before = eigenvalue
                eigenvalue = sum((v * h).sum().item() for v, h in zip(vector, product, strict=True))
                if not abs(eigenvalue - before) > tolerance * abs(eigenvalue):
                    break
                vector = [h.detach() for h in product]
    finally:
        network.train(training)
    return eigenvalue
