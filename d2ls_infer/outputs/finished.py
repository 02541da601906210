"""Finished rows of a scene, in the values that are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from d2ls_infer.errors import D2LSError
from d2ls_infer.labels import NODATA
from d2ls_infer.segmenter import best_classes
from d2ls_infer.tiling import Rows

STEPS = 250
"""A share of 1 as it is written: whole numbers 0..250, so that a step is 0.4 % and 255 is free for nodata."""

SUM_TOLERANCE = 0.02
"""How far the scores of a pixel may sum up to another number than 1; half precision rounds each to a thousandth."""


VALUES = ("labels", "confidence", "probabilities", "entropy", "disagreement")
"""What can be asked of finished rows."""


class Finished:
    """Rows of a scene that no later tile touches: what any output may want of them, worked out once, when asked for.

    All are uint8 with 255 where the scene has no data. labels (rows, width): the class of the highest score. Shares of
    1 in steps of 1/250: confidence (rows, width), the probability of that class; probabilities (K, rows, width);
    entropy (rows, width), of the probabilities, where 1 is that of K equal ones; disagreement (rows, width), see
    `BandBlender`. All but the labels raise D2LSError for scores that are no probabilities.
    """

    def __init__(self, rows: Rows) -> None:
        self.first, self.rows = rows.first, rows

    @classmethod
    def of(cls, first: int, values: Mapping[str, np.ndarray]) -> Finished:
        """What was worked out of rows by an earlier run, by name. They have no scores: nothing else can be asked."""
        finished = cls.__new__(cls)
        finished.first = first
        vars(finished).update(values)
        return finished

    def values(self) -> dict[str, np.ndarray]:
        """What was asked for so far, by name; the labels always."""
        assert self.labels is not None
        return {name: value for name, value in vars(self).items() if name in VALUES}

    @cached_property
    def classes(self) -> Tensor:
        """The labels, where the scores are."""
        return best_classes(self.rows.scores, self.rows.covered)

    @cached_property
    def labels(self) -> np.ndarray:
        labels: np.ndarray = self.classes.cpu().numpy()
        return labels

    def class_counts(self, classes: int) -> np.ndarray:
        """(rows, classes): how many pixels of each row have each label."""
        if "rows" in vars(self) and self.classes.device.type != "cpu":
            counts: np.ndarray = counted(self.classes, classes).cpu().numpy()
            return counts
        return np.stack([np.bincount(row, minlength=256)[:classes] for row in self.labels])

    @cached_property
    def confidence(self) -> np.ndarray:
        return self.steps(self.shares.amax(0))

    @cached_property
    def probabilities(self) -> np.ndarray:
        return self.steps(self.shares)

    @cached_property
    def entropy(self) -> np.ndarray:
        shares = self.shares.clamp(1e-12, 1)
        return self.steps(-(shares * shares.log()).sum(0) / math.log(max(2, len(shares))))

    @cached_property
    def disagreement(self) -> np.ndarray:
        assert self.rows.disagreement is not None, "it was not asked for"
        assert self.shares is not None
        return self.steps(self.rows.disagreement)

    @cached_property
    def shares(self) -> Tensor:
        """The scores (K, rows, width), once it is sure that they are probabilities."""
        assert self.labels is not None  # the scores are finite
        scores, covered = self.rows.scores, self.rows.covered
        sums = scores.sum(0)[covered]
        if len(sums) and not (abs(sums - 1).max() <= SUM_TOLERANCE and scores.min() >= -SUM_TOLERANCE):
            raise D2LSError(
                "the model's scores are no probabilities: those of a pixel "
                f"sum up to {sums.min():.3g} to {sums.max():.3g}, the lowest score is {scores.min():.3g}; "
                "only a class map can be made of them"
            )
        return scores

    def steps(self, shares: Tensor) -> np.ndarray:
        """(..., rows, width) 0..1 -> uint8 in steps, 255 where no tile was."""
        values = (shares * STEPS).round().clamp(0, STEPS).byte().where(self.rows.covered, NODATA)
        array: np.ndarray = values.cpu().numpy()
        return array


def counted(labels: Tensor, classes: int) -> Tensor:
    """Labels (rows, width) uint8 -> (rows, classes) int64, how many pixels of each row have each; the way of a GPU."""
    return torch.stack([(labels == index).sum(1) for index in range(classes)], 1)
