"""Everything that is made of a scene in one pass, reopened as users do: by rasterio, GDAL's own tools, pystac."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.errors import NotGeoreferencedWarning
from torch import Tensor

from d2ls_infer import predict_raster
from d2ls_infer.errors import D2LSError, OutputExistsError, RasterError, UsageError
from d2ls_infer.labels import NODATA
from d2ls_infer.outputs import STEPS
from d2ls_infer.tiling import Rows, TileGrid, blend

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
RASTERS = ("confidence", "probabilities", "entropy", "disagreement")
EVERYTHING: dict[str, Any] = {
    **dict.fromkeys(RASTERS, True), "vector": ".gpkg", "report": ".html", "preview": ".png", "stac": True,
}  # fmt: skip
as_root = hasattr(os, "geteuid") and os.geteuid() == 0


class Made(NamedTuple):
    """What came of a scene, and what should have."""

    result: Any
    rows: Rows
    scene: Path


@pytest.fixture(scope="module")
def unsure(fakes: SimpleNamespace) -> type:
    """A segmenter whose scores are probabilities, and depend on the whole tile."""

    class Unsure(fakes.Fake):  # type: ignore[misc, name-defined]
        name, sha256, gsd_m = "toy", "ab" * 32, None

        def scores(self, batch: Tensor) -> Tensor:
            far = batch.float().mean((1, 2, 3), keepdim=True) * torch.linspace(-0.05, 0.05, 3).view(1, 3, 1, 1)
            return (batch.float() / 60 + far).softmax(1)

    return Unsure


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_raster: Write, pixels: Pixels, unsure: type) -> Made:
    """A scene of 90 x 70 pixels with a corner of nodata, and everything made of it."""
    folder = tmp_path_factory.mktemp("made")
    array = np.kron(pixels(3, 18, 14), np.ones((1, 5, 5), np.uint8))
    array[:, :30, :20] = 0
    scene = write_raster(folder / "scene.tif", array, nodata=0)
    segmenter = unsure()
    result = predict_raster(segmenter, scene, tile_size=32, overlap=8, **EVERYTHING)
    grid = TileGrid(90, 70, 32, 8)
    tiles = (
        (tile, (array[:, r : r + h, c : c + w], (array > 0).any(0)[r : r + h, c : c + w]))
        for tile in grid
        for r, c, h, w in [tile]
    )
    parts = list(blend(unsure().score, tiles, grid, channels=3, disagreement=True))
    told = [part.disagreement for part in parts if part.disagreement is not None]
    rows = Rows(0, torch.cat([p.scores for p in parts], 1), torch.cat([p.covered for p in parts]), torch.cat(told))
    return Made(result, rows, scene)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def gdalinfo(path: Path) -> dict[str, Any]:
    """What GDAL's own tool says of a raster."""
    if shutil.which("gdalinfo") is None:
        pytest.skip("needs GDAL's tools (gdal-bin)")
    done = subprocess.run(["gdalinfo", "-json", "-stats", path], capture_output=True, text=True, check=True)
    Path(f"{path}.aux.xml").stat()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# Rasters


def test_every_file_lies_beside_the_map(made: Made) -> None:
    assert names_in(made.scene.parent) == [
        "scene.tif",
        "scene_d2ls-toy.qml",
        "scene_d2ls-toy.tif",
        "scene_d2ls-toy.tif.aux.xml",
        "scene_d2ls-toy_confidence.tif",
        "scene_d2ls-toy_disagreement.tif",
        "scene_d2ls-toy_entropy.tif",
        "scene_d2ls-toy_polygons.gpkg",
        "scene_d2ls-toy_preview.png",
        "scene_d2ls-toy_probabilities.tif",
        "scene_d2ls-toy_report.html",
        "scene_d2ls-toy_stac.json",
    ]
    assert made.result.files["classes"] == made.result.output
    assert {path.name for path in made.result.files.values()} < set(names_in(made.scene.parent))


@pytest.mark.parametrize("kind", RASTERS)
def test_rasters_hold_what_was_blended_on_the_scenes_grid(made: Made, kind: str) -> None:
    scores, covered = made.rows.scores.double(), made.rows.covered.numpy()
    expected = {
        "confidence": lambda: scores.amax(0),
        "probabilities": lambda: scores,
        "entropy": lambda: -(scores * scores.clamp_min(1e-12).log()).sum(0) / np.log(3),
        "disagreement": lambda: made.rows.disagreement,
    }[kind]().numpy()  # fmt: skip
    with rasterio.open(made.result.files[kind]) as dataset, rasterio.open(made.scene) as scene:
        found = dataset.read()
        assert (dataset.crs, dataset.transform, dataset.shape) == (scene.crs, scene.transform, scene.shape)
        assert set(dataset.dtypes) == {"uint8"}
        assert set(dataset.nodatavals) == {NODATA}
        assert dataset.scales == (1 / STEPS,) * dataset.count
        assert dataset.tags()["D2LS_MODEL"] == "toy"
        if kind == "probabilities":
            assert dataset.descriptions == ("water", "forest", "field")
        else:
            assert dataset.count == 1
            assert dataset.descriptions[0]
    expected = np.broadcast_to(expected, found.shape)
    assert (found[:, ~covered] == NODATA).all()
    np.testing.assert_allclose(found[:, covered] / STEPS, expected[:, covered], atol=0.51 / STEPS)
    assert found[:, covered].max() > 0


def test_disagreement_is_only_where_tiles_overlap(made: Made) -> None:
    with rasterio.open(made.result.files["disagreement"]) as dataset:
        found = dataset.read(1)
    assert (found[:24, 24:32][made.rows.covered.numpy()[:24, 24:32]] > 0).all(), "two tiles"
    assert not found[32:40, :24].any(), "the middle of a tile"


def test_the_map_is_the_same_byte_for_byte_with_and_without_other_outputs(
    made: Made, tmp_path: Path, unsure: type
) -> None:
    alone = predict_raster(unsure(), made.scene, tmp_path, tile_size=32, overlap=8)
    assert alone.output.read_bytes() == made.result.output.read_bytes()
    assert alone.areas == made.result.areas
    assert list(alone.files) == ["classes"]
    assert names_in(tmp_path) == ["scene_d2ls-toy.qml", "scene_d2ls-toy.tif", "scene_d2ls-toy.tif.aux.xml"]


def test_confidence_and_probabilities_agree_with_the_map(made: Made) -> None:
    with (
        rasterio.open(made.result.output) as classes,
        rasterio.open(made.result.files["probabilities"]) as probabilities,
        rasterio.open(made.result.files["confidence"]) as confidence,
    ):
        labels, shares, sure = classes.read(1), probabilities.read(), confidence.read(1)
    known = labels != NODATA
    assert np.array_equal(np.take_along_axis(shares, np.where(known, labels, 0)[None], 0)[0][known], sure[known])


def test_at_another_ground_sampling_distance_all_are_on_the_scenes_grid(
    made: Made, tmp_path: Path, unsure: type
) -> None:
    result = predict_raster(unsure(), made.scene, tmp_path, gsd=3.0, tile_size=32, **EVERYTHING)
    with rasterio.open(result.output) as classes:
        known, grid = classes.read(1) != NODATA, (classes.shape, classes.transform)
    for kind in RASTERS:
        with rasterio.open(result.files[kind]) as dataset:
            assert (dataset.shape, dataset.transform) == grid
            assert np.array_equal(dataset.read(1) != NODATA, known)


def test_a_part_of_a_scene_has_all_outputs_of_the_part(made: Made, tmp_path: Path, unsure: type) -> None:
    result = predict_raster(unsure(), made.scene, tmp_path, window=(10, 20, 40, 30), tile_size=32, **EVERYTHING)
    expected = Affine(2, 0, 500_020, 0, -2, 4_599_960)
    for name in ("classes", *RASTERS):
        with rasterio.open(result.files[name]) as dataset:
            assert (dataset.shape, dataset.transform) == ((30, 40), expected)
    item = json.loads(result.files["stac"].read_text())
    assert item["properties"]["proj:shape"] == [30, 40]
    assert item["properties"]["proj:transform"] == [2, 0, 500_020, 0, -2, 4_599_960]


# Cloud Optimized GeoTIFFs


def test_cogs_are_valid_and_hold_the_same(made: Made, tmp_path: Path, unsure: type, write_raster: Write) -> None:
    """Large enough for overviews: a scene of one block has none."""
    cogeo = pytest.importorskip("rio_cogeo.cogeo")
    array = np.kron(np.arange(1, 109, dtype=np.uint8).reshape(3, 6, 6), np.ones((1, 200, 150), np.uint8))
    scene = write_raster(tmp_path / "large.tif", array, nodata=7)
    (tmp_path / "cog").mkdir()
    options = dict.fromkeys(RASTERS, True)
    plain = predict_raster(unsure(), scene, **options)
    cogs = predict_raster(unsure(), scene, tmp_path / "cog", cog=True, **options)
    assert not [name for name in names_in(tmp_path / "cog") if "partial" in name or "tmp" in name]
    for name, path in cogs.files.items():
        valid, errors, warnings = cogeo.cog_validate(path, strict=True, quiet=True)
        assert valid, (errors, warnings)
        with rasterio.open(path) as cog, rasterio.open(plain.files[name]) as other:
            assert cog.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert np.array_equal(cog.read(), other.read())
            assert (cog.crs, cog.transform, cog.nodata) == (other.crs, other.transform, other.nodata)
            assert (cog.descriptions, cog.scales) == (other.descriptions, other.scales)
            assert cog.tags()["D2LS_OPTIONS"] == other.tags()["D2LS_OPTIONS"]
            assert cog.overviews(1) == [2, 4]
            small = cog.read(1, out_shape=(cog.height // 2, cog.width // 2))
            if name == "classes":
                assert cog.colormap(1) == other.colormap(1)
                assert set(np.unique(small)) <= {0, 1, 2, NODATA}
    command = shutil.which("rio", path=Path(sys.executable).parent)
    arguments = [command or "rio", "cogeo", "validate", cogs.output]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert "is a valid cloud optimized GeoTIFF" in done.stdout + done.stderr


def test_a_cog_has_names_colours_and_table_too(made: Made, tmp_path: Path, unsure: type) -> None:
    result = predict_raster(unsure(), made.scene, tmp_path, cog=True)
    assert names_in(tmp_path) == ["scene_d2ls-toy.qml", "scene_d2ls-toy.tif", "scene_d2ls-toy.tif.aux.xml"]
    band = gdalinfo(result.output)["bands"][0]
    assert len(band["colorTable"]["entries"]) == 256
    root = ElementTree.parse(f"{result.output}.aux.xml").getroot()
    assert len(root.findall(".//CategoryNames")) == 1
    assert len(root.findall(".//GDALRasterAttributeTable")) == 1


@pytest.mark.parametrize("crs", ["EPSG:32618+5773", "+proj=imoll +datum=WGS84", 'LOCAL_CS["site",UNIT["metre",1]]'])
@pytest.mark.parametrize("cog", [False, True])
def test_any_coordinate_system_is_kept_by_all(
    tmp_path: Path, write_raster: Write, unsure: type, crs: str, cog: bool
) -> None:
    """Also one that GeoTIFF has no keys for: GDAL puts it into a sidecar."""
    scene = write_raster(tmp_path / "scene.tif", np.ones((3, 20, 30), np.uint8), crs=crs)
    result = predict_raster(unsure(), scene, confidence=True, cog=cog)
    with rasterio.open(scene) as dataset:
        expected = dataset.crs
    for path in result.files.values():
        with rasterio.open(path) as dataset:
            assert dataset.crs == expected
    assert not [name for name in names_in(tmp_path) if "partial" in name]


@pytest.mark.parametrize("cog", [False, True])
def test_ground_control_points_are_kept_by_all(tmp_path: Path, write_raster: Write, unsure: type, cog: bool) -> None:
    scene = write_raster(tmp_path / "scene.tif", np.ones((3, 20, 30), np.uint8), georeferenced=False)
    points = [GroundControlPoint(row=r, col=c, x=10 + c / 100, y=50 - r / 100) for r in (0, 20) for c in (0, 30)]
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(scene, "r+") as dataset:
        dataset.gcps = points, "EPSG:4326"
    result = predict_raster(unsure(), scene, confidence=True, stac=True, report=".html", cog=cog)
    for name in ("classes", "confidence"):
        with rasterio.open(result.files[name]) as dataset:
            found, crs = dataset.gcps
            assert crs.to_epsg() == 4326
            assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
    assert json.loads(result.files["stac"].read_text())["bbox"] == pytest.approx([10, 49.8, 10.3, 50])


# What values mean


def test_gdal_reads_the_attribute_table(made: Made, tmp_path: Path) -> None:
    copy = shutil.copytree(made.scene.parent, tmp_path / "copy") / made.result.output.name
    found = gdalinfo(copy)
    table = found["rat"] if "rat" in found else found["bands"][0].get("rat")
    assert table is not None, "GDAL's JSON has the table"
    rows = [row["f"] for row in table["row"]]
    names = [column["name"] for column in table["fieldDefn"]]
    assert names == ["Value", "Class", "Count", "Red", "Green", "Blue"]
    assert [column["usage"] for column in table["fieldDefn"]] == [5, 2, 1, 6, 7, 8]
    with rasterio.open(made.result.output) as dataset:
        counts, colors = np.bincount(dataset.read(1).ravel(), minlength=256), dataset.colormap(1)
    labels = ("water", "forest", "field")
    assert rows == [[i, name, int(counts[i]), *colors[i][:3]] for i, name in enumerate(labels)]


def test_qgis_has_a_style_with_colours_and_names(made: Made) -> None:
    root = ElementTree.parse(made.result.output.with_suffix(".qml")).getroot()
    assert root.tag == "qgis"
    renderer = root.find("pipe/rasterrenderer")
    assert renderer is not None
    assert (renderer.get("type"), renderer.get("band")) == ("paletted", "1")
    with rasterio.open(made.result.output) as dataset:
        colors = dataset.colormap(1)
    entries = [entry.attrib for entry in renderer.findall("colorPalette/paletteEntry")]
    assert [(e["value"], e["label"], e["color"], e["alpha"]) for e in entries] == [
        *((str(i), name, "#{:02x}{:02x}{:02x}".format(*colors[i][:3]), "255")
          for i, name in enumerate(("water", "forest", "field"))),
        ("255", "no data", "#000000", "0"),
    ]  # fmt: skip


def test_a_style_of_ones_own_is_not_overwritten_unasked(made: Made, tmp_path: Path, unsure: type) -> None:
    (tmp_path / "scene_d2ls-toy.qml").write_text("mine")
    segmenter = unsure()
    with pytest.raises(OutputExistsError, match=r"scene_d2ls-toy\.qml exists.*--overwrite"):
        predict_raster(segmenter, made.scene, tmp_path)
    assert segmenter.scored == 0
    assert (tmp_path / "scene_d2ls-toy.qml").read_text() == "mine"


# Polygons


def test_polygons_are_those_of_the_map(made: Made) -> None:
    geopandas = pytest.importorskip("geopandas")
    from rasterio.features import rasterize

    table = geopandas.read_file(made.result.files["vector"])
    with (
        rasterio.open(made.result.output) as dataset,
        rasterio.open(made.result.files["confidence"]) as sure,
    ):
        labels, shares, place = dataset.read(1), sure.read(1) / STEPS, dataset.transform
    shapes = zip(table.geometry, table["class_id"], strict=True)
    assert np.array_equal(rasterize(shapes, labels.shape, fill=NODATA, transform=place, dtype="uint8"), labels)
    for area in made.result.areas:
        assert table[table["class"] == area.name]["area_m2"].sum() == pytest.approx(area.area_m2)
    assert (table["confidence"] * table["pixels"]).sum() == pytest.approx(shares[labels != NODATA].sum())


# STAC


def test_the_item_is_one_for_pystac_and_names_files_that_are_there(made: Made) -> None:
    pystac = pytest.importorskip("pystac")
    item = pystac.Item.from_file(str(made.result.files["stac"]))
    assert item.id == "scene_d2ls-toy"
    assert item.datetime is not None
    assert set(item.assets) == {*made.result.files, "sidecar", "style"} - {"stac"}
    for name, asset in item.assets.items():
        assert asset.title
        assert asset.roles
        assert Path(asset.get_absolute_href()).is_file(), name
    assert item.assets["preview"].media_type == "image/png"
    assert item.assets["classes"].media_type == "image/tiff; application=geotiff"
    assert item.to_dict()["links"][0]["rel"] in ("derived_from", "self")
    assert any(link.rel == "derived_from" and link.href == "./scene.tif" for link in item.links)


def test_the_item_tells_place_grid_and_classes(made: Made) -> None:
    item = json.loads(made.result.files["stac"].read_text())
    properties = item["properties"]
    assert item["stac_version"] == "1.1.0"
    assert (properties["proj:code"], properties["proj:shape"]) == ("EPSG:32618", [90, 70])
    assert properties["proj:transform"] == [2, 0, 500_000, 0, -2, 4_600_000]
    assert properties["d2ls:weights_sha256"] == "ab" * 32
    west, south, east, north = item["bbox"]
    assert west == pytest.approx(-75, abs=1e-6), "UTM zone 18 has its middle at 75 west"
    assert east - west == pytest.approx(140 / 83_000, rel=0.02)
    assert north - south == pytest.approx(180 / 111_000, rel=0.02)
    ring = np.array(item["geometry"]["coordinates"][0])
    assert (ring[0] == ring[-1]).all()
    x, y = ring.T
    assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0, "counter-clockwise"
    classes = item["assets"]["classes"]["classification:classes"]
    assert [(c["value"], c["name"]) for c in classes] == [(0, "water"), (1, "forest"), (2, "field"), (255, "nodata")]
    with rasterio.open(made.result.output) as dataset:
        assert classes[1]["color_hint"] == "{:02X}{:02X}{:02X}".format(*dataset.colormap(1)[1][:3])
    for each in classes:
        assert re.fullmatch(r"[0-9A-Za-z\-_]+", each["name"])
    bands = item["assets"]["probabilities"]["bands"]
    assert [band["name"] for band in bands] == ["water", "forest", "field"]
    assert {(band["data_type"], band["nodata"], band["raster:scale"]) for band in bands} == {("uint8", 255, 1 / STEPS)}


def test_an_item_across_the_date_line_is_in_two_parts(tmp_path: Path, write_raster: Write, unsure: type) -> None:
    place = Affine(0.1, 0, 179, 0, -0.1, 10)
    scene = write_raster(tmp_path / "scene.tif", np.ones((3, 20, 20), np.uint8), crs="EPSG:4326", transform=place)
    item = json.loads(predict_raster(unsure(), scene, stac=True).files["stac"].read_text())
    assert item["geometry"]["type"] == "MultiPolygon"
    assert item["bbox"] == pytest.approx([179, 8, -179, 10])


def test_an_item_of_a_scene_without_a_place(tmp_path: Path, write_raster: Write, unsure: type) -> None:
    scene = write_raster(tmp_path / "scene.png", np.ones((3, 20, 20), np.uint8), driver="PNG", georeferenced=False)
    result = predict_raster(unsure(), scene, stac=True, report=".html", preview=".png", vector=".gpkg")
    item = json.loads(result.files["stac"].read_text())
    assert item["geometry"] is None
    assert "bbox" not in item
    assert "no place on the ground" in result.files["report"].read_text()


# Pictures and page


def test_the_preview_is_the_map_in_colours(made: Made) -> None:
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(made.result.files["preview"]) as dataset:
        picture = dataset.read()
    with rasterio.open(made.result.output) as dataset:
        labels, colors = dataset.read(1), dataset.colormap(1)
    table = np.array([colors.get(i, (0, 0, 0, 0)) for i in range(256)], np.uint8)
    assert np.array_equal(picture.transpose(1, 2, 0), table[labels])


def test_the_report_tells_all_and_needs_nothing_outside(made: Made) -> None:
    page = made.result.files["report"].read_text()
    assert page.count("data:image/") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    for area in made.result.areas:
        assert area.name in page
        assert f"{100 * area.share:.1f}" in page
    for word in ("scene.tif", "toy", "ab" * 32, "hann", "EPSG:32618", "torch", "_confidence.tif", "75.0000° W"):
        assert word in page, word
    shares = [float(share) for share in re.findall(r"%: ([\d.]+) % of the pixels", page)]
    assert len(shares) == 20
    assert sum(shares) == pytest.approx(100, abs=1.1)


def test_names_are_escaped_in_the_page(tmp_path: Path, write_raster: Write, unsure: type) -> None:
    scene = write_raster(tmp_path / "<b>x&y.tif", np.ones((3, 9, 9), np.uint8))
    page = predict_raster(unsure(), scene, report=".html").files["report"].read_text()
    assert "<b>x" not in page
    assert "&lt;b&gt;x&amp;y.tif" in page


# What goes wrong


def test_scores_that_are_no_probabilities_are_told_and_leave_nothing(made: Made, tmp_path: Path, fakes: Any) -> None:
    with pytest.raises(D2LSError, match="no probabilities"):
        predict_raster(fakes.Identity(), made.scene, tmp_path, confidence=True)
    assert names_in(tmp_path) == []
    predict_raster(fakes.Identity(), made.scene, tmp_path, preview=".png")


@pytest.mark.parametrize("name", [*EVERYTHING, "style"])
def test_every_file_that_exists_is_told_before_anything_is_done(
    made: Made, tmp_path: Path, unsure: type, name: str
) -> None:
    file = made.result.output.with_suffix(".qml") if name == "style" else made.result.files[name]
    (tmp_path / file.name).write_bytes(b"precious")
    segmenter = unsure()
    with pytest.raises(OutputExistsError, match=re.escape(file.name)):
        predict_raster(segmenter, made.scene, tmp_path, **EVERYTHING)
    assert segmenter.scored == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {file.name: b"precious"}
    predict_raster(segmenter, made.scene, tmp_path, **EVERYTHING, overwrite=True)
    assert (tmp_path / file.name).read_bytes() != b"precious"


@pytest.mark.parametrize("error", [RuntimeError("no memory left"), KeyboardInterrupt()])
def test_after_an_error_nothing_is_left_of_any_file(made: Made, tmp_path: Path, unsure: type, error: Any) -> None:
    def stop(done: int, total: int) -> None:
        if done == 7:
            raise error

    with pytest.raises(type(error)):
        predict_raster(unsure(), made.scene, tmp_path, tile_size=32, progress=stop, **EVERYTHING)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("cog", [False, True])
def test_an_error_at_the_very_end_leaves_older_files_as_they_were(
    made: Made, tmp_path: Path, unsure: type, monkeypatch: pytest.MonkeyPatch, cog: bool
) -> None:
    """Of the last file that is made: all others are whole by then, and none has its name."""
    predict_raster(unsure(), made.scene, tmp_path, **EVERYTHING)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("broken")

    monkeypatch.setattr("d2ls_infer.outputs.sinks.stac_item", fail)
    with pytest.raises(RasterError, match=r"cannot write .*_stac\.json: broken"):
        predict_raster(unsure(), made.scene, tmp_path, **EVERYTHING, overwrite=True, cog=cog, tile_size=16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_told_before_the_model_is_loaded(
    made: Made, tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "cut.safetensors"
    weights.write_bytes(tiny_weights.read_bytes()[:-1000])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(RasterError, match=r"is full: 1\.0 MB are free.*at the least"):
        predict_raster(weights, made.scene, tmp_path)
    assert names_in(tmp_path) == ["cut.safetensors"]


@pytest.mark.skipif(as_root, reason="root may write anywhere")
def test_a_read_only_folder_of_any_file_is_told_first(made: Made, tmp_path: Path, unsure: type) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(RasterError, match="cannot write to the folder"):
        predict_raster(unsure(), made.scene, tmp_path, report=tmp_path / "closed/page.html")


@pytest.mark.parametrize("name", ["vector", "report", "preview"])
def test_a_missing_folder_of_any_file_is_told_first(made: Made, tmp_path: Path, unsure: type, name: str) -> None:
    segmenter = unsure()
    with pytest.raises(UsageError, match="no such folder"):
        predict_raster(segmenter, made.scene, tmp_path, **{name: tmp_path / f"nowhere/file{EVERYTHING[name]}"})
    assert segmenter.scored == 0


def test_the_scene_is_never_written_over_by_any_output(tmp_path: Path, write_raster: Write, unsure: type) -> None:
    scene = write_raster(tmp_path / "scene.png", np.ones((3, 9, 9), np.uint8), driver="PNG", georeferenced=False)
    before = scene.read_bytes()
    with pytest.raises(UsageError, match="is the scene itself"):
        predict_raster(unsure(), scene, preview=scene, overwrite=True)
    assert scene.read_bytes() == before


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np, torch
from d2ls_infer import predict_raster
from d2ls_infer.errors import RasterError
from d2ls_infer.labels import LabelMap

class Noise:
    labels = LabelMap.of(["a", "b", "c"])
    bands = ("red", "green", "blue")
    def score(self, batch):
        noise = torch.Generator().manual_seed(0)  # the same each time: so are the sizes
        return torch.rand(len(batch), 3, *batch.shape[-2:], generator=noise).softmax(1)

options = dict(confidence=True, probabilities=True, report=".html", preview=".png", stac=True, overwrite=True)
torch.set_num_threads(1)
out = Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for cog in (False, True):
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result = predict_raster(Noise(), sys.argv[1], out, cog=cog, **options)
    sizes = sorted(path.stat().st_size for path in result.files.values())
    for file in out.iterdir():
        file.unlink()
    for limit in (500, sizes[-1] - 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            predict_raster(Noise(), sys.argv[1], out, cog=cog, **options)
        except RasterError as error:
            print("RasterError" if "cannot write" in str(error) else error, [path.name for path in out.iterdir()])
        else:
            print("no error at", limit, "of", sizes)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file by POSIX means")
def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(tmp_path: Path, write_raster: Write) -> None:
    scene = write_raster(tmp_path / "scene.tif", np.ones((3, 300, 200), np.uint8))
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(scene), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["RasterError []"] * 4, done.stderr


MEMORY = """
import resource, sys
import numpy as np, rasterio, torch
from affine import Affine
from d2ls_infer import predict_raster
from d2ls_infer.labels import LabelMap

class Null:
    labels = LabelMap.of(["a", "b"])
    bands = ("red", "green", "blue")
    def score(self, batch):
        share = (batch[:, :1] % 100).float() / 100
        return torch.cat((share, 1 - share), 1)

torch.set_num_threads(1)
peaks = []
for height in map(int, sys.argv[2:]):
    path = f"{sys.argv[1]}/{height}.tif"
    with rasterio.open(
        path, "w", driver="GTiff", dtype="uint8", count=3, height=height, width=512, blockysize=64,
        crs="EPSG:32618", transform=Affine(1, 0, 0, 0, -1, 0),
    ) as dataset:
        rows = np.add.outer(np.arange(1024), np.arange(512)).astype(np.uint8) + np.zeros((3, 1, 1), np.uint8)
        for start in range(0, height, 1024):
            dataset.write(rows, window=((start, start + 1024), (0, 512)))
    predict_raster(
        Null(), path, tile_size=256, overlap=32, confidence=True, probabilities=True, disagreement=True,
        vector=".gpkg", report=".html", preview=".png", stac=True,
    )
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
print(*peaks)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="asks for the peak memory by POSIX means")
def test_memory_does_not_grow_with_the_height_with_all_outputs(tmp_path: Path) -> None:
    """The high scene has 8 million pixels: 8 MB for each band of an output, 67 MB of scores, 134 MB of disagreement.

    To make a COG of a finished raster, GDAL has a cache of 64 MB besides.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), "2048", "16384"], capture_output=True, text=True, check=True
    )
    low, high = map(int, done.stdout.split())
    assert high - low < 64e6, f"{low / 1e6:.0f} MB for 2048 rows, {high / 1e6:.0f} MB for 16384"
