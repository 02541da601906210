"""Predict labelled images and compare: the same tiler as for scenes, pixels of all images counted together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from d2ls_infer.datasets import LabelledImage
from d2ls_infer.errors import UsageError
from d2ls_infer.metrics import ConfusionMatrix
from d2ls_infer.raster import read_array
from d2ls_infer.segmenter import D2LSSegmenter


def evaluate(
    segmenter: D2LSSegmenter,
    images: Iterable[LabelledImage],
    *,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> ConfusionMatrix:
    """Confusion matrix of a segmenter over labelled images whose masks hold its class indices.

    The first bands of an image are used if it has more than the segmenter takes. options: those of
    `D2LSSegmenter.predict`. Raises UsageError, naming the image, for masks or bands that do not fit.
    """
    matrix = ConfusionMatrix(segmenter.labels)
    for image in images:
        pixels = read_array(image.image)[: len(segmenter.bands)]
        try:
            matrix.add(read_array(image.mask)[0], segmenter.predict(pixels, **options))
        except UsageError as error:
            raise UsageError(f"{image.name}: {error}") from error
        if progress is not None:
            progress(image.name)
    return matrix
