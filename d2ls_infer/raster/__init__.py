"""Rasters in and out. Nothing outside this folder uses rasterio."""

from d2ls_infer.raster.scene import Scale, Scene, parse_bands, parse_scale, png_bytes, read_array
from d2ls_infer.raster.writer import RasterWriter, check_output

__all__ = ["RasterWriter", "Scale", "Scene", "check_output", "parse_bands", "parse_scale", "png_bytes", "read_array"]
