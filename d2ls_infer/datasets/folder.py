"""A folder of labelled images: `images/` and `masks/` hold rasters of the same names, split files list names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from d2ls_infer.errors import MissingFileError, UsageError


@dataclass(frozen=True)
class LabelledImage:
    """Where an image and its mask of class indices lie; `name` is their file name without its ending."""

    name: str
    image: Path
    mask: Path


def read_folder(root: Path, names: str | Iterable[str] | None = None) -> list[LabelledImage]:
    """The pairs of `root`, all of them or those of a split: the name of a `SPLIT.txt` in it, or the names themselves.

    Raises MissingFileError for a folder, split file, image or mask that is not there, and UsageError for an empty set.
    """
    images, masks = index_files(root / "images"), index_files(root / "masks")
    if names is None:
        names = sorted(images)
    elif isinstance(names, str):
        split = root / f"{names}.txt"
        if not split.is_file():
            raise MissingFileError(f"no split {names!r}: {split} does not exist")
        names = split.read_text(encoding="utf-8").split()
    pairs = []
    for name in names:
        for files, kind in ((images, "image"), (masks, "mask")):
            if name not in files:
                raise MissingFileError(f"no {kind} of the name {name!r} in {root / (kind + 's')}")
        pairs.append(LabelledImage(name, images[name], masks[name]))
    if not pairs:
        raise UsageError(f"no labelled images in {root}")
    return pairs


def index_files(folder: Path) -> dict[str, Path]:
    """File name without its ending -> file."""
    if not folder.is_dir():
        raise MissingFileError(f"no such folder: {folder}; expected `images/` and `masks/` side by side")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
