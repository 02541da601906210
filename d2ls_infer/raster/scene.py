"""A raster to be mapped: its bands, how its values are scaled, and which of its pixels are valid."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import rasterio
from rasterio import warp
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.env import get_gdal_config, set_gdal_config
from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.io import MemoryFile
from rasterio.windows import Window

from d2ls_infer.errors import MissingFileError, RasterError, UsageError
from d2ls_infer.tiling import Tile, TileGrid

PERCENTILE_SIDE = 1024
"""Percentiles of a scene are taken from a copy thinned to at most this many rows and columns."""


STRICT = {"GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_PNG_WHOLE_IMAGE_OPTIM": False}
"""GDAL's settings to open and to read with. Without them truncated JPEG data come out as grey, with a warning only, and
a truncated PNG that is read whole comes out as noise, without one."""

WGS84_A = 6_378_137.0
WGS84_E2 = 6.694379990141e-3


@dataclass(frozen=True)
class Scale:
    """How raw values become the model's: `low`..`high` goes to the ends of its value range, what is outside is clipped.

    kind "values": low and high are raw values; "percentiles": percentiles of each band's valid pixels in the scene.
    """

    low: float
    high: float
    kind: Literal["values", "percentiles"] = "values"

    def __post_init__(self) -> None:
        if not self.low < self.high or not np.isfinite([self.low, self.high]).all():
            raise UsageError(f"a scale goes from a lower to a higher number, got {self.low:g},{self.high:g}")
        if self.kind == "percentiles" and not (self.low >= 0 and self.high <= 100):
            raise UsageError(f"percentiles lie between p0 and p100, got {self.low:g},{self.high:g}")

    def __str__(self) -> str:
        mark = "p" if self.kind == "percentiles" else ""
        return ",".join(mark + (f"{v:g}" if float(f"{v:g}") == v else repr(v)) for v in (self.low, self.high))


class Pixels(NamedTuple):
    """A piece of a scene. values: (bands, h, w), uint8 or float32; valid: (h, w) bool."""

    values: np.ndarray
    valid: np.ndarray


class Scene:
    """A raster opened for a model of `bands_needed` bands; a context manager.

    Values come as (bands, rows, cols): uint8 as it is in the file, every other type as float32. With a `scale`, or a
    type other than uint8, they are brought into `value_range` (low, high) and clipped; without a value range they stay
    as they are. Invalid pixels hold the low end of the value range (0 without one).

    Invalid is what the file's nodata value, mask or alpha band says (a pixel is valid where any chosen band is), and
    any pixel that is not a finite number. An alpha band is a mask, unless the model needs it as data: 4-band images
    of which the fourth is near infrared are often tagged that way.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        bands_needed: int,
        bands: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
        scale: Scale | None = None,
    ) -> None:
        self.path = str(path)
        self.value_range = value_range
        self.scale = scale
        self.clipped_values = 0
        self.seen_values = 0
        with ExitStack() as stack:
            self.dataset = stack.enter_context(open_dataset(self.path))
            self.bands = choose_bands(self.dataset, bands_needed, bands)
            self.dtype = common_dtype(self.path, [self.dataset.dtypes[band - 1] for band in self.bands])
            self.cache_bytes = cache_bytes(self.dataset, self.dtype)
            self.alpha_bands = [
                band
                for band in self.dataset.indexes
                if self.dataset.colorinterp[band - 1] == ColorInterp.alpha and band not in self.bands
            ]
            self.as_it_is = self.dtype == np.uint8 and scale is None
            self.raw_limits = self.find_limits(scale)
            self._closing = stack.pop_all()

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> Self:
        """The same as calling the class.

        Raises MissingFileError; UsageError for what is not a raster, too few bands, bands it does not have, values
        that are not real numbers; RasterError where reading fails.
        """
        return cls(path, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._closing.close()

    @property
    def height(self) -> int:
        return int(self.dataset.height)

    @property
    def width(self) -> int:
        return int(self.dataset.width)

    def band_marks(self) -> list[str]:
        """What the file says each chosen band shows: red, green, blue, alpha, gray, undefined, ..."""
        return [self.dataset.colorinterp[band - 1].name for band in self.bands]

    def row_areas_m2(self) -> np.ndarray | None:
        """(height,) square metres of a pixel of each row; None without a coordinate system or a transform.

        A projection that is true to a hundredth is taken at its word, by the transform. Of others (Mercator, and
        degrees), pixel sides are taken to longitude and latitude, and to metres by the ellipsoid's radii there.
        """
        crs, transform = self.dataset.crs, self.dataset.transform
        if not crs or transform.is_identity or not (crs.is_projected or crs.is_geographic):
            return None
        # Sides of about 100 units: of a few centimetres, the rounding of a map projection would be seen.
        side = 100 / abs(transform.determinant) ** 0.5 if crs.is_projected else 1.0
        row, col = np.arange(self.height) + 0.5, np.full(self.height, self.width / 2)
        rows = np.concatenate([row, row, row - side / 2, row + side / 2])
        cols = np.concatenate([col - side / 2, col + side / 2, col, col])
        east = transform.a * cols + transform.b * rows + transform.c
        north = transform.d * cols + transform.e * rows + transform.f
        lon, lat = (np.asarray(v).reshape(4, -1) for v in warp.transform(crs, "EPSG:4326", east, north))
        curvature = 1 - WGS84_E2 * np.sin(phi := np.radians(lat.mean(0))) ** 2
        meridian, normal = WGS84_A * (1 - WGS84_E2) / curvature**1.5, WGS84_A / np.sqrt(curvature)
        d_lon = (np.stack([lon[1] - lon[0], lon[3] - lon[2]]) + 180) % 360 - 180  # across the date line too
        x = np.radians(d_lon) * normal * np.cos(phi)
        y = np.radians(np.stack([lat[1] - lat[0], lat[3] - lat[2]])) * meridian
        areas: np.ndarray = np.abs(x[0] * y[1] - x[1] * y[0]) / side**2
        if crs.is_projected:
            planar = np.full(self.height, abs(transform.determinant) * crs.linear_units_factor[1] ** 2)
            if not np.isfinite(areas).all() or np.allclose(areas, planar, rtol=0.01):
                return planar
        return areas if np.isfinite(areas).all() else None

    @property
    def clipped_share(self) -> float:
        """Which share of the valid values read so far lay outside the scale and were clipped."""
        return self.clipped_values / self.seen_values if self.seen_values else 0.0

    def tiles(self, grid: TileGrid) -> Iterator[tuple[Tile, Pixels]]:
        """The pixels of each tile of the grid, row by row. Every row of the raster is read once."""
        values = np.zeros((len(self.bands), grid.tile_height, self.width), np.uint8 if self.as_it_is else np.float32)
        valid = np.zeros((grid.tile_height, self.width), bool)
        read_to = 0
        tiles = iter(grid)
        for row in grid.row_starts:
            kept = read_to - row
            if kept > 0:  # the overlap with the row of tiles above
                values[:, :kept] = values[:, -kept:].copy()
                valid[:kept] = valid[-kept:].copy()
            kept = max(kept, 0)
            values[:, kept:], valid[kept:] = self.rows(row + kept, row + grid.tile_height)
            read_to = row + grid.tile_height
            for col in grid.col_starts:
                cols = slice(col, col + grid.tile_width)
                yield next(tiles), Pixels(values[:, :, cols].copy(), valid[:, cols].copy())

    def rows(self, start: int, stop: int) -> Pixels:
        """Rows `start` to `stop`, scaled. Raises RasterError that names the rows where the file cannot be read."""
        window = Window(0, start, self.width, stop - start)
        with reading(f"{self.path}, rows {start} to {stop - 1}", self.cache_bytes):
            raw = self.read_raw(window=window)
            valid = self.read_valid(raw, window=window)
        return Pixels(self.scaled(raw, valid), valid)

    def read_raw(self, **where: Any) -> np.ndarray:
        """(bands, h, w) as in the file; rasterio itself does not read bands of several types at once."""
        if len({self.dataset.dtypes[band - 1] for band in self.bands}) == 1:
            return np.asarray(self.dataset.read(self.bands, **where))
        return np.stack([self.dataset.read(band, **where).astype(self.dtype) for band in self.bands])

    def read_valid(self, raw: np.ndarray, **where: Any) -> np.ndarray:
        """(h, w) bool: which pixels of the raw values (bands, h, w), read with the same arguments, are valid."""
        valid = np.ones(raw.shape[1:], bool)
        if self.uses_mask():
            valid = np.any([self.dataset.read_masks(band, **where) > 0 for band in self.bands], axis=0)
        for band in self.alpha_bands:
            valid &= self.dataset.read(band, **where) > 0
        if raw.dtype.kind == "f":
            with np.errstate(over="ignore"):
                valid &= np.isfinite(raw.astype(np.float32) if self.value_range is None else raw).all(axis=0)
        return valid

    def uses_mask(self) -> bool:
        """Whether the file marks invalid pixels by anything but a band that is read as data."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NodataShadowWarning)
            flags = {flag for band in self.bands for flag in self.dataset.mask_flag_enums[band - 1]}
        return not flags & {MaskFlags.all_valid, MaskFlags.alpha}

    def find_limits(self, scale: Scale | None) -> tuple[np.ndarray, np.ndarray] | None:
        """The raw values (bands, 1, 1) that go to the ends of the value range; None where nothing is scaled."""
        if self.as_it_is or self.value_range is None:
            if scale is not None:
                raise UsageError("a scale needs a model that states its value range")
            return None
        low, high = self.value_range if scale is None else (scale.low, scale.high)
        if scale is None or scale.kind == "values":
            limits = np.full((2, len(self.bands)), [[low], [high]])
        else:
            limits = self.percentiles(low, high)
        return limits[0][:, None, None], limits[1][:, None, None]

    def percentiles(self, low: float, high: float) -> np.ndarray:
        """(2, bands): the two percentiles of each band over a thinned copy's valid pixels."""
        shape = (min(self.height, PERCENTILE_SIDE), min(self.width, PERCENTILE_SIDE))
        options = {"out_shape": shape, "resampling": Resampling.nearest}
        with reading(self.path, self.cache_bytes):
            raw = np.stack([self.dataset.read(band, **options).astype(self.dtype) for band in self.bands])
            valid = self.read_valid(raw, **options)
        if not valid.any():
            return np.full((2, len(self.bands)), [[0.0], [1.0]])
        limits: np.ndarray = np.percentile(raw[:, valid].astype(np.float64), [low, high], axis=1)
        limits[1] = np.where(limits[1] > limits[0], limits[1], limits[0] + 1)  # a constant band has no spread
        return limits

    def scaled(self, raw: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Raw values (bands, h, w) -> the model's, with invalid pixels filled."""
        fill = self.value_range[0] if self.value_range else 0
        if self.raw_limits is None:
            with np.errstate(over="ignore", invalid="ignore"):
                values = raw.astype(np.uint8 if self.as_it_is else np.float32)
        else:
            assert self.value_range is not None
            (low, high), (start, stop) = self.raw_limits, self.value_range
            with np.errstate(over="ignore", invalid="ignore"):  # invalid pixels may hold anything
                self.clipped_values += int((((raw < low) | (raw > high)) & valid).sum())
                self.seen_values += int(valid.sum()) * len(raw)
                share = (np.clip(raw.astype(np.float64), low, high) - low) / (high - low)
            values = (start + share * (stop - start)).astype(np.float32)
        values[:, ~valid] = fill
        return values


@contextmanager
def reading(what: str, cache_bytes: int | None = None) -> Iterator[None]:
    """Turn rasterio's errors into a RasterError that says what was being read."""
    before = get_gdal_config("GDAL_CACHEMAX")  # belongs to the process, and Env does not set it back
    settings = {} if cache_bytes is None else {"GDAL_CACHEMAX": cache_bytes}
    try:
        with warnings.catch_warnings(), rasterio.Env(**STRICT, **settings):
            warnings.simplefilter("ignore", NodataShadowWarning)
            yield
    except RasterioError as error:
        # rasterio says only where to look; GDAL's own words are in the error behind it.
        reason = error.__cause__ or error
        raise RasterError(f"cannot read {what}: {reason}") from error
    finally:
        set_gdal_config("GDAL_CACHEMAX", before)


@contextmanager
def open_dataset(path: str) -> Iterator[Any]:
    """rasterio's dataset of a file or any other address that GDAL takes."""
    try:
        with warnings.catch_warnings(), rasterio.Env(**STRICT):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain images are welcome
            dataset = rasterio.open(path)
    except RasterioIOError as error:
        if "://" not in path and not path.startswith("/vsi") and not Path(path).exists():
            raise MissingFileError(f"no such file: {path}") from error
        raise UsageError(f"{path} is not a raster that GDAL can open: {error}") from error
    with closing(dataset):  # its own context manager belongs to a thread
        yield dataset


def cache_bytes(dataset: Any, dtype: np.dtype[Any]) -> int:
    """Bytes of GDAL's block cache: two rows of blocks, so that rows that end inside a block do not decode it twice.

    GDAL's own default, a share of the machine's memory, would fill up with blocks that are never asked for again.
    """
    block_rows = max(int(rows) for rows, _ in dataset.block_shapes)
    row_bytes = int(dataset.width) * int(dataset.count) * dtype.itemsize
    return max(32 << 20, min(256 << 20, 2 * block_rows * row_bytes))


def choose_bands(dataset: Any, needed: int, wanted: Sequence[int] | None) -> list[int]:
    """The bands to read, counted from 1: the wanted ones, or the first `needed` that are not an alpha band.

    Raises UsageError for a number of bands the model does not take, or one the file does not have.
    """
    what = f"{dataset.name} has {dataset.count} band" + ("s" if dataset.count != 1 else "")
    if wanted is not None:
        if len(wanted) != needed:
            raise UsageError(f"the model takes {needed} bands, but --bands names {len(wanted)}")
        if missing := [band for band in wanted if not 1 <= band <= dataset.count]:
            raise UsageError(f"{what}, there is no band {missing[0]}; bands are counted from 1")
        return list(wanted)
    bands = [band for band in dataset.indexes if dataset.colorinterp[band - 1] != ColorInterp.alpha]
    if len(bands) < needed:
        bands = list(dataset.indexes)
    if len(bands) < needed:
        hint = " (a palette; expand it to RGB first)" if ColorInterp.palette in dataset.colorinterp else ""
        raise UsageError(f"{what}{hint}, but the model needs {needed}")
    return bands[:needed]


def common_dtype(path: str, names: Sequence[str]) -> np.dtype[Any]:
    """The type that holds the values of all bands. Raises UsageError for complex values."""
    if any("complex" in name for name in names):
        raise UsageError(f"{path} has complex values ({', '.join(sorted(set(names)))}); real numbers are needed")
    return np.result_type(*names)


def read_array(path: str | Path) -> np.ndarray:
    """(bands, H, W) of a whole raster, as it is in the file."""
    with open_dataset(str(path)) as dataset, reading(str(path)):
        array: np.ndarray = dataset.read()
        return array


def png_bytes(picture: np.ndarray) -> bytes:
    """A (1 or 3, h, w) uint8 picture as the bytes of a PNG file."""
    bands, height, width = picture.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with MemoryFile() as memory:
            with memory.open(driver="PNG", dtype="uint8", count=bands, height=height, width=width) as dataset:
                dataset.write(picture)
            return bytes(memory.read())


def parse_bands(text: str) -> list[int]:
    """ "4,1,2" -> [4, 1, 2]. Raises UsageError for anything but whole numbers from 1."""
    try:
        bands = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"bands are whole numbers with commas between, such as 1,2,3; got {text!r}") from error
    if min(bands) < 1:
        raise UsageError(f"bands are counted from 1, got {text!r}")
    return bands


def parse_scale(text: str) -> Scale:
    """ "0,10000" -> raw values, "p2,p98" -> percentiles of the scene. Raises UsageError for anything else."""
    kind: Literal["values", "percentiles"] = "percentiles" if "p" in text else "values"
    parts = [part.strip() for part in text.split(",")]
    if kind == "percentiles" and all(part.startswith("p") for part in parts):
        parts = [part[1:] for part in parts]
    try:
        low, high = (float(part) for part in parts)
    except ValueError as error:
        raise UsageError(f"a scale is MIN,MAX such as 0,10000, or percentiles such as p2,p98; got {text!r}") from error
    try:
        return Scale(low, high, kind)
    except UsageError as error:
        raise UsageError(f"{error} ({text!r})") from error
