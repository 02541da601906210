"""Scores that two bands need: made once where handing them over takes less time than making them."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cluster_toys import Counted, Looking
from torch import Tensor

from d2ls_infer import predict_many, predict_raster
from d2ls_infer.cluster import ClusterOptions, shared
from d2ls_infer.cluster.shared import SharedLooks, SharedScores, Shelf, name_of, remove_shared
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


@pytest.mark.parametrize("made", [SCORES.clone().requires_grad_(), SCORES.bfloat16()], ids=["grad", "bfloat16"])
def test_scores_of_any_kind_are_handed_over_as_blending_takes_them(tmp_path: Path, made: Tensor) -> None:
    maker, taker = (SharedScores("cpu").of(Shelf(tmp_path, {}), {24}) for _ in range(2))
    assert maker(TILES, lambda: made) is made
    taken = taker(TILES, lambda: pytest.fail("it was made twice"))
    assert taken.dtype == torch.float32
    assert torch.equal(taken, made.float())


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
    predict_raster(Counted(tmp_path / "scored", 0.0), scene, tmp_path / "one", **tiles)
    once = sorted(path.name.split(" ")[0] for path in (tmp_path / "scored").iterdir())
    for path in (tmp_path / "scored").iterdir():
        path.unlink()
    with crowd(1) as client:
        cluster = ClusterOptions(band_rows=75)
        list(
            predict_many(
                Counted(tmp_path / "scored", 0.1), [scene], tmp_path / "many", client=client, cluster=cluster, **tiles
            )
        )
    assert sorted(path.name.split(" ")[0] for path in (tmp_path / "scored").iterdir()) == once
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert len(once) >= len(TileGrid(100, 70, 32, 8)) // 3


# Waiting for each other


def test_what_somebody_else_is_at_is_waited_for(tmp_path: Path) -> None:
    shelf, shared = Shelf(tmp_path, {}), SharedScores("cpu")
    shared.seconds = 1000.0
    name = name_of(TILES)
    assert shelf.begin(name)

    def make() -> None:
        time.sleep(0.1)
        shelf.keep(name, [SCORES.numpy()])
        shelf.end(name)

    other = threading.Thread(target=make)
    other.start()
    around = shared.of(shelf, {24})
    assert torch.equal(around(TILES, lambda: pytest.fail("it was made twice")), SCORES)
    other.join()
    assert not list(tmp_path.iterdir())


def test_what_somebody_was_at_who_is_lost_is_made(tmp_path: Path) -> None:
    shelf, shared = Shelf(tmp_path, {}), SharedScores("cpu")
    shared.seconds = 0.01
    assert shelf.begin(name_of(TILES))
    assert torch.equal(shared.of(shelf, {24})(TILES, lambda: SCORES), SCORES)
    assert not shelf.mark(name_of(TILES)).exists()


def test_one_begins_and_nobody_begins_what_is_there(tmp_path: Path) -> None:
    first, second, other = Shelf(tmp_path, {}), Shelf(tmp_path, {}), Shelf(tmp_path, {"a": 1})
    assert first.begin("a")
    assert not second.begin("a")
    assert other.begin("a")
    first.keep("a", [np.arange(3)])
    first.end("a")
    assert not second.begin("a")
    assert not second.mark("a").exists()
    assert Shelf(tmp_path / "not there", {}).begin("a")


# Looking together


def test_a_scene_is_looked_at_once_by_all_together(tmp_path: Path) -> None:
    spans = [(row, row + 4) for row in range(0, 40, 10)]
    looked: list[tuple[int, int]] = []

    def look(span: tuple[int, int]) -> list[tuple[bool, Any]]:
        looked.append(span)
        time.sleep(0.02)
        contexts = torch.full((2, 3), span[0] / 3), torch.ones(2, 3, requires_grad=True)
        return [(span[0] != 20, contexts[0]), (True, contexts[1])] if span[0] else []

    found: list[list[Any]] = []
    looks = SharedLooks(Shelf(tmp_path, {}), "cpu")
    threads = [threading.Thread(target=lambda: found.append(list(looks(look, spans)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(looked)) == spans
    assert [looked.count(span) for span in spans[1:]] == [1, 1, 1]  # of the first there is nothing to tell
    expected = list(map(look, spans))
    for seen in found:
        assert [[mostly for mostly, _ in part] for part in seen] == [
            [mostly for mostly, _ in part] for part in expected
        ]
        pairs = [
            (a, b) for one, two in zip(seen, expected, strict=True) for (_, a), (_, b) in zip(one, two, strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("context", [{"rows": (0, 4)}, torch.ones(3).bfloat16()], ids=["no tensor", "bfloat16"])
def test_what_numpy_cannot_hold_is_not_handed_over(tmp_path: Path, context: Any) -> None:
    looks = SharedLooks(Shelf(tmp_path, {}), "cpu")
    for _ in range(2):
        assert list(looks(lambda span: [(True, context)], [(0, 4)])) == [[(True, context)]]
    assert not list(tmp_path.iterdir())


def test_workers_look_together_and_the_map_is_that_of_one_process(
    crowd: Callable[[int], Any], tmp_path: Path, contents: Callable[[Path], Any], write_raster: Callable[..., Path],
    pixels: Callable[..., np.ndarray],
) -> None:  # fmt: skip
    scene = write_raster(tmp_path / "scene.tif", pixels(3, 1600, 300))
    tiles: dict[str, Any] = {"tile_size": 128, "overlap": 32}
    for name in ("one", "many", "looked", "seen"):
        (tmp_path / name).mkdir()
    predict_raster(Looking(tmp_path / "looked", 0.0), scene, tmp_path / "one", **tiles)
    once = len(list((tmp_path / "looked").iterdir()))
    with crowd(2) as client:
        list(predict_many(
            Looking(tmp_path / "seen", 0.2), [scene], tmp_path / "many", client=client,
            cluster=ClusterOptions(band_rows=300), **tiles,
        ))  # fmt: skip
    seen = [path.name.split("-")[0] for path in (tmp_path / "seen").iterdir()]
    assert len(seen) == once == 6
    assert len(set(seen)) == 2
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


# Helping


@pytest.mark.parametrize(("options", "seconds"), [({}, 0.25), ({"batch_size": 7}, 1.0)])
def test_who_has_nothing_to_do_helps_with_the_last_band(
    crowd: Callable[[int], Any], scene: Path, tmp_path: Path, contents: Callable[[Path], Any],
    options: dict[str, Any], seconds: float,
) -> None:  # fmt: skip
    tiles = {"tile_size": 32, "overlap": 8, "confidence": True, **options}
    for name in ("one", "many", "scored"):
        (tmp_path / name).mkdir()
    predict_raster(Counted(tmp_path / "scored", 0.0), scene, tmp_path / "one", **tiles)
    once = sorted(path.name.split(" ")[0] for path in (tmp_path / "scored").iterdir())
    shutil.rmtree(tmp_path / "scored")
    (tmp_path / "scored").mkdir()
    with crowd(3) as client:
        list(predict_many(
            Counted(tmp_path / "scored", seconds), [scene], tmp_path / "many", client=client,
            cluster=ClusterOptions(band_rows=1000), **tiles,
        ))  # fmt: skip
    made = [path.name.split(" ") for path in (tmp_path / "scored").iterdir()]
    assert len({who.split("-")[0] for _, who in made}) == 3
    assert {what for what, _ in made} == set(once)
    assert len(made) < 1.5 * len(once)  # some twice, where one does not wait any longer
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert not list((tmp_path / "many").glob("*.parts"))
