"""Class maps as they lie on disk: grid, values, colours, names; and what is there after something went wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC

from d2ls_infer.errors import MissingFileError, OutputExistsError, RasterError, UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.raster import RasterWriter, Scene, check_output

Write = Callable[..., Path]
ReadMap = Callable[[Path], SimpleNamespace]
LABELS = LabelMap(("water", "forêt & <field>", "road"), ((1, 2, 3), (40, 200, 60), (255, 255, 0)))
as_root = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture
def make_scene(tmp_path: Path, write_raster: Write) -> Callable[..., Path]:
    """A scene of one band of zeros, in a folder of its own."""

    def make(height: int = 300, width: int = 270, **profile: Any) -> Path:
        folder = tmp_path / "scenes"
        folder.mkdir(exist_ok=True)
        return write_raster(folder / "scene.tif", np.zeros((1, height, width), np.uint8), **profile)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for the maps."""
    path = tmp_path / "maps"
    path.mkdir()
    return path


def labels_of(height: int, width: int) -> np.ndarray:
    """(height, width) uint8: classes 0 to 2, and nodata."""
    random = np.random.default_rng([height, width])
    return random.choice(np.array([0, 1, 2, 255], np.uint8), (height, width))


def write_map(scene_path: Path, path: Path, array: np.ndarray, *, chunk: int = 100, **options: Any) -> None:
    with (
        Scene.open(scene_path, bands_needed=1) as scene,
        RasterWriter.create(path, like=scene, **({"labels": LABELS} | options)) as writer,
    ):
        for start in range(0, len(array), chunk):
            writer.write(array[start : start + chunk])


def write_and_fail(scene_path: Path, path: Path, array: np.ndarray, fail: Callable[[], None], **options: Any) -> None:
    with (
        Scene.open(scene_path, bands_needed=1) as scene,
        RasterWriter.create(path, like=scene, labels=LABELS, **options) as writer,
    ):
        writer.write(array)
        fail()


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# A whole map


def test_a_map_lies_on_the_scenes_grid(make_scene: Callable[..., Path], folder: Path, read_map: ReadMap) -> None:
    scene, array = make_scene(), labels_of(300, 270)
    write_map(scene, folder / "map.tif", array)
    found = read_map(folder / "map.tif")
    assert np.array_equal(found.array, array)
    with rasterio.open(scene) as dataset:
        assert found.crs == dataset.crs
        assert found.transform == dataset.transform


def test_a_map_is_a_tiled_compressed_geotiff_of_one_byte_per_pixel(
    make_scene: Callable[..., Path], folder: Path, read_map: ReadMap
) -> None:
    write_map(make_scene(), folder / "map.tif", np.zeros((300, 270), np.uint8))
    found = read_map(folder / "map.tif")
    assert (found.count, found.dtype, found.nodata) == (1, "uint8", 255)
    assert found.profile["driver"] == "GTiff"
    assert found.profile["tiled"]
    assert found.block == (256, 256)
    assert found.profile["compress"] == "deflate"
    assert (folder / "map.tif").stat().st_size < 10_000


def test_a_map_has_the_colours_names_and_tags_of_its_classes(
    make_scene: Callable[..., Path], folder: Path, read_map: ReadMap
) -> None:
    write_map(
        make_scene(), folder / "map.tif", labels_of(300, 270), description="class (test)", tags={"D2LS_MODEL": "test"}
    )
    found = read_map(folder / "map.tif")
    assert [found.colormap[i] for i in range(3)] == [(1, 2, 3, 255), (40, 200, 60, 255), (255, 255, 0, 255)]
    assert found.colormap[255][3] == 0  # nodata is transparent
    assert found.description == "class (test)"
    assert found.tags["D2LS_MODEL"] == "test"
    assert [found.band_tags[f"CLASS_{i}"] for i in range(3)] == list(LABELS.names)
    assert found.categories == list(LABELS.names)


def test_gdal_reads_the_category_names_from_the_sidecar(make_scene: Callable[..., Path], folder: Path) -> None:
    """rasterio does not give them out, but GDAL copies what it read into a VRT."""
    write_map(make_scene(), folder / "map.tif", labels_of(300, 270))
    rasterio.shutil.copy(folder / "map.tif", folder / "map.vrt", driver="VRT")
    names = ElementTree.parse(folder / "map.vrt").getroot().findall("VRTRasterBand/CategoryNames/Category")
    assert [name.text for name in names] == list(LABELS.names)


def test_as_many_classes_as_a_byte_holds(make_scene: Callable[..., Path], folder: Path, read_map: ReadMap) -> None:
    labels = LabelMap.of([f"class {i}" for i in range(255)])
    array = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_map(make_scene(16, 16), folder / "map.tif", array, labels=labels)
    found = read_map(folder / "map.tif")
    assert np.array_equal(found.array, array)
    assert found.colormap[254] == (*labels.colors[254], 255)
    assert found.colormap[255][3] == 0
    assert found.categories == list(labels.names)


@pytest.mark.parametrize(
    "transform",
    [
        Affine(0.25, 0, 399_999.875, 0, -0.25, 5_700_000.125),
        Affine(2, 0, 500_000, 0, 2, 4_600_000),
        Affine(1.5, 0.5, 500_000, 0.5, -1.5, 4_600_000),
        Affine(-2, 0, 500_000, 0, -3, 4_600_000),
    ],
    ids=["fractions", "south up", "rotated", "mirrored"],
)
def test_any_transform_is_kept(
    make_scene: Callable[..., Path], folder: Path, read_map: ReadMap, transform: Affine
) -> None:
    write_map(make_scene(20, 30, transform=transform), folder / "map.tif", labels_of(20, 30))
    found = read_map(folder / "map.tif")
    assert found.transform == transform
    assert found.crs.to_epsg() == 32618


@pytest.mark.parametrize(
    "crs",
    [
        "EPSG:4326",
        "EPSG:2263",
        "EPSG:3857",
        "EPSG:32618+5773",
        'LOCAL_CS["site",UNIT["metre",1]]',
        "+proj=laea +lat_0=52 +lon_0=10 +ellps=GRS80 +units=m",
        "+proj=imoll +datum=WGS84",
        "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39.25 +lon_0=18 +datum=WGS84",
    ],
    ids=["degrees", "feet", "web mercator", "with heights", "local", "of its own", "interrupted", "rotated pole"],
)
def test_any_coordinate_system_is_kept(
    make_scene: Callable[..., Path], folder: Path, read_map: ReadMap, crs: str
) -> None:
    """Also one that GeoTIFF has no keys for: GDAL puts it into the sidecar."""
    scene = make_scene(20, 30, crs=crs)
    write_map(scene, folder / "map.tif", labels_of(20, 30))
    found = read_map(folder / "map.tif")
    with rasterio.open(scene) as dataset:
        assert dataset.crs
        assert found.crs == dataset.crs
    assert found.categories == list(LABELS.names)
    assert names_in(folder) == ["map.qml", "map.tif", "map.tif.aux.xml"]


def test_ground_control_points_are_kept(make_scene: Callable[..., Path], folder: Path, read_map: ReadMap) -> None:
    points = [
        GroundControlPoint(row=row, col=col, x=10 + col / 100, y=50 - row / 100, z=5.0)
        for row, col in ((0, 0), (0, 29), (19, 0), (19, 29))
    ]
    scene = make_scene(20, 30, georeferenced=False)
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(scene, "r+") as dataset:
        dataset.gcps = points, "EPSG:4326"
    write_map(scene, folder / "map.tif", labels_of(20, 30))
    found, crs = read_map(folder / "map.tif").gcps
    assert crs.to_epsg() == 4326
    assert [(p.row, p.col, p.x, p.y, p.z) for p in found] == [(p.row, p.col, p.x, p.y, p.z) for p in points]


def test_rational_polynomials_are_kept(make_scene: Callable[..., Path], folder: Path) -> None:
    """Raw satellite scenes have no other place on the ground."""
    line = [0.0, 1.0, *[0.0] * 18]
    one = [1.0, *[0.0] * 19]
    rpc = RPC(100.0, 50.0, 50.0, 0.1, one, line, 10.0, 10.0, 10.0, 0.1, one, line, 15.0, 15.0)
    scene = make_scene(20, 30, georeferenced=False, rpcs=rpc)
    write_map(scene, folder / "map.tif", labels_of(20, 30))
    with rasterio.open(scene) as dataset:
        expected = dataset.rpcs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(folder / "map.tif") as dataset:
            assert dataset.rpcs == expected


def test_a_scene_without_a_place_gives_a_map_without_one_and_no_warning(
    make_scene: Callable[..., Path], folder: Path, read_map: ReadMap
) -> None:
    array = labels_of(20, 30)
    write_map(make_scene(20, 30, georeferenced=False), folder / "map.tif", array)
    found = read_map(folder / "map.tif")
    assert found.crs is None
    assert found.transform.is_identity
    assert found.gcps == ([], None)
    assert np.array_equal(found.array, array)


def test_the_profile_of_the_scene_is_not_copied(
    tmp_path: Path, write_raster: Write, folder: Path, read_map: ReadMap
) -> None:
    """Neither its compression nor its nodata, its bands, its colours or its tags."""
    source = write_raster(
        tmp_path / "a.tif", np.ones((3, 32, 32), np.uint8), compress="jpeg", photometric="ycbcr", interleave="pixel",
        nodata=7,
    )  # fmt: skip
    with rasterio.open(source, "r+") as dataset:
        dataset.update_tags(TIFFTAG_COPYRIGHT="somebody")
    write_map(source, folder / "map.tif", labels_of(32, 32))
    found = read_map(folder / "map.tif")
    assert (found.nodata, found.count, found.profile["compress"]) == (255, 1, "deflate")
    assert "TIFFTAG_COPYRIGHT" not in found.tags


@pytest.mark.parametrize("about", [{}, {"cog": True}, {"labels": None, "description": ["a", "b", "c"]}], ids=str)
def test_threads_write_the_same_bytes(make_scene: Callable[..., Path], folder: Path, about: dict[str, Any]) -> None:
    scene, array = make_scene(1100, 1300), labels_of(1100, 1300)
    bands = len(about.get("description", ["class"]))
    for threads in (1, 4):
        with (
            Scene.open(scene, bands_needed=1) as opened,
            RasterWriter.create(
                folder / f"{threads}.tif", like=opened, threads=threads, **{"labels": LABELS} | about
            ) as writer,
        ):
            writer.write(np.stack([array] * bands))
    assert (folder / "1.tif").read_bytes() == (folder / "4.tif").read_bytes()


def test_whoever_has_counted_the_classes_need_not_do_it_again(make_scene: Callable[..., Path], folder: Path) -> None:
    """The counts are taken when the map is finished: they may still grow while rows are written."""
    scene, array = make_scene(), labels_of(300, 270)
    write_map(scene, folder / "counted.tif", array)
    counts = np.zeros(3, np.int64)
    with (
        Scene.open(scene, bands_needed=1) as opened,
        RasterWriter.create(folder / "given.tif", like=opened, labels=LABELS, counts=counts) as writer,
    ):
        writer.write(array)
        counts += np.bincount(array.ravel(), minlength=256)[:3]
    sidecars = [(folder / f"{name}.tif.aux.xml").read_bytes() for name in ("counted", "given")]
    assert sidecars[0] == sidecars[1]
    assert str(counts[0]).encode() in sidecars[0]


@given(st.integers(1, 600), st.integers(1, 20), st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_rows_may_come_in_pieces_of_any_height(
    write_raster: Write,
    read_map: ReadMap,
    tmp_path_factory: pytest.TempPathFactory,
    height: int,
    width: int,
    pieces: list[int],
) -> None:
    folder = tmp_path_factory.getbasetemp()
    scene_path = write_raster(folder / "pieces.tif", np.zeros((1, height, width), np.uint8))
    array = labels_of(height, width)
    with (
        Scene.open(scene_path, bands_needed=1) as scene,
        RasterWriter.create(folder / "pieces_map.tif", like=scene, labels=LABELS, overwrite=True) as writer,
    ):
        start = 0
        while start < height:
            piece = pieces[start % len(pieces)]
            writer.write(array[start : start + piece])
            start += piece
    assert np.array_equal(read_map(folder / "pieces_map.tif").array, array)


# On the way, and after a failure


def test_everything_goes_to_a_partial_file_until_the_end(make_scene: Callable[..., Path], folder: Path) -> None:
    with (
        Scene.open(make_scene(), bands_needed=1) as scene,
        RasterWriter.create(folder / "map.tif", like=scene, labels=LABELS) as writer,
    ):
        writer.write(labels_of(290, 270))
        assert names_in(folder) == ["map.tif.partial"]
        writer.write(labels_of(10, 270))
        assert names_in(folder) == ["map.tif.partial"]
    assert names_in(folder) == ["map.qml", "map.tif", "map.tif.aux.xml"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError(), SystemExit(3)])
@pytest.mark.parametrize("rows", [0, 10, 300])
def test_after_an_error_nothing_is_left(
    make_scene: Callable[..., Path], folder: Path, error: BaseException, rows: int
) -> None:
    with pytest.raises(type(error)) as caught:
        write_and_fail(make_scene(), folder / "map.tif", labels_of(rows, 270), raising(error))
    assert caught.value is error
    assert names_in(folder) == []


def test_after_an_error_an_older_map_is_untouched(make_scene: Callable[..., Path], folder: Path) -> None:
    scene_path = make_scene()
    write_map(scene_path, folder / "map.tif", np.zeros((300, 270), np.uint8))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RuntimeError):
        write_and_fail(scene_path, folder / "map.tif", labels_of(300, 270), raising(RuntimeError()), overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_too_few_rows_are_not_published(make_scene: Callable[..., Path], folder: Path) -> None:
    with pytest.raises(AssertionError):
        write_map(make_scene(), folder / "map.tif", labels_of(299, 270))
    assert names_in(folder) == []


def test_an_interruption_while_the_file_is_being_made_leaves_nothing(
    make_scene: Callable[..., Path], folder: Path
) -> None:
    class Interrupting(Mapping[str, str]):
        def __getitem__(self, key: str) -> str:
            raise KeyError(key)

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[str]:
            raise KeyboardInterrupt

    with Scene.open(make_scene(), bands_needed=1) as scene, pytest.raises(KeyboardInterrupt):
        RasterWriter.create(folder / "map.tif", like=scene, labels=LABELS, tags=Interrupting())
    assert names_in(folder) == []


def test_a_partial_file_of_a_killed_run_is_no_hindrance(
    make_scene: Callable[..., Path], folder: Path, read_map: ReadMap
) -> None:
    (folder / "map.tif.partial").write_bytes(b"half a map")
    array = labels_of(300, 270)
    write_map(make_scene(), folder / "map.tif", array)
    assert np.array_equal(read_map(folder / "map.tif").array, array)
    assert names_in(folder) == ["map.qml", "map.tif", "map.tif.aux.xml"]


def test_a_folder_where_the_partial_file_should_go_is_an_error_of_ours(
    make_scene: Callable[..., Path], folder: Path
) -> None:
    (folder / "map.tif.partial").mkdir()
    with Scene.open(make_scene(), bands_needed=1) as scene, pytest.raises(RasterError, match=r"map\.tif"):
        RasterWriter.create(folder / "map.tif", like=scene, labels=LABELS)
    assert names_in(folder) == ["map.tif.partial"]


def test_a_map_that_cannot_get_its_name_leaves_nothing(make_scene: Callable[..., Path], folder: Path) -> None:
    """Neither the file nor a sidecar without one. On Windows that is any map which another program holds open."""
    with pytest.raises(RasterError, match=r"map\.tif"):
        write_and_fail(make_scene(), folder / "map.tif", labels_of(300, 270), (folder / "map.tif").mkdir)
    assert names_in(folder) == ["map.tif"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from d2ls_infer.errors import RasterError
from d2ls_infer.labels import LabelMap
from d2ls_infer.raster import RasterWriter, Scene

def write_map(path):
    random = np.random.default_rng(0)
    labels = LabelMap.of(["a", "b", "c"])
    with Scene.open(sys.argv[1], bands_needed=1) as scene:
        with RasterWriter.create(path, like=scene, labels=labels, overwrite=True) as writer:
            for _ in range(8):
                writer.write(random.integers(0, 3, (256, scene.width), dtype=np.uint8))

path = Path(sys.argv[2])
write_map(path)
size = path.stat().st_size
for file in path.parent.iterdir():
    file.unlink()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (1_000, size // 2, size - 30_000, size - 2_000, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_map(path)
    except RasterError as error:
        print("RasterError" if "cannot write" in str(error) else error, len(list(path.parent.iterdir())))
    else:
        print("no error at", limit, "of", size)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file by POSIX means")
def test_a_full_disk_is_an_error_and_leaves_nothing(make_scene: Callable[..., Path], folder: Path) -> None:
    """GDAL writes late, and what fails while a file is being closed only goes to its log."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(make_scene(8 * 256, 512)), str(folder / "map.tif")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["RasterError 0"] * 5


# Before it begins


def test_an_output_that_exists_is_replaced_only_on_request(
    make_scene: Callable[..., Path], folder: Path, read_map: ReadMap
) -> None:
    scene, array = make_scene(), labels_of(300, 270)
    (folder / "map.tif").write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match=r"map\.tif exists.*--overwrite") as caught:
        write_map(scene, folder / "map.tif", array)
    assert isinstance(caught.value, FileExistsError)
    assert (folder / "map.tif").read_bytes() == b"precious"
    assert names_in(folder) == ["map.tif"]
    write_map(scene, folder / "map.tif", array, overwrite=True)
    assert np.array_equal(read_map(folder / "map.tif").array, array)


def test_what_belonged_to_a_replaced_map_does_not_stay_with_the_new_one(
    make_scene: Callable[..., Path], folder: Path
) -> None:
    """Pyramids beside the old map (QGIS makes such) would be shown in its place when zoomed out."""
    scene, path = make_scene(), folder / "map.tif"
    write_map(scene, path, np.zeros((300, 270), np.uint8))
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2], Resampling.nearest)
    assert (folder / "map.tif.ovr").exists()
    write_map(scene, path, np.ones((300, 270), np.uint8), overwrite=True)
    with rasterio.open(path) as dataset:
        assert (dataset.read(1, out_shape=(150, 135)) == 1).all()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("way", ["same", "relative", "symlink", "symlink to the folder"])
def test_the_scene_itself_is_never_the_output(
    make_scene: Callable[..., Path], tmp_path: Path, overwrite: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene()
    monkeypatch.chdir(scene.parent)
    (tmp_path / "link.tif").symlink_to(scene)
    (tmp_path / "link").symlink_to(scene.parent)
    output = {
        "same": scene,
        "relative": Path(scene.name),
        "symlink": tmp_path / "link.tif",
        "symlink to the folder": tmp_path / "link" / scene.name,
    }[way]
    before = scene.read_bytes()
    with pytest.raises(UsageError, match="is the scene itself"):
        write_map(scene, output, labels_of(300, 270), overwrite=overwrite)
    assert scene.read_bytes() == before
    assert names_in(scene.parent) == ["scene.tif"]


def test_a_file_that_the_scene_is_made_of_is_never_the_output(make_scene: Callable[..., Path], tmp_path: Path) -> None:
    """A VRT shows other files; to overwrite one would be to overwrite the scene."""
    scene = make_scene()
    rasterio.shutil.copy(scene, tmp_path / "scene.vrt", driver="VRT")
    before = scene.read_bytes()
    with pytest.raises(UsageError, match="scene"):
        write_map(tmp_path / "scene.vrt", scene, labels_of(300, 270), overwrite=True)
    assert scene.read_bytes() == before


def test_a_missing_folder_is_named(make_scene: Callable[..., Path], folder: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such folder: .*nowhere"):
        write_map(make_scene(), folder / "nowhere" / "map.tif", labels_of(300, 270))
    assert names_in(folder) == []


def test_a_folder_is_no_file_to_write(make_scene: Callable[..., Path], folder: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        write_map(make_scene(), folder, labels_of(300, 270), overwrite=True)


@pytest.mark.skipif(as_root, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error_before_anything_is_done(make_scene: Callable[..., Path], folder: Path) -> None:
    folder.chmod(0o500)
    try:
        with pytest.raises(RasterError, match="cannot write to the folder"):
            check_output(folder / "map.tif", source=str(make_scene()), overwrite=False)
    finally:
        folder.chmod(0o700)


def test_an_output_beside_a_remote_scene_is_fine(folder: Path) -> None:
    check_output(folder / "map.tif", source="https://example.org/scene.tif", overwrite=False)
    check_output(folder / "map.tif", source="/vsicurl/https://example.org/scene.tif", overwrite=False)
