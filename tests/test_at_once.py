"""How many tiles are scored at once: as fit, as are fast, and half as many where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from d2ls_infer import at_once, journal, predict_raster
from d2ls_infer.at_once import Halving, fastest_batch, fitting_batch
from d2ls_infer.errors import D2LSError, UsageError
from d2ls_infer.options import PredictOptions
from d2ls_infer.tiling import TileGrid

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]


def narrow(fits: int, tried: list[int]) -> Callable[[Tensor], Tensor]:
    """A network whose device has room for so many tiles."""

    def score(batch: Tensor) -> Tensor:
        tried.append(len(batch))
        if len(batch) > fits:
            raise torch.OutOfMemoryError
        return 2 * batch

    return score


@pytest.mark.parametrize(
    ("fits", "steps"), [(9, [9]), (8, [9, 4, 4, 1]), (3, [9, 4, 2, 2, 2, 2, 1]), (1, [9, 4, 2, *[1] * 9])]
)
def test_where_memory_runs_out_it_goes_on_with_half_as_many(
    fits: int, steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[int] = []
    score, batch = Halving(narrow(fits, tried)), torch.rand(9, 3, 4, 5)
    assert torch.equal(score(batch), 2 * batch)
    assert tried == steps
    tried.clear()
    assert torch.equal(score(batch), 2 * batch)
    assert max(tried) <= fits, "what was too many is tried again"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len([step for step in steps if step > fits])


def test_a_tile_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(D2LSError, match="a tile of 4 x 5 pixels does not fit into the device's memory"):
        Halving(narrow(0, []))(torch.rand(3, 3, 4, 5))
    with pytest.raises(D2LSError, match="a tile of 4 x 5 pixels does not fit into the device's memory"):
        fitting_batch(narrow(0, []), torch.rand(3, 3, 4, 5), 10**9, 0)


def test_a_map_is_the_same_where_memory_runs_out(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    class Narrow(fakes.TileMean):  # type: ignore[misc, name-defined]
        def scores(self, batch: Tensor) -> Tensor:
            if len(batch) > 2:
                raise torch.OutOfMemoryError
            scores: Tensor = super().scores(batch)
            return scores

    scene = write_raster(tmp_path / "scene.tif", pixels(3, 60, 50))
    narrow, wide = Narrow(), fakes.TileMean()
    narrow.name = wide.name = "toy"
    for segmenter, name in ((narrow, "narrow.tif"), (wide, "wide.tif")):
        predict_raster(segmenter, scene, tmp_path / name, tile_size=16, batch_size=8)
    assert (tmp_path / "narrow.tif").read_bytes() == (tmp_path / "wide.tif").read_bytes()
    assert narrow.batches[:4] == [8, 4, 2, 2]


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> Callable[[Tensor], Tensor]:
    """A network that takes so long for so many tiles, by a clock of its own."""
    now = 0.0

    def score(batch: Tensor) -> Tensor:
        nonlocal now
        now += seconds(len(batch))
        return batch.float()

    monkeypatch.setattr(at_once, "time", SimpleNamespace(perf_counter=lambda: now))
    return score


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        (lambda tiles: tiles, 1),  # a CPU that is busy with one
        (lambda tiles: max(tiles, 8), 8),  # a device with room for eight
        (lambda tiles: 100 + tiles, 16),  # the scene has 30
        (lambda tiles: tiles * (2 - (tiles > 1)), 2),
    ],
)
def test_the_fastest_is_found(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], fastest: int) -> None:
    assert fastest_batch(clocked(monkeypatch, seconds), TileGrid(80, 96, 16, 0), 3) == fastest


def test_what_does_not_fit_is_not_the_fastest() -> None:
    assert fastest_batch(narrow(1, []), TileGrid(80, 96, 16, 0), 3) == 1


@pytest.mark.parametrize(
    ("fits", "fitting", "tries"), [(8, 8, [1, 2, 4, 8]), (7, 4, [1, 2, 4, 8]), (3, 2, [1, 2, 4]), (1, 1, [1, 2])]
)
def test_the_limit_of_a_devices_own_memory_is_found(
    monkeypatch: pytest.MonkeyPatch, fits: int, fitting: int, tries: list[int]
) -> None:
    monkeypatch.setattr(at_once, "peak_bytes", lambda: 0)
    tried: list[int] = []
    assert fitting_batch(narrow(fits, tried), torch.zeros((8, 3, 4, 5)), 10**9, 0) == fitting
    assert tried == tries


@pytest.mark.parametrize("size", ["auto", "4", 4])
def test_a_size_is_a_number_or_auto(size: int | str) -> None:
    assert PredictOptions(batch_size=size).batch_size == ("auto" if size == "auto" else 4)


@pytest.mark.parametrize("size", ["0", 0, -1, "many", ""])
def test_other_sizes_are_refused(size: int | str) -> None:
    with pytest.raises(UsageError, match="batch size must be at least 1, or auto"):
        PredictOptions(batch_size=size)


def test_a_run_that_goes_on_takes_the_size_it_began_with(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    sizes = iter([3, 5])
    monkeypatch.setattr("d2ls_infer.job.fastest_batch", lambda *_: next(sizes))
    scene = write_raster(tmp_path / "scene.tif", pixels(3, 90, 50))
    segmenter = fakes.TileMean()
    segmenter.sha256 = "ab" * 32

    def stop(done: int, total: int) -> None:
        if done == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_raster(segmenter, scene, tile_size=16, batch_size="auto", progress=stop)
    segmenter.batches.clear()
    assert predict_raster(segmenter, scene, tile_size=16, batch_size="auto", resume=True).resumed_rows > 0
    assert max(segmenter.batches) == 3


def growing(monkeypatch: pytest.MonkeyPatch, base: int, per_tile: int, four: int = 0) -> Callable[[Tensor], Tensor]:
    """A network that takes so many bytes for each tile, and more for four at once, in a process that had others."""
    peak = base

    def score(batch: Tensor) -> Tensor:
        nonlocal peak
        peak = max(peak, base + per_tile * len(batch) + four * (len(batch) >= 4))
        return batch

    monkeypatch.setattr(at_once, "peak_bytes", lambda: peak)
    return score


@pytest.mark.parametrize(
    ("limit", "fitting"), [(10_000, 8), (1900, 8), (1799, 4), (1500, 4), (1300, 2), (1200, 1), (1149, None)]
)
def test_as_many_tiles_as_fit_are_scored_at_once(
    monkeypatch: pytest.MonkeyPatch, limit: int, fitting: int | None
) -> None:
    score = growing(monkeypatch, 1000, 100)
    batch = torch.zeros((8, 3, 16, 16))
    if fitting is None:
        with pytest.raises(UsageError, match=r"--max-memory allows 1\.15e-06 GB. A smaller --tile-size"):
            fitting_batch(score, batch, limit, 50)
    else:
        found = fitting_batch(score, batch, limit, 50)
        assert found == fitting
        assert 1000 + 100 * found + 50 <= limit


def test_tiles_that_took_more_than_their_share_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitting_batch(growing(monkeypatch, 1000, 100, four=200), torch.zeros((8, 3, 16, 16)), 1500, 50) == 2
