"""The part of a raster that is wanted: a window of pixels, a box on the ground, or an area of interest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import geometry_mask
from rasterio.warp import transform_bounds, transform_geom
from rasterio.windows import Window

from d2ls_infer.errors import UsageError
from d2ls_infer.raster.dataset import reading
from d2ls_infer.raster.ogr import Polygon, read_polygons

EDGE_PX = 1e-4
"""An edge of a box this near to an edge of pixels lies on it: coordinates are rounded."""

MASK_PIXELS = 1 << 22
"""How many pixels of an area are burnt at a time."""


class Part(NamedTuple):
    """A rectangle of a raster's pixels, and the polygons inside it that are wanted; None: all of it is."""

    row: int
    col: int
    height: int
    width: int
    polygons: list[dict[str, Any]] | None = None

    def inside(self, transform: Affine, start: int, stop: int) -> np.ndarray:
        """(stop - start, width) bool: which pixels' centres lie in the polygons. transform: of the part."""
        return self.burnt(moved(transform, row=start), (stop - start, self.width))

    def touched(self, transform: Affine, cells: tuple[int, int]) -> np.ndarray:
        """Of as many cells, down and across, of equal size, which the polygons touch, bool."""
        down, across = self.height / cells[0], self.width / cells[1]
        a, b, c, d, e, f = transform[:6]
        place = Affine(a * across, b * down, c, d * across, e * down, f)
        return self.burnt(place, cells, all_touched=True)

    def burnt(self, place: Affine, shape: tuple[int, int], *, all_touched: bool = False) -> np.ndarray:
        """(h, w) bool of a grid at that place: which cells' centres lie in the polygons, or which cells they touch."""
        if self.polygons is None:
            return np.ones(shape, bool)
        mask: np.ndarray = geometry_mask(
            self.polygons, out_shape=shape, transform=place, invert=True, all_touched=all_touched
        )
        return mask


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What is wanted of a scene: one of three, or all of it. Raises UsageError for more than one, and for empty ones.

    window: (first column, first row, columns, rows), counted from 0. bbox: (min x, min y, max x, max y), in the scene's
    coordinate system or in `bbox_crs`; in degrees, longitude comes first. aoi: a file of polygons that GDAL reads.
    """

    window: tuple[int, int, int, int] | None = None
    bbox: tuple[float, float, float, float] | None = None
    bbox_crs: str | None = None
    aoi: Path | None = None

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("window", "bbox", "aoi") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} each choose a part of the scene; give one of them")
        if self.bbox_crs is not None and self.bbox is None:
            raise UsageError("--bbox-crs is the coordinate system of --bbox, which is not given")
        if self.window is not None and (min(self.window[:2]) < 0 or min(self.window[2:]) < 1):
            raise UsageError(
                f"a window is COL,ROW,WIDTH,HEIGHT in pixels from 0,0, 1 wide and high or more; got {told(self.window)}"
            )
        if self.bbox is not None:
            left, bottom, right, top = self.bbox
            if not (left < right and bottom < top and np.isfinite(self.bbox).all()):
                raise UsageError(f"a box is MINX,MINY,MAXX,MAXY, each smaller first; got {told(self.bbox)}")

    @classmethod
    def of(
        cls,
        window: Sequence[int] | Window | str | None = None,
        bbox: Sequence[float] | str | None = None,
        bbox_crs: str | None = None,
        aoi: str | Path | None = None,
    ) -> Cut:
        """From what stands on a command line, or rasterio's window. Raises UsageError for anything but four numbers."""
        window = window.flatten() if isinstance(window, Window) else window
        if not isinstance(aoi, str | os.PathLike | None):
            raise UsageError(f"an area of interest is a file of polygons, got a {type(aoi).__name__}")
        return cls(
            window=None if window is None else four(window, int, "a window is COL,ROW,WIDTH,HEIGHT in whole pixels"),
            bbox=None if bbox is None else four(bbox, float, "a box is MINX,MINY,MAXX,MAXY"),
            bbox_crs=bbox_crs,
            aoi=None if aoi is None else Path(aoi),
        )

    def on(self, dataset: Any) -> Part:
        """The part of a dataset that is wanted, on its own grid of pixels. Raises UsageError where they do not meet."""
        if self.window is not None:
            col, row, width, height = self.window
            return clipped(dataset, (col, row, col + width, row + height), f"the window {told(self.window)}")
        if self.bbox is not None:
            box = box_in(self.bbox, self.bbox_crs, dataset)
            corners = [(x, y) for x in box[::2] for y in box[1::2]]
            return clipped(dataset, reach(dataset, corners, "--bbox"), f"the box {told(self.bbox)}")
        if self.aoi is not None:
            polygons = polygons_in(self.aoi, dataset)
            corners = [point for polygon in polygons for point in polygon[0]]
            part = clipped(dataset, reach(dataset, corners, "--aoi"), f"the area {self.aoi}")
            shapes = [{"type": "Polygon", "coordinates": polygon} for polygon in polygons]
            return checked(part._replace(polygons=shapes), dataset, self.aoi)
        return Part(0, 0, dataset.height, dataset.width)


def moved(transform: Affine, *, row: int, col: int = 0) -> Affine:
    """A transform that begins at another pixel. Of the affine package, 3 calls by @ what 2 calls by *; so by hand."""
    a, b, c, d, e, f = transform[:6]
    return Affine(a, b, c + a * col + b * row, d, e, f + d * col + e * row)


def box_in(bbox: tuple[float, ...], crs: str | None, dataset: Any) -> tuple[float, ...]:
    """A box in a dataset's own coordinate system: the upright one around it."""
    if crs is None:
        return bbox
    if not dataset.crs:
        raise UsageError(f"{dataset.name} has no coordinate system; leave out --bbox-crs, or cut it by --window")
    try:
        system = CRS.from_user_input(crs)
    except CRSError as error:
        raise UsageError(f"--bbox-crs {crs} is no coordinate system that is known; try EPSG:4326") from error
    with reading(f"the box {told(bbox)} in the coordinate system of {dataset.name}"):
        box: tuple[float, ...] = transform_bounds(system, dataset.crs, *bbox)
    if not np.isfinite(box).all():
        raise UsageError(f"the box {told(bbox)} in {crs} lies outside of the coordinate system of {dataset.name}")
    return box


def polygons_in(path: Path, dataset: Any) -> list[Polygon]:
    """The polygons of a file, in a dataset's coordinate system. Corners are moved, edges stay straight."""
    if not dataset.crs:
        raise UsageError(f"{dataset.name} has no coordinate system; {path} cannot be laid over it, cut it by --window")
    crs, polygons = read_polygons(path)
    if not polygons:
        raise UsageError(f"{path} holds no polygon")
    with reading(f"{path} in the coordinate system of {dataset.name}"):
        moved = transform_geom(crs, dataset.crs, [{"type": "Polygon", "coordinates": rings} for rings in polygons])
    return [shape["coordinates"] for shape in moved]


def reach(dataset: Any, points: Iterable[Sequence[float]], option: str) -> tuple[int, int, int, int]:
    """The pixels that points lie within: first column and row, and one after the last."""
    transform = dataset.transform
    if transform.is_identity:
        raise UsageError(f"{dataset.name} is not georeferenced by a transform; cut it by --window in place of {option}")
    inverse = ~transform
    x, y = np.array([point[:2] for point in points], float).T
    places = np.stack([inverse.a * x + inverse.b * y + inverse.c, inverse.d * x + inverse.e * y + inverse.f], 1)
    low, high = np.floor(places.min(0) + EDGE_PX), np.ceil(places.max(0) - EDGE_PX)
    (left, top), (right, bottom) = (np.nan_to_num(ends).astype(int).tolist() for ends in (low, high))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def clipped(dataset: Any, pixels: tuple[int, int, int, int], what: str) -> Part:
    """The pixels that are there, of first column and row, and one after the last."""
    left, top, right, bottom = pixels
    col, row, stop_col, stop_row = max(left, 0), max(top, 0), min(right, dataset.width), min(bottom, dataset.height)
    if col >= stop_col or row >= stop_row:
        raise UsageError(
            f"{what} and {dataset.name} do not meet: it would be columns {left} to {right - 1} and rows {top} to "
            f"{bottom - 1} of {dataset.width} x {dataset.height} pixels"
        )
    return Part(row, col, stop_row - row, stop_col - col)


def checked(part: Part, dataset: Any, path: Path) -> Part:
    """The part, if a pixel of it lies in its polygons: their corners alone do not tell."""
    place = moved(dataset.transform, row=part.row, col=part.col)
    step = max(1, MASK_PIXELS // part.width)
    starts = range(0, part.height, step)
    if not any(part.inside(place, start, min(start + step, part.height)).any() for start in starts):
        raise UsageError(f"the area {path} and {dataset.name} do not meet: no pixel's centre lies in it")
    return part


def four(values: Sequence[Any] | str, kind: type, what: str) -> Any:
    """Four numbers, given as such or with commas between."""
    parts = values.split(",") if isinstance(values, str) else list(values)
    try:
        numbers = tuple(kind(part) for part in parts)
        if len(numbers) != 4 or any(float(number) != float(part) for number, part in zip(numbers, parts, strict=True)):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what}, with commas between; got {values!r}") from error
    return numbers


def told(numbers: Sequence[float]) -> str:
    """Numbers as they are written on a command line."""
    return ",".join(f"{number:.12g}" for number in numbers)
