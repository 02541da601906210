"""How the labels in a file become class indices: by their values, by their colours, or from polygons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import NODATA, Color, LabelMap

IGNORED = NODATA
"""Index of a pixel that is not labelled. It takes no part in training or in any score."""

UNKNOWN = -1
ROWS = 512
"""Rows that are decoded at a time: an area of 6000 x 6000 pixels would take gigabytes at once."""
SHOWN = 5
"""So many of the values that are no class stand in an error."""


class MaskReader(Protocol):
    """Reads a file of labels onto the grid of its image."""

    def read(self, path: Path, *, image: Path) -> np.ndarray:
        """-> (H, W) uint8 of class indices, 255 where nothing is labelled."""
        ...


@dataclass(frozen=True)
class Codes:
    """Labels as whole numbers in one band: `pairs` of a value and its class index (255: ignored)."""

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, table: Mapping[int, int]) -> Codes:
        """From value -> index."""
        return cls(tuple(sorted(table.items())))

    @classmethod
    def indices(cls, count: int) -> Codes:
        """Values 0 to count - 1 are the indices themselves; 255 is ignored."""
        return cls.of({**{index: index for index in range(count)}, IGNORED: IGNORED})

    def decode(self, values: np.ndarray) -> np.ndarray:
        """(1, H, W) of any integer type -> (H, W) uint8. Raises UsageError for values that are not in the table."""
        if len(values) != 1:
            raise UsageError(f"class codes lie in one band, got {len(values)}")
        if values.dtype.kind not in "ui":
            raise UsageError(f"class codes are whole numbers, got {values.dtype}")
        band = values[0]
        top = max(NODATA, *(value for value, _ in self.pairs)) + 1  # the last place stands for all that is beyond
        places = np.full(top + 1, UNKNOWN, np.int16)
        for value, index in self.pairs:
            places[value] = index
        if band.dtype != np.uint8:
            band = np.where((band < 0) | (band >= top), top, band.astype(np.int64))
        indices = places[band]
        if (indices == UNKNOWN).any():
            strange = np.unique(values[0][indices == UNKNOWN]).tolist()
            known = ", ".join(str(value) for value, _ in self.pairs) if len(self.pairs) < 20 else f"0 to {top - 1}"
            raise UsageError(f"{shown(strange, 'value')}, which stand for no class; known are {known}")
        decoded: np.ndarray = indices.astype(np.uint8)
        return decoded

    def read(self, path: Path, *, image: Path) -> np.ndarray:
        """-> (H, W) uint8. Raises MissingFileError, RasterError, and UsageError that names the file and the values."""
        return read_labels(path, self)


@dataclass(frozen=True)
class Colors:
    """Labels as colours in three bands: `pairs` of (red, green, blue) and its class index (255: ignored).

    Colours match exactly. corners: each channel is taken to 0 or 255 first, whichever is nearer; only for files that
    are known to have been stored with a loss, and only where every colour of the table is such a corner.
    """

    pairs: tuple[tuple[Color, int], ...]
    corners: bool = False

    @classmethod
    def of(cls, table: Mapping[Color, int], *, corners: bool = False) -> Colors:
        """From (red, green, blue) -> index."""
        return cls(tuple(table.items()), corners)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """(3 or 4, H, W) uint8, a fourth band being alpha -> (H, W) uint8. Raises UsageError for unknown colours."""
        if len(values) not in (3, 4) or values.dtype != np.uint8:
            raise UsageError(f"class colours lie in three bands of uint8, got {len(values)} of {values.dtype}")
        indices = np.full(values.shape[1:], IGNORED, np.uint8)
        strange: set[int] = set()
        for start in range(0, len(indices), ROWS):
            block = values[:3, start : start + ROWS]
            if self.corners:
                block = np.where(block >= 128, np.uint8(255), np.uint8(0))
            packed = pack(*block.astype(np.uint32))
            unknown = np.ones(packed.shape, bool)
            for color, index in self.pairs:
                here = packed == pack(*color)
                indices[start : start + ROWS][here] = index
                unknown &= ~here
            strange.update(np.unique(packed[unknown]).tolist())
        if strange:
            colors = [(value >> 16, value >> 8 & 255, value & 255) for value in sorted(strange)]
            raise UsageError(f"{shown(colors, 'colour')}, which stand for no class")
        return indices

    def read(self, path: Path, *, image: Path) -> np.ndarray:
        """-> (H, W) uint8. Raises MissingFileError, RasterError, and UsageError that names the file and the colours."""
        return read_labels(path, self)


@dataclass(frozen=True)
class Polygons:
    """Labels as polygons with a class column, burnt onto the grid of their image when they are read.

    Ground that no polygon covers is ignored, unless the class it belongs to is named as `background`.
    """

    labels: LabelMap
    column: str = "class"
    background: str | None = None

    def read(self, path: Path, *, image: Path) -> np.ndarray:
        """-> (H, W) uint8. Errors: those of `d2ls_infer.raster.polygons.burn_polygons`."""
        from d2ls_infer.raster.polygons import burn_polygons

        return burn_polygons(path, like=image, labels=self.labels, column=self.column, background=self.background)


def read_labels(path: Path, table: Codes | Colors) -> np.ndarray:
    """Read a raster of labels and decode it, with the file named in what goes wrong."""
    from d2ls_infer.raster import read_array

    values = read_array(path)
    try:
        return table.decode(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def pack(red: Any, green: Any, blue: Any) -> Any:
    """Three numbers of 8 bits -> one of 24."""
    return red << 16 | green << 8 | blue


def shown(strange: list[int] | list[tuple[int, int, int]], what: str) -> str:
    """ "holds the values 9, 12", cut after a few."""
    more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
    return f"it holds the {what}s {', '.join(map(str, strange[:SHOWN]))}{more}"
