"""Maps that stay in pieces: read through their VRT they are those of one process, whoever made them."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import rasterio
from cluster_toys import Touchy

from d2ls_infer import FailedScene, PredictResult, predict_many, predict_raster
from d2ls_infer.cluster import ClusterOptions
from d2ls_infer.errors import OutputExistsError, RasterError, UsageError

TILES: dict[str, Any] = {"tile_size": 32, "overlap": 8}
RASTERS = {"confidence": True, "probabilities": True, "entropy": True, "disagreement": True}
NAMES = ("classes", "confidence", "probabilities", "entropy", "disagreement")

CASES: list[tuple[int | None, dict[str, Any]]] = [
    (37, RASTERS),
    (101, {"window": "3,7,55,280", "confidence": True, "scale": "p2,p98"}),
    (None, {"probabilities": True, "vector": ".fgb", "preview": ".png", "report": ".html", "stac": True}),
]


def told(path: Path) -> dict[str, Any]:
    """What a raster says of itself, and its values."""
    with rasterio.open(path) as found:
        shown = found.colorinterp[0].name == "palette"
        return {
            "values": found.read().tobytes(), "masks": found.read_masks().tobytes(), "nodata": found.nodatavals,
            "crs": found.crs, "transform": found.transform, "shape": found.shape, "scales": found.scales,
            "descriptions": found.descriptions, "colours": [found.colormap(1)[i] for i in (0, 1, 2, 255) if shown],
            "tags": {name: text for name, text in found.tags().items() if name != "AREA_OR_POINT"},
            "tags of bands": [found.tags(band) for band in found.indexes],
        }  # fmt: skip


def shown_by(vrt: Path) -> list[str]:
    """The strips that a VRT shows, from top to bottom."""
    return re.findall(r'<SourceFilename relativeToVRT="1">([^<]+)</SourceFilename>', vrt.read_text())


def same(folder: Path, result: PredictResult, whole: PredictResult) -> None:
    """A map in pieces is that of one process, and nothing else is there."""
    shown: set[str] = set()
    for name, path in result.files.items():
        if name in NAMES:
            assert path.suffix == ".vrt"
            assert told(path) == told(whole.files[name]), name
            shown |= set(shown_by(path))
    assert {f"{result.output.name}.parts/{path.name}" for path in folder.glob("*.parts/*.tif")} == shown
    assert not [path for path in folder.rglob("*") if path.suffix in (".partial", ".journal", ".scores")]
    assert [area.pixels for area in result.areas] == [area.pixels for area in whole.areas]
    assert [area.area_m2 for area in result.areas] == pytest.approx([area.area_m2 for area in whole.areas], rel=1e-12)
    assert (result.tiles, result.skipped, result.clipped) == (whole.tiles, whole.skipped, whole.clipped)


@pytest.mark.parametrize(("workers", "cases"), [(1, [0]), (3, [0, 1, 2])])
def test_the_pixels_are_those_of_one_process(
    crowd: Callable[[int], Any], both_ways: Callable[..., Any], workers: int, cases: list[int]
) -> None:
    with crowd(workers) as client:
        for number in cases:
            band_rows, options = CASES[number]
            _, whole, many, made = both_ways(client, number, band_rows, {**TILES, **options}, vrt=True)
            assert made.output == many / "scene_d2ls-touchy.vrt"
            same(many, made, whole)
            for name in {"vector", "preview"} & set(made.files):
                assert made.files[name].read_bytes() == whole.files[name].read_bytes(), name
            if "stac" in made.files:
                of_many, of_one = (json.loads(result.files["stac"].read_text())["assets"] for result in (made, whole))
                assert of_many["classes"]["bands"] == of_one["classes"]["bands"]
                assert all((many / asset["href"]).is_file() for asset in of_many.values())


def test_a_run_that_is_stopped_goes_on(client: Any, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    whole = predict_raster(Touchy(), scene, tmp_path / "one", **TILES)
    folder = tmp_path / "many" / "scene_d2ls-touchy.vrt.parts"
    before: dict[Path, int] = {}

    def tell(news: dict[str, Any]) -> None:
        if news["status"] == "band" and not before:
            before.update((path, path.stat().st_mtime_ns) for path in folder.glob("*.tif"))
            raise KeyboardInterrupt

    how: dict[str, Any] = {"client": client, "vrt": True, "cluster": ClusterOptions(band_rows=37), **TILES}
    with pytest.raises(KeyboardInterrupt):
        list(predict_many(Touchy(0.02), [scene], tmp_path / "many", tell=tell, **how))
    assert before
    assert not list(folder.parent.glob("*.vrt"))
    (made,) = predict_many(Touchy(), [scene], tmp_path / "many", resume=True, **how)
    assert isinstance(made, PredictResult), made
    assert made.resumed_rows > 0
    same(tmp_path / "many", made, whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_finished_is_left_as_it_is(client: Any, scene: Path, tmp_path: Path) -> None:
    first = predict_raster(Touchy(), scene, tmp_path / "map.tif", client=client, vrt=True, **TILES)
    assert first.output == tmp_path / "map.vrt"
    there = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(OutputExistsError):
        predict_raster(Touchy(), scene, tmp_path / "map.tif", client=client, vrt=True, **TILES)
    again = predict_raster(Touchy(), scene, tmp_path / "map.vrt", client=client, vrt=True, resume=True, **TILES)
    assert again.was_there
    assert [area.pixels for area in again.areas] == [area.pixels for area in first.areas]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == there


def test_an_older_one_is_whole_until_there_is_another(
    client: Any, scene: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = predict_raster(Touchy(), scene, tmp_path / "map.vrt", client=client, vrt=True, **TILES)
    before = told(first.output)
    how: dict[str, Any] = {"client": client, "vrt": True, "overwrite": True, **TILES, "overlap": 4}

    def tell(news: dict[str, Any]) -> None:
        if news["status"] == "band":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(predict_many(
            Touchy(0.02), [scene], tmp_path / "map.vrt", tell=tell, cluster=ClusterOptions(band_rows=37), **how
        ))  # fmt: skip
    assert told(first.output) == before
    assert "is replaced" not in caplog.text
    (made,) = predict_many(Touchy(), [scene], tmp_path / "map.vrt", **how)
    assert isinstance(made, PredictResult), made
    (tmp_path / "one").mkdir()
    same(tmp_path, made, predict_raster(Touchy(), scene, tmp_path / "one", **{**TILES, "overlap": 4}))


def test_a_strip_that_is_missing_is_told(client: Any, scene: Path, tmp_path: Path) -> None:
    def tell(news: dict[str, Any]) -> None:
        if news["status"] == "band":
            raise KeyboardInterrupt

    how: dict[str, Any] = {"client": client, "vrt": True, "cluster": ClusterOptions(band_rows=37), **TILES}
    with pytest.raises(KeyboardInterrupt):
        list(predict_many(Touchy(0.02), [scene], tmp_path / "map.vrt", tell=tell, **how))
    gone = sorted((tmp_path / "map.vrt.parts").glob("*.tif"))[0]
    gone.unlink()
    (failed,) = predict_many(Touchy(), [scene], tmp_path / "map.vrt", resume=True, **how)
    assert isinstance(failed, FailedScene)
    assert isinstance(failed.error, RasterError)
    assert re.search(rf"cannot write .*map\.vrt: .*{gone.name}", str(failed.error))
    assert not list(tmp_path.glob("map.*.partial"))
    assert not (tmp_path / "map.vrt").exists()
    with closing(sqlite3.connect(gone.with_name(f"{gone.name[:21]}.journal"))) as journal:  # as if it was never written
        journal.execute("DROP TABLE done")
    (made,) = predict_many(Touchy(), [scene], tmp_path / "map.vrt", resume=True, **how)
    assert isinstance(made, PredictResult), made
    (tmp_path / "one").mkdir()
    same(tmp_path, made, predict_raster(Touchy(), scene, tmp_path / "one", **TILES))


def test_what_makes_no_sense_is_refused(client: Any, scene: Path) -> None:
    for act in (predict_raster, lambda model, source, **options: list(predict_many(model, [source], **options))):
        with pytest.raises(UsageError, match="--vrt is for work on a cluster"):
            act(Touchy(), scene, vrt=True, **TILES)
        with pytest.raises(UsageError, match="--cog makes whole files of the rasters, --vrt leaves them in pieces"):
            act(Touchy(), scene, client=client, vrt=True, cog=True, **TILES)
    assert [path.name for path in scene.parent.iterdir()] == [scene.name]
