"""A raster to be mapped: its bands, how its values are scaled, and which of its pixels are valid."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.windows import Window

from d2ls_infer.errors import MissingFileError, RasterError, UsageError
from d2ls_infer.tiling import Tile, TileGrid

PERCENTILE_SIDE = 1024
"""Percentiles of a scene are taken from a copy thinned to at most this many rows and columns."""


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

    def __str__(self) -> str:
        mark = "p" if self.kind == "percentiles" else ""
        return f"{mark}{self.low:g},{mark}{self.high:g}"


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
            # Truncated JPEG data would otherwise come out as grey, with a warning only.
            stack.enter_context(rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING=True))
            self.dataset = stack.enter_context(open_dataset(self.path))
            self.bands = choose_bands(self.dataset, bands_needed, bands)
            self.dtype = common_dtype(self.path, [self.dataset.dtypes[band - 1] for band in self.bands])
            stack.enter_context(rasterio.Env(GDAL_CACHEMAX=cache_bytes(self.dataset, self.dtype)))
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

    def row_areas_m2(self) -> np.ndarray | None:
        """(height,) square metres of a pixel of each row; None without a coordinate system or a transform.

        From the transform for a projected system; for degrees from the ellipsoid's radii at the row's latitude.
        """
        crs, transform = self.dataset.crs, self.dataset.transform
        if not crs or transform.is_identity:
            return None
        area = abs(transform.determinant)
        if crs.is_projected:
            return np.full(self.height, area * crs.linear_units_factor[1] ** 2)
        if not crs.is_geographic:
            return None
        _, latitudes = transform * (np.full(self.height, self.width / 2), np.arange(self.height) + 0.5)
        phi = np.radians(latitudes)
        curvature = 1 - WGS84_E2 * np.sin(phi) ** 2
        meridian, normal = WGS84_A * (1 - WGS84_E2) / curvature**1.5, WGS84_A / np.sqrt(curvature)
        areas: np.ndarray = area * np.radians(1) ** 2 * meridian * normal * np.cos(phi)
        return areas

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
        with reading(f"{self.path}, rows {start} to {stop - 1}"):
            raw = self.dataset.read(self.bands, window=window)
            valid = self.read_valid(raw, window=window)
        return Pixels(self.scaled(raw, valid), valid)

    def read_valid(self, raw: np.ndarray, **where: Any) -> np.ndarray:
        """(h, w) bool: which pixels of the raw values (bands, h, w), read with the same arguments, are valid."""
        valid = np.ones(raw.shape[1:], bool)
        if self.uses_mask():
            valid = (self.dataset.read_masks(self.bands, **where) > 0).any(axis=0)
        if raw.dtype.kind == "f":
            valid &= np.isfinite(raw).all(axis=0)
        return valid

    def uses_mask(self) -> bool:
        """Whether the file marks invalid pixels by anything but a band that is read as data."""
        flags = {flag for band in self.bands for flag in self.dataset.mask_flag_enums[band - 1]}
        alpha_is_data = any(self.dataset.colorinterp[band - 1] == ColorInterp.alpha for band in self.bands)
        return MaskFlags.all_valid not in flags and not (MaskFlags.alpha in flags and alpha_is_data)

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
        options = {"out_shape": (len(self.bands), *shape), "resampling": Resampling.nearest}
        with reading(self.path):
            raw = self.dataset.read(self.bands, **options)
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
def reading(what: str) -> Iterator[None]:
    """Turn rasterio's errors into a RasterError that says what was being read."""
    try:
        yield
    except RasterioError as error:
        # rasterio says only where to look; GDAL's own words are in the error behind it.
        reason = error.__cause__ or error
        raise RasterError(f"cannot read {what}: {reason}") from error


@contextmanager
def open_dataset(path: str) -> Iterator[Any]:
    """rasterio's dataset of a file or any other address that GDAL takes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain images are welcome
            dataset = rasterio.open(path)
    except RasterioIOError as error:
        if "://" not in path and not path.startswith("/vsi") and not Path(path).exists():
            raise MissingFileError(f"no such file: {path}") from error
        raise UsageError(f"{path} is not a raster that GDAL can open: {error}") from error
    with dataset:
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
    with rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING=True), open_dataset(str(path)) as dataset, reading(str(path)):
        array: np.ndarray = dataset.read()
        return array


def parse_bands(text: str) -> list[int]:
    """ "4,1,2" -> [4, 1, 2]. Raises UsageError for anything but whole numbers from 1, or a band named twice."""
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
    if not low < high or not np.isfinite([low, high]).all():
        raise UsageError(f"a scale goes from a lower to a higher number, got {text!r}")
    if kind == "percentiles" and not (low >= 0 and high <= 100):
        raise UsageError(f"percentiles lie between p0 and p100, got {text!r}")
    return Scale(low, high, kind)
