"""Measuring a segmenter: its own predictions against the masks, image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from d2ls_infer import load_model
from d2ls_infer.datasets import LabelledImage, folder_dataset
from d2ls_infer.errors import D2LSError, UsageError
from d2ls_infer.evaluate import evaluate
from d2ls_infer.labels import LabelMap
from d2ls_infer.segmenter import D2LSSegmenter

MakeFolder = Callable[..., Path]

SHAPES = {"a": (40, 50), "b": (64, 33)}
CLASSES = 4


@pytest.fixture(scope="module")
def segmenter(tiny_weights: Path) -> D2LSSegmenter:
    return load_model(tiny_weights, device="cpu", precision="float32")


@pytest.fixture
def make_folder(tmp_path: Path, write_raster: Callable[..., Path]) -> MakeFolder:
    """Two images with their masks; a change replaces the mask or image of one of them."""

    def make(*, bands: int = 3, **changes: np.ndarray) -> Path:
        rng = np.random.default_rng(0)
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir()
        for name, shape in SHAPES.items():
            image = rng.integers(0, 256, (bands, *shape), dtype=np.uint8)
            mask = rng.choice([*range(CLASSES), 255], shape).astype(np.uint8)[None]
            write_raster(tmp_path / "images" / f"{name}.tif", changes.get(f"image_{name}", image))
            write_raster(tmp_path / "masks" / f"{name}.tif", changes.get(f"mask_{name}", mask))
        return tmp_path

    return make


def pairs_of(root: Path) -> list[LabelledImage]:
    return folder_dataset(LabelMap.of("abcd")).images(root, "all")


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def counted_by_hand(segmenter: D2LSSegmenter, pairs: list[LabelledImage], **options: Any) -> np.ndarray:
    counts = np.zeros((CLASSES, CLASSES + 1), int)
    for pair in pairs:
        assert pair.mask is not None
        predicted = segmenter.predict(read(pair.image)[:3], **options)
        for truth, value in zip(read(pair.mask)[0].ravel(), predicted.ravel(), strict=True):
            if truth != 255:
                counts[truth, min(value, CLASSES)] += 1
    return counts


@pytest.mark.parametrize("options", [{}, {"tile_size": 32, "overlap": 8}])
def test_matrix_is_that_of_the_predictions(
    segmenter: D2LSSegmenter, make_folder: MakeFolder, options: dict[str, Any]
) -> None:
    pairs = pairs_of(make_folder())
    counts = counted_by_hand(segmenter, pairs, **options)
    assert (counts.sum(0)[:CLASSES] > 0).sum() >= 2, "a network that says one thing would show little"
    evaluation = evaluate(segmenter, pairs, **options)
    np.testing.assert_array_equal(evaluation.full.counts, counts)
    assert evaluation.names == ("a", "b")
    assert evaluation.eroded is None


def test_first_bands_of_an_image_are_used(segmenter: D2LSSegmenter, make_folder: MakeFolder) -> None:
    pairs = pairs_of(make_folder(bands=4))
    np.testing.assert_array_equal(evaluate(segmenter, pairs).full.counts, counted_by_hand(segmenter, pairs))


def test_progress_is_told_after_each_image_with_its_map(segmenter: D2LSSegmenter, make_folder: MakeFolder) -> None:
    told: list[tuple[str, tuple[int, ...]]] = []
    evaluate(segmenter, pairs_of(make_folder()), progress=lambda name, labels: told.append((name, labels.shape)))
    assert told == list(SHAPES.items())


def test_pixels_without_finite_values_count_as_errors(segmenter: D2LSSegmenter, make_folder: MakeFolder) -> None:
    image = np.full((3, 40, 50), 100, np.float32)
    image[:, :10] = np.nan
    root = make_folder(image_a=image, mask_a=np.ones((1, 40, 50), np.uint8))
    counts = evaluate(segmenter, pairs_of(root)[:1]).full.counts
    assert counts[1, CLASSES] == 10 * 50
    assert counts.sum() == 40 * 50


def test_eroded_labels_are_counted_apart(segmenter: D2LSSegmenter, make_folder: MakeFolder) -> None:
    first, second = pairs_of(make_folder())
    evaluation = evaluate(segmenter, [replace(second, name=first.name, eroded=second.mask), second])
    assert evaluation.eroded is not None
    np.testing.assert_array_equal(evaluation.eroded.counts, counted_by_hand(segmenter, [second]))
    np.testing.assert_array_equal(evaluation.full.counts, 2 * evaluation.eroded.counts)


def test_image_without_labels_is_mapped_but_not_counted(segmenter: D2LSSegmenter, make_folder: MakeFolder) -> None:
    first, second = pairs_of(make_folder())
    evaluation = evaluate(segmenter, [replace(first, mask=None), second])
    np.testing.assert_array_equal(evaluation.full.counts, counted_by_hand(segmenter, [second]))
    assert evaluation.names == ("a", "b")


def test_classes_are_matched_by_name(segmenter: D2LSSegmenter, make_folder: MakeFolder) -> None:
    pairs = pairs_of(make_folder())
    order = [2, 0, 3, 1]
    labels = LabelMap.of([segmenter.labels.names[index].upper() for index in order])
    counts = evaluate(segmenter, pairs, labels=labels).full.counts
    # Here the masks' values mean other classes, and only the predictions change their numbers.
    np.testing.assert_array_equal(counts[:, :CLASSES], counted_by_hand(segmenter, pairs)[:, order])


def test_other_classes_than_the_models_are_refused(segmenter: D2LSSegmenter, make_folder: MakeFolder) -> None:
    with pytest.raises(UsageError, match=r"the model knows water, .*the labels hold a, b, c, d"):
        evaluate(segmenter, pairs_of(make_folder()), labels=LabelMap.of(["a", "b", "c", "d"]))


def test_unlabelled_pixels_are_ignored_whatever_the_labels_ignore_index(
    segmenter: D2LSSegmenter, make_folder: MakeFolder
) -> None:
    # Masks are read with 255 for "not labelled"; the ignore index of the labels belongs to the training data.
    pairs = pairs_of(make_folder())
    labels = LabelMap(segmenter.labels.names, segmenter.labels.colors, ignore_index=254)
    counts = evaluate(segmenter, pairs, labels=labels).full.counts
    np.testing.assert_array_equal(counts, counted_by_hand(segmenter, pairs))


def test_worst_parts_come_first_and_hold_what_was_compared(segmenter: D2LSSegmenter, make_folder: MakeFolder) -> None:
    pairs = pairs_of(make_folder())
    worst = evaluate(segmenter, pairs).worst
    assert sorted(example.name for example in worst) == ["a", "b"]
    assert worst[0].accuracy <= worst[1].accuracy
    for example in worst:
        pair = next(pair for pair in pairs if pair.name == example.name)
        assert pair.mask is not None
        np.testing.assert_array_equal(example.pixels, read(pair.image))
        np.testing.assert_array_equal(example.truth, read(pair.mask)[0])
        right = (example.truth == example.predicted)[example.truth != 255].mean()
        assert example.accuracy == pytest.approx(right)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_b": np.full((1, 64, 33), 7, np.uint8)}, r"\bb\b.*\b7\b"),
        ({"mask_b": np.zeros((1, 33, 64), np.uint8)}, r"\bb\b.*\(33, 64\)"),
        ({"image_b": np.zeros((2, 64, 33), np.uint8)}, r"\bb\b.*2 bands|\bb\b.*no band 'blue'"),
        ({"mask_b": np.zeros((3, 64, 33), np.uint8)}, r"\bb\b.*\bband"),
    ],
    ids=["values", "shape", "bands", "a colour picture"],
)
def test_image_or_mask_that_does_not_fit_is_named(
    segmenter: D2LSSegmenter, make_folder: MakeFolder, changes: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(segmenter, pairs_of(make_folder(**changes)))


def test_file_that_is_no_raster_is_named(segmenter: D2LSSegmenter, make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "images" / "b.tif").write_text("no raster")
    with pytest.raises(D2LSError, match=r"b\.tif"):
        evaluate(segmenter, pairs_of(root))
