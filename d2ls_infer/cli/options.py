"""Options that several commands share, and how tables look on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

model = click.option(
    "-m", "--model", required=True, metavar="NAME|FILE", help="A name that `d2ls models` lists, or a weights file."
)


def tiles(command: Command) -> Command:
    """--tile-size, --overlap and --blend."""
    for option in (
        click.option(
            "--blend",
            type=click.Choice(["hann", "gaussian", "linear", "none"]),
            default="hann",
            show_default=True,
            help="How overlapping tiles are weighed; none cuts between their centres.",
        ),
        click.option(
            "--overlap", default="0.25", show_default=True, help="Of neighbouring tiles: pixels, or a share of a tile."
        ),
        click.option("--tile-size", type=int, default=512, show_default=True, help="Side of a tile in pixels."),
    ):
        command = option(command)
    return command


tta = click.option(
    "--tta",
    type=click.Choice(["none", "flip", "d4", "multiscale"]),
    default="none",
    show_default=True,
    help="Test-time augmentation: the mean over several views of each tile.",
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


@contextmanager
def progress_bar(title: str, *, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on standard error, silent where that is no terminal.

    Gives a function that takes how many are done and how many there are.
    """
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, disable=True if quiet else None, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
