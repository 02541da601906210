"""Predict labelled images and compare: the same tiler as for scenes, the pixels of all images counted together."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from d2ls_infer.datasets import LabelledImage
from d2ls_infer.errors import UsageError
from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.metrics import BoundaryIoU, ConfusionMatrix
from d2ls_infer.segmenter import Segmenter, predict_array

EXAMPLE_SIDE = 512
EXAMPLES = 6


@dataclass(frozen=True, order=True)
class Example:
    """A part of an image, at most 512 pixels high and wide, and how much of it is right (0..1 of its labelled pixels).

    pixels: (bands, h, w) raw values; truth and predicted: (h, w) class indices, 255 = none.
    """

    accuracy: float
    name: str
    row: int
    col: int
    pixels: np.ndarray = field(compare=False)
    truth: np.ndarray = field(compare=False)
    predicted: np.ndarray = field(compare=False)


@dataclass(frozen=True)
class Evaluation:
    """What was measured over a set of labelled images.

    full: against all labels; eroded: against those without class boundaries, None where the set has none. boundary:
    IoU near class boundaries. worst: the parts with the lowest accuracy, lowest first.
    """

    labels: LabelMap
    names: tuple[str, ...]
    full: ConfusionMatrix
    eroded: ConfusionMatrix | None
    boundary: BoundaryIoU
    worst: tuple[Example, ...]


def evaluate(
    segmenter: Segmenter,
    images: Iterable[LabelledImage],
    *,
    labels: LabelMap | None = None,
    boundary_px: int = 3,
    progress: Callable[[str, np.ndarray], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Map labelled images, whole, through the tiler, and compare with their labels.

    labels: the classes of the masks, where they are not the segmenter's in the same order; they must be of the same
    names. boundary_px: how near a boundary counts for the boundary IoU. progress: called after each image with its
    name and its predicted classes (H, W) uint8. options: those of `predict_array`. Raises UsageError, naming
    the image, for classes, masks or bands that do not fit.
    """
    # What the datasets read out marks unlabelled pixels by 255, whatever their files hold.
    labels = replace(labels or segmenter.labels, ignore_index=NODATA)
    to_truth = translation(segmenter.labels, labels)
    full, eroded, boundary = ConfusionMatrix(labels), ConfusionMatrix(labels), BoundaryIoU(labels, boundary_px)
    names: list[str] = []
    worst: list[tuple[float, int, Example]] = []
    for image in images:
        try:
            pixels = image.read_image(segmenter.bands)
            predicted = to_truth[predict_array(segmenter, pixels, **options)]
            if image.mask is not None:
                truth = image.read_mask()
                full.add(truth, predicted)
                boundary.add(truth, predicted)
                for example in parts(image.name, pixels, truth, predicted):
                    # a heap of the lowest: its top is the best of them, and the first to go
                    heapq.heappush(worst, (-example.accuracy, len(names), example))
                    if len(worst) > EXAMPLES:
                        heapq.heappop(worst)
            if image.eroded is not None:
                eroded.add(image.read_eroded(), predicted)
        except UsageError as error:
            raise UsageError(f"{image.name}: {error}") from error
        names.append(image.name)
        if progress is not None:
            progress(image.name, predicted)
    return Evaluation(
        labels=labels,
        names=tuple(names),
        full=full,
        eroded=eroded if eroded.images else None,
        boundary=boundary,
        worst=tuple(sorted(example for _, _, example in worst)),
    )


def translation(known: LabelMap, wanted: LabelMap) -> np.ndarray:
    """(256,) uint8: class index of a model -> class index of a dataset, by name. 255 stays 255.

    Raises UsageError where their classes are not the same.
    """
    ours, theirs = ([name.lower() for name in labels.names] for labels in (known, wanted))
    if sorted(ours) != sorted(theirs):
        raise UsageError(f"the model knows {', '.join(known.names)}; the labels hold {', '.join(wanted.names)}")
    table = np.full(256, 255, np.uint8)
    table[: len(ours)] = [theirs.index(name) for name in ours]
    return table


def parts(name: str, pixels: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> Iterator[Example]:
    """An image cut into squares, those of which at least a tenth is labelled."""
    height, width = truth.shape
    for row in range(0, height, EXAMPLE_SIDE):
        for col in range(0, width, EXAMPLE_SIDE):
            where = slice(row, row + EXAMPLE_SIDE), slice(col, col + EXAMPLE_SIDE)
            labelled = truth[where] != NODATA
            if labelled.mean() >= 0.1:
                accuracy = float((truth[where] == predicted[where])[labelled].mean())
                yield Example(accuracy, name, row, col, pixels[:, *where].copy(), truth[where], predicted[where])
