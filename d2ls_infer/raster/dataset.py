"""GDAL's datasets: opened with the settings that find damage, errors in our words."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.env import get_gdal_config, set_gdal_config
from rasterio.errors import CRSError, NodataShadowWarning, NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.io import MemoryFile

from d2ls_infer.errors import MissingFileError, RasterError, UsageError

STRICT = {"GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_PNG_WHOLE_IMAGE_OPTIM": False}
"""GDAL's settings to open and to read with. Without them truncated JPEG data come out as grey, with a warning only, and
a truncated PNG that is read whole comes out as noise, without one."""

REMOTE = {"GDAL_HTTP_MAX_RETRY": 3, "GDAL_HTTP_RETRY_DELAY": 1}
REMOTE_GEOTIFF = REMOTE | {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
"""A GeoTIFF on a server is taken to be whole in itself: GDAL would ask for forty sidecars, one request each."""


def is_remote(path: str) -> bool:
    """Whether a name is an address that is no file of this machine's own: a URL, or one of GDAL's /vsi..."""
    return "://" in path or path.startswith("/vsi")


def is_address(path: str) -> bool:
    """Whether a name is something that only GDAL understands: remote, or a part of a file (`NETCDF:"a.nc":red`)."""
    return is_remote(path) or re.match(r"[A-Za-z][A-Za-z0-9_]+:.", path) is not None


def local_file(path: str | Path) -> Path | None:
    """The file of that name, where there is one. Addresses may be longer than any file's name."""
    try:
        return Path(path) if Path(path).exists() else None
    except (OSError, ValueError):
        return None


def settings_for(path: str) -> dict[str, Any]:
    """GDAL's settings for a raster, but for those that the user has set in the environment."""
    if not is_remote(path):
        return {}
    is_geotiff = PurePosixPath(urlsplit(path).path).suffix.lower() in (".tif", ".tiff")
    settings = REMOTE_GEOTIFF if is_geotiff else REMOTE
    return {name: value for name, value in settings.items() if name not in os.environ}


@contextmanager
def reading(what: str, **settings: Any) -> Iterator[None]:
    """Turn rasterio's errors into a RasterError that says what was being read. settings: of GDAL, beyond `STRICT`."""
    try:
        with quietly, rasterio.Env(**STRICT, **settings):
            yield
    except RasterioError as error:
        # rasterio says only where to look; GDAL's own words are in the error behind it.
        reason = error.__cause__ or error
        raise RasterError(f"cannot read {what}: {reason}") from error


class Quietly:
    """Without rasterio's warnings, and with GDAL's cache set back to its size, which `rasterio.Env` leaves.

    Both belong to all threads of the process: they are as they were after the last one that is in here.
    """

    def __init__(self) -> None:
        self.alone, self.inside, self.before = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.alone:
            self.inside += 1
            if self.inside == 1:
                self.before.callback(set_gdal_config, "GDAL_CACHEMAX", get_gdal_config("GDAL_CACHEMAX"))
                self.before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", NodataShadowWarning)
                warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain images are welcome

    def __exit__(self, *_: object) -> None:
        with self.alone:
            self.inside -= 1
            if self.inside == 0:
                self.before.close()


quietly = Quietly()


@contextmanager
def open_dataset(path: str) -> Iterator[Any]:
    """rasterio's dataset of a file or any other address that GDAL takes.

    A container of one raster (netCDF, HDF5, Zarr) is that raster; of several, it is asked which. Raises
    MissingFileError, UsageError for what is no raster or has no bands, RasterError where a server does not answer, and
    where PROJ has no database.
    """
    dataset = open_quietly(path)
    if dataset.count == 0 and len(dataset.subdatasets) == 1:
        dataset = open_quietly(dataset.subdatasets[0])
    with closing(dataset):  # its own context manager belongs to a thread
        if dataset.count == 0:
            parts = [part.replace('"', "") for part in dataset.subdatasets]
            holds = f"; it holds {len(parts)} rasters, name one of them: {', '.join(parts)}" if parts else ""
            raise UsageError(f"{path} has 0 bands of its own{holds}")
        check_size(dataset)
        if dataset.crs or dataset.gcps[0]:
            check_proj()
        yield dataset


def open_quietly(path: str) -> Any:
    """rasterio's dataset, without a word where it is a plain image."""
    try:
        with quietly, rasterio.Env(**STRICT, **settings_for(path)):
            return rasterio.open(path)
    except RasterioIOError as error:
        if is_remote(path) and re.search("HTTP|CURL|not exist", str(error)):
            raise RasterError(f"cannot open {path}: {error}") from error
        if not is_address(path) and local_file(path) is None:
            raise MissingFileError(f"no such file: {path}") from error
        inside = f"; name the raster in it: /vsizip/{path}/NAME.tif" if path.lower().endswith(".zip") else ""
        raise UsageError(f"{path} is not a raster that GDAL can open: {error}{inside}") from error


def check_size(dataset: Any) -> None:
    """Raise RasterError for a file that is shorter than the values it should hold, of formats that do not mind.

    From what is missing of a plain ENVI, PCIDSK or classic netCDF file, GDAL reads zeros or noise, without a word.
    """
    if dataset.driver not in ("ENVI", "PCIDSK", "netCDF") or not dataset.files:
        return
    file, about = local_file(dataset.files[0]), dataset.tags(ns="IMAGE_STRUCTURE") | dataset.tags(ns="ENVI")
    if file is None or about.get("INTERLEAVE") == "TILED" or about.get("file_compression", "0") != "0":
        return
    with file.open("rb") as content:
        if dataset.driver == "netCDF" and content.read(3) != b"CDF":
            return  # HDF5 knows its own length
    sizes = (4 if name == "complex_int16" else np.dtype(name).itemsize for name in dataset.dtypes)
    needed, found = dataset.height * dataset.width * sum(sizes), file.stat().st_size
    if found < needed:
        raise RasterError(f"cannot read {dataset.name}: {file} ends early, it has {found} bytes of {needed} or more")


def check_proj() -> None:
    """Raise RasterError where PROJ does not find its database, and nothing can be known of coordinate systems."""
    try:
        CRS.from_epsg(4326)
    except CRSError as error:
        named = [name for name in ("PROJ_DATA", "PROJ_LIB") if name in os.environ]
        hint = f"; the environment's {' and '.join(named)} may be another program's, unset it" if named else ""
        raise RasterError(f"coordinate systems are not known: {error}{hint}") from error


def cache_bytes(dataset: Any, dtype: np.dtype[Any]) -> int:
    """Bytes of GDAL's block cache: two rows of blocks, so that rows that end inside a block do not decode it twice.

    A third is for the blocks of the map. GDAL's own default, a share of the machine's memory, would fill up with blocks
    that are never asked for again.
    """
    block_rows = max(int(rows) for rows, _ in dataset.block_shapes)
    row_bytes = int(dataset.width) * int(dataset.count) * dtype.itemsize
    least = 8 << 20 if dataset.driver == "GTiff" else 32 << 20  # others, such as VRT, may have rasters behind them
    return max(least, min(256 << 20, 3 * block_rows * row_bytes))


def read_array(path: str | Path) -> np.ndarray:
    """(bands, H, W) of a whole raster, as it is in the file."""
    with open_dataset(str(path)) as dataset, reading(str(path)):
        array: np.ndarray = dataset.read()
        return array


def png_bytes(picture: np.ndarray) -> bytes:
    """A (1, 3 or 4, h, w) uint8 picture as the bytes of a PNG file."""
    return encoded(picture, driver="PNG")


def jpeg_bytes(picture: np.ndarray) -> bytes:
    """A (3, h, w) uint8 picture as the bytes of a JPEG file."""
    return encoded(picture, driver="JPEG", quality=85)


def encoded(picture: np.ndarray, **profile: Any) -> bytes:
    """A uint8 picture as the bytes of a file of GDAL's."""
    bands, height, width = picture.shape
    with quietly, MemoryFile() as memory:
        with memory.open(dtype="uint8", count=bands, height=height, width=width, **profile) as dataset:
            dataset.write(picture)
        return bytes(memory.read())
