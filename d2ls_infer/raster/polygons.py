"""Labels that are polygons, burnt onto the grid of the image that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rasterio.features import rasterize
from rasterio.warp import transform_bounds, transform_geom

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.raster.dataset import open_dataset, reading
from d2ls_infer.raster.ogr import import_pyogrio, layer_crs, open_layer, parse_polygons


class Grid(NamedTuple):
    """The grid of an image. bounds: left, bottom, right, top in the units of its coordinate system."""

    height: int
    width: int
    transform: Any
    crs: Any
    bounds: tuple[float, float, float, float]


class Layer(NamedTuple):
    """Polygons as they are in a file: the coordinate system, their numbers, WKB geometries (or None), class values."""

    crs: Any
    fids: np.ndarray
    geometries: np.ndarray
    values: np.ndarray


def burn_polygons(
    path: Path, *, like: Path, labels: LabelMap, column: str = "class", background: str | None = None
) -> np.ndarray:
    """(H, W) uint8 of class indices on the grid of the image `like`; 255 where no polygon lies, or else `background`.

    path: any format of polygons that GDAL reads, with one layer. A pixel belongs to the polygon that its centre lies
    in; of several, to the one that comes last in the file. column: holds a class's name, or its index where it is a
    column of numbers; polygons without a value are ignored ground. Corners are brought into the image's coordinate
    system, edges between them stay straight.

    Raises MissingFileError; RasterError where the image cannot be read; UsageError where pyogrio is not installed, the
    image or the polygons have no coordinate system, there is no such column, a value is no class, or a geometry is not
    a polygon.
    """
    grid = read_grid(like)
    layer = read_layer(path, column, grid)
    indices = [class_index(value, labels) for value in layer.values]
    if strange := sorted({str(value) for value, index in zip(layer.values, indices, strict=True) if index is None}):
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        told = f"column {column!r} holds {', '.join(strange[:5])}{more}"
        raise UsageError(f"{path}: {told}; classes are {', '.join(labels.names)}")
    shapes = []
    for fid, geometry, index in zip(layer.fids, layer.geometries, indices, strict=True):
        try:
            polygons = parse_polygons(geometry) if geometry is not None else []
        except UsageError as error:
            raise UsageError(f"{path}: feature {fid}: {error}") from error
        shapes += [({"type": "Polygon", "coordinates": polygon}, index) for polygon in polygons]
    fill = NODATA if background is None else labels.names.index(background)
    if not shapes:
        return np.full((grid.height, grid.width), fill, np.uint8)
    with reading(f"{path} on the grid of {like}"):
        moved = transform_geom(layer.crs, grid.crs, [shape for shape, _ in shapes])
    burnt: np.ndarray = rasterize(
        zip(moved, [index for _, index in shapes], strict=True),
        out_shape=(grid.height, grid.width),
        transform=grid.transform,
        fill=fill,
        dtype="uint8",
    )
    return burnt


def read_grid(image: Path) -> Grid:
    """The grid of an image. Raises UsageError where it is not georeferenced."""
    with open_dataset(str(image)) as dataset, reading(str(image)):
        if not dataset.crs or dataset.transform.is_identity:
            raise UsageError(f"{image} is not georeferenced; polygons cannot be laid over it")
        height, width, place = dataset.height, dataset.width, dataset.transform
        corners = [(row, col) for row in (0, height) for col in (0, width)]
        across = [place.c + place.a * col + place.b * row for row, col in corners]
        along = [place.f + place.d * col + place.e * row for row, col in corners]
        return Grid(height, width, place, dataset.crs, (min(across), min(along), max(across), max(along)))


def read_layer(path: Path, column: str, grid: Grid) -> Layer:
    """The polygons in reach of a grid. Raises what `burn_polygons` does of files."""
    pyogrio, raw = import_pyogrio("labels that are polygons need", extra="train")
    with open_layer(path, pyogrio) as name:
        info = pyogrio.read_info(path, layer=name)
        if info["features"] == 0 and not len(info["fields"]):  # so an empty GeoJSON is read, whatever it had
            return Layer(layer_crs(path, info["crs"]), *(np.empty(0, object) for _ in range(3)))
        if column not in info["fields"]:
            raise UsageError(f"{path} has no column {column!r}; it has {', '.join(info['fields']) or 'none'}")
        crs = layer_crs(path, info["crs"])
        with reading(f"{path} in reach of the image"):
            left, bottom, right, top = transform_bounds(grid.crs, crs, *grid.bounds)
        reach = (left, bottom, right, top) if left <= right else None  # None: on both sides of the 180th meridian
        options = {"layer": name, "columns": [column], "bbox": reach, "force_2d": True, "return_fids": True}
        _, fids, geometries, (values,) = raw.read(path, **options)
    in_file = np.argsort(fids)  # a spatial index may hand them out in another order
    return Layer(crs, fids[in_file], geometries[in_file], values[in_file])


def class_index(value: Any, labels: LabelMap) -> int | None:
    """Index of the class that a value of a column stands for; 255 for no value, None for a value that is no class."""
    if value is None or value == "":
        return NODATA
    if isinstance(value, str):
        return labels.names.index(value.strip()) if value.strip() in labels.names else None
    if not np.issubdtype(np.asarray(value).dtype, np.number):
        return None
    if np.isnan(value):  # an empty field of a column of numbers
        return NODATA
    return int(value) if 0 <= value < len(labels) and value == int(value) else None
