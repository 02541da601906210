"""Polygons burnt onto an image's grid: a pixel has the class of the polygon that its centre lies in, or none."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasterio.warp import transform

from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.raster.polygons import burn_polygons, parse_polygons

pytest.importorskip("pyogrio", reason="polygons need pyogrio")

from pyogrio.raw import write as write_layer

LABELS = LabelMap.of(["field", "forest", "water"])
UTM = "EPSG:32618"
LEFT, TOP, PIXEL = 500_000.0, 4_600_000.0, 2.0
Ring = list[tuple[float, float]]


def box(first_row: int, first_col: int, last_row: int, last_col: int) -> Ring:
    """The ring around a block of pixels, the last row and column not in it."""
    left, right = LEFT + first_col * PIXEL, LEFT + last_col * PIXEL
    top, bottom = TOP - first_row * PIXEL, TOP - last_row * PIXEL
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def wkb(*polygons: list[Ring], order: str = "<") -> bytes:
    """One polygon (its rings), or several as a multipolygon."""
    mark = b"\x01" if order == "<" else b"\x00"
    parts = [
        mark + struct.pack(f"{order}II", 3, len(rings))
        + b"".join(struct.pack(f"{order}I", len(ring)) + np.array(ring, f"{order}f8").tobytes() for ring in rings)
        for rings in polygons
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else mark + struct.pack(f"{order}II", 6, len(parts)) + b"".join(parts)


def save(
    path: Path,
    geometries: Iterable[bytes | None],
    values: Iterable[Any],
    *,
    crs: str | None = UTM,
    column: str = "class",
    kind: str = "Unknown",
) -> Path:
    values = [*values]
    numbers = all(isinstance(value, int | float) for value in values)
    write_layer(
        path,
        geometry=np.array([*geometries], object),
        field_data=[np.array(values, None if numbers else object)],
        fields=[column],
        geometry_type=kind,
        crs=crs,
    )
    return path


@pytest.fixture
def image(tmp_path: Path, write_raster: Callable[..., Path]) -> Path:
    """6 x 8 pixels of 2 m."""
    return write_raster(tmp_path / "scene.tif", np.zeros((1, 6, 8), np.uint8))


def blocks(*parts: tuple[int, int, int, int, int], fill: int = 255) -> list[list[int]]:
    expected = np.full((6, 8), fill)
    for index, *place in parts:
        first_row, first_col, last_row, last_col = place
        expected[first_row:last_row, first_col:last_col] = index
    return expected.tolist()


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".shp", ".fgb"])
def test_blocks_of_pixels_come_back_from_any_format(image: Path, suffix: str) -> None:
    path = image.with_suffix(suffix)
    save(path, [wkb([box(0, 0, 2, 3)]), wkb([box(3, 4, 6, 8)])], ["forest", "water"], kind="Polygon")
    burnt = burn_polygons(path, like=image, labels=LABELS)
    assert burnt.dtype == np.uint8
    assert burnt.tolist() == blocks((1, 0, 0, 2, 3), (2, 3, 4, 6, 8))


def test_ground_without_polygons_is_the_background_if_there_is_one(image: Path) -> None:
    path = save(image.with_suffix(".gpkg"), [wkb([box(0, 0, 2, 3)])], ["forest"])
    burnt = burn_polygons(path, like=image, labels=LABELS, background="field")
    assert burnt.tolist() == blocks((1, 0, 0, 2, 3), fill=0)


def test_a_file_without_polygons_is_all_background(image: Path) -> None:
    """GeoJSON without features has no columns either."""
    path = image.with_suffix(".geojson")
    path.write_text('{"type": "FeatureCollection", "features": []}')
    burnt = burn_polygons(path, like=image, labels=LABELS, background="field")
    assert burnt.tolist() == blocks(fill=0)


def test_polygons_are_brought_into_the_system_of_the_image(image: Path) -> None:
    def degrees(ring: Ring) -> Ring:
        longitudes, latitudes = transform(UTM, "EPSG:4326", *zip(*ring, strict=True))
        return list(zip(longitudes, latitudes, strict=True))

    path = save(image.with_suffix(".geojson"), [wkb([degrees(box(1, 2, 4, 5))])], ["water"], crs="EPSG:4326")
    assert burn_polygons(path, like=image, labels=LABELS).tolist() == blocks((2, 1, 2, 4, 5))


def test_holes_stay_open_and_later_polygons_lie_on_top(image: Path) -> None:
    ring_with_hole = wkb([box(0, 0, 6, 6), box(2, 2, 4, 4)])
    both = wkb([box(0, 6, 1, 8)], [box(5, 5, 6, 8)])
    path = save(image.with_suffix(".gpkg"), [ring_with_hole, both], ["field", "water"])
    assert burn_polygons(path, like=image, labels=LABELS).tolist() == blocks(
        (0, 0, 0, 6, 6), (255, 2, 2, 4, 4), (2, 0, 6, 1, 8), (2, 5, 5, 6, 8)
    )


def test_a_column_of_numbers_holds_indices_and_an_empty_field_is_ignored(image: Path) -> None:
    rings = [wkb([box(0, 0, 1, 1)]), wkb([box(0, 1, 1, 2)]), wkb([box(0, 2, 1, 3)]), None]
    path = save(image.with_suffix(".gpkg"), rings, [2, 0, float("nan"), 1], column="code")
    assert burn_polygons(path, like=image, labels=LABELS, column="code").tolist() == blocks(
        (2, 0, 0, 1, 1), (0, 0, 1, 1, 2)
    )
    path = save(image.with_name("named.gpkg"), rings[:3], ["water", None, ""])
    assert burn_polygons(path, like=image, labels=LABELS).tolist() == blocks((2, 0, 0, 1, 1))


def test_polygons_out_of_reach_leave_an_empty_mask(image: Path) -> None:
    path = save(image.with_suffix(".gpkg"), [wkb([box(1000, 1000, 1001, 1001)])], ["no class, but far away"])
    assert burn_polygons(path, like=image, labels=LABELS).tolist() == blocks()


def test_images_that_are_not_north_up(tmp_path: Path, write_raster: Callable[..., Path]) -> None:
    turned = Affine(0.0, PIXEL, LEFT, PIXEL, 0.0, TOP)  # rows run east, columns north
    image = write_raster(tmp_path / "turned.tif", np.zeros((1, 6, 8), np.uint8), transform=turned)
    ring = [
        (LEFT, TOP),
        (LEFT + 2 * PIXEL, TOP),
        (LEFT + 2 * PIXEL, TOP + 3 * PIXEL),
        (LEFT, TOP + 3 * PIXEL),
        (LEFT, TOP),
    ]
    path = save(tmp_path / "turned.gpkg", [wkb([ring])], ["forest"])
    assert burn_polygons(path, like=image, labels=LABELS).tolist() == blocks((1, 0, 0, 2, 3))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["forest", "road", "Water"], "column 'class' holds Water, road; classes are field, forest, water"),
        ([0, 3, 1], "column 'class' holds 3; classes are"),
        ([0.0, 0.5, 1.0], r"column 'class' holds 0\.5; classes are"),
    ],
)
def test_values_that_are_no_class_are_told(image: Path, values: list[Any], told: str) -> None:
    path = save(image.with_suffix(".gpkg"), [wkb([box(0, 0, 1, 1)])] * 3, values)
    with pytest.raises(UsageError, match=rf"scene\.gpkg: {told}"):
        burn_polygons(path, like=image, labels=LABELS)


def test_a_missing_column_is_told_with_those_that_are_there(image: Path) -> None:
    path = save(image.with_suffix(".gpkg"), [wkb([box(0, 0, 1, 1)])], ["field"], column="kind")
    with pytest.raises(UsageError, match=r"scene\.gpkg has no column 'class'; it has kind"):
        burn_polygons(path, like=image, labels=LABELS)


def test_points_are_no_polygons(image: Path) -> None:
    point = b"\x01" + struct.pack("<Idd", 1, LEFT + 1, TOP - 1)
    path = save(image.with_suffix(".gpkg"), [wkb([box(0, 0, 1, 1)]), point], ["field", "field"])
    with pytest.raises(UsageError, match=r"scene\.gpkg: feature 2: geometries are polygons, got type 1"):
        burn_polygons(path, like=image, labels=LABELS)


@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_without_a_coordinate_system_nothing_can_be_laid_over(
    image: Path, tmp_path: Path, write_raster: Callable[..., Path]
) -> None:
    lost = save(image.with_suffix(".shp"), [wkb([box(0, 0, 1, 1)])], ["field"], crs=None, kind="Polygon")
    with pytest.raises(UsageError, match=r"scene\.shp has no coordinate system; .*\.prj"):
        burn_polygons(lost, like=image, labels=LABELS)
    plain = write_raster(tmp_path / "plain.png", np.zeros((1, 6, 8), np.uint8), driver="PNG", georeferenced=False)
    with pytest.raises(UsageError, match=r"plain\.png is not georeferenced; polygons cannot be laid over it"):
        burn_polygons(lost, like=plain, labels=LABELS)


def test_files_that_hold_no_layer_of_polygons_are_told(image: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"none\.geojson"):
        burn_polygons(tmp_path / "none.geojson", like=image, labels=LABELS)
    (tmp_path / "text.geojson").write_text("not at all")
    with pytest.raises(UsageError, match=r"text\.geojson is not a file of polygons that GDAL can read"):
        burn_polygons(tmp_path / "text.geojson", like=image, labels=LABELS)
    path = save(tmp_path / "two.gpkg", [wkb([box(0, 0, 1, 1)])], ["field"])
    write_layer(
        path,
        geometry=np.array([wkb([box(0, 0, 1, 1)])], object),
        field_data=[],
        fields=[],
        geometry_type="Polygon",
        crs=UTM,
        layer="more",
        append=False,
    )
    with pytest.raises(UsageError, match=r"two\.gpkg has 2 layers of geometries, but one is expected: two, more"):
        burn_polygons(path, like=image, labels=LABELS)


def test_without_pyogrio_it_says_what_to_install(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyogrio", None)
    with pytest.raises(UsageError, match=r"need pyogrio; pip install 'd2ls-infer\[train\]'"):
        burn_polygons(image.with_suffix(".gpkg"), like=image, labels=LABELS)


points = st.tuples(st.floats(-1e7, 1e7), st.floats(-1e7, 1e7))
rings = st.lists(st.lists(points, min_size=4, max_size=6), min_size=1, max_size=3)


@given(polygons=st.lists(rings, min_size=1, max_size=3), order=st.sampled_from("<>"))
def test_well_known_binary_is_read_in_either_byte_order(polygons: list[list[Ring]], order: str) -> None:
    assert parse_polygons(wkb(*polygons, order=order)) == polygons


def test_collections_are_opened_and_empty_polygons_are_nothing() -> None:
    one, empty = [box(0, 0, 1, 1)], b"\x01" + struct.pack("<II", 3, 0)
    collection = b"\x01" + struct.pack("<II", 7, 2) + wkb(one) + wkb(one, one)
    assert parse_polygons(collection) == [one, one, one]
    assert parse_polygons(empty) == []
