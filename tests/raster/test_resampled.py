"""Scenes read at another ground sampling distance: what the model sees, and what comes back on the scene's own grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ls_infer.errors import UsageError
from d2ls_infer.raster import Cut, ResampledScene, Scene
from d2ls_infer.raster import resampled as module
from d2ls_infer.tiling import Rows, TileGrid

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]


def seen(path: Path, gsd_m: float, size: int = 16, overlap: int = 5, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and validity of the resampled scene, put together from its tiles."""
    with Scene.open(path, **({"bands_needed": 3} | options)) as scene:
        view = ResampledScene(scene, gsd_m)
        values = np.full((len(scene.bands), view.height, view.width), np.nan, np.float32)
        valid = np.zeros((view.height, view.width), bool)
        for tile, (pixels, known) in view.tiles(TileGrid(view.height, view.width, size, overlap)):
            where = slice(tile.row, tile.row + tile.height), slice(tile.col, tile.col + tile.width)
            values[:, *where], valid[where] = pixels, known
        return values, valid


def test_coarser_pixels_are_means_of_the_valid_ones(tmp_path: Path, write_raster: Write, pixels: Pixels) -> None:
    array = pixels(3, 60, 40)
    array[:, :3, :5] = array[:, 30:40, 20:28] = 0
    values, valid = seen(write_raster(tmp_path / "a.tif", array, nodata=0), 8.0)  # pixels of 2 m, four by four
    blocks = array.reshape(3, 15, 4, 10, 4).astype(float)
    counts = (blocks > 0).any(0).sum((1, 3))
    assert np.array_equal(valid, counts > 0)
    np.testing.assert_allclose(values[:, valid], (blocks.sum((2, 4)) / np.maximum(counts, 1))[:, valid], rtol=1e-6)
    assert not values[:, ~valid].any()


def test_finer_pixels_lie_between(tmp_path: Path, write_raster: Write) -> None:
    array = np.broadcast_to(np.arange(10, 90, 10, dtype=np.uint8), (3, 6, 8)).copy()
    values, valid = seen(write_raster(tmp_path / "a.tif", array), 0.5)
    assert valid.all()
    assert values.shape == (3, 24, 32)
    expected = np.clip((np.arange(32) + 0.5) / 4, 0.5, 7.5) * 10 + 5
    np.testing.assert_allclose(values, np.broadcast_to(expected, values.shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("profile", "shape"),
    [
        # A second of arc is about 30.9 m from north to south, and half of it from west to east at 60 degrees.
        ({"crs": "EPSG:4326", "transform": Affine(1 / 3600, 0, 10, 0, -1 / 3600, 60.0)}, (62, 31)),
        ({"crs": "EPSG:3857", "transform": Affine(60, 0, 0, 0, -60, 8_401_000)}, (60, 60)),  # half on the ground
        ({"crs": "EPSG:32618", "transform": Affine(30, 40, 500_000, 40, -30, 4_600_000)}, (100, 100)),
        ({"crs": "EPSG:2263", "transform": Affine(100, 0, 1_000_000, 0, 200, 200_000)}, (122, 61)),  # feet, south up
    ],
    ids=["degrees", "mercator", "rotated", "feet"],
)  # fmt: skip
def test_the_distance_is_that_on_the_ground_along_rows_and_columns(
    tmp_path: Path, write_raster: Write, profile: dict[str, Any], shape: tuple[int, int]
) -> None:
    path = write_raster(tmp_path / "a.tif", np.zeros((3, 20, 20), np.uint8), **profile)
    with Scene.open(path, bands_needed=3) as scene:
        view = ResampledScene(scene, 10.0)
        assert (view.height, view.width) == pytest.approx(shape, rel=0.015)
        size = scene.pixel_size_m()
        assert size is not None
        areas = scene.row_areas_m2()
        assert areas is not None
        assert size[0] * size[1] == pytest.approx(areas[10], rel=0.01)


@settings(max_examples=40)
@given(
    st.integers(1, 50), st.integers(1, 50), st.floats(0.2, 40), st.integers(1, 40), st.booleans(),
    st.sampled_from(["uint8", "float32"]), st.data(),
)  # fmt: skip
def test_the_way_back_covers_exactly_what_is_valid(
    write_raster: Write,
    tmp_path_factory: pytest.TempPathFactory,
    pixels: Pixels,
    height: int,
    width: int,
    gsd_m: float,
    size: int,
    cut: bool,
    dtype: str,
    data: st.DataObject,
) -> None:
    """And a constant comes back constant. Pixels of 2 m, any size of tiles, any holes, the whole or a part."""
    array = pixels(1, height, width, dtype)
    array[:, :: data.draw(st.integers(1, 5)), :: data.draw(st.integers(1, 5))] = 0
    row, col = (data.draw(st.integers(0, side - 1)) if cut else 0 for side in (height, width))
    path = write_raster(tmp_path_factory.getbasetemp() / "back.tif", array, nodata=0)
    with Scene.open(path, bands_needed=1, cut=Cut.of((col, row, width, height))) as scene:
        view = ResampledScene(scene, gsd_m)
        grid = TileGrid(view.height, view.width, size, 0)
        valid = np.zeros((view.height, view.width), bool)
        parts = []
        for tile, (_, known) in view.tiles(grid):
            valid[tile.row : tile.row + tile.height, tile.col : tile.col + tile.width] = known
            if tile.col == grid.col_starts[-1]:  # rows are given as they are finished
                first, stop = (sum(len(p.covered) for p in parts), tile.row + tile.height)
                covered = torch.from_numpy(valid[first:stop].copy())
                parts.append(Rows(first, torch.where(covered, 0.25, torch.nan)[None], covered))
        found = list(view.restored(parts))
    assert [part.first for part in found] == np.cumsum([0, *(len(part.covered) for part in found[:-1])]).tolist()
    covered = torch.cat([part.covered for part in found]).numpy()
    assert np.array_equal(covered, array[0, row:, col:] != 0)
    scores = torch.cat([part.scores for part in found], 1).numpy()
    np.testing.assert_allclose(scores[0][covered], 0.25, rtol=1e-6)


def test_what_is_read_at_once_is_small(
    tmp_path: Path, write_raster: Write, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of 64 rows of 20 m each is made of 640 rows of 2 m, but they are read a few at a time."""
    from d2ls_infer.tiling import resample

    path = write_raster(tmp_path / "a.tif", pixels(3, 1280, 50), blockysize=1)
    read: list[int] = []

    class Watched(Scene):
        def rows(self, start: int, stop: int) -> Any:
            read.append(stop - start)
            return super().rows(start, stop)

    monkeypatch.setattr(resample, "CHUNK_BYTES", 50 * 4 * 4 * 40)  # forty rows
    with Watched(path, bands_needed=3) as scene:
        view = ResampledScene(scene, 20.0)
        for _ in view.tiles(TileGrid(view.height, view.width, 64, 8)):
            pass
    assert sum(read) == 1280
    assert max(read) <= 40


def test_what_has_no_size_or_is_magnified_too_far_is_refused(
    tmp_path: Path, write_raster: Write, pixels: Pixels
) -> None:
    plain = write_raster(tmp_path / "a.png", pixels(3, 8, 8), driver="PNG", georeferenced=False)
    with Scene.open(plain, bands_needed=3) as scene, pytest.raises(UsageError, match="no known size on the ground"):
        ResampledScene(scene, 1.0)
    with Scene.open(write_raster(tmp_path / "a.tif", pixels(3, 8, 8)), bands_needed=3) as scene:
        with pytest.raises(UsageError, match=r"2 m.*at most 16 times.*0\.05 m; try --gsd 0\.12 or more"):
            ResampledScene(scene, 0.05)
        assert ResampledScene(scene, 2 / module.MOST_MAGNIFIED).height == 8 * module.MOST_MAGNIFIED
        assert ResampledScene(scene, 1e6).height == 1
