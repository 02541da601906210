"""Polygons in files of any format that GDAL knows: read without data frames, out of well-known binary."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.errors import CRSError

from d2ls_infer.errors import MissingFileError, UsageError

Ring = list[tuple[float, float]]
Polygon = list[Ring]
"""The outer ring, then those of its holes."""

POLYGON, MULTIPOLYGON, COLLECTION = 3, 6, 7
"""Kinds of geometry in well-known binary: OGC 06-103r4, section 8.2.3."""


def read_polygons(path: Path) -> tuple[Any, list[Polygon]]:
    """The coordinate system of a file of polygons with one layer, and all of them.

    Raises MissingFileError, and UsageError where pyogrio is not installed or the file is something else.
    """
    pyogrio, raw = import_pyogrio("an area of interest needs", extra="vector")
    with open_layer(path, pyogrio) as layer:
        crs = layer_crs(path, pyogrio.read_info(path, layer=layer)["crs"])
        _, fids, geometries, _ = raw.read(path, layer=layer, columns=[], force_2d=True, return_fids=True)
    polygons = []
    for fid, geometry in zip(fids, geometries, strict=True):
        try:
            polygons += parse_polygons(geometry) if geometry is not None else []
        except UsageError as error:
            raise UsageError(f"{path}: feature {fid}: {error}") from error
    return crs, polygons


@contextmanager
def open_layer(path: Path, pyogrio: Any) -> Iterator[str]:
    """The name of the one layer with geometries. Inside of it, what is no such file is a UsageError."""
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}")
    try:
        layers = [name for name, kind in pyogrio.list_layers(path) if kind is not None]
        if len(layers) != 1:
            raise UsageError(f"{path} has {len(layers)} layers of geometries, but one is expected: {', '.join(layers)}")
        yield layers[0]
    except pyogrio.errors.DataSourceError as error:
        raise UsageError(f"{path} is not a file of polygons that GDAL can read: {error}") from error


def import_pyogrio(what: str, *, extra: str) -> tuple[Any, Any]:
    """The module that reads polygons, and its part without data frames. Raises UsageError where it is not installed."""
    try:
        return importlib.import_module("pyogrio"), importlib.import_module("pyogrio.raw")
    except ImportError as error:
        raise UsageError(f"{what} pyogrio; pip install 'd2ls-infer[{extra}]'") from error


def layer_crs(path: Path, text: str | None) -> Any:
    """The coordinate system of a layer. Raises UsageError where there is none, or none that is known."""
    if not text:
        raise UsageError(f"{path} has no coordinate system; for a shapefile it stands in the .prj file")
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise UsageError(f"{path}: the coordinate system is not known: {error}") from error


def parse_polygons(data: bytes) -> list[Polygon]:
    """Well-known binary in two dimensions -> its polygons. Raises UsageError for points, lines and curves."""
    return parse_geometry(data, 0)[0]


def parse_geometry(data: bytes, at: int) -> tuple[list[Polygon], int]:
    """The polygons of the geometry that begins at a byte, and the byte after it."""
    order = "<" if data[at] else ">"
    (kind,) = struct.unpack_from(f"{order}I", data, at + 1)
    if kind not in (POLYGON, MULTIPOLYGON, COLLECTION):
        raise UsageError(f"geometries are polygons, got type {kind} of well-known binary")
    (count,) = struct.unpack_from(f"{order}I", data, at + 5)
    at += 9
    if kind == POLYGON:
        rings = []
        for _ in range(count):
            ring, at = parse_ring(data, at, order)
            rings.append(ring)
        return ([rings] if rings else []), at
    polygons: list[Polygon] = []
    for _ in range(count):
        parts, at = parse_geometry(data, at)
        polygons += parts
    return polygons, at


def parse_ring(data: bytes, at: int, order: str) -> tuple[Ring, int]:
    """The ring that begins at a byte, and the byte after it."""
    (count,) = struct.unpack_from(f"{order}I", data, at)
    points = np.frombuffer(data, f"{order}f8", 2 * count, at + 4).reshape(count, 2)
    return [(float(first), float(second)) for first, second in points], at + 4 + points.nbytes
