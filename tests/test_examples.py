"""The examples run as they stand, without a warning, and show what they promise."""

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
ELSEWHERE = ("fsdp2.py",)  # needs torchrun; tests/distributed has it


def numbers(line):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", line)]


def line(printed, name):
    """The numbers in a line that begins with a name, and then two blanks or a colon."""
    (found,) = re.findall(rf"^{re.escape(name)}(?:  |:)(.*)$", printed, flags=re.MULTILINE)
    return numbers(found)


def plain_loop(printed):
    without, concentrated = line(printed, "SGD"), line(printed, "SGD + WCR")
    assert abs(without[0] - concentrated[0]) < 2, "dense"
    assert without[-1] < 50 < 90 < concentrated[-1], "pruned by 98 %"


def sam_amp(printed):
    rows = {row[0]: row[1] for row in map(numbers, printed.splitlines()[1:])}
    assert list(rows) == [0, 80, 90, 95]
    assert min(rows.values()) > 90


def prune_and_ship(printed):
    dense, sparsity, loaded = line(printed, "accuracy")
    assert sparsity == 95
    assert loaded > dense - 2 > 93
    assert line(printed, "on disk")[-1] < 10, "percent of the dense file"
    assert "loaded bit for bit: True" in printed


def trainer(printed):
    without, concentrated = line(printed, "AdamW"), line(printed, "AdamW + WCR")
    assert concentrated[0] < without[0] + 0.2, "dense"
    assert concentrated[-1] < without[-1] - 0.4, "pruned by 90 %"


def lora(printed):
    adapters, concentrated = line(printed, "adapters"), line(printed, "adapters + WCR")
    everything = line(printed, "all weights + WCR")
    assert adapters[0] < line(printed, "not fine-tuned")[0]
    assert everything[-1] < min(adapters[-1], concentrated[-1]) - 0.1, "pruned by 90 %"


CHECKS = {check.__name__: check for check in (plain_loop, sam_amp, prune_and_ship, trainer, lora)}
# peft 0.21 asks transformers 5.23 for an attribute by the name that it is losing in version 6.
NOT_OURS = {"lora": pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")}
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=NOT_OURS.get(path.stem, ()))
    for path in sorted(FOLDER.glob("*.py"))
    if path.name not in ELSEWHERE
]


@pytest.mark.parametrize("path", EXAMPLES)
def test_example(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.strip(), "an example prints what it found"
    if path.stem in CHECKS:
        CHECKS[path.stem](printed)
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_there_are_examples():
    assert CHECKS.keys() <= {path.stem for path in FOLDER.glob("*.py")}
