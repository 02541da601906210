"""Scenes mapped by the workers of a cluster: the bytes are those of one process, whoever makes them."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cluster_toys import Touchy

from d2ls_infer import FailedScene, PredictResult, predict_many, predict_raster
from d2ls_infer.alone import alone
from d2ls_infer.cluster import ClusterOptions
from d2ls_infer.cluster.clients import workers_of_devices
from d2ls_infer.cluster.pieces import Band
from d2ls_infer.cluster.worker import BandTask
from d2ls_infer.errors import OutputBusyError, OutputExistsError, UsageError
from d2ls_infer.options import PredictOptions

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
Contents = Callable[[Path], dict[str, bytes]]
RASTERS = {"confidence": True, "probabilities": True, "entropy": True, "disagreement": True}
TILES: dict[str, Any] = {"tile_size": 32, "overlap": 8}

CASES: list[tuple[int | None, dict[str, Any]]] = [
    (None, {}),
    (37, {**RASTERS, "vector": ".fgb", "preview": ".png"}),
    (41, {**RASTERS, "cog": True, "batch_size": 7}),
    (53, {"gsd": 3.1, "probabilities": True}),
    (29, {"gsd": 0.7, "confidence": True, "batch_size": 5}),
    (23, {"window": "3,7,55,280", "confidence": True, "scale": "p2,p98"}),
    (1000, {"tta": "flip", "blend": "none"}),
    (1, {"window": "0,90,70,60", "overlap": 20}),
]


@pytest.mark.parametrize(("workers", "cases"), [(1, [1, 0, 4]), (2, [1, 3, 7]), (3, [1, 2]), (5, [1, 5, 6])])
def test_the_bytes_are_those_of_one_process(
    crowd: Callable[[int], Any], both_ways: Callable[..., Any], contents: Contents, workers: int, cases: list[int]
) -> None:
    with crowd(workers) as client:
        for number in cases:
            band_rows, options = CASES[number]
            one, whole, many, made = both_ways(client, number, band_rows, {**TILES, **options})
            assert contents(many) == contents(one), options
            assert (made.areas, made.tiles, made.clipped) == (whole.areas, whole.tiles, whole.clipped)
            assert made.skipped == whole.skipped
            assert not list(many.glob("*.parts"))


def test_each_worker_of_a_device_sees_it_alone_and_the_bytes_are_those_of_one_process(
    monkeypatch: pytest.MonkeyPatch, both_ways: Callable[..., Any], contents: Contents
) -> None:
    # Devices as the environment has numbered them; where none is there, the workers' work goes to their CPU.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    with workers_of_devices([0, 2]) as client:
        assert sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == ["4", "7"]
        resources = [worker["resources"] for worker in client.scheduler_info()["workers"].values()]
        assert resources == [{"GPU": 1}, {"GPU": 1}]
        monkeypatch.undo()
        one, _, many, made = both_ways(client, 0, 37, {**TILES, "confidence": True})
        assert contents(many) == contents(one)
        assert made.tiles > 0


def test_a_picture_in_a_report_is_that_of_one_process(client: Any, scene: Path, tmp_path: Path) -> None:
    pages = []
    for name, there in (("one", None), ("many", client)):
        (tmp_path / name).mkdir()
        result = predict_raster(Touchy(), scene, tmp_path / name, client=there, report=".html", **TILES)
        lines = result.files["report"].read_text().splitlines()
        pages.append([line for line in lines if "<img" in line or "<svg" in line or "Tiles" in line])
    assert pages[0] == pages[1]
    assert pages[0]


def test_many_scenes_are_mapped_and_what_is_wrong_with_one_comes_in_its_place(
    client: Any, scene: Path, tmp_path: Path, write_raster: Write, pixels: Pixels
) -> None:
    thin = write_raster(tmp_path / "thin.tif", pixels(1, 30, 30))
    other = write_raster(tmp_path / "other.tif", pixels(3, 64, 90))
    news: list[dict[str, Any]] = []
    found = list(predict_many(Touchy(), [scene, thin, other], client=client, tell=news.append, **TILES))
    assert isinstance(found[0], FailedScene)
    assert found[0].source == str(thin)
    assert {item.source for item in found[1:] if isinstance(item, PredictResult)} == {str(scene), str(other)}
    first, *others = news
    assert (first["status"], first["scenes"], first["pixels"], first["workers"]) == ("begun", 2, 300 * 70 + 64 * 90, 2)
    bands = [item for item in others if item["status"] == "band"]
    rows = {name: sum(b["last"] - b["first"] for b in bands if b["source"] == str(name)) for name in (scene, other)}
    assert rows == {scene: 300, other: 64}
    # Two workers: while the other one waits, the first scene is left whole.
    assert [sum(item["source"] == str(name) for item in bands) for name in (scene, other)] == [1, 2]


def test_the_model_is_loaded_once_on_each_worker(client: Any, scene: Path, tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.mkdir()
    list(predict_many(
        Touchy(loads=loads), [scene], client=client, cluster=ClusterOptions(band_rows=10), **TILES
    ))  # fmt: skip
    processes = [path.name.split("-")[0] for path in loads.iterdir()]
    assert len(processes) == len(set(processes)) == 2


def test_weights_are_found_by_each_worker(client: Any, scene: Path, tmp_path: Path, tiny_weights: Path) -> None:
    (tmp_path / "one").mkdir()
    one = predict_raster(tiny_weights, scene, tmp_path / "one", tile_size=64)
    many = predict_raster(tiny_weights, scene, client=client, tile_size=64)
    assert many.output.read_bytes() == one.output.read_bytes()


def test_what_goes_to_a_worker_is_small(scene: Path) -> None:
    """No pixels: a name, options, and which rows."""
    task = BandTask(str(scene), scene, PredictOptions(), {"weights": "cd" * 32}, Band(0, 100_000))
    assert len(pickle.dumps(task)) < 2000


def test_what_is_finished_is_left_as_it_is(client: Any, scene: Path) -> None:
    first = predict_raster(Touchy(), scene, client=client, **TILES)
    before = first.output.stat().st_mtime_ns
    with pytest.raises(OutputExistsError):
        predict_raster(Touchy(), scene, client=client, **TILES)
    again = predict_raster(Touchy(), scene, client=client, resume=True, **TILES)
    assert again.was_there
    assert first.output.stat().st_mtime_ns == before
    assert not predict_raster(Touchy(), scene, client=client, overwrite=True, **TILES).was_there


def test_a_segmenter_that_does_not_say_what_it_is(client: Any, scene: Path, tmp_path: Path) -> None:
    segmenter = Touchy()
    segmenter.sha256 = ""
    (tmp_path / "one").mkdir()
    one = predict_raster(segmenter, scene, tmp_path / "one", **TILES)
    many = predict_raster(segmenter, scene, client=client, **TILES)
    assert many.output.read_bytes() == one.output.read_bytes()


def test_a_map_that_another_run_makes_is_left_to_it(client: Any, scene: Path, tmp_path: Path) -> None:
    """Whether the other one is of one process or of a cluster."""
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    whole = predict_raster(Touchy(), scene, tmp_path / "one", **TILES)
    many, others = tmp_path / "many", []

    def tell(news: dict[str, Any]) -> None:
        if news["status"] == "band" and not others:
            others.extend(predict_many(Touchy(), [scene], many, overwrite=True, resume=True, **TILES))

    how: dict[str, Any] = {"client": client, "cluster": ClusterOptions(band_rows=37), **TILES}
    (made,) = predict_many(Touchy(), [scene], many, tell=tell, **how)
    with alone(many / "scene_d2ls-touchy.tif"):
        others.extend(predict_many(Touchy(), [scene], many, overwrite=True, **how))
    for other in others:
        assert isinstance(other, FailedScene)
        assert isinstance(other.error, OutputBusyError)
    assert len(others) == 2
    assert isinstance(made, PredictResult)
    assert made.output.read_bytes() == whole.output.read_bytes()
    assert not [path for path in many.iterdir() if path.suffix in (".lock", ".parts", ".partial", ".journal")]


def test_a_map_that_another_run_has_made_meanwhile_is_left(client: Any, scene: Path, tmp_path: Path) -> None:
    results = predict_many(Touchy(), [scene], tmp_path, client=client, **TILES)
    whole = predict_raster(Touchy(), scene, tmp_path, **TILES)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (failed,) = results
    assert isinstance(failed, FailedScene)
    assert isinstance(failed.error, OutputExistsError)
    assert whole.output in before
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_that_cannot_be_sent_to_workers(client: Any, scene: Path) -> None:
    segmenter = Touchy()
    segmenter.lock = threading.Lock()  # type: ignore[attr-defined]
    told = r"the model cannot be sent to workers: cannot pickle '_thread\.lock' object; give its name or file"
    with pytest.raises(UsageError, match=told):
        list(predict_many(segmenter, [scene], client=client, **TILES))
    assert list(scene.parent.iterdir()) == [scene]


@pytest.mark.parametrize(
    ("options", "told"), [({"band_rows": 0}, "at least 1 row"), ({"stall_seconds": 0.0}, "seconds above 0, got 0")]
)
def test_options_that_make_no_sense(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ClusterOptions(**options)
