"""A table of kinds of input, made on the fly and mapped: the right pixels, nodata and georeference come out of each."""

from __future__ import annotations

import gzip
import json
import logging
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.rpc import RPC
from rasterio.windows import Window

from d2ls_infer import load_model, predict_raster
from d2ls_infer.errors import D2LSError, UsageError
from d2ls_infer.raster import Scene

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
ReadMap = Callable[[Path], SimpleNamespace]
UTM = "EPSG:32618"
NORTH_UP = Affine(2.0, 0.0, 500_000.0, 0.0, -2.0, 4_600_000.0)
HEIGHT, WIDTH = 37, 29
NODATA = 255
RGB = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]


@dataclass
class Kind:
    """What was written, and what a map of it must show: band 1 modulo three, where valid."""

    source: str | Path
    first: np.ndarray
    valid: np.ndarray | None = None
    bands: int = 3
    crs: Any = UTM
    transform: Affine = NORTH_UP
    options: dict[str, Any] = field(default_factory=dict)
    gcps: int = 0
    rpcs: bool = False


Make = Callable[[Path, Write, np.ndarray], Kind]
KINDS: dict[str, Make] = {}


def kind(name: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        assert name not in KINDS
        KINDS[name] = make
        return make

    return keep


def holes() -> np.ndarray:
    """(H, W) bool of what is valid: not in a corner, a stripe, and single pixels."""
    valid = np.ones((HEIGHT, WIDTH), bool)
    valid[:9, :7] = valid[20, :] = valid[30::3, 11::4] = False
    return valid


# GeoTIFFs by how they are stored

STORED: dict[str, dict[str, Any]] = {
    "strips": {},
    "strips of one row": {"blockysize": 1},
    "one strip": {"blockysize": HEIGHT},
    "tiles": {"tiled": True, "blockxsize": 16, "blockysize": 16},
    "tall tiles": {"tiled": True, "blockxsize": 16, "blockysize": 64, "compress": "lzw"},
    "bands one after the other": {"interleave": "band", "compress": "deflate"},
    "bands pixel by pixel": {"interleave": "pixel", "compress": "packbits"},
    "LZW with a predictor": {"compress": "lzw", "predictor": 2},
    "Zstandard": {"compress": "zstd"},
    "LERC": {"compress": "lerc"},
    "WebP without loss": {"compress": "webp", "webp_lossless": "YES", "interleave": "pixel"},
    "BigTIFF": {"bigtiff": "YES"},
    "big-endian": {"endianness": "BIG"},
}  # fmt: skip
for title, profile in STORED.items():

    @kind(f"GeoTIFF, {title}")
    def stored(folder: Path, write: Write, array: np.ndarray, profile: dict[str, Any] = profile) -> Kind:
        return Kind(write(folder / "scene.tif", array, **profile), array[0])


@kind("GeoTIFF, sparse")
def sparse(folder: Path, write: Write, array: np.ndarray) -> Kind:
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": 200, "width": 100, "nodata": 0}
    placed = {"crs": UTM, "transform": NORTH_UP, "tiled": True, "blockxsize": 64, "blockysize": 64, "sparse_ok": True}
    with rasterio.open(folder / "scene.tif", "w", **profile, **placed) as dataset:
        dataset.write(array, window=Window(64, 128, WIDTH, HEIGHT))
    whole = np.zeros((200, 100), np.uint8)
    whole[128 : 128 + HEIGHT, 64 : 64 + WIDTH] = array[0]
    return Kind(folder / "scene.tif", whole, whole > 0)


@kind("GeoTIFF, JPEG in YCbCr")
def jpeg(folder: Path, write: Write, array: np.ndarray) -> Kind:
    path = write(folder / "scene.tif", array, compress="jpeg", photometric="ycbcr", interleave="pixel")
    with rasterio.open(path) as dataset:
        return Kind(path, dataset.read(1))


@kind("Cloud Optimized GeoTIFF")
def cog(folder: Path, write: Write, array: np.ndarray) -> Kind:
    big = np.tile(array, (1, 8, 8))
    rasterio.shutil.copy(write(folder / "plain.tif", big), folder / "scene.tif", driver="COG", blocksize=128)
    with rasterio.open(folder / "scene.tif") as dataset:
        assert dataset.overviews(1)
    return Kind(folder / "scene.tif", big[0])


# Other formats


@kind("JPEG 2000")
def jpeg_2000(folder: Path, write: Write, array: np.ndarray) -> Kind:
    options = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"}
    rasterio.shutil.copy(write(folder / "a.tif", array), folder / "scene.jp2", **options)
    return Kind(folder / "scene.jp2", array[0])


@kind("PNG with a world file")
def png_world(folder: Path, write: Write, array: np.ndarray) -> Kind:
    path = write(folder / "scene.png", array, driver="PNG", worldfile="YES")
    path.with_name("scene.png.aux.xml").unlink()
    return Kind(path, array[0], crs=None)


@kind("PNG and nothing else")
def png(folder: Path, write: Write, array: np.ndarray) -> Kind:
    path = write(folder / "scene.png", array, driver="PNG", georeferenced=False)
    return Kind(path, array[0], crs=None, transform=Affine.identity())


@kind("JPEG with a world file")
def jpeg_world(folder: Path, write: Write, array: np.ndarray) -> Kind:
    path = write(folder / "scene.jpg", array, driver="JPEG", worldfile="YES")
    path.with_name("scene.jpg.aux.xml").unlink()
    path.with_name("scene.wld").rename(folder / "scene.jgw")
    with rasterio.open(path) as dataset:
        return Kind(path, dataset.read(1), crs=None)


FORMATS = {
    "WebP": ("scene.webp", {"driver": "WEBP", "LOSSLESS": "YES"}),
    "Windows bitmap": ("scene.bmp", {"driver": "BMP"}),
    "Erdas Imagine": ("scene.img", {"driver": "HFA"}),
    "ENVI": ("scene.dat", {"driver": "ENVI"}),
    "PCI Geomatica": ("scene.pix", {"driver": "PCIDSK"}),
    "Esri band interleaved by line": ("scene.bil", {"driver": "EHdr"}),
    "ER Mapper": ("scene.ers", {"driver": "ERS"}),
    "R raster": ("scene.grd", {"driver": "RRASTER"}),
    "MRF": ("scene.mrf", {"driver": "MRF"}),
}
for title, (file, profile) in FORMATS.items():

    @kind(title)
    def formatted(
        folder: Path, write: Write, array: np.ndarray, file: str = file, profile: dict[str, Any] = profile
    ) -> Kind:
        return Kind(write(folder / file, array, **profile), array[0], crs="any")


@kind("GeoPackage")
def geopackage(folder: Path, write: Write, array: np.ndarray) -> Kind:
    return Kind(write(folder / "scene.gpkg", array, driver="GPKG", TILE_FORMAT="PNG"), array[0])


@kind("ASCII grid")
def ascii_grid(folder: Path, write: Write, array: np.ndarray) -> Kind:
    rasterio.shutil.copy(write(folder / "a.tif", array[:1]), folder / "scene.asc", driver="AAIGrid")
    return Kind(folder / "scene.asc", array[0], bands=1)


@kind("netCDF variable")
def netcdf(folder: Path, write: Write, array: np.ndarray) -> Kind:
    rasterio.shutil.copy(write(folder / "a.tif", array[:2]), folder / "scene.nc", driver="netCDF")
    return Kind(f'NETCDF:"{folder / "scene.nc"}":Band1', array[0], bands=1)


@kind("netCDF of one variable")
def netcdf_single(folder: Path, write: Write, array: np.ndarray) -> Kind:
    rasterio.shutil.copy(write(folder / "a.tif", array[:1]), folder / "scene.nc", driver="netCDF", FORMAT="NC4")
    return Kind(folder / "scene.nc", array[0], bands=1)


@kind("HDF5 dataset")
def hdf5(folder: Path, write: Write, array: np.ndarray) -> Kind:
    """As it is stored, from the bottom up and without a place: netCDF's conventions are not HDF5's."""
    rasterio.shutil.copy(write(folder / "a.tif", array[:2]), folder / "a.nc", driver="netCDF", FORMAT="NC4")
    (folder / "a.nc").rename(folder / "scene.h5")
    first = array[0, ::-1]
    return Kind(f'HDF5:"{folder / "scene.h5"}"://Band1', first, bands=1, crs=None, transform=Affine.identity())


for version in ("ZARR_V2", "ZARR_V3"):

    @kind(f"Zarr, {version}")
    def zarr(folder: Path, write: Write, array: np.ndarray, version: str = version) -> Kind:
        rasterio.shutil.copy(write(folder / "a.tif", array), folder / "scene.zarr", driver="Zarr", FORMAT=version)
        return Kind(folder / "scene.zarr", array[0], crs="any")


@kind("in a ZIP archive")
def zipped(folder: Path, write: Write, array: np.ndarray) -> Kind:
    with zipfile.ZipFile(folder / "scenes.zip", "w") as archive:
        archive.write(write(folder / "a.tif", array), "in/scene.tif")
    return Kind(f"zip://{folder / 'scenes.zip'}!/in/scene.tif", array[0])


@kind("under gzip")
def gzipped(folder: Path, write: Write, array: np.ndarray) -> Kind:
    (folder / "scene.tif.gz").write_bytes(gzip.compress(write(folder / "a.tif", array).read_bytes()))
    return Kind(f"/vsigzip/{folder / 'scene.tif.gz'}", array[0])


# VRTs


@kind("VRT")
def vrt(folder: Path, write: Write, array: np.ndarray) -> Kind:
    rasterio.shutil.copy(write(folder / "a.tif", array), folder / "scene.vrt", driver="VRT")
    return Kind(folder / "scene.vrt", array[0])


def write_vrt(path: Path, size: tuple[int, int], bands: list[str]) -> Path:
    a, b, c, d, e, f = NORTH_UP[:6]
    numbered = "".join(band.replace("<VRTRasterBand", f'<VRTRasterBand band="{i}"') for i, band in enumerate(bands, 1))
    path.write_text(
        f'<VRTDataset rasterXSize="{size[1]}" rasterYSize="{size[0]}"><SRS>{UTM}</SRS>'
        f"<GeoTransform>{c}, {a}, {b}, {f}, {d}, {e}</GeoTransform>{numbered}</VRTDataset>"
    )
    return path


def vrt_band(*parts: tuple[str, int, int, int], dtype: str = "Byte", nodata: int | None = None) -> str:
    """A band made of others: file, band there, and where it goes: column and row."""
    said = "" if nodata is None else f"<NoDataValue>{nodata}</NoDataValue>"
    sources = "".join(
        f'<SimpleSource><SourceFilename relativeToVRT="1">{file}</SourceFilename><SourceBand>{band}</SourceBand>'
        f'<SrcRect xOff="0" yOff="0" xSize="{WIDTH}" ySize="{HEIGHT}"/>'
        f'<DstRect xOff="{col}" yOff="{row}" xSize="{WIDTH}" ySize="{HEIGHT}"/></SimpleSource>'
        for file, band, col, row in parts
    )
    return f'<VRTRasterBand dataType="{dtype}">{said}{sources}</VRTRasterBand>'


@kind("VRT mosaic with a gap")
def mosaic(folder: Path, write: Write, array: np.ndarray) -> Kind:
    write(folder / "a.tif", array)
    places = [(0, 0), (WIDTH + 5, 3)]
    bands = [vrt_band(*(("a.tif", b, col, row) for col, row in places), nodata=0) for b in (1, 2, 3)]
    first = np.zeros((HEIGHT + 3, 2 * WIDTH + 5), np.uint8)
    for col, row in places:
        first[row : row + HEIGHT, col : col + WIDTH] = array[0]
    return Kind(write_vrt(folder / "scene.vrt", first.shape, bands), first, first > 0)


@kind("VRT of bands in files of their own")
def stack(folder: Path, write: Write, array: np.ndarray) -> Kind:
    for band in range(3):
        write(folder / f"{band}.tif", array[band : band + 1])
    bands = [vrt_band((f"{band}.tif", 1, 0, 0)) for band in (2, 1, 0)]
    return Kind(write_vrt(folder / "scene.vrt", (HEIGHT, WIDTH), bands), array[2])


@kind("VRT of bands of several types")
def types(folder: Path, write: Write, array: np.ndarray) -> Kind:
    write(folder / "wide.tif", array.astype(np.uint16) * 100)
    write(folder / "narrow.tif", array)
    bands = [vrt_band(("wide.tif", 1, 0, 0), dtype="UInt16"), vrt_band(("narrow.tif", 2, 0, 0))]
    return Kind(write_vrt(folder / "scene.vrt", (HEIGHT, WIDTH), bands), array[0].astype(int) * 100, bands=2)


@kind("VRT with a nodata value for each band")
def vrt_nodata(folder: Path, write: Write, array: np.ndarray) -> Kind:
    valid = holes()
    array[:, ~valid] = [[10], [20], [30]]
    array[0, 0, :] = 11  # one valid band is enough
    write(folder / "a.tif", array)
    bands = [vrt_band(("a.tif", b, 0, 0), nodata=10 * b) for b in (1, 2, 3)]
    for band in (1, 2):
        array[band][array[band] == 10 * band + 10] += 1
    valid = (array != np.array([10, 20, 30])[:, None, None]).any(0)
    write(folder / "a.tif", array)
    return Kind(write_vrt(folder / "scene.vrt", (HEIGHT, WIDTH), bands), array[0], valid)


# Types

for dtype in ("int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):

    @kind(f"values of {dtype}")
    def typed(folder: Path, write: Write, array: np.ndarray, dtype: str = dtype) -> Kind:
        values = (array.astype(int) - (100 if dtype.startswith("i") else 0)) // (2 if dtype == "int8" else 1)
        return Kind(write(folder / "scene.tif", values.astype(dtype)), values[0])


@kind("half precision")
def half(folder: Path, write: Write, array: np.ndarray) -> Kind:
    return Kind(write(folder / "scene.tif", array.astype(np.float32), nbits=16), array[0])


@kind("one bit a pixel")
def bits(folder: Path, write: Write, array: np.ndarray) -> Kind:
    return Kind(write(folder / "scene.tif", array % 2, nbits=1), array[0] % 2)


@kind("scale and offset tags, for a model of physical units")
def tagged(folder: Path, write: Write, array: np.ndarray) -> Kind:
    path = write(folder / "scene.tif", array.astype(np.uint16) * 100 + 1000)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = [0.01] * 3, [-10.0 + 1e-4] * 3
    return Kind(path, array[0], options={"value_range": (0.0, 250.0)})


# What is valid


@kind("a nodata value")
def nodata(folder: Path, write: Write, array: np.ndarray) -> Kind:
    array[:, ~holes()] = 7
    array[:2, 20, :] = 9
    array[1:, 15, 15] = 7
    valid = (array != 7).any(0)
    return Kind(write(folder / "scene.tif", array, nodata=7), array[0], valid)


@kind("a nodata value of NaN")
def nodata_nan(folder: Path, write: Write, array: np.ndarray) -> Kind:
    values = array.astype(np.float32)
    values[:, ~holes()] = np.nan
    return Kind(write(folder / "scene.tif", values, nodata=np.nan), array[0], holes())


@kind("NaN that no tag tells of")
def nan(folder: Path, write: Write, array: np.ndarray) -> Kind:
    values = array.astype(np.float64)
    values[1, ~holes()] = np.nan
    return Kind(write(folder / "scene.tif", values), array[0], holes())


@kind("a mask inside")
def mask(folder: Path, write: Write, array: np.ndarray) -> Kind:
    return Kind(write(folder / "scene.tif", array, mask=holes() * np.uint8(255)), array[0], holes())


@kind("a mask in a file beside")
def mask_beside(folder: Path, write: Write, array: np.ndarray) -> Kind:
    path = write(folder / "scene.tif", array)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(holes() * np.uint8(255))
    assert (folder / "scene.tif.msk").exists()
    return Kind(path, array[0], holes())


@kind("an alpha band")
def alpha(folder: Path, write: Write, array: np.ndarray) -> Kind:
    array = np.concatenate([array, holes()[None] * np.uint8(255)])
    return Kind(write(folder / "scene.tif", array, colorinterp=[*RGB, ColorInterp.alpha]), array[0], holes())


@kind("PNG with alpha")
def png_alpha(folder: Path, write: Write, array: np.ndarray) -> Kind:
    array = np.concatenate([array, holes()[None] * np.uint8(255)])
    return Kind(write(folder / "scene.png", array, driver="PNG"), array[0], holes())


@kind("near infrared tagged as alpha, for a model without it")
def nir_as_alpha(folder: Path, write: Write, array: np.ndarray) -> Kind:
    near_infrared = np.where(holes(), np.roll(array[0], 5), 0)[None]
    return Kind(write(folder / "scene.tif", np.concatenate([array, near_infrared])), array[0])


@kind("nodata, replaced by another")
def nodata_replaced(folder: Path, write: Write, array: np.ndarray) -> Kind:
    array[:, ~holes()] = 9
    return Kind(write(folder / "scene.tif", array, nodata=200), array[0], holes(), options={"nodata": "9"})


@kind("nodata that is wrong, put aside")
def nodata_aside(folder: Path, write: Write, array: np.ndarray) -> Kind:
    array[:, ~holes()] = 0
    return Kind(write(folder / "scene.tif", array, nodata=0), array[0], options={"nodata": "none"})


# Bands


@kind("bands in another order, by description")
def reordered(folder: Path, write: Write, array: np.ndarray) -> Kind:
    path = write(folder / "scene.tif", np.concatenate([array, array[:1] // 2]))
    with rasterio.open(path, "r+") as dataset:
        for band, name in enumerate(("blue", "green", "red", "nir"), 1):
            dataset.set_band_description(band, name)
    return Kind(path, array[2], options={"names": ("red", "green", "blue")})


@kind("bands by name")
def named(folder: Path, write: Write, array: np.ndarray) -> Kind:
    path = write(folder / "scene.tif", array)
    with rasterio.open(path, "r+") as dataset:
        dataset.set_band_description(2, "haze")
    return Kind(path, array[1], options={"bands": "haze,1,blue"})


@kind("one band for three")
def grey(folder: Path, write: Write, array: np.ndarray) -> Kind:
    return Kind(write(folder / "scene.tif", array[:1]), array[0], options={"bands": "1,1,1"})


# Where it lies

PLACED: dict[str, dict[str, Any]] = {
    "no coordinate system": {"crs": None},
    "degrees": {"crs": "EPSG:4326", "transform": Affine(1e-5, 0, 10, 0, -1e-5, 50)},
    "feet": {"crs": "EPSG:2263", "transform": Affine(2, 0, 1e6, 0, -2, 2e5)},
    "Mercator": {"crs": "EPSG:3857", "transform": Affine(2, 0, 1e6, 0, -2, 8e6)},
    "a system without a code": {"crs": "+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84 +units=m +type=crs"},
    "rotated": {"transform": Affine(1.5, 2, 500_000, 2, -1.5, 4_600_000)},
    "south up": {"transform": Affine(2, 0, 500_000, 0, 2, 4_600_000)},
    "mirrored": {"transform": Affine(-2, 0, 500_000, 0, -2, 4_600_000)},
    "pixels that are no squares": {"transform": Affine(3, 0, 500_000, 0, -0.5, 4_600_000)},
}
for title, profile in PLACED.items():

    @kind(f"georeference: {title}")
    def placed(folder: Path, write: Write, array: np.ndarray, profile: dict[str, Any] = profile) -> Kind:
        return Kind(write(folder / "scene.tif", array, **profile), array[0], **({"transform": NORTH_UP} | profile))


@kind("ground control points")
def gcps(folder: Path, write: Write, array: np.ndarray) -> Kind:
    points = [GroundControlPoint(r, c, 10 + c / 100, 50 - r / 90) for r, c in ((0, 0), (0, 20), (30, 0), (30, 20))]
    path = write(folder / "scene.tif", array, georeferenced=False, gcps=points, crs="EPSG:4326")
    return Kind(path, array[0], crs=None, transform=Affine.identity(), gcps=4)


@kind("rational polynomial coefficients")
def rpcs(folder: Path, write: Write, array: np.ndarray) -> Kind:
    coefficients = [1.0] + [0.0] * 19
    model = RPC(
        height_off=0.0, height_scale=1.0, lat_off=50.0, lat_scale=1.0, line_den_coeff=coefficients,
        line_num_coeff=coefficients, line_off=18.0, line_scale=20.0, long_off=10.0, long_scale=1.0,
        samp_den_coeff=coefficients, samp_num_coeff=coefficients, samp_off=15.0, samp_scale=15.0,
    )  # fmt: skip
    path = write(folder / "scene.tif", array, georeferenced=False, rpcs=model)
    return Kind(path, array[0], crs=None, transform=Affine.identity(), rpcs=True)


# The table


def test_the_table_has_at_least_forty_kinds() -> None:
    assert len(KINDS) >= 40


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_input(
    name: str,
    tmp_path: Path,
    write_raster: Write,
    pixels: Pixels,
    read_map: ReadMap,
    fakes: SimpleNamespace,
) -> None:
    driver = {"LERC": "LERC", "Zstandard": "ZSTD", "WebP without loss": "WEBP"}.get(name.removeprefix("GeoTIFF, "))
    if driver and driver not in compressions():
        pytest.skip(f"this GDAL has no {driver}")
    made = KINDS[name](tmp_path, write_raster, pixels(3, HEIGHT, WIDTH))
    valid = np.ones(made.first.shape, bool) if made.valid is None else made.valid
    segmenter = fakes.PerPixel(bands=made.bands, value_range=made.options.pop("value_range", None))
    segmenter.bands = made.options.pop("names", segmenter.bands)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    result = predict_raster(
        segmenter, made.source, tmp_path / "map.tif", tile_size=24, overlap=3, batch_size=4, **made.options
    )
    found = read_map(result.output)
    assert np.array_equal(found.array, np.where(valid, made.first % 3, NODATA))
    assert valid.any()
    assert found.transform.almost_equals(made.transform, 1e-9)
    if made.crs != "any":
        assert found.crs == (None if made.crs is None else rasterio.CRS.from_user_input(made.crs))
    assert len(found.gcps[0]) == made.gcps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(result.output) as dataset:
            assert (dataset.rpcs is not None) == made.rpcs
    assert {name: (tmp_path / name).read_bytes() for name in before} == before  # inputs are left alone


def compressions() -> set[str]:
    """What this GDAL's GeoTIFF compresses with, of what it may be built without."""
    found = set()
    for name in ("LERC", "ZSTD", "WEBP"):
        profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": 8, "width": 8, "transform": NORTH_UP}
        with suppress(RasterioError), MemoryFile() as memory, memory.open(compress=name, **profile):
            found.add(name)
    return found


# Sizes


@settings(max_examples=60)
@given(
    st.one_of(st.sampled_from([1, 2, 3, 5, 31, 37, 61]), st.integers(1, 70)),
    st.one_of(st.sampled_from([1, 2, 3, 5, 31, 37, 61]), st.integers(1, 70)),
    st.sampled_from(["uint8", "uint16", "int16", "float32", "float64"]),
    st.sampled_from(["strips", "tiles"]),
    st.integers(1, 4),
    st.sampled_from(["none", "value", "nan", "mask", "alpha"]),
    st.data(),
)
def test_any_size_blocks_type_nodata_and_window(
    write_raster: Write,
    read_map: ReadMap,
    pixels: Pixels,
    fakes: SimpleNamespace,
    tmp_path_factory: pytest.TempPathFactory,
    height: int,
    width: int,
    dtype: str,
    blocks: str,
    size: int,
    invalid: str,
    data: st.DataObject,
) -> None:
    """Of a function of each pixel, the map of a part is the part of the map, wherever tiles and blocks lie."""
    array = pixels(3, height, width, dtype)
    valid = np.ones((height, width), bool)
    profile: dict[str, Any] = {"blockysize": min(height, 5 * size)}
    if blocks == "tiles":
        profile = {"tiled": True, "blockxsize": 16 * size, "blockysize": 16 * (5 - size)}
    if invalid != "none":
        valid[:: data.draw(st.integers(1, 9)), :: data.draw(st.integers(1, 9))] = False
    if invalid == "nan" and dtype.startswith("float"):
        array[1, ~valid] = np.nan
    elif invalid == "mask":
        profile["mask"] = valid * np.uint8(255)
    elif invalid == "alpha":
        valid[::2] = True
        valid[0, 0] = True
        array = np.concatenate([array, valid[None] * array.dtype.type(255)])
        profile["colorinterp"] = [*RGB, ColorInterp.alpha]
    elif invalid != "none":
        array[:, ~valid] = 0
        profile["nodata"] = 0
    col, row = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    cols, rows = data.draw(st.integers(1, width - col)), data.draw(st.integers(1, height - row))
    folder = tmp_path_factory.getbasetemp()
    path = write_raster(folder / "any_kind.tif", array, **profile)
    tile_size = data.draw(st.integers(8, 80))
    result = predict_raster(
        fakes.PerPixel(), path, folder / "any_kind_map.tif", overwrite=True, window=(col, row, cols, rows),
        tile_size=tile_size, overlap=data.draw(st.integers(0, tile_size - 4)), batch_size=4,
    )  # fmt: skip
    found = read_map(result.output)
    with np.errstate(invalid="ignore"):
        expected = np.where(valid, array[0] % 3, NODATA)
    assert np.array_equal(found.array, expected[row : row + rows, col : col + cols])
    assert found.transform == Affine(2, 0, 500_000 + 2 * col, 0, -2, 4_600_000 - 2 * row)


# Parts, distances, views


@pytest.mark.parametrize("where", ["window", "bbox", "bbox_crs", "aoi"])
def test_a_part_is_mapped_on_the_scenes_own_grid(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, pixels: Pixels, fakes: SimpleNamespace, where: str
) -> None:
    array = pixels(3, 80, 60)
    path = write_raster(tmp_path / "scene.tif", array)
    box = (500_000 + 2 * 12, 4_600_000 - 2 * 50, 500_000 + 2 * 40, 4_600_000 - 2 * 20)
    corners = [[box[0], box[1]], [box[2], box[1]], [box[2], box[3]], [box[0], box[3]], [box[0], box[1]]]
    if where == "aoi":
        pytest.importorskip("pyogrio")
        corners[2] = [box[2], box[1] + 2 * 10]  # a corner cut off
        crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32618"}}
        shape = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [corners]}}
        text = json.dumps({"type": "FeatureCollection", "crs": crs, "features": [shape]})
        (tmp_path / "area.geojson").write_text(text)
    options: dict[str, Any] = {
        "window": {"window": "12,20,28,30"},
        "bbox": {"bbox": box},
        "bbox_crs": {"bbox": rasterio.warp.transform_bounds(UTM, "EPSG:4326", *box), "bbox_crs": "EPSG:4326"},
        "aoi": {"aoi": tmp_path / "area.geojson"},
    }[where]
    result = predict_raster(fakes.PerPixel(), path, tmp_path / "map.tif", tile_size=16, **options)
    found = read_map(result.output)
    col = round((found.transform.c - 500_000) / 2)
    row = round((4_600_000 - found.transform.f) / 2)
    height, width = found.array.shape
    inside = np.ones((height, width), bool)
    if where == "bbox_crs":  # the box around the box
        assert row in (19, 20)
        assert col in (11, 12)
        assert (height, width) == pytest.approx((30, 28), abs=2)
    else:
        assert (col, row, width, height) == (12, 20, 28, 30)
    if where == "aoi":
        y, x = np.mgrid[:30, :28] + 0.5
        inside = y >= 20 * x / 28
    assert np.array_equal(found.array, np.where(inside, array[0, row : row + height, col : col + width] % 3, NODATA))
    said = json.loads(found.tags["D2LS_OPTIONS"])
    assert said["window"] == [col, row, width, height]
    assert said.get("aoi") == (str(tmp_path / "area.geojson") if where == "aoi" else None)
    assert sum(area.pixels for area in result.areas) == inside.sum()


class Halves:
    """Two classes: the band's value, and what it lacks of 250. Keeps what it was given."""

    def __init__(self, fakes: SimpleNamespace, gsd_m: float | None = None) -> None:
        self.labels, self.bands, self.gsd_m = fakes.Fake(2).labels, ("grey",), gsd_m
        self.seen: list[torch.Tensor] = []

    def score(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen.append(batch)
        return torch.cat([batch, 250 - batch], 1).float()


@pytest.mark.parametrize(("gsd", "step"), [("auto", 4), (8.0, 4), ("0.5", 0.25), (3, 1.5)])
def test_a_scene_is_read_at_a_distance_and_mapped_at_its_own(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, fakes: SimpleNamespace, gsd: Any, step: float
) -> None:
    """Pixels of 2 m. The edge between two fields stays where it is, between two pixels; holes are holes."""
    array = np.where(np.arange(48) < 24, 200, 50).astype(np.uint8)[None, None].repeat(36, 1)
    array[:, 5, 3:20] = array[:, 30, 40] = 0
    path = write_raster(tmp_path / "scene.tif", array, nodata=0)
    segmenter = Halves(fakes, 8.0)
    result = predict_raster(segmenter, path, tmp_path / "map.tif", gsd=gsd, tile_size=16, batch_size=2)
    assert result.tiles == sum(len(batch) for batch in segmenter.seen)
    assert {batch.shape[-1] for batch in segmenter.seen} == {min(16, round(48 / step))}
    found = read_map(result.output)
    assert np.array_equal(found.array, np.where(array[0] == 0, NODATA, array[0] == 50))
    assert found.transform == NORTH_UP
    assert found.crs.to_epsg() == 32618
    assert json.loads(found.tags["D2LS_OPTIONS"])["gsd"] == str(8.0 if gsd == "auto" else float(gsd))
    assert sum(area.pixels for area in result.areas) == (array > 0).sum()


def test_scores_are_brought_back_not_classes(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, fakes: SimpleNamespace
) -> None:
    """A ramp crosses at 125 in the middle of a coarse pixel; classes brought back would cross at that pixel's edge."""
    array = np.linspace(20, 212, 48).astype(np.uint8)[None, None].repeat(8, 1)
    path = write_raster(tmp_path / "scene.tif", array)
    result = predict_raster(Halves(fakes), path, gsd=16, tile_size=64)
    found = read_map(result.output).array
    crossing = np.argmax(array[0, 0] > 125)
    assert crossing % 8 not in (0, 1, 7)
    assert np.array_equal(found, np.where(np.arange(48) < crossing, 1, 0)[None].repeat(8, 0))


@pytest.mark.parametrize("gsd_m", [2.0, 1.95, 2.08])
def test_the_models_own_distance_or_nearly_changes_nothing(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, gsd_m: float
) -> None:
    """To resample by a few percent would blur, and help nobody."""
    segmenter = Halves(fakes, gsd_m)
    path = write_raster(tmp_path / "scene.tif", pixels(1, 40, 30))
    plain = predict_raster(segmenter, path, tmp_path / "plain.tif", tile_size=16).output
    again = predict_raster(segmenter, path, tmp_path / "again.tif", tile_size=16, gsd="auto").output
    with rasterio.open(plain) as one, rasterio.open(again) as other:
        assert np.array_equal(one.read(), other.read())
    assert segmenter.seen[-1].dtype == torch.uint8


def test_a_distance_in_degrees_is_that_in_the_middle_of_the_scene(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, fakes: SimpleNamespace
) -> None:
    """Seconds of arc at 60 degrees, 31 m by 15.5 m, to 31 m: half as many columns."""
    second = 1 / 3600
    path = write_raster(
        tmp_path / "scene.tif", np.full((1, 40, 40), 200, np.uint8), crs="EPSG:4326",
        transform=Affine(second, 0, 10, 0, -second, 60 + 20 * second),
    )  # fmt: skip
    segmenter = Halves(fakes)
    result = predict_raster(segmenter, path, gsd="30.95", tile_size=64)
    assert segmenter.seen[0].shape == (1, 1, 40, 20)
    assert (read_map(result.output).array == 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gsd": "auto"}, ["states no ground sampling distance", "--gsd METRES"]),
        ({"gsd": "0"}, ["metres above 0", "'0'"]),
        ({"gsd": "near"}, ["'near'"]),
        ({"gsd": float("nan")}, ["nan"]),
        ({"gsd": 0.1}, ["2 m", "at most 16 times"]),
        ({"tta": "d8"}, ["unknown test-time augmentation 'd8'", "none, flip, d4, multiscale"]),
        ({"nodata": "black"}, ["'black'"]),
        ({"nodata": "-1"}, ["--nodata -1 is no uint8 value"]),
        ({"window": "1,2,3"}, ["COL,ROW,WIDTH,HEIGHT"]),
        ({"window": "100,0,5,5"}, ["do not meet"]),
        ({"bbox": (0, 0, 1, 1)}, ["do not meet"]),
        ({"bbox_crs": "EPSG:4326"}, ["--bbox, which is not given"]),
        ({"bands": "red,green,mauve"}, ["none of them is 'mauve'"]),
    ],
)
def test_what_makes_no_sense_is_one_line_before_anything_is_done(
    tmp_path: Path,
    write_raster: Write,
    pixels: Pixels,
    fakes: SimpleNamespace,
    options: dict[str, Any],
    words: list[str],
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, 20, 20))
    segmenter = fakes.Constant()
    with pytest.raises(UsageError) as caught:
        predict_raster(segmenter, path, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert segmenter.scored == 0
    assert [file.name for file in tmp_path.iterdir()] == ["scene.tif"]


def test_an_alpha_tag_that_is_passed_over_is_told(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(4, 30, 30))
    with caplog.at_level(logging.WARNING, "d2ls_infer"):
        predict_raster(fakes.Constant(), path)
    (message,) = caplog.messages
    assert "band 4 is marked alpha" in message


@pytest.mark.parametrize(("tta", "views"), [("none", 1), ("flip", 3), ("d4", 8), ("multiscale", 6)])
def test_views_of_a_tile(
    tmp_path: Path, write_raster: Write, read_map: ReadMap, pixels: Pixels, fakes: SimpleNamespace, tta: str, views: int
) -> None:
    """A function of each pixel does not care from which side it is looked at; what is tagged says how it was done."""
    array = np.kron(pixels(3, 6, 5) // 3 * 3, np.ones((1, 8, 8), np.uint8))
    path = write_raster(tmp_path / "scene.tif", array)
    segmenter = fakes.PerPixel()
    segmenter.name = "some-model"
    result = predict_raster(segmenter, path, tta=tta, tile_size=24, overlap=0)
    assert segmenter.scored == views * result.tiles
    found = read_map(result.output)
    assert result.output.name == "scene_d2ls-some-model.tif"
    assert json.loads(found.tags["D2LS_OPTIONS"]).get("tta", "none") == tta
    if tta != "multiscale":
        assert np.array_equal(found.array, array[0] % 3)


# What is broken


CUT: dict[str, dict[str, Any]] = {
    "scene.tif": {"driver": "GTiff", "compress": "deflate"},
    "scene.jp2": {"driver": "JP2OpenJPEG"},
    "scene.png": {"driver": "PNG"},
    "scene.jpg": {"driver": "JPEG"},
    "scene.img": {"driver": "HFA"},
    "scene.dat": {"driver": "ENVI"},
    "scene.bil": {"driver": "EHdr"},
    "scene4.nc": {"driver": "netCDF", "FORMAT": "NC4"},
    "scene.nc": {"driver": "netCDF", "FORMAT": "NC"},
    "scene.vrt": {"driver": "VRT"},
}


@pytest.mark.parametrize("part", ["header", "half", "end"])
@pytest.mark.parametrize("name", CUT)
def test_a_file_that_ends_early_is_one_line_and_leaves_nothing(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, name: str, part: str
) -> None:
    """GDAL itself reads zeros from what is missing of ENVI and classic netCDF. Of the latter's end that goes unseen."""
    if (name, part) == ("scene.nc", "end"):
        pytest.skip("a classic netCDF file without its last bytes is read as zeros there, and nothing tells")
    source = write_raster(tmp_path / "a.tif", pixels(1, 300, 200))
    path = tmp_path / name
    rasterio.shutil.copy(source, path, **CUT[name])
    cut = source if name == "scene.vrt" else path  # what it shows is cut
    content = cut.read_bytes()
    cut.write_bytes(content[: {"header": 60, "half": len(content) // 2, "end": len(content) * 19 // 20}[part]])
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(D2LSError) as caught:
        predict_raster(fakes.Constant(bands=1), path, tile_size=64)
    assert name in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_damage_in_the_middle_of_a_block_is_an_error_that_leaves_nothing(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, 200, 200), compress="deflate", blockysize=16)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    path.write_bytes(content)
    with pytest.raises(D2LSError, match=r"cannot read .*scene\.tif, rows"):
        predict_raster(fakes.Constant(), path, tile_size=64)
    assert [file.name for file in tmp_path.iterdir()] == ["scene.tif"]


# Real scenes

REAL: dict[str, dict[str, Any]] = {
    "5b3622402b6a08001185f8d8_10_00004.tif": {"window": "900,900,150,130"},
    "5c15321f63d9810007f8b06f_10_00000.tif": {"window": "900,900,150,130", "gsd": "auto"},
    "LC08_224078_rgb_uint16_crop.tif": {"window": "300,300,150,130", "scale": "p2,p98"},
    "RGB.byte.tif": {"window": "0,0,150,130"},
    "m_4709963_se_14_1_20200831.tif": {"window": "300,300,150,130"},
    "oem_koeln_50.tif": {"window": "300,300,150,130", "tta": "flip"},
    "shade.tif": {"window": "300,300,150,130", "bands": "1,1,1"},
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_scene_with_a_model_of_ours(name: str, shared: Path, tmp_path: Path, read_map: ReadMap) -> None:
    """What is mapped is valid and is a class, lies where the scene lies, and is what the model says of that array."""
    options = REAL[name]
    model = load_model("naip" if name.startswith("m_") else "potsdam", device="cpu")
    path = shared / "data/scenes" / name
    result = predict_raster(model, path, tmp_path, tile_size=192, **options)
    found = read_map(result.output)
    col, row, width, height = map(int, options["window"].split(","))
    assert found.array.shape == (height, width)
    window = Window(col, row, width, height)
    with rasterio.open(path) as dataset:
        assert found.crs == dataset.crs
        a, _, c, _, e, f = dataset.transform[:6]
        assert found.transform.almost_equals(Affine(a, 0, c + a * col, 0, e, f + e * row), 1e-9)
        valid = (dataset.read_masks(window=window) > 0).any(0)
        pixels = np.where(valid, dataset.read([1, 1, 1] if name == "shade.tif" else None, window=window), 0)
    assert np.array_equal(found.array != NODATA, valid)
    assert found.array[valid].max() < len(model.labels)
    if not {"gsd", "scale", "tta"} & set(options):
        assert np.array_equal(found.array[valid], model.predict(pixels, tile_size=192)[valid])


def test_the_real_scenes_are_all_in_the_table(shared: Path) -> None:
    assert {path.name for path in (shared / "data/scenes").glob("*.tif")} == set(REAL)


def test_a_landsat_scene_in_its_own_units(shared: Path) -> None:
    """Tags or not, a stated scale is what counts."""
    path = shared / "data/scenes/LC08_224078_rgb_uint16_crop.tif"
    with Scene.open(path, bands_needed=3, band_names=("red", "green", "blue"), value_range=(0.0, 255.0)) as scene:
        assert list(scene.bands) == [1, 2, 3]
        assert scene.band_units is None
