"""Which bands of a file are a model's: by number, by name, by what the file says; and what only looks like a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from d2ls_infer.errors import RasterError, UsageError
from d2ls_infer.raster import Scene
from d2ls_infer.raster.bands import canonical, contradicts

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
RGB = ("red", "green", "blue")
CIR = ("near infrared", "red", "green")


@pytest.fixture
def described(tmp_path: Path, write_raster: Write, pixels: Pixels) -> Callable[..., Path]:
    """A file of 12 x 9 pixels whose bands have those descriptions and colours."""

    def write(descriptions: Sequence[str | None] = (), colours: Sequence[str] = (), **options: Any) -> Path:
        count = len(descriptions or colours)
        path = write_raster(tmp_path / "scene.tif", pixels(count, 12, 9), photometric="minisblack", alpha="no")
        with rasterio.open(path, "r+") as dataset:
            if colours:
                dataset.colorinterp = [ColorInterp[name] for name in colours]
            for band, text in enumerate(descriptions, 1):
                if text is not None:
                    dataset.set_band_description(band, text)
        return path

    return write


def bands_of(path: Path, names: Sequence[str], **options: Any) -> list[int]:
    with Scene.open(path, bands_needed=len(names), band_names=names, **options) as scene:
        values, _ = scene.rows(0, scene.height)
        with rasterio.open(path) as dataset:
            assert np.array_equal(values, dataset.read(scene.bands))
        return list(scene.bands)


@pytest.mark.parametrize(
    ("descriptions", "colours", "names", "bands"),
    [
        (["red", "green", "blue"], [], RGB, [1, 2, 3]),
        (["blue", "green", "red", "nir"], [], RGB, [3, 2, 1]),
        (["Blue", "GREEN", "Red", "NIR"], [], CIR, [4, 3, 2]),
        (["r", "g", "b", "near-infrared"], [], CIR, [4, 1, 2]),
        (["B", "G", "R", "Near_Infrared"], [], (*RGB, "near infrared"), [3, 2, 1, 4]),
        ([None, None, None, None], ["blue", "green", "red", "undefined"], RGB, [3, 2, 1]),
        ([None, None, None, None], ["red", "green", "blue", "nir"], CIR, [4, 1, 2]),
        (["swir1", "swir2", "red"], [], ("red", "shortwave infrared 1"), [3, 1]),
        (["SWIR 2", "Shortwave-Infrared 1", "red"], [], ("red", "swir1"), [3, 2]),
        (["vv", "vh"], [], ("vh", "vv"), [2, 1]),
        (["B02", "B03", "B04"], [], ("B04", "B03"), [3, 2]),
        # A description goes before the colour, which many programs set without thinking.
        (["nir", "red", "green"], ["red", "green", "blue"], CIR, [1, 2, 3]),
        (["green", "red", "nir"], ["red", "green", "blue"], CIR, [3, 2, 1]),
        # Band names that mean another band with each sensor, and other words, are none.
        (["B04", "B03", "B02"], [], RGB, [1, 2, 3]),
        (["Layer_1", "Layer_2", "Layer_3"], ["blue", "green", "red"], RGB, [3, 2, 1]),
        # What the file marks agrees with its order as far as it goes.
        ([None] * 4, ["red", "green", "blue", "undefined"], (*RGB, "near infrared"), [1, 2, 3, 4]),
        ([None] * 5, ["gray"] * 5, RGB, [1, 2, 3]),
        # There is nothing to choose from: false-colour images are often marked red, green, blue.
        ([None] * 3, ["red", "green", "blue"], CIR, [1, 2, 3]),
    ],
)  # fmt: skip
def test_bands_are_taken_as_the_file_marks_them_else_in_its_order(
    described: Callable[..., Path],
    descriptions: list[str | None],
    colours: list[str],
    names: list[str],
    bands: list[int],
) -> None:
    assert bands_of(described(descriptions, colours), names) == bands


@pytest.mark.parametrize(
    ("descriptions", "colours", "names", "words"),
    [
        # Near infrared may be the fourth; in the file's order it would be red.
        ([None] * 4, ["red", "green", "blue", "undefined"], CIR, ["1 red, 2 green, 3 blue, 4 unmarked"]),
        (["red", "green", "blue", "red"], [], RGB, ["1 red, 2 green, 3 blue, 4 red"]),
        (["nir", "red", "green", None], [], RGB, ["1 nir, 2 red, 3 green, 4 unmarked"]),
    ],
)
def test_what_only_the_user_can_know_is_asked(
    described: Callable[..., Path],
    descriptions: list[str | None],
    colours: list[str],
    names: list[str],
    words: list[str],
) -> None:
    path = described(descriptions, colours)
    with pytest.raises(UsageError, match="which bands of") as caught:
        bands_of(path, names)
    for word in (*words, str(path), ", ".join(names), "--bands", "1,2,3"):
        assert word in str(caught.value)
    assert bands_of(path, names, bands=[4, 1, 2]) == [4, 1, 2]


@pytest.mark.parametrize(
    ("wanted", "bands"),
    [
        (["nir", "red", "green"], [4, 3, 2]),
        (["Near Infrared", 3, "g"], [4, 3, 2]),
        (["haze", "blue", "blue"], [5, 1, 1]),
        ([5, 4, 3], [5, 4, 3]),
    ],
)
def test_bands_may_be_asked_for_by_name(
    described: Callable[..., Path], wanted: list[int | str], bands: list[int]
) -> None:
    assert bands_of(described(["blue", "green", "red", "nir", "Haze"]), RGB, bands=wanted) == bands


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            ["blue", "green", "swir1"],
            ["has 5 bands", "none of them is 'swir1'", "1 blue, 2 green, 3 red, 4 nir, 5 red"],
        ),
        (["red", "green", "blue"], ["2 of them are 'red'", "give its number"]),
    ],
)
def test_a_name_that_no_band_or_several_go_by(
    described: Callable[..., Path], wanted: list[str], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        bands_of(described(["blue", "green", "red", "nir", "red"]), RGB, bands=wanted)
    for word in words:
        assert word in str(caught.value)


def test_names_are_compared_without_what_people_write_differently() -> None:
    assert len({canonical(name) for name in ("NIR", "near infrared", "Near-Infrared", "near_infrared", "near IR")}) == 1
    assert len({canonical(name) for name in ("red", "R", " Red ", "rededge", "B4", "infrared")}) == 4
    assert len({canonical(name) for name in ("blue", "Blue (490 nm)", "Blue_band", "band blue", "B")}) == 1
    assert len({canonical(name) for name in ("S1 (VV)", "S1 (VH)", "band", "(red)", "band 1", "1")}) == 6
    assert contradicts("nir", "red")
    assert contradicts("alpha", "near infrared")
    assert not contradicts("R", "red")
    assert not contradicts("", "red")
    assert not contradicts("gray", "red")


# Near infrared in disguise


@pytest.mark.parametrize("zeros", [False, True], ids=["no zeros", "clear water"])
@pytest.mark.parametrize("tiled", [{}, {"tiled": True, "blockxsize": 64, "blockysize": 64}], ids=["strips", "tiles"])
def test_near_infrared_that_is_tagged_as_alpha_makes_no_holes(
    tmp_path: Path, write_raster: Write, pixels: Pixels, zeros: bool, tiled: dict[str, Any]
) -> None:
    """GDAL tags the fourth band of 8-bit files so unless told otherwise."""
    array = pixels(4, 200, 500)
    array[3, 50:90, 100:300] *= not zeros
    path = write_raster(tmp_path / "scene.tif", array, **tiled)
    with rasterio.open(path) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
    with Scene.open(path, bands_needed=3, band_names=RGB) as scene:
        assert scene.rows(0, 200).valid.all()
        assert scene.not_alpha == [4]
    with pytest.raises(UsageError, match="which bands"):  # it may be the model's near infrared
        bands_of(path, CIR)
    with Scene.open(path, bands_needed=4, band_names=(*RGB, "near infrared")) as scene:
        assert list(scene.bands) == [1, 2, 3, 4]
        assert scene.rows(0, 200).valid.all()
        assert scene.not_alpha == []


def test_a_description_tells_near_infrared_from_alpha(described: Callable[..., Path]) -> None:
    """Whatever its values are."""
    path = described(["red", "green", "blue", "nir"], ["red", "green", "blue", "alpha"])
    with rasterio.open(path, "r+") as dataset:
        dataset.write(np.where(np.arange(9) < 3, 0, 255).astype(np.uint8)[None].repeat(12, 0), 4)
    with Scene.open(path, bands_needed=3, band_names=CIR) as scene:
        assert scene.bands == [4, 1, 2]
        assert scene.rows(0, 12).valid.all()
    with Scene.open(path, bands_needed=3, band_names=RGB) as scene:
        assert scene.rows(0, 12).valid.all()


@pytest.mark.parametrize("overviews", [False, True])
def test_soft_edges_and_frames_stay_a_mask(
    tmp_path: Path, write_raster: Write, pixels: Pixels, overviews: bool
) -> None:
    """A rotated image in a transparent frame, with an edge that fades over ten pixels."""
    array = pixels(4, 600, 500)
    row, col = np.mgrid[:600, :500]
    array[3] = np.clip((180 - np.abs(row - 300) * 0.8 - np.abs(col - 250) * 0.6) * 25, 0, 255)
    path = write_raster(tmp_path / "scene.tif", array, tiled=True, blockxsize=128, blockysize=128)
    if overviews:
        with rasterio.open(path, "r+") as dataset:
            dataset.build_overviews([2, 4])
    with Scene.open(path, bands_needed=3, band_names=RGB) as scene:
        assert np.array_equal(scene.rows(0, 600).valid, array[3] > 0)
        assert scene.not_alpha == []


def test_an_alpha_band_is_no_band_of_the_image(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(4, 30, 40)
    array[3] = 255
    path = write_raster(tmp_path / "scene.tif", array)
    with pytest.raises(
        UsageError, match=r"one of them alpha, a mask; --bands 1,2,3,4 takes it too\), but the model needs 4"
    ):
        Scene.open(path, bands_needed=4)
    with pytest.raises(UsageError, match=r"has 4 bands \(one of them alpha, a mask\), but the model needs 5"):
        Scene.open(path, bands_needed=5)
    with Scene.open(path, bands_needed=4, bands=[1, 2, 3, 4]) as scene:
        assert np.array_equal(scene.rows(0, 30).values, array)


def test_an_alpha_band_without_an_opaque_pixel_is_one(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(4, 30, 40)
    array[3] = 0
    with Scene.open(write_raster(tmp_path / "scene.tif", array), bands_needed=3, band_names=RGB) as scene:
        assert not scene.rows(0, 30).valid.any()


@pytest.mark.parametrize("truncated", [False, True])
def test_a_file_that_ends_before_its_alpha_band_is_an_error(
    tmp_path: Path, write_raster: Write, pixels: Pixels, truncated: bool
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(4, 300, 200), interleave="band")
    if truncated:
        path.write_bytes(path.read_bytes()[:-70_000])
        with pytest.raises(RasterError, match=r"scene\.tif"):
            bands_of(path, RGB)
    else:
        assert bands_of(path, RGB) == [1, 2, 3]


def test_names_that_differ_in_brackets_alone_are_told_apart(described: Callable[..., Path]) -> None:
    for names in (("S1 (VV)", "S1 (VH)"), ("NIR (10 m)", "NIR (20 m)")):
        assert bands_of(described(names), names) == [1, 2]
        assert bands_of(described(names[::-1]), names) == [2, 1]
    with pytest.raises(UsageError, match="which bands"):
        bands_of(described(["NIR (10 m)", "NIR (20 m)"]), ("near infrared", "red"))
