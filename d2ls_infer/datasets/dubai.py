"""Semantic segmentation of aerial imagery: 72 satellite images of Dubai in eight tiles, five classes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from d2ls_infer.datasets.base import ALL, BYTE, RGB, Dataset, Imagery, LabelledImage
from d2ls_infer.datasets.layouts import Plain, folders, pair_files
from d2ls_infer.datasets.masks import IGNORED, Codes, Colors
from d2ls_infer.labels import LabelMap

LABELS = LabelMap(
    ("building", "land", "road", "vegetation", "water"),
    ((60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41)),
)
UNLABELLED = (155, 155, 155)
COLORED = Imagery(
    RGB, BYTE, Colors.of({**{color: index for index, color in enumerate(LABELS.colors)}, UNLABELLED: IGNORED})
)
VAL_TILE = 8
"""The publisher names no split. Parts of one tile are neighbours, so that whole tiles are held back."""


@dataclass(frozen=True)
class Tiles:
    """`Tile N`/images/ beside masks/, labels in colours. An image is named tileN_image_part_NNN."""

    def looks_for(self, split: str) -> str:
        return f"Tile {VAL_TILE if split == 'val' else '*'}/images/ beside masks/"

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        if split == ALL:
            return []
        tiles: dict[int, list[LabelledImage]] = {}
        for folder in folders(root):
            match = re.fullmatch(r"tile ?(\d+)", folder.name, re.IGNORECASE)
            if match is None or (int(match[1]) == VAL_TILE) != (split == "val") or int(match[1]) in tiles:
                continue
            if (folder / "images").is_dir():
                found = pair_files(folder / "images", folder / "masks", COLORED)
                tiles[int(match[1])] = [replace(image, name=f"tile{match[1]}_{image.name}") for image in found]
        return [image for number in sorted(tiles) for image in tiles[number]]


DUBAI = Dataset(
    name="dubai",
    labels=LABELS,
    bands=RGB,
    value_range=BYTE,
    gsd_m=None,
    splits=("train", "val"),
    source="https://www.kaggle.com/datasets/humansintheloop/semantic-segmentation-of-aerial-imagery",
    terms="CC0, as its publishers (Humans in the Loop, MBRSC) state it",
    layouts=(
        Tiles(),
        Plain(
            Imagery(RGB, BYTE, Codes.indices(len(LABELS))),
            rules=(("train", f"(?!tile{VAL_TILE}_).*"), ("val", f"tile{VAL_TILE}_.*")),
        ),
    ),
)
