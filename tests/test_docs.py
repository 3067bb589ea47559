"""The Python blocks of the documentation run as they stand, those of a page one after the other.

They find torch, nn and a small model. What else a page's blocks need and its reader need not see is in a comment,
between a line `<!-- setup` and a line `-->`. A block that cannot run says why in a comment before it,
`<!-- not run: reason -->`.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import wcr_optim
from wcr_optim import pruning

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```python\n(?P<code>.*?)^```$|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.DOTALL | re.MULTILINE,
)


def blocks(page):
    """Return a page's code that runs, each block with the number of its first line."""
    text = PAGES[page]
    found = []
    for match in BLOCK.finditer(text):
        part = "setup" if match["code"] is None else "code"
        if match["reason"] is None:
            found.append((text.count("\n", 0, match.start(part)) + 1, match[part]))
    return found


@pytest.mark.parametrize("page", sorted(page for page in PAGES if blocks(page)))
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    names = {"__name__": page, "torch": torch, "nn": nn, "model": model}
    for line, code in blocks(page):
        # Compiled with the page's own name and lines, so that a failure points at them.
        exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), names)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert {f"docs/{path}" for path in re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)} == set(PAGES)


def test_the_reference_names_everything_public():
    listed = set(re.findall(r"^::: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE))
    listed |= {name.removesuffix(".sweep").removesuffix(".report") for name in listed}  # modules called as these
    modules = {"metrics", "plots", "penalties", "pruning"}
    assert {f"wcr_optim.{name}" for name in wcr_optim.__all__ if name not in modules} <= listed
    assert {f"wcr_optim.pruning.{name}" for name in pruning.__all__} <= listed


def test_there_is_something_to_run():
    assert sum(len(blocks(page)) for page in PAGES) > 20
