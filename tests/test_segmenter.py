"""D2LS behind the protocol: normalisation, scores, arrays in and classes out; devices and precisions."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from d2ls_infer import D2LSSegmenter, Segmenter, load_model, predict_raster
from d2ls_infer.errors import D2LSError, UsageError
from d2ls_infer.segmenter import (
    PRECISIONS,
    TTA,
    AugmentedSegmenter,
    choose_device,
    choose_dtype,
    decide,
    predict_array,
    tiles_of,
)
from d2ls_infer.smoothing import smoothed
from d2ls_infer.tiling import TileGrid

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
ReadMap = Callable[[Path], SimpleNamespace]


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> D2LSSegmenter:
    return load_model(tiny_weights, device="cpu", precision="float32")


# The protocol


def test_d2ls_and_the_fakes_are_segmenters(model: D2LSSegmenter, fakes: SimpleNamespace) -> None:
    assert isinstance(model, Segmenter)
    assert isinstance(fakes.Constant(), Segmenter)
    assert not isinstance(object(), Segmenter)


def test_a_model_tells_what_it_is(model: D2LSSegmenter, tiny_weights: Path) -> None:
    assert model.name == "tiny"
    assert len(model.sha256) == 64
    assert model.labels.names == ("water", "forest", "field", "road")
    assert model.bands == ("red", "green", "blue")
    assert model.value_range == (0.0, 255.0)
    assert model.device == torch.device("cpu")
    assert model.tile_size == 512
    assert not model.network.training


def test_tiles_are_those_that_a_model_is_best_mapped_by(
    model: D2LSSegmenter, tiny_weights: Path, fakes: SimpleNamespace, tmp_path: Path, write_raster: Write
) -> None:
    """Whoever asks for no size has them, from a file of weights too; a segmenter that says nothing has the usual."""
    shared = replace(model.description, shared_dictionary=True)
    assert shared.tile_size == 1024
    stated = D2LSSegmenter(model.network, replace(shared, stated_tile_size=96), name="stated", sha256="")
    for segmenter, side in (
        (model, 512),
        (stated, 96),
        (fakes.Constant(), 512),
        (AugmentedSegmenter(stated, "d4"), 96),
    ):
        assert tiles_of(segmenter, 2000, 3000, None, 0.25) == TileGrid(2000, 3000, side, side // 4)
        assert tiles_of(segmenter, 2000, 3000, 64, 8) == TileGrid(2000, 3000, 64, 8)
    scene = write_raster(tmp_path / "scene.tif", np.ones((3, 200, 190), np.uint8))
    assert predict_raster(stated, scene, tmp_path / "stated.tif").tiles == 9
    with rasterio.open(tmp_path / "stated.tif") as made:
        assert json.loads(made.tags()["D2LS_OPTIONS"])["tile_size"] == 96
    with safe_open(tiny_weights, "np") as file:
        metadata = file.metadata()
    described = json.loads(metadata["d2ls"]) | {"tile_size": 160}
    save_file(load_file(tiny_weights), tmp_path / "own.safetensors", metadata | {"d2ls": json.dumps(described)})
    assert predict_raster(tmp_path / "own.safetensors", scene, tmp_path / "own.tif").tiles == 4


# Scores


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalise_is_the_formula(model: D2LSSegmenter, pixels: Pixels, dtype: torch.dtype) -> None:
    batch = torch.from_numpy(pixels(3, 9, 7, low=0, high=256))[None].to(dtype)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    found = model.normalise(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (batch.double() / 255 - mean) / std, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_normalise_goes_by_the_value_range(model: D2LSSegmenter, tiny_weights: Path) -> None:
    description = replace(model.description, value_range=(-1000.0, 9000.0))
    other = D2LSSegmenter(model.network, description, name="x", sha256="", device="cpu")
    batch = torch.tensor([-1000.0, 0.0, 4000.0, 9000.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    expected = (torch.tensor([0.0, 0.1, 0.5, 1.0]) - mean) / std
    torch.testing.assert_close(other.normalise(batch)[0], expected, rtol=1e-5, atol=1e-5)


def test_normalise_raises_to_gamma_what_the_range_made_of_the_values(model: D2LSSegmenter) -> None:
    description = replace(model.description, value_range=(-1000.0, 9000.0), gamma=0.5)
    other = D2LSSegmenter(model.network, description, name="x", sha256="", device="cpu")
    # Below the range there is no root.
    batch = torch.tensor([-1000.0, 0.0, 1500.0, 9000.0, -2000.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    expected = (torch.tensor([0.0, 0.1**0.5, 0.5, 1.0, 0.0]) - mean) / std
    torch.testing.assert_close(other.normalise(batch)[0], expected, rtol=1e-5, atol=1e-5)
    assert batch[0, 0, 0, 0] == -1000  # what was given stays as it was


@pytest.mark.parametrize("shape", [(1, 1), (1, 45), (31, 2), (32, 32), (33, 65), (100, 7)])
def test_scores_are_probabilities_at_any_size(model: D2LSSegmenter, pixels: Pixels, shape: tuple[int, int]) -> None:
    scores = model.score(torch.from_numpy(pixels(3, *shape))[None])
    assert scores.shape == (1, 4, *shape)
    assert scores.dtype == torch.float32
    assert (scores >= 0).all()
    torch.testing.assert_close(scores.sum(1), torch.ones(1, *shape))
    assert not scores.requires_grad


def test_scores_are_smoothed_unless_that_is_not_wanted(
    model: D2LSSegmenter, tiny_weights: Path, pixels: Pixels, tmp_path: Path, write_raster: Write
) -> None:
    raw = load_model(tiny_weights, device="cpu", precision="float32", smooth=False)
    assert (model.smooth, raw.smooth, AugmentedSegmenter(raw, "flip").smooth) == (True, False, False)
    batch = torch.from_numpy(pixels(3, 70, 90))[None]
    with torch.inference_mode():
        torch.testing.assert_close(raw.score(batch), raw.network(raw.normalise(batch)).softmax(1))
    torch.testing.assert_close(model.score(batch), smoothed(raw.score(batch)))
    context = model.observe(batch)
    torch.testing.assert_close(model.score(batch, context), smoothed(raw.score(batch, context)))
    assert not np.array_equal(model.predict(batch[0].numpy()), raw.predict(batch[0].numpy()))
    scene = write_raster(tmp_path / "scene.tif", pixels(3, 70, 90))
    for segmenter in (model, raw):
        with rasterio.open(predict_raster(segmenter, scene, tmp_path / f"{segmenter.smooth}.tif").output) as made:
            assert json.loads(made.tags()["D2LS_OPTIONS"])["smooth"] is segmenter.smooth


def test_scores_of_a_tile_do_not_depend_on_the_others_in_its_batch(model: D2LSSegmenter, pixels: Pixels) -> None:
    batch = torch.from_numpy(np.stack([pixels(3, 40, 50), 255 - pixels(3, 40, 50), pixels(3, 50, 40).swapaxes(1, 2)]))
    together = model.score(batch)
    for tile, scores in zip(batch, together, strict=True):
        torch.testing.assert_close(model.score(tile[None])[0], scores, rtol=1e-4, atol=1e-5)


def test_whole_and_real_numbers_of_the_same_value_score_alike(model: D2LSSegmenter, pixels: Pixels) -> None:
    batch = torch.from_numpy(pixels(3, 20, 20))[None]
    assert torch.equal(model.score(batch), model.score(batch.float()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_precision_gives_nearly_the_same_probabilities(
    model: D2LSSegmenter, tiny_weights: Path, pixels: Pixels, precision: Any
) -> None:
    batch = torch.from_numpy(pixels(3, 64, 64))[None]
    scores = load_model(tiny_weights, device="cpu", precision=precision).score(batch)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model.score(batch), rtol=0, atol=0.05)


def test_what_runs_by_a_context_is_let_go_with_it(model: D2LSSegmenter, pixels: Pixels) -> None:
    """With its graphs, on a GPU."""
    first, second = (model.observe(torch.from_numpy(pixels(3, size, size))[None]) for size in (64, 96))
    kept = weakref.ref(model.run_by(first))
    assert model.run_by(first) is kept()
    model.run_by(second)
    assert kept() is None


# Arrays


@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (60, 61)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_predict_gives_a_class_for_each_pixel(
    model: D2LSSegmenter, pixels: Pixels, shape: tuple[int, int], dtype: str
) -> None:
    found = model.predict(pixels(3, *shape, dtype), tile_size=48)
    assert found.shape == shape
    assert found.dtype == np.uint8
    assert (found < 4).all()


def test_the_tiny_model_tells_classes_apart(model: D2LSSegmenter, pixels: Pixels) -> None:
    """Or else what is said here of equal maps would be said of constants."""
    assert len(np.unique(model.predict(pixels(3, 90, 70), tile_size=48))) > 1


def test_a_pixel_that_is_no_finite_number_has_no_class(model: D2LSSegmenter, pixels: Pixels) -> None:
    array = pixels(3, 50, 40, "float32")
    array[0, 3, 4], array[1, 49, 39], array[2, 0, 0] = np.nan, np.inf, -np.inf
    found = model.predict(array, tile_size=32)
    assert np.argwhere(found == 255).tolist() == [[0, 0], [3, 4], [49, 39]]


def test_an_array_without_a_number_has_no_class(model: D2LSSegmenter) -> None:
    assert (model.predict(np.full((3, 40, 30), np.nan, np.float32), tile_size=16) == 255).all()


def test_predict_leaves_its_array_alone(model: D2LSSegmenter, pixels: Pixels) -> None:
    for dtype in ("uint8", "float32"):
        array = pixels(3, 20, 20, dtype)
        array.flags.writeable = False
        before = array.copy()
        model.predict(array)
        assert np.array_equal(array, before)


def test_views_with_any_strides_are_arrays_too(model: D2LSSegmenter, pixels: Pixels) -> None:
    """(H, W, bands) turned to (bands, H, W) is what most image readers lead to."""
    array = pixels(3, 40, 30)
    turned = np.ascontiguousarray(np.moveaxis(array, 0, -1)).transpose(2, 0, 1)
    assert np.array_equal(model.predict(turned), model.predict(array))
    assert np.array_equal(model.predict(array[:, ::-1, ::-1]), model.predict(array[:, ::-1, ::-1].copy()))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((20, 20), ["(3, height, width)", "red, green, blue", "(20, 20)"]),
        ((20, 20, 3), ["(20, 20, 3)"]),
        ((4, 20, 20), ["(4, 20, 20)"]),
        ((1, 3, 20, 20), ["(1, 3, 20, 20)"]),
        ((3, 0, 20), ["(3, 0, 20)"]),
    ],
)
def test_arrays_of_another_shape_are_refused(model: D2LSSegmenter, shape: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        model.predict(np.zeros(shape, np.uint8))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("dtype", ["complex64", "bool", "U1", "O", "datetime64[s]"])
def test_arrays_of_anything_but_numbers_are_refused(model: D2LSSegmenter, dtype: str) -> None:
    with pytest.raises(UsageError, match="whole or real numbers"):
        model.predict(np.zeros((3, 4, 4), dtype))


@pytest.mark.parametrize(
    "options",
    [{"tile_size": 0}, {"tile_size": 64, "overlap": 64}, {"overlap": "x"}, {"blend": "cosine"}, {"tile_size": "big"}],
)
def test_options_that_make_no_sense_are_refused(model: D2LSSegmenter, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        model.predict(np.zeros((3, 4, 4), np.uint8), **options)


@pytest.mark.parametrize(
    ("dtype", "high"),
    [("uint8", 250), *((dtype, high) for dtype in ("uint16", "int16", "float32", "float64") for high in (250, 1000))],
)
@pytest.mark.parametrize("blend", ["hann", "none"])
def test_predict_of_an_array_is_predict_raster_of_the_same_as_a_file(
    model: D2LSSegmenter,
    tmp_path: Path,
    write_raster: Write,
    read_map: ReadMap,
    pixels: Pixels,
    dtype: str,
    high: int,
    blend: str,
) -> None:
    """The same numbers give the same map, whichever way they come: clipped to the value range here as there."""
    array = pixels(3, 75, 62, dtype, 0, high)
    if array.dtype.kind == "f":
        array[:, 10:20, 30:] = np.nan
        array += np.float32(0.3)
    path = write_raster(tmp_path / "scene.tif", array)
    result = predict_raster(model, path, tile_size=48, overlap=11, blend=blend)
    expected = model.predict(array, tile_size=48, overlap=11, blend=blend)
    assert np.array_equal(read_map(result.output).array, expected)


def test_a_model_may_be_given_to_predict_raster_as_a_file(
    model: D2LSSegmenter, tiny_weights: Path, tmp_path: Path, write_raster: Write, read_map: ReadMap, pixels: Pixels
) -> None:
    array = pixels(3, 40, 40)
    path = write_raster(tmp_path / "scene.tif", array)
    for weights in (tiny_weights, str(tiny_weights)):
        result = predict_raster(weights, path, overwrite=True)
        assert result.output.name == "scene_d2ls-tiny.tif"
        found = read_map(result.output)
        assert np.array_equal(found.array, model.predict(array))
        assert found.tags["D2LS_WEIGHTS_SHA256"] == model.sha256


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_gives_nearly_the_same_map(model: D2LSSegmenter, tiny_weights: Path, pixels: Pixels) -> None:
    array = pixels(3, 150, 130)
    there = load_model(tiny_weights, device="auto", precision="float32")
    assert (there.predict(array, tile_size=64) == model.predict(array, tile_size=64)).mean() > 0.99


@pytest.mark.parametrize("value_range", [None, (0.0, 255.0)])
def test_any_segmenter_takes_an_array(
    fakes: SimpleNamespace, pixels: Pixels, value_range: tuple[float, float] | None
) -> None:
    """By the protocol alone: batches of whole rows of tiles, tiles without a number left out."""
    array = pixels(3, 48, 48, "float32")
    array[:, :16] = np.nan
    segmenter = fakes.PerPixel(value_range=value_range)
    found = predict_array(segmenter, array, tile_size=16, overlap=0, batch_size=4)
    assert np.array_equal(found, np.where(np.isnan(array[0]), 255, np.nan_to_num(array[0]) % 3))
    assert segmenter.batches == [3, 3]


@pytest.mark.parametrize(
    ("dtype", "values", "told"),
    [
        ("uint8", (0, 3), ""),
        ("float32", (0, 250), ""),
        ("float32", (0, 1), "the array holds float32 values from 0 to 1; they are taken on the model's range 0 to 255"),
        ("uint16", (100, 3000), "uint16 values from 100 to 3000"),
        ("int16", (-5, 200), "int16 values from -5 to 200"),
    ],
)
def test_values_of_an_array_that_are_hardly_the_models_are_told(
    model: D2LSSegmenter, caplog: pytest.LogCaptureFixture, dtype: str, values: tuple[int, int], told: str
) -> None:
    array = np.full((3, 40, 48), values[0], dtype)
    array[:, 20:] = values[1]
    array = np.ma.masked_where(np.arange(48) == 7 + 0 * array, array)
    array[:, 3, 7] = np.ma.masked
    array.data[:, 3, 7] = 9999 if dtype != "uint8" else 9
    if dtype == "float32":
        array.data[0, 2, 2] = np.nan
    before = array.data.copy(), array.mask.copy()
    model.predict(array)
    assert np.array_equal(array.data, before[0], equal_nan=dtype == "float32")
    assert np.array_equal(array.mask, before[1])
    assert told in caplog.text
    assert len(caplog.messages) == bool(told)


def test_what_is_masked_in_an_array_is_nodata(fakes: SimpleNamespace, pixels: Pixels) -> None:
    array = np.ma.MaskedArray(pixels(3, 40, 48), mask=False)
    array[:, :16] = array[:2, 20] = np.ma.masked  # all bands; two of three
    expected = np.where(np.arange(40)[:, None] < 16, 255, np.asarray(array)[0] % 3)
    assert np.array_equal(predict_array(fakes.PerPixel(), array, tile_size=16), expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_what_lies_under_a_mask_does_not_matter(model: D2LSSegmenter, pixels: Pixels, dtype: str) -> None:
    array = np.ma.MaskedArray(pixels(3, 64, 64).astype(dtype), mask=False)
    array[:, :32, :32] = np.ma.masked
    maps = []
    for value in (0, 128, 255):
        array.data[:, :32, :32] = value
        maps.append(model.predict(array))
    assert (maps[0][:32, :32] == 255).all()
    assert np.array_equal(maps[0], maps[1])
    assert np.array_equal(maps[0], maps[2])


def test_tensors_and_lists_are_arrays_too(fakes: SimpleNamespace, pixels: Pixels) -> None:
    array = pixels(3, 8, 9).astype(np.float32)
    expected = predict_array(fakes.PerPixel(), array)
    for same in (torch.from_numpy(array), array.tolist()):
        assert np.array_equal(predict_array(fakes.PerPixel(), same), expected)


# Views of each tile


@pytest.mark.parametrize("mode", ["none", "flip", "d4"])
def test_views_of_a_function_of_each_pixel_are_the_function(fakes: SimpleNamespace, pixels: Pixels, mode: str) -> None:
    """Each view is turned back by what it was turned: a pixel's scores stay its own. The tile is no square."""
    array = pixels(3, 20, 33)
    segmenter = fakes.PerPixel()
    scores = AugmentedSegmenter(segmenter, mode).score(torch.from_numpy(array)[None])
    torch.testing.assert_close(scores, segmenter.score(torch.from_numpy(array)[None]))
    assert segmenter.scored == len(TTA[mode]) + 1


@pytest.mark.parametrize("mode", TTA)
@pytest.mark.parametrize("shape", [(1, 1), (2, 31), (33, 20)])
def test_views_of_any_size_give_probabilities(
    model: D2LSSegmenter, pixels: Pixels, mode: str, shape: tuple[int, int]
) -> None:
    scores = AugmentedSegmenter(model, mode).score(torch.from_numpy(pixels(3, *shape))[None])
    assert scores.shape == (1, 4, *shape)
    torch.testing.assert_close(scores.sum(1), torch.ones(1, *shape))


def test_views_are_distinct() -> None:
    for views in TTA.values():
        assert len(set(views)) == len(views)


def test_an_augmented_segmenter_is_one_of_the_same_kind(
    model: D2LSSegmenter, tmp_path: Path, write_raster: Write, read_map: ReadMap, pixels: Pixels
) -> None:
    augmented = AugmentedSegmenter(model, "flip")
    assert isinstance(augmented, Segmenter)
    array = pixels(3, 40, 50)
    result = predict_raster(augmented, write_raster(tmp_path / "scene.tif", array), tile_size=32)
    found = read_map(result.output)
    assert found.tags["D2LS_MODEL"] == "tiny"
    assert found.tags["D2LS_WEIGHTS_SHA256"] == model.sha256
    assert np.array_equal(found.array, predict_array(augmented, array, tile_size=32))


def test_unknown_views_are_told_with_the_known(fakes: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match=r"'rotate'.*none, flip, d4, multiscale"):
        AugmentedSegmenter(fakes.Constant(), "rotate")


# Decisions


def test_the_largest_score_wins_and_what_is_not_covered_is_nodata() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.4]], [[0.7, 0.05, 0.4]], [[0.2, 0.05, 0.3]]])
    found = decide(scores[:, :, :2], torch.tensor([[True, True]]))
    assert found.dtype == np.uint8
    assert found.tolist() == [[1, 0]]
    assert decide(scores, torch.tensor([[False, True, False]])).tolist() == [[255, 0, 255]]


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_of_equal_scores_the_first_wins(classes: int, rows: int, width: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    scores = chance.choice([-1e30, -1.0, -0.0, 0.0, 0.5, 1.0], (classes, rows, width)).astype(np.float32)
    covered = chance.random((rows, width)) < 0.8
    scores[:, ~covered] = chance.choice([np.nan, np.inf, 0], scores[:, ~covered].shape)
    found = decide(torch.from_numpy(scores), torch.from_numpy(covered))
    assert np.array_equal(found, np.where(covered, scores.argmax(0), 255))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_of_no_finite_number_are_told(bad: float) -> None:
    scores, covered = torch.full((3, 2, 2), 3e38), torch.ones(2, 2, dtype=torch.bool)
    assert decide(scores, covered).tolist() == [[0, 0], [0, 0]], "not even where their sum is none"
    scores[2, 1, 0] = bad
    with pytest.raises(D2LSError, match="not finite"):
        decide(scores, covered)


def test_the_highest_class_index_fits() -> None:
    scores = torch.zeros(255, 1, 1)
    scores[254] = 1
    assert decide(scores, torch.tensor([[True]])).tolist() == [[254]]


# Devices and precisions


def test_auto_is_a_device_that_works() -> None:
    assert torch.ones(2, device=choose_device("auto")).sum().item() == 2
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "xla", "xpu:7", "meta", "hpu", "privateuseone"])
def test_a_device_that_is_not_there_is_told_with_the_way_out(name: str) -> None:
    """Meta is a device of tensors without values; hpu and privateuseone are names that torch knows without having."""
    with pytest.raises(UsageError) as caught:
        choose_device(name)
    assert f"device {name!r} is not there" in str(caught.value)
    assert "try auto or cpu" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_a_precision_is_a_type(precision: str, dtype: torch.dtype) -> None:
    assert choose_dtype(precision, torch.device("cpu")) == dtype


@pytest.mark.parametrize(
    ("capability", "dtype"), [((6, 1), torch.float32), ((7, 0), torch.float16), ((12, 0), torch.float16)]
)
def test_a_cuda_device_with_units_for_it_takes_half_precision(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype("auto", torch.device("cuda:1")) == dtype
    assert choose_dtype("bfloat16", torch.device("cuda:1")) == torch.bfloat16


@pytest.mark.parametrize("precision", ["", "half", "float64", "int8", "nn"])
def test_an_unknown_precision_is_told_with_the_known(precision: str) -> None:
    with pytest.raises(UsageError, match=r"unknown precision.*auto, float32, bfloat16, float16"):
        choose_dtype(precision, torch.device("cpu"))


def test_a_wrong_device_or_precision_is_told_by_load_model(tiny_weights: Path) -> None:
    with pytest.raises(UsageError, match="device"):
        load_model(tiny_weights, device="gpu")
    wrong: Any = "double"
    with pytest.raises(UsageError, match="precision"):
        load_model(tiny_weights, precision=wrong)
