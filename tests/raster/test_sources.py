"""What users call a scene: files, addresses, patterns, folders, lists, STAC items, parts of containers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio.shutil

from d2ls_infer.errors import D2LSError, MissingFileError, RasterError, UsageError
from d2ls_infer.raster import Cut, Scene, find_scenes, home_of

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]


@pytest.fixture
def tiles(tmp_path: Path, write_raster: Write, pixels: Pixels) -> Path:
    """A folder of three scenes, a map of ours, and other things."""
    folder = tmp_path / "tiles"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.tif", "a.TIF", "deep/c.tif", "a_d2ls-naip.tif"):
        write_raster(folder / name, pixels(3, 6, 5))
    (folder / "a_d2ls-naip.tif.aux.xml").write_text("<PAMDataset/>")
    (folder / "notes.md").write_text("hello")
    return folder


def read(source: str, **options: Any) -> np.ndarray:
    with Scene.open(source, **({"bands_needed": 3} | options)) as scene:
        return scene.rows(0, scene.height).values


# Files and folders


def test_a_name_is_itself(tiles: Path) -> None:
    names = [str(tiles / "b.tif"), "nowhere.tif", "https://host/x.tif", "s3://bucket/x.tif", 'NETCDF:"a.nc":red']
    assert find_scenes(names) == names
    assert find_scenes([tiles / "b.tif"]) == [str(tiles / "b.tif")]


def test_a_folder_is_the_scenes_in_it(tiles: Path) -> None:
    assert find_scenes([tiles]) == [str(tiles / "a.TIF"), str(tiles / "b.tif")]


def test_a_pattern_is_the_files_that_match(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_scenes([str(tiles / "*.tif")]) == [str(tiles / "b.tif")]
    assert find_scenes([str(tiles / "*")]) == [str(tiles / "a.TIF"), str(tiles / "b.tif")]
    assert find_scenes([str(tiles / "**/*.tif")]) == [str(tiles / "b.tif"), str(tiles / "deep/c.tif")]
    monkeypatch.chdir(tiles)
    assert find_scenes(["[a-c].tif", "deep/?.tif"]) == ["b.tif", "deep/c.tif"]
    (tiles / "b[1].tif").write_bytes((tiles / "b.tif").read_bytes())
    assert find_scenes(["b[1].tif"]) == ["b[1].tif"]  # the name of a file, not a pattern


@pytest.mark.parametrize("name", ["*.jp2", "nothing/**"])
def test_a_pattern_without_a_match_is_missing(tiles: Path, name: str) -> None:
    with pytest.raises(MissingFileError, match="no scene is called"):
        find_scenes([str(tiles / name)])


def test_a_folder_without_a_scene_is_missing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(MissingFileError, match="no scene in the folder"):
        find_scenes([tmp_path])


def test_a_folder_that_is_a_raster_is_one(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    rasterio.shutil.copy(write_raster(tmp_path / "a.tif", pixels(3, 6, 5)), tmp_path / "a.zarr", driver="Zarr")
    assert find_scenes([tmp_path / "a.zarr"]) == [str(tmp_path / "a.zarr")]


# Lists


@pytest.mark.parametrize("name", ["{}", "@{}"])
def test_a_list_holds_a_scene_a_line(tiles: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen from here or from the list; with patterns and addresses."""
    path = tiles / "list.txt"
    text = f"# scenes\nb.tif\n\n  {tiles / 'a.TIF'}  \n  # more.tif\nb#1 #2.tif\ndeep/*.tif\nhttps://host/x.tif#part\n"
    path.write_text(text, encoding="utf-8-sig")
    (tiles / "b#1 #2.tif").touch()
    scenes = ["b.tif", str(tiles / "a.TIF"), "b#1 #2.tif", "deep/c.tif", "https://host/x.tif#part"]
    assert find_scenes([name.format(path)]) == [
        place if Path(place).is_absolute() or "://" in place else str(tiles / place) for place in scenes
    ]
    monkeypatch.chdir(tiles)
    assert find_scenes([name.format("list.txt")]) == scenes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# tiles\nnowhere.tif", ["list.txt is not a raster", "line 2 names no file: nowhere.tif"]),
        (b"*.jp2", ["line 1 names no file: *.jp2"]),
        (b"# nothing\n\n", ["it is empty"]),
        (b"\xff\xfe\x00", ["not text in UTF-8"]),
        (b"list.txt", ["line 1 names no raster: list.txt", "lists do not go into lists"]),
    ],
)
def test_a_list_that_is_none(tiles: Path, content: bytes, words: list[str]) -> None:
    (tiles / "list.txt").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        find_scenes([tiles / "list.txt"])
    for word in words:
        assert word in str(caught.value)


def test_what_a_list_names_and_is_not_there_stops_nothing_else(tiles: Path) -> None:
    (tiles / "list.txt").write_text("nowhere.tif\nb.tif\n*.jp2\nnowhere.json\n")
    assert find_scenes([tiles / "list.txt"]) == ["nowhere.tif", str(tiles / "b.tif"), "*.jp2", "nowhere.json"]


def test_a_missing_list_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such list"):
        find_scenes([f"@{tmp_path / 'list.txt'}"])


def test_a_raster_in_a_text_file_is_no_list(tmp_path: Path) -> None:
    """Esri's ASCII grids often end in .txt."""
    path = tmp_path / "grid.txt"
    path.write_text("ncols 2\nnrows 2\nxllcorner 0\nyllcorner 0\ncellsize 1\n1 2\n3 4\n")
    assert find_scenes([path]) == [str(path)]
    assert read(str(path), bands_needed=1)[0].tolist() == [[1, 2], [3, 4]]


# STAC


def write_item(path: Path, assets: Mapping[str, Mapping[str, Any]]) -> Path:
    path.write_text(json.dumps({"type": "Feature", "stac_version": "1.0.0", "id": "x", "assets": assets}))
    return path


DATA = {"href": "./b.tif", "roles": ["data"], "type": "image/tiff; application=geotiff; profile=cloud-optimized"}
THUMBNAIL = {"href": "t.png", "roles": ["thumbnail"], "type": "image/png"}
METADATA = {"href": "m.xml", "type": "application/xml", "roles": ["metadata"]}


@pytest.mark.parametrize(
    "assets",
    [
        {"thumb": THUMBNAIL, "image": DATA, "meta": METADATA},
        {"image": {"href": "b.tif", "type": "image/tiff"}, "thumb": THUMBNAIL},  # no roles: by type
        {"image": DATA, "preview": {"href": "p.png", "type": "image/png"}},  # the role goes before the type
    ],
)
def test_a_stac_item_is_its_asset_of_data(tiles: Path, assets: dict[str, Any]) -> None:
    item = write_item(tiles / "item.json", assets)
    assert [Path(scene) for scene in find_scenes([item])] == [tiles / "b.tif"]


def test_an_asset_may_be_chosen(tiles: Path) -> None:
    item = write_item(
        tiles / "item.json", {"one": DATA, "two": DATA | {"href": "a.TIF"}, "far": DATA | {"href": "s3://b/x.tif"}}
    )
    assert find_scenes([item], asset="two") == [str(tiles / "a.TIF")]
    assert find_scenes([item], asset="far") == ["s3://b/x.tif"]
    (tiles / "list.txt").write_text("item.json\nb.tif")
    (tiles / "items.lst").write_text("item.json\nb.tif")
    for name in (tiles / "list.txt", f"@{tiles / 'items.lst'}"):
        assert find_scenes([name], asset="two") == [str(tiles / "a.TIF"), str(tiles / "b.tif")]
    local = write_item(tiles / "local.json", {"one": DATA | {"href": (tiles / "b.tif").as_uri()}})
    assert find_scenes([local]) == [str(tiles / "b.tif")]


@pytest.mark.parametrize(
    ("content", "asset", "words"),
    [
        ({"red": DATA, "green": DATA}, None, ["which asset of", "--asset", "2 are data: red, green", "gdalbuildvrt"]),
        ({"thumb": THUMBNAIL, "meta": METADATA}, None, ["which asset of", "it has thumb, meta"]),
        ({}, None, ["it has none"]),
        ({"red": DATA}, "nir", ["no asset 'nir'", "it has red"]),
        ("hello", None, ["is not JSON"]),
        ('{"type": "FeatureCollection", "features": []}', None, ["has no items"]),
        ('{"type": "FeatureCollection", "features": [{"id": "x"}]}', None, ["no STAC item", "stac_version"]),
        (
            '{"type": "FeatureCollection", "features": [], "links": [{"rel": "next", "href": "?page=2"}]}',
            None,
            ["one page of several"],
        ),
        ('{"type": "Collection", "stac_version": "1.0.0", "links": []}', None, ["leads to no items"]),
        (
            '{"type": "Catalog", "stac_version": "1.0.0", "links": [{"rel": "child", "href": "item.json"}]}',
            None,
            ["leads to itself"],
        ),
        ('{"stac_version": "1.0.0", "assets": {"red": {}}}', None, ["an href each"]),
        ("[1, 2]", None, ["no STAC item"]),
    ],
)
def test_a_stac_item_that_leaves_a_question(
    tmp_path: Path, content: str | dict[str, Any], asset: str | None, words: list[str]
) -> None:
    path = tmp_path / "item.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        write_item(path, content)
    with pytest.raises(UsageError) as caught:
        find_scenes([path], asset=asset)
    for word in words:
        assert word in str(caught.value)


def test_a_collection_is_its_items(tiles: Path) -> None:
    items = [
        json.loads(write_item(tiles / f"{name}.json", {"image": DATA | {"href": f"{name}.tif"}}).read_text())
        for name in "ab"
    ]
    answer = tiles / "search.json"
    answer.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    expected = [str(tiles / "a.tif"), str(tiles / "b.tif")]
    assert find_scenes([answer]) == expected
    (tiles / "inner").mkdir()
    inner = {
        "type": "Collection",
        "stac_version": "1.0.0",
        "links": [{"rel": "item", "href": f"../{name}.json"} for name in "ab"],
    }
    (tiles / "inner" / "collection.json").write_text(json.dumps(inner))
    links = [{"rel": "self", "href": "catalog.json"}, {"rel": "child", "href": "./inner/collection.json"}]
    (tiles / "catalog.json").write_text(json.dumps({"type": "Catalog", "stac_version": "1.0.0", "links": links}))
    found = find_scenes([tiles / "catalog.json"], asset="image")
    assert [Path(scene).resolve() for scene in found] == [Path(scene).resolve() for scene in expected]


def test_a_collection_that_leads_to_itself_by_a_detour_is_told(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "catalog.json"
    path.write_text(
        json.dumps({"type": "Catalog", "links": [{"rel": "child", "href": "../inner/catalog.json"}]}), encoding="utf-8"
    )
    with pytest.raises(UsageError, match="leads to itself"):
        find_scenes([path])


def test_an_item_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such file: .*item\.json"):
        find_scenes([tmp_path / "item.json"])
    with pytest.raises(UsageError, match="file, or over http"):
        find_scenes(["s3://bucket/item.json"])


def test_an_asset_without_an_item_is_refused(tiles: Path) -> None:
    with pytest.raises(UsageError, match="--asset chooses from a STAC item"):
        find_scenes([tiles / "b.tif"], asset="red")


# Containers


def write_group(path: Path, arrays: Mapping[str, np.ndarray], dtype: str = "|u1") -> Path:
    """A Zarr group of arrays (bands, H, W) of bytes, uncompressed."""
    path.mkdir()
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    for name, array in arrays.items():
        (path / name).mkdir()
        about = {"zarr_format": 2, "shape": array.shape, "chunks": array.shape, "dtype": dtype, "order": "C"}
        about |= {"compressor": None, "filters": None, "fill_value": 0}
        (path / name / ".zarray").write_text(json.dumps(about))
        (path / name / "0.0.0").write_bytes(array.tobytes())
    return path


def test_a_container_of_one_raster_is_that_raster(tmp_path: Path, pixels: Pixels) -> None:
    array = pixels(3, 8, 7)
    assert np.array_equal(read(str(write_group(tmp_path / "one.zarr", {"image": array}))), array)


def test_an_array_of_words_is_no_raster(tmp_path: Path, pixels: Pixels) -> None:
    path = write_group(tmp_path / "words.zarr", {"image": pixels(3, 8, 7)}, dtype="|S1")
    for name in (str(path), f'ZARR:"{path}":/image'):
        with pytest.raises(UsageError, match=r"words\.zarr.* (is not a raster that GDAL can open|has 0 bands)"):
            read(name)


def test_of_a_container_of_several_it_is_asked_which(tmp_path: Path, pixels: Pixels) -> None:
    image, other = pixels(3, 8, 7), pixels(3, 9, 6)
    path = write_group(tmp_path / "two.zarr", {"image": image, "other": other})
    with pytest.raises(UsageError, match="0 bands of its own; it holds 2 rasters, name one of them: ") as caught:
        read(str(path))
    assert find_scenes([path]) == [str(path)]  # not a folder of scenes
    names = str(caught.value).partition("one of them: ")[2].split(", ")
    assert np.array_equal(read(names[0]), image)
    assert np.array_equal(read(names[1]), other)
    assert find_scenes(names) == names
    assert home_of(names[1]) == (tmp_path, "two_other")


@pytest.mark.parametrize("options", [{}, {"FORMAT": "NC4"}], ids=["classic", "HDF5 inside"])
def test_a_variable_of_a_netcdf_file(
    tmp_path: Path, write_raster: Write, pixels: Pixels, options: dict[str, str]
) -> None:
    array = pixels(2, 8, 7)
    rasterio.shutil.copy(write_raster(tmp_path / "a.tif", array), tmp_path / "a.nc", driver="netCDF", **options)
    with pytest.raises(UsageError, match=r"it holds 2 rasters, name one of them: netcdf:.*Band1, netcdf:.*Band2"):
        read(str(tmp_path / "a.nc"))
    name = f'NETCDF:"{tmp_path / "a.nc"}":Band2'
    with Scene.open(name, bands_needed=1) as scene:
        assert np.array_equal(scene.rows(0, 8).values[0], array[1])
        assert scene.crs.to_epsg() == 32618
    assert home_of(name) == (tmp_path, "a_Band2")


# Names of maps


@pytest.mark.parametrize(
    ("source", "home", "stem"),
    [
        ("some/where/scene.v1.tif", "some/where", "scene.v1"),
        ("scene", ".", "scene"),
        ("https://host/a/scene%201.tif?token=abc/def", ".", "scene 1"),
        ("s3://bucket/key/scene.tif", ".", "scene"),
        ("/vsizip/a.zip/in/scene.tif", ".", "scene"),
        ("zip://some/a.zip!scene.tif", ".", "a"),
        ("https://host/", ".", "scene"),
        ('NETCDF:"no/such.nc":/a/b', ".", "no_such.nc_a_b"),
    ],
)
def test_a_map_is_called_by_its_scene_and_lies_beside_it(source: str, home: str, stem: str) -> None:
    found = home_of(source)
    assert found[0] == Path(home)
    assert found[1] == stem or source.startswith("zip://")


# Over the network


@pytest.fixture
def cog(web: SimpleNamespace, write_raster: Write, pixels: Pixels) -> np.ndarray:
    """A Cloud Optimized GeoTIFF of 2048 x 2048 random pixels, 12.6 MB, on the server as scene.tif."""
    array = pixels(3, 2048, 2048)
    write_raster(web.folder / "plain.tif", array)
    options = {"driver": "COG", "compress": "NONE", "blocksize": 256, "overviews": "NONE"}
    rasterio.shutil.copy(web.folder / "plain.tif", web.folder / "scene.tif", **options)
    return array


def test_of_a_remote_scene_only_what_is_needed_is_read(web: SimpleNamespace, cog: np.ndarray) -> None:
    """A box of 100 x 100 pixels touches four blocks of 256 x 256: 0.8 MB and the header, of 12.6 MB."""
    size = (web.folder / "scene.tif").stat().st_size
    web.sent()
    left, top = 500_000 + 2 * 1000, 4_600_000 - 2 * 1000
    with Scene.open(
        f"{web.address}/scene.tif", bands_needed=3, cut=Cut.of(bbox=(left, top - 200, left + 200, top))
    ) as scene:
        values, valid = scene.rows(0, scene.height)
        assert (scene.transform.c, scene.transform.f) == (left, top)
    sent = web.sent()
    print(f"{sent} of {size} bytes were read")
    assert np.array_equal(values, cog[:, 1000:1100, 1000:1100])
    assert valid.all()
    assert size > 12_000_000
    assert 4 * 3 * 256 * 256 <= sent < 1_000_000, f"{sent} of {size} bytes were read"


def test_a_remote_geotiff_is_opened_by_few_requests(web: SimpleNamespace, write_raster: Write, pixels: Pixels) -> None:
    """And a scene of another format with what lies beside it."""
    array = pixels(3, 20, 30)
    write_raster(web.folder / "scene.tif", array)
    write_raster(web.folder / "scene.png", array, driver="PNG", worldfile="YES")
    (web.folder / "scene.png.aux.xml").unlink()
    assert np.array_equal(read(f"{web.address}/scene.tif"), array)
    assert web.requests() <= 3
    with Scene.open(f"{web.address}/scene.png", bands_needed=3) as scene:
        assert np.array_equal(scene.rows(0, 20).values, array)
        assert (scene.transform.c, scene.transform.f) == (500_000, 4_600_000)


def test_a_scene_in_a_bucket(
    web: SimpleNamespace, write_raster: Write, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_S3_ENDPOINT": web.root.removeprefix("http://"),
        "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE",
        "AWS_NO_SIGN_REQUEST": "YES",
    }.items():
        monkeypatch.setenv(name, value)
    array = pixels(3, 20, 30)
    write_raster(web.folder / "scene.tif", array)
    assert np.array_equal(read(f"s3://{web.name}/scene.tif"), array)


def test_a_stac_item_on_a_server(web: SimpleNamespace, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(3, 20, 30)
    write_raster(web.folder / "b.tif", array)
    write_item(web.folder / "item.json", {"image": DATA, "thumb": THUMBNAIL})
    (scene,) = find_scenes([f"{web.address}/item.json"])
    assert scene == f"{web.address}/b.tif"
    assert np.array_equal(read(scene), array)


@pytest.mark.parametrize("name", ["scene.tif", "item.json"])
def test_what_is_not_on_a_server_is_told(web: SimpleNamespace, name: str) -> None:
    for address in (web.address, "http://127.0.0.1:1"):
        with pytest.raises(RasterError, match=f"cannot open {address}/{name}: ") as caught:
            read(find_scenes([f"{address}/{name}"])[0])
        assert "\n" not in str(caught.value)


def test_a_remote_scene_that_ends_early_is_an_error(web: SimpleNamespace, write_raster: Write, pixels: Pixels) -> None:
    path = write_raster(web.folder / "scene.tif", pixels(3, 300, 200))
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(RasterError, match=r"cannot read http.*rows 0 to 299"):
        read(f"{web.address}/scene.tif")


def test_no_name_is_a_traceback() -> None:
    for name in ("", "x" * 5000, "\0", "a\nb", "NETCDF:", "@", "https://", "/vsimem/nothing", "zip://x!y", "s3://"):
        with pytest.raises(D2LSError):
            read(find_scenes([name])[0])
