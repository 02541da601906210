"""Scenes read from rasters made on the fly: values, validity, bands, areas, and what is not to be read."""

from __future__ import annotations

import re
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from rasterio.env import get_gdal_config, set_gdal_config
from rasterio.errors import CRSError, NodataShadowWarning, NotGeoreferencedWarning

from d2ls_infer.errors import D2LSError, MissingFileError, RasterError, UsageError
from d2ls_infer.raster import Scale, Scene, parse_bands, parse_nodata, parse_scale, read_array
from d2ls_infer.raster import dataset as datasets
from d2ls_infer.raster.dataset import reading
from d2ls_infer.raster.scene import Pixels as Read
from d2ls_infer.tiling import TileGrid

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
BYTE = (0.0, 255.0)
RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]


def read_all(path: Path, **options: Any) -> Read:
    """Values and validity of a whole scene."""
    with Scene.open(path, **({"bands_needed": 3, "value_range": BYTE} | options)) as scene:
        return scene.rows(0, scene.height)


def write_vrt(path: Path, shape: tuple[int, int], bands: Sequence[tuple[str, str, int, str]]) -> Path:
    """A raster put together from bands of others beside it: type, file, band there, and what it is said to show."""
    text = f'<VRTDataset rasterXSize="{shape[1]}" rasterYSize="{shape[0]}">'
    for index, (dtype, name, band, shows) in enumerate(bands, start=1):
        text += (
            f'<VRTRasterBand dataType="{dtype}" band="{index}"><ColorInterp>{shows.title()}</ColorInterp>'
            f'<SimpleSource><SourceFilename relativeToVRT="1">{name}</SourceFilename><SourceBand>{band}</SourceBand>'
            "</SimpleSource></VRTRasterBand>"
        )
    path.write_text(text + "</VRTDataset>")
    return path


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


# Values


def test_uint8_comes_as_it_is(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(3, 20, 31, low=0, high=256)
    with Scene.open(write_raster(tmp_path / "a.tif", array), bands_needed=3, value_range=(0.0, 10_000.0)) as scene:
        values, valid = scene.rows(0, 20)
        assert scene.clipped_share == 0
    assert values.dtype == np.uint8
    assert np.array_equal(values, array)
    assert valid.all()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "float32", "float64", "int8"])
def test_other_types_are_clipped_to_the_value_range(tmp_path: Path, write_raster: Write, dtype: str) -> None:
    """The range of the model is -20 to 100; what lies on it stays what it is."""
    raw = np.array([[0, 1, 99, 100, 101, 120]]) if dtype.startswith("u") else np.array([[-100, -20, -3, 99, 100, 101]])
    path = write_raster(tmp_path / "a.tif", np.stack([raw] * 3).astype(dtype))
    with Scene.open(path, bands_needed=3, value_range=(-20.0, 100.0)) as scene:
        values, valid = scene.rows(0, 1)
        assert scene.clipped_share == pytest.approx(2 / 6)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[0], np.clip(raw, -20, 100), rtol=1e-6)
    assert valid.all()


def test_without_a_value_range_other_types_stay_as_they_are(tmp_path: Path, write_raster: Write) -> None:
    array = np.array([[[-7, 0, 30_000]]], np.int16)
    values, _ = read_all(write_raster(tmp_path / "a.tif", array), bands_needed=1, value_range=None)
    assert values.dtype == np.float32
    assert values.tolist() == array.tolist()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_scale_of_values_goes_to_the_value_range(tmp_path: Path, write_raster: Write, dtype: str) -> None:
    raw = np.array([[[0, 50, 100, 150, 200, 250]]], dtype)
    values, _ = read_all(write_raster(tmp_path / "a.tif", raw), bands_needed=1, scale=Scale(50, 200))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[0, 0], [0, 0, 85, 170, 255, 255], rtol=1e-6)


def test_a_scale_of_percentiles_is_taken_per_band_over_valid_pixels(tmp_path: Path, write_raster: Write) -> None:
    """Band 1 holds 1..101, so that p10 is 11 and p90 is 91; band 2 a hundred times that. Nodata counts for nothing."""
    ramp = np.arange(1, 102, dtype=np.uint16)
    array = np.stack([ramp, ramp * 100])[:, None, :]
    array = np.concatenate([array, np.zeros_like(array)], axis=1)  # a second row of nodata
    path = write_raster(tmp_path / "a.tif", array, nodata=0)
    values, valid = read_all(path, bands_needed=2, scale=Scale(10, 90, "percentiles"))
    expected = np.clip((ramp - 11.0) / 80.0, 0, 1) * 255
    np.testing.assert_allclose(values[0, 0], expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(values[1, 0], expected, rtol=1e-5, atol=1e-4)
    assert valid.tolist() == [[True] * 101, [False] * 101]
    assert not values[:, 1].any()


def test_percentiles_of_a_large_scene_are_taken_from_a_thinned_copy(tmp_path: Path, write_raster: Write) -> None:
    array = np.broadcast_to(np.arange(3000, dtype=np.uint16), (1, 4, 3000)).copy()
    values, _ = read_all(write_raster(tmp_path / "a.tif", array), bands_needed=1, scale=Scale(0, 100, "percentiles"))
    np.testing.assert_allclose(values[0, 0], np.arange(3000) / 2999 * 255, atol=0.5)


@pytest.mark.parametrize("value", [0, 7])
def test_percentiles_of_a_constant_band_give_numbers(tmp_path: Path, write_raster: Write, value: int) -> None:
    array = np.full((1, 3, 3), value, np.uint16)
    values, _ = read_all(write_raster(tmp_path / "a.tif", array), bands_needed=1, scale=Scale(2, 98, "percentiles"))
    assert np.isfinite(values).all()
    assert (values == values[0, 0, 0]).all()


def test_percentiles_of_a_scene_without_a_valid_pixel(tmp_path: Path, write_raster: Write) -> None:
    path = write_raster(tmp_path / "a.tif", np.zeros((3, 4, 4), np.uint16), nodata=0)
    values, valid = read_all(path, scale=Scale(2, 98, "percentiles"))
    assert not valid.any()
    assert not values.any()


def test_percentiles_go_by_the_finite_values(tmp_path: Path, write_raster: Write) -> None:
    array = np.arange(1, 101, dtype=np.float32).reshape(1, 10, 10)
    array[0, 0, :3] = np.nan, np.inf, -np.inf
    values, valid = read_all(
        write_raster(tmp_path / "a.tif", array), bands_needed=1, scale=Scale(0, 100, "percentiles")
    )
    assert valid.sum() == 97
    np.testing.assert_allclose(values[0, 0, 3], 0, atol=1e-4)
    np.testing.assert_allclose(values[0, 9, 9], 255, rtol=1e-6)


def test_a_scale_needs_a_value_range(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    path = write_raster(tmp_path / "a.tif", pixels(3, 4, 4))
    with pytest.raises(UsageError, match="value range"):
        read_all(path, value_range=None, scale=Scale(0, 1))


@pytest.mark.parametrize(("low", "high"), [(10, 0), (5, 5), (float("nan"), 1), (0, float("inf"))])
@pytest.mark.parametrize("kind", ["values", "percentiles"])
def test_a_scale_that_goes_nowhere_is_refused_when_it_is_made(low: float, high: float, kind: Any) -> None:
    """From Python as from the command line: it would divide by zero, or turn the image upside down."""
    with pytest.raises(UsageError, match="scale"):
        Scale(low, high, kind)


def test_clipped_share_counts_valid_values_once(tmp_path: Path, write_raster: Write) -> None:
    array = np.zeros((2, 40, 10), np.uint16)
    array[:, :10] = 300  # 10 of 30 valid rows lie above the range
    array[:, 30:] = 65_535
    path = write_raster(tmp_path / "a.tif", array, nodata=65_535)
    with Scene.open(path, bands_needed=2, value_range=BYTE) as scene:
        for _ in scene.tiles(TileGrid(40, 10, 16, 8)):
            pass
        assert scene.clipped_share == pytest.approx(1 / 3)


# Scale and offset tags


def write_tagged(path: Path, write_raster: Write, array: np.ndarray, tags: list[tuple[float, float]]) -> Path:
    """Each band with its own scale and offset."""
    write_raster(path, array)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = zip(*tags, strict=True)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_tags_are_applied_for_a_model_of_physical_units(tmp_path: Path, write_raster: Write, dtype: str) -> None:
    """Reflectance of 0 to 1, stored as hundredths less 0.1 in one band, and upside down in the other."""
    raw = np.array([[[0, 10, 60, 110, 120]]] * 2)
    path = write_tagged(tmp_path / "a.tif", write_raster, raw.astype(dtype), [(0.01, -0.1), (-0.01, 1.1)])
    with Scene.open(path, bands_needed=2, value_range=(0.0, 1.0)) as scene:
        values, valid = scene.rows(0, 1)
        assert scene.clipped_share == pytest.approx(0.4)
    assert valid.all()
    np.testing.assert_allclose(values[0, 0], [0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_allclose(values[1, 0], [1, 1, 0.5, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("value_range", "scale", "expected"),
    [
        ((0.0, 10_000.0), None, [0, 5000, 10_000]),  # counts stored numbers, as the file does
        ((0.0, 255.0), None, [0, 255, 255]),
        ((0.0, 1.0), Scale(0, 20_000), [0, 0.25, 0.5]),  # what is said goes before what is tagged
        ((0.0, 1.0), Scale(0, 100, "percentiles"), [0, 0.5, 1]),
        (None, None, [0, 5000, 10_000]),
    ],
)
def test_tags_are_not_applied_to_stored_numbers_nor_against_a_scale(
    tmp_path: Path,
    write_raster: Write,
    value_range: tuple[float, float] | None,
    scale: Scale | None,
    expected: list[float],
) -> None:
    raw = np.array([[[0, 5000, 10_000]]], np.uint16)
    path = write_tagged(tmp_path / "a.tif", write_raster, raw, [(0.0001, 0.0)])
    values, _ = read_all(path, bands_needed=1, value_range=value_range, scale=scale)
    np.testing.assert_allclose(values[0, 0], expected, rtol=1e-6)


def test_bytes_without_tags_are_as_they_are_for_any_model(tmp_path: Path, write_raster: Write) -> None:
    path = write_tagged(tmp_path / "a.tif", write_raster, np.array([[[0, 1, 200]]], np.uint8), [(1.0, 0.0)])
    values, _ = read_all(path, bands_needed=1, value_range=(0.0, 1.0))
    assert values.dtype == np.uint8
    assert values.tolist() == [[[0, 1, 200]]]


@pytest.mark.parametrize("tag", [0.0, float("nan"), float("inf")])
def test_a_tag_that_cannot_be_meant_is_none(tmp_path: Path, write_raster: Write, tag: float) -> None:
    raw = np.array([[[0.25, 0.5]]], np.float32)
    path = write_tagged(tmp_path / "a.tif", write_raster, raw, [(tag, 0.0)])
    values, _ = read_all(path, bands_needed=1, value_range=(0.0, 1.0))
    np.testing.assert_allclose(values, raw, rtol=1e-6)


# Validity


def test_a_nodata_value_stands_in_for_the_files_own(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(3, 6, 7)
    array[:, 1, 1] = 0
    array[:, 2, 2] = 255
    array[:2, 3, 3] = 255
    path = write_raster(tmp_path / "a.tif", array, nodata=0)
    for nodata, invalid in ((255.0, [[2, 2]]), (251.0, []), ("none", []), (None, [[1, 1]])):
        values, valid = read_all(path, nodata=nodata)
        assert np.argwhere(~valid).tolist() == invalid
        assert np.array_equal(values[:, valid], array[:, valid])


@pytest.mark.parametrize("kind", ["mask", "alpha"])
def test_a_nodata_value_counts_beside_masks_and_none_of_them_without(
    tmp_path: Path, write_raster: Write, pixels: Pixels, kind: str
) -> None:
    array = pixels(3, 6, 7)
    array[:, 2, 2] = 255
    mask = np.full((6, 7), 255, np.uint8)
    mask[4, 4] = 0
    if kind == "mask":
        path = write_raster(tmp_path / "a.tif", array, mask=mask)
    else:
        path = write_raster(tmp_path / "a.tif", np.concatenate([array, mask[None]]), colorinterp=RGBA)
    for nodata, invalid in ((255.0, [[2, 2], [4, 4]]), (None, [[4, 4]]), ("none", [])):
        assert np.argwhere(~read_all(path, nodata=nodata).valid).tolist() == invalid


def test_what_is_no_number_is_invalid_whatever_is_said(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(3, 6, 7, "float32")
    array[0, 1, 1] = np.nan
    array[:, 2, 2] = -9999
    path = write_raster(tmp_path / "a.tif", array, nodata=-9999)
    for nodata, invalid in (("none", [[1, 1]]), (float("nan"), [[1, 1]]), (-9999.0, [[1, 1], [2, 2]])):
        assert np.argwhere(~read_all(path, nodata=nodata).valid).tolist() == invalid


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", -1.0), ("uint8", 256.0), ("int16", 0.5), ("uint8", np.nan)])
def test_a_nodata_value_that_the_type_cannot_hold_is_refused(
    tmp_path: Path, write_raster: Write, pixels: Pixels, dtype: str, nodata: float
) -> None:
    path = write_raster(tmp_path / "a.tif", pixels(3, 4, 4, dtype))
    with pytest.raises(UsageError, match=rf"--nodata {nodata:g} is no {dtype} value"):
        read_all(path, nodata=nodata)


@pytest.mark.parametrize(
    ("text", "nodata"), [("0", 0.0), ("-9999", -9999.0), ("none", "none"), ("1e3", 1000.0), (7, 7.0)]
)
def test_nodata_is_a_value_or_none(text: str, nodata: float | str) -> None:
    assert parse_nodata(text) == nodata


@pytest.mark.parametrize("text", ["", "zero", "0,0"])
def test_anything_else_is_no_nodata(text: str) -> None:
    with pytest.raises(UsageError, match="nodata is a value"):
        parse_nodata(text)


def test_nodata_of_each_band(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    """A pixel is valid where any band is; only a VRT can say it."""
    array = pixels(2, 5, 5)
    array[:, 1, 1] = 10, 20
    array[:, 2, 2] = 20, 20
    array[:, 3, 3] = 10, 10
    rasterio.shutil.copy(write_raster(tmp_path / "a.tif", array), tmp_path / "a.vrt", driver="VRT")
    text = (tmp_path / "a.vrt").read_text()
    for band, nodata in ((1, 10), (2, 20)):
        text = re.sub(rf'(<VRTRasterBand [^>]*band="{band}"[^>]*>)', rf"\1<NoDataValue>{nodata}</NoDataValue>", text)
    (tmp_path / "b.vrt").write_text(text)
    values, valid = read_all(tmp_path / "b.vrt", bands_needed=2)
    assert np.argwhere(~valid).tolist() == [[1, 1]]
    assert np.array_equal(values[:, valid], array[:, valid])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"value_range": None}, {"scale": Scale(2, 98, "percentiles")}])
def test_what_is_no_finite_number_is_invalid(
    tmp_path: Path, write_raster: Write, pixels: Pixels, value: float, options: dict[str, Any]
) -> None:
    """In one band is enough: the network would spread it."""
    array = pixels(3, 6, 7, "float32")
    array[1, 2, 3] = value
    values, valid = read_all(write_raster(tmp_path / "a.tif", array), **options)
    assert np.argwhere(~valid).tolist() == [[2, 3]]
    assert np.isfinite(values).all()
    assert not values[:, 2, 3].any()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_nodata_counts_where_it_is_in_all_bands(
    tmp_path: Path, write_raster: Write, pixels: Pixels, dtype: str
) -> None:
    """Black cars and clear water have a 0 in one band or two."""
    array = pixels(3, 6, 7, dtype)
    array[0, 1, 1] = 0
    array[:2, 2, 2] = 0
    array[:, 3, 3] = 0
    values, valid = read_all(write_raster(tmp_path / "a.tif", array, nodata=0))
    assert np.argwhere(~valid).tolist() == [[3, 3]]
    np.testing.assert_allclose(values, array, rtol=1e-6)


def test_invalid_pixels_hold_the_low_end_of_the_value_range(tmp_path: Path, write_raster: Write) -> None:
    array = np.full((3, 2, 2), 200, np.int16)
    array[:, 0, 0] = -9999
    values, _ = read_all(write_raster(tmp_path / "a.tif", array, nodata=-9999), value_range=(100.0, 300.0))
    assert values[:, 0, 0].tolist() == [100.0] * 3
    np.testing.assert_allclose(values[:, 1, 1], 200, rtol=1e-6)


@pytest.mark.parametrize("nodata", [float("nan"), -3.4028234663852886e38, -1.7976931348623157e308])
@pytest.mark.parametrize("value_range", [None, BYTE])
def test_the_usual_nodata_values_of_floats(
    tmp_path: Path, write_raster: Write, nodata: float, value_range: tuple[float, float] | None
) -> None:
    array = np.full((3, 3, 3), 9.0)
    array[:, 1, 1] = nodata
    values, valid = read_all(write_raster(tmp_path / "a.tif", array, nodata=nodata), value_range=value_range)
    assert np.argwhere(~valid).tolist() == [[1, 1]]
    assert not values[:, 1, 1].any()
    np.testing.assert_allclose(values[:, valid], 9.0, rtol=1e-6)


def test_a_finite_number_too_large_for_float32_is_invalid_without_a_value_range(
    tmp_path: Path, write_raster: Write
) -> None:
    array = np.full((3, 2, 2), 1.0)
    array[0, 0, 0] = 1e300
    values, valid = read_all(write_raster(tmp_path / "a.tif", array), value_range=None)
    assert np.argwhere(~valid).tolist() == [[0, 0]]
    assert np.isfinite(values).all()


def test_an_internal_mask_says_what_is_invalid(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(3, 6, 7)
    mask = np.full((6, 7), 255, np.uint8)
    mask[2:4, 5] = 0
    values, valid = read_all(write_raster(tmp_path / "a.tif", array, mask=mask))
    assert np.array_equal(valid, mask > 0)
    assert not values[:, ~valid].any()
    assert np.array_equal(values[:, valid], array[:, valid])


def test_an_alpha_band_is_a_mask(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    """Anything but fully transparent is valid."""
    array = pixels(4, 6, 7)
    array[3] = 255
    array[3, 0, :3] = 0, 1, 128
    values, valid = read_all(write_raster(tmp_path / "a.tif", array, colorinterp=RGBA))
    assert values.shape == (3, 6, 7)
    assert np.argwhere(~valid).tolist() == [[0, 0]]
    assert np.array_equal(values[:, valid], array[:3, valid])


def test_an_alpha_band_in_front_is_left_out_too(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(4, 4, 4)
    array[0] = 255
    array[0, 0, 0] = 0
    write_raster(tmp_path / "a.tif", array, photometric="minisblack", alpha="no")
    path = write_vrt(tmp_path / "a.vrt", (4, 4), [("Byte", "a.tif", i + 1, RGBA[i - 1].name) for i in range(4)])
    values, valid = read_all(path)
    assert np.argwhere(~valid).tolist() == [[0, 0]]
    assert np.array_equal(values[:, valid], array[1:, valid])


@pytest.mark.parametrize(
    ("bands_needed", "bands"), [(4, None), (3, [4, 1, 2])], ids=["the model needs four", "band 4 is asked for"]
)
def test_an_alpha_tag_on_a_band_that_is_read_as_data_masks_nothing(
    tmp_path: Path, write_raster: Write, pixels: Pixels, bands_needed: int, bands: list[int] | None
) -> None:
    """Near infrared in a fourth band is often tagged as alpha; 0 there is clear water."""
    array = pixels(4, 6, 7)
    array[3, 0, 0] = 0
    path = write_raster(tmp_path / "a.tif", array, colorinterp=RGBA)
    values, valid = read_all(path, bands_needed=bands_needed, bands=bands)
    assert valid.all()
    assert np.array_equal(values, array[[band - 1 for band in bands or [1, 2, 3, 4]]])


@pytest.mark.parametrize(("count", "dtype"), [(4, "uint16"), (5, "uint8"), (6, "uint16"), (4, "float32")])
def test_an_alpha_band_is_a_mask_for_any_number_of_bands_and_type(
    tmp_path: Path, write_raster: Write, pixels: Pixels, count: int, dtype: str
) -> None:
    """GDAL's own mask knows only 2 and 4 bands of whole numbers; drones' multispectral images have 5 and alpha."""
    array = pixels(count, 4, 4, dtype)
    array[-1] = 255
    array[-1, 1, 1] = 0
    shown = [*RGBA[:3], *[ColorInterp.undefined] * (count - 4), ColorInterp.alpha]
    _, valid = read_all(write_raster(tmp_path / "a.tif", array, colorinterp=shown))
    assert np.argwhere(~valid).tolist() == [[1, 1]]


def test_alpha_and_nodata_both_count(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    """GDAL's own mask leaves out the alpha band where there is a nodata value."""
    array = pixels(4, 4, 4)
    array[3] = 255
    array[3, 1, 1] = 0
    array[:, 2, 2] = 0
    _, valid = read_all(write_raster(tmp_path / "a.tif", array, colorinterp=RGBA, nodata=0))
    assert np.argwhere(~valid).tolist() == [[1, 1], [2, 2]]


def test_nodata_that_the_type_cannot_hold_masks_nothing(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    """A VRT of bytes may say -9999."""
    array = pixels(3, 4, 4, low=0)
    rasterio.shutil.copy(write_raster(tmp_path / "a.tif", array), tmp_path / "a.vrt", driver="VRT")
    text = (tmp_path / "a.vrt").read_text()
    text = text.replace("<ColorInterp>", "<NoDataValue>-9999</NoDataValue><ColorInterp>")
    (tmp_path / "b.vrt").write_text(text)
    values, valid = read_all(tmp_path / "b.vrt")
    assert valid.all()
    assert np.array_equal(values, array)


# Bands


def test_the_first_bands_are_taken(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(8, 4, 5)
    values, _ = read_all(write_raster(tmp_path / "a.tif", array))
    assert np.array_equal(values, array[:3])


@pytest.mark.parametrize("bands", [[4, 1, 2], [3, 2, 1], [8, 8, 1], (5, 6, 7)])
def test_bands_come_in_the_order_they_are_asked_for(
    tmp_path: Path, write_raster: Write, pixels: Pixels, bands: list[int]
) -> None:
    array = pixels(8, 4, 5)
    path = write_raster(tmp_path / "a.tif", array)
    values, _ = read_all(path, bands=bands)
    assert np.array_equal(values, array[[band - 1 for band in bands]])
    with Scene.open(path, bands_needed=3, bands=bands) as scene:
        assert list(scene.bands) == list(bands)


def test_one_band_may_stand_for_several(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    """The only way to put a grey image into a model of three bands."""
    array = pixels(1, 4, 5)
    values, _ = read_all(write_raster(tmp_path / "a.tif", array), bands=[1, 1, 1])
    assert np.array_equal(values, array[[0, 0, 0]])


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (1, {}, ["has 1 band,", "needs 3"]),
        (2, {}, ["has 2 bands,", "needs 3"]),
        (4, {"bands": [1, 2]}, ["takes 3 bands", "names 2"]),
        (4, {"bands": [1, 2, 5]}, ["has 4 bands", "no band 5"]),
        (4, {"bands": [0, 1, 2]}, ["no band 0", "counted from 1"]),
        (4, {"bands": [-1, 1, 2]}, ["no band -1"]),
    ],
)
def test_bands_that_are_not_there_are_named(
    tmp_path: Path, write_raster: Write, pixels: Pixels, count: int, options: dict[str, Any], words: list[str]
) -> None:
    path = write_raster(tmp_path / "a.tif", pixels(count, 4, 5))
    with pytest.raises(UsageError) as caught:
        read_all(path, **options)
    for word in words:
        assert word in str(caught.value)


def test_two_bands_of_which_one_is_alpha_are_too_few(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    path = write_raster(tmp_path / "a.tif", pixels(2, 4, 4), colorinterp=[ColorInterp.gray, ColorInterp.alpha])
    with pytest.raises(UsageError, match="has 2 bands, but the model needs 3"):
        read_all(path)


def test_a_palette_is_told_apart_from_a_grey_image(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    colours = {i: (i, 255 - i, 0, 255) for i in range(256)}
    tif = write_raster(tmp_path / "a.tif", pixels(1, 8, 8), colormap=colours, georeferenced=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        rasterio.shutil.copy(tif, tmp_path / "a.png", driver="PNG")
    with pytest.raises(UsageError, match=r"palette.*needs 3"):
        read_all(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "complex_int16"])
def test_complex_values_are_refused(tmp_path: Path, write_raster: Write, dtype: str) -> None:
    path = write_raster(tmp_path / "a.tif", np.zeros((3, 4, 4), np.complex64), dtype=dtype)
    with pytest.raises(UsageError, match=f"{dtype}.*real numbers"):
        read_all(path)


def test_bands_of_several_types_come_as_float32(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    wide, narrow = pixels(1, 4, 4, "uint16"), pixels(1, 4, 4, "uint8")
    write_raster(tmp_path / "wide.tif", wide * 200)
    write_raster(tmp_path / "narrow.tif", narrow)
    path = write_vrt(
        tmp_path / "both.vrt", (4, 4), [("UInt16", "wide.tif", 1, "undefined"), ("Byte", "narrow.tif", 1, "undefined")]
    )
    values, _ = read_all(path, bands_needed=2, value_range=(0.0, 65_535.0))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[0], wide[0] * 200.0, rtol=1e-6)
    np.testing.assert_allclose(values[1], narrow[0], rtol=1e-6)


# Files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere\.tif") as caught:
        read_all(tmp_path / "nowhere.tif")
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("content", [b"", b"II*\0", b"hello, this is no raster at all"])
def test_what_is_not_a_raster_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.tif").write_bytes(content)
    with pytest.raises(UsageError, match=r"notes\.tif is not a raster"):
        read_all(tmp_path / "notes.tif")


def test_a_folder_is_not_a_raster(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a raster"):
        read_all(tmp_path)


def test_a_container_of_several_rasters_is_an_error_and_not_a_traceback(
    tmp_path: Path, write_raster: Write, pixels: Pixels
) -> None:
    """netCDF, HDF5, Sentinel-2 products, GeoPackages: GDAL opens them, without a single band."""
    path = tmp_path / "two.gpkg"
    for table, options in (("one", {}), ("two", {"APPEND_SUBDATASET": "YES"})):
        write_raster(path, pixels(3, 8, 8), driver="GPKG", RASTER_TABLE=table, **options)
    with pytest.raises(UsageError, match="0 bands"):
        read_all(path)


@pytest.mark.parametrize(
    "profile",
    [
        {"compress": "deflate"},
        {"compress": "lzw", "tiled": True, "blockxsize": 64, "blockysize": 64},
        {},
        {"compress": "jpeg", "photometric": "ycbcr", "interleave": "pixel"},
        {"compress": "jpeg", "interleave": "band", "blockysize": 500},
    ],
    ids=["deflate", "lzw tiled", "uncompressed", "jpeg ycbcr", "jpeg in one strip"],
)
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_truncated_geotiff_is_an_error(
    tmp_path: Path, write_raster: Write, pixels: Pixels, profile: dict[str, Any], share: float
) -> None:
    """JPEG data that end early would otherwise come out grey."""
    path = write_raster(tmp_path / "a.tif", pixels(3, 500, 300), **profile)
    truncate(path, share)
    with Scene.open(path, bands_needed=3, value_range=BYTE) as scene, pytest.raises(RasterError, match=r"a\.tif, rows"):
        for _ in scene.tiles(TileGrid(500, 300, 128, 32)):
            pass


@pytest.mark.parametrize(("driver", "name"), [("PNG", "a.png"), ("JPEG", "a.jpg")])
@pytest.mark.parametrize("tile", [1000, 64], ids=["read whole", "read in parts"])
def test_a_truncated_plain_image_is_an_error(
    tmp_path: Path, write_raster: Write, pixels: Pixels, driver: str, name: str, tile: int
) -> None:
    """GDAL's fast path for PNGs that are read whole gives noise for such a file, without a word."""
    path = write_raster(tmp_path / name, pixels(3, 200, 300), driver=driver, georeferenced=False)
    truncate(path, 0.6)
    with Scene.open(path, bands_needed=3) as scene, pytest.raises(RasterError, match=name):
        for _ in scene.tiles(TileGrid(200, 300, tile, 0)):
            pass


def test_a_truncated_image_that_is_read_as_an_array_is_an_error(
    tmp_path: Path, write_raster: Write, pixels: Pixels
) -> None:
    path = write_raster(tmp_path / "a.png", pixels(3, 200, 300), driver="PNG", georeferenced=False)
    assert read_array(path).shape == (3, 200, 300)
    truncate(path, 0.6)
    with pytest.raises(RasterError, match=r"a\.png"):
        read_array(path)


@pytest.mark.parametrize(("driver", "name"), [("PNG", "a.png"), ("JPEG", "a.jpg"), ("GTiff", "a.tif")])
def test_plain_images_are_welcome_without_a_warning(
    tmp_path: Path, write_raster: Write, pixels: Pixels, driver: str, name: str
) -> None:
    """Warnings are errors here."""
    path = write_raster(tmp_path / name, pixels(3, 16, 16), driver=driver, georeferenced=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as dataset:
            expected = dataset.read()
    values, valid = read_all(path)
    assert np.array_equal(values, expected)
    assert valid.all()
    with Scene.open(path, bands_needed=3) as scene:
        assert scene.row_areas_m2() is None


@pytest.mark.parametrize(
    "profile",
    [
        {"blockysize": 1},
        {"blockysize": 7},
        {"blockysize": 50},
        {"tiled": True, "blockxsize": 16, "blockysize": 16},
        {"tiled": True, "blockxsize": 32, "blockysize": 64, "interleave": "pixel", "compress": "deflate"},
    ],
)
@pytest.mark.parametrize("shape", [(50, 33), (50, 1), (1, 33), (1, 1)])
@pytest.mark.parametrize(("size", "overlap"), [(16, 5), (64, 0), (7, 6)])
def test_tiles_are_the_windows_of_the_array(
    tmp_path: Path,
    write_raster: Write,
    pixels: Pixels,
    profile: dict[str, Any],
    shape: tuple[int, int],
    size: int,
    overlap: int,
) -> None:
    """Striped and tiled files, one pixel wide and high ones; tiles of blocks do not fall together with ours."""
    array = pixels(3, *shape)
    array[:, ::5, ::3] = 0
    path = write_raster(tmp_path / "a.tif", array, nodata=0, **profile)
    grid = TileGrid(*shape, size, overlap)
    with Scene.open(path, bands_needed=3) as scene:
        assert (scene.height, scene.width) == shape
        found = list(scene.tiles(grid))
    assert [tile for tile, _ in found] == list(grid)
    for tile, (values, valid) in found:
        window = array[:, tile.row : tile.row + tile.height, tile.col : tile.col + tile.width]
        assert np.array_equal(values, window)
        assert np.array_equal(valid, window.any(0))


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 40), st.data())
def test_each_row_is_read_exactly_once(
    write_raster: Write,
    tmp_path_factory: pytest.TempPathFactory,
    height: int,
    width: int,
    size: int,
    data: st.DataObject,
) -> None:
    class Watched(Scene):
        def rows(self, start: int, stop: int) -> Any:
            read.extend(range(start, stop))
            return super().rows(start, stop)

    read: list[int] = []
    path = write_raster(tmp_path_factory.getbasetemp() / "once.tif", np.ones((1, height, width), np.uint8))
    with Watched(path, bands_needed=1) as scene:
        for _ in scene.tiles(TileGrid(height, width, size, data.draw(st.integers(0, size - 1)))):
            pass
    assert read == list(range(height))


def test_what_is_read_lies_twice_in_memory_at_most(tmp_path: Path, write_raster: Write) -> None:
    """As GDAL gives it, and among the rows that tiles are cut from; no third copy is made on the way.

    A plane for each band and one for what is valid, twice, and one more of what is valid in passing.
    """
    height, width = 256, 4096
    path = write_raster(tmp_path / "a.tif", np.ones((3, 4 * height, width), np.uint8))
    with Scene.open(path, bands_needed=3, value_range=BYTE) as scene:
        tracemalloc.start()
        for _ in scene.tiles(TileGrid(scene.height, width, height, height // 4)):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 9.5 * height * width + 2 * 4 * height * height  # and two tiles


def test_tiles_do_not_share_memory(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    """A batch holds several at once, while the next are read."""
    array = pixels(1, 40, 40)
    with Scene.open(write_raster(tmp_path / "a.tif", array), bands_needed=1) as scene:
        found = list(scene.tiles(TileGrid(40, 40, 16, 8)))
    for index, (_, (values, valid)) in enumerate(found):
        for _, other in found[index + 1 :]:
            assert not np.shares_memory(values, other.values)
            assert not np.shares_memory(valid, other.valid)


# The process around


def test_scenes_may_be_closed_in_any_order(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    path = write_raster(tmp_path / "a.tif", pixels(3, 4, 4))
    first, second = Scene.open(path, bands_needed=3), Scene.open(path, bands_needed=3)
    first.close()
    assert second.rows(0, 4).valid.all()
    second.close()


def test_a_scene_may_be_closed_by_another_thread(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    scene = Scene.open(write_raster(tmp_path / "a.tif", pixels(3, 4, 4)), bands_needed=3)
    failed = []

    def close() -> None:
        try:
            scene.close()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert failed == []


@pytest.fixture
def block_cache() -> Iterator[Callable[[], int]]:
    """Asks for the bytes of GDAL's block cache, which belongs to the whole process. It starts at 50 MB."""
    before = get_gdal_config("GDAL_CACHEMAX")
    set_gdal_config("GDAL_CACHEMAX", 50_000_000)
    yield lambda: int(get_gdal_config("GDAL_CACHEMAX"))
    set_gdal_config("GDAL_CACHEMAX", before)


def test_a_closed_scene_leaves_the_settings_of_gdal_as_they_were(
    tmp_path: Path, write_raster: Write, pixels: Pixels, block_cache: Callable[[], int]
) -> None:
    """A small block cache is right for a scene, and slow for whatever else the process does afterwards."""
    with Scene.open(write_raster(tmp_path / "a.tif", pixels(3, 4, 4)), bands_needed=3):
        pass
    assert block_cache() == 50_000_000


def test_a_scene_that_cannot_be_opened_leaves_the_settings_of_gdal_as_they_were(
    tmp_path: Path, write_raster: Write, pixels: Pixels, block_cache: Callable[[], int]
) -> None:
    path = write_raster(tmp_path / "a.tif", pixels(3, 4, 4))
    with pytest.raises(UsageError, match="value range"):
        Scene.open(path, bands_needed=3, scale=Scale(0, 1))
    assert block_cache() == 50_000_000


def test_threads_that_read_at_the_same_time_leave_the_process_as_it_was(block_cache: Callable[[], int]) -> None:
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    filters = list(warnings.filters)

    def read(cache: int, inside: threading.Event, goes_on: threading.Event) -> None:
        with reading("a scene", GDAL_CACHEMAX=cache):
            inside.set()
            assert goes_on.wait(10)
            warnings.warn("a mask beside a nodata value", NodataShadowWarning, stacklevel=1)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, 10_000_000, first_in, second_in)
        assert first_in.wait(10)
        second = pool.submit(read, 20_000_000, second_in, first_out)
        first.result()
        first_out.set()
        second.result()
    assert block_cache() == 50_000_000
    assert list(warnings.filters) == filters


# Areas


def areas(tmp_path: Path, write_raster: Write, **profile: Any) -> np.ndarray | None:
    path = write_raster(tmp_path / "a.tif", np.zeros((1, 10, 4), np.uint8), **profile)
    with Scene.open(path, bands_needed=1) as scene:
        return scene.row_areas_m2()


def test_pixels_of_a_projected_system_have_the_transforms_area(tmp_path: Path, write_raster: Write) -> None:
    """UTM in its middle: within the 0.1 % that the projection itself is off."""
    found = areas(tmp_path, write_raster, crs="EPSG:32618", transform=Affine(0.5, 0, 500_000, 0, -0.25, 4_600_000))
    assert found is not None
    assert found.shape == (10,)
    np.testing.assert_allclose(found, 0.125, rtol=1e-3)


def test_a_rotated_pixel_has_the_area_of_its_parallelogram(tmp_path: Path, write_raster: Write) -> None:
    found = areas(tmp_path, write_raster, crs="EPSG:32618", transform=Affine(3, 4, 500_000, 4, -3, 4_600_000))
    np.testing.assert_allclose(found, 25.0, rtol=1e-3)


def test_feet_become_metres(tmp_path: Path, write_raster: Write) -> None:
    """EPSG:2263, New York, in US survey feet of 0.3048006 m."""
    found = areas(tmp_path, write_raster, crs="EPSG:2263", transform=Affine(2, 0, 1_000_000, 0, -2, 200_000))
    np.testing.assert_allclose(found, 4 * 0.3048006096**2, rtol=1e-3)


@pytest.mark.parametrize(
    ("latitude", "metres_north", "metres_east"), [(0.0, 110_574.3, 111_319.5), (60.0, 111_412.3, 55_800.0)]
)
@pytest.mark.parametrize("south_up", [False, True])
def test_degrees_become_metres_on_the_ellipsoid(
    tmp_path: Path, write_raster: Write, latitude: float, metres_north: float, metres_east: float, south_up: bool
) -> None:
    """Published lengths of a degree; a pixel of one second of arc."""
    second, sign = 1 / 3600, 1 if south_up else -1
    found = areas(
        tmp_path,
        write_raster,
        crs="EPSG:4326",
        transform=Affine(second, 0, 10, 0, sign * second, latitude - sign * 5 * second),
    )
    np.testing.assert_allclose(found, metres_north * metres_east / 3600**2, rtol=1e-3)


def test_areas_in_degrees_follow_the_latitude_of_each_row(tmp_path: Path, write_raster: Write) -> None:
    """By the cosine, but for half a percent of the earth's flattening."""
    found = areas(tmp_path, write_raster, crs="EPSG:4326", transform=Affine(1, 0, 0, 0, -1, 60))
    assert found is not None
    cosines = np.cos(np.radians(59.5 - np.arange(10)))
    np.testing.assert_allclose(found / found[0], cosines / cosines[0], rtol=5e-3)


def test_a_geographic_system_in_grads_is_not_one_in_degrees(tmp_path: Path, write_raster: Write) -> None:
    """EPSG:4807 (NTF, Paris): 100 grads are 90 degrees. A hundredth of a grad is about a kilometre."""
    found = areas(tmp_path, write_raster, crs="EPSG:4807", transform=Affine(0.01, 0, 0, 0, -0.01, 0.05))
    np.testing.assert_allclose(found, 1000.0**2, rtol=0.01)


@pytest.mark.parametrize(
    ("crs", "northing"), [("EPSG:3857", 8_399_737.9), ("EPSG:3395", 8_362_698.5)], ids=["web mercator", "mercator"]
)
def test_areas_in_mercator_are_those_on_the_ground(
    tmp_path: Path, write_raster: Write, crs: str, northing: float
) -> None:
    """At 60 degrees north a square of ten metres in Mercator is one of about five on the ground."""
    found = areas(tmp_path, write_raster, crs=crs, transform=Affine(10, 0, 0, 0, -10, northing))
    np.testing.assert_allclose(found, 25.0, rtol=0.02)


@pytest.mark.parametrize(
    "profile",
    [
        {"crs": None, "transform": Affine(2, 0, 0, 0, -2, 0)},
        {"crs": "EPSG:32618", "georeferenced": False},
        {"crs": 'LOCAL_CS["site",UNIT["metre",1]]', "transform": Affine(2, 0, 0, 0, -2, 0)},
    ],
    ids=["no system", "no transform", "a local system"],
)
def test_without_a_place_on_the_ground_there_is_no_area(
    tmp_path: Path, write_raster: Write, profile: dict[str, Any]
) -> None:
    assert areas(tmp_path, write_raster, **profile) is None


# What is written on a command line


@pytest.mark.parametrize(
    ("text", "bands"),
    [
        ("1", [1]),
        ("1,2,3", [1, 2, 3]),
        ("4,1,2", [4, 1, 2]),
        (" 4, 1 ,2 ", [4, 1, 2]),
        ("nir, Red,green", ["nir", "Red", "green"]),
        ("near infrared,B04,3", ["near infrared", "B04", 3]),
    ],
)
def test_bands_are_numbers_or_names_with_commas_between(text: str, bands: list[int | str]) -> None:
    assert parse_bands(text) == bands


@pytest.mark.parametrize("text", ["", ",", "1,,2", "1,2,", "1.0,2", "1;2;3", "1 2 3", "0", "0,1,2", "-1,2"])
def test_anything_else_is_no_list_of_bands(text: str) -> None:
    with pytest.raises(UsageError, match="bands are") as caught:
        parse_bands(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("0,10000", Scale(0, 10_000)),
        ("-1.5, 2e3", Scale(-1.5, 2000)),
        ("p2,p98", Scale(2, 98, "percentiles")),
        (" p0.5 , p99.5 ", Scale(0.5, 99.5, "percentiles")),
        ("p0,p100", Scale(0, 100, "percentiles")),
    ],
)
def test_a_scale_is_two_values_or_two_percentiles(text: str, scale: Scale) -> None:
    assert parse_scale(text) == scale
    assert parse_scale(str(scale)) == scale


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "1,2,3",
        "a,b",
        "p2,98",
        "2,p98",
        "2p,98p",
        "10,0",
        "5,5",
        "nan,1",
        "0,inf",
        "p98,p2",
        "p-1,p50",
        "p1,p101",
    ],
)
def test_anything_else_is_no_scale(text: str) -> None:
    with pytest.raises(UsageError, match=r"scale|percentiles") as caught:
        parse_scale(text)
    assert repr(text) in str(caught.value)


def test_a_written_scale_keeps_its_digits() -> None:
    """It goes into the tags of the map, which must say what was done."""
    scale = Scale(1234567.0, 7654321.0)
    assert parse_scale(str(scale)) == scale


# Real scenes


def test_real_scenes_are_read_as_rasterio_reads_them(shared: Path) -> None:
    for path in sorted((shared / "data/scenes").glob("*.tif")):
        with rasterio.open(path) as dataset, Scene.open(path, bands_needed=1) as scene:
            rows = slice(dataset.height // 2, dataset.height // 2 + 64)
            values, valid = scene.rows(rows.start, rows.stop)
            window = ((rows.start, rows.stop), (0, dataset.width))
            assert np.array_equal(valid, dataset.read_masks(1, window=window) > 0)
            assert np.array_equal(values[0], np.where(valid, dataset.read(1, window=window), 0))


def test_every_error_of_a_scene_is_one_of_ours(tmp_path: Path) -> None:
    """Whatever bytes stand in the file."""
    random = np.random.default_rng(0)
    for header in (b"II*\0\x08\0\0\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a"):
        path = tmp_path / "noise"
        path.write_bytes(header + random.bytes(400))
        with pytest.raises(D2LSError):
            read_all(path)


def test_a_database_of_coordinate_systems_that_is_not_found(
    tmp_path: Path, write_raster: Write, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where PROJ_LIB is that of another program."""
    path = write_raster(tmp_path / "scene.tif", pixels(3, 4, 4))

    class Missing:
        @staticmethod
        def from_epsg(code: int) -> None:
            raise CRSError("Cannot find proj.db")

    monkeypatch.setattr(datasets, "CRS", Missing)
    monkeypatch.setenv("PROJ_LIB", "/of/another")
    monkeypatch.delenv("PROJ_DATA", raising=False)
    with pytest.raises(
        RasterError, match=r"not known: Cannot find proj\.db; the environment's PROJ_LIB may be another"
    ):
        Scene.open(path, bands_needed=3)


def test_a_scene_is_given_by_its_name(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    with (
        rasterio.open(write_raster(tmp_path / "scene.tif", pixels(3, 4, 4))) as opened,
        pytest.raises(UsageError, match="given by its path or address, got DatasetReader"),
    ):
        Scene.open(opened, bands_needed=3)  # type: ignore[arg-type]
