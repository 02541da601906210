"""Reports of an evaluation: what the JSON says is what was counted, and the page needs nothing outside itself."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from d2ls_infer.datasets import DATASETS, find_dataset
from d2ls_infer.evaluate import Evaluation, Example
from d2ls_infer.metrics import BoundaryIoU, ConfusionMatrix
from d2ls_infer.report import PAPER, percent, render, summarise, view

POTSDAM = find_dataset("potsdam")
ABOUT = {"model": "toy", "sha256": "ab" * 32, "split": "test", "protocol": "tiles of 512 px"}


def evaluation(*, eroded: bool = True) -> Evaluation:
    """Two images of 4 x 4 pixels; in the first one pixel of six is wrong, in the second none."""
    labels = POTSDAM.labels
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 5, 255], [2, 2, 5, 255]], np.uint8)
    wrong = truth.copy()
    wrong[0, 0] = 1
    full, boundary = ConfusionMatrix(labels), BoundaryIoU(labels, 1)
    for predicted in (wrong, truth):
        full.add(truth, predicted)
        boundary.add(truth, predicted)
    pixels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    worst = (
        Example(13 / 14, "<b>one</b>", 0, 0, pixels, truth, wrong),
        Example(1.0, "two", 0, 0, pixels, truth, truth),
    )
    return Evaluation(labels, ("<b>one</b>", "two"), full, full if eroded else None, boundary, worst)


def test_the_summary_holds_what_was_counted() -> None:
    report = summarise(evaluation(), POTSDAM, ABOUT)
    full = report["full"]
    assert full["overall_accuracy"] == pytest.approx(100 * 27 / 28, abs=0.01)
    # class 0: 7 of 8 found, none wrongly; class 1: all 8 found, one wrongly
    assert full["IoU"][:3] == [87.5, pytest.approx(100 * 8 / 9, abs=0.01), 100.0]
    assert full["F1"][:2] == [pytest.approx(100 * 14 / 15, abs=0.01), pytest.approx(100 * 16 / 17, abs=0.01)]
    assert full["IoU"][3] is None, "a class that does not occur has no score"
    assert full["mIoU"] == pytest.approx((87.5 + 800 / 9 + 100) / 3, abs=0.01), "clutter stays out of the mean"
    assert full["mIoU_all_classes"] == pytest.approx((87.5 + 800 / 9 + 100 + 100) / 4, abs=0.01)
    assert report["left_out_of_means"] == ["clutter"]
    assert np.sum(full["confusion"]) == 28


def test_the_summary_is_json_without_nan() -> None:
    text = json.dumps(summarise(evaluation(), POTSDAM, ABOUT), allow_nan=False)
    assert json.loads(text)["about"]["images"] == 2


def test_the_papers_numbers_are_apart_and_only_its_own() -> None:
    assert set(PAPER) <= set(DATASETS)
    assert summarise(evaluation(), POTSDAM, ABOUT)["paper"] == {"mF1": 94.7}
    for name, numbers in PAPER.items():
        classes = {key.removeprefix("IoU ") for key in numbers if key.startswith("IoU ")}
        assert classes <= set(find_dataset(name).labels.names), "the classes are called as the dataset calls them"


@pytest.mark.parametrize("eroded", [True, False])
def test_the_page_shows_scores_and_needs_nothing_outside(eroded: bool) -> None:
    result = evaluation(eroded=eroded)
    page = render(summarise(result, POTSDAM, ABOUT), result)
    assert "87.5" in page
    assert "low vegetation" in page
    assert ("eroded" in page) == eroded
    assert page.count("data:image/png;base64,") == 6, "image, truth and map of two examples"
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page


def test_names_from_files_are_escaped() -> None:
    result = evaluation()
    page = render(summarise(result, POTSDAM, ABOUT), result)
    assert "<b>one</b>" not in page
    assert "&lt;b&gt;one&lt;/b&gt;" in page


def test_percent_of_numbers_arrays_and_nan() -> None:
    assert percent(0.12345) == 12.35 or percent(0.12345) == 12.34
    assert percent(np.array([0.5, np.nan])) == [50.0, None]
    assert percent(float("nan")) is None


@pytest.mark.parametrize("bands", [1, 2, 3, 8])
def test_any_number_of_bands_makes_a_picture(bands: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 10_000, (bands, 5, 7), dtype=np.uint16)
    picture = view(pixels)
    assert (picture.shape, picture.dtype) == ((3, 5, 7), np.uint8)
    assert picture.max() == 255
    assert view(np.zeros((3, 2, 2), np.float32)).max() == 0, "a flat picture is not stretched to noise"


def test_a_pixel_that_is_no_number_does_not_darken_the_picture() -> None:
    pixels = np.linspace(0, 1, 3 * 40 * 40, dtype=np.float32).reshape(3, 40, 40)
    gap = pixels.copy()
    gap[0, 7, 9] = np.nan
    expected, found = view(pixels).astype(int), view(gap).astype(int)
    assert found[0, 7, 9] == 0
    found[0, 7, 9] = expected[0, 7, 9]
    assert np.abs(found - expected).max() <= 1
    assert not view(np.full((3, 2, 2), np.nan, np.float32)).any()
