"""Labelled images to train on and to measure with: the benchmarks by name, and a folder of one's own.

`find_dataset(name).images(root, split)` gives the labelled images of a benchmark; `folder_dataset(read_classes(file))`
is the same for a user's own. Importing this loads neither torch nor GDAL.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from d2ls_infer.datasets.base import ALL, Dataset, Imagery, LabelledImage
from d2ls_infer.datasets.cloud import CLOUD
from d2ls_infer.datasets.dubai import DUBAI
from d2ls_infer.datasets.folder import folder_dataset, read_classes
from d2ls_infer.datasets.grass import GRASS
from d2ls_infer.datasets.loveda import LOVEDA
from d2ls_infer.datasets.masks import Codes, Colors, Polygons
from d2ls_infer.datasets.naip import NAIP
from d2ls_infer.datasets.potsdam import POTSDAM
from d2ls_infer.datasets.submission import check_server, submission_file
from d2ls_infer.datasets.uavid import UAVID
from d2ls_infer.datasets.vaihingen import VAIHINGEN
from d2ls_infer.errors import UsageError

__all__ = [
    "ALL",
    "DATASETS",
    "Codes",
    "Colors",
    "Dataset",
    "Imagery",
    "LabelledImage",
    "Polygons",
    "check_server",
    "find_dataset",
    "folder_dataset",
    "read_classes",
    "submission_file",
]

DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {dataset.name: dataset for dataset in (LOVEDA, UAVID, POTSDAM, VAIHINGEN, CLOUD, GRASS, NAIP, DUBAI)}
)
"""The benchmarks by name. "folder" is none of them: it needs classes, see `folder_dataset`."""


def find_dataset(name: str) -> Dataset:
    """A benchmark by name. Raises UsageError with the nearest names; for "folder" too, which needs classes."""
    if name == "folder":
        raise UsageError("the dataset folder needs its classes: --classes FILE; in Python it is a `folder_dataset`")
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=2)
        hint = f", perhaps {' or '.join(near)} is meant" if near else ""
        raise UsageError(f"no dataset {name!r}{hint}; there are {', '.join(DATASETS)}, and folder for your own")
    return DATASETS[name]
