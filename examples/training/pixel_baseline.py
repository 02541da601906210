"""Gradient boosting on single pixels: what the bands tell without their surroundings. Needs scikit-learn.

    python examples/training/pixel_baseline.py cloud --root DIR [--around]

--around adds what little a blur tells of the surroundings: the logarithms of the bands, their means over three widths,
how far each pixel is from these, and the least and the largest value nearby; all classes weigh the same then.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter
from sklearn.ensemble import HistGradientBoostingClassifier

from d2ls_infer.datasets import find_dataset
from d2ls_infer.labels import NODATA
from d2ls_infer.metrics import ConfusionMatrix


def with_surroundings(pixels: np.ndarray) -> np.ndarray:
    """(bands, H, W) reflectances x 10000 -> (8 * bands, H, W)."""
    logs = np.log(np.maximum(pixels.astype(np.float32), 20))
    means = [np.stack([gaussian_filter(band, width) for band in logs]) for width in (2, 6, 20)]
    least = np.stack([minimum_filter(band, 9) for band in logs])
    largest = np.stack([maximum_filter(band, 15) for band in logs])
    return np.concatenate([logs, *means, logs - means[1], logs - means[2], least, largest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=4_000, help="drawn from each training image")
    parser.add_argument("--bands", help="names, with commas between; all where it is left out")
    parser.add_argument("--around", action="store_true", help="surroundings too")
    arguments = parser.parse_args()
    prepared = with_surroundings if arguments.around else np.asarray
    dataset = find_dataset(arguments.dataset)
    names = list(dataset.bands)
    bands = (
        [names.index(name.strip()) for name in arguments.bands.split(",")] if arguments.bands else [*range(len(names))]
    )

    rng = np.random.default_rng(42)
    features, truth = [], []
    for image in dataset.images(arguments.root, "train"):
        pixels, mask = image.read()
        pixels = prepared(pixels[bands])
        labelled = np.flatnonzero(mask != NODATA)
        chosen = rng.choice(labelled, min(arguments.pixels, len(labelled)), replace=False)
        features.append(pixels.reshape(len(pixels), -1)[:, chosen].T)
        truth.append(mask.ravel()[chosen])
    cautious = {"min_samples_leaf": 200, "max_leaf_nodes": 15, "max_features": 0.3, "class_weight": "balanced"}
    model = HistGradientBoostingClassifier(
        max_iter=150,
        learning_rate=0.08,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=42,
        **(cautious if arguments.around else {}),
    )
    model.fit(np.concatenate(features), np.concatenate(truth))

    matrix = ConfusionMatrix(dataset.labels)
    for image in dataset.images(arguments.root, "val"):
        pixels, mask = image.read()
        pixels = prepared(pixels[bands])
        matrix.add(mask, model.predict(pixels.reshape(len(pixels), -1).T).astype(np.uint8).reshape(mask.shape))
    scores = matrix.scores()
    print(f"mIoU {100 * scores.mean('iou'):.1f} %, overall accuracy {100 * scores.overall_accuracy:.1f} %")
    for name, iou in zip(dataset.labels.names, scores.iou, strict=True):
        print(f"{name}: IoU {100 * iou:.1f} %")


if __name__ == "__main__":
    main()
