"""Finished rows in the values that are written, against the same worked out pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2ls_infer.errors import D2LSError
from d2ls_infer.labels import NODATA
from d2ls_infer.outputs import STEPS, Finished
from d2ls_infer.outputs.finished import counted
from d2ls_infer.tiling import Rows


def rows_of(classes: int = 3, height: int = 4, width: int = 5, seed: int = 0, **options: object) -> Rows:
    """Probabilities of all kinds, sure and unsure ones, with some pixels that no tile covers."""
    generator = torch.Generator().manual_seed(seed)
    scores = (6 * torch.randn((classes, height, width), generator=generator)).softmax(0)
    covered = torch.rand((height, width), generator=generator) > 0.2
    return Rows(7, scores * covered, covered, **options)  # type: ignore[arg-type]


@given(st.integers(1, 9), st.integers(0, 100))
def test_values_are_those_of_each_pixel(classes: int, seed: int) -> None:
    rows = rows_of(classes, seed=seed, disagreement=torch.rand((4, 5), generator=torch.Generator().manual_seed(seed)))
    finished = Finished(rows)
    assert rows.disagreement is not None
    for (row, col), covered in np.ndenumerate(rows.covered.numpy()):
        shares = rows.scores[:, row, col].double().numpy()
        if not covered:
            assert finished.labels[row, col] == finished.confidence[row, col] == finished.entropy[row, col] == NODATA
            assert finished.disagreement[row, col] == NODATA
            assert (finished.probabilities[:, row, col] == NODATA).all()
            continue
        assert finished.labels[row, col] == shares.argmax()
        assert finished.confidence[row, col] == pytest.approx(STEPS * shares.max(), abs=0.51)
        assert finished.probabilities[:, row, col] == pytest.approx(STEPS * shares, abs=0.51)
        entropy = -sum(p * np.log(p) for p in shares if p > 0) / np.log(max(2, classes))
        assert finished.entropy[row, col] == pytest.approx(STEPS * entropy, abs=0.51)
        assert finished.disagreement[row, col] == pytest.approx(STEPS * rows.disagreement[row, col].item(), abs=0.51)


def test_the_ends_of_the_scale() -> None:
    """A sure pixel is 1, equal probabilities have the highest entropy; neither is nodata."""
    scores = torch.tensor([[[1.0, 0.5]], [[0.0, 0.5]]])
    finished = Finished(Rows(0, scores, torch.ones((1, 2), dtype=torch.bool)))
    assert finished.confidence.tolist() == [[STEPS, STEPS // 2]]
    assert finished.entropy.tolist() == [[0, STEPS]]
    assert finished.probabilities.tolist() == [[[STEPS, STEPS // 2]], [[0, STEPS // 2]]]
    assert STEPS < NODATA


def test_confidence_is_the_probability_of_the_class_on_the_map() -> None:
    finished = Finished(rows_of(5, 20, 20))
    known = finished.labels != NODATA
    of_the_class = np.take_along_axis(finished.probabilities, np.where(known, finished.labels, 0)[None], 0)[0]
    assert np.array_equal(of_the_class[known], finished.confidence[known])


@pytest.mark.parametrize(
    "scores", [[[[2.0]], [[3.0]]], [[[0.0]], [[0.0]]], [[[-0.5]], [[1.5]]], [[[0.9]], [[0.2]]]], ids=str
)
def test_scores_that_are_no_probabilities_make_a_class_map_only(scores: list[list[list[float]]]) -> None:
    finished = Finished(Rows(0, torch.tensor(scores), torch.ones((1, 1), dtype=torch.bool)))
    assert finished.labels.shape == (1, 1)
    for kind in ("confidence", "probabilities", "entropy"):
        with pytest.raises(D2LSError, match=r"no probabilities.*only a class map"):
            getattr(finished, kind)


def test_half_precision_probabilities_are_probabilities() -> None:
    rows = rows_of(9, 30, 30)
    finished = Finished(rows._replace(scores=rows.scores.bfloat16().float()))
    assert finished.confidence.max() <= NODATA


def test_rows_without_a_valid_pixel() -> None:
    nothing = Rows(0, torch.zeros((3, 2, 2)), torch.zeros((2, 2), dtype=torch.bool))
    assert (Finished(nothing).confidence == NODATA).all()


@given(st.integers(1, 9), st.integers(0, 100))
def test_labels_are_counted_row_by_row(classes: int, seed: int) -> None:
    """Whether scores are there or labels alone, and in either way of counting."""
    finished = Finished(rows_of(classes, seed=seed))
    expected = [[int((row == index).sum()) for index in range(classes)] for row in finished.labels]
    assert finished.class_counts(classes).tolist() == expected
    assert Finished.of(7, finished.values()).class_counts(classes).tolist() == expected
    assert counted(finished.classes, classes).tolist() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_values_and_counts_are_the_same() -> None:
    rows = rows_of(5, 40, 50)
    there = Finished(rows._replace(scores=rows.scores.cuda(), covered=rows.covered.cuda()))
    here = Finished(rows)
    assert np.array_equal(there.class_counts(5), here.class_counts(5))
    for kind in ("labels", "confidence", "probabilities"):
        assert np.array_equal(getattr(there, kind), getattr(here, kind))
