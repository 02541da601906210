"""A class map, written row by row into a GeoTIFF that opens in colour, with names, where its scene lies."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.etree import ElementTree

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from d2ls_infer.errors import MissingFileError, OutputExistsError, RasterError, UsageError
from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.raster.scene import Scene

BLOCK = 256


def check_output(path: Path, *, source: str, overwrite: bool) -> None:
    """Everything that can be known before work starts.

    Raises OutputExistsError, MissingFileError for its folder, UsageError where it is the source itself or a folder,
    RasterError for a folder that cannot be written to.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file to write")
    if Path(source).exists() and path.exists() and path.samefile(source):
        raise UsageError(f"the output is the scene itself: {path}; give another name with --output")
    if not path.parent.is_dir():
        raise MissingFileError(f"no such folder: {path.parent}")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; give --overwrite (in Python overwrite=True) to replace it")
    if not os.access(path.parent, os.W_OK):
        raise RasterError(f"cannot write to the folder {path.parent}")


class RasterWriter:
    """A uint8 class map on a scene's own grid; a context manager.

    Rows are handed over from top to bottom and kept until a row of blocks is whole, so that no block is written twice.
    Everything goes to `NAME.partial` and gets its name at the end of the `with` block; after an error nothing is left.
    """

    def __init__(
        self,
        path: Path,
        *,
        like: Scene,
        labels: LabelMap,
        description: str = "class",
        tags: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        for source in (like.path, *like.dataset.files):  # a VRT shows other files
            check_output(path, source=source, overwrite=overwrite)
        self.path, self.labels = path, labels
        self.partial = path.with_name(path.name + ".partial")
        self.height, self.width = like.height, like.width
        self.waiting: list[np.ndarray] = []
        self.waiting_rows = self.written_rows = 0
        self._closing = ExitStack()
        with self.cleaning_up():
            self.dataset = self._closing.enter_context(create_dataset(self.partial, like))
            self.dataset.write_colormap(1, color_table(labels))
            self.dataset.set_band_description(1, description)
            self.dataset.update_tags(1, **{f"CLASS_{i}": name for i, name in enumerate(labels.names)})
            self.dataset.update_tags(**(tags or {}))

    @classmethod
    def create(cls, path: Path, **options: object) -> Self:
        """The same as calling the class. Raises what `check_output` does, and RasterError where writing fails."""
        return cls(path, **options)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def write(self, labels: np.ndarray) -> None:
        """The next rows (rows, width) uint8."""
        assert labels.shape[1] == self.width, labels.shape
        self.waiting.append(labels)
        self.waiting_rows += len(labels)
        whole = self.waiting_rows // BLOCK * BLOCK
        if whole:
            self.flush(whole)

    def flush(self, rows: int) -> None:
        """Write that many of the waiting rows."""
        waiting = np.concatenate(self.waiting)
        with self.cleaning_up():
            self.dataset.write(waiting[:rows], 1, window=Window(0, self.written_rows, self.width, rows))
        self.written_rows += rows
        self.waiting, self.waiting_rows = [waiting[rows:]], len(waiting) - rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.discard()
            return
        if self.waiting_rows:
            self.flush(self.waiting_rows)
        with self.cleaning_up():
            assert self.written_rows == self.height, (self.written_rows, self.height)
            self._closing.close()
            check_whole(self.partial)
            self.publish()

    @contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Remove what was begun when anything goes wrong inside, an interruption included."""
        try:
            yield
        except BaseException as error:
            self.discard()
            if isinstance(error, RasterioError | OSError):
                raise RasterError(f"cannot write {self.path}: {error.__cause__ or error}") from error
            raise

    def publish(self) -> None:
        """Give the finished map and its sidecar their names, the map last."""
        sidecar, by_gdal = (Path(f"{path}.aux.xml") for path in (self.path, self.partial))
        # What GeoTIFF has no keys for, such as some coordinate systems, GDAL has put into a sidecar of its own.
        root = ElementTree.parse(by_gdal).getroot() if by_gdal.exists() else ElementTree.Element("PAMDataset")
        partial = Path(f"{sidecar}.partial")
        partial.write_bytes(category_names(self.labels, root))
        before = sidecar.read_bytes() if sidecar.exists() else None
        partial.replace(sidecar)
        try:
            self.partial.replace(self.path)
        except BaseException:
            if before is None:
                sidecar.unlink()
            else:
                sidecar.write_bytes(before)
            raise
        for leftover in (by_gdal, Path(f"{self.path}.ovr"), Path(f"{self.path}.msk")):  # of an older map
            leftover.unlink(missing_ok=True)

    def discard(self) -> None:
        """Close and remove what was not finished."""
        with suppress(RasterioError, OSError):  # the file is removed anyway; the first error is the one to tell
            self._closing.close()
        for name in (self.partial.name, self.partial.name + ".aux.xml", self.path.name + ".aux.xml.partial"):
            with suppress(OSError):
                self.path.with_name(name).unlink(missing_ok=True)


def create_dataset(path: Path, like: Scene) -> rasterio.io.DatasetWriter:
    """A tiled, compressed, empty uint8 GeoTIFF with the grid of a scene. Its profile is made here, never copied."""
    source = like.dataset
    gcps, gcps_crs = source.gcps
    georeference = {"crs": source.crs} | ({} if source.transform.is_identity else {"transform": source.transform})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        dataset = rasterio.open(
            path,
            "w",
            driver="GTiff",
            dtype="uint8",
            count=1,
            height=like.height,
            width=like.width,
            nodata=NODATA,
            tiled=True,
            blockxsize=BLOCK,
            blockysize=BLOCK,
            compress="deflate",
            bigtiff="if_safer",
            **(georeference if not gcps else {}),
        )
    if gcps:
        dataset.gcps = (gcps, gcps_crs)
    if source.rpcs is not None:
        dataset.rpcs = source.rpcs
    return dataset


def color_table(labels: LabelMap) -> dict[int, tuple[int, int, int, int]]:
    """Pixel value -> red, green, blue, alpha. Nodata is transparent."""
    return {i: (*color, 255) for i, color in enumerate(labels.colors)} | {NODATA: (0, 0, 0, 0)}


def category_names(labels: LabelMap, root: ElementTree.Element) -> bytes:
    """GDAL's sidecar (`.aux.xml`) that names the values of band 1; a GeoTIFF itself has no place for them."""
    band = root.find("PAMRasterBand[@band='1']")
    if band is None:
        band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    names = ElementTree.SubElement(band, "CategoryNames")
    for name in labels.names:
        ElementTree.SubElement(names, "Category").text = name
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


def check_whole(path: Path) -> None:
    """Raise where the closed file lost its end: GDAL flushes on closing, and a full disk then only logs an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as dataset:
            last = Window(0, max(0, dataset.height - 1), dataset.width, 1)
            if dataset.read(1, window=last).size != dataset.width:
                raise OSError(errno.EIO, "the last row is missing")
