"""Laws of the blending: nothing lost, nothing twice, nothing invented at a border."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from d2ls_infer.errors import UsageError
from d2ls_infer.tiling import WINDOWS, BandBlender, Rows, Tile, TileGrid, axis_windows, blend, rows_sharing_batches

TAPERS = [window for window in WINDOWS if window != "none"]
windows = st.sampled_from(WINDOWS)
Score = Callable[[Tensor], Tensor]


@st.composite
def grids(draw: st.DrawFn, most: int = 200, tiles: int = 150) -> TileGrid:
    """Rasters of 1..most x 1..most, mostly of several tiles, of `tiles` or so at most."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    least_step = max(1, round((height * width / tiles) ** 0.5))
    step = draw(st.one_of(st.integers(least_step, 3 * least_step), st.integers(least_step, most)))
    overlap = draw(st.integers(0, 3 * step))
    return TileGrid(height, width, step + overlap, overlap)


def tiles_of(
    field: np.ndarray, grid: TileGrid, valid: np.ndarray | None = None
) -> Iterator[tuple[Tile, tuple[np.ndarray, np.ndarray]]]:
    """The tiles of a (bands, H, W) field that lies in memory."""
    valid = np.ones(field.shape[1:], bool) if valid is None else valid
    for tile in grid:
        rows, cols = slice(tile.row, tile.row + tile.height), slice(tile.col, tile.col + tile.width)
        yield tile, (field[:, rows, cols], valid[rows, cols])


def blended(rows: Iterator[Rows], grid: TileGrid) -> tuple[Tensor, Tensor]:
    """All the rows as one: scores (K, H, W) and covered (H, W). Fails where they do not follow on each other."""
    parts, next_row = [], 0
    for part in rows:
        assert part.first == next_row
        assert part.scores.shape[1:] == part.covered.shape
        assert part.scores.dtype == torch.float32
        assert part.covered.dtype == torch.bool
        next_row += len(part.covered)
        parts.append(part)
    assert next_row == grid.height
    return torch.cat([part.scores for part in parts], 1), torch.cat([part.covered for part in parts], 0)


def random_field(grid: TileGrid, bands: int = 2, seed: int = 0) -> np.ndarray:
    shape = (bands, grid.height, grid.width)
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def holes(grid: TileGrid, seed: int, invalid_share: float = 0.9) -> np.ndarray:
    """(H, W) bool: a raster of which blocks are invalid, and single pixels besides."""
    random = np.random.default_rng([seed, grid.height, grid.width])
    blocks = random.random((grid.height // 16 + 1, grid.width // 16 + 1)) > invalid_share
    valid = np.kron(blocks, np.ones((16, 16), bool))[: grid.height, : grid.width]
    return valid & (random.random(valid.shape) > 0.1)


def peaks(batch: Tensor) -> Tensor:
    """Scores that depend on the whole tile; exact in floating point, so that batches cannot change them."""
    return batch.float() + 10 * batch.float().amax((1, 2, 3), keepdim=True)


@given(grids(), windows)
def test_rows_come_from_top_to_bottom_exactly_once(grid: TileGrid, window: str) -> None:
    field = random_field(grid)
    scores, covered = blended(blend(peaks, tiles_of(field, grid), grid, channels=2, window=window), grid)
    assert scores.shape == field.shape
    assert covered.all()


@given(grids(), windows, st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_constant_field_comes_back_exactly(grid: TileGrid, window: str, values: list[float]) -> None:
    """Bit for bit, at every border and corner, whatever the constant."""
    constant = torch.tensor(values, dtype=torch.float32).view(1, 2, 1, 1)

    def score(batch: Tensor) -> Tensor:
        return constant.expand(len(batch), 2, *batch.shape[-2:])

    scores, covered = blended(
        blend(score, tiles_of(random_field(grid), grid), grid, channels=2, window=window, batch_size=3), grid
    )
    assert torch.equal(scores, constant[0].expand_as(scores))
    assert covered.all()


@given(grids(), windows)
def test_a_function_of_each_pixel_comes_back_as_if_untiled(grid: TileGrid, window: str) -> None:
    def score(batch: Tensor) -> Tensor:
        return torch.cat((batch, (batch * 3).sin()), 1)

    field = random_field(grid, bands=1)
    scores, _ = blended(blend(score, tiles_of(field, grid), grid, channels=2, window=window), grid)
    # Not sin of the whole field: vectorised and scalar code of sin may differ in the last bit.
    assert torch.equal(scores[0], torch.from_numpy(field[0]))
    torch.testing.assert_close(scores, score(torch.from_numpy(field[None]))[0], rtol=1e-6, atol=1e-7)


@given(grids(tiles=60), windows, st.integers(2, 70))
def test_the_result_does_not_depend_on_the_batch_size(grid: TileGrid, window: str, batch_size: int) -> None:
    field, valid = random_field(grid), holes(grid, 1, 0.5)
    one, many = (
        blended(
            blend(peaks, tiles_of(field, grid, valid), grid, channels=2, window=window, batch_size=size),
            grid,
        )
        for size in (1, batch_size)
    )
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])


@given(grids(tiles=60), st.integers(1, 9))
def test_batches_are_full_but_for_the_last_of_a_group_of_rows(grid: TileGrid, batch_size: int) -> None:
    sizes = []

    def score(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return batch

    blended(blend(score, tiles_of(random_field(grid), grid), grid, channels=2, batch_size=batch_size), grid)
    rows, cols = len(grid.row_starts), len(grid.col_starts)
    together = rows_sharing_batches(grid, batch_size)
    groups = [min(together, rows - row) * cols for row in range(0, rows, together)]
    assert sizes == [min(batch_size, tiles - done) for tiles in groups for done in range(0, tiles, batch_size)]
    assert together == 1 or together * cols <= batch_size


@given(grids(tiles=60), windows, st.integers(1, 70), st.data())
def test_a_part_is_the_same_as_in_the_whole(grid: TileGrid, window: str, batch_size: int, data: st.DataObject) -> None:
    """To the last bit, of scores that depend on what lies in the same batch."""
    field, valid = random_field(grid), holes(grid, 3, 0.5)
    first = data.draw(st.integers(0, grid.height - 1))
    last = data.draw(st.integers(first + 1, grid.height))
    top, bottom = grid.touching(first, last)
    together = rows_sharing_batches(grid, batch_size)
    starts = grid.row_starts[top // together * together : -(-bottom // together) * together]

    def score(batch: Tensor) -> Tensor:
        return batch + batch.mean()

    def rows(tiles: Iterator[tuple[Tile, tuple[np.ndarray, np.ndarray]]], first_row: int = 0) -> Iterator[Rows]:
        options: dict[str, Any] = {"channels": 2, "window": window, "batch_size": batch_size, "disagreement": True}
        return blend(score, tiles, grid, first_row=first_row, **options)

    whole = list(rows(tiles_of(field, grid, valid)))
    part = list(rows((item for item in tiles_of(field, grid, valid) if item[0].row in starts), first))
    for name in ("scores", "covered", "disagreement"):
        all_rows, some = (torch.cat([getattr(rows, name) for rows in found], -2) for found in (whole, part))
        assert torch.equal(all_rows[..., first:last, :], some[..., first - starts[0] : last - starts[0], :]), name
    assert part[0].first == starts[0]


@given(grids(), windows, st.integers(0, 9))
def test_covered_is_the_valid_mask_exactly(grid: TileGrid, window: str, seed: int) -> None:
    valid = holes(grid, seed)
    scores, covered = blended(
        blend(peaks, tiles_of(random_field(grid), grid, valid), grid, channels=2, window=window, batch_size=2), grid
    )
    assert np.array_equal(covered.numpy(), valid)
    assert not scores[:, ~covered].any()


@given(grids(), st.integers(0, 9))
def test_tiles_without_a_valid_pixel_are_not_scored(grid: TileGrid, seed: int) -> None:
    valid = holes(grid, seed)
    scored = []

    def score(batch: Tensor) -> Tensor:
        scored.extend(tile[0, 0, 0].item() for tile in batch)
        return batch

    # The value of a pixel is its number, so a tile is known by its first one.
    numbers = np.arange(valid.size, dtype=np.float32).reshape(1, *valid.shape)
    blended(blend(score, tiles_of(numbers, grid, valid), grid, channels=1, batch_size=3), grid)
    assert scored == [
        tile.row * grid.width + tile.col
        for tile in grid
        if valid[tile.row : tile.row + tile.height, tile.col : tile.col + tile.width].any()
    ]


@given(grids(), windows)
def test_a_raster_without_a_valid_pixel_is_not_covered(grid: TileGrid, window: str) -> None:
    def score(batch: Tensor) -> Tensor:
        raise AssertionError("nothing is there to be scored")

    nowhere = np.zeros((grid.height, grid.width), bool)
    tiles = tiles_of(random_field(grid), grid, nowhere)
    scores, covered = blended(blend(score, tiles, grid, channels=2, window=window), grid)
    assert not covered.any()
    assert not scores.any()


@given(grids(most=90, tiles=60), windows, st.integers(0, 9))
def test_the_result_is_the_weighted_mean_and_lies_between_the_tiles(grid: TileGrid, window: str, seed: int) -> None:
    """Against a mean of all tiles in float64, with the whole canvas in memory."""
    field, valid = random_field(grid, seed=seed), holes(grid, seed, 0.3)
    total, weights = np.zeros(field.shape), np.zeros(valid.shape)
    low, high = np.full(field.shape, np.inf, np.float32), np.full(field.shape, -np.inf, np.float32)
    row_windows = dict(zip(grid.row_starts, axis_windows(grid.row_starts, grid.tile_height, window), strict=True))
    col_windows = dict(zip(grid.col_starts, axis_windows(grid.col_starts, grid.tile_width, window), strict=True))
    for tile, (values, tile_valid) in tiles_of(field, grid, valid):
        where = (slice(tile.row, tile.row + tile.height), slice(tile.col, tile.col + tile.width))
        weight = np.outer(row_windows[tile.row].double(), col_windows[tile.col].double()) * tile_valid
        scores = peaks(torch.from_numpy(values)[None])[0].numpy()
        total[:, *where] += scores * weight
        weights[where] += weight
        low[:, *where] = np.where(weight > 0, np.minimum(low[:, *where], scores), low[:, *where])
        high[:, *where] = np.where(weight > 0, np.maximum(high[:, *where], scores), high[:, *where])

    mean, covered = blended(blend(peaks, tiles_of(field, grid, valid), grid, channels=2, window=window), grid)
    found = mean.numpy()[:, valid]
    assert np.array_equal(covered.numpy(), weights > 0)
    np.testing.assert_allclose(found, (total[:, valid] / weights[valid]), rtol=1e-5, atol=1e-5)
    assert (found >= low[:, valid]).all()
    assert (found <= high[:, valid]).all()


@given(grids())
def test_windows_of_none_partition_both_axes(grid: TileGrid) -> None:
    for starts, side, length in (
        (grid.row_starts, grid.tile_height, grid.height),
        (grid.col_starts, grid.tile_width, grid.width),
    ):
        total = torch.zeros(length)
        for start, weights in zip(starts, axis_windows(starts, side, "none"), strict=True):
            assert set(weights.tolist()) <= {0.0, 1.0}
            total[start : start + side] += weights
        assert torch.equal(total, torch.ones(length))


@given(grids(), st.sampled_from(TAPERS))
def test_tapers_are_positive_everywhere_and_full_towards_the_rasters_border(grid: TileGrid, window: str) -> None:
    rows = axis_windows(grid.row_starts, grid.tile_height, window)
    for weights in rows:
        assert weights.dtype == torch.float32
        assert (weights > 0).all()
        assert (weights <= 1).all()
    half = grid.tile_height // 2
    assert (rows[0][:half] == 1).all()
    assert (rows[-1][grid.tile_height - half :] == 1).all()


@pytest.mark.parametrize("window", TAPERS)
@pytest.mark.parametrize("size", [1, 2, 7, 512, 4096])
def test_the_taper_of_an_inner_tile_is_symmetrical_and_falls_to_both_sides(window: str, size: int) -> None:
    """4096 pixels: in both axes together the smallest weight is still far from what float32 cannot hold."""
    _, inner, _ = axis_windows((0, size, 2 * size), size, window)
    torch.testing.assert_close(inner, inner.flip(0))
    assert (inner[: (size + 1) // 2].diff() >= 0).all()
    assert inner.min().square() > torch.finfo(torch.float32).tiny * 1e6


def test_a_lone_tile_is_weighed_alike_everywhere() -> None:
    for window in WINDOWS:
        assert torch.equal(axis_windows((0,), 9, window)[0], torch.ones(9))


@pytest.mark.parametrize("height", [64, 6_400, 640_000])
def test_memory_does_not_depend_on_the_height(height: int) -> None:
    blender = BandBlender(TileGrid(height, 100, 64, 16), 5)
    assert blender.mean.shape == (5, 64, 100)
    assert blender.weight.shape == (64, 100)


def test_rows_are_given_as_soon_as_no_tile_below_touches_them() -> None:
    grid = TileGrid(100, 10, 40, 10)
    asked = []

    def watched() -> Iterator[tuple[Tile, tuple[np.ndarray, np.ndarray]]]:
        for tile, piece in tiles_of(random_field(grid), grid):
            asked.append(tile.row)
            yield tile, piece

    first = next(blend(peaks, watched(), grid, channels=2))
    assert asked == [0, 30]
    assert (first.first, len(first.covered)) == (0, 30)


def test_finished_rows_are_not_changed_by_later_tiles() -> None:
    grid = TileGrid(90, 20, 30, 10)
    kept = [(part, part.scores.clone()) for part in blend(peaks, tiles_of(random_field(grid), grid), grid, channels=2)]
    for part, scores in kept:
        assert torch.equal(part.scores, scores)


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (1, 3, 8, 8), (1, 2, 8, 7), (2, 8, 8), (1, 2, 4, 4)])
def test_scores_of_another_shape_are_an_error_that_tells_both(shape: tuple[int, ...]) -> None:
    grid = TileGrid(8, 8, 8, 0)
    with pytest.raises(UsageError) as caught:
        blended(blend(lambda batch: torch.zeros(shape), tiles_of(random_field(grid), grid), grid, channels=2), grid)
    assert str(shape) in str(caught.value)
    assert "(1, 2, 8, 8)" in str(caught.value)


def test_an_unknown_window_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"'hamming'.*hann, gaussian, linear, none"):
        axis_windows((0,), 8, "hamming")


@pytest.mark.parametrize("window", WINDOWS)
def test_what_a_tile_says_of_its_invalid_pixels_has_no_weight(window: str) -> None:
    """Not even where it is no number: a network may say anything of pixels that were filled in."""
    grid = TileGrid(12, 12, 8, 4)
    valid = np.ones((12, 12), bool)
    valid[3:6, 3:6] = False
    field = np.where(valid, random_field(grid), np.float32(np.nan))
    scores, covered = blended(
        blend(lambda batch: batch, tiles_of(field, grid, valid), grid, channels=2, window=window), grid
    )
    assert np.array_equal(covered.numpy(), valid)
    assert torch.equal(scores[:, covered], torch.from_numpy(field[:, valid]))


def test_scores_that_carry_a_graph_do_not_pile_it_up() -> None:
    """A segmenter that forgot `torch.no_grad` must not keep every tile of the scene in memory."""
    gain = torch.ones(1, requires_grad=True)
    grid = TileGrid(40, 8, 8, 4)
    for part in blend(lambda batch: batch * gain, tiles_of(random_field(grid), grid), grid, channels=2):
        assert not part.scores.requires_grad


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("window", WINDOWS)
def test_the_laws_hold_where_the_scores_are(window: str) -> None:
    """On an accelerator: a function of each pixel comes back exactly, what is not valid is not covered."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    grid = TileGrid(150, 130, 48, 13)
    field, valid = random_field(grid), holes(grid, 0, 0.3)
    tiles = tiles_of(field, grid, valid)
    options = {"window": window, "batch_size": 4, "device": device, "disagreement": True}
    rows = blend(lambda b: b.to(device), tiles, grid, channels=2, **options)
    parts = []
    for part in rows:
        assert part.scores.device.type == device.type
        assert part.disagreement is not None
        assert part.disagreement.device.type == device.type
        assert not part.disagreement.any()
        parts.append(Rows(part.first, part.scores.cpu(), part.covered.cpu()))
    scores, covered = blended(iter(parts), grid)
    assert np.array_equal(covered.numpy(), valid)
    assert np.array_equal(scores.numpy(), np.where(valid, field, 0))


def test_half_precision_scores_are_blended_in_float32() -> None:
    grid = TileGrid(20, 20, 8, 6)
    field = random_field(grid)
    scores, _ = blended(blend(lambda batch: peaks(batch).half(), tiles_of(field, grid), grid, channels=2), grid)
    exact, _ = blended(blend(lambda batch: peaks(batch).half().float(), tiles_of(field, grid), grid, channels=2), grid)
    assert torch.equal(scores, exact)


# How far the tiles differ


def differing(batch: Tensor) -> Tensor:
    """Probabilities of two classes that depend on the whole tile; exact in floating point, as `peaks` are."""
    share = (batch[:, :1].float() + batch.float().amax((1, 2, 3), keepdim=True)).remainder(1)
    return torch.cat((share, 1 - share), 1)


def all_of(rows: Iterator[Rows]) -> np.ndarray:
    """(H, W) disagreement."""
    return torch.cat([part.disagreement for part in rows if part.disagreement is not None], 0).numpy()


@given(grids(most=90, tiles=60), windows, st.integers(0, 9))
def test_disagreement_is_the_largest_difference_of_two_tiles_in_a_class(grid: TileGrid, window: str, seed: int) -> None:
    """Against all pairs of tiles, one by one, with the whole canvas in memory; to the last bit."""
    field, valid = random_field(grid, seed=seed), holes(grid, seed, 0.3)
    canvases, seen = [], []
    for tile, (values, tile_valid) in tiles_of(field, grid, valid):
        where = (slice(tile.row, tile.row + tile.height), slice(tile.col, tile.col + tile.width))
        canvas, there = np.zeros(field.shape, np.float32), np.zeros(valid.shape, bool)
        canvas[:, *where] = differing(torch.from_numpy(values)[None])[0].numpy()
        there[where] = tile_valid
        canvases.append(canvas)
        seen.append(there)
    expected = np.zeros(valid.shape, np.float32)
    for i in range(len(canvases)):
        for j in range(i):
            both = seen[i] & seen[j]
            expected[both] = np.maximum(expected, np.abs(canvases[i] - canvases[j]).max(0))[both]
    rows = blend(
        differing, tiles_of(field, grid, valid), grid, channels=2, window=window, batch_size=3, disagreement=True
    )
    found = all_of(rows)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    assert not found[np.sum(seen, 0) < 2].any(), "one tile alone cannot differ"
    assert (found <= 1).all()


@given(grids(most=90, tiles=60), st.integers(0, 9))
def test_disagreement_does_not_depend_on_the_order_of_the_tiles_of_a_row(grid: TileGrid, seed: int) -> None:
    field, valid = random_field(grid, seed=seed), holes(grid, seed, 0.3)
    given_order = list(tiles_of(field, grid, valid))
    reversed_rows = sorted(given_order, key=lambda item: (item[0].row, -item[0].col))
    one, other = (
        all_of(blend(differing, iter(tiles), grid, channels=2, disagreement=True))
        for tiles in (given_order, reversed_rows)
    )
    assert np.array_equal(one, other)


@given(grids(most=60), windows)
def test_tiles_that_agree_do_not_differ(grid: TileGrid, window: str) -> None:
    field = random_field(grid)
    found = all_of(
        blend(lambda batch: batch, tiles_of(field, grid), grid, channels=2, window=window, disagreement=True)
    )
    assert not found.any()


def test_the_blend_is_the_same_with_and_without_the_disagreement() -> None:
    grid = TileGrid(70, 50, 20, 7)
    field, valid = random_field(grid), holes(grid, 0, 0.3)
    without, with_it = (
        list(blend(peaks, tiles_of(field, grid, valid), grid, channels=2, disagreement=asked))
        for asked in (False, True)
    )
    for one, other in zip(without, with_it, strict=True):
        assert one.disagreement is None
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.covered, other.covered)


@pytest.mark.parametrize("height", [64, 640_000])
def test_memory_for_the_disagreement_is_one_band(height: int) -> None:
    blender = BandBlender(TileGrid(height, 100, 64, 16), 5, disagreement=True)
    assert blender.range is not None
    assert blender.range.shape == (2, 5, 64, 100)
