"""The measurement of overhead: what its rows do is what they say, and what it writes can be read again."""

import csv
from types import SimpleNamespace

import pytest
import torch
from reference import small_batch, small_net
from torch import nn

from benchmarks import overhead
from benchmarks.shapes import SHAPES, Shape
from wcr_optim import WCR, compiled

ROWS = 12
needs_compiler = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))


class Net(nn.Module):
    """small_net as transformers' models are called."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x, y):
        return SimpleNamespace(loss=(self.net(x) - y).square().mean())


@pytest.fixture
def tiny(monkeypatch):
    batch = dict(zip("xy", small_batch(0), strict=True))
    monkeypatch.setitem(SHAPES, "gpt2_small", Shape("Tiny", Net, lambda _: batch, {"cpu": 8}, "{} examples"))
    monkeypatch.setattr(overhead, "COPIED", 2**16)


def test_the_naive_step_is_wcrs():
    weights = [nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(5, 4))]
    ours = [w.detach().clone().requires_grad_() for w in weights]
    for w in ours:
        w.grad = torch.zeros_like(w)
    overhead.naive_(weights, 0.01)
    WCR(torch.optim.SGD(ours, lr=1.0), 0.01, eps=1e-8).step()
    torch.testing.assert_close(weights, ours)


@needs_compiler
def test_all_rows_step_from_the_same_state_to_weights_of_the_same_size(monkeypatch):
    torch.manual_seed(0)
    finals = {}
    monkeypatch.setattr(overhead, "STRENGTH", 1e-1)
    for index in range(ROWS):
        net = small_net()
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        row = overhead.rows(list(net.parameters()), "cpu")[index]
        row.step()
        finals[row.name] = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    for name in ("+ naive step", "WCR(AdamW), compiled", "AdamW(fused=True)"):
        torch.testing.assert_close(finals[name], finals["WCR(AdamW), eager"])
    for name in ("L1Decay(AdamW)", "WCR per unit (AdamW)"):
        torch.testing.assert_close(finals[f"{name}, compiled"], finals[f"{name}, eager"])
    assert len(finals) == ROWS
    assert not torch.equal(finals["WCR(AdamW), eager"], finals["torch AdamW, fused"])


@needs_compiler
def test_it_writes_its_table_and_the_documents(tiny, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    page = tmp_path / "speed.md"
    cuda = "<!-- measured on cuda -->\nstays\n<!-- end -->\n"
    page.write_text(f"before\n<!-- measured on cpu -->\nold\n<!-- end -->\nbetween\n{cuda}after\n")
    monkeypatch.setattr(overhead, "DOCS", tmp_path)
    arguments = ["--models", "gpt2_small", "--dtypes", "float32", "--rounds", "2", "--threads", str(threads)]
    assert overhead.main([*arguments, "--write-docs"]) == 0
    with (tmp_path / "results" / "overhead.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == ROWS
    for row in table:
        assert float(row["step_ms"]) > 0
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    text = page.read_text()
    assert text.startswith("before\n<!-- measured on cpu -->\nMeasured on ")
    assert "old" not in text
    assert text.endswith(f"<!-- end -->\nbetween\n{cuda}after\n")
    assert "| WCR(AdamW), compiled | " in text
    assert "WCR(AdamW), compiled" in capsys.readouterr().out


def test_the_page_has_the_markers():
    text = (overhead.DOCS / "speed.md").read_text()
    for device in ("cpu", "cuda"):
        assert text.count(overhead.BEGIN.format(device)) == 1
    assert text.count(overhead.END) == 2


def test_wrong_arguments_are_refused(capsys):
    for arguments in (["--models", "gpt5"], ["--dtypes", "int8"], ["--rounds", "1"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            overhead.main(arguments)
        assert arguments[1] in capsys.readouterr().err
