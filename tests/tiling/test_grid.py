"""Laws of the tile grid, and what an overlap may be written as."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ls_infer.errors import UsageError
from d2ls_infer.tiling import Tile, TileGrid, parse_overlap


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    """Rasters of 1..300 x 1..300 with any tile and overlap; at most some 2000 tiles, to be counted one by one."""
    height, width = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    least_step = max(1, round((height * width / 2000) ** 0.5))
    step = draw(st.one_of(st.integers(least_step, 3 * least_step), st.integers(least_step, 350)))
    overlap = draw(st.one_of(st.integers(0, step), st.integers(0, 350)))
    return TileGrid(height, width, step + overlap, overlap)


@given(grids())
def test_tiles_are_unique_and_row_major(grid: TileGrid) -> None:
    places = [(tile.row, tile.col) for tile in grid]
    assert places == sorted(set(places))
    assert len(grid) == len(places)


@given(grids())
def test_tiles_lie_inside_and_cover_every_pixel(grid: TileGrid) -> None:
    covered = np.zeros((grid.height, grid.width), bool)
    for tile in grid:
        assert tile.row >= 0
        assert tile.col >= 0
        assert tile.row + tile.height <= grid.height
        assert tile.col + tile.width <= grid.width
        covered[tile.row : tile.row + tile.height, tile.col : tile.col + tile.width] = True
    assert covered.all()


@given(grids())
def test_all_tiles_have_one_shape_the_square_clipped_to_the_raster(grid: TileGrid) -> None:
    shape = min(grid.size, grid.height), min(grid.size, grid.width)
    assert {(tile.height, tile.width) for tile in grid} == {shape}
    assert (grid.tile_height, grid.tile_width) == shape


@given(grids())
def test_neighbours_share_the_overlap_or_more(grid: TileGrid) -> None:
    for starts, side in ((grid.row_starts, grid.tile_height), (grid.col_starts, grid.tile_width)):
        for start, following in pairwise(starts):
            assert start + side - following >= grid.overlap_px


@given(grids())
def test_no_tile_could_be_left_out(grid: TileGrid) -> None:
    """As few tiles as the overlap allows: without any one, two neighbours would share less than the overlap."""
    for starts, side in ((grid.row_starts, grid.tile_height), (grid.col_starts, grid.tile_width)):
        for before, after in zip(starts, starts[2:], strict=False):
            assert before + side - after < grid.overlap_px


@pytest.mark.parametrize(
    ("grid", "tiles"),
    [
        (TileGrid(1, 1, 512, 128), [Tile(0, 0, 1, 1)]),
        (TileGrid(5, 5, 5, 0), [Tile(0, 0, 5, 5)]),
        (TileGrid(3, 6, 4, 1), [Tile(0, 0, 3, 4), Tile(0, 2, 3, 4)]),
        (TileGrid(6, 1, 4, 0), [Tile(0, 0, 4, 1), Tile(2, 0, 4, 1)]),
        (TileGrid(7, 7, 4, 1), [Tile(r, c, 4, 4) for r in (0, 3) for c in (0, 3)]),
    ],
)
def test_known_grids(grid: TileGrid, tiles: list[Tile]) -> None:
    assert list(grid) == tiles


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 5, 4, 1), ["at least one row and column", "0 x 5"]),
        ((5, -1, 4, 1), ["at least one row and column", "5 x -1"]),
        ((5, 5, 0, 0), ["tile size", "at least 1", "got 0", "try 512"]),
        ((5, 5, 64, 64), ["overlap", "64 pixels", "got 64", "try 16"]),
        ((5, 5, 64, -1), ["overlap", "at least 0", "got -1"]),
    ],
)
def test_errors_tell_the_value_the_limit_and_the_way_out(arguments: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        TileGrid(*arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overlap", "size", "pixels"),
    [
        (0, 512, 0),
        (128, 512, 128),
        ("128", 512, 128),
        (" 128 ", 512, 128),
        (1, 512, 1),
        (0.25, 512, 128),
        ("0.25", 512, 128),
        ("25%", 512, 128),
        ("0%", 512, 0),
        ("12.5%", 512, 64),
        (0.25, 1, 0),
        (0.999, 10, 9),
        ("99%", 10, 9),
    ],
)
def test_an_overlap_is_pixels_or_a_share_of_the_tile(overlap: int | float | str, size: int, pixels: int) -> None:
    assert parse_overlap(overlap, size) == pixels


@given(st.integers(0, 99))
def test_whole_percents_of_a_tile_of_100_pixels_are_as_many_pixels(percent: int) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point; a pixel must not get lost there."""
    assert parse_overlap(f"{percent}%", 100) == percent


@pytest.mark.parametrize(
    "overlap",
    [
        "", "%", "half", "1.5", 1.5, 2.5, "1.0", 1.0, -1, -0.25, "-25%", "100%", "150%", "nan", "inf", "25%%", "1,5",
        True,
    ],
)  # fmt: skip
def test_anything_else_is_no_overlap(overlap: int | float | str) -> None:
    with pytest.raises(UsageError, match="overlap must be") as caught:
        parse_overlap(overlap, 512)
    assert repr(overlap) in str(caught.value)


@given(st.integers(1, 120), st.integers(1, 40), st.integers(0, 39), st.data())
def test_what_touches_rows_is_what_shares_one_with_them(
    height: int, size: int, overlap: int, data: st.DataObject
) -> None:
    grid = TileGrid(height, 7, size, min(overlap, size - 1))
    start = data.draw(st.integers(0, height - 1))
    stop = data.draw(st.integers(start + 1, height))
    first, last = grid.touching(start, stop)
    touching = [i for i, row in enumerate(grid.row_starts) if row < stop and row + grid.tile_height > start]
    assert list(range(first, last)) == touching
