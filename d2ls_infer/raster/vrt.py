"""Rasters in pieces under a GDAL VRT, which shows them as one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np

from d2ls_infer.raster.sidecar import name_classes
from d2ls_infer.raster.writer import BLOCK, RasterWriter, check_whole


class Strip(NamedTuple):
    """A raster of a scene's rows from `first` to `last`, which is not among them."""

    first: int
    last: int
    path: Path


class RasterMosaic(RasterWriter):
    """A VRT over strips that were written before, and cover every row once; it is made as a `RasterWriter` makes files.

    Strips are named by their way from it, so that all can be moved together. counts: pixels of each class, as they are
    when it is finished. GDAL's own driver writes all but the strips; so a VRT says of itself what a GeoTIFF would.
    """

    driver: ClassVar[str] = "VRT"

    def __init__(
        self,
        path: Path,
        *,
        strips: Sequence[Strip],
        counts: np.ndarray,
        tags: Mapping[str, str] | None = None,
        side_tags: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, tags={**(tags or {}), **(side_tags or {})}, **options)
        self.strips, self.counts = sorted(strips), counts

    def write(self, rows: np.ndarray) -> None:
        """Nothing: the strips hold them."""

    def finish(self) -> None:
        """Lay the strips into it, and see that they are there."""
        ends = [0, *(row for strip in self.strips for row in strip[:2]), self.height]
        assert ends[::2] == ends[1::2], ends
        with self.cleaning_up():
            self._closing.close()
            tree = ElementTree.parse(self.partial)
            for number, band in enumerate(tree.getroot().iter("VRTRasterBand"), 1):
                band.extend(source(strip, number, self.width, self.path.parent) for strip in self.strips)
                if self.labels is not None:
                    name_classes(band, self.labels, self.counts.tolist())
            ElementTree.indent(tree)
            tree.write(self.partial)
            for strip in self.strips:
                strip.path.stat()
            check_whole(self.partial)

    def sidecar(self, by_gdal: Path) -> bytes | None:
        """None: a VRT holds everything itself."""
        return None


def source(strip: Strip, band: int, width: int, home: Path) -> Element:
    """A strip, as the VRT in the folder `home` has it."""
    rows = strip.last - strip.first
    found = Element("SimpleSource")
    name = SubElement(found, "SourceFilename", relativeToVRT="1")
    name.text = Path(os.path.relpath(strip.path, home)).as_posix()
    SubElement(found, "SourceBand").text = str(band)
    # So GDAL need not open all of them to show one.
    size = {"RasterXSize": width, "RasterYSize": rows, "DataType": "Byte", "BlockXSize": BLOCK, "BlockYSize": BLOCK}
    SubElement(found, "SourceProperties", {key: str(value) for key, value in size.items()})
    for rectangle, row in (("SrcRect", 0), ("DstRect", strip.first)):
        SubElement(found, rectangle, xOff="0", yOff=str(row), xSize=str(width), ySize=str(rows))
    return found
