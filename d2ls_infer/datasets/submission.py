"""Maps in the files that the benchmarks' test servers take."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np

from d2ls_infer.datasets.base import Dataset
from d2ls_infer.errors import UsageError

SERVERS = ("loveda", "uavid")
"""Benchmarks whose test labels stay with a server."""


def check_server(dataset: Dataset) -> None:
    """Raise UsageError for a benchmark without a server that takes maps."""
    if dataset.name not in SERVERS:
        raise UsageError(f"{dataset.name} has no test server that takes maps; {' and '.join(SERVERS)} have")


def submission_file(dataset: Dataset, name: str, predicted: np.ndarray) -> tuple[PurePosixPath, np.ndarray]:
    """An image's name and classes (H, W) uint8 -> the file's path and its picture (1 or 3, H, W) uint8.

    LoveDA: NAME.png of class indices, 0 background to 6 agriculture. UAVid: seqN/Labels/NUMBER.png in colours.
    Raises UsageError for a benchmark without such a server.
    """
    check_server(dataset)
    if dataset.name == "loveda":
        return PurePosixPath(f"{PurePosixPath(name).name}.png"), predicted[None]
    sequence, _, number = name.partition("_")
    return PurePosixPath(sequence, "Labels", f"{number}.png"), dataset.labels.painted(predicted)
