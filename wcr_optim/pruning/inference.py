"""Running a pruned network on torch's sparse kernels.

Both functions return a copy whose linear layers hold their weights in a sparse layout, for inference only. Whether that
is faster than dense depends on sparsity, batch and machine: ``python -m benchmarks inference`` measures it on yours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

# Their forward hands the weights of their linear layers to fused kernels, which know no sparse layout.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

# Below this many rows of input, a product of matrix and vector for each of them is the faster one on a CPU.
_FEW_ROWS = 4


class CSRLinear(nn.Linear):
    """A linear layer whose weight is a matrix in compressed sparse rows; made by `to_csr`, for inference."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: Shape (..., in_features), of the weight's dtype. Under autocast it is brought there, and the result
                has that dtype too, since torch has no sparse products in lower precision.

        Returns:
            Shape (..., out_features), contiguous.
        """
        # Not F.linear: dense times the transposed sparse weight takes several times as long as sparse times dense, and
        # it fails in inference mode.
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(self.weight.dtype)
        with torch.autocast(device, enabled=False):
            rows = input.reshape(-1, self.in_features)
            if 0 < len(rows) < _FEW_ROWS:
                output = torch.stack([self.weight.mv(row) for row in rows])
            else:
                output = (self.weight @ rows.t()).t().contiguous()
            if self.bias is not None:
                output = output + self.bias
        return output.view(*input.shape[:-1], self.out_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> CSRLinear:
        # torch copies no parameter in this layout.
        memo.setdefault(id(self.weight), nn.Parameter(self.weight.detach().clone(), requires_grad=False))
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CSRLinear:
        # Nor does it put one of another dtype in its place, as .double() would.
        weight = self.weight
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            weight = nn.Parameter(fn(weight.detach()), requires_grad=False)
        finally:
            self.weight = weight
        return self


def to_csr(model: Module, min_sparsity: float = 0.8) -> Module:
    """Copy a pruned model, its sparse linear layers in compressed sparse rows (CSR).

    Takes ``nn.Linear`` whose weight is sparse enough; subclasses, and the layers inside torch's fused attention and
    transformer modules, stay dense. Results agree with the dense model's up to rounding. On a CPU, torch multiplies CSR
    matrices in float32 and float64 only. A weight shared with an embedding is shared no longer.

    Args:
        model: A pruned model; it is not changed.
        min_sparsity: Layers with a smaller share of zeros stay dense, where they are faster (default: 0.8)

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: If no layer can be converted; the message says why not.
    """
    if not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity must lie in [0, 1], got {min_sparsity!r}")

    def convert(layer: nn.Linear) -> str | None:
        weight = layer.weight.detach()
        sparsity = 1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
        if sparsity < min_sparsity:
            return f"its sparsity is {sparsity:.3f}, less than {min_sparsity:g}"
        if weight.device.type == "cpu" and weight.dtype not in (torch.float32, torch.float64):
            return f"on a CPU torch does not multiply CSR matrices of {weight.dtype}; use model.float()"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
            wide = weight.to_sparse_csr()
            # Half the bytes of the default indices, and what the libraries below torch work with.
            rows, columns = wide.crow_indices().int(), wide.col_indices().int()
            sparse = torch.sparse_csr_tensor(rows, columns, wide.values(), weight.shape)
        layer.weight = nn.Parameter(sparse, requires_grad=False)
        layer.__class__ = CSRLinear  # in place of a new module: hooks and attributes stay
        return None

    return _converted(model, convert)


def to_semi_structured(model: Module) -> Module:
    """Copy a model pruned 2:4, its linear layers in the layout of the sparse tensor cores of NVIDIA GPUs.

    Takes ``nn.Linear`` with at most two weights in every four along the input, in a shape that
    `torch.sparse.to_sparse_semi_structured` accepts; subclasses, and the layers inside torch's fused attention and
    transformer modules, stay dense.

    Args:
        model: A model on a GPU of compute capability 8.0 or newer, in float16 or bfloat16; it is not changed.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: If no layer can be converted; the message says why not.
    """

    def convert(layer: nn.Linear) -> str | None:
        weight = layer.weight.detach()
        # torch does not check, and drops what does not fit the pattern.
        if layer.in_features % 4 or bool(
            (torch.count_nonzero(weight.view(layer.out_features, layer.in_features // 4, 4), dim=2) > 2).any()
        ):
            return "it has more than two weights in some four along its input; prune with n_m_masks(model, 2, 4)"
        if not weight.is_cuda:
            return f"it is on {weight.device}, and semi-structured sparsity needs a CUDA device"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
                sparse = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        except (RuntimeError, NotImplementedError) as error:
            return str(error)
        layer.weight = nn.Parameter(sparse, requires_grad=False)
        return None

    return _converted(model, convert)


def _converted(model: Module, convert: Callable[[nn.Linear], str | None]) -> Module:
    """Copy a model and convert its plain linear layers, all but those for which ``convert`` returns a reason."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "weight" not in module._parameters:
            raise ValueError(
                f"the weight of {name or 'the model'} is computed at every call; make it permanent first, with "
                "torch.nn.utils.prune.remove(module, 'weight')"
            )
    model = copy.deepcopy(model).eval()
    inside = {id(child) for module in model.modules() if isinstance(module, _FUSED) for child in module.modules()}
    reasons = {}
    converted = False
    for name, module in list(model.named_modules()):
        if isinstance(module, CSRLinear):
            reasons[name or type(module).__name__] = "its weight is in compressed sparse rows already"
        if type(module) is not nn.Linear or id(module) in inside:
            continue
        reason = convert(module)
        converted |= reason is None
        if reason is not None:
            reasons[name or type(module).__name__] = reason
    if not converted:
        found = [f"{name}: {reason}" for name, reason in list(reasons.items())[:3]] or [
            "it has no nn.Linear of its own"
        ]
        more = f"; and {len(reasons) - 3} more layers" if len(reasons) > 3 else ""
        raise ValueError(f"no layer of the model can be converted. {'; '.join(found)}{more}")
    return model
