"""Rasters of one byte per value, written row by row into GeoTIFFs that lie where their scene lies."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import rasterio
import rasterio.shutil
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.windows import Window

from d2ls_infer.errors import MissingFileError, OutputExistsError, RasterError, UsageError
from d2ls_infer.files import write_whole
from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.raster.dataset import local_file, quietly
from d2ls_infer.raster.scene import Scene
from d2ls_infer.raster.sidecar import aux_xml, qgis_style, style_path

BLOCK = 256

COG_CACHE_BYTES = 64 << 20
"""GDAL's block cache while a Cloud Optimized GeoTIFF is made; its default is a share of the machine's memory."""

LEAST_SHARE = 0.01
"""Free space that an output needs at the least, as a share of its bytes before compression: no class map that was
seen here compresses a hundred times. What is refused by it could not have been written."""


def check_output(path: Path, *, source: str, overwrite: bool) -> None:
    """Everything that can be known before work starts.

    Raises OutputExistsError, MissingFileError for its folder, UsageError where it is the source itself or a folder,
    RasterError for a folder that cannot be written to.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file to write")
    if (file := local_file(source)) and path.exists() and path.samefile(file):
        raise UsageError(f"the output is the scene itself: {path}; give another name with --output")
    if not path.parent.is_dir():
        raise MissingFileError(f"no such folder: {path.parent}")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; give --overwrite (in Python overwrite=True) to replace it")
    if not os.access(path.parent, os.W_OK):
        raise RasterError(f"cannot write to the folder {path.parent}")


def check_space(folder: Path, raw_bytes: int) -> None:
    """Raise RasterError where a disk cannot take outputs of so many bytes before compression, however well they fit."""
    least, free = int(LEAST_SHARE * raw_bytes) + (1 << 20), shutil.disk_usage(folder).free
    if free < least:
        raise RasterError(
            f"the disk of {folder} is full: {free / 1e6:,.1f} MB are free, the outputs take {least / 1e6:,.1f} MB "
            "at the least; make room, or give another place with --output"
        )


class RasterWriter:
    """A uint8 raster on a scene's own grid, 255 where there is nothing; a context manager.

    With labels it is a class map: one band with colours and names, and beside it GDAL's sidecar (`.aux.xml`: names and
    attribute table) and a QGIS style (`.qml`). Without, it has a band per description, whose values times `scale` are
    what they stand for. side_tags: of a class map, tags that its own bytes shall not depend on: they stand in the
    sidecar, and GDAL shows them as any. cog: written as a Cloud Optimized GeoTIFF, with overviews. counts: pixels of
    each class, as they are in the end, of whoever counts them anyway. threads: how many compress blocks; the file is
    the same.

    Rows are handed over from top to bottom and kept until a row of blocks is whole, so that no block is written twice.
    Everything goes to `NAME.partial` and gets its name at the end of the `with` block; after an error nothing is left.
    Several writers end together by `finish` of all, then `publish` of all; `discard` in place of either.
    """

    driver: ClassVar[str] = "GTiff"

    def __init__(
        self,
        path: Path,
        *,
        like: Scene,
        labels: LabelMap | None = None,
        description: str | Sequence[str] = "class",
        scale: float | None = None,
        tags: Mapping[str, str] | None = None,
        side_tags: Mapping[str, str] | None = None,
        overwrite: bool = False,
        cog: bool = False,
        counts: np.ndarray | None = None,
        threads: int = 1,
    ) -> None:
        self.path, self.labels, self.cog, self.side_tags = path, labels, cog, side_tags
        for file in self.files_of(path, labels):
            for source in (like.path, *like.dataset.files):  # a VRT shows other files
                check_output(file, source=source, overwrite=overwrite)
        self.partial = path.with_name(path.name + ".partial")
        self.for_cog = path.with_name(path.name + ".tiled.partial")
        self.height, self.width = like.height, like.width
        descriptions = [description] if isinstance(description, str) else list(description)
        self.are_counted = counts is not None
        self.counts = np.zeros(256, np.int64) if counts is None else counts
        self.waiting: list[np.ndarray] = []
        self.waiting_rows = self.written_rows = 0
        self._closing = ExitStack()
        with self.cleaning_up():
            self.dataset = self._closing.enter_context(
                create_dataset(
                    self.for_cog if cog else self.partial, like, len(descriptions), driver=self.driver, threads=threads
                )
            )
            if labels is not None:
                self.dataset.write_colormap(1, color_table(labels))
            for band, text in enumerate(descriptions, 1):
                self.dataset.set_band_description(band, text)
            if labels is not None:
                self.dataset.update_tags(1, **{f"CLASS_{i}": name for i, name in enumerate(labels.names)})
            if scale is not None:
                self.dataset.scales = [scale] * len(descriptions)
            self.dataset.update_tags(**(tags or {}))

    @classmethod
    def create(cls, path: Path, **options: Any) -> Self:
        """The same as calling the class. Raises what `check_output` does, and RasterError where writing fails."""
        return cls(path, **options)

    @staticmethod
    def files_of(path: Path, labels: LabelMap | None) -> tuple[Path, ...]:
        """What is never written over unasked: the raster itself, and the style of a class map.

        Its `.aux.xml` belongs to the raster and goes with it.
        """
        return (path,) if labels is None else (path, style_path(path))

    def __enter__(self) -> Self:
        return self

    def write(self, rows: np.ndarray) -> None:
        """The next rows (rows, width) or (bands, rows, width), uint8."""
        rows = rows if rows.ndim == 3 else rows[None]
        assert rows.shape[::2] == (self.dataset.count, self.width), rows.shape
        if self.labels is not None and not self.are_counted:
            self.counts += np.bincount(rows.ravel(), minlength=256)
        self.waiting.append(rows)
        self.waiting_rows += rows.shape[1]
        while self.waiting_rows >= BLOCK:  # one by one: so the file is the same in however large parts the rows come
            self.flush(BLOCK)

    def flush(self, rows: int) -> None:
        """Write that many of the waiting rows."""
        waiting = np.concatenate(self.waiting, 1)
        with self.cleaning_up():
            self.dataset.write(waiting[:, :rows], window=Window(0, self.written_rows, self.width, rows))
        self.written_rows += rows
        self.waiting, self.waiting_rows = [waiting[:, rows:]], waiting.shape[1] - rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.discard()
            return
        self.finish()
        self.publish()

    @contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Remove what was begun when anything goes wrong inside, an interruption included."""
        try:
            yield
        except BaseException as error:
            self.discard()
            if isinstance(error, RasterioError | OSError | CPLE_BaseError):
                raise RasterError(f"cannot write {self.path}: {error.__cause__ or error}") from error
            raise

    def finish(self) -> None:
        """Write what is left, and see to it that the file is whole. It does not have its name yet."""
        if self.waiting_rows:
            self.flush(self.waiting_rows)
        with self.cleaning_up():
            assert self.written_rows == self.height, (self.written_rows, self.height)
            self._closing.close()
            if self.cog:
                check_whole(self.for_cog)
                copy_to_cog(self.for_cog, self.partial, resampling="average" if self.labels is None else "mode")
                remove_raster(self.for_cog)
            check_whole(self.partial)

    def publish(self) -> None:
        """Give the finished raster and what lies beside it their names, the raster last."""
        by_gdal = Path(f"{self.partial}.aux.xml")
        beside = {Path(f"{self.path}.aux.xml"): self.sidecar(by_gdal)}
        if self.labels is not None:
            beside[style_path(self.path)] = qgis_style(self.labels)
        with self.cleaning_up():
            give_name(self.partial, self.path, beside)
            # Of an older raster of that name.
            for leftover in (by_gdal, Path(f"{self.path}.ovr"), Path(f"{self.path}.msk")):
                leftover.unlink(missing_ok=True)

    def sidecar(self, by_gdal: Path) -> bytes | None:
        """GDAL's sidecar, with what GDAL itself has put into one: what GeoTIFF has no keys for."""
        if self.labels is not None:
            return aux_xml(self.labels, self.counts[: len(self.labels)].tolist(), by_gdal, self.side_tags)
        return by_gdal.read_bytes() if by_gdal.exists() else None

    def discard(self) -> None:
        """Close and remove what was not finished."""
        with suppress(RasterioError, OSError):  # the file is removed anyway; the first error is the one to tell
            self._closing.close()
        remove_raster(self.for_cog)
        remove_raster(self.partial)
        for path in (Path(f"{self.path}.aux.xml"), style_path(self.path)):
            with suppress(OSError):
                Path(f"{path}.partial").unlink(missing_ok=True)


def give_name(partial: Path, path: Path, beside: Mapping[Path, bytes | None]) -> None:
    """Rename a finished file, after what lies beside it (None: nothing) was written; that is undone where it fails."""
    before = {file: file.read_bytes() if file.exists() else None for file in beside}
    try:
        for file, content in beside.items():
            put(file, content)
        partial.replace(path)
    except BaseException:
        for file, content in before.items():
            put(file, content)
        raise


def put(path: Path, content: bytes | None) -> None:
    """Make a small file what it shall be, all of it or nothing; None: let it not be there."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_whole(path, content)


def remove_raster(path: Path) -> None:
    """Remove a file that was not finished, and what GDAL has put beside it on the way."""
    for name in (path.name, *(path.name + end for end in (".aux.xml", ".ovr.tmp", ".msk.ovr.tmp"))):
        with suppress(OSError):
            path.with_name(name).unlink(missing_ok=True)


def create_dataset(
    path: Path, like: Scene, bands: int = 1, *, driver: str = "GTiff", threads: int = 1
) -> rasterio.io.DatasetWriter:
    """An empty uint8 raster with the grid of a scene: a tiled, compressed GeoTIFF, or a VRT that shows nothing yet.

    Its profile is made here, never copied.
    """
    gcps, gcps_crs = like.gcps
    georeference = {"crs": like.crs} | ({} if like.transform.is_identity else {"transform": like.transform})
    layout: dict[str, Any] = {
        "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "bigtiff": "if_safer",
        # Bands are written, and looked at, one by one; and blocks of many bands would pile up in GDAL's cache.
        **({"interleave": "band"} if bands > 1 else {}),
        **({"num_threads": threads} if threads > 1 else {}),
    }  # fmt: skip
    with quietly:
        dataset = rasterio.open(
            path,
            "w",
            driver=driver,
            dtype="uint8",
            count=bands,
            height=like.height,
            width=like.width,
            nodata=NODATA,
            **(layout if driver == "GTiff" else {}),
            **(georeference if not gcps else {}),
        )
    if gcps:
        dataset.gcps = (gcps, gcps_crs)
    if like.rpcs is not None:
        dataset.rpcs = like.rpcs
    return dataset


def copy_to_cog(tiled: Path, path: Path, *, resampling: str) -> None:
    """A tiled GeoTIFF as a Cloud Optimized one with overviews, by GDAL's own driver."""
    options = {"compress": "DEFLATE", "predictor": "NO", "blocksize": "512", "bigtiff": "IF_SAFER"}
    with quietly, rasterio.Env(GDAL_CACHEMAX=COG_CACHE_BYTES, CPL_TMPDIR=str(path.parent)):
        rasterio.shutil.copy(tiled, path, driver="COG", overview_resampling=resampling, **options)


def color_table(labels: LabelMap) -> dict[int, tuple[int, int, int, int]]:
    """Pixel value -> red, green, blue, alpha. Nodata is transparent."""
    return {i: (*color, 255) for i, color in enumerate(labels.colors)} | {NODATA: (0, 0, 0, 0)}


def check_whole(path: Path) -> None:
    """Raise where the closed file lost its end: GDAL flushes on closing, and a full disk then only logs an error."""
    with quietly, rasterio.open(path) as dataset:
        last = Window(0, max(0, dataset.height - 1), dataset.width, 1)
        if dataset.read(window=last).shape[2] != dataset.width:
            raise OSError(errno.EIO, "the last row is missing")
