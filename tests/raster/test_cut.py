"""Parts of scenes: windows, boxes, areas of interest. The same pixels as in the whole, at the same place."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC
from rasterio.warp import transform, transform_bounds
from rasterio.windows import Window

from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.raster import Cut, Scale, Scene, valid_share
from d2ls_infer.raster.cut import Part

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
UTM = "EPSG:32618"
LEFT, TOP, PIXEL = 500_000.0, 4_600_000.0, 2.0
HEIGHT, WIDTH = 40, 30


@pytest.fixture
def scene(tmp_path: Path, write_raster: Write, pixels: Pixels) -> Path:
    """40 x 30 pixels of two metres, whose upper left corner is LEFT, TOP."""
    return write_raster(tmp_path / "scene.tif", pixels(3, HEIGHT, WIDTH))


def part_of(path: Path, **where: Any) -> Part:
    with Scene.open(path, bands_needed=3, cut=Cut.of(**where)) as scene:
        return scene.part


def box(row: float, col: float, stop_row: float, stop_col: float) -> tuple[float, float, float, float]:
    """The ground of a block of pixels."""
    return LEFT + col * PIXEL, TOP - stop_row * PIXEL, LEFT + stop_col * PIXEL, TOP - row * PIXEL


def ring(left: float, bottom: float, right: float, top: float) -> list[list[float]]:
    return [[left, bottom], [right, bottom], [right, top], [left, top], [left, bottom]]


def save_area(path: Path, *polygons: list[list[list[float]]], crs: str = UTM) -> Path:
    """Polygons (rings of corners) as GeoJSON."""
    features = [
        {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": p}} for p in polygons
    ]
    code = crs.partition(":")[2]
    name = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{code}"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": name, "features": features}))
    return path


# Windows and boxes


@pytest.mark.parametrize(
    ("window", "part"),
    [
        ("3,5,10,7", (5, 3, 7, 10)),
        (Window(3, 5, 10, 7), (5, 3, 7, 10)),
        ((0, 0, WIDTH, HEIGHT), (0, 0, HEIGHT, WIDTH)),
        ("29,39,1,1", (39, 29, 1, 1)),
        ("20,30,1000,1000", (30, 20, 10, 10)),
    ],
)
def test_a_window_is_columns_and_rows_as_far_as_there_are_any(
    scene: Path, window: Any, part: tuple[int, int, int, int]
) -> None:
    assert part_of(scene, window=window)[:4] == part


@pytest.mark.parametrize(
    ("bbox", "part"),
    [
        (box(5, 3, 12, 13), (5, 3, 7, 10)),  # edges on edges of pixels
        (box(5.0000001, 2.9999999, 12.0000001, 13.0000001), (5, 3, 7, 10)),  # but for rounding
        (box(5.4, 3.9, 5.6, 4.1), (5, 3, 1, 2)),  # every pixel it touches
        (box(5.4, 3.4, 5.5, 3.5), (5, 3, 1, 1)),
        (box(-50, -50, 3, 2), (0, 0, 3, 2)),
        (box(-5, -5, 500, 500), (0, 0, HEIGHT, WIDTH)),
    ],
)
def test_a_box_takes_the_pixels_that_it_touches(
    scene: Path, bbox: tuple[float, ...], part: tuple[int, int, int, int]
) -> None:
    assert part_of(scene, bbox=bbox)[:4] == part
    assert part_of(scene, bbox=",".join(map(repr, bbox)))[:4] == part


def test_a_box_in_another_system_reaches_as_far_as_its_ground(scene: Path) -> None:
    bbox = box(10, 5, 20, 15)
    in_degrees = transform_bounds(UTM, "EPSG:4326", *bbox)
    assert -75.01 < in_degrees[0] < in_degrees[2] < -74.99  # longitude comes first
    row, col, height, width, _ = part_of(scene, bbox=in_degrees, bbox_crs="EPSG:4326")
    assert row <= 10
    assert 20 <= row + height <= 22
    assert col <= 5
    assert 15 <= col + width <= 17


@pytest.mark.parametrize(
    "placed",
    [Affine(2, 0, LEFT, 0, 2, TOP), Affine(3, 4, LEFT, 4, -3, TOP), Affine(-1, 0, LEFT, 0, -2, TOP)],
    ids=["south up", "rotated", "mirrored"],
)
def test_a_box_on_another_grid_is_the_pixels_around_it(
    tmp_path: Path, write_raster: Write, pixels: Pixels, placed: Affine
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, HEIGHT, WIDTH), transform=placed)
    a, b, c, d, e, f = placed[:6]
    corners = [(a * col + b * row + c, d * col + e * row + f) for row in (10, 12) for col in (20, 25)]
    bbox = (*np.min(corners, 0), *np.max(corners, 0))
    row, col, height, width, _ = part_of(path, bbox=bbox)
    assert row <= 10
    assert row + height >= 12
    assert col <= 20
    assert col + width >= 25
    if b == 0:
        assert (row, col, height, width) == (10, 20, 2, 5)


@settings(max_examples=50)
@given(st.data())
def test_a_part_has_the_pixels_and_the_place_that_it_has_in_the_whole(
    write_raster: Write, pixels: Pixels, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    height, width = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows, cols = data.draw(st.integers(1, height - row)), data.draw(st.integers(1, width - col))
    array = pixels(2, height, width)
    array[:, ::3, ::4] = 0
    path = write_raster(tmp_path_factory.getbasetemp() / "part.tif", array, nodata=0)
    with Scene.open(path, bands_needed=2, cut=Cut.of((col, row, cols, rows))) as scene:
        values, valid = scene.rows(0, scene.height)
        assert np.array_equal(values, array[:, row : row + rows, col : col + cols])
        assert np.array_equal(valid, values.any(0))
        assert scene.transform == Affine(2, 0, LEFT + 2 * col, 0, -2, TOP - 2 * row)
        middle = scene.rows(rows // 2, rows // 2 + 1)
        assert np.array_equal(middle.values, values[:, rows // 2 : rows // 2 + 1])


def test_percentiles_are_those_of_the_whole_scene(tmp_path: Path, write_raster: Write) -> None:
    array = np.arange(1200, dtype=np.uint16).reshape(1, 40, 30)
    path = write_raster(tmp_path / "scene.tif", array)
    options: dict[str, Any] = {"bands_needed": 1, "value_range": (0.0, 255.0), "scale": Scale(0, 100, "percentiles")}
    with Scene.open(path, **options) as whole, Scene.open(path, cut=Cut.of("5,10,9,8"), **options) as part:
        assert np.array_equal(part.rows(0, 8).values, whole.rows(10, 18).values[:, :, 5:14])


def test_control_points_and_coefficients_keep_their_place(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, HEIGHT, WIDTH), georeferenced=False)
    points = [GroundControlPoint(0, 0, 10, 50), GroundControlPoint(0, 30, 11, 50), GroundControlPoint(40, 0, 10, 49)]
    coefficients = [1.0] + [0.0] * 19
    with warnings.catch_warnings(), rasterio.Env():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        dataset = rasterio.open(path, "r+")
    with dataset:
        dataset.gcps = (points, rasterio.CRS.from_epsg(4326))
        dataset.rpcs = RPC(
            height_off=0.0, height_scale=1.0, lat_off=50.0, lat_scale=1.0, line_den_coeff=coefficients,
            line_num_coeff=coefficients, line_off=20.0, line_scale=20.0, long_off=10.0, long_scale=1.0,
            samp_den_coeff=coefficients, samp_num_coeff=coefficients, samp_off=15.0, samp_scale=15.0,
        )  # fmt: skip
    with Scene.open(path, bands_needed=3, cut=Cut.of("5,10,9,8")) as scene:
        found, crs = scene.gcps
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(-10, -5, 10, 50), (-10, 25, 11, 50), (30, -5, 10, 49)]
        assert crs.to_epsg() == 4326
        assert (scene.rpcs.line_off, scene.rpcs.samp_off) == (10.0, 10.0)
    with Scene.open(path, bands_needed=3) as scene:
        assert (scene.rpcs.line_off, scene.rpcs.samp_off) == (20.0, 15.0)


# Areas of interest


@pytest.fixture
def _pyogrio() -> None:
    pytest.importorskip("pyogrio", reason="areas of interest need pyogrio")


@pytest.mark.usefixtures("_pyogrio")
@pytest.mark.parametrize("crs", [UTM, "EPSG:4326", "EPSG:3857"])
def test_what_lies_outside_of_an_area_is_invalid(scene: Path, tmp_path: Path, crs: str) -> None:
    """Two polygons, one with a hole, in three coordinate systems. Their edges keep off the pixels' centres."""

    def moved(rings: list[list[list[float]]]) -> list[list[list[float]]]:
        return [[list(p) for p in zip(*transform(UTM, crs, *zip(*r, strict=True)), strict=True)] for r in rings]

    polygons = [[ring(*box(5, 4, 15, 14)), ring(*box(8, 7, 12, 11))], [ring(*box(20, 20, 22, 24))]]
    path = save_area(tmp_path / "area.geojson", *map(moved, polygons), crs=crs)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[5:15, 4:14] = inside[20:22, 20:24] = True
    inside[8:12, 7:11] = False
    with Scene.open(scene, bands_needed=3, cut=Cut.of(aoi=path)) as opened:
        row, col, height, width, _ = opened.part
        assert row in (4, 5)
        assert col in (3, 4)
        assert row + height in (22, 23)
        assert col + width in (24, 25)
        valid = np.concatenate([opened.rows(r, min(r + 5, height)).valid for r in range(0, height, 5)])
    assert np.array_equal(valid, inside[row : row + height, col : col + width])


@pytest.mark.usefixtures("_pyogrio")
def test_an_area_in_a_geopackage_or_shapefile(scene: Path, tmp_path: Path) -> None:
    from pyogrio.raw import read, write

    source = save_area(tmp_path / "area.geojson", [ring(*box(5, 4, 15, 14))])
    _, _, geometry, _ = read(source, columns=[])
    for name in ("area.gpkg", "area.shp", "area.fgb"):
        write(tmp_path / name, geometry, [], [], geometry_type="Polygon", crs=UTM)
        assert part_of(scene, aoi=tmp_path / name)[:4] == (5, 4, 10, 10)


@pytest.mark.usefixtures("_pyogrio")
def test_an_area_on_a_rotated_grid(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, HEIGHT, WIDTH), transform=Affine(3, 4, LEFT, 4, -3, TOP))
    triangle = [[LEFT + x, TOP + y] for x, y in ((0.3, 0.4), (140.3, 20.4), (60.3, -60.4), (0.3, 0.4))]
    area = save_area(tmp_path / "area.geojson", [triangle])
    with Scene.open(path, bands_needed=3, cut=Cut.of(aoi=area)) as scene:
        found = scene.rows(0, scene.height).valid
        cells = scene.height // 5, scene.width // 4
        blocks = found[: cells[0] * 5, : cells[1] * 4].reshape(cells[0], 5, cells[1], 4)
        part = scene.part._replace(height=cells[0] * 5, width=cells[1] * 4)
        touched = part.touched(scene.transform, cells)
        assert not (blocks.any((1, 3)) & ~touched).any()
        assert blocks.all((1, 3)).sum() < touched.sum() < blocks.any((1, 3)).sum() + sum(cells)
        assert valid_share(scene, cells) == pytest.approx(touched.mean(), abs=0.05)
        row, col = np.mgrid[: scene.height, : scene.width] + 0.5
        a, b, c, d, e, f = scene.transform[:6]
        x, y = a * col + b * row + c - LEFT, d * col + e * row + f - TOP
    sides = [
        (x - (p[0] - LEFT)) * (q[1] - p[1]) >= (y - (p[1] - TOP)) * (q[0] - p[0])
        for p, q in itertools.pairwise(triangle)
    ]
    expected = np.all(sides, axis=0)
    assert np.array_equal(found, expected)
    assert found.any()
    assert not found.all()


# What makes no sense


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"window": "1,2,3"}, ["COL,ROW,WIDTH,HEIGHT", "'1,2,3'"]),
        ({"window": "1,2,3,x"}, ["'1,2,3,x'"]),
        ({"window": "1.5,2,3,4"}, ["whole pixels"]),
        ({"window": (1.5, 2, 3, 4)}, ["whole pixels"]),
        ({"window": Window(1.5, 2, 3, 4)}, ["whole pixels"]),
        ({"window": "-1,0,5,5"}, ["got -1,0,5,5"]),
        ({"window": "0,0,0,5"}, ["got 0,0,0,5"]),
        ({"bbox": "1,2,3"}, ["MINX,MINY,MAXX,MAXY"]),
        ({"bbox": "5,0,1,4"}, ["smaller first", "5,0,1,4"]),
        ({"bbox": "1,2,1,4"}, ["smaller first"]),
        ({"bbox": "nan,2,3,4"}, ["a box is"]),
        ({"bbox_crs": "EPSG:4326"}, ["--bbox-crs", "--bbox, which is not given"]),
        ({"bbox": "1,2,3,4", "window": "1,2,3,4"}, ["--window and --bbox", "one of them"]),
        ({"bbox": "1,2,3,4", "aoi": "a.gpkg"}, ["--bbox and --aoi"]),
    ],
)
def test_what_is_no_part_is_refused(where: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Cut.of(**where)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"window": f"{WIDTH},0,5,5"}, ["window 30,0,5,5", "do not meet", "30 x 40 pixels"]),
        ({"bbox": box(-9, 0, -2, 5)}, ["do not meet", "rows -9 to -3"]),
        ({"bbox": (10.0, 50.0, 11.0, 51.0)}, ["do not meet"]),  # degrees, but nobody said so
        ({"bbox": (10.0, 50.0, 11.0, 51.0), "bbox_crs": "EPSG:4326"}, ["do not meet"]),
        ({"bbox": (0.0, 0.0, 1.0, 1.0), "bbox_crs": "EPSG:99999999"}, ["EPSG:99999999 is no coordinate system"]),
        ({"bbox": (0.0, 0.0, 1.0, 1.0), "bbox_crs": "nonsense"}, ["nonsense is no coordinate system"]),
        ({"aoi": "nowhere.gpkg"}, ["no such file: nowhere.gpkg"]),
    ],
)
def test_a_part_that_is_not_in_the_scene_is_one_line(scene: Path, where: dict[str, Any], words: list[str]) -> None:
    if "aoi" in where:
        pytest.importorskip("pyogrio")
    with pytest.raises(UsageError) as caught:
        part_of(scene, **where)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_pyogrio")
@pytest.mark.parametrize(
    ("polygons", "words"),
    [
        ([[ring(*box(50, 50, 60, 60))]], ["area.geojson", "do not meet"]),
        # Around the scene, but it lies in the hole.
        ([[ring(*box(-9, -9, 50, 40)), ring(*box(-1, -1, 41, 31))]], ["do not meet", "no pixel's centre"]),
        ([[ring(*box(5.6, 5.6, 5.9, 5.9))]], ["no pixel's centre"]),
        ([], ["no polygon"]),
    ],
)
def test_an_area_without_a_pixel_is_one_line(
    scene: Path, tmp_path: Path, polygons: list[Any], words: list[str]
) -> None:
    path = save_area(tmp_path / "area.geojson", *polygons)
    with pytest.raises(UsageError) as caught:
        part_of(scene, aoi=path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.usefixtures("_pyogrio")
@pytest.mark.parametrize("content", ["hello", '{"type": "Point", "coordinates": [1, 2]}'])
def test_a_file_that_holds_no_area_is_one_line(scene: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "area.geojson"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"area\.geojson"):
        part_of(scene, aoi=path)


def test_without_pyogrio_it_says_what_to_install(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyogrio", None)
    with pytest.raises(UsageError, match=r"area of interest needs pyogrio; pip install 'd2ls-infer\[vector\]'"):
        part_of(scene, aoi=tmp_path / "area.gpkg")


@pytest.mark.parametrize("where", [{"bbox": (0, 0, 9, 9)}, {"aoi": "area.geojson"}], ids=["bbox", "aoi"])
def test_a_plain_image_is_cut_by_a_window_only(
    tmp_path: Path, write_raster: Write, pixels: Pixels, where: dict[str, Any]
) -> None:
    if "aoi" in where:
        pytest.importorskip("pyogrio")
        where = {"aoi": save_area(tmp_path / "area.geojson", [ring(0, 0, 9, 9)])}
    path = write_raster(tmp_path / "scene.png", pixels(3, HEIGHT, WIDTH), driver="PNG", georeferenced=False)
    with pytest.raises(UsageError, match="--window"):
        part_of(path, **where)
    assert part_of(path, window="1,2,3,4")[:4] == (2, 1, 4, 3)


def test_a_scene_without_a_coordinate_system_knows_no_other(
    tmp_path: Path, write_raster: Write, pixels: Pixels
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, HEIGHT, WIDTH), crs=None)
    assert part_of(path, bbox=box(5, 3, 12, 13))[:4] == (5, 3, 7, 10)
    with pytest.raises(UsageError, match="no coordinate system"):
        part_of(path, bbox=(0, 0, 1, 1), bbox_crs="EPSG:4326")


def test_a_missing_area_is_missing(scene: Path) -> None:
    pytest.importorskip("pyogrio")
    with pytest.raises(MissingFileError):
        part_of(scene, aoi="nowhere.gpkg")
