"""Outputs on object stores: the same bytes as here, all of them or none."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from d2ls_infer import FailedScene, PredictResult, journal, predict_many, predict_raster
from d2ls_infer.batch import plan_many
from d2ls_infer.errors import D2LSError, OutputExistsError, RasterError, StoreError, UsageError
from d2ls_infer.outputs import OutputOptions
from d2ls_infer.plan import Plan
from d2ls_infer.store import address_of, at_hand, check_writable, exists, names_in, place, remove

fsspec = pytest.importorskip("fsspec")
memory = pytest.importorskip("fsspec.implementations.memory")

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]

TILES: dict[str, Any] = {"tile_size": 32, "overlap": 8}
ALL: dict[str, Any] = {
    "confidence": True, "probabilities": True, "vector": ".fgb", "report": ".html", "preview": ".png", "stac": True,
}  # fmt: skip


class Breaking(memory.MemoryFileSystem):  # type: ignore[misc, name-defined]
    """A store in memory that refuses what ends like `refused`, as one whose rules are odd."""

    protocol = "breaking"
    store: dict[str, Any] = {}  # noqa: RUF012 - as fsspec has it: that of the process
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    refused = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("breaking://", "memory://")))

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        if self.refused and rpath.endswith(self.refused):
            raise PermissionError("Access Denied")
        super().put_file(lpath, rpath, *arguments, **options)


@pytest.fixture
def breaking(staging: Path) -> Iterator[type[Breaking]]:
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    yield Breaking
    Breaking.refused = ""
    Breaking.store.clear()


@pytest.fixture
def model(fakes: SimpleNamespace) -> Any:
    """A segmenter that says what it is, so that its runs can be resumed."""
    segmenter = fakes.PerPixel()
    segmenter.name, segmenter.sha256 = "fake", "ab" * 32
    return segmenter


def left(folder: Path) -> list[str]:
    """The files below a folder."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def lasting(name: str, content: bytes) -> Any:
    """What of a file does not say when it was made, or from where it looks at the scene."""
    if name.endswith(".json"):
        item = json.loads(content)
        return item["assets"], item["bbox"], item["geometry"]
    if name.endswith(".html"):
        return re.sub(r"\d+-\d+-\d+ \d+:\d+ UTC|\d+\.\d s\b", "", content.decode())
    return content


# Addresses


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("memory://bucket/maps/map.tif", "memory/bucket/maps/map.tif"),
        ("memory://bucket/maps/", "memory/bucket/maps"),
        ("memory://bucket/v1.2", "memory/bucket/v1.2"),
        ("memory://bucket", "memory/bucket"),
        ("memory://maps/map.TIFF", "memory/maps/map.TIFF"),
    ],
)
def test_a_place_here_stands_for_an_address(staging: Path, address: str, here: str) -> None:
    path = place(address)
    assert path == staging / "d2ls/stores" / here
    assert address_of(path) == address.removesuffix("/")
    assert path.is_dir() == (path.suffix.lower() not in (".tif", ".tiff"))
    assert path.parent.is_dir()


def test_a_path_stands_for_itself(tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "map.tif"):
        assert place(output) == place(str(output)) == output
        assert address_of(output) is None
    check_writable(tmp_path / "map.tif")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://example.org/map.tif", "https addresses are read, not written"),
        ("s3://", "s3://bucket/folder/map.tif; got s3://"),
        ("s3://bucket/../../map.tif", "s3://bucket/folder/map.tif; got"),
        ("s3://bucket//map.tif", "s3://bucket/folder/map.tif; got"),
        ("file:///tmp/map.tif", "s3://bucket/folder/map.tif; got file:///tmp/map.tif"),
        ("nowhere://bucket/map.tif", "no object store is called nowhere://"),
    ],
)
def test_addresses_that_cannot_be_written_to(staging: Path, address: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        place(address)
    assert not staging.exists()


def test_without_the_extra_it_is_named(staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"pip install 'd2ls-infer\[store\]'"):
        place("gs://bucket/map.tif")


def test_where_nothing_can_be_made_here(staging: Path) -> None:
    staging.write_text("no folder")
    with pytest.raises(RasterError, match="cannot make the folder"):
        place("memory://maps/map.tif")


def test_a_file_of_a_store_is_here_for_a_while(breaking: type[Breaking]) -> None:
    path = place("breaking://maps/") / "a.txt"
    assert (names_in(path.parent), exists(path)) == ([], False)
    fsspec.filesystem("breaking").pipe_file("/maps/a.txt", b"text")
    assert (names_in(path.parent), exists(path)) == (["a.txt"], True)
    with at_hand(path):
        assert path.read_bytes() == b"text"
    assert not path.exists()
    remove(path)
    remove(path)
    assert not exists(path)


# Maps


def test_objects_are_the_files_that_a_run_leaves_here(
    bucket: SimpleNamespace, scene_with_holes: Path, tmp_path: Path, staging: Path, model: Any
) -> None:
    (tmp_path / "here").mkdir()
    predict_raster(model, scene_with_holes, tmp_path / "here", **TILES, **ALL)
    result = predict_raster(model, scene_with_holes, f"{bucket.address}/maps", **TILES, **ALL)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    objects = {key.removeprefix("maps/"): content for key, content in bucket.objects().items()}
    assert len(expected) == 9  # with sidecar and style
    assert sorted(objects) == sorted(expected)
    for name, content in expected.items():
        assert lasting(name, objects[name]) == lasting(name, content), name
    assert result.output == f"{bucket.address}/maps/scene_d2ls-fake.tif" == result.files["classes"]
    assert result.to_dict()["files"]["report"] == f"{bucket.address}/maps/scene_d2ls-fake_report.html"
    (link,) = json.loads(objects["scene_d2ls-fake_stac.json"])["links"]
    assert link["href"] == scene_with_holes.as_uri()
    assert left(staging) == []


def test_a_cog_of_its_own_name(
    bucket: SimpleNamespace, scene_with_holes: Path, tmp_path: Path, staging: Path, model: Any
) -> None:
    predict_raster(model, scene_with_holes, tmp_path / "map.tif", cog=True, **TILES)
    predict_raster(model, scene_with_holes, f"{bucket.address}/map.tif", cog=True, **TILES)
    names = ("map.qml", "map.tif", "map.tif.aux.xml")
    assert bucket.objects() == {name: (tmp_path / name).read_bytes() for name in names}
    assert left(staging) == []


def test_many_scenes_go_into_a_folder_and_what_is_there_is_refused(
    breaking: type[Breaking], tmp_path: Path, write_raster: Write, pixels: Pixels, model: Any
) -> None:
    scenes = [write_raster(tmp_path / f"{name}.tif", pixels(3, 40, 30 + n)) for n, name in enumerate("ab")]
    (first,) = predict_many(model, scenes[:1], "breaking://maps/")
    assert isinstance(first, PredictResult)
    objects = {name: item.getvalue() for name, item in breaking.store.items()}
    refused, second = predict_many(model, scenes, "breaking://maps/")
    assert isinstance(refused, FailedScene)
    assert isinstance(refused.error, OutputExistsError)
    assert str(refused.error).startswith("breaking://maps/a_d2ls-fake.tif exists; give --overwrite")
    assert isinstance(second, PredictResult)
    assert second.output == "breaking://maps/b_d2ls-fake.tif"
    assert {name: breaking.store[name].getvalue() for name in objects} == objects
    breaking.store["/maps/a_d2ls-fake.tif"].write(b"old")
    assert len(list(predict_many(model, scenes, "breaking://maps/", overwrite=True))) == 2
    assert {name: breaking.store[name].getvalue() for name in objects} == objects
    with pytest.raises(UsageError, match=r"2 scenes, but one output: breaking://maps/map\.tif is not a folder"):
        predict_many(model, scenes, "breaking://maps/map.tif")


def test_a_plan_names_the_objects_and_writes_none(
    breaking: type[Breaking], scene_with_holes: Path, staging: Path, model: Any
) -> None:
    (plan,) = plan_many(model, [scene_with_holes], "breaking://maps/", confidence=True, **TILES)
    assert isinstance(plan, Plan)
    assert set(plan.to_dict()["files"].values()) == {
        "breaking://maps/scene_d2ls-fake.tif", "breaking://maps/scene_d2ls-fake_confidence.tif",
    }  # fmt: skip
    assert (breaking.store, left(staging)) == ({}, [])


@pytest.mark.parametrize("report", ["page.html", "memory://maps/page.html"])
def test_what_belongs_to_a_map_lies_beside_it(
    breaking: type[Breaking], scene_with_holes: Path, model: Any, report: str
) -> None:
    with pytest.raises(UsageError, match=r"give \.html alone, not"):
        predict_raster(model, scene_with_holes, "breaking://maps/map.tif", report=report)
    assert breaking.store == {}


# What goes wrong


def test_a_map_in_pieces_is_for_a_folder_of_files(staging: Path) -> None:
    with pytest.raises(UsageError, match="--vrt leaves pieces where all workers see them as files"):
        OutputOptions(vrt=True).files(place("memory://bucket/map.tif"))


@pytest.mark.parametrize("refused", ["map.tif", "map.qml", "map_confidence.tif"])
def test_an_upload_that_fails_leaves_no_object_and_loses_no_work(
    breaking: type[Breaking], scene_with_holes: Path, tmp_path: Path, staging: Path, model: Any, refused: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    breaking.refused = refused
    with pytest.raises(StoreError, match=f"breaking://maps/{refused}: Access Denied"):
        predict_raster(model, scene_with_holes, "breaking://maps/map.tif", confidence=True, **TILES)
    assert breaking.store == {}
    assert left(staging) == ["map.tif.journal"]
    breaking.refused = ""
    result = predict_raster(model, scene_with_holes, "breaking://maps/map.tif", confidence=True, resume=True, **TILES)
    assert result.resumed_rows == 300
    predict_raster(model, scene_with_holes, tmp_path / "map.tif", **TILES)
    assert breaking.store["/maps/map.tif"].getvalue() == (tmp_path / "map.tif").read_bytes()
    assert left(staging) == []


def test_a_run_that_is_stopped_goes_on_where_it_was(
    breaking: type[Breaking], scene_with_holes: Path, staging: Path, model: Any, fakes: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)

    class Stopped(fakes.PerPixel):  # type: ignore[misc, name-defined]
        def scores(self, batch: Any) -> Any:
            if self.scored > 20:
                raise D2LSError("broken")
            return super().scores(batch)

    stopped = Stopped()
    stopped.name, stopped.sha256 = model.name, model.sha256
    with pytest.raises(D2LSError, match="broken"):
        predict_raster(stopped, scene_with_holes, "breaking://maps/map.tif", **TILES)
    assert (breaking.store, left(staging)) == ({}, ["map.tif.journal"])
    result = predict_raster(model, scene_with_holes, "breaking://maps/map.tif", resume=True, **TILES)
    assert 0 < result.resumed_rows < 300
    scored = model.scored
    again = predict_raster(model, scene_with_holes, "breaking://maps/map.tif", resume=True, **TILES)
    assert (again.was_there, again.output, model.scored) == (True, "breaking://maps/map.tif", scored)
    assert again.areas == result.areas
    assert left(staging) == []


def test_what_a_killed_run_has_left_here_is_no_matter(
    breaking: type[Breaking], scene_with_holes: Path, staging: Path, model: Any
) -> None:
    output = place("breaking://maps/map.tif")
    for name in ("map.tif", "map.tif.aux.xml", "map_confidence.tif", "map.tif.partial"):
        output.with_name(name).write_text("of another run")
    predict_raster(model, scene_with_holes, "breaking://maps/map.tif", confidence=True, **TILES)
    assert left(staging) == []


def test_a_bucket_that_is_not_there_is_told_before_a_tile_is_scored(
    bucket: SimpleNamespace, scene_with_holes: Path, model: Any, staging: Path
) -> None:
    with pytest.raises(StoreError, match="cannot use s3://no-such-bucket: The specified bucket does not exist"):
        predict_raster(model, scene_with_holes, "s3://no-such-bucket/map.tif", **TILES)
    assert (model.scored, left(staging)) == (0, [])
