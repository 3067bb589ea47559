"""The README's Python blocks run as they stand, and its table of results is that of the stored runs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import wcr_optim
from benchmarks import report
from wcr_optim import pruning

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))

    def closure():
        model.zero_grad()
        loss = model(torch.randn(4, 1, 8, 8)).square().mean()
        loss.backward()
        return loss

    names = {
        "torch": torch,
        "wcr_optim": wcr_optim,
        "pruning": pruning,
        "model": model,
        "training_batches": [torch.randn(4, 1, 8, 8)],
        "evaluate": lambda pruned: pruned(torch.zeros(1, 1, 8, 8)).sum().item(),
        "closure": closure,
    }
    exec(block, names)
    weights = pruning.prunable_weights(model).values()
    assert isinstance(names.get("optimizer"), torch.optim.Optimizer) or "optimizer" not in block
    if "magnitude_masks" in block:
        total = sum(w.numel() for w in weights)
        assert sum((w == 0).sum().item() for w in weights) == round((0.97 if "0.97" in block else 0.95) * total)


def test_the_table_of_results_is_what_the_stored_runs_say():
    table = report.brief(report.stored(README.parent / "docs" / "results"))
    assert table.count("SGD") >= 6
    assert table in README.read_text(encoding="utf-8")


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
