"""One-shot pruning: exact masks, evaluation at many sparsities, statistics, reports and files."""

from wcr_optim.files import WeightFileError
from wcr_optim.parameters import prunable_weights
from wcr_optim.pruning.apply import applied, apply_
from wcr_optim.pruning.batchnorm import recalibrate_batchnorm
from wcr_optim.pruning.inference import to_csr, to_semi_structured
from wcr_optim.pruning.masks import Masks
from wcr_optim.pruning.report import LayerReport, PruningReport, report
from wcr_optim.pruning.select import magnitude_masks, n_m_masks, random_masks, stream_masks
from wcr_optim.pruning.sparse_file import load_sparse, read_sparse, save_sparse
from wcr_optim.pruning.sweep import SweepResult, SweepRow, sweep
from wcr_optim.pruning.torch_prune import from_torch_prune, to_torch_prune

__all__ = [
    "LayerReport",
    "Masks",
    "PruningReport",
    "SweepResult",
    "SweepRow",
    "WeightFileError",
    "applied",
    "apply_",
    "from_torch_prune",
    "load_sparse",
    "magnitude_masks",
    "n_m_masks",
    "prunable_weights",
    "random_masks",
    "read_sparse",
    "recalibrate_batchnorm",
    "report",
    "save_sparse",
    "stream_masks",
    "sweep",
    "to_csr",
    "to_semi_structured",
    "to_torch_prune",
]
