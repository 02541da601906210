"""Confusion matrix -> overall accuracy, IoU, F1, with the conventions of the paper (Appendix B)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap


@dataclass(frozen=True)
class Scores:
    """All in 0..1. iou, f1, precision, recall: per class, NaN for a class neither in the truth nor predicted."""

    iou: np.ndarray
    f1: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    overall_accuracy: float

    def mean(self, name: str, *, without: Sequence[int] = ()) -> float:
        """The mean of "iou" or "f1" over the classes that occur, leaving out those of the given indices."""
        values = np.delete(getattr(self, name), list(without))
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


class ConfusionMatrix:
    """Counts of pixels, `counts` (N, N + 1) int64: a row per true class, a column per predicted class and one for none."""

    def __init__(self, labels: LabelMap) -> None:
        self.labels = labels
        self.counts = np.zeros((len(labels), len(labels) + 1), np.int64)

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
        self.counts += counts

    def scores(self) -> Scores:
        """The scores of everything counted so far."""
        hits, truth, predicted = np.diag(self.counts), self.counts.sum(1), self.counts[:, :-1].sum(0)
        return Scores(
            iou=divide(hits, truth + predicted - hits),
            f1=divide(2 * hits, truth + predicted),
            precision=divide(hits, predicted),
            recall=divide(hits, truth),
            overall_accuracy=float(divide(hits.sum(), self.counts.sum())),
        )


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
