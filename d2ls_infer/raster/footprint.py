"""Where on the earth a scene lies, as others are told."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from rasterio import warp
from rasterio.errors import RasterioError
from rasterio.transform import from_gcps

from d2ls_infer.raster.ground import is_placed
from d2ls_infer.raster.scene import Scene

EDGE_POINTS = 8
"""Points along each side of a scene: in longitude and latitude its straight sides are bent."""


class Footprint(NamedTuple):
    """A scene's outline in longitude and latitude (WGS 84), as GeoJSON; its box: west, south, east, north.

    Across the 180th meridian the outline is in two parts and west is more than east, as GeoJSON has it.
    """

    geometry: dict[str, Any]
    bbox: tuple[float, float, float, float]


def footprint(scene: Scene) -> Footprint | None:
    """Where a scene lies, by its transform or else its ground control points; None where that is not known."""
    crs, transform = scene.crs, scene.transform
    points, points_crs = scene.gcps
    if points and points_crs:
        crs, transform = points_crs, from_gcps(points)
    if not is_placed(crs, transform):
        return None
    along = np.linspace(0, 1, EDGE_POINTS, endpoint=False)
    corners = np.array([(0, 0), (0, 1), (1, 1), (1, 0), (0, 0)])  # columns, rows: counter-clockwise where north is up
    places = [begin + (end - begin) * way for begin, end in pairwise(corners) for way in along]
    ring = [located(transform, scene.width * col, scene.height * row) for col, row in places]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lon, lat, *_ = warp.transform(crs, "EPSG:4326", *zip(*ring, strict=True))
    except RasterioError:
        return None
    if not np.isfinite([lon, lat]).all():
        return None
    east_of_first = (np.array(lon) - lon[0] + 180) % 360 - 180  # on one side of the 180th meridian, or across it
    return outline(np.stack([lon[0] + east_of_first, lat], 1))


def outline(ring: np.ndarray) -> Footprint:
    """A ring (points, 2) of longitudes and latitudes, of which longitudes may go beyond 180 on either side."""
    parts = []
    for turn in (-360, 0, 360):
        part = beyond(beyond(ring + np.array([turn, 0]), -180, 1), 180, -1)
        if len(part):
            closed = np.round(np.concatenate([part, part[:1]]), 7)
            parts.append([[(float(lon), float(lat)) for lon, lat in closed]])
    west, east = (((value + 180) % 360 - 180) for value in (ring[:, 0].min(), ring[:, 0].max()))
    geometry = (
        {"type": "Polygon", "coordinates": parts[0]}
        if len(parts) == 1
        else {"type": "MultiPolygon", "coordinates": parts}
    )
    south, north = ring[:, 1].min(), ring[:, 1].max()
    bbox = [round(float(value), 7) for value in (west, south, east if east > -180 else 180.0, north)]
    return Footprint(geometry, (bbox[0], bbox[1], bbox[2], bbox[3]))


def beyond(ring: np.ndarray, meridian: float, side: int) -> np.ndarray:
    """The part of a ring that lies east (side 1) or west (-1) of a meridian, cut along it."""
    kept: list[np.ndarray] = []
    for point, following in zip(ring, np.roll(ring, -1, 0), strict=True):
        here, there = (side * (place[0] - meridian) for place in (point, following))
        if here >= 0:
            kept.append(point)
        if here * there < 0:
            kept.append(point + (following - point) * here / (here - there))
    inside = np.array(kept).reshape(-1, 2)
    return inside if len(inside) and (side * (inside[:, 0] - meridian) > 0).any() else inside[:0]


def located(transform: Any, col: float, row: float) -> tuple[float, float]:
    """Where a place among the pixels lies. Not by an operator: which one it is depends on the version of affine."""
    return (
        transform.a * col + transform.b * row + transform.c,
        transform.d * col + transform.e * row + transform.f,
    )


def describe_crs(scene: Scene) -> dict[str, Any]:
    """A scene's grid as STAC's projection extension has it."""
    crs, transform = scene.crs, scene.transform
    about: dict[str, Any] = {"proj:shape": [scene.height, scene.width]}
    if not transform.is_identity:
        about["proj:transform"] = [*map(float, transform[:6])]
    if crs:
        code = crs.to_epsg()
        about["proj:code"] = f"EPSG:{code}" if code else None
        if not code:
            about["proj:wkt2"] = crs.to_wkt(version="WKT2_2019")
    return about


def crs_name(scene: Scene) -> str:
    """What people call a scene's coordinate system."""
    if not scene.crs:
        return "none"
    code = scene.crs.to_epsg()
    words = scene.crs.to_wkt().split('"')
    return (words[1] if len(words) > 1 else "unnamed") + (f" (EPSG:{code})" if code else "")
