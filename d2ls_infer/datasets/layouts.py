"""The arrangements of files that several datasets share, and how folders are searched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from d2ls_infer.datasets.base import ALL, Imagery, LabelledImage
from d2ls_infer.errors import MissingFileError, UsageError

DEPTH = 5
"""Folders are searched so many levels deep: archives often unpack into one or two folders of their own."""

SIDE_FILE = re.compile(
    r"\..*|.*\.(xml|tfw|tiff?w|jgw|pgw|wld|ovr|msk|hdr|prj|qpj|shx|dbf|cpg|sbn|sbx|qix|qml|txt|md|csv|json|ini|db|aux|rrd|partial)",
    re.IGNORECASE,
)
"""Names of files that lie beside rasters and polygons and are neither; hidden ones too."""


@dataclass(frozen=True)
class Plain:
    """images/ and masks/ with the same names, and SPLIT.txt files with a name a line.

    rules: for a split without such a file, a regular expression that the names of its images match as a whole.
    extra: further folders with images/ and masks/ that belong to the split "train" alone.
    """

    imagery: Imagery
    rules: tuple[tuple[str, str], ...] = ()
    extra: tuple[str, ...] = ()

    def looks_for(self, split: str) -> str:
        files = "" if split == ALL or split in dict(self.rules) else f" and {split}.txt"
        return f"images/ beside masks/{files}"

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        images, masks = root / "images", root / "masks"
        if not images.is_dir() or not masks.is_dir():
            return []
        names = self.names(root, split)
        if names is None:
            return []
        pairs = pair_files(images, masks, self.imagery, names=names, unlabelled=split in ("test", ALL))
        if split in ("train", ALL):
            for extra in self.extra:
                if (root / extra / "images").is_dir():
                    pairs += pair_files(root / extra / "images", root / extra / "masks", self.imagery)
        return pairs

    def names(self, root: Path, split: str) -> list[str] | None:
        """Names of the images of a split; None where nothing says which they are."""
        listed = root / f"{split}.txt"
        if listed.is_file():
            return read_names(listed)
        names = sorted(index_files(root / "images"))
        if split == ALL:
            return names
        rule = dict(self.rules).get(split)
        return None if rule is None else [name for name in names if re.fullmatch(rule, name)]


@dataclass(frozen=True)
class SplitFolders:
    """SPLIT/IMAGES/ beside SPLIT/MASKS/, with the same names in both."""

    imagery: Imagery
    images: str = "images"
    masks: str = "masks"

    def looks_for(self, split: str) -> str:
        return f"{split}/{self.images}/ beside {split}/{self.masks}/"

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        found = [path / self.images for path in folders(root) if path.name.lower() == split]
        images = the_one(path for path in found if path.is_dir() and has_masks(path.with_name(self.masks), split))
        if images is None:
            return []
        return pair_files(images, images.with_name(self.masks), self.imagery, unlabelled=split == "test")


@dataclass(frozen=True)
class AnnFolders:
    """img_dir/SPLIT/ beside ann_dir/SPLIT/, as KTDA (https://github.com/XavierJiezou/KTDA) and MMSegmentation do."""

    imagery: Imagery

    def looks_for(self, split: str) -> str:
        return f"img_dir/{split}/ beside ann_dir/{split}/"

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        found = [path for path in folders(root) if (path / "img_dir" / split).is_dir()]
        place = the_one(path for path in found if has_masks(path / "ann_dir" / split, split))
        if place is None:
            return []
        images, masks = (place / kind / split for kind in ("img_dir", "ann_dir"))
        return pair_files(images, masks, self.imagery, unlabelled=split == "test")


def has_masks(folder: Path, split: str) -> bool:
    """Whether a folder of masks is there, or need not be."""
    return folder.is_dir() or split == "test"


def the_one(places: Iterable[Path]) -> Path | None:
    """The one place that was found, None without any. Raises UsageError for several: they may be of other datasets."""
    found = list(places)
    if len(found) > 1:
        raise UsageError(f"several folders look like it: {', '.join(map(str, found))}; give the one above one of them")
    return found[0] if found else None


def pair_files(
    images: Path, masks: Path, imagery: Imagery, *, names: Iterable[str] | None = None, unlabelled: bool = False
) -> list[LabelledImage]:
    """Images and the masks of the same names, all of them or those named. unlabelled: a mask may be missing.

    Raises MissingFileError for an image or mask that is not there, UsageError where two files have the same name.
    """
    image_files, mask_files = index_files(images), index_files(masks) if masks.is_dir() else {}
    pairs = []
    for name in sorted(image_files) if names is None else names:
        image = pick(image_files, name, images)
        mask = pick(mask_files, image.stem, masks) if image else None
        if image is None or (mask is None and not unlabelled):
            what, where = ("image", images) if image is None else ("mask", masks)
            raise MissingFileError(f"no {what} of the name {name!r} in {where}")
        pairs.append(LabelledImage(image.stem, image, mask, imagery=imagery))
    return pairs


def index_files(folder: Path) -> dict[str, list[Path]]:
    """File name without its ending -> the files of that name, side files left out. Raises MissingFileError."""
    if not folder.is_dir():
        raise MissingFileError(f"no such folder: {folder}; expected `images/` and `masks/` side by side")
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if not SIDE_FILE.fullmatch(path.name) and path.is_file():
            files.setdefault(path.stem, []).append(path)
    return files


def pick(files: dict[str, list[Path]], name: str, folder: Path) -> Path | None:
    """The one file of a name, which may be given with its ending; None where there is none."""
    found = files.get(name) or [path for path in files.get(Path(name).stem, []) if path.name == name]
    if len(found) > 1:
        raise UsageError(f"two files of the name {name!r} in {folder}: {', '.join(path.name for path in found)}")
    return found[0] if found else None


def read_names(file: Path) -> list[str]:
    """The names in a split file, one a line. Raises UsageError for a file without any, or a name that stands twice."""
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise UsageError(f"{file} names no images")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"{file} names {twice[0]!r} twice")
    return names


def folders(root: Path, *, depth: int = DEPTH) -> Iterator[Path]:
    """`root` and the folders below it, down to `depth` levels, nearest first and by name; hidden ones are left out."""
    level = [root]
    for deeper in range(depth, -1, -1):
        yield from level
        level = [path for folder in level for path in listing(folder) if path.is_dir()] if deeper else []


def listing(folder: Path) -> list[Path]:
    """What lies in a folder, by name, without hidden files. A folder that may not be opened counts as empty."""
    try:
        paths = sorted(folder.iterdir())
    except PermissionError:  # a disk's lost+found, beside the data
        return []
    return [path for path in paths if not path.name.startswith((".", "__MACOSX"))]
