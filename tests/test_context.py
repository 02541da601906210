"""What is seen of a scene before its tiles are scored: where crops lie, and what comes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from d2ls_infer import predict_raster
from d2ls_infer.context import CROP_PX, MOST, crops, observed, parse_dictionary, places, starts
from d2ls_infer.errors import UsageError
from d2ls_infer.segmenter import AugmentedSegmenter, InContext, in_context
from d2ls_infer.tiling import TileGrid


class Brightness:
    """A fake whose context is the mean brightness that it saw; pixels above it are of class 1."""

    bands = ("grey",)
    observes = True

    def __init__(self, labels: Any) -> None:
        self.labels = labels
        self.seen: list[tuple[int, ...]] = []

    def observe(self, batch: Tensor) -> float:
        self.seen.append(tuple(batch.shape))
        return float(batch.float().mean())

    def merge(self, contexts: list[float]) -> float:
        return sum(contexts) / len(contexts)

    def score(self, batch: Tensor, context: float | None = None) -> Tensor:
        level = batch.float().mean((1, 2, 3), keepdim=True) if context is None else context
        above = (batch.float() > level).float()
        return torch.cat((1 - above, above), 1)


def test_a_run_that_is_stopped_while_it_looks_at_the_scene_leaves_nothing(
    tmp_path: Path, write_raster: Callable[..., Path], pixels: Callable[..., np.ndarray], fake: Brightness,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(batch: Tensor) -> float:
        raise KeyboardInterrupt

    scene = write_raster(tmp_path / "scene.tif", pixels(1, 200, 150))
    monkeypatch.setattr(fake, "observe", stop)
    with pytest.raises(KeyboardInterrupt):
        predict_raster(fake, scene, tile_size=32, dictionary="scene")
    assert list(tmp_path.iterdir()) == [scene]


@pytest.fixture
def fake(fakes: SimpleNamespace) -> Brightness:
    return Brightness(fakes.Constant().labels)


def rows_of(values: np.ndarray, valid: np.ndarray | None = None) -> Any:
    known = np.ones(values.shape[1:], bool) if valid is None else valid
    return lambda start, stop: (values[:, start:stop], known[start:stop])


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_crops_lie_inside_the_scene_apart_and_are_not_too_many(height: int, width: int) -> None:
    counts = places(height, width)
    for length, count in zip((height, width), counts, strict=True):
        size = min(CROP_PX, length)
        found = starts(length, size, count)
        assert found[0] >= 0
        assert found[-1] + size <= length
        assert all(after - before >= size for before, after in itertools.pairwise(found))
    down, across = counts
    side_by_side = max(1, height // CROP_PX) * max(1, width // CROP_PX)
    assert min(MOST, side_by_side) / 2 <= down * across <= min(MOST, side_by_side)


def test_a_large_scene_is_seen_all_over() -> None:
    assert places(8192, 8192) == (6, 6)
    assert starts(8192, 256, 6)[0] < 700
    assert starts(8192, 256, 6)[-1] > 8192 - 256 - 700


def test_crops_hold_the_pixels_of_their_places() -> None:
    values = np.arange(1024 * 768, dtype=np.float32).reshape(1, 1024, 768)
    found = [pixels for pixels, _ in crops(rows_of(values), 1024, 768)]
    down, across = places(1024, 768)
    expected = [
        values[:, row : row + 256, col : col + 256]
        for row in starts(1024, 256, down)
        for col in starts(768, 256, across)
    ]
    assert len(found) == len(expected) > 1
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


def test_the_context_is_what_all_crops_tell_together(fake: Brightness) -> None:
    values = np.random.default_rng(1).integers(0, 255, (1, 1024, 1024), np.uint8)
    context = observed(fake, rows_of(values), 1024, 1024)
    assert context == pytest.approx(np.mean([pixels.mean() for pixels, _ in crops(rows_of(values), 1024, 1024)]))
    assert set(fake.seen) == {(1, 1, 256, 256)}


def test_crops_that_are_mostly_empty_count_only_where_there_are_no_others(fake: Brightness) -> None:
    values = np.full((1, 1024, 1024), 200, np.uint8)
    valid = np.ones((1024, 1024), bool)  # crops begin at rows 0, 256, 512 and 768
    valid[600:] = False
    values[:, 600:] = 0
    assert observed(fake, rows_of(values, valid), 1024, 1024) == 200
    valid[:] = False
    valid[700:710] = True
    values[:, 700:710] = 10
    assert observed(fake, rows_of(values, valid), 1024, 1024) is not None


def test_nothing_is_known_of_a_scene_without_a_valid_pixel(fake: Brightness) -> None:
    empty = rows_of(np.zeros((1, 600, 600), np.uint8), np.zeros((600, 600), bool))
    assert observed(fake, empty, 600, 600) is None
    assert in_context(fake, empty, TileGrid(600, 600, 512, 128), "scene") is fake
    assert fake.seen == []


def test_tiles_are_scored_by_the_scene_and_not_by_themselves(fake: Brightness) -> None:
    values = np.zeros((1, 1024, 1024), np.uint8)
    values[:, :, 512:] = 200
    inside = in_context(fake, rows_of(values), TileGrid(1024, 1024, 512, 0), "scene")
    assert isinstance(inside, InContext)
    right = torch.from_numpy(values[None, :, :512, 512:].copy())
    assert (fake.score(right)[:, 1] == 0).all(), "alone, no pixel is above the mean of its tile"
    assert (inside.score(right)[:, 1] == 1).all()


def test_a_segmenter_stays_as_it_is_where_there_is_nothing_to_see(fake: Brightness, fakes: SimpleNamespace) -> None:
    rows = rows_of(np.zeros((1, 1024, 1024), np.uint8))
    assert in_context(fake, rows, TileGrid(1024, 1024, 512, 0), "tile") is fake
    assert in_context(fake, rows, TileGrid(1024, 1024, 1024, 0), "scene") is fake, "one tile is all of the scene"
    constant = fakes.Constant()
    assert in_context(constant, rows, TileGrid(1024, 1024, 512, 0), "auto") is constant
    assert fake.seen == []


def test_auto_is_what_the_segmenter_is_made_for(fake: Brightness) -> None:
    rows, grid = rows_of(np.zeros((1, 1024, 1024), np.uint8)), TileGrid(1024, 1024, 512, 0)
    assert isinstance(in_context(fake, rows, grid, "auto"), InContext)
    fake.observes = False
    assert in_context(fake, rows, grid, "auto") is fake
    assert isinstance(in_context(fake, rows, grid, "scene"), InContext)


def test_a_segmenter_that_cannot_observe_is_told(fakes: SimpleNamespace) -> None:
    rows = rows_of(np.zeros((1, 1024, 1024), np.uint8))
    with pytest.raises(UsageError, match="tile"):
        in_context(fakes.Constant(), rows, TileGrid(1024, 1024, 512, 0), "scene")


def test_augmented_segmenters_observe_as_theirs_do(fake: Brightness, fakes: SimpleNamespace) -> None:
    values = np.random.default_rng(2).integers(0, 255, (1, 1024, 1024), np.uint8)
    inside = in_context(AugmentedSegmenter(fake, "d4"), rows_of(values), TileGrid(1024, 1024, 512, 0), "scene")
    plain = in_context(fake, rows_of(values), TileGrid(1024, 1024, 512, 0), "scene")
    tile = torch.from_numpy(values[None, :, :64, :64].copy())
    torch.testing.assert_close(inside.score(tile), plain.score(tile))
    assert AugmentedSegmenter(fakes.Constant(), "d4").observes is None


def test_an_unknown_dictionary_is_told_with_the_known() -> None:
    assert parse_dictionary("tile") == "tile"
    with pytest.raises(UsageError, match=r"'both'.*scene, tile"):
        parse_dictionary("both")
