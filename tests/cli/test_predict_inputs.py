"""`d2ls predict` and what it is given: many scenes, addresses, parts of scenes; and what is refused, in one line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio.shutil
from affine import Affine
from click.testing import Result

D2LS = Callable[..., Result]
Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
ReadMap = Callable[[Path], SimpleNamespace]
as_root = hasattr(os, "geteuid") and os.geteuid() == 0
LEFT, TOP = 500_000, 4_600_000


@pytest.fixture
def folder(tmp_path: Path, write_raster: Write, pixels: Pixels) -> Path:
    """Three scenes: a.tif, b.tif and more/c.tif."""
    folder = tmp_path / "scenes"
    (folder / "more").mkdir(parents=True)
    for name in ("a.tif", "b.tif", "more/c.tif"):
        write_raster(folder / name, pixels(3, 40, 30))
    return folder


def maps_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*_d2ls-tiny.tif"))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_error(result: Result, exit_code: int, *words: str) -> None:
    """One line on standard error, nothing else, and no traceback."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


# Many scenes


@pytest.mark.parametrize(
    ("given", "maps"),
    [
        (["{}"], ["a", "b"]),
        (["{}/*.tif", "{}/more"], ["a", "b", "more/c"]),
        (["{}/**/*.tif"], ["a", "b", "more/c"]),
        (["@{}/list.txt"], ["b", "more/c"]),
        (["{}/list.txt", "{}/a.tif"], ["a", "b", "more/c"]),
        (["{}/item.json", "--asset", "image"], ["a"]),
    ],
    ids=["folder", "patterns", "deep pattern", "list", "list and file", "STAC item"],
)
def test_scenes_by_any_name(d2ls: D2LS, folder: Path, tiny_weights: Path, given: list[str], maps: list[str]) -> None:
    (folder / "list.txt").write_text("b.tif\nmore/*.tif\n")
    assets = {name: {"href": f"{name[0]}.tif", "roles": ["data"]} for name in ("b", "image")}
    assets["image"]["href"] = "a.tif"
    (folder / "item.json").write_text(json.dumps({"stac_version": "1.0.0", "assets": assets}))
    arguments = [argument.format(folder) for argument in given]
    result = d2ls("predict", *arguments, "--model", tiny_weights, "-q", "--device", "cpu")
    assert (result.exit_code, result.output) == (0, "")
    assert maps_in(folder) == [f"{name}_d2ls-tiny.tif" for name in maps]


def test_a_folder_that_was_mapped_before(d2ls: D2LS, folder: Path, tiny_weights: Path) -> None:
    """Maps are not scenes; and what is there is not written over unasked."""
    for options, code in (([], 0), ([], 2), (["--overwrite"], 0)):
        assert d2ls("predict", folder, "--model", tiny_weights, "-q", *options).exit_code == code
        assert maps_in(folder) == ["a_d2ls-tiny.tif", "b_d2ls-tiny.tif"]


def test_an_item_of_several_assets_is_a_question(d2ls: D2LS, folder: Path, tiny_weights: Path) -> None:
    assets = {name: {"href": f"{name}.tif", "roles": ["data"]} for name in ("a", "b")}
    (folder / "item.json").write_text(json.dumps({"stac_version": "1.0.0", "assets": assets}))
    result = d2ls("predict", folder / "item.json", "--model", tiny_weights)
    assert_error(result, 2, "which asset of", "--asset NAME", "a, b")


# Over the network


def test_a_box_of_a_remote_scene(
    d2ls: D2LS,
    web: SimpleNamespace,
    tmp_path: Path,
    tiny_weights: Path,
    write_raster: Write,
    read_map: ReadMap,
    pixels: Pixels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The map is that of the same pixels from a file, lies where we are, and took a fraction of the bytes."""
    array = pixels(3, 1500, 1500)
    write_raster(tmp_path / "plain.tif", array)
    options = {"driver": "COG", "compress": "NONE", "blocksize": 128, "overviews": "NONE"}
    rasterio.shutil.copy(tmp_path / "plain.tif", web.folder / "scene.tif", **options)
    monkeypatch.chdir(tmp_path)
    box = f"{LEFT + 2 * 600},{TOP - 2 * 664},{LEFT + 2 * 640},{TOP - 2 * 600}"
    web.sent()
    result = d2ls("predict", f"{web.address}/scene.tif", "-m", tiny_weights, "--bbox", box, "-q", "--device", "cpu")
    sent, size = web.sent(), (web.folder / "scene.tif").stat().st_size
    print(f"{sent} of {size} bytes were read")
    assert (result.exit_code, result.output) == (0, "")
    assert size > 6_000_000
    assert sent < 0.1 * size, f"{sent} of {size} bytes were read"
    write_raster(tmp_path / "piece.tif", array[:, 600:664, 600:640])
    assert d2ls("predict", "piece.tif", "-m", tiny_weights, "-q", "--device", "cpu").exit_code == 0
    found = read_map(tmp_path / "scene_d2ls-tiny.tif")
    assert np.array_equal(found.array, read_map(tmp_path / "piece_d2ls-tiny.tif").array)
    assert found.transform == Affine(2, 0, LEFT + 1200, 0, -2, TOP - 1200)


# Options


def test_options_of_reading_reach_the_map(
    d2ls: D2LS, folder: Path, tiny_weights: Path, read_map: ReadMap, tmp_path: Path
) -> None:
    options = ["--window", "3,4,20,25", "--nodata", "none", "--gsd", "1.5", "--tta", "flip", "--bands", "blue,green,1"]
    result = d2ls(
        "predict", folder / "a.tif", "-m", tiny_weights, "-o", tmp_path / "map.tif", *options, "--device", "cpu"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    found = read_map(tmp_path / "map.tif")
    assert found.array.shape == (25, 20)
    assert found.array.max() < 4
    said = json.loads(found.tags["D2LS_OPTIONS"])
    assert {key: said[key] for key in ("window", "nodata", "gsd", "tta", "bands")} == {
        "window": [3, 4, 20, 25],
        "nodata": "none",
        "gsd": "1.5",
        "tta": "flip",
        "bands": {"red": 3, "green": 2, "blue": 1},
    }


def test_a_box_west_of_greenwich_is_a_value_and_not_an_option(
    d2ls: D2LS, folder: Path, tiny_weights: Path, read_map: ReadMap
) -> None:
    result = d2ls(
        "predict", folder / "a.tif", "-m", tiny_weights, "--bbox", "-75.1,41.4,-74.9,41.7", "--bbox-crs", "EPSG:4326"
    )
    assert result.exit_code == 0
    assert read_map(folder / "a_d2ls-tiny.tif").array.shape == (40, 30)


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "0,100,5,5"], ["the window 0,100,5,5", "do not meet", "30 x 40 pixels"]),
        (["--window", "a"], ["COL,ROW,WIDTH,HEIGHT", "'a'"]),
        (["--bbox", "0,0,1,1"], ["the box 0,0,1,1", "do not meet"]),
        (["--bbox", "0,0,1,1", "--window", "0,0,1,1"], ["--window and --bbox"]),
        (["--bbox-crs", "EPSG:4326"], ["--bbox, which is not given"]),
        (["--gsd", "auto"], ["states no ground sampling distance"]),
        (["--gsd", "0.01"], ["at most 16 times", "--gsd"]),
        (["--gsd", "-1"], ["metres above 0", "'-1'"]),
        (["--nodata", "white"], ["'white'"]),
        (["--nodata", "300"], ["--nodata 300 is no uint8 value"]),
        (["--asset", "red"], ["--asset chooses from a STAC item"]),
        (["--bands", "red,green,swir"], ["none of them is 'swir'"]),
    ],
    ids=" ".join,
)
def test_options_of_reading_that_make_no_sense(
    d2ls: D2LS, folder: Path, tiny_weights: Path, options: list[str], words: list[str]
) -> None:
    before = files_in(folder)
    assert_error(d2ls("predict", folder / "a.tif", "--model", tiny_weights, *options), 2, *words)
    assert files_in(folder) == before


def test_a_scene_outside_of_the_part_is_told_first_and_the_others_are_mapped(
    d2ls: D2LS, folder: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    write_raster(folder / "far.tif", pixels(3, 40, 30), transform=Affine(2, 0, 0, 0, -2, 0))
    box = f"{LEFT},{TOP - 20},{LEFT + 20},{TOP}"
    result = d2ls("predict", folder / "a.tif", folder / "far.tif", "-m", tiny_weights, "--bbox", box)
    assert result.exit_code == 1
    (error,) = result.stderr.splitlines()
    assert error.startswith("Error: ")
    assert "far.tif do not meet" in error
    assert maps_in(folder) == ["a_d2ls-tiny.tif"]


def test_values_that_are_no_real_numbers(d2ls: D2LS, tmp_path: Path, tiny_weights: Path, write_raster: Write) -> None:
    path = write_raster(tmp_path / "radar.tif", np.zeros((3, 8, 8), np.complex64))
    assert_error(d2ls("predict", path, "--model", tiny_weights), 2, "radar.tif has complex values", "complex64")


def test_a_container_of_several_rasters(
    d2ls: D2LS, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    for table in ("one", "two"):
        write_raster(
            tmp_path / "scenes.gpkg", pixels(3, 8, 8), driver="GPKG", RASTER_TABLE=table, APPEND_SUBDATASET="YES"
        )
    result = d2ls("predict", tmp_path / "scenes.gpkg", "--model", tiny_weights)
    assert_error(result, 2, "it holds 2 rasters, name one of them: ", "scenes.gpkg:one", "scenes.gpkg:two")
    name = f"GPKG:{tmp_path / 'scenes.gpkg'}:two"
    assert d2ls("predict", name, "--model", tiny_weights, "-q").exit_code == 0
    assert maps_in(tmp_path) == ["scenes_two_d2ls-tiny.tif"]


@pytest.mark.parametrize("kind", ["itself", "link", "VRT", "subdataset", "list"])
def test_an_output_that_is_an_input(d2ls: D2LS, folder: Path, tiny_weights: Path, kind: str) -> None:
    scene: str | Path = folder / "a.tif"
    output = folder / "a.tif"
    if kind == "link":
        output = folder / "link.tif"
        output.symlink_to(scene)
    elif kind == "VRT":
        rasterio.shutil.copy(scene, folder / "a.vrt", driver="VRT")
        scene = folder / "a.vrt"
    elif kind == "subdataset":
        scene = f"GTIFF_DIR:1:{scene}"
    elif kind == "list":
        (folder / "list.txt").write_text("a.tif")
        scene = folder / "list.txt"
    before = files_in(folder)
    result = d2ls("predict", scene, "--model", tiny_weights, "-o", output, "--overwrite")
    assert_error(result, 2, "the output is the scene itself")
    assert files_in(folder) == before


def test_an_output_that_is_the_area_of_interest(d2ls: D2LS, folder: Path, tiny_weights: Path) -> None:
    pytest.importorskip("pyogrio")
    from pyogrio.raw import read, write

    area = folder / "area.geojson"
    ring = [[LEFT, TOP - 20], [LEFT + 20, TOP - 20], [LEFT + 20, TOP], [LEFT, TOP - 20]]
    area.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    write(folder / "area.gpkg", read(area, columns=[])[2], [], [], geometry_type="Polygon", crs="EPSG:32618")
    before = files_in(folder)
    options = ["--aoi", folder / "area.gpkg", "--vector", folder / "area.gpkg", "--overwrite"]
    result = d2ls("predict", folder / "a.tif", "--model", tiny_weights, *options)
    assert_error(result, 2, "the output is the area of interest itself")
    assert files_in(folder) == before


@pytest.fixture
def locked(write_raster: Write, pixels: Pixels) -> Iterator[Path]:
    """A folder with a scene, that nobody may write to; where root may, as somebody else."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_raster(folder / "scene.tif", pixels(3, 20, 20))
        folder.chmod(0o555)
        if as_root:
            os.setresuid(65534, 0, 0)  # access is asked for by the first of them
        try:
            yield folder
        finally:
            if as_root:
                os.setresuid(0, 0, 0)
            folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="changes the user")
def test_a_folder_that_is_read_only(d2ls: D2LS, locked: Path, tiny_weights: Path) -> None:
    before = files_in(locked)
    result = d2ls("predict", locked / "scene.tif", "--model", tiny_weights, "--overwrite")
    assert_error(result, 1, f"cannot write to the folder {locked}")
    assert files_in(locked) == before


def test_a_server_that_is_not_there(d2ls: D2LS, tiny_weights: Path) -> None:
    result = d2ls("predict", "http://127.0.0.1:1/scene.tif", "--model", tiny_weights)
    assert_error(result, 1, "cannot open http://127.0.0.1:1/scene.tif")
