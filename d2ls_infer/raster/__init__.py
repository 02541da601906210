"""Rasters in and out. Nothing outside this folder uses rasterio."""

from d2ls_infer.raster.bands import bands_marked, canonical, contradicts, numbered, parse_bands
from d2ls_infer.raster.cut import Cut
from d2ls_infer.raster.dataset import jpeg_bytes, local_file, png_bytes, read_array
from d2ls_infer.raster.earlier import map_rows, stamps, was_made_of
from d2ls_infer.raster.glance import middle_values, unmarked_collar, valid_share
from d2ls_infer.raster.resampled import MOST_MAGNIFIED, ResampledScene
from d2ls_infer.raster.scale import Scale, parse_scale
from d2ls_infer.raster.scene import READ_BYTES, Scene, parse_nodata
from d2ls_infer.raster.sources import find_scenes, home_of
from d2ls_infer.raster.vrt import RasterMosaic, Strip
from d2ls_infer.raster.writer import RasterWriter, check_output

__all__ = [
    "MOST_MAGNIFIED",
    "READ_BYTES",
    "Cut",
    "RasterMosaic",
    "RasterWriter",
    "ResampledScene",
    "Scale",
    "Scene",
    "Strip",
    "bands_marked",
    "canonical",
    "check_output",
    "contradicts",
    "find_scenes",
    "home_of",
    "jpeg_bytes",
    "local_file",
    "map_rows",
    "middle_values",
    "numbered",
    "parse_bands",
    "parse_nodata",
    "parse_scale",
    "png_bytes",
    "read_array",
    "stamps",
    "unmarked_collar",
    "valid_share",
    "was_made_of",
]
