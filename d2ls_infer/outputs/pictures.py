"""Small pictures of large scenes and maps, made while their rows and tiles go by."""

from __future__ import annotations

import numpy as np

from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.outputs.finished import Finished
from d2ls_infer.tiling import Tile, TileGrid

SIDE_PX = 1200
"""Rows and columns that a picture has at most."""

PAPER = 246
"""Grey of what a scene's picture shows where there are no data."""


class MapPicture:
    """A class map made smaller: a pixel is the class that most of the pixels in its square have, of equals the first.

    One row of squares is kept in memory, and the picture. Where the map is small, it is the map.
    """

    def __init__(self, height: int, width: int, side_px: int = SIDE_PX) -> None:
        self.step = -(-max(height, width) // side_px)
        self.width = width
        self.columns = -(-width // self.step)
        self.picture = np.full((-(-height // self.step), self.columns), NODATA, np.uint8)
        self.waiting = np.zeros((0, width), np.uint8)
        self.done = 0

    def add(self, rows: Finished) -> None:
        """Take finished rows in."""
        waiting = np.concatenate([self.waiting, rows.labels])
        while len(waiting) >= self.step:
            self.draw(waiting[: self.step])
            waiting = waiting[self.step :]
        self.waiting = waiting.copy()

    def draw(self, labels: np.ndarray) -> None:
        """One row of squares, of (step, width) uint8 or less."""
        column = np.arange(self.width) // self.step
        counts = np.bincount((column * 256 + labels).ravel(), minlength=256 * self.columns)
        self.picture[self.done] = counts.reshape(self.columns, 256).argmax(1)
        self.done += 1

    def result(self) -> np.ndarray:
        """(h, w) uint8 of classes, 255 where there is none."""
        if len(self.waiting):
            self.draw(self.waiting)
            self.waiting = self.waiting[:0]
        return self.picture


class ScenePicture:
    """A scene made smaller, out of the tiles that are read of it: the mean of the valid pixels in each square.

    names: of the bands. Red, green and blue are shown as such where there are all three, else the first three bands.
    """

    def __init__(self, grid: TileGrid, names: tuple[str, ...], side_px: int = SIDE_PX) -> None:
        self.step = -(-max(grid.height, grid.width) // side_px)
        height, width = -(-grid.height // self.step), -(-grid.width // self.step)
        known = [name.lower() for name in names]
        colors = [known.index(name) for name in ("red", "green", "blue") if name in known]
        self.bands = colors if len(colors) == 3 else [0, 1, 2] if len(names) > 2 else [0, 0, 0]
        self.sums = np.zeros((3, height, width), np.float32)
        self.counts = np.zeros((height, width), np.float32)

    def add(self, tile: Tile, values: np.ndarray, valid: np.ndarray) -> None:
        """Take in values (bands, h, w) and valid (h, w) bool of a tile."""
        if not valid.any():
            return
        rows, cols = (
            (start + np.arange(side)) // self.step for start, side in ((tile.row, tile.height), (tile.col, tile.width))
        )
        row_starts, col_starts = (np.flatnonzero(np.diff(axis, prepend=-1)) for axis in (rows, cols))
        where = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
        seen = np.concatenate([values[self.bands] * valid, valid[None]], dtype=np.float32)
        seen = np.add.reduceat(np.add.reduceat(seen, row_starts, 1), col_starts, 2)
        self.sums[:, *where] += seen[:3]
        self.counts[where] += seen[3]

    def result(self) -> np.ndarray:
        """(3, h, w) uint8, stretched over the 2nd to 98th percentile of each band."""
        valid = self.counts > 0
        if not valid.any():
            return np.full(self.sums.shape, PAPER, np.uint8)
        means = self.sums / np.maximum(self.counts, 1)
        low, high = np.percentile(means[:, valid], [2, 98], axis=1)[:, :, None, None]
        stretched = 255 * np.clip((means - low) / np.maximum(high - low, 1e-6), 0, 1)
        picture: np.ndarray = np.where(valid, stretched, PAPER).astype(np.uint8)
        return picture


def in_colors(classes: np.ndarray, labels: LabelMap) -> np.ndarray:
    """(h, w) class indices -> (4, h, w) uint8 red, green, blue, alpha; transparent where there is none."""
    return np.concatenate([labels.painted(classes), np.where(classes < len(labels), np.uint8(255), np.uint8(0))[None]])
