"""Confusion matrix -> overall accuracy, IoU, F1, with the conventions of the paper (Appendix B)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap

RESAMPLES = 1000
"""Sets of images that are drawn for an interval."""


@dataclass(frozen=True)
class Scores:
    """All in 0..1, per class. iou, f1: NaN for a class neither in the truth nor predicted; recall: NaN for one not in
    the truth; precision: NaN for one never predicted.
    """

    iou: np.ndarray
    f1: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    overall_accuracy: float

    def mean(self, name: str, *, without: Sequence[int] = ()) -> float:
        """The mean of "iou" or "f1" over the classes that are in the truth, leaving out those of the given indices."""
        counted = np.isfinite(self.recall)
        counted[list(without)] = False
        values = getattr(self, name)[counted]
        return float(values.mean()) if len(values) else float("nan")


class ConfusionMatrix:
    """Counts of pixels: `counts` (N, N + 1) int64, a row per true class, a column per predicted class and one for none.

    `images` holds the same counts of each pair that was added; resampling them gives intervals.
    """

    def __init__(self, labels: LabelMap) -> None:
        self.labels = labels
        self.images: list[np.ndarray] = []

    @property
    def counts(self) -> np.ndarray:
        shape = (len(self.labels), len(self.labels) + 1)
        return np.sum(self.images, axis=0) if self.images else np.zeros(shape, np.int64)

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count a pair of (H, W) class indices. Pixels whose truth is the ignore index are left out.

        Raises UsageError for truth that holds other values than classes and the ignore index, or different shapes.
        A labelled pixel that was predicted as no class counts as an error of its class alone.
        """
        if truth.shape != predicted.shape:
            raise UsageError(f"truth of shape {truth.shape}, but a prediction of shape {predicted.shape}")
        classes = len(self.labels)
        labelled = truth != self.labels.ignore_index
        if strange := sorted(set(np.unique(truth[labelled]).tolist()) - set(range(classes))):
            raise UsageError(f"the mask holds {strange}, which are neither classes (0 to {classes - 1}) nor ignored")
        pairs = truth[labelled].astype(np.int64) * (classes + 1) + np.minimum(predicted[labelled], classes)
        counts = np.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1)
        self.images.append(counts)

    def scores(self) -> Scores:
        """The scores of everything counted so far."""
        return score_counts(self.counts)

    def interval(self, name: str, *, without: Sequence[int] = (), share: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of a mean score: its range over `RESAMPLES` sets of as many images, drawn with repetition.

        NaN for fewer than two images, over which nothing can be drawn.
        """
        if len(self.images) < 2:
            return float("nan"), float("nan")
        rng = np.random.default_rng(0)
        times = rng.multinomial(len(self.images), np.full(len(self.images), 1 / len(self.images)), RESAMPLES)
        drawn = np.tensordot(times, np.stack(self.images), axes=1)  # (RESAMPLES, N, N + 1)
        means = [score_counts(counts).mean(name, without=without) for counts in drawn]
        if not np.isfinite(means).any():
            return float("nan"), float("nan")
        low, high = np.nanquantile(means, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)


class BoundaryIoU:
    """IoU of the pixels of each class that lie within `width_px` of its boundary (Cheng et al., CVPR 2021).

    A pixel is near the boundary of its class where a square of 2 * width_px + 1 around it leaves the class; beyond the
    border of an image there is no class. Pixels with the ignore index as truth belong to no class and count nowhere.
    """

    def __init__(self, labels: LabelMap, width_px: int = 3) -> None:
        self.labels, self.width_px = labels, width_px
        self.shared = np.zeros(len(labels), np.int64)
        self.united = np.zeros(len(labels), np.int64)

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count a pair of (H, W) class indices."""
        labelled = truth != self.labels.ignore_index
        for index in range(len(self.labels)):
            true = inner_boundary(truth == index, self.width_px)
            found = inner_boundary((predicted == index) & labelled, self.width_px)
            self.shared[index] += int((true & found).sum())
            self.united[index] += int((true | found).sum())

    def scores(self) -> np.ndarray:
        """(N,) in 0..1, NaN for a class neither in the truth nor predicted."""
        return divide(self.shared, self.united)


def inner_boundary(mask: np.ndarray, width_px: int) -> np.ndarray:
    """The pixels of a (H, W) bool mask from which a step of `width_px` or less, also diagonal, leads out of it."""
    inside: np.ndarray = np.pad(mask, width_px)
    for axis in (0, 1):  # a square is eroded along one axis after the other
        windows = np.lib.stride_tricks.sliding_window_view(inside, 2 * width_px + 1, axis=axis)
        inside = np.asarray(windows.all(-1))
    return np.asarray(mask & ~inside)


def score_counts(counts: np.ndarray) -> Scores:
    """The scores of a matrix of counts (N, N + 1)."""
    hits, truth, predicted = np.diag(counts), counts.sum(1), counts[:, :-1].sum(0)
    return Scores(
        iou=divide(hits, truth + predicted - hits),
        f1=divide(2 * hits, truth + predicted),
        precision=divide(hits, predicted),
        recall=divide(hits, truth),
        overall_accuracy=float(divide(hits.sum(), counts.sum())),
    )


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
