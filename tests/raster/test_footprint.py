"""Where scenes lie on the earth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from affine import Affine

from d2ls_infer.raster import Scene
from d2ls_infer.raster.footprint import crs_name, describe_crs, footprint

Write = Callable[..., Path]


def opened(tmp_path: Path, write_raster: Write, crs: str | None, transform: Affine) -> Scene:
    path = write_raster(tmp_path / "scene.tif", np.zeros((1, 20, 30), np.uint8), crs=crs, transform=transform)
    return Scene.open(path, bands_needed=1)


@pytest.mark.parametrize(
    ("crs", "transform", "bbox"),
    [
        ("EPSG:4326", Affine(0.1, 0, 8, 0, -0.1, 50), (8, 48, 11, 50)),
        ("EPSG:4326", Affine(0.1, 0, 8, 0, 0.1, 50), (8, 50, 11, 52)),
        ("EPSG:4326", Affine(0.1, 0, 178, 0, -0.1, 1), (178, -1, -179, 1)),
        ("EPSG:4326", Affine(0.1, 0, -181, 0, -0.1, 1), (179, -1, -178, 1)),
        ("EPSG:4326", Affine(0.1, 0, 177, 0, -0.1, 1), (177, -1, 180, 1)),
        ("EPSG:4326", Affine(0.1, 0, -180, 0, -0.1, 1), (-180, -1, -177, 1)),
        ("EPSG:3857", Affine(1e4, 0, 0, 0, -1e4, 0), (0, -1.7963362, 2.6949459, 0)),
        ("EPSG:32601", Affine(2e4, 0, 0, 0, -2e4, 2e5), (178.5, -1.85, -176.1, 1.82)),
    ],
)
def test_the_box_goes_from_west_to_east_also_across_the_date_line(
    tmp_path: Path, write_raster: Write, crs: str, transform: Affine, bbox: tuple[float, ...]
) -> None:
    with opened(tmp_path, write_raster, crs, transform) as scene:
        place = footprint(scene)
    assert place is not None
    assert place.bbox == pytest.approx(bbox, abs=1e-6 if crs != "EPSG:32601" else 0.06)
    rings = place.geometry["coordinates"]
    rings = [ring for part in rings for ring in part] if place.geometry["type"] == "MultiPolygon" else rings
    assert (len(rings) == 2) == (bbox[0] > bbox[2])
    for ring in rings:
        points = np.array(ring)
        assert (points[0] == points[-1]).all()
        assert (abs(points[:, 0]) <= 180).all()
        assert np.ptp(points[:, 0]) < 4
    total = sum(np.ptp(np.array(ring)[:, 0]) for ring in rings)
    assert total == pytest.approx((bbox[2] - bbox[0]) % 360, abs=1e-6 if crs != "EPSG:32601" else 0.1)


def test_a_scene_without_a_place_has_none(tmp_path: Path, write_raster: Write) -> None:
    with opened(tmp_path, write_raster, None, Affine(2, 0, 5, 0, -2, 5)) as scene:
        assert footprint(scene) is None
        assert crs_name(scene) == "none"
        assert describe_crs(scene) == {"proj:shape": [20, 30], "proj:transform": [2, 0, 5, 0, -2, 5]}


def test_a_coordinate_system_without_a_code_is_told_in_words(tmp_path: Path, write_raster: Write) -> None:
    crs = "+proj=laea +lat_0=52 +lon_0=10 +ellps=GRS80 +units=m"
    with opened(tmp_path, write_raster, crs, Affine(2, 0, 5, 0, -2, 5)) as scene:
        about = describe_crs(scene)
        assert about["proj:code"] is None
        assert "LAEA" in about["proj:wkt2"] or "Lambert Azimuthal" in about["proj:wkt2"]
        assert footprint(scene) is not None
