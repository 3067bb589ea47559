"""Tables as text."""

from wcr_optim.tables import aligned

ROWS = [["name", "n", "note"], ["a", "1,000", ""], ["all", "7", "lost"]]


def test_columns():
    assert aligned(ROWS).splitlines() == ["name      n  note", "a     1,000", "all       7  lost"]
    assert aligned(ROWS, left=()).splitlines() == ["name      n  note", "   a  1,000", " all      7  lost"]
    assert aligned([["x", "y"], ["a", "long"], ["b", "c"]], left=(1,)).splitlines() == ["x  y", "a  long", "b  c"]


def test_rules():
    assert aligned(ROWS, rules=(1, 2)).splitlines() == [
        "name      n  note",
        "-----------------",
        "a     1,000",
        "-----------------",
        "all       7  lost",
    ]
