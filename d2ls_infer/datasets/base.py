"""What every dataset is made of: labelled images, and a description that finds them in the layouts they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from d2ls_infer.datasets.masks import Codes, MaskReader
from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.labels import NODATA, LabelMap

RGB = ("red", "green", "blue")
BYTE = (0.0, 255.0)
ALL = "all"
"""Name of the split that holds every labelled image of the others."""
ANY_INDEX = Codes.indices(NODATA)
"""Masks whose values are class indices, however many classes there are."""


@dataclass(frozen=True)
class Imagery:
    """What the files of a layout hold: the bands' names in file order (empty: not known), the range of the values,
    and how their masks are read.
    """

    bands: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None
    masks: MaskReader = ANY_INDEX


@dataclass(frozen=True)
class LabelledImage:
    """Where an image and its labels lie, and how to read them. `name` is unique within a list of images.

    mask: None where a test split comes without labels. eroded: labels whose class boundaries are ignored (ISPRS).
    eroded_masks: how those are read, where that differs from the mask.
    """

    name: str
    image: Path
    mask: Path | None = None
    eroded: Path | None = None
    imagery: Imagery = Imagery()
    eroded_masks: MaskReader | None = None

    @property
    def bands(self) -> tuple[str, ...]:
        return self.imagery.bands

    @property
    def value_range(self) -> tuple[float, float] | None:
        return self.imagery.value_range

    def read_image(self, bands: Sequence[str] | None = None) -> np.ndarray:
        """(bands, H, W) of the file's type: the named bands in that order, or all that the dataset names.

        Where the names of the file's bands are not known, the first ones. Raises UsageError for a band that the image
        does not have; MissingFileError and RasterError where it cannot be read.
        """
        from d2ls_infer.raster import read_array

        pixels = read_array(self.image)
        known = self.bands or tuple(bands or ())
        if len(pixels) < len(known):
            raise UsageError(f"{self.image} has {len(pixels)} bands, but {len(known)} are expected: {', '.join(known)}")
        if missing := [band for band in bands or () if band not in known]:
            raise UsageError(f"{self.image} has no band {missing[0]!r}; it has {', '.join(known)}")
        return pixels[: len(known) or None] if bands is None else pixels[[known.index(band) for band in bands]]

    def read_mask(self) -> np.ndarray:
        """(H, W) uint8 of class indices, 255 = ignored. Raises UsageError where there is none, or unknown values."""
        return self._read(self.mask, self.imagery.masks, "labels")

    def read_eroded(self) -> np.ndarray:
        """(H, W) uint8 as `read_mask`, the pixels near a class boundary ignored too. Raises the same."""
        return self._read(self.eroded, self.eroded_masks or self.imagery.masks, "eroded labels")

    def read(self, bands: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Image (bands, H, W) and mask (H, W). Raises UsageError where their sizes differ."""
        image, mask = self.read_image(bands), self.read_mask()
        if image.shape[1:] != mask.shape:
            raise UsageError(f"{self.image} has {image.shape[1:]} rows and columns, but its mask {mask.shape}")
        return image, mask

    def _read(self, path: Path | None, reader: MaskReader, what: str) -> np.ndarray:
        if path is None:
            raise UsageError(f"{self.name} ({self.image}) comes without {what}")
        return reader.read(path, image=self.image)


class Layout(Protocol):
    """One way in which the files of a dataset are arranged."""

    def looks_for(self, split: str) -> str:
        """The folders and files it expects, in words for an error."""
        ...

    def read(self, root: Path, split: str) -> list[LabelledImage]:
        """The images of a split; empty where `root` is not arranged so, or the layout knows of no split "all".

        Raises MissingFileError for an image whose labels are not there, but for test images.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A benchmark: its classes, its imagery, and how to find the images of each split below a folder.

    labels: class names in index order, in the benchmark's customary colours. bands, value_range: of its usual imagery;
    an image says itself where it comes with other bands. gsd_m: metres per pixel, None where that varies.
    left_out: indices of the classes that the benchmark's means leave out. source, terms: where the data is to be had
    and under which conditions (empty for one's own). layouts: tried in this order.
    """

    name: str
    labels: LabelMap
    bands: tuple[str, ...]
    value_range: tuple[float, float]
    gsd_m: float | None
    splits: tuple[str, ...]
    left_out: tuple[int, ...] = ()
    source: str
    terms: str
    layouts: tuple[Layout, ...]

    def images(self, root: str | Path, split: str) -> list[LabelledImage]:
        """The images of a split below `root`, in a fixed order; all from one layout, so that all have the same bands.

        split: one of `splits`, several with + between ("train+val"), or "all" for every labelled image. Raises
        MissingFileError that names what was looked for and where to get it, and UsageError for an unknown split.
        """
        root = Path(root)
        if not root.is_dir():
            raise MissingFileError(f"no such folder: {root}{self._origin()}")
        parts = split.split("+")
        for layout in self.layouts:
            found = [self._read(layout, root, part) for part in parts]
            if all(found):
                return list({image.image: image for images in found for image in images}.values())
        raise self._missing(root, split)

    def _read(self, layout: Layout, root: Path, split: str) -> list[LabelledImage]:
        if split != ALL:
            return layout.read(root, split)
        images = layout.read(root, ALL) or [image for name in self.splits for image in layout.read(root, name)]
        return [image for image in images if image.mask or image.eroded]

    def _origin(self) -> str:
        return f"; get {self.name} from {self.source} (terms: {self.terms})" if self.source else ""

    def _missing(self, root: Path, split: str) -> UsageError:
        if unknown := [part for part in split.split("+") if part not in (*self.splits, ALL)]:
            return UsageError(f"{self.name} has the splits {', '.join(self.splits)} and {ALL}, got {unknown[0]!r}")
        tried = {part: any(self._read(layout, root, part) for layout in self.layouts) for part in split.split("+")}
        lost = next((part for part, found in tried.items() if not found), split)
        looked_for = "; or ".join(layout.looks_for(lost) for layout in self.layouts)
        which = "labelled" if lost == ALL else lost
        return MissingFileError(f"no {which} images of {self.name} in {root}: looked for {looked_for}{self._origin()}")
