"""Tables as readable text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], rules: Collection[int] = (), left: Collection[int] = (0,)) -> str:
    """Set a table in columns of equal width.

    Args:
        rows: Cells, as many in every row.
        rules: Rows before which to draw a line (default: ())
        left: Columns to set to the left; the others are set to the right, as numbers are (default: (0,))

    Returns:
        Lines without a final newline.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for i, row in enumerate(rows):
        if i in rules:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
