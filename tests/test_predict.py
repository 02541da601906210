"""The pipeline with segmenters that need no network: what comes out, what is left behind, what it costs."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

import d2ls_infer
from d2ls_infer import predict_raster
from d2ls_infer.errors import D2LSError, MissingFileError, OutputExistsError, RasterError, UsageError
from d2ls_infer.job import default_output, prepared, run_key, run_tag
from d2ls_infer.options import PredictOptions
from d2ls_infer.raster import Scale
from d2ls_infer.tiling import WINDOWS, TileGrid

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
ReadMap = Callable[[Path], SimpleNamespace]
NODATA = 255


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def scene(tmp_path: Path, write_raster: Write, pixels: Pixels) -> Path:
    """Three bands of 50 x 41 pixels, alone in its folder."""
    return write_raster(tmp_path / "scene.tif", pixels(3, 50, 41))


# What comes out


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (2, 3), (16, 16), (17, 13), (33, 64), (101, 97)])
@pytest.mark.parametrize("blend", WINDOWS)
def test_a_function_of_each_pixel_comes_out_as_if_untiled(
    tmp_path: Path,
    write_raster: Write,
    read_map: ReadMap,
    pixels: Pixels,
    fakes: SimpleNamespace,
    shape: tuple[int, int],
    blend: str,
) -> None:
    array = pixels(3, *shape)
    path = write_raster(tmp_path / "scene.tif", array)
    result = predict_raster(fakes.PerPixel(), path, tile_size=16, overlap=5, blend=blend, batch_size=3)
    found = read_map(result.output)
    assert np.array_equal(found.array, array[0] % 3)
    with rasterio.open(path) as dataset:
        assert (found.crs, found.transform) == (dataset.crs, dataset.transform)


@settings(max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 80), st.sampled_from(WINDOWS), st.data())
def test_any_size_tile_overlap_and_nodata(
    write_raster: Write,
    read_map: ReadMap,
    pixels: Pixels,
    fakes: SimpleNamespace,
    tmp_path_factory: pytest.TempPathFactory,
    height: int,
    width: int,
    tile_size: int,
    blend: str,
    data: st.DataObject,
) -> None:
    least_step = min(tile_size, max(1, round((height * width / 100) ** 0.5)))
    overlap = data.draw(st.integers(0, tile_size - least_step))
    array = pixels(3, height, width)
    array[:, :: data.draw(st.integers(1, 9)), :: data.draw(st.integers(1, 9))] = 0
    folder = tmp_path_factory.getbasetemp()
    path = write_raster(folder / "any.tif", array, nodata=0)
    segmenter = fakes.PerPixel()
    result = predict_raster(
        segmenter, path, folder / "any_map.tif", overwrite=True, tile_size=tile_size, overlap=overlap, blend=blend,
        batch_size=4,
    )  # fmt: skip
    expected = np.where(array.any(0), array[0] % 3, NODATA)
    assert np.array_equal(read_map(result.output).array, expected)
    grid = TileGrid(height, width, tile_size, overlap)
    assert result.tiles == len(grid)
    assert result.tiles - result.skipped == segmenter.scored
    assert result.skipped == sum(not array[:, t.row : t.row + t.height, t.col : t.col + t.width].any() for t in grid)
    assert [area.pixels for area in result.areas] == [int((expected == k).sum()) for k in range(3)]


@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_a_map_does_not_depend_on_the_batch_size(
    scene: Path, tmp_path: Path, read_map: ReadMap, fakes: SimpleNamespace, batch_size: int
) -> None:
    """Of a segmenter that looks at the whole tile."""
    one, many = (
        read_map(
            predict_raster(
                fakes.TileMean(), scene, tmp_path / f"{size}.tif", tile_size=16, overlap=7, batch_size=size
            ).output
        ).array
        for size in (1, batch_size)
    )
    assert np.array_equal(one, many)


@pytest.mark.parametrize(("batch_size", "batches"), [(None, [1] * 9), (1, [1] * 9), (4, [3, 3, 3]), (100, [9])])
def test_tiles_are_scored_in_batches_of_the_size_asked_for(
    tmp_path: Path,
    write_raster: Write,
    pixels: Pixels,
    fakes: SimpleNamespace,
    batch_size: int | None,
    batches: list[int],
) -> None:
    """One by one where nobody says, on a CPU."""
    segmenter = fakes.Constant()
    path = write_raster(tmp_path / "scene.tif", pixels(3, 48, 48))
    predict_raster(segmenter, path, tile_size=16, overlap=0, batch_size=batch_size)
    assert segmenter.batches == batches


def test_a_constant_comes_out_in_every_corner(scene: Path, read_map: ReadMap, fakes: SimpleNamespace) -> None:
    for blend in WINDOWS:
        result = predict_raster(fakes.Constant(), scene, overwrite=True, tile_size=16, blend=blend)
        assert (read_map(result.output).array == 1).all()


def test_the_band_with_the_largest_score_wins(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    array = np.stack([pixels(1, 30, 30)[0], pixels(1, 30, 31)[0, :, :30], pixels(1, 31, 30)[0, :30]])
    path = write_raster(tmp_path / "scene.tif", array)
    found = read_map(predict_raster(fakes.Identity(), path, tile_size=16).output).array
    assert (np.take_along_axis(array, found[None].astype(np.int64), 0)[0] == array.max(0)).all()


def test_tiles_without_a_valid_pixel_are_not_scored(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, fakes: SimpleNamespace
) -> None:
    """A scene as satellites give them: a tilted stripe in a frame of nodata."""
    row, col = np.mgrid[:120, :120]
    array = np.where(np.abs(row - col) < 15, 100, 0).astype(np.uint8)[None].repeat(3, 0)
    segmenter = fakes.Constant()
    result = predict_raster(
        segmenter, write_raster(tmp_path / "a.tif", array, nodata=0), tile_size=16, overlap=0, batch_size=7
    )
    assert result.tiles == 64
    assert 0 < segmenter.scored < 30
    assert result.skipped == 64 - segmenter.scored
    assert np.array_equal(read_map(result.output).array, np.where(array[0] > 0, 1, NODATA))


@pytest.mark.parametrize("kind", ["nodata", "mask", "alpha", "nan"])
def test_what_the_file_calls_invalid_is_255_and_nothing_else_is(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, pixels: Pixels, fakes: SimpleNamespace, kind: str
) -> None:
    array = pixels(3, 40, 30, "float32" if kind == "nan" else "uint8")
    invalid = np.zeros((40, 30), bool)
    invalid[3:20, 5:9] = invalid[39, 29] = invalid[0, 0] = True
    options: dict[str, Any] = {}
    if kind == "nodata":
        array[:, invalid] = 0
        options = {"nodata": 0}
    elif kind == "mask":
        options = {"mask": np.where(invalid, 0, 255).astype(np.uint8)}
    elif kind == "alpha":
        array = np.concatenate([array, np.where(invalid, 0, 255).astype(np.uint8)[None]])
        options = {"colorinterp": [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]}
    else:
        array[1, invalid] = np.nan
    path = write_raster(tmp_path / "scene.tif", array, **options)
    found = read_map(predict_raster(fakes.PerPixel(), path, tile_size=16).output).array
    assert np.array_equal(found, np.where(invalid, NODATA, array[0] % 3))


def test_a_scene_without_a_valid_pixel_is_a_map_of_nodata(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, fakes: SimpleNamespace
) -> None:
    path = write_raster(tmp_path / "scene.tif", np.zeros((3, 40, 30), np.uint8), nodata=0)
    segmenter = fakes.Constant()
    result = predict_raster(segmenter, path, tile_size=16)
    assert (read_map(result.output).array == NODATA).all()
    assert segmenter.scored == 0
    assert result.skipped == result.tiles
    assert [(area.pixels, area.share, area.area_m2) for area in result.areas] == [(0, 0.0, 0.0)] * 3
    assert {"read", "score", "write", "total"} <= set(result.seconds)


def test_values_of_other_types_reach_the_segmenter_on_its_range(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, fakes: SimpleNamespace
) -> None:
    """A scale of 0..3000 on a range of 0..30: a hundredth of each value, and its integer part is the class."""
    array = np.arange(0, 1500, 7, dtype=np.uint16).reshape(1, 1, -1).repeat(3, 0)
    path = write_raster(tmp_path / "scene.tif", array)
    result = predict_raster(fakes.PerPixel(value_range=(0.0, 30.0)), path, tile_size=64, scale="0,3000")
    # Away from whole hundreds, where float32 may round to either side.
    inner = array[0] % 100 > 1
    assert np.array_equal(read_map(result.output).array[inner], (array[0] // 100 % 3)[inner])


def test_bands_are_taken_in_the_order_asked_for(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    array = pixels(5, 20, 20)
    path = write_raster(tmp_path / "scene.tif", array)
    for bands in ("5,1,2", [5, 1, 2], (5, 1, 2), np.array([5, 1, 2])):
        result = predict_raster(fakes.PerPixel(), path, overwrite=True, bands=bands)
        assert np.array_equal(read_map(result.output).array, array[4] % 3)


def test_numbers_of_numpy_are_numbers(scene: Path, read_map: ReadMap, fakes: SimpleNamespace) -> None:
    result = predict_raster(
        fakes.Constant(), scene, tile_size=np.int64(16), overlap=np.float64(0.25), batch_size=np.int64(2)
    )
    assert json.loads(read_map(result.output).tags["D2LS_OPTIONS"])["tile_size"] == 16


@pytest.mark.parametrize(("driver", "name"), [("PNG", "photo.png"), ("JPEG", "photo.jpg")])
def test_a_plain_image_is_mapped_without_a_warning(
    tmp_path: Path,
    write_raster: Write,
    read_map: ReadMap,
    pixels: Pixels,
    fakes: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    driver: str,
    name: str,
) -> None:
    path = write_raster(tmp_path / name, pixels(3, 40, 30), driver=driver, georeferenced=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as dataset:
            array = dataset.read()
    caplog.set_level(logging.WARNING)
    result = predict_raster(fakes.PerPixel(value_range=(0.0, 255.0)), path, tile_size=16)
    assert caplog.messages == []
    found = read_map(result.output)
    assert np.array_equal(found.array, array[0] % 3)
    assert found.crs is None
    assert [area.area_m2 for area in result.areas] == [None] * 3


# What is said of it


def test_the_result_tells_areas_and_shares(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    array = pixels(3, 30, 40)
    array[:, :10] = 0
    path = write_raster(tmp_path / "scene.tif", array, nodata=0, transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_600_000))
    result = predict_raster(fakes.PerPixel(), path, tile_size=16, overlap=0.25)
    counts = [int((array[0, 10:] % 3 == k).sum()) for k in range(3)]
    assert [area.name for area in result.areas] == ["water", "forest", "field"]
    assert [area.pixels for area in result.areas] == counts
    assert sum(area.share for area in result.areas) == pytest.approx(1)
    assert [area.share for area in result.areas] == pytest.approx([count / 800 for count in counts])
    assert [area.area_m2 for area in result.areas] == pytest.approx([count * 0.25 for count in counts], rel=2e-3)


def test_the_result_tells_files_tiles_and_times(scene: Path, fakes: SimpleNamespace) -> None:
    result = predict_raster(fakes.Constant(), str(scene), tile_size=16, overlap=4)
    assert result.source == str(scene)
    assert result.output == scene.with_name("scene_d2ls-Constant.tif")
    assert result.tiles == len(TileGrid(50, 41, 16, 4))
    assert result.skipped == 0
    assert result.clipped == 0
    assert set(result.seconds) == {"read", "score", "write", "total"}
    assert min(result.seconds.values()) >= 0
    assert max(result.seconds.values()) == result.seconds["total"]  # stages go on side by side


def test_areas_in_degrees_are_summed_by_row(tmp_path: Path, write_raster: Write, fakes: SimpleNamespace) -> None:
    """The whole earth in pixels of a degree has its known surface, 510.07 million km2."""
    path = write_raster(
        tmp_path / "earth.tif",
        np.ones((3, 180, 360), np.uint8),
        crs="EPSG:4326",
        transform=Affine(1, 0, -180, 0, -1, 90),
    )
    result = predict_raster(fakes.Constant(), path, tile_size=128)
    assert result.areas[1].area_m2 == pytest.approx(510.0656e12, rel=1e-3)
    assert result.areas[0].area_m2 == 0


def test_the_tags_say_how_a_map_was_made(scene: Path, read_map: ReadMap, fakes: SimpleNamespace) -> None:
    segmenter = fakes.Constant(value_range=(0.0, 255.0))
    segmenter.name, segmenter.sha256, segmenter.dtype = "some-model", "ab" * 32, torch.bfloat16
    result = predict_raster(
        segmenter, scene, tile_size=16, overlap="25%", blend="linear", bands="3,2,1", scale="p2,p98"
    )
    assert result.output.name == "scene_d2ls-some-model.tif"
    found = read_map(result.output)
    assert found.tags["D2LS_MODEL"] == "some-model"
    assert found.tags["D2LS_WEIGHTS_SHA256"] == "ab" * 32
    assert found.tags["D2LS_VERSION"] == d2ls_infer.__version__
    assert found.tags["TIFFTAG_SOFTWARE"] == f"d2ls-infer {d2ls_infer.__version__}"
    assert json.loads(found.tags["D2LS_OPTIONS"]) == {
        "tile_size": 16,
        "overlap_px": 4,
        "blend": "linear",
        "dictionary": "tile",
        "bands": {"band 1": 3, "band 2": 2, "band 3": 1},
        "scale": "p2,p98",
        "precision": "bfloat16",
    }
    # Not in its own bytes, which are the same whatever is made beside it.
    assert re.fullmatch("[0-9a-f]{64}", found.tags["D2LS_RUN"])
    assert b"D2LS_RUN" not in result.output.read_bytes()
    assert found.description == "class (D2LS some-model)"
    assert found.nodata == NODATA
    assert found.categories == list(segmenter.labels.names)
    assert [found.colormap[i][:3] for i in range(3)] == list(segmenter.labels.colors)


def test_a_journal_is_of_a_batch_size_and_a_map_of_any(scene: Path, fakes: SimpleNamespace) -> None:
    few, many = PredictOptions(batch_size=1), PredictOptions(batch_size=2, max_memory="64G")
    with prepared(fakes.Constant(), scene, None, few, overwrite=False) as job:
        assert run_tag(job, few) == run_tag(job, many)
        keys = [run_key(job, options) for options in (few, many)]
    assert [key["options"].pop("batch_size") for key in keys] == ["1", "2"]
    assert keys[0] == keys[1]


def test_progress_counts_every_tile(scene: Path, fakes: SimpleNamespace) -> None:
    told: list[tuple[int, int]] = []
    result = predict_raster(
        fakes.Constant(), scene, tile_size=16, batch_size=4, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(i + 1, result.tiles) for i in range(result.tiles)]


def test_values_of_a_wider_type_without_a_scale_are_warned_of(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, 20, 20, "uint16", high=20))
    segmenter = fakes.Constant(value_range=(0.0, 255.0))
    with caplog.at_level(logging.WARNING, "d2ls_infer"):
        predict_raster(segmenter, write_raster(tmp_path / "fits.tif", pixels(3, 20, 20, "uint16")))
        assert caplog.messages == []
        with rasterio.open(write_raster(tmp_path / "tagged.tif", pixels(3, 20, 20, "uint16")), "r+") as dataset:
            dataset.scales = [0.1] * 3
        predict_raster(segmenter, tmp_path / "tagged.tif")
        assert "as they are, without regard to its tags of scale and offset" in caplog.text
        caplog.clear()
        predict_raster(segmenter, path)
        (message,) = caplog.messages
        with rasterio.open(path) as dataset:
            values = dataset.read()
        seen = f"in its middle {values.min()} to {values.max()};"
        for word in (str(path), "uint16", seen, "0 to 255", "--scale"):
            assert word in message
        caplog.clear()
        predict_raster(segmenter, path, overwrite=True, scale="0,300")
        predict_raster(segmenter, path, overwrite=True, scale="p2,p98")
        assert caplog.messages == []


def test_files_of_an_earlier_map_that_stay_are_told(
    scene: Path, fakes: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    made = predict_raster(fakes.PerPixel(), scene, tile_size=16, confidence=True, preview=".png")
    with caplog.at_level(logging.WARNING, "d2ls_infer"):
        predict_raster(fakes.PerPixel(), scene, tile_size=16, confidence=True, preview=".png", overwrite=True)
        assert caplog.messages == []
        predict_raster(fakes.PerPixel(), scene, tile_size=16, overwrite=True)
    (message,) = caplog.messages
    assert message.endswith(f"does not make: {made.files['confidence'].name}, {made.files['preview'].name}")


def test_a_scale_may_be_two_numbers(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, 20, 20, "uint16", high=3000))
    maps = [tmp_path / "one.tif", tmp_path / "two.tif"]
    for scale, output in zip(("0,3000", (0, 3000)), maps, strict=True):
        predict_raster(fakes.PerPixel(value_range=(0.0, 255.0)), path, output, scale=scale)
    assert maps[0].read_bytes() == maps[1].read_bytes()


@pytest.mark.parametrize(
    ("share", "scale", "warned"),
    [(0.04, None, False), (0.2, None, True), (0.2, "0,255", True), (0.2, "0,1000", False), (0.2, "p20,p60", False)],
)
def test_much_clipping_is_warned_of_unless_it_was_asked_for(
    tmp_path: Path,
    write_raster: Write,
    fakes: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    share: float,
    scale: str | None,
    warned: bool,
) -> None:
    array = np.full((3, 20, 100), 100, np.uint16)
    array[:, :, : int(100 * share)] = 1000
    path = write_raster(tmp_path / "scene.tif", array)
    with caplog.at_level(logging.WARNING, "d2ls_infer"):
        result = predict_raster(fakes.Constant(value_range=(0.0, 255.0)), path, scale=scale, tile_size=16)
    assert any(f"{100 * share:.0f} %" in message and "clipped" in message for message in caplog.messages) == warned
    if warned:
        assert result.clipped == pytest.approx(share)


# Where it goes


def test_a_map_goes_beside_its_scene_by_default() -> None:
    assert default_output("some/where/scene.v1.tif", "naip") == Path("some/where/scene.v1_d2ls-naip.tif")
    assert default_output(Path("scene.png"), "naip", Path("maps")) == Path("maps/scene_d2ls-naip.tif")


def test_a_map_goes_where_it_is_told(scene: Path, tmp_path: Path, fakes: SimpleNamespace) -> None:
    (tmp_path / "maps").mkdir()
    assert predict_raster(fakes.Constant(), scene, str(tmp_path / "other.tif")).output == tmp_path / "other.tif"
    assert (
        predict_raster(fakes.Constant(), scene, tmp_path / "maps").output
        == tmp_path / "maps" / "scene_d2ls-Constant.tif"
    )
    assert names_in(tmp_path / "maps") == [
        "scene_d2ls-Constant.qml",
        "scene_d2ls-Constant.tif",
        "scene_d2ls-Constant.tif.aux.xml",
    ]


def test_an_older_map_is_replaced_only_on_request(scene: Path, read_map: ReadMap, fakes: SimpleNamespace) -> None:
    segmenter = fakes.Constant()
    output = predict_raster(segmenter, scene).output
    before, scored = output.read_bytes(), segmenter.scored
    with pytest.raises(OutputExistsError, match="--overwrite"):
        predict_raster(segmenter, scene)
    assert output.read_bytes() == before
    assert segmenter.scored == scored
    segmenter.index = 2
    predict_raster(segmenter, scene, overwrite=True)
    assert (read_map(output).array == 2).all()


# What goes wrong


@pytest.mark.parametrize("error", [RuntimeError("no memory left"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("tiles", [0, 5])
def test_an_error_of_the_segmenter_is_passed_on_and_leaves_nothing(
    scene: Path, fakes: SimpleNamespace, error: BaseException, tiles: int
) -> None:
    with pytest.raises(type(error)) as caught:
        predict_raster(fakes.Failing(error, tiles), scene, tile_size=16)
    assert caught.value is error
    assert names_in(scene.parent) == ["scene.tif"]


def test_an_error_leaves_an_older_map_as_it_was(scene: Path, tmp_path: Path, fakes: SimpleNamespace) -> None:
    output = tmp_path / "map.tif"
    predict_raster(fakes.Constant(), scene, output, tile_size=16)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        predict_raster(fakes.Failing(KeyboardInterrupt()), scene, output, overwrite=True, tile_size=16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_error_of_the_progress_callback_leaves_nothing(scene: Path, fakes: SimpleNamespace) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_raster(fakes.Constant(), scene, tile_size=16, progress=stop)
    assert names_in(scene.parent) == ["scene.tif"]


def test_a_scene_that_ends_early_leaves_nothing(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, 200, 100), compress="deflate", blockysize=16)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    segmenter = fakes.Constant()
    with pytest.raises(RasterError, match=r"scene\.tif, rows"):
        predict_raster(segmenter, path, tile_size=16)
    assert segmenter.scored > 0
    assert names_in(tmp_path) == ["scene.tif"]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_scores_that_are_no_finite_numbers_never_make_a_class(scene: Path, fakes: SimpleNamespace, bad: float) -> None:
    """An overflow in half precision gives NaN; -inf is how some rule a class out. argmax would give that very class."""

    class Overflowing(fakes.Constant):
        def scores(self, batch: torch.Tensor) -> torch.Tensor:
            scores = super().scores(batch)
            scores[:, 2] = bad
            return scores

    with pytest.raises(D2LSError, match="finite"):
        predict_raster(Overflowing(), scene, tile_size=16)
    assert names_in(scene.parent) == ["scene.tif"]


def test_scores_of_another_shape_are_an_error_that_leaves_nothing(scene: Path, fakes: SimpleNamespace) -> None:
    class Coarse(fakes.Constant):
        def scores(self, batch: torch.Tensor) -> torch.Tensor:
            return super().scores(batch)[..., ::4, ::4]

    with pytest.raises(UsageError, match="shape"):
        predict_raster(Coarse(), scene, tile_size=16)
    assert names_in(scene.parent) == ["scene.tif"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile_size": 0}, ["tile size", "at least 1", "got 0"]),
        ({"tile_size": -512}, ["tile size", "got -512"]),
        ({"tile_size": 64, "overlap": 64}, ["overlap", "64"]),
        ({"overlap": 1.5}, ["overlap", "1.5"]),
        ({"overlap": "lots"}, ["overlap", "'lots'"]),
        ({"blend": "cosine"}, ["window", "'cosine'", "hann"]),
        ({"batch_size": 0}, ["batch size", "at least 1", "got 0"]),
        ({"bands": "1;x"}, ["bands", "'1;x'"]),
        ({"bands": "1,2,x"}, ["3 bands", "none of them is 'x'"]),
        ({"bands": [1, 2]}, ["takes 3 bands", "2"]),
        ({"bands": [1, 2, 4]}, ["has 3 bands", "no band 4"]),
        ({"scale": "5,1"}, ["scale", "'5,1'"]),
        ({"scale": "0,1"}, ["scale", "value range"]),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_done(
    scene: Path, fakes: SimpleNamespace, options: dict[str, Any], words: list[str]
) -> None:
    segmenter = fakes.Constant()
    with pytest.raises(UsageError) as caught:
        predict_raster(segmenter, scene, **options)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)
    assert segmenter.scored == 0
    assert names_in(scene.parent) == ["scene.tif"]


def test_an_unknown_option_is_a_type_error(scene: Path, fakes: SimpleNamespace) -> None:
    with pytest.raises(TypeError, match="tilesize"):
        predict_raster(fakes.Constant(), scene, tilesize=512)


def test_options_are_read_once() -> None:
    options = PredictOptions(bands="3,2,1", scale="p2,p98", overlap="50%", tile_size=64)
    assert options.bands == (3, 2, 1)
    assert options.scale == Scale(2, 98, "percentiles")
    assert options.grid(100, 200, None).overlap_px == 32


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scale": 3000}, "a scale is MIN,MAX.*got '3000'"),
        ({"tile_size": "big"}, "a whole number of pixels, got 'big'"),
        ({"tile_size": 64.0}, r"a whole number of pixels, got 64\.0"),
        ({"aoi": 5}, "a file of polygons, got a int"),
    ],
)
def test_values_of_another_kind_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        PredictOptions(**options)


def test_a_missing_scene_and_a_missing_folder_are_told(tmp_path: Path, scene: Path, fakes: SimpleNamespace) -> None:
    with pytest.raises(MissingFileError, match=r"no such file: .*nowhere\.tif"):
        predict_raster(fakes.Constant(), tmp_path / "nowhere.tif")
    with pytest.raises(MissingFileError, match="no such folder"):
        predict_raster(fakes.Constant(), scene, tmp_path / "nowhere" / "map.tif")
    assert names_in(tmp_path) == ["scene.tif"]


@pytest.mark.parametrize("wrong", ["scene", "folder", "bands", "exists"])
def test_the_scene_and_the_output_are_checked_before_the_model_is_loaded(
    scene: Path, tmp_path: Path, tiny_weights: Path, wrong: str
) -> None:
    """The tensors of this weights file are cut off, so that loading it would be another error."""
    weights = tmp_path / "cut.safetensors"
    weights.write_bytes(tiny_weights.read_bytes()[:-1000])
    (tmp_path / "old.tif").touch()
    arguments: dict[str, tuple[Path, Path | None, dict[str, Any]]] = {
        "scene": (tmp_path / "nowhere.tif", None, {}),
        "folder": (scene, tmp_path / "nowhere" / "map.tif", {}),
        "bands": (scene, None, {"bands": "1,2,9"}),
        "exists": (scene, tmp_path / "old.tif", {}),
    }
    source, output, options = arguments[wrong]
    with pytest.raises(UsageError):
        predict_raster(weights, source, output, **options)


# What it costs

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
        return torch.stack((batch[:, 0], 255 - batch[:, 0]), 1)

torch.set_num_threads(1)
peaks = []
for height in map(int, sys.argv[2:]):
    path = f"{sys.argv[1]}/{height}.tif"
    with rasterio.open(
        path, "w", driver="GTiff", dtype="uint8", count=3, height=height, width=512, blockysize=64,
        crs="EPSG:32618", transform=Affine(1, 0, 0, 0, -1, 0),
    ) as dataset:
        rows = np.broadcast_to(np.arange(512) // 2, (3, 1024, 512)).astype(np.uint8)
        for start in range(0, height, 1024):
            dataset.write(rows, window=((start, start + 1024), (0, 512)))
    predict_raster(Null(), path, tile_size=256, overlap=32)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
print(*peaks)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="asks for the peak memory by POSIX means")
def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    """The high scene has 75 MB of pixels, 25 MB of labels and 200 MB of scores. GDAL may fill its cache."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), "1024", "49152"], capture_output=True, text=True, check=True
    )
    low, high = map(int, done.stdout.split())
    assert high - low < 64e6, f"{low / 1e6:.0f} MB for 1024 rows, {high / 1e6:.0f} MB for 49152"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how many bytes were read")
@pytest.mark.parametrize("layout", [{"tiled": True}, {"tiled": True, "interleave": "band"}, {"blockysize": 48}])
@pytest.mark.parametrize("overlap", [0.1, 0.5])
def test_no_block_is_read_twice(tmp_path: Path, fakes: SimpleNamespace, layout: dict[str, Any], overlap: float) -> None:
    """Whether rows of tiles begin where rows of blocks do or not, and while the map's own blocks want room too."""
    noise = np.random.default_rng(0).integers(1, 256, (3, 1400, 4096), np.uint8)
    scene = tmp_path / "scene.tif"
    profile = {"driver": "GTiff", "width": 4096, "height": 1400, "count": 3, "dtype": "uint8", "compress": "deflate"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(scene, "w", zlevel=1, **(profile | layout)) as dataset:
            dataset.write(noise)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    predict_raster(fakes.Constant(), scene, tile_size=512, overlap=overlap)
    assert 0.99 < (bytes_read() - before) / scene.stat().st_size < 1.02


# Real scenes


@pytest.fixture
def real_scenes(shared: Path) -> Iterator[Path]:
    return iter(sorted((shared / "data/scenes").glob("*.tif")))


def test_real_scenes_are_mapped_pixel_by_pixel(
    real_scenes: Iterator[Path], tmp_path: Path, read_map: ReadMap, fakes: SimpleNamespace
) -> None:
    """Seven files from seven programs: strips and tiles, JPEG in YCbCr, nodata, alpha, one to four bands."""
    for path in real_scenes:
        with rasterio.open(path) as dataset:
            bands = 3 if dataset.count > 2 else 1
            array, masks = dataset.read(1), dataset.read_masks(list(range(1, bands + 1)))
            grid = dataset.crs, dataset.transform, dataset.shape
        result = predict_raster(fakes.PerPixel(bands=bands), path, tmp_path, tile_size=1024, overlap=0)
        found = read_map(result.output)
        assert (found.crs, found.transform, found.array.shape) == grid
        valid = (masks > 0).any(0)
        assert np.array_equal(found.array, np.where(valid, array % 3, NODATA)), path.name
        assert sum(area.pixels for area in result.areas) == valid.sum()


# Warnings of scenes that a model was not made for


@pytest.mark.parametrize(
    ("interpretation", "names", "warned"),
    [
        (("red", "green", "blue"), ("red", "green", "blue"), ""),
        (
            ("red", "green", "blue"),
            ("near infrared", "red", "green"),
            "band 1 is marked red and taken as near infrared",
        ),
        (("gray", "undefined", "undefined"), ("near infrared", "red", "green"), ""),
        (("red", "green", "blue"), ("vv", "vh", "slope"), ""),
        (
            ("gray", "undefined", "undefined", "undefined"),
            ("near infrared", "red", "green"),
            "has 4 bands and does not say what they show; taken is band 1 as near infrared, band 2 as red, band 3 as",
        ),
        (("gray", "undefined", "undefined", "alpha"), ("near infrared", "red", "green"), ""),
    ],
)
def test_bands_marked_as_other_colours_are_told_unless_they_were_chosen(
    tmp_path: Path,
    write_raster: Write,
    pixels: Pixels,
    fakes: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    interpretation: tuple[str, ...],
    names: tuple[str, ...],
    warned: str,
) -> None:
    array = pixels(len(interpretation), 8, 8)
    array[3:] = 255
    path = write_raster(tmp_path / "scene.tif", array)
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = [rasterio.enums.ColorInterp[name] for name in interpretation]
    model = fakes.PerPixel()
    model.bands = names
    caplog.set_level(logging.WARNING)
    predict_raster(model, path, bands="1,2,3")
    assert caplog.messages == []
    predict_raster(model, path, overwrite=True)
    assert len(caplog.messages) == bool(warned)
    assert warned in " ".join(caplog.messages)
