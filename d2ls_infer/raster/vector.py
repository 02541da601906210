"""A class map as polygons: found while its rows come, written to GeoPackage, FlatGeobuf or GeoParquet."""

from __future__ import annotations

import importlib
import json
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from d2ls_infer.errors import RasterError, UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.raster.outlines import Area, Outliner
from d2ls_infer.raster.scene import Scene
from d2ls_infer.raster.writer import check_output

ENDINGS = {".gpkg": "pyogrio", ".fgb": "pyogrio", ".parquet": "pyarrow"}
"""Endings of the files that polygons can be written to, and what each needs."""

LAYER = "classes"

BATCH = 20_000
"""Polygons that are handed to the file together."""

ROWS = 256
"""Rows that are outlined together, so that polygons come in one order, in however large parts the rows come."""

COLUMNS = ("class", "class_id", "area_m2", "pixels", "confidence")


class PolygonWriter:
    """The areas of a class map as polygons in the scene's coordinate system.

    Columns: class (name), class_id, area_m2 (on the ground, of the pixels; none where the scene has no place), pixels,
    confidence (the mean probability of the class, 0..1). An area is what hangs together by the sides of its pixels; it
    is written as soon as the rows above it are done, and what is in memory are the outlines of areas that may go on.

    min_area_m2: smaller areas are left out; the ground they cover is given to nobody. simplify_m: outlines lose what is
    smaller than about that many metres; neighbours still share their borders, and their columns still tell of the
    pixels. All outlines are then kept in memory until the end.

    Written to a partial file; `finish`, then `publish` give it its name, `discard` removes it. Raises UsageError for
    an ending that is not known, what is not installed, and a scene whose map has no plain grid on the ground.
    """

    def __init__(
        self,
        path: Path,
        *,
        like: Scene,
        labels: LabelMap,
        steps: int,
        min_area_m2: float = 0.0,
        simplify_m: float | None = None,
        tags: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path, self.labels, self.steps = path, labels, steps
        self.min_area_m2, self.simplify_m = min_area_m2, simplify_m
        for source in (like.path, *like.dataset.files):
            check_output(path, source=source, overwrite=overwrite)
        check_place(like, measured=bool(min_area_m2 or simplify_m))
        self.transform = like.transform
        row_areas_m2 = like.row_areas_m2()
        self.known = row_areas_m2 is not None
        self.row_areas_m2 = row_areas_m2 if row_areas_m2 is not None else np.full(like.height, np.nan)
        self.outliner = Outliner(like.width)
        self.rows = np.zeros((2, 0, like.width), np.uint8)
        self.waiting: list[Area] = []
        self.file = open_file(path, like.crs, tags or {}, simplified=simplify_m is not None)
        self.kept = 0

    def write(self, labels: np.ndarray, confidence: np.ndarray) -> None:
        """The next rows (rows, width) uint8: classes, and their probability in steps of which `steps` are 1."""
        self.rows = np.concatenate([self.rows, np.stack([labels, confidence])], 1)
        while self.rows.shape[1] >= ROWS:
            self.outline(ROWS)

    def outline(self, rows: int) -> None:
        """Take in that many of the rows that wait."""
        first = self.outliner.next_row
        areas_m2 = self.row_areas_m2[first : first + rows, None]
        self.take(self.outliner.add(*self.rows[:, :rows], areas_m2))
        self.rows = self.rows[:, rows:].copy()

    def take(self, areas: Iterable[Area]) -> None:
        """Keep the areas that are large enough, and write them when there are many."""
        self.waiting += [area for area in areas if not self.min_area_m2 or area.sums[1] >= self.min_area_m2]
        if len(self.waiting) >= BATCH and self.simplify_m is None:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        areas, self.waiting = self.waiting, []
        geometries = [wkb(self.moved(area)) for area in areas] if self.simplify_m is None else self.simplified(areas)
        pixels = np.array([area.pixels for area in areas], np.int64)
        columns = {
            "class": np.array([self.labels.names[area.label] for area in areas], object),
            "class_id": np.array([area.label for area in areas], np.int32),
            "area_m2": np.array([area.sums[1] for area in areas], np.float64),
            "pixels": pixels,
            "confidence": np.array([area.sums[0] for area in areas], np.float64) / self.steps / np.maximum(pixels, 1),
        }
        with self.cleaning_up():
            self.file.write(np.array(geometries, object), columns)
        self.kept += len(areas)

    def moved(self, area: Area) -> list[np.ndarray]:
        """The rings of an area in the coordinate system, the outer one counter-clockwise."""
        rings = [self.place(ring[:, 1], ring[:, 0]) for ring in area.rings]
        return [ring[::-1] for ring in rings] if self.transform.determinant < 0 else rings

    def place(self, cols: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(points, 2) coordinates of columns and rows."""
        t = self.transform
        return np.stack([t.c + t.a * cols + t.b * rows, t.f + t.d * cols + t.e * rows], 1)

    def simplified(self, areas: list[Area]) -> list[bytes]:
        """The simplified outlines of all areas, as well-known binary."""
        shapely: Any = importlib.import_module("shapely")
        if not areas:
            return []
        corners, rings, polygons = as_coverage(areas)
        # Where they will be: moved afterwards, what just does not cross would do so by the rounding of coordinates.
        places = self.place(corners[:, 1], corners[:, 0])
        coverage = shapely.from_ragged_array(shapely.GeometryType.POLYGON, places, (rings, polygons))
        # A corner is dropped by the area of the triangle that it makes. Areas go from metres to the units of the
        # coordinate system by one factor, whatever the shape of a pixel.
        assert self.simplify_m is not None
        units = (abs(self.transform.determinant) / np.median(self.row_areas_m2)) ** 0.5
        coverage = shapely.coverage_simplify(coverage, self.simplify_m * units)
        return list(shapely.to_wkb(shapely.orient_polygons(coverage), byte_order=1))

    def finish(self) -> None:
        """Write what is left and close the file. It does not have its name yet."""
        if self.rows.shape[1]:
            self.outline(self.rows.shape[1])
        self.take(self.outliner.finish())
        self.flush()
        with self.cleaning_up():
            self.file.close()

    def publish(self) -> None:
        """Give the finished file its name."""
        with self.cleaning_up():
            self.file.partial.replace(self.path)
            self.file.discard()

    def discard(self) -> None:
        """Remove what was not finished."""
        with suppress(Exception):  # the first error is the one to tell
            self.file.discard()

    @contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Remove what was begun when anything goes wrong inside, an interruption included."""
        try:
            yield
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError | RuntimeError):  # pyogrio's and pyarrow's own are of these
                raise RasterError(f"cannot write {self.path}: {error}") from error
            raise


class OgrFile:
    """Polygons on their way into a file by pyogrio, batch by batch.

    A FlatGeobuf is ordered along its index, so that it is made in one go: out of a GeoPackage, at the end.
    """

    def __init__(self, path: Path, crs: Any, tags: Mapping[str, str]) -> None:
        self.pyogrio: Any = importlib.import_module("pyogrio")
        self.raw: Any = importlib.import_module("pyogrio.raw")
        self.crs = crs.to_wkt() if crs else None
        self.tags = dict(tags)
        # GDAL grumbles about a GeoPackage of another ending, and makes a FlatGeobuf of another one a folder.
        self.package, self.partial = (
            path.with_name(path.name + ".partial" + ending) for ending in (".gpkg", path.suffix.lower())
        )
        self.begun = False
        self.discard()

    def write(self, geometries: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        if self.begun and not len(geometries):
            return
        first = {} if self.begun else {"layer_metadata": self.tags}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'crs' was not provided")
            self.raw.write(
                self.package, geometries, list(columns.values()), list(columns), layer=LAYER, driver="GPKG",
                geometry_type="Polygon", crs=self.crs, append=self.begun, **first,
            )  # fmt: skip
        self.begun = True

    def close(self) -> None:
        if self.partial == self.package:
            return
        with (
            self.pyogrio.open_arrow(self.package, layer=LAYER, use_pyarrow=False) as (meta, stream),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "'crs' was not provided")
            self.pyogrio.write_arrow(
                stream, self.partial, layer=LAYER, driver="FlatGeobuf", crs=self.crs, geometry_type="Polygon",
                geometry_name=meta["geometry_name"] or "wkb_geometry",
            )  # fmt: skip

    def discard(self) -> None:
        """Remove the files on the way, with what SQLite puts beside them."""
        for name in (self.partial.name, *(self.package.name + end for end in ("", "-journal", "-wal", "-shm"))):
            self.package.with_name(name).unlink(missing_ok=True)


class ParquetFile:
    """Polygons on their way into a GeoParquet file, a group of rows for each batch."""

    def __init__(self, path: Path, crs: Any, tags: Mapping[str, str]) -> None:
        self.arrow: Any = importlib.import_module("pyarrow")
        self.parquet: Any = importlib.import_module("pyarrow.parquet")
        self.partial = path.with_name(path.name + ".partial")
        a = self.arrow
        types = [a.string(), a.int32(), a.float64(), a.int64(), a.float64(), a.binary()]
        geometry = {
            "encoding": "WKB",
            "geometry_types": ["Polygon"],
            "orientation": "counterclockwise",
            "crs": crs.to_dict(projjson=True) if crs else None,
        }
        about = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
        self.schema = a.schema(
            list(zip((*COLUMNS, "geometry"), types, strict=True)), {**tags, "geo": json.dumps(about)}
        )
        self.writer: Any = None
        self.discard()

    def write(self, geometries: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        if self.writer is None:
            self.writer = self.parquet.ParquetWriter(str(self.partial), self.schema, compression="zstd")
        a = self.arrow
        arrays = [a.array(values, kind.type, from_pandas=True) for values, kind in zip(
            (*columns.values(), geometries), self.schema, strict=True
        )]  # fmt: skip
        self.writer.write_table(a.Table.from_arrays(arrays, schema=self.schema))

    def close(self) -> None:
        self.writer.close()

    def discard(self) -> None:
        """Remove the file on the way."""
        if self.writer is not None:
            with suppress(Exception):  # a disk that is full is so again
                self.writer.close()
        self.partial.unlink(missing_ok=True)


def open_file(path: Path, crs: Any, tags: Mapping[str, str], *, simplified: bool) -> OgrFile | ParquetFile:
    """The file that an ending stands for. Raises UsageError for another one, and for what is not installed."""
    check_installed(path, simplified=simplified)
    return (ParquetFile if path.suffix.lower() == ".parquet" else OgrFile)(path, crs, tags)


def check_installed(path: Path, *, simplified: bool) -> None:
    """Raise UsageError where polygons cannot be written to such a file, or not be simplified."""
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"polygons are written to {', '.join(ENDINGS)}, not to {path}")
    for name in [ENDINGS[path.suffix.lower()]] + ["shapely"] * simplified:
        try:
            module: Any = importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"polygons in {path.name} need {name}; pip install 'd2ls-infer[vector]'") from error
        if name == "shapely" and not hasattr(module, "coverage_simplify"):
            raise UsageError(
                f"simplified polygons need shapely 2.1 or newer, here is {module.__version__}; "
                "pip install -U 'd2ls-infer[vector]'"
            )


def check_place(scene: Scene, *, measured: bool) -> None:
    """Raise UsageError where polygons of a scene would lie nowhere, or have no size."""
    if scene.gcps[0] or (scene.transform.is_identity and scene.rpcs is not None):
        raise UsageError(
            f"{scene.path} is placed by points or polynomials, not by a grid; polygons need a grid: "
            "rectify it first (gdalwarp)"
        )
    if measured and scene.row_areas_m2() is None:
        raise UsageError(f"{scene.path} has no place on the ground, so that nothing in it is measured in metres")


def wkb(rings: list[np.ndarray]) -> bytes:
    """A polygon as well-known binary (OGC 06-103r4, section 8.2). Rings come without their first point repeated."""
    parts = [struct.pack("<BII", 1, 3, len(rings))]
    for ring in rings:
        parts += [struct.pack("<I", len(ring) + 1), np.ascontiguousarray(ring).tobytes(), ring[0].tobytes()]
    return b"".join(parts)


def as_coverage(areas: list[Area]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Areas -> closed rings (points, 2) of rows and columns, where each ring begins, and each area's first ring.

    A side that runs through another area's corner gets a point there: neighbours have the same points on the border
    that they share.
    """
    rings = [ring for area in areas for ring in area.rings]
    closed = [np.concatenate([ring, ring[:1]]) for ring in rings]
    points = np.concatenate(closed)
    ring_of = np.repeat(np.arange(len(rings)), [len(ring) for ring in closed])
    inner = np.flatnonzero(ring_of[:-1] == ring_of[1:])  # the sides, by the point that they begin at
    corners = np.unique(np.concatenate(rings), axis=0)
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.arange(len(points), dtype=np.float64), points)]
    for axis in (0, 1):  # sides along a row, then along a column
        along = inner[points[inner, axis] == points[inner + 1, axis]]
        found.append(between(points[along], points[along + 1], corners, axis, along))
    order = np.argsort(np.concatenate([place for place, _ in found]), kind="stable")
    places = np.concatenate([place for place, _ in found])[order]
    every = np.concatenate([each for _, each in found])[order]
    lengths = np.bincount(ring_of[places.astype(np.int64)], minlength=len(rings))
    counts = [len(area.rings) for area in areas]
    return every, np.append(0, np.cumsum(lengths)), np.append(0, np.cumsum(counts))


def between(
    begin: np.ndarray, end: np.ndarray, corners: np.ndarray, axis: int, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The corners within sides that run along an axis, and their places: the side's number and how far along it."""
    span = int(corners.max()) + 2
    keys = np.sort(corners[:, axis] * span + corners[:, 1 - axis])
    ends = np.stack([begin[:, 1 - axis], end[:, 1 - axis]], 1)
    base = begin[:, axis] * span
    first = np.searchsorted(keys, base + ends.min(1), side="right")
    counts = np.searchsorted(keys, base + ends.max(1), side="left") - first
    side = np.repeat(np.arange(len(begin)), counts)
    nth = np.arange(len(side)) - np.repeat(np.cumsum(counts) - counts, counts)
    way = keys[np.repeat(first, counts) + nth] % span
    points = np.empty((len(side), 2), np.int64)
    points[:, axis], points[:, 1 - axis] = begin[side, axis], way
    share = np.abs(way - ends[side, 0]) / np.maximum(1, np.abs(ends[side, 1] - ends[side, 0]))
    return index[side] + share, points
