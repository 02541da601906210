"""How large pixels are on the ground."""

from __future__ import annotations

from typing import Any

import numpy as np
from rasterio import warp

WGS84_A = 6_378_137.0
WGS84_E2 = 6.694379990141e-3


def row_areas_m2(crs: Any, transform: Any, height: int, width: int) -> np.ndarray | None:
    """(height,) square metres of a pixel of each row; None without a coordinate system or a transform.

    A projection that is true to a hundredth is taken at its word, by the transform. Of others (Mercator, and
    degrees), pixel sides are taken to longitude and latitude, and to metres by the ellipsoid's radii there.
    """
    if not is_placed(crs, transform):
        return None
    (right_x, down_x), (right_y, down_y) = sides_m(crs, transform, np.arange(height) + 0.5, width / 2)
    areas: np.ndarray = np.abs(right_x * down_y - down_x * right_y)
    if crs.is_projected:
        planar = np.full(height, abs(transform.determinant) * crs.linear_units_factor[1] ** 2)
        if not np.isfinite(areas).all() or np.allclose(areas, planar, rtol=0.01):
            return planar
    return areas if np.isfinite(areas).all() else None


def pixel_size_m(crs: Any, transform: Any, height: int, width: int) -> tuple[float, float] | None:
    """Metres on the ground from row to row and from column to column, in the middle of a raster; else as above."""
    if not is_placed(crs, transform):
        return None
    x, y = sides_m(crs, transform, np.array([height / 2]), width / 2)
    right, down = np.hypot(x, y)[:, 0]
    if crs.is_projected:
        unit = crs.linear_units_factor[1]
        planar = np.hypot(transform.a, transform.d) * unit, np.hypot(transform.b, transform.e) * unit
        if not np.isfinite([right, down]).all() or np.allclose([right, down], planar, rtol=0.01):
            right, down = planar
    return (float(down), float(right)) if np.isfinite([right, down]).all() else None


def is_placed(crs: Any, transform: Any) -> bool:
    """Whether it is known where on the ground the pixels lie."""
    return bool(crs) and not transform.is_identity and bool(crs.is_projected or crs.is_geographic)


def sides_m(crs: Any, transform: Any, row: np.ndarray, col: float) -> tuple[np.ndarray, np.ndarray]:
    """The sides of pixels at (n,) rows and a column, metres east (2, n) and north (2, n): to the right, then down."""
    # Sides of about 100 units: of a few centimetres, the rounding of a map projection would be seen.
    side = 100 / abs(transform.determinant) ** 0.5 if crs.is_projected else 1.0
    place = np.full(len(row), col)
    rows = np.concatenate([row, row, row - side / 2, row + side / 2])
    cols = np.concatenate([place - side / 2, place + side / 2, place, place])
    east = transform.a * cols + transform.b * rows + transform.c
    north = transform.d * cols + transform.e * rows + transform.f
    lon, lat = (np.asarray(v).reshape(4, -1) for v in warp.transform(crs, "EPSG:4326", east, north))
    curvature = 1 - WGS84_E2 * np.sin(phi := np.radians(lat.mean(0))) ** 2
    meridian, normal = WGS84_A * (1 - WGS84_E2) / curvature**1.5, WGS84_A / np.sqrt(curvature)
    d_lon = (np.stack([lon[1] - lon[0], lon[3] - lon[2]]) + 180) % 360 - 180  # across the date line too
    x = np.radians(d_lon) * normal * np.cos(phi)
    y = np.radians(np.stack([lat[1] - lat[0], lat[3] - lat[2]])) * meridian
    return x / side, y / side
