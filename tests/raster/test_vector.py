"""Maps as polygons, read back as users do: with geopandas, and burnt onto the grid again."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.features import rasterize

from d2ls_infer.errors import MissingFileError, OutputExistsError, RasterError, UsageError
from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.raster import Scene, vector
from d2ls_infer.raster.vector import PolygonWriter

geopandas = pytest.importorskip("geopandas")
shapely = pytest.importorskip("shapely")

Write = Callable[..., Path]
Files = Callable[..., Path]
LABELS = LabelMap.of(["water", "forêt & <field>", "road"])
ENDINGS = [".gpkg", ".fgb", ".parquet"]


def map_of(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width) uint8: patches of classes 0 to 2, some nodata, some noise."""
    random = np.random.default_rng([height, width, seed])
    coarse = random.choice(np.array([0, 1, 2, NODATA], np.uint8), (height // 5 + 1, width // 5 + 1))
    labels = np.kron(coarse, np.ones((5, 5), np.uint8))[:height, :width]
    return np.where(random.random((height, width)) < 0.05, 1, labels).astype(np.uint8)


def confidence_of(labels: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).integers(60, 251, labels.shape).astype(np.uint8)


def landscape(size: int, seed: int) -> np.ndarray:
    """(size, size) uint8: classes 0 to 2 of a smooth field with some noise, as maps of real scenes are."""
    random = np.random.default_rng(seed)
    field = random.standard_normal((size, size))
    for axis in (0, 1):
        for _ in range(2):
            sums = np.cumsum(np.pad(field, [(9, 9) if a == axis else (0, 0) for a in (0, 1)], mode="wrap"), axis)
            field = np.take(sums, np.arange(size) + 18, axis) - np.take(sums, np.arange(size), axis)
    field /= field.std()
    return (field + 0.1 * random.standard_normal(field.shape) > 0).astype(np.uint8) + (field > 1).astype(np.uint8)


@pytest.fixture
def polygons_of(tmp_path: Path, write_raster: Write) -> Files:
    """A file of the polygons of a map, on a scene of a profile of its own."""

    def write(
        labels: np.ndarray,
        ending: str = ".gpkg",
        *,
        heights: tuple[int, ...] = (7,),
        profile: Any = None,
        **options: Any,
    ) -> Path:
        source = write_raster(tmp_path / "scene.tif", np.zeros((1, *labels.shape), np.uint8), **(profile or {}))
        (tmp_path / "out").mkdir(exist_ok=True)
        path = tmp_path / "out" / f"map{ending}"
        confidence = confidence_of(labels)
        with Scene.open(source, bands_needed=1) as scene:
            writer = PolygonWriter(path, like=scene, labels=LABELS, steps=250, **options)
            start = 0
            while start < len(labels):
                band = slice(start, start + heights[start % len(heights)])
                writer.write(labels[band], confidence[band])
                start = band.stop
            writer.finish()
            writer.publish()
        return path

    return write


def read(path: Path) -> Any:
    """The polygons as geopandas has them."""
    return geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
def test_polygons_burnt_back_are_the_map(polygons_of: Files, ending: str) -> None:
    labels = map_of(60, 50)
    path = polygons_of(labels, ending)
    assert names_in(path.parent) == [path.name]
    assert path.is_file()
    table = read(path)
    assert table.crs.to_epsg() == 32618
    assert set(table.columns) == {"class", "class_id", "area_m2", "pixels", "confidence", "geometry"}
    assert set(table.geom_type) == {"Polygon"}
    assert table.is_valid.all()
    place = Affine(2, 0, 500_000, 0, -2, 4_600_000)
    shapes = zip(table.geometry, table["class_id"], strict=True)
    assert np.array_equal(rasterize(shapes, labels.shape, fill=NODATA, transform=place, dtype="uint8"), labels)
    assert table.area.sum() == 4 * (labels != NODATA).sum(), "no polygon lies over another"
    assert [LABELS.names[index] for index in table["class_id"]] == list(table["class"])
    assert table.geometry.exterior.is_ccw.all()


@pytest.mark.parametrize("ending", ENDINGS)
def test_columns_tell_of_the_pixels(polygons_of: Files, ending: str) -> None:
    labels = map_of(40, 30)
    table = read(polygons_of(labels, ending))
    confidence = confidence_of(labels) / 250
    place = Affine(2, 0, 500_000, 0, -2, 4_600_000)
    assert (table["pixels"] * 4 == table["area_m2"]).all()
    np.testing.assert_allclose(table.area, table["area_m2"])
    for row in table.itertuples():
        mask = rasterize([row.geometry], labels.shape, transform=place).astype(bool)
        assert row.pixels == mask.sum()
        assert row.confidence == pytest.approx(confidence[mask].mean())


@given(
    st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 1000)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_the_file_does_not_depend_on_the_bands(
    polygons_of: Files, height: int, width: int, heights: list[int], seed: int
) -> None:
    labels = map_of(height, width, seed)
    tables = [
        read(polygons_of(labels, ".parquet", heights=tuple(each), overwrite=True)).normalize().to_wkb().tolist()
        for each in ([height], heights)
    ]
    assert sorted(tables[0]) == sorted(tables[1])


@pytest.mark.parametrize(
    "place",
    [Affine(2, 0, 5e5, 0, 2, 4.6e6), Affine(1.5, 0.5, 5e5, 0.5, -1.5, 4.6e6), Affine(-2, 0, 9, 0, -3, 9)],
    ids=["south up", "rotated", "mirrored"],
)
def test_any_transform_puts_polygons_where_the_map_is(polygons_of: Files, place: Affine) -> None:
    labels = map_of(30, 30)
    table = read(polygons_of(labels, profile={"transform": place}))
    shapes = zip(table.geometry, table["class_id"], strict=True)
    assert np.array_equal(rasterize(shapes, labels.shape, fill=NODATA, transform=place, dtype="uint8"), labels)
    assert table.geometry.exterior.is_ccw.all()
    np.testing.assert_allclose(table.area, table["area_m2"])


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
def test_areas_are_those_on_the_ellipsoid(polygons_of: Files, crs: str) -> None:
    """Against pyproj, which integrates along the edges of the polygons themselves."""
    pyproj = pytest.importorskip("pyproj")
    labels = map_of(40, 40)
    step, left, top = (1e-4, 8.5, 60.3) if crs == "EPSG:4326" else (10.0, 946_000.0, 8_460_000.0)
    table = read(polygons_of(labels, profile={"crs": crs, "transform": Affine(step, 0, left, 0, -step, top)}))
    ellipsoid = pyproj.Geod(ellps="WGS84")
    expected = [abs(ellipsoid.geometry_area_perimeter(shape)[0]) for shape in table.to_crs(4326).geometry]
    np.testing.assert_allclose(table["area_m2"], expected, rtol=1e-3)
    if crs == "EPSG:3857":
        assert (table.area > 3.5 * table["area_m2"]).all(), "in Mercator the ground looks four times as large at 60°"


@pytest.mark.parametrize("ending", ENDINGS)
def test_small_areas_are_left_out_and_nobody_gets_their_ground(polygons_of: Files, ending: str) -> None:
    labels = map_of(60, 50)
    everything = read(polygons_of(labels, ending))
    table = read(polygons_of(labels, ending, min_area_m2=20.0, overwrite=True))
    assert 0 < len(table) < len(everything)
    assert table["area_m2"].min() >= 20
    large = everything[everything["area_m2"] >= 20]
    assert sorted(table.normalize().to_wkb()) == sorted(large.normalize().to_wkb())


@pytest.mark.parametrize("least_px", [0, 3])
@pytest.mark.parametrize(
    ("crs", "place", "pixel_m"),
    [
        ("EPSG:32617", Affine(0.6, 0, 275_485.2, 0, -0.6, 4_297_519.2), 0.6),
        ("EPSG:4326", Affine(2e-5, 0, 8.5, 0, -1e-5, 60.0), 1.1),
        ("EPSG:2263", Affine(3.1, 0.7, 912_345.6, 0.7, -3.1, 123_456.7), 0.97),
    ],
    ids=["metres", "degrees", "feet, rotated"],
)
def test_simplified_neighbours_share_their_borders(
    polygons_of: Files, crs: str, place: Affine, pixel_m: float, least_px: int
) -> None:
    """Coordinates that are rounded, as those of most scenes are: what just does not cross must not come to do so."""
    labels = landscape(300, seed=2)
    step = abs(place.determinant) ** 0.5
    options: dict[str, Any] = {"profile": {"crs": crs, "transform": place}, "overwrite": True}
    options["min_area_m2"] = least_px * pixel_m**2
    exact = read(polygons_of(labels, ".parquet", **options))
    table = read(polygons_of(labels, ".parquet", **options, simplify_m=1.7 * pixel_m))
    assert shapely.coverage_is_valid(table.geometry.values)
    assert table.is_valid.all()
    assert len(table) == len(exact)
    assert table.get_coordinates().shape[0] < 0.6 * exact.get_coordinates().shape[0]
    union = [shapely.area(each.geometry.values).sum() for each in (table, exact)]
    assert union[0] == pytest.approx(union[1], rel=1e-9 if least_px == 0 else 0.02), "no gap, no overlap"
    assert sorted(table["area_m2"]) == pytest.approx(sorted(exact["area_m2"])), "areas are those of the pixels"
    moved = [
        shapely.hausdorff_distance(*pair) for pair in zip(table.geometry.values, exact.geometry.values, strict=True)
    ]
    assert max(moved) < 8 * step
    assert table.geometry.exterior.is_ccw.all()


def test_without_a_place_polygons_are_in_pixels(polygons_of: Files) -> None:
    labels = map_of(20, 30)
    table = read(polygons_of(labels, profile={"crs": None, "transform": Affine.identity(), "driver": "PNG"}))
    assert table.crs is None
    assert table["area_m2"].isna().all()
    assert np.array_equal(
        rasterize(zip(table.geometry, table["class_id"], strict=True), labels.shape, fill=NODATA, dtype="uint8"), labels
    )


def test_a_parquet_file_without_a_coordinate_system_says_so(polygons_of: Files) -> None:
    """Without a word, degrees would be meant."""
    path = polygons_of(map_of(9, 9), ".parquet", profile={"crs": None})
    assert read(path).crs is None
    metadata = importlib.import_module("pyarrow.parquet").read_metadata(path).metadata
    assert json.loads(metadata[b"geo"])["columns"]["geometry"]["crs"] is None


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_map_without_a_class_is_a_file_without_a_polygon(polygons_of: Files, ending: str) -> None:
    table = read(polygons_of(np.full((9, 9), NODATA, np.uint8), ending, simplify_m=2.0))
    assert len(table) == 0
    assert "class" in table.columns


def test_many_polygons_go_to_the_file_in_batches(polygons_of: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = map_of(60, 50)
    whole = [len(read(polygons_of(labels, ending))) for ending in ENDINGS]
    monkeypatch.setattr(vector, "BATCH", 20)
    for ending, count in zip(ENDINGS, whole, strict=True):
        assert len(read(polygons_of(labels, ending, overwrite=True))) == count > 60


def test_the_package_tells_how_it_was_made(polygons_of: Files) -> None:
    import pyogrio

    path = polygons_of(map_of(9, 9), tags={"D2LS_MODEL": "test"})
    assert pyogrio.read_info(path)["layer_metadata"]["D2LS_MODEL"] == "test"


def test_corrected_polygons_are_masks_to_train_on(polygons_of: Files, tmp_path: Path) -> None:
    from d2ls_infer.raster.polygons import burn_polygons

    labels = map_of(30, 30)
    path = polygons_of(labels)
    assert np.array_equal(burn_polygons(path, like=tmp_path / "scene.tif", labels=LABELS), labels)


# What goes wrong


@pytest.mark.parametrize(
    ("ending", "options", "missing", "words"),
    [
        (".gpkg", {}, "pyogrio", "pyogrio"),
        (".fgb", {}, "pyogrio", "pyogrio"),
        (".parquet", {}, "pyarrow", "pyarrow"),
        (".gpkg", {"simplify_m": 1.0}, "shapely", "shapely"),
    ],
)
def test_what_is_not_installed_is_told(
    polygons_of: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    options: dict[str, Any],
    missing: str,
    words: str,
) -> None:
    def import_module(name: str) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return importlib.__import__(name)

    monkeypatch.setattr(vector.importlib, "import_module", import_module)
    with pytest.raises(UsageError, match=rf"need {words}; pip install 'd2ls-infer\[vector\]'"):
        polygons_of(map_of(9, 9), ending, **options)
    assert names_in(tmp_path / "out") == []


def test_an_old_shapely_is_told(polygons_of: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(shapely, "coverage_simplify")
    with pytest.raises(UsageError, match=r"shapely 2\.1 or newer, here is"):
        polygons_of(map_of(9, 9), simplify_m=1.0)


@pytest.mark.parametrize("ending", [".shp", ".geojson", ".tif", ""])
def test_another_ending_is_refused(polygons_of: Files, ending: str) -> None:
    with pytest.raises(UsageError, match=r"\.gpkg, \.fgb, \.parquet"):
        polygons_of(map_of(9, 9), ending)


@pytest.mark.parametrize("options", [{"min_area_m2": 5.0}, {"simplify_m": 5.0}])
def test_without_a_place_nothing_is_measured(polygons_of: Files, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no place on the ground"):
        polygons_of(map_of(9, 9), profile={"crs": None}, **options)


def test_a_scene_placed_by_points_is_refused(tmp_path: Path, write_raster: Write) -> None:
    import rasterio
    from rasterio.control import GroundControlPoint
    from rasterio.errors import NotGeoreferencedWarning

    source = write_raster(tmp_path / "scene.tif", np.zeros((1, 9, 9), np.uint8), georeferenced=False)
    points = [GroundControlPoint(row=r, col=c, x=10 + c, y=50 - r) for r in (0, 9) for c in (0, 9)]
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(source, "r+") as dataset:
        dataset.gcps = points, "EPSG:4326"
    with Scene.open(source, bands_needed=1) as scene, pytest.raises(UsageError, match="gdalwarp"):
        PolygonWriter(tmp_path / "map.gpkg", like=scene, labels=LABELS, steps=250)


def test_an_output_that_exists_or_has_no_folder(polygons_of: Files, tmp_path: Path) -> None:
    path = polygons_of(map_of(9, 9))
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        polygons_of(map_of(9, 9))
    assert path.read_bytes() == before
    with pytest.raises(MissingFileError):
        polygons_of(map_of(9, 9), "/nowhere/map.gpkg")


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_discarded_leaves_nothing(tmp_path: Path, write_raster: Write, ending: str) -> None:
    source = write_raster(tmp_path / "scene.tif", np.zeros((1, 60, 50), np.uint8))
    (tmp_path / "out").mkdir()
    labels = map_of(60, 50)
    with Scene.open(source, bands_needed=1) as scene:
        writer = PolygonWriter(tmp_path / "out" / f"map{ending}", like=scene, labels=LABELS, steps=250)
        writer.write(labels[:50], labels[:50])
        writer.flush()
        assert all("partial" in name for name in names_in(tmp_path / "out"))
        writer.discard()
    assert names_in(tmp_path / "out") == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from d2ls_infer.errors import RasterError
from d2ls_infer.labels import LabelMap
from d2ls_infer.raster import Scene
from d2ls_infer.raster.vector import PolygonWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
labels = np.random.default_rng(0).integers(0, 2, (100, 100), dtype=np.uint8)
folder = Path(sys.argv[2])
for ending in (".gpkg", ".fgb", ".parquet"):
    for limit in (10_000, 40_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with Scene.open(sys.argv[1], bands_needed=1) as scene:
            try:
                writer = PolygonWriter(
                    folder / f"map{ending}", like=scene, labels=LabelMap.of(["a", "b"]), steps=250, overwrite=True
                )
                writer.write(labels, labels)
                writer.finish()
            except RasterError as error:
                print("RasterError" if "cannot write" in str(error) else error, len(list(folder.iterdir())))
            else:
                print("no error", ending, limit)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file by POSIX means")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, write_raster: Write) -> None:
    source = write_raster(tmp_path / "scene.tif", np.zeros((1, 100, 100), np.uint8))
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["RasterError 0"] * 6, done.stderr


def test_ours_is_the_error_of_the_file(polygons_of: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise OSError("broken")

    monkeypatch.setattr(vector.ParquetFile, "close", fail)
    with pytest.raises(RasterError, match=r"cannot write .*map\.parquet: broken"):
        polygons_of(map_of(9, 9), ".parquet")
    assert names_in(tmp_path / "out") == []
