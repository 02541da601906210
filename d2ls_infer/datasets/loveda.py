"""LoveDA: 5987 images of 1024 x 1024 pixels, 0.3 m, urban and rural, seven classes; a server keeps the test labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d2ls_infer.datasets.base import ALL, BYTE, RGB, Dataset, Imagery, LabelledImage
from d2ls_infer.datasets.layouts import Plain, folders, pair_files
from d2ls_infer.datasets.masks import IGNORED, Codes
from d2ls_infer.labels import LabelMap

LABELS = LabelMap(
    ("background", "building", "road", "water", "barren", "forest", "agriculture"),
    ((255, 255, 255), (255, 0, 0), (255, 255, 0), (0, 0, 255), (159, 129, 183), (0, 255, 0), (255, 195, 128)),
)
OFFICIAL = Imagery(RGB, BYTE, Codes.of({0: IGNORED, **{value: value - 1 for value in range(1, 8)}, IGNORED: IGNORED}))
"""The publisher's masks: 0 is no data, 1 to 7 are the classes."""
CONVERTED = Imagery(RGB, BYTE, Codes.of({**{index: index for index in range(7)}, 7: IGNORED, IGNORED: IGNORED}))
"""GeoSeg's masks_png_convert: 0 to 6 are the classes, 7 is no data."""


@dataclass(frozen=True)
class Scenes:
    """SPLIT/{Urban,Rural}/images_png/ beside masks_png/, or else beside the masks_png_convert/ that GeoSeg makes."""

    def looks_for(self, split: str) -> str:
        return f"{split.capitalize()}/{{Urban,Rural}}/images_png/ beside masks_png/"

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        if split == ALL:
            return []
        scenes: dict[str, list[LabelledImage]] = {}
        for images in folders(root):
            scene, found_split = images.parent.name.lower(), images.parent.parent.name.lower()
            if images.name == "images_png" and found_split == split and scene in {"urban", "rural"} - scenes.keys():
                scenes[scene] = self.scene(images, split)
        return [image for scene in ("urban", "rural") for image in scenes.get(scene, [])]

    def scene(self, images: Path, split: str) -> list[LabelledImage]:
        """The images of one scene; only the test split may come without masks."""
        masks, converted = images.with_name("masks_png"), images.with_name("masks_png_convert")
        if converted.is_dir() and not masks.is_dir():
            return pair_files(images, converted, CONVERTED)
        return pair_files(images, masks, OFFICIAL, unlabelled=split == "test")


LOVEDA = Dataset(
    name="loveda",
    labels=LABELS,
    bands=RGB,
    value_range=BYTE,
    gsd_m=0.3,
    splits=("train", "val", "test"),
    source="https://zenodo.org/records/5706578",
    terms="CC BY-NC-SA 4.0",
    layouts=(
        Scenes(),
        Plain(
            OFFICIAL,
            rules=(("train", "(?!(2[0-7]|2996)$).*"), ("val", "2[0-7]|2996")),
            extra=("crops512", "figures"),  # labels read back from figures: good to learn from, not to measure with
        ),
    ),
)
