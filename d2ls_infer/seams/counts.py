"""What is counted in maps of the same pixels that were tiled in different ways. Arrays and integers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from d2ls_infer.labels import NODATA
from d2ls_infer.tiling import axis_windows

BINS = (0, 8, 16, 32, 64, 96, 128, 192)
"""Where the bins of the distance to a tile's edge begin, in pixels; the last one has no end."""

BESIDE_PX = 32
"""Seams are compared with the lines so far to either side of them. That is where the strides of a network fall alike,
which matters more than a seam does: D2LS gives its logits in blocks of 4 x 4 pixels, and of the neighbours in a tile
of `examples/naip_scene.tif` 3.8 % are of two classes where blocks meet, and 2.2 % inside them."""

AWAY_PX = 8
"""Lines nearer to a seam than this count only if they are one."""


@dataclass(frozen=True)
class Changes:
    """Pixels, or pairs of them, and how many of those change class."""

    of: int
    changed: int

    @property
    def share(self) -> float:
        """0..1; NaN of nothing."""
        return self.changed / self.of if self.of else math.nan


@dataclass(frozen=True)
class Bin(Changes):
    """Pixels at a distance of `low` to below `high` (None: any above)."""

    low: int
    high: int | None


@dataclass(frozen=True)
class Lines:
    """Pairs of neighbouring pixels across lines of one direction: seams, and the lines 32 pixels beside them."""

    seams: Changes
    beside: Changes

    @property
    def ratio(self) -> float:
        """How many times as often classes change at seams; NaN where they do not change beside them."""
        return self.seams.share / self.beside.share if self.beside.changed else math.nan

    @property
    def difference(self) -> float:
        """How much more often, as a share of the pairs; NaN without pairs."""
        return self.seams.share - self.beside.share


@dataclass(frozen=True)
class Maps:
    """What was counted in the maps of one way of tiling.

    compared: (width, height) of the pixels that are, in the part's middle. shifts: for each shifted grid, the pixels
    that both its map and the plain one know, and those that change class. columns: pairs to the left and right of
    vertical lines; rows: above and below horizontal ones; in all maps.
    """

    overlap_px: int
    blend: str
    compared: tuple[int, int]
    shifts: tuple[Changes, ...]
    columns: Lines
    rows: Lines

    @property
    def mean_share(self) -> float:
        """Of pixels that change class, the mean over the shifts."""
        return fmean(changes.share for changes in self.shifts)


def edge_distances(starts: Sequence[int], size: int, *, at_border: tuple[bool, bool] = (False, False)) -> np.ndarray:
    """(length,) int: of each place of an axis, how many places lie between it and the nearer end of its tile.

    Its tile is the one that gives the label where tiles are cut between their centres. at_border: whether the first
    tile begins, and the last one ends, at the scene's own border. Such an end is no edge: there is nothing beyond it
    that another tile could see.
    """
    distances = np.empty(starts[-1] + size, np.int64)
    place, far = np.arange(size), np.full(size, np.iinfo(np.int64).max)
    for index, (start, own) in enumerate(zip(starts, owned(starts, size), strict=True)):
        to_start = far if at_border[0] and index == 0 else place
        to_end = far if at_border[1] and index == len(starts) - 1 else place[::-1]
        distances[start : start + size][own] = np.minimum(to_start, to_end)[own]
    return distances


def seam_lines(starts: Sequence[int], size: int, window: str) -> np.ndarray:
    """(seams,) int: the places of an axis that a seam runs before; none at the ends of the axis.

    Blended tiles have one where a tile begins and where one ends; those that are cut ("none") where they are cut.
    """
    if window == "none":
        parts = zip(starts[1:], owned(starts, size)[1:], strict=True)
        return np.array([start + int(own.argmax()) for start, own in parts], np.int64)
    return np.unique([*starts[1:], *(start + size for start in starts[:-1])]).astype(np.int64)


def owned(starts: Sequence[int], size: int) -> list[np.ndarray]:
    """Of each tile along an axis, (size,) bool: where it gives the label if tiles are cut between their centres."""
    return [weights.numpy() > 0 for weights in axis_windows(tuple(starts), size, "none")]


def count_changes(one: np.ndarray, other: np.ndarray, where: np.ndarray | bool = True) -> Changes:
    """Of two maps, (h, w) uint8 of classes, 255 where there is none, or of those pixels of them."""
    known = (one != NODATA) & (other != NODATA) & where
    return Changes(int(known.sum()), int((known & (one != other)).sum()))


def count_lines(labels: np.ndarray, seams: np.ndarray) -> Lines:
    """The pairs of pixels of neighbouring rows of a map (h, w) uint8; of columns, if it comes transposed.

    seams: the rows that one runs before.
    """
    gaps = abs(np.arange(1, len(labels))[:, None] - seams)
    at = (gaps == 0).any(1)
    beside = (gaps == BESIDE_PX).any(1) & (gaps >= AWAY_PX).all(1)
    above, below = labels[:-1], labels[1:]
    return Lines(count_changes(above[at], below[at]), count_changes(above[beside], below[beside]))


def count_bins(one: np.ndarray, other: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> list[Changes]:
    """Of two maps (h, w) uint8, by the bin of each pixel's distance: the lesser of its row's (h,) and column's (w,)."""
    row_bins, col_bins = (np.digitize(axis, BINS).astype(np.uint8) - 1 for axis in (rows, cols))
    bins = np.minimum(row_bins[:, None], col_bins)
    return [count_changes(one, other, bins == index) for index in range(len(BINS))]


def total(counts: Sequence[Changes]) -> Changes:
    """All of them together."""
    return Changes(sum(part.of for part in counts), sum(part.changed for part in counts))


def worst_square(one: np.ndarray, other: np.ndarray, side: int) -> tuple[int, int, int]:
    """Of the squares of two maps, an eighth of a side apart, the one that changes most: pixels; first row, column."""
    changed = (one != other) & (one != NODATA) & (other != NODATA)
    step = max(1, side // 8)
    rows, cols = (np.arange(0, length, step) for length in changed.shape)
    counts = np.add.reduceat(np.add.reduceat(changed, rows, 0, dtype=np.int64), cols, 1)
    squares = sliding_window_view(counts, [min(8, length) for length in counts.shape]).sum((2, 3))
    row, col = np.unravel_index(squares.argmax(), squares.shape)
    return int(squares[row, col]), int(rows[row]), int(cols[col])
