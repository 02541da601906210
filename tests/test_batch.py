"""Many scenes: each has its map, or its error; none stops the others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from d2ls_infer.batch import FailedScene, plan_many, predict_many
from d2ls_infer.errors import D2LSError, MissingFileError, OutputExistsError, UsageError, WeightsError
from d2ls_infer.job import PredictResult
from d2ls_infer.plan import Plan
from d2ls_infer.predict import predict_raster

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
ReadMap = Callable[[Path], SimpleNamespace]


@pytest.fixture
def scenes(tmp_path: Path, write_raster: Write, pixels: Pixels) -> list[Path]:
    """Four scenes: one of too few bands, one that is missing, and two that are good."""
    write_raster(tmp_path / "thin.tif", pixels(1, 30, 30))
    names = ["a.tif", "b.tif"]
    for seed, name in enumerate(names):
        write_raster(tmp_path / name, pixels(3, 30 + seed, 40))
    return [tmp_path / name for name in ("thin.tif", "a.tif", "missing.tif", "b.tif")]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_what_is_wrong_with_a_scene_comes_in_its_place_and_first(
    scenes: list[Path], read_map: ReadMap, fakes: SimpleNamespace, order: list[int]
) -> None:
    scenes = [scenes[i] for i in order]
    found = list(predict_many(fakes.PerPixel(), scenes, tile_size=16))
    failed = [item for item in found if isinstance(item, FailedScene)]
    made = [item for item in found if isinstance(item, PredictResult)]
    assert found == [*failed, *made]
    assert {Path(item.source).name: type(item.error) for item in failed} == {
        "thin.tif": UsageError, "missing.tif": MissingFileError,
    }  # fmt: skip
    good = [path for path in scenes if path.stem in "ab"]
    assert [Path(item.source) for item in made] == good
    for item in made:
        assert read_map(item.output).array.shape == (30 + (item.output.stem[0] == "b"), 40)


def test_an_error_on_the_way_does_not_stop_the_others(scenes: list[Path], fakes: SimpleNamespace) -> None:
    class Once(fakes.PerPixel):  # type: ignore[misc, name-defined]
        def scores(self, batch: Tensor) -> Tensor:
            if self.scored == 2:
                raise D2LSError("broken")
            scores: Tensor = super().scores(batch)
            return scores

    found = list(predict_many(Once(), [scenes[1], scenes[3]], tile_size=32, overlap=0))
    assert [type(item) for item in found] == [FailedScene, PredictResult]
    assert isinstance(found[0], FailedScene)
    assert (found[0].source, str(found[0].error)) == (str(scenes[1]), "broken")
    assert not list(scenes[0].parent.glob("a_d2ls*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug")])
def test_what_no_scene_is_to_blame_for_stops_all(
    scenes: list[Path], fakes: SimpleNamespace, error: BaseException
) -> None:
    results = predict_many(fakes.Failing(error, tiles=0), [scenes[1], scenes[3]])
    with pytest.raises(type(error)):
        list(results)
    assert not list(scenes[0].parent.glob("*_d2ls*"))


def test_the_model_is_loaded_once_and_only_for_a_scene_that_can_be_mapped(
    scenes: list[Path], tiny_weights: Path, tmp_path: Path, fakes: SimpleNamespace
) -> None:
    loaded = []

    def load(weights: object) -> object:
        loaded.append(weights)
        segmenter = fakes.PerPixel()
        segmenter.name = "tiny"
        return segmenter

    bad = [scenes[0], scenes[2]]
    assert all(isinstance(item, FailedScene) for item in predict_many(tiny_weights, bad, load=load))
    assert loaded == []
    assert len(list(predict_many(tiny_weights, scenes, load=load))) == 4
    assert len(loaded) == 1
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(tiny_weights.read_bytes()[:-100])
    with pytest.raises(WeightsError):
        list(predict_many(broken, [scenes[1]]))


def test_what_is_wrong_with_all_scenes_is_raised_at_once(scenes: list[Path], fakes: SimpleNamespace) -> None:
    good = [scenes[1], scenes[3]]
    with pytest.raises(UsageError, match="tile size"):
        predict_many(fakes.PerPixel(), good, tile_size=0)
    with pytest.raises(UsageError, match="2 scenes, but one output"):
        predict_many(fakes.PerPixel(), good, scenes[0].parent / "map.tif")
    with pytest.raises(UsageError, match="several scenes would be written to"):
        predict_many(fakes.PerPixel(), [*good, good[0]])
    with pytest.raises(UsageError, match="several scenes would be written to"):
        predict_many(fakes.PerPixel(), good, report=scenes[0].parent / "page.html")


def test_a_single_scene_is_not_its_letters(scenes: list[Path], fakes: SimpleNamespace) -> None:
    from d2ls_infer import predict_many as public

    (result,) = public(fakes.PerPixel(), str(scenes[1]))
    assert isinstance(result, PredictResult)
    assert result.source == str(scenes[1])


def test_with_resume_what_is_there_is_kept_and_the_rest_is_mapped(scenes: list[Path], fakes: SimpleNamespace) -> None:
    good = [scenes[1], scenes[3]]
    segmenter = fakes.PerPixel()
    segmenter.sha256 = "ab" * 32
    list(predict_many(segmenter, good[:1]))
    (first, second) = predict_many(segmenter, good)
    assert isinstance(first, FailedScene)
    assert isinstance(first.error, OutputExistsError)
    assert isinstance(second, PredictResult)
    scored = segmenter.scored
    found = list(predict_many(segmenter, good, resume=True, batch_size=2, max_memory="64G"))
    assert [isinstance(item, PredictResult) and item.was_there for item in found] == [True, True]
    assert segmenter.scored == scored


@pytest.mark.parametrize("changed", ["side file", "option", "area", "pixels"])
def test_with_resume_files_of_another_run_are_neither_taken_for_its_own_nor_replaced(
    scenes: list[Path], write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, changed: str
) -> None:
    scene, output, area = (scenes[1].with_name(name) for name in ("a.tif", "map.tif", "area.geojson"))
    segmenter, other = fakes.PerPixel(), fakes.Constant()
    segmenter.sha256, other.sha256 = "ab" * 32, "cd" * 32

    def write_area(top: int) -> None:
        corners = [[500_000, 4_599_940], [500_080, 4_599_940], [top, 4_600_000], [500_000, 4_599_940]]
        crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32618"}}
        area.write_text(json.dumps({"type": "Polygon", "crs": crs, "coordinates": [corners]}))

    options: dict[str, Any] = {}
    if changed == "side file":
        predict_raster(other, scene, output, confidence=True)
    elif changed == "area":
        pytest.importorskip("pyogrio")
        write_area(500_000)
        options = {"aoi": area}
    predict_raster(segmenter, scene, output, overwrite=True, **options)
    if changed == "side file":
        options = {"confidence": True}
    elif changed == "option":
        options = {"cog": True}
    elif changed == "area":
        write_area(500_080)
    else:
        write_raster(scene, pixels(3, 30, 40)[:, ::-1])
        os.utime(scene, (1e9, 1e9))
    before, scored = {path: path.read_bytes() for path in output.parent.glob("map*")}, segmenter.scored
    (found,) = predict_many(segmenter, [scene], output, resume=True, **options)
    assert isinstance(found, FailedScene), found
    assert isinstance(found.error, OutputExistsError)
    assert f"{output} exists" in str(found.error)
    assert "--resume keeps only what was made whole of this scene as it is now" in str(found.error)
    assert {path: path.read_bytes() for path in output.parent.glob("map*")} == before
    assert segmenter.scored == scored


def test_maps_of_a_segmenter_that_does_not_say_what_it_is_are_not_taken_for_its_own(
    scenes: list[Path], fakes: SimpleNamespace
) -> None:
    list(predict_many(fakes.PerPixel(), scenes[1:2]))
    (found,) = predict_many(fakes.PerPixel(), scenes[1:2], resume=True)
    assert isinstance(found, FailedScene)
    assert isinstance(found.error, OutputExistsError)


def test_each_scene_is_followed(scenes: list[Path], fakes: SimpleNamespace) -> None:
    told: list[tuple[str, int, int]] = []

    @contextmanager
    def follow(name: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: told.append((name, done, total))

    list(predict_many(fakes.PerPixel(), [scenes[1], scenes[3]], tile_size=32, overlap=0, follow=follow))
    assert told == [("a.tif", 1, 2), ("a.tif", 2, 2), ("b.tif", 1, 2), ("b.tif", 2, 2)]


def test_plans_of_many_scenes(scenes: list[Path], fakes: SimpleNamespace) -> None:
    found = list(plan_many(fakes.PerPixel(), scenes, tile_size=16))
    assert [type(item) for item in found] == [FailedScene, FailedScene, Plan, Plan]
    assert not list(scenes[0].parent.glob("*_d2ls*"))
