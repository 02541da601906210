"""Georeferenced arrays of xarray, mapped lazily by Dask: for notebooks with odc-stac, stackstac or rioxarray."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from numbers import Real
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import xarray as xr

from d2ls_infer.cluster.pieces import Band, cut
from d2ls_infer.context import row_spans
from d2ls_infer.errors import UsageError
from d2ls_infer.labels import NODATA
from d2ls_infer.load import load_segmenter
from d2ls_infer.outputs import STEPS, Finished
from d2ls_infer.raster import bands_marked, numbered
from d2ls_infer.segmenter import (
    InContext,
    Precision,
    Segmenter,
    in_context,
    model_values,
    tiles_of,
    warn_of_values,
    whose_dictionary,
)
from d2ls_infer.tiling import WINDOWS, Tile, TileGrid, rows_sharing_batches
from d2ls_infer.tiling import blend as blend_tiles
from d2ls_infer.weights import WeightsFile, find_weights

log = logging.getLogger(__name__)

CHUNK_ROWS = 4096
"""Rows of a chunk of the map, about, where nobody says."""


def predict_dataarray(
    model: Segmenter | str | Path,
    array: xr.DataArray,
    *,
    tile_size: int | None = None,
    overlap: int | float | str = 0.25,
    blend: str = "hann",
    dictionary: str = "auto",
    batch_size: int = 1,
    confidence: bool = False,
    chunk_rows: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    smooth: bool = True,
) -> xr.DataArray | xr.Dataset:
    """A DataArray (bands, rows, columns) of raw pixel values -> one of class indices (rows, columns) uint8, lazily.

    Nothing is read or scored before it is computed, then by Dask, on whatever it runs; a chunk of the map is a band of
    whole rows. The tiles are those of the whole array and the values those of `predict_array`, whatever the chunks.
    255 is nodata: where a value is not a finite number, and where all bands are what the attribute `_FillValue` or
    `nodata` says. Bands are found by the names in the coordinates of the first dimension, if all that the model takes
    are among them; where none is, they come in the model's order. Coordinates stay, with them the place on the ground
    (`spatial_ref`).

    model: a segmenter, which then is part of the graph, or a name or path for `load_model`: then each process loads it
    once, with `device`, `precision` and `smooth`. confidence: gives a Dataset of `labels` and `confidence`, in steps of
    1/250.
    chunk_rows: rows of the map in a chunk, at least; by default about 4096.
    Values that do not look as if they were on the model's range are told when the middle rows are computed.

    Raises UsageError for another number of bands or dimensions, for bands of which only some are named as the model's,
    and for values that are no real numbers.
    """
    weights = find_weights(model) if isinstance(model, str | Path) else None
    about: Any = model if weights is None else weights.description
    if not isinstance(array, xr.DataArray):
        raise UsageError(f"a DataArray of xarray is wanted, got a {type(array).__name__}")
    array = in_order(array, about.bands)
    check(array, about.bands)
    if blend not in WINDOWS:
        raise UsageError(f"unknown blending window {blend!r}; known are {', '.join(WINDOWS)}")
    if chunk_rows is not None and chunk_rows < 1:
        raise UsageError(f"a chunk has at least 1 row, got {chunk_rows}")
    height, width = array.shape[1:]
    grid = tiles_of(about, height, width, tile_size, overlap)
    source = (
        dask.delayed(model, pure=True, traverse=False)
        if weights is None
        else partial(loaded, weights, device, precision, smooth)
    )
    observes = getattr(model, "observes", None) if weights is None else about.shared_dictionary
    whose = whose_dictionary(observes, grid, dictionary)
    together = rows_sharing_batches(grid, batch_size)
    chunk = chunk_rows or CHUNK_ROWS
    starts = grid.row_starts[::together]
    rows = max(1, round(chunk / (starts[1] - starts[0]))) if len(starts) > 1 else 1
    pixels = dask.array.asarray(array.data)
    nodata = array.attrs.get("_FillValue", array.attrs.get("nodata"))
    if isinstance(nodata, Real) and math.isfinite(nodata):
        if array.dtype.kind == "f":
            nodata = array.dtype.type(nodata)  # as the array holds it
        pixels = dask.array.ma.masked_equal(pixels, nodata)
    context = None
    if whose == "scene":
        seen = [pixels[:, start:stop].rechunk(-1) for start, stop in row_spans(height, width)]
        context = dask.delayed(context_of, pure=True)(source, seen, grid, dictionary)
    layers = ("labels", "confidence") if confidence else ("labels",)
    parts = []
    for band in cut(Band(0, height), starts, rows):
        top, bottom = grid.touching(*band, rows_sharing_batches(grid, batch_size))
        first, last = grid.row_starts[top], grid.row_starts[bottom - 1] + grid.tile_height
        task = dask.delayed(map_rows, pure=True)(
            source,
            pixels[:, first:last].rechunk(-1),
            grid,
            band,
            context=context,
            blend=blend,
            batch_size=batch_size,
            layers=layers,
            warns=band.first <= height // 2 < band.last,
        )
        shape = (len(layers), band.last - band.first, width)
        parts.append(dask.array.from_delayed(task, shape, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)))
    made = dask.array.concatenate(parts, axis=1)
    labels = as_map(array, made[0], "labels", classes=list(about.labels.names))
    if not confidence:
        return labels
    return xr.Dataset({"labels": labels, "confidence": as_map(array, made[1], "confidence", steps=STEPS)})


def in_order(array: xr.DataArray, bands: tuple[str, ...]) -> xr.DataArray:
    """The bands that a model takes, where the array names them. Raises UsageError where it names only some of them."""
    if array.ndim != 3 or array.dims[0] not in array.coords:
        return array
    names = [str(name) for name in array.coords[array.dims[0]].values]
    found = [bands_marked(names, band) for band in bands]
    if all(len(places) == 1 for places in found):
        return array.isel({array.dims[0]: [place - 1 for (place,) in found]})
    if any(found) and (len(names) == len(bands) or all(found)):
        raise UsageError(
            f"the model takes the bands {', '.join(bands)}, and the array's are named {', '.join(names)}; "
            "give them the model's names, or none"
        )
    if numbered(names):
        log.warning(
            "the array's bands are called %s, which mean another thing with each sensor; they are taken as %s. If "
            "that is wrong, give them the model's names",
            ", ".join(names), ", ".join(bands),
        )  # fmt: skip
    return array


def check(array: xr.DataArray, bands: tuple[str, ...]) -> None:
    """Raise UsageError for an array that the model does not take."""
    if array.ndim != 3 or len(array) != len(bands) or 0 in array.shape:
        raise UsageError(
            f"the model takes an array of dimensions (bands, rows, columns) with the bands {', '.join(bands)}; "
            f"got {dict(array.sizes)}; choose by .sel or .isel, and order by .transpose"
        )
    if array.dtype.kind not in "uif":
        raise UsageError(f"the model takes whole or real numbers, got {array.dtype}")


def as_map(array: xr.DataArray, values: Any, name: str, **attributes: Any) -> xr.DataArray:
    """Values (rows, columns) with the coordinates of an array of (bands, rows, columns)."""
    kept = {key: value for key, value in array.coords.items() if array.dims[0] not in value.dims}
    place = {key: array.attrs[key] for key in ("crs", "grid_mapping", "transform") if key in array.attrs}
    return xr.DataArray(values, kept, array.dims[1:], name=name, attrs={"nodata": NODATA, **place, **attributes})


LOADED: dict[tuple[str, str, str, bool], Segmenter] = {}
"""The last model that chunks were mapped with in this process, by its sha256, device, precision and smoothing."""

LOADING = threading.Lock()


def loaded(weights: WeightsFile, device: str, precision: Precision, smooth: bool) -> Segmenter:
    """The segmenter of a weights file, loaded once in a process."""
    key = weights.sha256, device, precision, smooth
    with LOADING:
        if key not in LOADED:
            LOADED.clear()
            LOADED[key] = load_segmenter(weights, device=device, precision=precision, smooth=smooth)
        return LOADED[key]


def context_of(source: Any, seen: list[np.ndarray], grid: TileGrid, dictionary: str) -> Any:
    """What the segmenter makes of the whole array, if it wants to; seen: the rows that are looked at."""
    segmenter: Any = source() if isinstance(source, partial) else source
    pieces = iter(seen)

    def rows(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return model_values(segmenter, next(pieces))

    inside = in_context(segmenter, rows, grid, dictionary)
    return getattr(inside, "context", None)


def map_rows(
    source: Any,
    array: np.ndarray,
    grid: TileGrid,
    band: Band,
    *,
    context: Any,
    blend: str,
    batch_size: int,
    layers: Any,
    warns: bool,
) -> np.ndarray:
    """(layers, rows, columns) uint8 of a band; array: (bands, rows, columns) of the rows that its tiles lie in.

    warns: whether this one tells of values that do not look like the model's.
    """
    segmenter: Any = source() if isinstance(source, partial) else source
    if warns:
        warn_of_values(segmenter, array)
    segmenter = segmenter if context is None else InContext(segmenter, context)
    values, valid = model_values(segmenter, array)
    starts = grid.row_starts[slice(*grid.touching(*band, rows_sharing_batches(grid, batch_size)))]

    def tiles() -> Iterator[tuple[Tile, tuple[np.ndarray, np.ndarray]]]:
        for row in starts:
            for col in grid.col_starts:
                where = slice(row - starts[0], row - starts[0] + grid.tile_height), slice(col, col + grid.tile_width)
                yield Tile(row, col, grid.tile_height, grid.tile_width), (values[:, *where], valid[where])

    made = np.empty((len(layers), band.last - band.first, grid.width), np.uint8)
    blended = blend_tiles(
        segmenter.score,
        tiles(),
        grid,
        channels=len(segmenter.labels),
        window=blend,
        batch_size=batch_size,
        device=getattr(segmenter, "device", "cpu"),
        first_row=band.first,
    )
    for rows in takewhile(lambda rows: rows.first < band.last, blended):
        start, stop = max(band.first, rows.first), min(band.last, rows.first + len(rows.covered))
        if start < stop:
            finished, part = Finished(rows), slice(start - rows.first, stop - rows.first)
            for index, layer in enumerate(layers):
                made[index, start - band.first : stop - band.first] = getattr(finished, layer)[part]
    return made
