"""A user's own images and classes: `images/` beside `masks/` or `labels/`, rasters or polygons of the same names."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from d2ls_infer.datasets.base import ALL, BYTE, RGB, Dataset, Imagery, LabelledImage
from d2ls_infer.datasets.layouts import index_files, pair_files, read_names
from d2ls_infer.datasets.masks import Codes, Polygons
from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.labels import Color, LabelMap, parse_color, spread_color

SPLITS = ("train", "val", "test")
VECTOR_SUFFIXES = (".geojson", ".gpkg", ".shp", ".fgb", ".kml", ".gml", ".parquet", ".geoparquet")


def folder_dataset(
    labels: LabelMap,
    *,
    bands: Sequence[str] = RGB,
    value_range: tuple[float, float] = BYTE,
    gsd_m: float | None = None,
    fraction: float = 0.2,
    seed: int = 42,
    column: str = "class",
    background: str | None = None,
    terms: str = "",
) -> Dataset:
    """A dataset of a user's own images and classes.

    bands: names of the images' bands in file order; value_range: what their values lie in; gsd_m: metres per pixel.
    Splits are the SPLIT.txt files beside images/. Without any, the share `fraction` of the images is the split "val"
    and the rest "train", at least one each; which, depends on an image's name and the `seed` alone, so that images that
    are added leave the others where they were. Neighbours should not be split so: list them in files. column,
    background: of labels that are polygons, the column of the class and the class of the ground between them (else
    that is ignored). terms: of the images, which a model that is trained on them has as its licence.

    Raises UsageError for a fraction outside 0 to 1 or a background that is no class.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"the fraction for validation lies between 0 and 1, got {fraction:g}; try 0.2")
    if background is not None and background not in labels.names:
        raise UsageError(f"the background {background!r} is none of the classes: {', '.join(labels.names)}")
    imagery = Imagery(tuple(bands), value_range, Codes.indices(len(labels)))
    return Dataset(
        name="folder",
        labels=labels,
        bands=tuple(bands),
        value_range=value_range,
        gsd_m=gsd_m,
        splits=SPLITS,
        source="",
        terms=terms,
        layouts=(Folder(imagery, Polygons(labels, column, background), fraction, seed),),
    )


@dataclass(frozen=True)
class Folder:
    """images/ beside masks/ or labels/, which hold rasters of class indices or polygons, as the file's ending says."""

    imagery: Imagery
    polygons: Polygons
    fraction: float
    seed: int

    def looks_for(self, split: str) -> str:
        files = "" if split == ALL else f" and {split}.txt (or no split files at all, for train and val by chance)"
        return f"images/ beside masks/ or labels/{files}"

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        images = root / "images"
        masks = next((root / name for name in ("masks", "labels") if (root / name).is_dir()), None)
        if not images.is_dir() or masks is None:
            return []
        names = self.names(root, split)
        pairs = pair_files(images, masks, self.imagery, names=names, unlabelled=split in ("test", ALL))
        burnt = replace(self.imagery, masks=self.polygons)
        return [
            replace(image, imagery=burnt) if image.mask and image.mask.suffix.lower() in VECTOR_SUFFIXES else image
            for image in pairs
        ]

    def names(self, root: Path, split: str) -> list[str]:
        """Names of the images of a split. Raises UsageError where one image alone is to be split by chance."""
        if (root / f"{split}.txt").is_file():
            return read_names(root / f"{split}.txt")
        names = sorted(index_files(root / "images"))
        if split == ALL:
            return names
        if split not in ("train", "val") or any((root / f"{name}.txt").is_file() for name in SPLITS):
            return []
        if len(names) == 1:
            raise UsageError(f"one image in {root} cannot be split; take --split all and --val-split none")
        draws = {name: draw(name, self.seed) for name in names}
        in_turn = sorted(names, key=lambda name: draws[name])
        measured = sum(value < self.fraction for value in draws.values())
        measured = min(max(measured, 1), len(names) - 1)  # so that neither is empty
        chosen = set(in_turn[:measured])
        return [name for name in names if (name in chosen) == (split == "val")]


def draw(name: str, seed: int) -> float:
    """A number from 0 to 1 that depends on the name and the seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def read_classes(path: Path, *, like: LabelMap | None = None) -> LabelMap:
    """Classes from a file: a line each, `name` or `name,#rrggbb`; or a JSON list as `LabelMap.to_list` gives it.

    Empty lines and those that begin with # count for nothing. Classes without a colour get that of the class of the
    same name in `like`, or one of their own. Raises MissingFileError, and UsageError that names the line.
    """
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}; it names the classes, a line each")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text in UTF-8: {error}") from error
    try:
        return parse_json(text) if text.lstrip().startswith("[") else parse_lines(text, like)
    except UsageError as error:
        raise UsageError(f"{path}{error}") from error


def parse_json(text: str) -> LabelMap:
    """A JSON list of {"name": ..., "color": "#rrggbb"} -> labels. What goes wrong begins with the place."""
    try:
        return LabelMap.from_list(json.loads(text))
    except json.JSONDecodeError as error:
        raise UsageError(f", line {error.lineno}: not JSON: {error.msg}") from error
    except UsageError as error:
        raise UsageError(f": {error}") from error


def parse_lines(text: str, like: LabelMap | None) -> LabelMap:
    """Lines of `name` or `name,#rrggbb` -> labels. What goes wrong begins with the place."""
    known = {} if like is None else {name.lower(): color for name, color in zip(like.names, like.colors, strict=True)}
    taken = set(known.values())
    names: list[str] = []
    colors: list[Color] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, comma, color = (part.strip() for part in line.partition(","))
        if not name:
            raise UsageError(f", line {number}: the name of the class is empty; write NAME or NAME,#rrggbb")
        if name in names:
            raise UsageError(f", line {number}: the class {name!r} stands twice")
        try:
            colors.append(parse_color(color) if comma else known.get(name.lower()) or free_color(len(names), taken))
        except UsageError as error:
            raise UsageError(f", line {number}: {error}") from error
        names.append(name)
        taken.add(colors[-1])
    if not names:
        raise UsageError(": it names no classes; write one a line, NAME or NAME,#rrggbb")
    return LabelMap(tuple(names), tuple(colors))


def free_color(index: int, taken: Collection[Color]) -> Color:
    """The colour that a class of that index gets, or the next one that is not taken."""
    return next(color for number in itertools.count(index) if (color := spread_color(number)) not in taken)
