"""`d2ls predict` with a small random network: maps, tables, and every way to get it wrong."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from affine import Affine
from click.testing import Result

from d2ls_infer import load_model
from d2ls_infer.manifest import load_manifest

D2LS = Callable[..., Result]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
ReadMap = Callable[[Path], SimpleNamespace]
as_root = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture
def scene(tmp_path: Path, write_raster: Write, pixels: Pixels) -> Path:
    """Three bands of 90 x 70 pixels of half a metre, the lowest ten rows nodata, alone in a folder."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    array = pixels(3, 90, 70)
    array[:, 80:] = 0
    return write_raster(folder / "scene.tif", array, nodata=0, transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_600_000))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_error(result: Result, exit_code: int, *words: str) -> None:
    """One line on standard error, nothing else, and no traceback."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


# Maps


def test_a_map_lies_beside_its_scene(
    d2ls: D2LS, scene: Path, tiny_weights: Path, read_map: ReadMap, pixels: Pixels
) -> None:
    result = d2ls("predict", scene, "--model", tiny_weights, "--device", "cpu")
    assert (result.exit_code, result.stderr) == (0, "")
    assert names_in(scene.parent) == [
        "scene.tif",
        "scene_d2ls-tiny.qml",
        "scene_d2ls-tiny.tif",
        "scene_d2ls-tiny.tif.aux.xml",
    ]
    found = read_map(scene.with_name("scene_d2ls-tiny.tif"))
    model = load_model(tiny_weights, device="cpu")
    array = pixels(3, 90, 70)
    array[:, 80:] = 0
    assert np.array_equal(found.array[:80], model.predict(array)[:80])
    assert (found.array[80:] == 255).all()
    assert found.transform == Affine(0.5, 0, 500_000, 0, -0.5, 4_600_000)
    assert found.crs.to_epsg() == 32618
    assert found.nodata == 255
    assert found.categories == list(model.labels.names)
    assert [found.colormap[i][:3] for i in range(4)] == list(model.labels.colors)


def test_options_reach_the_map(d2ls: D2LS, scene: Path, tiny_weights: Path, tmp_path: Path, read_map: ReadMap) -> None:
    result = d2ls(
        "predict", scene, "-m", tiny_weights, "-o", tmp_path / "map.tif", "--tile-size", "48", "--overlap", "25%",
        "--blend", "none", "-b", "3", "--device", "cpu", "--precision", "bfloat16", "--bands", "3,2,1",
        "--scale", "10,200", "--dictionary", "scene", "--no-smooth",
    )  # fmt: skip
    assert result.exit_code == 0
    assert json.loads(read_map(tmp_path / "map.tif").tags["D2LS_OPTIONS"]) == {
        "tile_size": 48,
        "overlap_px": 12,
        "blend": "none",
        "dictionary": "scene",
        "bands": {"red": 3, "green": 2, "blue": 1},
        "scale": "10,200",
        "precision": "bfloat16",
        "smooth": False,
    }


def test_underscores_are_taken_for_dashes(d2ls: D2LS, scene: Path, tiny_weights: Path, read_map: ReadMap) -> None:
    result = d2ls("predict", scene, "--model", tiny_weights, "--tile_size", "32", "--batch_size", "2")
    assert result.exit_code == 0
    tags = read_map(scene.with_name("scene_d2ls-tiny.tif")).tags
    assert json.loads(tags["D2LS_OPTIONS"])["tile_size"] == 32


def test_underscores_in_the_values_of_options_are_kept(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    model = tiny_weights.with_name("tiny_model.safetensors")
    model.write_bytes(tiny_weights.read_bytes())
    output = scene.with_name("some_map.tif")
    assert d2ls("predict", scene, "--model", model, "--output", output).exit_code == 0
    assert output.exists()


def test_a_negative_scale_is_a_value_and_not_an_option(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    assert d2ls("predict", scene, "--model", tiny_weights, "--scale", "-20,200").exit_code == 0


def test_several_scenes_go_into_a_folder(
    d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    other = write_raster(tmp_path / "other.tif", pixels(3, 20, 20))
    (tmp_path / "maps").mkdir()
    result = d2ls("predict", scene, other, "--model", tiny_weights, "--output", tmp_path / "maps")
    assert result.exit_code == 0
    assert [name for name in names_in(tmp_path / "maps") if name.endswith(".tif")] == [
        "other_d2ls-tiny.tif",
        "scene_d2ls-tiny.tif",
    ]
    for name in names_in(tmp_path / "maps"):
        assert (name in result.stdout) == name.endswith(".tif")


# Words


def test_the_table_tells_the_area_of_each_class(d2ls: D2LS, scene: Path, tiny_weights: Path, read_map: ReadMap) -> None:
    result = d2ls("predict", scene, "--model", tiny_weights, "--tile-size", "64")
    output = scene.with_name("scene_d2ls-tiny.tif")
    first, header, *rows = result.stdout.splitlines()
    assert first.startswith(f"{output}  (4 tiles, ")
    assert header.split() == ["class", "m2", "%"]
    labels = read_map(output).array
    expected = [(labels == k).sum() for k in range(4)]
    assert [row.split()[0] for row in rows] == ["water", "forest", "field", "road"]
    assert [float(row.split()[1].replace(",", "")) for row in rows] == pytest.approx(
        [n * 0.25 for n in expected], abs=0.0051
    )
    assert [float(row.split()[2]) for row in rows] == pytest.approx([n / 56 for n in expected], abs=0.051)


def test_the_table_counts_pixels_where_there_is_no_ground(
    d2ls: D2LS, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    path = write_raster(tmp_path / "photo.png", pixels(3, 60, 50), driver="PNG", georeferenced=False)
    result = d2ls("predict", path, "--model", tiny_weights)
    assert (result.exit_code, result.stderr) == (0, "")
    _, header, *rows = result.stdout.splitlines()
    assert header.split() == ["class", "pixels", "%"]
    assert sum(int(row.split()[1].replace(",", "")) for row in rows) == 3000


def test_large_areas_are_told_in_square_kilometres(
    d2ls: D2LS, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    path = write_raster(tmp_path / "wide.tif", pixels(3, 40, 50), transform=Affine(100, 0, 500_000, 0, -100, 4_600_000))
    _, header, *rows = d2ls("predict", path, "--model", tiny_weights).stdout.splitlines()
    assert header.split() == ["class", "km2", "%"]
    assert sum(float(row.split()[1]) for row in rows) == pytest.approx(20, rel=5e-3)


def test_tiles_without_a_valid_pixel_are_told(
    d2ls: D2LS, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    array = pixels(3, 64, 32)
    array[:, 32:] = 0
    path = write_raster(tmp_path / "half.tif", array, nodata=0)
    result = d2ls("predict", path, "--model", tiny_weights, "--tile-size", "32", "--overlap", "0")
    assert "(2 tiles, 1 without valid pixels, " in result.stdout


def test_quiet_says_nothing(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    result = d2ls("predict", scene, "--model", tiny_weights, "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert scene.with_name("scene_d2ls-tiny.tif").exists()


# What makes no sense: exit code 2, before anything is done


def test_a_missing_scene(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    assert_error(d2ls("predict", "nowhere.tif", "--model", tiny_weights), 2, "no such file", "nowhere.tif")


def test_a_scene_that_is_no_raster(d2ls: D2LS, tmp_path: Path, tiny_weights: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert_error(d2ls("predict", tmp_path / "notes.txt", "--model", tiny_weights), 2, "notes.txt", "not a raster")
    assert names_in(tmp_path) == ["notes.txt"]


def test_a_scene_of_too_few_bands(
    d2ls: D2LS, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    path = write_raster(tmp_path / "grey.tif", pixels(1, 20, 20))
    assert_error(d2ls("predict", path, "--model", tiny_weights), 2, "grey.tif has 1 band,", "needs 3")
    assert names_in(tmp_path) == ["grey.tif"]


def test_an_unknown_model_with_the_nearest_names(d2ls: D2LS, scene: Path) -> None:
    name = load_manifest().entries[0].name
    assert_error(d2ls("predict", scene, "--model", name[:-1]), 2, f"unknown model '{name[:-1]}'", "did you mean", name)


def test_a_model_that_is_like_no_other_with_all_names(d2ls: D2LS, scene: Path) -> None:
    names = [entry.name for entry in load_manifest().entries]
    assert_error(d2ls("predict", scene, "--model", "qqqqqqqq"), 2, "unknown model", *names)


def test_a_weights_file_that_is_not_there(d2ls: D2LS, scene: Path) -> None:
    assert_error(d2ls("predict", scene, "--model", "no/model.safetensors"), 2, "no such weights file")


def test_an_output_that_exists(d2ls: D2LS, scene: Path, tiny_weights: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.tif"
    old.write_bytes(b"precious")
    assert_error(d2ls("predict", scene, "--model", tiny_weights, "-o", old), 2, "old.tif exists", "--overwrite")
    assert old.read_bytes() == b"precious"
    assert d2ls("predict", scene, "--model", tiny_weights, "-o", old, "--overwrite").exit_code == 0
    assert old.read_bytes() != b"precious"


def test_an_output_in_a_folder_that_is_not_there(d2ls: D2LS, scene: Path, tiny_weights: Path, tmp_path: Path) -> None:
    result = d2ls("predict", scene, "--model", tiny_weights, "-o", tmp_path / "nowhere" / "map.tif")
    assert_error(result, 2, "no such folder", "nowhere")


def test_a_folder_for_the_outputs_that_is_not_there(
    d2ls: D2LS, scene: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    """The slash says that a folder was meant; a file of that name is not what anybody wanted."""
    result = d2ls("predict", scene, "--model", tiny_weights, "-o", f"{tmp_path / 'maps'}{os.sep}")
    assert_error(result, 2, "no such folder", "maps")
    assert names_in(tmp_path) == ["scenes"]


def test_the_scene_as_its_own_output(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    before = scene.read_bytes()
    result = d2ls("predict", scene, "--model", tiny_weights, "-o", scene, "--overwrite")
    assert_error(result, 2, "is the scene itself")
    assert scene.read_bytes() == before


def test_several_scenes_but_one_file(d2ls: D2LS, scene: Path, tiny_weights: Path, tmp_path: Path) -> None:
    result = d2ls("predict", scene, scene, "--model", tiny_weights, "-o", tmp_path / "map.tif")
    assert_error(result, 2, "2 scenes, but one output")


@pytest.mark.parametrize("again", ["scene.tif", "./scene.tif", "sub/../scene.tif"])
def test_a_scene_given_twice(
    d2ls: D2LS, scene: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    """Found out before the first of them takes its hours, however it is spelt."""
    (scene.parent / "sub").mkdir()
    monkeypatch.chdir(scene.parent)
    assert_error(d2ls("predict", "scene.tif", again, "--model", tiny_weights), 2, "several scenes would be written to")
    assert names_in(scene.parent) == ["scene.tif", "sub"]


def test_scenes_of_one_name_into_a_folder(d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path) -> None:
    for name in ("maps", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "scene.tif").write_bytes(scene.read_bytes())
    result = d2ls("predict", scene, tmp_path / "other/scene.tif", "--model", tiny_weights, "-o", tmp_path / "maps")
    assert_error(result, 2, "several scenes would be written to", "scene_d2ls-tiny.tif")
    assert names_in(tmp_path / "maps") == []


@pytest.mark.parametrize("bad", ["missing", "bands", "exists"])
def test_what_is_wrong_with_the_last_scene_is_told_before_the_first_is_mapped(
    d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels, bad: str
) -> None:
    last = tmp_path / "last.tif"
    if bad != "missing":
        write_raster(last, pixels(1 if bad == "bands" else 3, 20, 20))
    if bad == "exists":
        (tmp_path / "last_d2ls-tiny.tif").touch()
    done = d2ls("predict", scene, last, "--model", tiny_weights)
    assert done.exit_code == 1
    (error,) = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert "last" in error
    # In the order in which they were said: the error, the map of the first scene, the list of what failed.
    assert done.output.index(error) < done.output.index("scene_d2ls-tiny.tif  (") < done.output.index("1 of 2 scenes")
    assert names_in(scene.parent) == [
        "scene.tif",
        "scene_d2ls-tiny.qml",
        "scene_d2ls-tiny.tif",
        "scene_d2ls-tiny.tif.aux.xml",
    ]
    assert [path.name for path in tmp_path.glob("last_d2ls*")] == ["last_d2ls-tiny.tif"] * (bad == "exists")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tile-size", "0"], ["tile size must be at least 1", "got 0"]),
        (["--tile-size", "64", "--overlap", "64"], ["overlap", "64"]),
        (["--overlap", "much"], ["overlap", "'much'"]),
        (["--overlap", "100%"], ["overlap", "'100%'"]),
        (["--batch-size", "0"], ["batch size", "got '0'"]),
        (["--bands", "1,2"], ["takes 3 bands", "names 2"]),
        (["--bands", "1,2,4"], ["no band 4"]),
        (["--bands", "0,1,2"], ["counted from 1"]),
        (["--bands", "red,green,mauve"], ["3 bands", "none of them is 'mauve'", "1 red, 2 green, 3 blue"]),
        (["--bands", "1;2;3"], ["'1;2;3'"]),
        (["--scale", "10"], ["scale", "'10'"]),
        (["--scale", "5,1"], ["scale", "'5,1'"]),
        (["--scale", "p2,p200"], ["percentiles", "'p2,p200'"]),
        (["--device", "gpu"], ["device 'gpu' is not there", "try auto or cpu"]),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense(
    d2ls: D2LS, scene: Path, tiny_weights: Path, options: list[str], words: list[str]
) -> None:
    assert_error(d2ls("predict", scene, "--model", tiny_weights, *options), 2, *words)
    assert names_in(scene.parent) == ["scene.tif"]


@pytest.mark.parametrize(
    "options",
    [["--blend", "cosine"], ["--precision", "double"], ["--tile-size", "big"], ["--tilesize", "64"]],
    ids=" ".join,
)
def test_options_that_click_refuses(d2ls: D2LS, scene: Path, tiny_weights: Path, options: list[str]) -> None:
    result = d2ls("predict", scene, "--model", tiny_weights, *options)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")


# What fails: exit code 1, and nothing is left


def test_a_truncated_scene_after_a_whole_one(
    run_d2ls: Run, scene: Path, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    """As a program of its own: no warning of a library, no log of GDAL, no progress bar where there is no terminal."""
    path = write_raster(tmp_path / "cut.tif", pixels(3, 200, 100), compress="deflate", blockysize=16)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    maps = tmp_path / "maps"
    maps.mkdir()
    done = run_d2ls(
        "predict", scene, "cut.tif", "--model", tiny_weights, "--tile-size", "128", "--device", "cpu", "-o", "maps",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Error: cannot read cut.tif, rows ")
    assert done.stderr.count("\n") == 1
    first, *table = done.stdout.splitlines()
    assert first.startswith(f"{Path('maps', 'scene_d2ls-tiny.tif')}  (1 tiles")
    assert len(table[: table.index("")]) == 5
    assert table[table.index("") + 1] == "1 of 2 scenes failed:"
    assert table[-1].startswith("cut.tif  cannot read cut.tif, rows ")
    assert names_in(maps) == ["scene_d2ls-tiny.qml", "scene_d2ls-tiny.tif", "scene_d2ls-tiny.tif.aux.xml"]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other tensors", "no description"])
def test_damaged_weights(d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path, damage: str) -> None:
    content = tiny_weights.read_bytes()
    header = int.from_bytes(content[:8], "little")
    damaged = {
        "cut": content[:-100],
        "noise": np.random.default_rng(0).bytes(2000),
        "empty": b"",
        "other tensors": content.replace(b"dictionary.static", b"dictionary.strange"[:17]),
        "no description": content[:8] + content[8 : 8 + header].replace(b'"d2ls"', b'"D2LS"') + content[8 + header :],
    }[damage]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    assert_error(d2ls("predict", scene, "--model", path), 1, "damaged.safetensors")
    assert names_in(scene.parent) == ["scene.tif"]


@pytest.mark.skipif(as_root, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    scene.parent.chmod(0o500)
    try:
        assert_error(d2ls("predict", scene, "--model", tiny_weights), 1, "cannot write to the folder")
    finally:
        scene.parent.chmod(0o700)


def test_a_file_that_cannot_be_made(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    (scene.parent / "scene_d2ls-tiny.tif.partial").mkdir()
    assert_error(d2ls("predict", scene, "--model", tiny_weights), 1, "cannot write", "scene_d2ls-tiny.tif")
    assert names_in(scene.parent) == ["scene.tif", "scene_d2ls-tiny.tif.partial"]


def test_a_name_that_is_too_long_for_a_file(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    """File systems take 255 bytes; this one fits, but not with what is hung on to it on the way."""
    output = scene.with_name("m" * 248 + ".tif")
    assert_error(d2ls("predict", scene, "--model", tiny_weights, "-o", output), 1, "cannot write", "mmm")
    assert names_in(scene.parent) == ["scene.tif"]


@pytest.mark.parametrize("name", ["maps", "map.png"])
def test_an_output_is_a_folder_that_is_there_or_a_geotiff(
    d2ls: Callable[..., Result], tmp_path: Path, write_raster: Callable[..., Path], tiny_weights: Path, name: str
) -> None:
    scene = write_raster(tmp_path / "scene.tif", np.zeros((3, 8, 8), np.uint8))
    result = d2ls("predict", scene, "-m", tiny_weights, "-o", tmp_path / name)
    assert result.exit_code == 2
    assert "name it .tif, or make the folder first" in result.output
    assert not (tmp_path / name).exists()


# What is made besides


@pytest.mark.parametrize("places", ["endings", "files"])
def test_everything_in_one_pass(
    d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path, read_map: ReadMap, places: str
) -> None:
    named = {"--vector": ".gpkg", "--report": ".html", "--preview": ".png"}
    if places == "files":
        named = {option: str(tmp_path / f"mine{ending}") for option, ending in named.items()}
    flags = ["--confidence", "--probabilities", "--entropy", "--disagreement", "--stac", "--cog"]
    result = d2ls(
        "predict", scene, "--model", tiny_weights, "--tile-size", "64", *flags, "--min-area", "1", "--simplify", "0.5",
        *(word for pair in named.items() for word in pair),
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    stem = "scene_d2ls-tiny"
    files = [f"{stem}_{kind}.tif" for kind in ("confidence", "probabilities", "entropy", "disagreement")]
    files += [f"{stem}_stac.json"]
    mine = [f"{stem}_polygons.gpkg", f"{stem}_report.html", f"{stem}_preview.png"]
    if places == "files":
        mine = []
        assert {path.name for path in tmp_path.glob("mine.*")} == {"mine.gpkg", "mine.html", "mine.png"}
    sides = [f"{stem}.qml", f"{stem}.tif.aux.xml"]
    assert names_in(scene.parent) == sorted(["scene.tif", f"{stem}.tif", *sides, *files, *mine])
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{scene.with_name(stem)}.tif  (4 tiles")
    assert {Path(line).name for line in lines[1:9]} >= set(files)
    assert lines[9].split() == ["class", "m2", "%"]
    with_nothing_else = d2ls(
        "predict", scene, "--model", tiny_weights, "--tile-size", "64", "-o", tmp_path / "alone.tif"
    )
    assert with_nothing_else.exit_code == 0
    assert np.array_equal(read_map(tmp_path / "alone.tif").array, read_map(scene.with_name(f"{stem}.tif")).array)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vector", "map.shp"], ["--vector", ".gpkg", "'map.shp'"]),
        (["--report", "map.pdf"], ["--report", ".html"]),
        (["--preview", "map.jpeg"], ["--preview", ".png"]),
        (["--min-area", "10"], ["--min-area", "--vector"]),
        (["--simplify", "10"], ["--simplify", "--vector"]),
        (["--vector", ".gpkg", "--min-area", "-1"], ["--min-area", "more than 0", "-1"]),
        (["--report", "nowhere/page.html"], ["no such folder", "nowhere"]),
    ],
    ids=" ".join,
)
def test_other_outputs_that_make_no_sense(
    d2ls: D2LS, scene: Path, tiny_weights: Path, options: list[str], words: list[str]
) -> None:
    assert_error(d2ls("predict", scene, "--model", tiny_weights, *options), 2, *words)
    assert names_in(scene.parent) == ["scene.tif"]


def test_several_scenes_but_one_page(
    d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    other = write_raster(tmp_path / "other.tif", pixels(3, 20, 20))
    result = d2ls("predict", scene, other, "--model", tiny_weights, "--report", tmp_path / "page.html")
    assert_error(result, 2, "several scenes would be written to", "page.html")
    assert d2ls("predict", scene, other, "--model", tiny_weights, "--report", ".html").exit_code == 0
    assert (tmp_path / "other_d2ls-tiny_report.html").exists()


def test_a_page_of_the_last_scene_that_exists_is_told_before_the_first_is_mapped(
    d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path, write_raster: Write, pixels: Pixels
) -> None:
    last = write_raster(tmp_path / "last.tif", pixels(3, 20, 20))
    (tmp_path / "last_d2ls-tiny_report.html").touch()
    result = d2ls("predict", scene, last, "--model", tiny_weights, "--report", ".html")
    assert result.exit_code == 1
    assert "last_d2ls-tiny_report.html exists" in result.stderr
    assert result.output.index("report.html exists") < result.output.index("scene_d2ls-tiny.tif  (")
