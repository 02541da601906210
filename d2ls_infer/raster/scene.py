"""A raster to be mapped: its bands, how its values are scaled, and which of its pixels are valid."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.windows import Window

from d2ls_infer.errors import UsageError
from d2ls_infer.raster import ground
from d2ls_infer.raster.bands import band_marks, choose_bands
from d2ls_infer.raster.cut import Cut, moved
from d2ls_infer.raster.dataset import cache_bytes, open_dataset, quietly, reading, settings_for
from d2ls_infer.raster.scale import Scale
from d2ls_infer.tiling import Rows, Tile, TileGrid

PERCENTILE_SIDE = 1024
"""Percentiles of a scene are taken from a copy thinned to at most this many rows and columns."""

BYTE_SPAN = 255
"""A value range at least this wide counts stored numbers (0 to 255, reflectance times 10000), a narrower one is in
physical units (reflectance from 0 to 1, decibels)."""

READ_BYTES = 16 << 20
"""What the rows that are read at a time may take as float64, in which they are scaled."""

ALL = slice(None)

ROUNDING = 1e-6
"""So little beyond the end of a range, as a share of it, is no clipping."""


class Pixels(NamedTuple):
    """A piece of a scene. values: (bands, h, w), uint8 or float32; valid: (h, w) bool."""

    values: np.ndarray
    valid: np.ndarray


class Scene:
    """A raster opened for a model of `bands_needed` bands, or a part of one; a context manager.

    Which bands those are: see `choose_bands`; `band_names` are the model's.

    Values come as (bands, rows, cols): uint8 as it is in the file, every other type as float32. With a `scale`, or a
    type other than uint8, they are brought into `value_range` (low, high) and clipped; without a value range they stay
    as they are. A `scale` speaks of the values in the file. Without one, the bands' scale and offset tags are applied
    if the model's range is in physical units, that is less than 255 wide: a file of reflectance times 10000 that says
    so goes into a model of 0 to 1 as it should. A range as wide as 255 counts the stored numbers, and so do we.
    Invalid pixels hold the low end of the value range (0 without one).

    Invalid is what the file's nodata value, mask or alpha band says (a pixel is valid where any chosen band is), and
    any pixel that is not a finite number. A `nodata` value stands in for the file's own; "none" makes every finite
    number valid, whatever the file says. An alpha band is a mask, unless the model needs it as data or it holds an
    image: 4-band images of which the fourth is near infrared are often tagged that way. Of a `cut`, what lies outside
    its polygons is invalid too.

    height, width, transform and whatever else is said of the scene is that of the part that was cut out of it. Only
    percentiles are those of the whole raster, so that a part comes out as it would in the whole.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        bands_needed: int,
        bands: Sequence[int | str] | None = None,
        band_names: Sequence[str] | None = None,
        value_range: tuple[float, float] | None = None,
        scale: Scale | None = None,
        nodata: float | Literal["none"] | None = None,
        cut: Cut | None = None,
    ) -> None:
        if not isinstance(path, str | PathLike):
            raise UsageError(f"a scene is given by its path or address, got {type(path).__name__}")
        self.path = str(path)
        self.value_range, self.scale, self.nodata = value_range, scale, nodata
        self.clipped_values = 0
        self.seen_values = 0
        self.counted_rows = ALL  # of which rows values are counted
        with ExitStack() as stack:
            self.dataset = stack.enter_context(open_dataset(self.path))
            self.settings = settings_for(self.path)
            with reading(self.path, **self.settings):
                self.marks = band_marks(self.dataset, band_names or ())
            self.bands = choose_bands(self.dataset, bands_needed, self.marks, wanted=bands, names=band_names)
            self.dtype = common_dtype(self.path, [self.dataset.dtypes[band - 1] for band in self.bands])
            check_nodata(nodata, self.dtype)
            self.part = (cut or Cut()).on(self.dataset)
            self.settings["GDAL_CACHEMAX"] = cache_bytes(self.dataset, self.dtype)
            self.alpha_bands = [n for n in self.dataset.indexes if self.marks[n - 1] == "alpha" and n not in self.bands]
            self.not_alpha = [
                n
                for n, (colour, mark) in enumerate(zip(self.dataset.colorinterp, self.marks, strict=True), 1)
                if colour == ColorInterp.alpha and not mark and n not in self.bands
            ]
            self.band_units = self.find_units() if scale is None else None
            self.as_it_is = self.dtype == np.uint8 and scale is None and self.band_units is None
            self.raw_limits = self.find_limits(scale)
            self._closing = stack.pop_all()

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> Self:
        """The same as calling the class.

        Raises MissingFileError; UsageError for what is not a raster, too few bands, bands it does not have or that are
        for the user to tell, values that are not real numbers, a part that does not lie in it; RasterError where
        reading fails.
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

    def strip(self, first: int, last: int) -> Self:
        """The same scene, cut to its rows from `first` to `last`; it is open as long as this one is."""
        strip = copy.copy(self)
        strip.part = self.part._replace(row=self.part.row + first, height=last - first)
        return strip

    @property
    def height(self) -> int:
        return int(self.part.height)

    @property
    def width(self) -> int:
        return int(self.part.width)

    @property
    def crs(self) -> Any:
        return self.dataset.crs

    @property
    def transform(self) -> Affine:
        """From (column, row) of the part to the scene's coordinates; the identity where there is none."""
        whole: Affine = self.dataset.transform
        return whole if whole.is_identity else moved(whole, row=self.part.row, col=self.part.col)

    @property
    def gcps(self) -> tuple[list[GroundControlPoint], Any]:
        """Ground control points and their coordinate system."""
        points, crs = self.dataset.gcps
        row, col = self.part.row, self.part.col
        moved = [
            GroundControlPoint(point.row - row, point.col - col, point.x, point.y, point.z, point.id, point.info)
            for point in points
        ]
        return moved, crs

    @property
    def rpcs(self) -> Any:
        """Rational polynomial coefficients; None where there are none."""
        rpcs = copy.copy(self.dataset.rpcs)
        if rpcs is not None:
            rpcs.line_off -= self.part.row
            rpcs.samp_off -= self.part.col
        return rpcs

    @property
    def fill(self) -> float:
        """What invalid pixels hold."""
        return self.value_range[0] if self.value_range else 0.0

    @property
    def descriptions(self) -> list[str]:
        """What each of the file's bands is called in it; "" where it has no name."""
        return [text or "" for text in self.dataset.descriptions]

    def band_marks(self) -> list[str]:
        """What the file says each chosen band shows: red, near infrared, alpha, ...; "" where it says nothing."""
        return [self.marks[band - 1] for band in self.bands]

    def row_areas_m2(self) -> np.ndarray | None:
        """(height,) square metres of a pixel of each row; None without a place on the ground."""
        return ground.row_areas_m2(self.crs, self.transform, self.height, self.width)

    def pixel_size_m(self) -> tuple[float, float] | None:
        """Metres on the ground from row to row and from column to column in the scene's middle, else None."""
        return ground.pixel_size_m(self.crs, self.transform, self.height, self.width)

    def scaling(self) -> str:
        """In words: which raw values go to the ends of the value range, "as they are" where they keep theirs."""
        if self.raw_limits is None or self.value_range is None:
            return "as they are"
        pairs = zip(*(limits.ravel().tolist() for limits in self.raw_limits), strict=True)
        ranges = dict.fromkeys(f"{low:g} to {high:g}" for low, high in pairs)
        return f"{', '.join(ranges)} becomes {self.value_range[0]:g} to {self.value_range[1]:g}"

    @property
    def clipped_share(self) -> float:
        """Which share of the valid values read so far lay outside the scale and were clipped."""
        return self.clipped_values / self.seen_values if self.seen_values else 0.0

    def tiles(self, grid: TileGrid, tile_rows: slice = ALL) -> Iterator[tuple[Tile, Pixels]]:
        """The pixels of each tile of the grid, or of some rows of tiles, row by row. Every row is read once."""
        dtype = np.uint8 if self.as_it_is else np.float32
        return read_tiles(self.rows, grid, bands=len(self.bands), dtype=dtype, tile_rows=tile_rows)

    def restored(self, rows: Iterable[Rows], *, first_row: int = 0) -> Iterator[Rows]:
        """Finished rows of a field on the grid that `tiles` reads -> on the scene's own. Here they are one.

        first_row: of the scene; the rows above come too, but need not mean anything.
        """
        yield from rows

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The rows (first, one after the last) of the grid that `tiles` reads that these rows are made of."""
        return start, stop

    def rows(self, start: int, stop: int) -> Pixels:
        """Rows `start` to `stop`, scaled. Raises RasterError that names the rows where the file cannot be read."""
        raw, valid = self.piece(start, 0, stop - start, self.width)
        valid &= self.part.inside(self.transform, start, stop)
        low, high, _ = self.counted_rows.indices(self.height)
        return Pixels(self.scaled(raw, valid, slice(max(0, low - start), max(0, high - start))), valid)

    def piece(self, row: int, col: int, height: int, width: int) -> Pixels:
        """A rectangle of the part as it is in the file, and what is valid of it, whether inside its polygons or not."""
        first = self.part.row + row
        window = Window(self.part.col + col, first, width, height)
        with reading(f"{self.path}, rows {first} to {first + height - 1}", **self.settings):
            raw = self.read_raw(window=window)
            return Pixels(raw, self.read_valid(raw, window=window))

    def read_raw(self, **where: Any) -> np.ndarray:
        """(bands, h, w) as in the file; rasterio itself does not read bands of several types at once."""
        if len({self.dataset.dtypes[band - 1] for band in self.bands}) == 1:
            return np.asarray(self.dataset.read(self.bands, **where))
        return np.stack([self.dataset.read(band, **where).astype(self.dtype) for band in self.bands])

    def read_valid(self, raw: np.ndarray, **where: Any) -> np.ndarray:
        """(h, w) bool: which pixels of the raw values (bands, h, w), read with the same arguments, are valid."""
        valid = np.ones(raw.shape[1:], bool)
        if self.nodata != "none":
            if self.uses_mask():
                valid = np.any([self.dataset.read_masks(band, **where) > 0 for band in self.bands], axis=0)
            if self.nodata is not None:
                valid &= (raw != self.dtype.type(self.nodata)).any(axis=0)
            for band in self.alpha_bands:
                valid &= self.dataset.read(band, **where) > 0
        if raw.dtype.kind == "f":
            with np.errstate(over="ignore"):
                valid &= np.isfinite(raw.astype(np.float32) if self.value_range is None else raw).all(axis=0)
        return valid

    def is_full(self) -> bool:
        """Whether no pixel can be invalid, but for what lies outside of polygons."""
        unmarked = self.nodata == "none" or (self.nodata is None and not self.uses_mask() and not self.alpha_bands)
        return unmarked and self.dtype.kind != "f"

    def uses_mask(self) -> bool:
        """Whether the file marks invalid pixels by anything but a band that is read as data."""
        with quietly:
            flags = {flag for band in self.bands for flag in self.dataset.mask_flag_enums[band - 1]}
        replaced = self.nodata is not None and MaskFlags.nodata in flags
        return not flags & {MaskFlags.all_valid, MaskFlags.alpha} and not replaced

    def tagged_units(self) -> np.ndarray | None:
        """(2, bands): what the file's tags multiply stored values by, and what they add; None where that is 1 and 0."""
        units = np.array(
            [[tags[band - 1] for band in self.bands] for tags in (self.dataset.scales, self.dataset.offsets)]
        )
        told = np.isfinite(units).all(axis=0) & (units[0] != 0)
        units = np.where(told, units, [[1.0], [0.0]])
        return units if (units != [[1.0], [0.0]]).any() else None

    def find_units(self) -> np.ndarray | None:
        """The tagged units, of a model that was not trained on values as they are stored; None where none are used."""
        in_units = self.value_range is not None and self.value_range[1] - self.value_range[0] < BYTE_SPAN
        return self.tagged_units() if in_units else None

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
        if self.band_units is not None:
            limits = (limits - self.band_units[1]) / self.band_units[0]
        return limits[0][:, None, None], limits[1][:, None, None]

    def percentiles(self, low: float, high: float) -> np.ndarray:
        """(2, bands): the two percentiles of each band over a thinned copy's valid pixels."""
        shape = tuple(min(side, PERCENTILE_SIDE) for side in self.dataset.shape)
        options = {"out_shape": shape, "resampling": Resampling.nearest}
        with reading(self.path, **self.settings):
            raw = np.stack([self.dataset.read(band, **options).astype(self.dtype) for band in self.bands])
            valid = self.read_valid(raw, **options)
        if not valid.any():
            return np.full((2, len(self.bands)), [[0.0], [1.0]])
        limits: np.ndarray = np.percentile(raw[:, valid].astype(np.float64), [low, high], axis=1)
        limits[1] = np.where(limits[1] > limits[0], limits[1], limits[0] + 1)  # a constant band has no spread
        return limits

    def scaled(self, raw: np.ndarray, valid: np.ndarray, counted: slice = ALL) -> np.ndarray:
        """Raw values (bands, h, w) -> the model's, with invalid pixels filled. counted: of which rows values count."""
        if self.raw_limits is None:
            with np.errstate(over="ignore", invalid="ignore"):
                values = raw.astype(np.uint8 if self.as_it_is else np.float32, copy=False)
        else:
            assert self.value_range is not None
            (low, high), (start, stop) = self.raw_limits, self.value_range
            with np.errstate(over="ignore", invalid="ignore"):  # invalid pixels may hold anything
                share = (raw.astype(np.float64) - low) / (high - low)
                outside = (share < -ROUNDING) | (share > 1 + ROUNDING)
                self.clipped_values += int((outside & valid)[:, counted].sum())
                self.seen_values += int(valid[counted].sum()) * len(raw)
                share = np.clip(share, 0, 1)
            values = (start + share * (stop - start)).astype(np.float32)
        if not valid.all():
            values[:, ~valid] = self.fill
        return values


def read_tiles(
    read_rows: Callable[[int, int], Pixels], grid: TileGrid, *, bands: int, dtype: type, tile_rows: slice = ALL
) -> Iterator[tuple[Tile, Pixels]]:
    """The pixels of each tile of a grid, row by row, out of rows that are read once, from top to bottom.

    tile_rows: which rows of tiles; what no tile of theirs touches is not read.
    """
    values: np.ndarray = np.zeros((bands, grid.tile_height, grid.width), dtype)
    valid = np.zeros((grid.tile_height, grid.width), bool)
    step = max(1, READ_BYTES // (8 * bands * grid.width))
    read_to = 0
    for row in grid.row_starts[tile_rows]:
        kept = read_to - row
        if kept > 0:  # the overlap with the row of tiles above
            values[:, :kept] = values[:, -kept:]
            valid[:kept] = valid[-kept:]
        kept = max(kept, 0)
        for start in range(kept, grid.tile_height, step):
            piece = slice(start, min(start + step, grid.tile_height))
            values[:, piece], valid[piece] = read_rows(row + piece.start, row + piece.stop)
        read_to = row + grid.tile_height
        for col in grid.col_starts:
            cols = slice(col, col + grid.tile_width)
            yield (
                Tile(row, col, grid.tile_height, grid.tile_width),
                Pixels(values[:, :, cols].copy(), valid[:, cols].copy()),
            )


def common_dtype(path: str, names: Sequence[str]) -> np.dtype[Any]:
    """The type that holds the values of all bands. Raises UsageError for complex values."""
    if any("complex" in name for name in names):
        raise UsageError(f"{path} has complex values ({', '.join(sorted(set(names)))}); real numbers are needed")
    return np.result_type(*names)


def check_nodata(nodata: float | Literal["none"] | None, dtype: np.dtype[Any]) -> None:
    """Raise UsageError for a value that cannot stand in a file of that type."""
    if isinstance(nodata, str) or nodata is None or dtype.kind == "f":
        return
    limits = np.iinfo(dtype)
    if not (limits.min <= nodata <= limits.max and nodata == int(nodata)):
        raise UsageError(
            f"--nodata {nodata:g} is no {dtype} value, those are whole, {limits.min} to {limits.max}; try none"
        )


def parse_nodata(text: str | float) -> float | Literal["none"]:
    """ "0" -> 0.0, "none" -> "none". Raises UsageError for anything else."""
    if text == "none":
        return "none"
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"nodata is a value, or none for a file whose marks are wrong; got {text!r}") from error
