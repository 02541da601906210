"""Rasters in pieces under a VRT: what is read through it is what a single file would give."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC

from d2ls_infer.errors import OutputExistsError, RasterError
from d2ls_infer.labels import LabelMap
from d2ls_infer.raster import RasterMosaic, RasterWriter, Scene, Strip

Write = Callable[..., Path]
LABELS = LabelMap(("water", "forêt & <field>", "road"), ((1, 2, 3), (40, 200, 60), (255, 255, 0)))
TAGS = {"D2LS_MODEL": "a <model> & more", "TIFFTAG_SOFTWARE": "d2ls"}
CLASSES: dict[str, Any] = {"labels": LABELS, "description": "class (test)", "tags": TAGS}
SHARES: dict[str, Any] = {"description": ["water", "field", "road"], "scale": 1 / 250, "tags": TAGS}


def told(path: Path) -> dict[str, Any]:
    """Everything that a raster gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as found:
            indexes = found.indexes
            return {
                "pixels": found.read().tobytes(), "crs": found.crs, "transform": found.transform,
                "dtypes": found.dtypes, "nodata": found.nodatavals, "scales": found.scales,
                "descriptions": found.descriptions,
                "colours": [found.colormap(1)[i] for i in (0, 1, 2, 255) if found.colorinterp[0].name == "palette"],
                # That a pixel is an area is what is taken where nothing is said.
                "tags": {name: text for name, text in found.tags().items() if name != "AREA_OR_POINT"},
                "tags of bands": [found.tags(band) for band in indexes], "rpcs": found.rpcs,
                "gcps": ([point.asdict() | {"id": ""} for point in found.gcps[0]], found.gcps[1]),
                "masks": found.read_masks().tobytes(),
            }  # fmt: skip


def both(scene: Scene, folder: Path, ends: Sequence[int], array: np.ndarray, **about: Any) -> tuple[Path, Path]:
    """A raster as one file, and as a VRT over strips, the last of them first."""
    edges = [0, *ends, scene.height]
    (folder / "the parts").mkdir()
    with RasterWriter.create(folder / "whole.tif", like=scene, **about) as writer:
        writer.write(array)
    strips = []
    for first, last in reversed(list(pairwise(edges))):
        strip = Strip(first, last, folder / "the parts" / f"{first}.tif")
        with RasterWriter.create(strip.path, like=scene.strip(first, last), **about) as writer:
            writer.write(array[..., first:last, :])
        strips.append(strip)
    counts = np.bincount(array.ravel(), minlength=256)[: len(LABELS)]
    with RasterMosaic.create(folder / "map.vrt", like=scene, strips=strips, counts=counts, **about):
        pass
    return folder / "whole.tif", folder / "map.vrt"


PLACES: dict[str, dict[str, Any]] = {
    "utm": {},
    "degrees": {"crs": "EPSG:4326", "transform": Affine(0.1 / 3, 0, 10, 0, -0.1 / 7, 50)},
    "rotated": {"transform": Affine(1.5, 0.5, 500_000, 0.5, -1.5, 4_600_000)},
    "no keys of GeoTIFF": {"crs": "+proj=imoll +datum=WGS84"},
    "none": {"georeferenced": False},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("about", [CLASSES, SHARES], ids=["classes", "shares"])
def test_it_reads_as_one_file_does(tmp_path: Path, write_raster: Write, place: str, about: dict[str, Any]) -> None:
    random = np.random.default_rng(5)
    scene_path = write_raster(tmp_path / "scene.tif", np.zeros((1, 330, 70), np.uint8), **PLACES[place])
    bands = (330, 70) if about is CLASSES else (3, 330, 70)
    array = random.choice(np.array([0, 1, 2, 255], np.uint8), bands)
    with Scene.open(scene_path, bands_needed=1) as scene:
        whole, vrt = both(scene, tmp_path, (1, 38, 300), array, **about)
    assert told(vrt) == told(whole)


def test_ground_control_points_and_polynomials(tmp_path: Path, write_raster: Write) -> None:
    line, one = [0.0, 1.0, *[0.0] * 18], [1.0, *[0.0] * 19]
    rpc = RPC(100.0, 50.0, 50.0, 0.1, one, line, 10.0, 10.0, 10.0, 0.1, one, line, 15.0, 15.0)
    zeros = np.zeros((1, 20, 30), np.uint8)
    points = [
        GroundControlPoint(r, c, 10 + c / 100, 50 - r / 100, 5.0) for r, c in ((0, 0), (0, 29), (19, 0), (19, 29))
    ]
    for number, place in enumerate([{"rpcs": rpc}, {}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        scene_path = write_raster(folder / "scene.tif", zeros, georeferenced=False, **place)
        if not place:
            with pytest.warns(NotGeoreferencedWarning), rasterio.open(scene_path, "r+") as dataset:
                dataset.gcps = points, "EPSG:4326"
        with Scene.open(scene_path, bands_needed=1) as scene:
            whole, vrt = both(scene, folder, (7,), zeros[0], **CLASSES)
        assert told(vrt) == told(whole)
        assert told(vrt)["rpcs"] or len(told(vrt)["gcps"][0]) == 4


@pytest.fixture
def made(tmp_path: Path, write_raster: Write) -> tuple[Path, Path, np.ndarray]:
    """A class map as one file and as a VRT, and what is in it."""
    scene_path = write_raster(tmp_path / "scene.tif", np.zeros((1, 90, 50), np.uint8))
    array = np.random.default_rng(1).choice(np.array([0, 1, 2, 255], np.uint8), (90, 50))
    with Scene.open(scene_path, bands_needed=1) as scene:
        return *both(scene, tmp_path, (33,), array, **CLASSES), array


def test_gdal_reads_names_and_attribute_table(made: tuple[Path, Path, np.ndarray], tmp_path: Path) -> None:
    """rasterio does not give them out, but GDAL copies what it read into another VRT."""
    bands = []
    for path in made[:2]:
        rasterio.shutil.copy(path, tmp_path / "copy.vrt", driver="VRT")
        bands.append(ElementTree.parse(tmp_path / "copy.vrt").getroot())
    for part in ("Category", "GDALRasterAttributeTable"):
        whole, vrt = ([ElementTree.tostring(found) for found in band.iter(part)] for band in bands)
        assert vrt == whole
        assert whole


def test_all_moves_together(made: tuple[Path, Path, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("map.vrt", "the parts"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    with rasterio.open(tmp_path / "elsewhere" / "map.vrt") as found:
        assert np.array_equal(found.read(1), made[2])


def test_a_strip_that_is_missing_leaves_no_vrt(made: tuple[Path, Path, np.ndarray], tmp_path: Path) -> None:
    before = made[1].read_bytes(), sorted(tmp_path.iterdir())
    with Scene.open(tmp_path / "scene.tif", bands_needed=1) as scene:
        strips = [Strip(0, 33, tmp_path / "the parts" / "0.tif"), Strip(33, 90, tmp_path / "the parts" / "gone.tif")]
        options: dict[str, Any] = {"like": scene, "strips": strips, "counts": np.zeros(3), **CLASSES}
        with pytest.raises(OutputExistsError, match=r"map\.vrt exists"):
            RasterMosaic.create(made[1], **options)
        with (
            pytest.raises(RasterError, match=r"cannot write .*map\.vrt: .*gone\.tif"),
            RasterMosaic.create(made[1], overwrite=True, **options),
        ):
            pass
    assert (made[1].read_bytes(), sorted(tmp_path.iterdir())) == before
