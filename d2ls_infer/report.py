"""An evaluation as numbers (JSON) and as a page of its own (HTML)."""

from __future__ import annotations

import base64
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from d2ls_infer import __version__
from d2ls_infer.datasets import Dataset
from d2ls_infer.evaluate import Evaluation
from d2ls_infer.metrics import ConfusionMatrix
from d2ls_infer.raster import png_bytes

PAPER: Mapping[str, Mapping[str, float]] = {
    "loveda": {
        "mIoU": 55.3, "IoU background": 47.6, "IoU building": 61.2, "IoU road": 59.1, "IoU water": 81.6,
        "IoU barren": 23.8, "IoU forest": 48.8, "IoU agriculture": 64.8,
    },
    "uavid": {
        "mIoU": 70.9, "IoU clutter": 71.0, "IoU building": 89.7, "IoU road": 83.2, "IoU tree": 82.1,
        "IoU low vegetation": 66.1, "IoU moving car": 75.0, "IoU static car": 59.0, "IoU human": 41.4,
    },
    "potsdam": {"mF1": 94.7},
    "vaihingen": {"mF1": 91.9},
    "grass": {"mF1": 66.27},
    "cloud": {"mF1": 89.65},
}  # fmt: skip
"""The paper's own numbers, in percent, with ConvNeXt-Base on its own splits (Tables 4 to 7)."""


def summarise(evaluation: Evaluation, dataset: Dataset, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured as plain values; scores in percent, NaN as None. about: what was run, see the command."""
    return {
        "about": {**about, "dataset": dataset.name, "images": len(evaluation.names), "version": __version__},
        "labels": list(evaluation.labels.names),
        "left_out_of_means": [evaluation.labels.names[index] for index in dataset.left_out],
        "full": matrix_scores(evaluation.full, dataset.left_out) if evaluation.full.images else None,
        "eroded": matrix_scores(evaluation.eroded, dataset.left_out) if evaluation.eroded else None,
        "boundary_iou": {
            "width_px": evaluation.boundary.width_px,
            "classes": percent(evaluation.boundary.scores()),
        },
        "paper": dict(PAPER.get(dataset.name, {})),
        "image_names": list(evaluation.names),
    }


def matrix_scores(matrix: ConfusionMatrix, left_out: tuple[int, ...]) -> dict[str, Any]:
    """The scores of a confusion matrix; means without the classes left out, and with them."""
    scores = matrix.scores()
    return {
        "overall_accuracy": percent(scores.overall_accuracy),
        "mIoU": percent(scores.mean("iou", without=left_out)),
        "mIoU_interval": [percent(value) for value in matrix.interval("iou", without=left_out)],
        "mF1": percent(scores.mean("f1", without=left_out)),
        "mF1_interval": [percent(value) for value in matrix.interval("f1", without=left_out)],
        "mIoU_all_classes": percent(scores.mean("iou")),
        "mF1_all_classes": percent(scores.mean("f1")),
        "IoU": percent(scores.iou),
        "F1": percent(scores.f1),
        "precision": percent(scores.precision),
        "recall": percent(scores.recall),
        "confusion": matrix.counts.tolist(),
    }


def percent(values: Any) -> Any:
    """0..1 -> percent of two digits, NaN -> None; a number or an array."""
    if np.ndim(values):
        return [percent(value) for value in values]
    return None if math.isnan(values) else round(100 * float(values), 2)


def render(report: Mapping[str, Any], evaluation: Evaluation) -> str:
    """The page: no file, script or address outside itself."""
    environment = Environment(loader=PackageLoader("d2ls_infer"), autoescape=True, undefined=StrictUndefined)
    environment.filters["score"] = lambda value: "-" if value is None else f"{value:.1f}"
    examples = [
        {
            "name": example.name,
            "row": example.row,
            "col": example.col,
            "accuracy": 100 * example.accuracy,
            "pictures": [
                data_uri(view(example.pixels)),
                data_uri(evaluation.labels.painted(example.truth)),
                data_uri(evaluation.labels.painted(example.predicted)),
            ],
        }
        for example in evaluation.worst
    ]
    shares = None
    if evaluation.full.images:
        counts = evaluation.full.counts
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return environment.get_template("evaluation.html").render(
        report=report,
        labels=evaluation.labels,
        examples=examples,
        shares=shares,
        paper_has_classes=any(name.startswith("IoU ") for name in report["paper"]),
    )


def view(pixels: np.ndarray) -> np.ndarray:
    """(bands, h, w) -> (3, h, w) uint8: the first three bands (or the first, three times), stretched over 2 to 98 %.

    What is no number is black.
    """
    picture = (pixels[:3] if len(pixels) >= 3 else pixels[:1].repeat(3, 0)).astype(np.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        low, high = np.nanpercentile(picture, [2, 98], axis=(1, 2), keepdims=True)
    shares = np.nan_to_num((picture - low) / np.maximum(high - low, 1e-9))
    stretched: np.ndarray = (255 * np.clip(shares, 0, 1)).astype(np.uint8)
    return stretched


def data_uri(picture: np.ndarray) -> str:
    """A (3, h, w) uint8 picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()
