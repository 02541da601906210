"""Runs that are stopped and go on: the same bytes as without, whenever and however often they are stopped."""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2ls_infer import journal, predict_raster
from d2ls_infer.errors import D2LSError, OutputExistsError, RasterError, UsageError
from d2ls_infer.journal import Journal, journal_path
from d2ls_infer.labels import LabelMap
from d2ls_infer.outputs import Finished

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
RASTERS = {"confidence": True, "probabilities": True, "entropy": True, "disagreement": True}
EFFORT = float(os.environ.get("D2LS_FUZZ", "1"))


class Slow:
    """Probabilities that depend on the whole tile and, in the last bits, on what lies in the same batch."""

    labels = LabelMap.of(["water", "forest", "field"])
    bands = ("red", "green", "blue")
    value_range = (0.0, 255.0)
    name, sha256, gsd_m = "slow", "cd" * 32, 2.0

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.scored = seconds, 0

    def score(self, batch: Tensor) -> Tensor:
        time.sleep(self.seconds)
        self.scored += len(batch)
        far = batch.float().mean((1, 2, 3), keepdim=True) * torch.linspace(-0.05, 0.05, 3).view(1, 3, 1, 1)
        return (batch.float() / 60 + far + 1e-3 * batch.float().mean()).softmax(1)


@pytest.fixture
def scene(scene_with_holes: Path) -> Path:
    return scene_with_holes


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are kept as soon as they are finished."""
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)


def contents(folder: Path, *, but: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not but or but not in path.name}


def stop_at(tile: int, error: BaseException | None = None) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == tile:
            raise error or KeyboardInterrupt

    return progress


OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_size": 7},
    {**RASTERS, "vector": ".gpkg"},
    {**RASTERS, "cog": True, "batch_size": 3},
    {"gsd": 3.1, "probabilities": True},
    {"gsd": 0.7, "confidence": True, "batch_size": 5},
    {"window": "3,7,55,280", "confidence": True},
    {"tta": "flip", "blend": "none"},
]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_a_run_that_was_stopped_again_and_again_gives_the_same_bytes(
    scene: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {"tile_size": 32, "overlap": 8, **options}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    whole = predict_raster(Slow(), scene, straight, **options)
    segmenter, known = Slow(), []
    for tile in (whole.tiles // 5, whole.tiles // 2, whole.tiles - 1):
        with pytest.raises(KeyboardInterrupt):
            predict_raster(segmenter, scene, stopped, resume=True, progress=stop_at(tile), **options)
        assert [path.name for path in stopped.iterdir()] == ["scene_d2ls-slow.tif.journal"]
        with sqlite3.connect(stopped / "scene_d2ls-slow.tif.journal") as database:
            known += database.execute("SELECT max(first + count) FROM rows").fetchone()
    assert 0 < known[0] < known[1] < known[2]
    result = predict_raster(segmenter, scene, stopped, resume=True, **options)
    assert result.resumed_rows == known[2]
    # A geopackage says when it was made.
    assert contents(stopped, but=".gpkg") == contents(straight, but=".gpkg")
    assert (result.areas, result.tiles, result.skipped) == (whole.areas, whole.tiles, whole.skipped)


def run(seconds: float, scene: str, folder: str) -> None:
    """In a process of its own, that is killed sooner or later."""
    torch.set_num_threads(1)
    journal.COMMIT_SECONDS = 0.0
    predict_raster(Slow(seconds), scene, folder, resume=True, tile_size=32, overlap=8, batch_size=2, **RASTERS)


def test_a_run_that_is_killed_at_random_moments_gives_the_same_bytes(scene: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    predict_raster(Slow(), scene, straight, tile_size=32, overlap=8, batch_size=2, **RASTERS)
    # The server's processes know the package, but not the tests' modules: they are told by a file.
    script = tmp_path / "run.py"
    script.write_text(f"import runpy\nrunpy.run_path({__file__!r})['run'](0.05, {str(scene)!r}, {str(killed)!r})\n")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["d2ls_infer.predict"])
    kept = journal_path(killed / "scene_d2ls-slow.tif")
    random = np.random.default_rng(4)
    for _ in range(max(2, round(2 * EFFORT))):
        shutil.rmtree(killed, ignore_errors=True)
        killed.mkdir()
        kills = 0
        while True:
            process = processes.Process(target=runpy.run_path, args=(str(script),))
            process.start()
            before = kept.stat().st_mtime_ns if kept.exists() else 0
            while process.is_alive() and (not kept.exists() or kept.stat().st_mtime_ns == before):
                time.sleep(0.001)
            process.join(random.uniform(0, 0.5))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += kept.exists()
            if process.exitcode == 0:
                break
            assert process.exitcode == -9, "it fell over"
        # What a process leaves that was killed, the next one removes.
        assert contents(killed) == contents(straight)
        assert kills > 0


@pytest.mark.usefixtures("at_once")
def test_rows_that_are_known_are_not_scored_again(scene: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tile_size": 32, "overlap": 8}
    whole, first, second = Slow(), Slow(), Slow()
    predict_raster(whole, scene, tmp_path / "whole.tif", **options)
    with pytest.raises(KeyboardInterrupt):
        predict_raster(first, scene, progress=stop_at(30), **options)
    predict_raster(second, scene, resume=True, **options)
    # Of what had been scored, the tiles that reach below the last row that was kept are scored again.
    assert whole.scored <= first.scored + second.scored <= whole.scored + 2 * 3
    assert second.scored < whole.scored


@pytest.mark.usefixtures("at_once")
def test_an_error_leaves_the_journal_and_says_so(scene: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(D2LSError, match="broken"):
        predict_raster(Slow(), scene, tile_size=32, progress=stop_at(20, D2LSError("broken")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.tif", "scene_d2ls-slow.tif.journal"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "% of the map are kept in" in warning
    assert "--resume" in warning


def test_a_short_run_leaves_no_journal(scene: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Slow(), scene, tile_size=32, progress=stop_at(20))
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]
    assert caplog.records == []


@pytest.mark.usefixtures("at_once")
def test_a_segmenter_that_does_not_say_what_it_is_has_no_journal(
    scene: Path, tmp_path: Path, fakes: SimpleNamespace
) -> None:
    with pytest.raises(KeyboardInterrupt):
        predict_raster(fakes.TileMean(), scene, tile_size=32, progress=stop_at(20))
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


@pytest.mark.usefixtures("at_once")
def test_without_resume_a_run_starts_at_the_top(scene: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Slow(), scene, tile_size=32, progress=stop_at(20))
    result = predict_raster(Slow(), scene, tile_size=32)
    assert result.resumed_rows == 0
    assert not journal_path(result.output).exists()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("changed", "told"),
    [("weights", "weights"), ("options", r"overlap \(it was 8\)"), ("scene", "scene"), ("smooth", "smooth.*")],
)
def test_what_another_run_has_kept_is_neither_taken_up_nor_lost(
    scene: Path, write_raster: Write, pixels: Pixels, caplog: pytest.LogCaptureFixture, changed: str, told: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Slow(), scene, tile_size=32, progress=stop_at(20))
    segmenter, options = Slow(), {"tile_size": 32, "overlap": 0.25}
    if changed == "weights":
        segmenter.sha256 = "ef" * 32
    elif changed == "smooth":
        segmenter.smooth = False  # type: ignore[attr-defined]
    elif changed == "options":
        options["overlap"] = 0.5
    else:
        write_raster(scene, pixels(3, 300, 70))
    (kept,) = scene.parent.glob("*.journal")
    content = kept.read_bytes()
    with pytest.raises(UsageError, match=rf"holds \d+ % of a map made with other {told}; without --resume"):
        predict_raster(segmenter, scene, resume=True, **options)
    assert kept.read_bytes() == content
    caplog.clear()
    assert predict_raster(segmenter, scene, **options).resumed_rows == 0
    assert "is replaced; --resume would have gone on there" in caplog.text
    assert not kept.exists()


def test_what_is_finished_is_left_as_it_is(scene: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"resume": True, "tile_size": 32, "confidence": True}
    made, again = Slow(), Slow()
    first = predict_raster(made, scene, **options)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    journal_path(first.output).touch()  # it was killed right after
    second = predict_raster(again, scene, **options)
    assert (again.scored, second.was_there, first.was_there) == (0, True, False)
    assert (second.areas, second.files, second.resumed_rows) == (first.areas, first.files, 300)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("other", ["options", "older", "missing", "no map"])
def test_what_is_there_but_was_not_made_by_such_a_run_is_not_replaced(scene: Path, other: str) -> None:
    options: dict[str, Any] = {"tile_size": 32, "confidence": True}
    result = predict_raster(Slow(), scene, **options)
    if other == "options":
        options["tile_size"] = 64
    elif other == "older":
        later = result.output.stat().st_mtime + 10
        os.utime(scene, (later, later))
    elif other == "missing":
        result.files["confidence"].unlink()
    else:
        result.output.write_bytes(b"precious")
    content = result.output.read_bytes()
    with pytest.raises(OutputExistsError):
        predict_raster(Slow(), scene, resume=True, **options)
    assert result.output.read_bytes() == content
    assert not predict_raster(Slow(), scene, resume=True, overwrite=True, **options).was_there


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("damage", ["noise", "cut", "rows"])
def test_a_damaged_journal_is_an_error_that_names_it(scene: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Slow(), scene, tile_size=32, progress=stop_at(30))
    (path,) = scene.parent.glob("*.journal")
    if damage == "noise":
        path.write_bytes(b"noise" * 1000)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        with sqlite3.connect(path) as database:
            database.execute("DELETE FROM layers WHERE first = 0")
    with pytest.raises(RasterError, match=r"the journal .*\.journal .*remove it and start anew"):
        predict_raster(Slow(), scene, resume=True, tile_size=32)
    assert sorted(path.suffix for path in scene.parent.iterdir()) == [".journal", ".tif"]
    path.unlink()
    assert predict_raster(Slow(), scene, resume=True, tile_size=32).resumed_rows == 0


@pytest.mark.usefixtures("at_once")
def test_rows_come_back_as_they_were_kept(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    shapes = {"labels": (7, 30), "probabilities": (3, 7, 30)}
    kept = [{name: random.integers(0, 250, shape, np.uint8) for name, shape in shapes.items()} for _ in range(3)]
    output = tmp_path / "map.tif"
    first = Journal(output, {"a": 1}, height=30)
    for index, values in enumerate(kept):
        first.add(Finished.of(7 * index, values))
    first.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with Journal(output, {"a": 1}, height=30, resume=True) as second:
        assert second.rows == 21
        for index, values in enumerate(kept):
            found = second.at(7 * index).values()
            assert found.keys() == values.keys()
            for name, value in values.items():
                np.testing.assert_array_equal(found[name], value)
    assert list(tmp_path.iterdir()) == []


def test_much_that_waits_is_kept_before_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "COMMIT_BYTES", 1000)
    noise = np.random.default_rng(2).integers(0, 250, (2, 10, 40), np.uint8)
    with Journal(tmp_path / "map.tif", {}, height=40) as kept:
        kept.add(Finished.of(0, {"labels": noise[0]}))
        assert kept.rows == 0
        kept.add(Finished.of(10, {"labels": noise[1], "confidence": noise[0]}))
        assert kept.rows == 20
        assert kept.path.exists()
