"""Options that several commands share, and how tables look on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import click

model = click.option(
    "-m", "--model", required=True, metavar="NAME|FILE", help="A name that `d2ls models` lists, or a weights file."
)
overwrite = click.option("-f", "--overwrite", is_flag=True, help="Replace an output that exists.")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
precision = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Number type of the network's products.",
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Columns under their headings, two spaces apart; the columns in `right` (from 0) are set to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)
