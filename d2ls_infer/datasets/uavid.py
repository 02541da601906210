"""UAVid: 42 sequences of 10 oblique drone images of 4K size, eight classes; the test labels stay with a server."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from d2ls_infer.datasets.base import ALL, BYTE, RGB, Dataset, Imagery, LabelledImage
from d2ls_infer.datasets.layouts import Plain, SplitFolders, folders, pair_files
from d2ls_infer.datasets.masks import Codes, Colors
from d2ls_infer.labels import LabelMap

LABELS = LabelMap(
    ("building", "road", "tree", "low vegetation", "moving car", "static car", "human", "clutter"),
    (
        (128, 0, 0),
        (128, 64, 128),
        (0, 128, 0),
        (128, 128, 0),
        (64, 0, 128),
        (192, 0, 192),
        (64, 64, 0),
        (0, 0, 0),
    ),
)
"""In the order of GeoSeg and of the authors' checkpoints; the publisher counts clutter first."""
COLORED = Imagery(RGB, BYTE, Colors.of({color: index for index, color in enumerate(LABELS.colors)}))
INDEXED = Imagery(RGB, BYTE, Codes.indices(len(LABELS)))


@dataclass(frozen=True)
class Sequences:
    """uavid_SPLIT/seqN/Images/ beside seqN/Labels/, labels in colours. An image is named seqN_NUMBER."""

    def looks_for(self, split: str) -> str:
        return f"uavid_{split}/seq*/Images/ beside Labels/"

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        if split == ALL:
            return []
        sequences: dict[int, list[LabelledImage]] = {}
        for images in folders(root):
            sequence = re.fullmatch(r"seq(\d+)", images.parent.name)
            in_split = images.parent.parent.name.lower() in (f"uavid_{split}", split)
            if images.name == "Images" and sequence and in_split and int(sequence[1]) not in sequences:
                found = pair_files(images, images.with_name("Labels"), COLORED, unlabelled=split == "test")
                sequences[int(sequence[1])] = [replace(image, name=f"{sequence[0]}_{image.name}") for image in found]
        return [image for number in sorted(sequences) for image in sequences[number]]


UAVID = Dataset(
    name="uavid",
    labels=LABELS,
    bands=RGB,
    value_range=BYTE,
    gsd_m=None,
    splits=("train", "val", "test"),
    source="https://uavid.nl",
    terms="CC BY-NC-SA 4.0",
    layouts=(Sequences(), SplitFolders(INDEXED), Plain(INDEXED)),
)
