"""Arrays of xarray: the same labels as of the values themselves, lazily, whatever the chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
import xarray as xr
from cluster_toys import Touchy

from d2ls_infer import load_model, predict_dataarray
from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.segmenter import predict_array

Pixels = Callable[..., np.ndarray]


@pytest.fixture
def array(pixels: Pixels) -> xr.DataArray:
    """Three bands of 150 x 70 float32 with holes, in odd chunks, with a place on the ground."""
    values = pixels(3, 150, 70).astype(np.float32)
    values[:, 40:60, 5:30] = np.nan
    values[1, 149, 69] = np.inf
    return xr.DataArray(
        dask.array.from_array(values, chunks=(1, 47, 33)),
        dims=("band", "y", "x"),
        coords={
            "band": ["red", "green", "blue"], "y": 4_600_000 - 2.0 * np.arange(150), "x": 500_000 + 2.0 * np.arange(70),
            "spatial_ref": xr.DataArray(0, attrs={"crs_wkt": "EPSG:32618"}), "time": np.datetime64("2026-11-20", "ns"),
        },
        attrs={"grid_mapping": "spatial_ref"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("chunk_rows", "options"),
    [
        (None, {}), (1, {"overlap": 8}), (50, {"overlap": 8, "batch_size": 5}), (24, {"overlap": 0}),
        (100, {"blend": "none", "batch_size": 100}),
    ],
)  # fmt: skip
def test_labels_are_those_of_the_values(array: xr.DataArray, chunk_rows: int | None, options: dict[str, Any]) -> None:
    expected = predict_array(Touchy(), array.values, tile_size=32, **options)
    labels = predict_dataarray(Touchy(), array, tile_size=32, chunk_rows=chunk_rows, **options)
    assert isinstance(labels, xr.DataArray)
    assert (labels.dtype, labels.dims, labels.shape) == (np.uint8, ("y", "x"), (150, 70))
    np.testing.assert_array_equal(labels.values, expected)
    assert (labels.values[40:60, 5:30] == 255).all()
    assert len(labels.chunks[0]) == (6 if chunk_rows == 1 else len(labels.chunks[0]))


def test_bands_are_found_by_their_names(array: xr.DataArray) -> None:
    expected = predict_dataarray(Touchy(), array, tile_size=32).values
    more = xr.concat([array[::-1], array[:1].assign_coords(band=["near infrared"])], "band")
    np.testing.assert_array_equal(predict_dataarray(Touchy(), more, tile_size=32), expected)
    infrared = Touchy()
    infrared.bands = ("red", "green", "near infrared")
    named = array.assign_coords(band=["R", "Green", "nir"])
    np.testing.assert_array_equal(predict_dataarray(infrared, named[::-1], tile_size=32), expected)
    plain = predict_dataarray(Touchy(), array[::-1].assign_coords(band=[1, 2, 3]), tile_size=32)
    assert (plain.values != expected).any()


def test_bands_called_by_a_sensors_numbers_are_told(array: xr.DataArray, caplog: pytest.LogCaptureFixture) -> None:
    predict_dataarray(Touchy(), array.assign_coords(band=["B04", "B03", "B02"]))
    assert "bands are called B04, B03, B02, which mean another thing with each sensor; they are taken as" in caplog.text
    caplog.clear()
    for names in ([1, 2, 3], ["x", "y", "z"]):
        predict_dataarray(Touchy(), array.assign_coords(band=names))
    assert caplog.messages == []


@pytest.mark.parametrize("attribute", ["_FillValue", "nodata"])
def test_nodata_of_the_array_is_nodata_of_the_map(array: xr.DataArray, attribute: str) -> None:
    array = array.fillna(7)
    array[:, 5:9, 2:] = array[0, 60:70, 3:4] = 3
    array.attrs[attribute] = 3
    labels = predict_dataarray(Touchy(), array, tile_size=32).values
    assert (labels[5:9, 2:] == 255).all()
    assert (labels == 255).sum() == 4 * 68 + 1  # and the infinite one
    array.attrs[attribute] = "none"
    assert (predict_dataarray(Touchy(), array, tile_size=32).values == 255).sum() == 1


@pytest.mark.parametrize("nodata", [-9999.9, -3.4e38, -1e30, np.float32(0.1), 0.1])
def test_nodata_is_meant_as_the_array_holds_it(array: xr.DataArray, nodata: float) -> None:
    """A float32 holds none of these numbers of Python's, but the next one to it."""
    array = array.fillna(7)
    array[:, 5:9] = np.float32(nodata)
    array.attrs["_FillValue"] = nodata
    labels = predict_dataarray(Touchy(), array, tile_size=32).values
    assert (labels[5:9] == 255).all()
    assert (labels == 255).sum() == 4 * 70 + 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_what_nodata_is_does_not_matter(array: xr.DataArray, tiny_weights: Path, dtype: type) -> None:
    array = array.fillna(7).where(np.isfinite(array), 7)
    labels = []
    for nodata in (0, 200):
        changed = array.clip(1, 199).astype(dtype)
        changed[:, 50:, :30] = nodata
        changed.attrs["nodata"] = nodata
        labels.append(predict_dataarray(tiny_weights, changed, tile_size=64).values)
    assert (labels[0][50:, :30] == 255).all()
    np.testing.assert_array_equal(*labels)


def test_values_on_another_range_are_told_once(
    array: xr.DataArray, tiny_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    predict_dataarray(tiny_weights, array, tile_size=32, chunk_rows=20).compute()
    assert caplog.messages == []
    lazily = predict_dataarray(tiny_weights, array / 255, tile_size=32, chunk_rows=20)
    assert caplog.messages == []
    lazily.compute()
    (told,) = caplog.messages
    assert "the model's range 0 to 255" in told


def test_it_lies_where_the_array_does(array: xr.DataArray) -> None:
    labels = predict_dataarray(Touchy(), array, tile_size=32)
    assert set(labels.coords) == {"y", "x", "spatial_ref", "time"}
    xr.testing.assert_identical(labels["spatial_ref"].drop_vars("time"), array["spatial_ref"].drop_vars("time"))
    assert labels.attrs == {
        "nodata": 255, "grid_mapping": "spatial_ref", "classes": ["water", "forest", "field"],
    }  # fmt: skip


def test_nothing_is_read_or_scored_before_it_is_computed(array: xr.DataArray) -> None:
    class Never(Touchy):
        def score(self, batch: Any) -> Any:
            raise AssertionError("it was scored")

    def read(block: np.ndarray) -> np.ndarray:
        raise AssertionError("it was read")

    lazy = array.copy(data=array.data.map_blocks(read, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32)))
    assert dask.is_dask_collection(predict_dataarray(Never(), lazy, tile_size=32))


def test_a_chunk_reads_only_its_own_rows(array: xr.DataArray) -> None:
    read = []

    def look(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        read.append(block_info[0]["array-location"][1])
        return block

    values = dask.array.from_array(array.values, chunks=(3, 10, 70))
    seen = array.copy(data=values.map_blocks(look, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32)))
    labels = predict_dataarray(Touchy(), seen, tile_size=32, overlap=8, chunk_rows=48)
    labels[:10].compute(scheduler="synchronous")
    assert max(stop for _, stop in read) <= 60


def test_confidence_comes_with_the_labels(array: xr.DataArray) -> None:
    found = predict_dataarray(Touchy(), array, tile_size=32, confidence=True)
    assert isinstance(found, xr.Dataset)
    np.testing.assert_array_equal(found["labels"], predict_dataarray(Touchy(), array, tile_size=32))
    assert found["confidence"].dtype == np.uint8
    assert ((found["confidence"] == 255) == (found["labels"] == 255)).all()
    known = found["confidence"].values[found["labels"].values != 255]
    assert 250 / 3 <= known.min() <= known.max() <= 250


def test_a_model_by_its_file(array: xr.DataArray, tiny_weights: Path) -> None:
    labels = predict_dataarray(tiny_weights, array, tile_size=64, device="cpu")
    np.testing.assert_array_equal(labels, load_model(tiny_weights, "cpu").predict(array.values, tile_size=64))
    assert LabelMap.of(labels.attrs["classes"]).names == load_model(tiny_weights).labels.names


def test_on_a_cluster(client: Any, array: xr.DataArray) -> None:
    lazy = predict_dataarray(Touchy(), array, tile_size=32, overlap=8, chunk_rows=24)
    on_workers = client.compute(lazy).result()
    np.testing.assert_array_equal(on_workers, predict_array(Touchy(), array.values, tile_size=32, overlap=8))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda array: array[:2], r"bands red, green, blue; got \{'band': 2, 'y': 150, 'x': 70\}"),
        (lambda array: array.assign_coords(band=["red", "nir", "blue"]), "the array's are named red, nir, blue"),
        (lambda array: array[0], "dimensions"),
        (lambda array: array.astype(complex), "whole or real numbers"),
        (lambda array: array.values, "a DataArray of xarray is wanted, got a ndarray"),
        (lambda array: array.to_dataset(name="scene"), "got a Dataset"),
    ],
)
def test_what_the_model_does_not_take(array: xr.DataArray, change: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        predict_dataarray(Touchy(), change(array))


def test_options_that_make_no_sense(array: xr.DataArray) -> None:
    with pytest.raises(UsageError, match="unknown blending window 'round'"):
        predict_dataarray(Touchy(), array, blend="round")
    with pytest.raises(UsageError, match="at least 1 row, got 0"):
        predict_dataarray(Touchy(), array, chunk_rows=0)


def test_the_dictionary_is_that_of_the_whole_array(tiny_weights: Path) -> None:
    values = np.random.default_rng(5).integers(0, 255, (3, 200, 300), np.uint8)
    array = xr.DataArray(dask.array.from_array(values, chunks=(3, 100, 100)), dims=("band", "y", "x"))
    options: dict[str, Any] = {"tile_size": 96, "overlap": 32}
    model = load_model(tiny_weights, device="cpu", precision="float32")
    scene = predict_dataarray(model, array, chunk_rows=50, dictionary="scene", **options)
    np.testing.assert_array_equal(scene.values, predict_array(model, values, dictionary="scene", **options))
    assert (scene.values != predict_array(model, values, dictionary="tile", **options)).any()


def test_a_model_by_its_name_is_smoothed_unless_told(tiny_weights: Path) -> None:
    values = np.random.default_rng(6).integers(0, 255, (3, 60, 70), np.uint8)
    array = xr.DataArray(dask.array.from_array(values), dims=("band", "y", "x"))
    maps = {}
    for smooth in (True, False):
        found = predict_dataarray(tiny_weights, array, device="cpu", precision="float32", smooth=smooth)
        model = load_model(tiny_weights, device="cpu", precision="float32", smooth=smooth)
        maps[smooth] = predict_array(model, values)
        np.testing.assert_array_equal(found.values, maps[smooth])
    assert (maps[True] != maps[False]).any()
