"""Areas of one class in a label map and their outlines, found row by row in pixels; no file, no coordinate system."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from d2ls_infer.labels import NODATA

PIECE_PIXELS = 1 << 21
"""Pixels looked at together; a band of rows is taken in pieces of this size."""

# Where a corner's pixel lies from its vertex, as (row, col) of the 2 x 2 pixels around it.
POSITIONS = ((1, 1), (1, 0), (0, 0), (0, 1))
# Whether a convex corner there is reached along a column. With the area to the right of the way, the way round an
# area goes east along its top, south along its right side, west along its bottom, and north along its left side.
BY_COLUMN = (True, False, True, False)


class Area(NamedTuple):
    """Pixels of one class that hang together by their sides.

    rings: (corners, 2) int64 row and column of each corner; the outer ring first, clockwise in the picture, then those
    of the holes, the other way. Rings do not repeat their first corner, which is the highest, of several the leftmost.
    sums: of the values given for its pixels, a number for each kind.
    """

    label: int
    pixels: int
    sums: tuple[float, ...]
    rings: list[np.ndarray]


class Corners(NamedTuple):
    """Turns of outlines: whose, where, and which way. One array each; `mark` holds the directions as bits."""

    area: np.ndarray
    row: np.ndarray
    col: np.ndarray
    mark: np.ndarray

    def where(self, chosen: np.ndarray) -> Corners:
        return Corners(*(values[chosen] for values in self))

    @classmethod
    def join(cls, parts: list[Corners]) -> Corners:
        return cls(*(np.concatenate(values) for values in zip(*parts, strict=True)))


TO_RIGHT, DOWN, IN_BY_COLUMN = 1, 2, 4
"""Bits of a corner's mark: its horizontal side goes to the right, its vertical one down, and the way comes along it."""


@dataclass
class OpenArea:
    """An area that reaches the last row seen, and may go on below."""

    label: int
    pixels: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    corners: list[Corners] = field(default_factory=list)

    def take(self, other: OpenArea) -> None:
        """Become one with another."""
        self.pixels += other.pixels
        self.sums = self.sums + other.sums
        if len(other.corners) > len(self.corners):  # the shorter list goes into the longer
            self.corners, other.corners = other.corners, self.corners
        self.corners += other.corners


class Outliner:
    """Label maps -> areas and their outlines. Rows come from top to bottom; an area is given once no row can add to it.

    Law: the areas are those of the whole map, whatever the heights of the bands it comes in; put back on the grid they
    are the map, pixel by pixel. Pixels that touch by a corner only are not one area; holes touch at corners but never
    share a side. Pixels of 255 belong to none. Memory: the corners of areas that are still open, and a piece of a band.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.next_row = 0
        self.last_labels = np.full(width, NODATA, np.uint8)
        self.last_areas = np.full(width, -1, np.int64)  # indices into `open`, -1 outside all areas
        self.open: list[OpenArea] = []

    def add(self, labels: np.ndarray, *values: np.ndarray) -> list[Area]:
        """The areas that (rows, width) uint8 more rows close. values: what is summed over the pixels, like labels."""
        height = max(1, PIECE_PIXELS // self.width)
        closed: list[Area] = []
        for start in range(0, len(labels), height):
            piece = slice(start, start + height)
            closed += self.add_piece(labels[piece], [np.broadcast_to(v, labels.shape)[piece] for v in values])
        return closed

    def finish(self) -> list[Area]:
        """The areas that reach the last row."""
        closed = self.add_piece(np.full((1, self.width), NODATA, np.uint8), None)
        assert not self.open
        return closed

    def add_piece(self, labels: np.ndarray, values: list[np.ndarray] | None) -> list[Area]:
        before = len(self.open)
        runs, first = run_numbers(labels)
        run_labels = labels.ravel()[first]
        nodes = np.vstack([self.last_areas, np.where(labels == NODATA, -1, runs + before)])  # (1 + rows, width)
        above, below = touching(nodes, np.vstack([self.last_labels, labels]))
        groups = connected(before + len(first), above, below)
        # Numbers without gaps, in the order in which the areas begin.
        used = np.zeros(before + len(first), bool)
        used[:before] = True
        used[before:] = run_labels != NODATA
        roots, numbers = np.unique(groups[used], return_inverse=True)
        number_of = np.full(len(used) + 1, -1, np.int64)  # the last is where node -1 looks
        number_of[:-1][used] = numbers
        areas = number_of[nodes]

        fresh_labels = np.zeros(len(roots), np.int64)
        fresh_labels[number_of[before:-1][used[before:]]] = run_labels[used[before:]]
        sizes = np.diff(np.append(first, labels.size))
        run_areas = number_of[before:-1]
        pixels, sums = add_up(run_areas, sizes, values or [], first, len(roots))
        corners = find_corners(areas, self.next_row)
        reaching = np.zeros(len(roots), bool)
        reaching[areas[-1][areas[-1] >= 0]] = True

        older: dict[int, OpenArea] = {}
        for number, area in zip(number_of[:before].tolist(), self.open, strict=True):
            if number in older:
                older[number].take(area)
            else:
                older[number] = area
        self.next_row += len(labels)
        self.last_labels = labels[-1].copy()
        return self.sort_out(fresh_labels, pixels, sums, corners, reaching, older, areas[-1])

    def sort_out(
        self,
        labels: np.ndarray,
        pixels: np.ndarray,
        sums: np.ndarray,
        corners: Corners,
        reaching: np.ndarray,
        older: dict[int, OpenArea],
        last: np.ndarray,
    ) -> list[Area]:
        """Keep the areas that reach the last row; the others, of this piece alone or begun earlier, are closed."""
        by_area = np.argsort(corners.area, kind="stable")
        corners = corners.where(by_area)
        ends = np.searchsorted(corners.area, np.arange(len(labels) + 1))
        held = np.zeros(len(labels), bool)  # those that are more than this piece
        held[list(older)] = True
        parts = [corners.where(~(held | reaching)[corners.area])]
        self.open, places = [], np.full(len(labels) + 1, -1, np.int64)
        for number in np.flatnonzero(held | reaching).tolist():
            area = older.get(number) or OpenArea(int(labels[number]), sums=np.zeros(sums.shape[1]))
            area.pixels += int(pixels[number])
            area.sums = area.sums + sums[number] if sums.shape[1] else area.sums
            if ends[number] < ends[number + 1]:
                area.corners.append(Corners(*(v[ends[number] : ends[number + 1]] for v in corners)))
            if reaching[number]:
                places[number] = len(self.open)
                self.open.append(area)
            else:
                labels[number], pixels[number] = area.label, area.pixels
                if sums.shape[1]:
                    sums[number] = area.sums
                older[number] = area
                whole = Corners.join(area.corners)
                parts.append(whole._replace(area=np.full_like(whole.area, number)))
        self.last_areas = places[last]
        closed_sums = {n: older[n].sums for n in older}
        return [
            Area(
                int(labels[number]),
                int(pixels[number]),
                tuple(closed_sums[number].tolist() if number in closed_sums else sums[number].tolist()),
                rings,
            )
            for number, rings in trace(Corners.join(parts))
        ]


def run_numbers(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, width) -> the number of the run of equal values in its row that each pixel is in, and where runs start."""
    starts = np.ones(labels.shape, bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    first = np.flatnonzero(starts)
    return np.cumsum(starts, dtype=np.int64).reshape(labels.shape) - 1, first


def touching(nodes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of nodes of one label that lie above each other; each pair once for every stretch of its border."""
    upper, lower = nodes[:-1], nodes[1:]
    same = (labels[:-1] == labels[1:]) & (upper >= 0) & (lower >= 0)
    again = np.zeros_like(same)
    again[:, 1:] = same[:, :-1] & (upper[:, 1:] == upper[:, :-1]) & (lower[:, 1:] == lower[:, :-1])
    same &= ~again
    return upper[same], lower[same]


def connected(count: int, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(count,) int64: the smallest node that each of 0..count-1 hangs together with, by the pairs given."""
    parent = np.arange(count)
    while len(ones):
        low, high = np.minimum(parent[ones], parent[others]), np.maximum(parent[ones], parent[others])
        apart = low != high
        ones, others, low, high = ones[apart], others[apart], low[apart], high[apart]
        np.minimum.at(parent, high, low)
        while not np.array_equal(jumped := parent[parent], parent):
            parent = jumped
    return parent


def add_up(
    areas: np.ndarray, sizes: np.ndarray, values: list[np.ndarray], first: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (count,) and sums (count, kinds) of the values over areas, from the runs that they are made of."""
    inside = areas >= 0
    pixels = np.bincount(areas[inside], sizes[inside], count).astype(np.int64)
    sums = [
        np.bincount(areas[inside], np.add.reduceat(v.ravel(), first, dtype=np.float64)[inside], count) for v in values
    ]
    return pixels, np.stack(sums, 1) if sums else np.zeros((count, 0))


def find_corners(areas: np.ndarray, first_row: int) -> Corners:
    """The corners on the upper edges of rows (1 + rows, width) of which the first is the one above; -1: no area.

    A convex corner: the pixel at a position is of the area, the two beside it are not. A concave corner: the pixel is
    not, the other three are.
    """
    padded = np.pad(areas, ((0, 0), (1, 1)), constant_values=-1)
    around = {(row, col): padded[row : len(areas) - 1 + row, col : areas.shape[1] + 1 + col] for row, col in POSITIONS}
    parts = []
    for (row, col), by_column in zip(POSITIONS, BY_COLUMN, strict=True):
        pixel, across, along = around[row, col], around[row, 1 - col], around[1 - row, col]
        opposite = around[1 - row, 1 - col]
        convex = (pixel >= 0) & (pixel != across) & (pixel != along)
        concave = (opposite >= 0) & (opposite == across) & (opposite == along) & (pixel != opposite)
        for found, owner, in_by_column in ((convex, pixel, by_column), (concave, opposite, not by_column)):
            rows, cols = np.nonzero(found)
            mark = TO_RIGHT * col + DOWN * row + IN_BY_COLUMN * in_by_column
            parts.append(Corners(owner[found], rows + first_row, cols, np.full(len(rows), mark, np.uint8)))
    return Corners.join(parts)


def trace(corners: Corners) -> list[tuple[int, list[np.ndarray]]]:
    """The rings of each area, in the areas' order; the outer one first.

    Along a row, an area's corners are by turns the left and the right end of a side; so too along a column. Each
    corner is the end of one side of either kind, and the way comes in by one and goes out by the other.

    Where two pixels of one area touch at a vertex only, there are two corners. As they were found, the way goes around
    each pixel and through the vertex from one side of the area to the other. Their vertical sides are exchanged: now
    it goes around what is between the pixels, and a hole there has a ring of its own that touches the outer one.
    """
    order = np.lexsort((corners.mark & TO_RIGHT, corners.col, corners.row, corners.area))
    area, row, col, mark = corners.where(order)
    count = len(area)
    if not count:
        return []
    twice = (area[1:] == area[:-1]) & (row[1:] == row[:-1]) & (col[1:] == col[:-1])
    mark[:-1][twice] ^= DOWN
    mark[1:][twice] ^= DOWN
    by_column = np.lexsort((mark & DOWN, row, col, area))
    along_column = np.empty(count, np.int64)
    along_column[by_column[0::2]], along_column[by_column[1::2]] = by_column[1::2], by_column[0::2]
    following = np.where(mark & IN_BY_COLUMN, np.arange(count) ^ 1, along_column).tolist()
    seen = bytearray(count)
    way: list[int] = []
    starts: list[int] = []
    for begin in range(count):
        if not seen[begin]:
            starts.append(len(way))
            at = begin
            while not seen[at]:
                seen[at] = 1
                way.append(at)
                at = following[at]
    points = np.stack([row[way], col[way]], 1)
    owners = area[np.asarray(way)[starts]]
    rings: dict[int, list[np.ndarray]] = {}
    for owner, start, stop in zip(owners.tolist(), starts, [*starts[1:], count], strict=True):
        rings.setdefault(owner, []).append(points[start:stop])
    return list(rings.items())
