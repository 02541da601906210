"""Where the tiles of a raster lie. Integer geometry only."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from d2ls_infer.errors import UsageError


class Tile(NamedTuple):
    """A rectangle of pixels: first row and column, number of rows and columns."""

    row: int
    col: int
    height: int
    width: int


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a raster of `height` x `width` pixels: squares of `size`, neighbours share `overlap_px` or more.

    Laws: tiles are unique and row-major, lie inside the raster and cover every pixel; all are of one shape, the square
    clipped to the raster. The last tile of a row or column is moved inwards instead of reaching past the raster.
    Raises UsageError for a side below 1, and for an overlap that would leave no step between tiles.
    """

    height: int
    width: int
    size: int
    overlap_px: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UsageError(f"a raster has at least one row and column, got {self.height} x {self.width}")
        if self.size < 1:
            raise UsageError(f"tile size must be at least 1 pixel, got {self.size}; try 512")
        if not 0 <= self.overlap_px < self.size:
            raise UsageError(
                f"overlap must be at least 0 and below the tile size of {self.size} pixels, got {self.overlap_px}; "
                f"try {self.size // 4}"
            )

    @property
    def row_starts(self) -> tuple[int, ...]:
        """First row of each row of tiles, ascending."""
        return axis_starts(self.height, self.size, self.overlap_px)

    @property
    def col_starts(self) -> tuple[int, ...]:
        """First column of each column of tiles, ascending."""
        return axis_starts(self.width, self.size, self.overlap_px)

    @property
    def tile_height(self) -> int:
        return min(self.size, self.height)

    @property
    def tile_width(self) -> int:
        return min(self.size, self.width)

    def touching(self, start: int, stop: int, together: int = 1) -> tuple[int, int]:
        """Which rows of tiles touch the rows `start` to `stop` of the raster: the first, and one after the last.

        together: whole groups of so many rows of tiles, counted from the top.
        """
        starts = self.row_starts
        first, last = bisect_right(starts, start - self.tile_height), bisect_left(starts, stop)
        return first // together * together, min(len(starts), -(-last // together) * together)

    def __len__(self) -> int:
        return len(self.row_starts) * len(self.col_starts)

    def __iter__(self) -> Iterator[Tile]:
        for row in self.row_starts:
            for col in self.col_starts:
                yield Tile(row, col, self.tile_height, self.tile_width)


def axis_starts(length: int, size: int, overlap_px: int) -> tuple[int, ...]:
    """Starts of the tiles along one axis. The last tile ends at `length`; a raster within one tile has one start, 0."""
    if length <= size:
        return (0,)
    last = length - size
    return (*range(0, last, size - overlap_px), last)


def parse_overlap(overlap: int | float | str, size: int) -> int:
    """An overlap in pixels (a whole number) or as a share of the tile (below 1, "0.25" or "25%") -> pixels.

    Raises UsageError for anything else.
    """
    text = str(overlap).strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise UsageError(f"overlap must be a number of pixels or a share of the tile, got {overlap!r}") from error
    is_share = text.endswith("%") or 0 < value < 1 or text == "1.0"  # all of a tile, which cannot be; not one pixel
    if value < 0 or (is_share and value >= 1) or not (is_share or value.is_integer()):
        raise UsageError(
            f"overlap must be whole pixels below the tile size, or a share of the tile below 1, got {overlap!r}; "
            "try 0.25"
        )
    # 29 % of 100 is 28.999999999999996 in floating point
    return int(value * size + 1e-9) if is_share else int(value)
