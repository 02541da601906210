"""Tiles of a raster, and the blending of what a segmenter says about each."""

from d2ls_infer.tiling.blend import (
    PIECE_BYTES,
    WINDOWS,
    Around,
    BandBlender,
    Batch,
    Rows,
    axis_windows,
    batches,
    blend,
    rows_sharing_batches,
    stacked,
)
from d2ls_infer.tiling.grid import Tile, TileGrid, parse_overlap
from d2ls_infer.tiling.resample import Resampler, resample_rows

__all__ = [
    "PIECE_BYTES",
    "WINDOWS",
    "Around",
    "BandBlender",
    "Batch",
    "Resampler",
    "Rows",
    "Tile",
    "TileGrid",
    "axis_windows",
    "batches",
    "blend",
    "parse_overlap",
    "resample_rows",
    "rows_sharing_batches",
    "stacked",
]
