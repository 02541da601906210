"""How much of a scene each class covers, and how sure the model was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ls_infer.labels import LabelMap
from d2ls_infer.outputs.finished import STEPS, Finished
from d2ls_infer.raster import Scene

BINS = 20
"""Of a histogram of confidences."""


@dataclass(frozen=True)
class ClassArea:
    """How much of a scene one class covers.

    share: of the valid pixels (0..1). area_m2: square metres, None where the scene has no place on the ground.
    """

    name: str
    pixels: int
    share: float
    area_m2: float | None


def area_unit(areas: Sequence[ClassArea]) -> tuple[str, float]:
    """The unit in which the areas of a scene are told, and its square metres."""
    total_m2 = sum(area.area_m2 or 0 for area in areas)
    return ("km²", 1e6) if total_m2 >= 1e7 else ("ha", 1e4) if total_m2 >= 1e4 else ("m²", 1.0)


class AreaTally:
    """Adds up how much of a scene each class covers."""

    def __init__(self, scene: Scene, labels: LabelMap) -> None:
        self.names = labels.names
        self.row_areas_m2 = scene.row_areas_m2()
        self.pixels = np.zeros(len(labels), np.int64)
        self.areas_m2 = np.zeros(len(labels))

    def add(self, rows: Finished) -> None:
        """Count finished rows."""
        counts = rows.class_counts(len(self.names))
        self.pixels += counts.sum(0)  # counts: (rows, classes)
        if self.row_areas_m2 is not None:
            areas_m2 = self.row_areas_m2[rows.first : rows.first + len(counts), None] * counts
            # Row by row: the sum is the same, to the last bit, in however large parts the rows come.
            self.areas_m2 = np.add.accumulate(np.vstack([self.areas_m2, areas_m2]))[-1]

    def take(self, pixels: Sequence[int], areas_m2: Sequence[float]) -> None:
        """What another tally has added up."""
        self.pixels += np.asarray(pixels)
        self.areas_m2 = self.areas_m2 + areas_m2

    def result(self) -> tuple[ClassArea, ...]:
        valid = max(1, int(self.pixels.sum()))
        return tuple(
            ClassArea(name, int(pixels), int(pixels) / valid, None if self.row_areas_m2 is None else float(area))
            for name, pixels, area in zip(self.names, self.pixels, self.areas_m2, strict=True)
        )


class ConfidenceTally:
    """Counts the pixels of each confidence."""

    def __init__(self) -> None:
        self.counts = np.zeros(STEPS + 1, np.int64)

    def add(self, rows: Finished) -> None:
        """Count finished rows."""
        self.counts += np.bincount(rows.confidence.ravel(), minlength=256)[: STEPS + 1]

    def histogram(self) -> list[float]:
        """(BINS,) shares (0..1) of the valid pixels, of equal bins of confidence from 0 to 1; 1 is in the last."""
        edges = np.minimum(np.arange(STEPS + 1) * BINS // STEPS, BINS - 1)
        shares = np.bincount(edges, self.counts, BINS) / max(1, self.counts.sum())
        return [float(share) for share in shares]

    def mean(self) -> float:
        """The mean confidence (0..1)."""
        return float(self.counts @ np.arange(STEPS + 1) / STEPS / max(1, self.counts.sum()))
