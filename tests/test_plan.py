"""Plans of runs: they say what the run then does, and write nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2ls_infer import plan, predict_raster
from d2ls_infer.errors import D2LSError, OutputExistsError, UsageError
from d2ls_infer.plan import plan_raster

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]


@pytest.fixture
def scene(tmp_path: Path, write_raster: Write, pixels: Pixels) -> Path:
    """Three bands of 50 x 41 pixels of two metres, alone in its folder."""
    return write_raster(tmp_path / "scene.tif", pixels(3, 50, 41))


def test_a_plan_says_what_the_run_does(scene: Path, fakes: SimpleNamespace) -> None:
    options = {"tile_size": 16, "overlap": 4, "bands": "3,1,2", "confidence": True, "report": ".html"}
    plan = plan_raster(fakes.PerPixel(), scene, **options)
    assert [path.name for path in scene.parent.iterdir()] == ["scene.tif"]
    result = predict_raster(fakes.PerPixel(), scene, **options)
    assert (plan.source, plan.output, plan.files) == (result.source, result.output, result.files)
    assert plan.tiles[0] * plan.tiles[1] == result.tiles
    assert plan.bands == {"band 1": 3, "band 2": 1, "band 3": 2}
    assert (plan.width, plan.height, plan.crs) == (41, 50, "EPSG:32618")
    assert (plan.tile_size, plan.overlap_px, plan.batch_size, plan.device) == (16, 4, 1, "cpu")
    assert plan.pixel_m == plan.read_m == pytest.approx(2, rel=1e-2)
    assert plan.disk_bytes == 2 * 41 * 50
    assert plan.seconds > 0
    assert plan.memory_bytes is None or plan.memory_bytes > 10**8


def test_a_plan_tells_of_the_part_and_the_distance(scene: Path, fakes: SimpleNamespace) -> None:
    plan = plan_raster(fakes.TileMean(), scene, window="1,2,40,30", gsd=1.0, tile_size=32, overlap=0)
    assert (plan.width, plan.height) == (40, 30)
    assert plan.read_m == pytest.approx(1, rel=0.02)
    assert plan.tiles == (2, 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "0 to 1 becomes 0 to 1"),
        ({"scale": "0,10000"}, "0 to 10000 becomes 0 to 1"),
        ({"scale": "p0,p100"}, "0 to 100, 0 to 200, 0 to 300 becomes 0 to 1"),
    ],
)
def test_a_plan_tells_how_values_are_scaled(
    tmp_path: Path, write_raster: Write, fakes: SimpleNamespace, options: dict[str, str], text: str
) -> None:
    array = np.linspace(0, 1, 3 * 400).reshape(400, 3).T.reshape(3, 20, 20)
    array = np.stack([(k + 1) * 100 * (band - band.min()) / np.ptp(band) for k, band in enumerate(array)])
    path = write_raster(tmp_path / "scene.tif", array.round().astype(np.uint16))
    assert plan_raster(fakes.PerPixel(value_range=(0.0, 1.0)), path, **options).scale == text


def test_values_of_bytes_are_as_they_are(scene: Path, fakes: SimpleNamespace) -> None:
    assert plan_raster(fakes.PerPixel(value_range=(0.0, 255.0)), scene).scale == "as they are"


def test_where_memory_runs_out_a_plan_is_made_of_half_as_many_tiles_at_once(
    scene: Path, fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = fakes.PerPixel()

    def narrow(batch: Tensor) -> Tensor:
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        scores: Tensor = fakes.PerPixel.scores(segmenter, batch)
        return scores

    monkeypatch.setattr(segmenter, "scores", narrow)
    plan = plan_raster(segmenter, scene, tile_size=16, batch_size=8)
    assert segmenter.batches == [8, 4, *[2] * 8]
    assert plan.batch_size == 8
    assert plan.seconds > 0
    with pytest.raises(D2LSError, match="a tile of 16 x 16 pixels does not fit into the device's memory"):
        plan_raster(fakes.Failing(torch.OutOfMemoryError(), 0), scene, tile_size=16, batch_size=8)


def test_a_plan_is_json(scene: Path, fakes: SimpleNamespace) -> None:
    plan = plan_raster(fakes.TileMean(), scene, vector=".gpkg")
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["files"]["vector"] == str(plan.files["vector"])
    assert found["tiles"] == [1, 1]


def test_a_plan_is_refused_where_the_run_is(scene: Path, fakes: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match="no band 7"):
        plan_raster(fakes.TileMean(), scene, bands="1,2,7")
    (scene.parent / "map.tif").touch()
    with pytest.raises(OutputExistsError):
        plan_raster(fakes.TileMean(), scene, scene.parent / "map.tif")
    assert plan_raster(fakes.TileMean(), scene, scene.parent / "map.tif", overwrite=True).output.name == "map.tif"


def test_the_time_is_that_of_tiles_with_pixels_and_of_crops_seen_before(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pixels(3, 600, 1100)
    image[:, :300] = 0
    path = write_raster(tmp_path / "scene.tif", image, nodata=0)
    monkeypatch.setattr(plan, "timed", lambda call, device: (call(), 2.0)[1])  # each of them takes two seconds
    options: dict[str, Any] = {"tile_size": 100, "overlap": 0, "batch_size": 4}
    assert plan_raster(fakes.PerPixel(), path, **options).seconds == 2.0 / 4 * 66 / 2

    class Observing(fakes.PerPixel):  # type: ignore[misc, name-defined]
        observes = True

        def observe(self, batch: Tensor) -> None:
            assert batch.shape == (1, 3, 100, 100)

    assert plan_raster(Observing(), path, **options).seconds == 2.0 / 4 * 66 / 2 + 2.0 * 8
    whole = path.rename(tmp_path / "empty.tif")
    assert plan_raster(fakes.PerPixel(), whole, window="0,0,50,50", **options).seconds == 2.0 / 4
