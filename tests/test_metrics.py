"""Scores against counting pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.metrics import BoundaryIoU, ConfusionMatrix

LABELS = LabelMap.of(["road", "tree", "water", "car"])


def matrix_of(*pairs: tuple[object, object], labels: LabelMap = LABELS) -> ConfusionMatrix:
    matrix = ConfusionMatrix(labels)
    for truth, predicted in pairs:
        matrix.add(np.array(truth, np.uint8), np.array(predicted, np.uint8))
    return matrix


def counted_by_hand(truth: np.ndarray, predicted: np.ndarray, ignore: int) -> dict[str, list[float]]:
    """Per class: iou, f1, precision, recall, from true and false positives and negatives."""
    pixels = [(int(t), int(p)) for t, p in zip(truth.ravel(), predicted.ravel(), strict=True) if t != ignore]
    scores: dict[str, list[float]] = {"iou": [], "f1": [], "precision": [], "recall": []}
    for c in range(len(LABELS)):
        tp = sum(t == c and p == c for t, p in pixels)
        fp = sum(t != c and p == c for t, p in pixels)
        fn = sum(t == c and p != c for t, p in pixels)
        scores["iou"].append(tp / (tp + fp + fn) if tp + fp + fn else math.nan)
        scores["f1"].append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan)
        scores["precision"].append(tp / (tp + fp) if tp + fp else math.nan)
        scores["recall"].append(tp / (tp + fn) if tp + fn else math.nan)
    scores["overall_accuracy"] = [sum(t == p for t, p in pixels) / len(pixels)]
    return scores


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_counted_pixel_by_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 3, 255], (9, 11), p=rng.dirichlet(np.ones(5))).astype(np.uint8)
    predicted = np.where(rng.random((9, 11)) < 0.6, truth, rng.choice([0, 1, 2, 3, 255], (9, 11))).astype(np.uint8)
    matrix = matrix_of((truth, predicted))
    scores, expected = matrix.scores(), counted_by_hand(truth, predicted, 255)
    for name in ("iou", "f1", "precision", "recall"):
        np.testing.assert_allclose(getattr(scores, name), expected[name], err_msg=name)
    assert scores.overall_accuracy == pytest.approx(expected["overall_accuracy"][0])
    assert matrix.counts.sum() == (truth != 255).sum()


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    every = np.arange(len(LABELS))
    pairs = []
    for shape in ((31, 17), (8, 40)):
        truth = rng.choice([*every, 255], shape, p=rng.dirichlet(np.ones(5)))
        truth.flat[:8] = [*every, *every]  # scikit-learn gives 0 where we give nothing: let every class occur
        predicted = np.where(rng.random(shape) < 0.7, truth % 255, rng.choice(every, shape))
        predicted.flat[:4] = every
        pairs.append((truth, predicted))
    matrix = matrix_of(*pairs)
    scores = matrix.scores()
    t, p = (np.concatenate([pair[i][pair[0] != 255] for pair in pairs]) for i in (0, 1))
    np.testing.assert_array_equal(matrix.counts[:, :-1], sklearn.metrics.confusion_matrix(t, p, labels=every))
    assert not matrix.counts[:, -1].any()
    np.testing.assert_allclose(scores.iou, sklearn.metrics.jaccard_score(t, p, labels=every, average=None))
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(t, p, labels=every)
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.f1, f1)
    np.testing.assert_array_equal(matrix.counts.sum(1), support)
    assert scores.overall_accuracy == pytest.approx(sklearn.metrics.accuracy_score(t, p))
    assert scores.mean("iou") == pytest.approx(sklearn.metrics.jaccard_score(t, p, labels=every, average="macro"))
    assert scores.mean("f1", without=[1]) == pytest.approx(
        sklearn.metrics.f1_score(t, p, labels=[0, 2, 3], average="macro")
    )


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    scores = matrix_of(([[0, 0, 0, 1, 1, 2]], [[0, 0, 1, 1, 0, 2]])).scores()
    expected = 2 * scores.precision * scores.recall / (scores.precision + scores.recall)
    np.testing.assert_allclose(scores.f1[:3], expected[:3])


def test_pixels_of_all_images_are_counted_together() -> None:
    # The mean of the images' scores would be (1 + 0) / 2.
    matrix = matrix_of(([[0, 0, 0]], [[0, 0, 0]]), ([[0]], [[1]]))
    assert matrix.scores().recall[0] == 0.75
    assert matrix.scores().overall_accuracy == 0.75


def test_order_of_the_images_does_not_matter() -> None:
    pairs = [([[0, 1]], [[1, 1]]), ([[2, 3]], [[2, 0]]), ([[255, 3]], [[2, 3]])]
    np.testing.assert_array_equal(matrix_of(*pairs).counts, matrix_of(*pairs[::-1]).counts)


def test_ignored_pixels_count_for_nothing() -> None:
    with_ignored = matrix_of(([[0, 1, 255, 255]], [[0, 0, 1, 3]]))
    np.testing.assert_array_equal(with_ignored.counts, matrix_of(([[0, 1]], [[0, 0]])).counts)


def test_ignore_index_is_that_of_the_labels() -> None:
    labels = LabelMap(LABELS.names, LABELS.colors, ignore_index=3)
    assert matrix_of(([[0, 3, 3]], [[0, 0, 1]]), labels=labels).scores().overall_accuracy == 1.0


@pytest.mark.parametrize("none", [255, 200, 4])
def test_labelled_pixel_without_a_predicted_class_is_an_error_of_its_class_alone(none: int) -> None:
    scores = matrix_of(([[0, 0, 0, 0, 1]], [[0, 0, 0, none, 1]])).scores()
    assert scores.recall.tolist()[:2] == [0.75, 1.0]
    assert scores.iou.tolist()[:2] == [0.75, 1.0]
    assert scores.precision.tolist()[:2] == [1.0, 1.0]
    assert scores.overall_accuracy == 0.8


def test_class_that_never_occurs_has_no_score_and_no_part_in_the_mean() -> None:
    scores = matrix_of(([[0, 0, 1, 1]], [[0, 1, 1, 1]])).scores()
    assert np.isnan(scores.iou[2:]).all()
    assert np.isnan(scores.f1[2:]).all()
    assert scores.mean("iou") == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores.mean("f1") == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_class_that_is_in_the_truth_but_never_predicted_has_score_zero() -> None:
    scores = matrix_of(([[0, 1]], [[0, 0]])).scores()
    assert scores.iou.tolist()[:2] == [0.5, 0.0]
    assert scores.mean("iou") == 0.25


def test_class_that_is_predicted_but_not_in_the_truth_counts_through_the_others() -> None:
    scores = matrix_of(([[0, 0, 0, 1]], [[0, 0, 3, 1]])).scores()
    assert scores.iou[3] == 0.0
    assert scores.mean("iou") == pytest.approx((2 / 3 + 1) / 2)


def test_mean_leaves_out_the_classes_it_is_told_to() -> None:
    scores = matrix_of(([[0, 0, 1, 2, 3]], [[0, 1, 1, 2, 0]])).scores()
    assert scores.mean("iou", without=[3]) == pytest.approx(np.mean(scores.iou[:3]))
    assert scores.mean("f1", without=[0, 3]) == pytest.approx(np.mean(scores.f1[1:3]))
    assert scores.mean("iou", without=[3]) > scores.mean("iou")
    assert math.isnan(scores.mean("iou", without=range(4)))
    assert not np.isnan(scores.iou).any(), "the mean must not change the scores"


def test_nothing_counted_gives_no_scores() -> None:
    for matrix in (ConfusionMatrix(LABELS), matrix_of(([[255]], [[0]]))):
        scores = matrix.scores()
        assert math.isnan(scores.overall_accuracy)
        assert math.isnan(scores.mean("iou"))
        assert matrix.counts.shape == (4, 5)
        assert matrix.counts.sum() == 0


def test_strange_values_of_a_mask_are_named() -> None:
    with pytest.raises(UsageError, match=r"\[4, 200\], which are neither classes \(0 to 3\) nor ignored"):
        matrix_of(([[0, 4, 200, 255, 4]], [[0, 0, 0, 0, 0]]))


def test_mask_with_strange_values_is_not_counted() -> None:
    matrix = matrix_of(([[0]], [[0]]))
    with pytest.raises(UsageError):
        matrix.add(np.array([[1, 9]]), np.array([[1, 1]]))
    assert matrix.counts.sum() == 1


def test_pair_of_different_shapes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\(2, 3\), but a prediction of shape \(3, 2\)"):
        ConfusionMatrix(LABELS).add(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64, np.uint8])
def test_type_of_the_numbers_does_not_matter(dtype: type) -> None:
    truth, predicted = np.array([[0, 1, 255, 3]]), np.array([[0, 3, 2, 255]])
    matrix = ConfusionMatrix(LABELS)
    matrix.add(truth.astype(dtype), predicted.astype(dtype))
    np.testing.assert_array_equal(matrix.counts, matrix_of((truth, predicted)).counts)


def test_255_classes_are_counted() -> None:
    labels = LabelMap.of([f"class {index}" for index in range(255)])
    every = np.arange(255, dtype=np.uint8)[None]
    matrix = matrix_of((every, every), (every, np.full_like(every, 255)), labels=labels)
    assert (np.diag(matrix.counts) == 1).all()
    assert (matrix.counts[:, 255] == 1).all()


# Bootstrap


def test_interval_of_equal_images_is_their_score() -> None:
    matrix = matrix_of(*[([[0, 0, 1, 2]], [[0, 1, 1, 2]])] * 5)
    score = matrix.scores().mean("iou")
    assert matrix.interval("iou") == (pytest.approx(score), pytest.approx(score))


def test_interval_holds_the_score_and_repeats_itself() -> None:
    rng = np.random.default_rng(0)
    truths = rng.integers(0, 4, (12, 8, 8))
    pairs = [(truth, np.where(rng.random((8, 8)) < i / 12, truth, 0)) for i, truth in enumerate(truths)]
    matrix = matrix_of(*pairs)
    low, high = matrix.interval("f1")
    assert low < matrix.scores().mean("f1") < high
    assert matrix.interval("f1") == (low, high)
    narrow = matrix.interval("f1", share=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert matrix.interval("f1", without=[0]) != (low, high)


def test_interval_needs_two_images() -> None:
    for matrix in (ConfusionMatrix(LABELS), matrix_of(([[0, 1]], [[0, 0]]))):
        assert all(math.isnan(end) for end in matrix.interval("iou"))


def test_interval_of_images_without_a_counted_pixel_is_none() -> None:
    matrix = matrix_of(([[255]], [[0]]), ([[255]], [[1]]))
    assert all(math.isnan(end) for end in matrix.interval("iou"))


# Boundaries


def near_boundary_by_hand(mask: np.ndarray, width_px: int) -> set[tuple[int, int]]:
    """Pixels of the mask from which a pixel outside it, or the image's border, is near."""
    height, width = mask.shape
    near = set()
    for row, col in zip(*np.nonzero(mask), strict=True):
        for r in range(row - width_px, row + width_px + 1):
            for c in range(col - width_px, col + width_px + 1):
                if not (0 <= r < height and 0 <= c < width and mask[r, c]):
                    near.add((int(row), int(col)))
    return near


@pytest.mark.parametrize("width_px", [1, 3])
def test_boundary_iou_is_that_counted_pixel_by_pixel(width_px: int) -> None:
    rng = np.random.default_rng(width_px)
    pairs = []
    for shape in ((4, 3), (3, 5)):
        truth = rng.choice([0, 1, 3, 255], shape).repeat(5, 0).repeat(6, 1).astype(np.uint8)
        predicted = np.where(rng.random(truth.shape) < 0.03, 2, np.roll(truth, 2, 1) % 4).astype(np.uint8)
        pairs.append((truth, predicted))
    boundary = BoundaryIoU(LABELS, width_px)
    for truth, predicted in pairs:
        boundary.add(truth, predicted)
    for index, got in enumerate(boundary.scores()):
        shared = united = 0
        for truth, predicted in pairs:
            true = near_boundary_by_hand(truth == index, width_px)
            found = near_boundary_by_hand((predicted == index) & (truth != 255), width_px)
            shared, united = shared + len(true & found), united + len(true | found)
        assert got == pytest.approx(shared / united)


def test_boundary_iou_of_a_class_that_never_occurs_is_none() -> None:
    boundary = BoundaryIoU(LABELS)
    boundary.add(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8))
    assert boundary.scores()[0] == 1.0
    assert np.isnan(boundary.scores()[1:]).all()
