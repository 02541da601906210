"""What the two ISPRS benchmarks of semantic labelling have in common: classes, colours, areas, GeoSeg's patches."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d2ls_infer.datasets.base import Imagery, LabelledImage
from d2ls_infer.datasets.layouts import folders, listing, pair_files, the_one
from d2ls_infer.datasets.masks import IGNORED, Codes, Colors
from d2ls_infer.errors import MissingFileError
from d2ls_infer.labels import LabelMap

log = logging.getLogger(__name__)

LABELS = LabelMap(
    ("impervious surface", "building", "low vegetation", "tree", "car", "clutter"),
    ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)),
)
CLUTTER = 5
BLACK = (0, 0, 0)
TABLE = {**{color: index for index, color in enumerate(LABELS.colors)}, BLACK: IGNORED}
"""The benchmark's colours. Black stands along class boundaries in the eroded labels, which are not scored."""
COLORS = Colors.of(TABLE)
PATCH_CODES = Codes.of({**{index: index for index in range(6)}, 6: IGNORED, IGNORED: IGNORED})
"""Values of the masks that GeoSeg cuts: 6 is a boundary or what a patch was padded with."""
PATCH_COLORS = Colors.of({**TABLE, (255, 204, 0): LABELS.names.index("car")})
"""Colours of its `masks_SIZE_rgb`, where cars are darker."""
SOURCE = "https://www.isprs.org/education/benchmarks/UrbanSemLab/default.aspx"
TERMS = "research use, as stated by the ISPRS benchmark; not to be passed on"


@dataclass(frozen=True)
class AreaFiles:
    """The files of one area: images by their kind ("" where there is one kind only), full labels, eroded labels."""

    images: Mapping[str, Path]
    mask: Path | None
    eroded: Path | None


@dataclass(frozen=True)
class Areas:
    """Whole areas as their publisher names them, in whatever folders they lie; GeoSeg's unsplit folders as well.

    pattern: file name -> groups `area`, `kind` (of imagery or labels; may be absent). image_folders: where one name
    stands for imagery and labels alike, the folders that hold imagery. kinds: imagery to take, the first that is there
    for any area, so that all splits have the same bands.
    split_areas: official area numbers of each split. lossy: areas whose published labels do not hold exact colours.
    expected: what to say of it in an error.
    """

    pattern: str
    kinds: tuple[tuple[str, Imagery], ...]
    split_areas: tuple[tuple[str, tuple[str, ...]], ...]
    expected: str
    image_folders: tuple[str, ...] = ()
    lossy: tuple[str, ...] = ()

    def looks_for(self, split: str) -> str:
        return self.expected

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        areas, files = dict(self.split_areas).get(split, ()), self.find(root)
        there = {kind for area in files.values() for kind in area.images}
        kind, imagery = next((pair for pair in self.kinds if pair[0] in there), self.kinds[0])
        found = [area for area in areas if area in files and kind in files[area].images]
        if found and len(found) < len(areas):
            lost = ", ".join(area for area in areas if area not in found)
            log.warning("%s has %d of the %d %s areas; there is no %s", root, len(found), len(areas), split, lost)
        return [self.image(area, files[area], kind, imagery, split) for area in found]

    def image(self, area: str, files: AreaFiles, kind: str, imagery: Imagery, split: str) -> LabelledImage:
        """An area of a split. Raises MissingFileError where its labels are not there, but for the test split."""
        if split != "test" and not (files.mask or files.eroded):
            raise MissingFileError(f"no labels beside {files.images[kind]}: looked for {self.expected}")
        if area in self.lossy:
            imagery = Imagery(imagery.bands, imagery.value_range, Colors.of(TABLE, corners=True))
        return LabelledImage(area, files.images[kind], files.mask, files.eroded, imagery)

    def find(self, root: Path) -> dict[str, AreaFiles]:
        """Area number -> its files; of several copies the one nearest to `root`."""
        images: dict[str, dict[str, Path]] = {}
        labels: dict[tuple[str, bool], Path] = {}
        for folder in folders(root):
            if folder.name == "origin":  # repainted copies that GeoSeg makes to look at
                continue
            for path in listing(folder):
                match = re.fullmatch(self.pattern, path.name, re.IGNORECASE)
                if match is None:
                    continue
                area, kind = match["area"], (match["kind"] or "").lower()
                if kind in dict(self.kinds) and (not self.image_folders or folder.name.lower() in self.image_folders):
                    images.setdefault(area, {}).setdefault(kind, path)
                else:
                    labels.setdefault((area, kind.endswith("noboundary")), path)
        return {
            area: AreaFiles(kinds, labels.get((area, False)), labels.get((area, True)))
            for area, kinds in images.items()
        }


@dataclass(frozen=True)
class Patches:
    """Patches that GeoSeg cuts (https://github.com/WangLibo1995/GeoSeg): SPLIT/images_SIZE/ beside SPLIT/masks_SIZE/.

    Its test masks are cut from the eroded labels; the full ones are there in colours, in masks_SIZE_rgb/, if at all.
    """

    imagery: Imagery

    def looks_for(self, split: str) -> str:
        return f"{split}/images_1024/ beside {split}/masks_1024/"

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        found = [path for path in folders(root) if re.fullmatch(r"images_\d+", path.name)]
        folder = the_one(path for path in found if path.parent.name.lower() == split)
        if folder is None:
            return []
        masks = folder.with_name(folder.name.replace("images", "masks"))
        pairs = pair_files(folder, masks, self.imagery)
        return self.eroded(pairs, masks.with_name(f"{masks.name}_rgb")) if split == "test" else pairs

    def eroded(self, pairs: list[LabelledImage], full: Path) -> list[LabelledImage]:
        """The same patches, their masks being eroded labels, with the full ones of the folder `full` if it is there."""
        imagery = Imagery(self.imagery.bands, self.imagery.value_range, PATCH_COLORS)
        masks = {image.name: image.mask for image in pair_files(full, full, imagery)} if full.is_dir() else {}
        return [
            LabelledImage(image.name, image.image, masks.get(image.name), image.mask, imagery, PATCH_CODES)
            for image in pairs
        ]
