"""Scores that two bands need: made once where handing them over takes less time than making them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cluster_toys import Counted
from torch import Tensor

from d2ls_infer import predict_many, predict_raster
from d2ls_infer.cluster import ClusterOptions, shared
from d2ls_infer.cluster.shared import SharedScores, Shelf, remove_shared
from d2ls_infer.tiling import Tile, TileGrid

TILES = [Tile(24, 0, 32, 32), Tile(24, 24, 32, 32)]
SCORES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


class Clock:
    """A clock that goes on by what is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, score: float, write: float) -> None:
        self.now, self.scored, self.seconds = 0.0, 0, score
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        save = np.save

        def slow(*arguments: Any, **options: Any) -> None:
            self.now += write
            save(*arguments, **options)

        monkeypatch.setattr(shared.np, "save", slow)

    def score(self) -> Tensor:
        self.now += self.seconds
        self.scored += 1
        return SCORES


@pytest.mark.parametrize(("score", "write", "pays"), [(1.0, 0.1, True), (1.0, 0.6, False)])
def test_scores_are_kept_for_the_other_band_while_that_pays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, score: float, write: float, pays: bool
) -> None:
    clock = Clock(monkeypatch, score=score, write=write)
    above, below = (SharedScores("cpu").of(Shelf(tmp_path, {"a": 1}), {24}) for _ in range(2))
    for around in (below, above):
        for _ in range(2):
            assert torch.equal(around(TILES, clock.score), SCORES)
    if pays:
        assert clock.scored == 2  # taken once: then they are gone, and made again
    else:
        assert clock.scored == 3  # the first batch was kept, and told that it does not pay
    assert len(list(tmp_path.iterdir())) <= 1
    remove_shared(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change", [{"key": {"a": 2}}, {"tiles": TILES[:1]}, {"tiles": [TILES[0]._replace(row=25)] * 2}]
)
def test_other_scores_are_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any]) -> None:
    clock = Clock(monkeypatch, score=1.0, write=0.0)
    given = {"key": {"a": 1}, "tiles": TILES}
    for wanted in (given, {**given, **change}):
        SharedScores("cpu").of(Shelf(tmp_path, wanted["key"]), {24, 25})(wanted["tiles"], clock.score)
    assert clock.scored == 2


def test_only_shared_rows_of_tiles_are_kept_and_a_full_disk_hinders_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock(monkeypatch, score=1.0, write=0.0)
    SharedScores("cpu").of(Shelf(tmp_path, {}), {0})(TILES, clock.score)
    assert not list(tmp_path.iterdir())

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared.np, "save", full)
    assert torch.equal(SharedScores("cpu").of(Shelf(tmp_path, {}), {24})(TILES, clock.score), SCORES)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_scored_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch, score=1.0, write=0.0)
    around = SharedScores("cpu").of(Shelf(tmp_path, {}), {24})
    around(TILES, clock.score)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:300])
    assert torch.equal(around(TILES, clock.score), SCORES)
    assert clock.scored == 2


@pytest.mark.parametrize("options", [{}, {"gsd": 2.9}, {"batch_size": 3}])
def test_each_tile_is_scored_once_by_however_many_bands(
    crowd: Callable[[int], Any], scene: Path, tmp_path: Path, contents: Callable[[Path], Any], options: dict[str, Any]
) -> None:
    tiles = {"tile_size": 32, "overlap": 8, "confidence": True, **options}
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    (tmp_path / "scored").mkdir()
    predict_raster(Counted(tmp_path / "scored"), scene, tmp_path / "one", **tiles)
    once = sorted(path.name.split(" ")[0] for path in (tmp_path / "scored").iterdir())
    for path in (tmp_path / "scored").iterdir():
        path.unlink()
    with crowd(1) as client:
        cluster = ClusterOptions(band_rows=75)
        list(
            predict_many(
                Counted(tmp_path / "scored"), [scene], tmp_path / "many", client=client, cluster=cluster, **tiles
            )
        )
    assert sorted(path.name.split(" ")[0] for path in (tmp_path / "scored").iterdir()) == once
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert len(once) >= len(TileGrid(100, 70, 32, 8)) // 3
