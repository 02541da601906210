"""Small pictures of scenes and maps: the same however the rows come, and true to every square."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.outputs.pictures import PAPER, SIDE_PX, MapPicture, ScenePicture, in_colors
from d2ls_infer.tiling import TileGrid


def rows_of(labels: np.ndarray) -> Any:
    return SimpleNamespace(labels=labels)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 20))
def test_each_pixel_of_a_small_map_is_what_most_of_its_square_are(
    height: int, width: int, side: int, band: int
) -> None:
    labels = np.random.default_rng([height, width]).choice(np.array([0, 1, 5, NODATA], np.uint8), (height, width))
    picture = MapPicture(height, width, side)
    for start in range(0, height, band):
        picture.add(rows_of(labels[start : start + band]))
    found, step = picture.result(), picture.step
    assert max(found.shape) <= side
    for (row, col), value in np.ndenumerate(found):
        square = labels[row * step : (row + 1) * step, col * step : (col + 1) * step]
        assert value == np.bincount(square.ravel(), minlength=256).argmax()
    assert np.array_equal(picture.result(), found), "asking twice changes nothing"


def test_a_map_that_is_small_is_shown_as_it_is() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (30, 50)).astype(np.uint8)
    picture = MapPicture(30, 50)
    picture.add(rows_of(labels))
    assert np.array_equal(picture.result(), labels)


@pytest.mark.parametrize("height", [3_000, 3_000_000])
def test_pictures_of_any_scene_are_of_a_bounded_size(height: int) -> None:
    assert MapPicture(height, 1000).picture.size <= SIDE_PX**2
    assert ScenePicture(TileGrid(height, 1000, 512, 128), ("a",)).counts.size <= SIDE_PX**2


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 30))
def test_a_small_scene_is_the_mean_of_the_valid_pixels(height: int, width: int, side: int, tile: int) -> None:
    random = np.random.default_rng([height, width])
    values = random.integers(0, 255, (3, height, width)).astype(np.uint8)
    valid = random.random((height, width)) > 0.3
    grid = TileGrid(height, width, max(1, max(height, width, tile) // 3), 0)
    picture = ScenePicture(grid, ("red", "green", "blue"), side)
    seen = np.zeros((height, width), int)
    for each in grid:
        rows, cols = slice(each.row, each.row + each.height), slice(each.col, each.col + each.width)
        seen[rows, cols] += 1
        picture.add(each, values[:, rows, cols], valid[rows, cols])
    step = picture.step
    for (row, col), count in np.ndenumerate(picture.counts):
        square = slice(row * step, (row + 1) * step), slice(col * step, (col + 1) * step)
        weight = seen[square] * valid[square]
        assert count == weight.sum()
        np.testing.assert_allclose(picture.sums[:, row, col], (values[:, *square] * weight).sum((1, 2)), rtol=1e-5)
    result = picture.result()
    assert (result.shape[1:], result.dtype) == (picture.counts.shape, np.uint8)
    assert (result[:, picture.counts == 0] == PAPER).all()


@pytest.mark.parametrize(
    ("names", "bands"),
    [
        (("near infrared", "red", "green"), [0, 1, 2]),
        (("blue", "green", "Red", "nir"), [2, 1, 0]),
        (("pan",), [0, 0, 0]),
        (("vv", "vh"), [0, 0, 0]),
    ],
)
def test_a_scene_is_shown_in_its_colours_where_it_has_them(names: tuple[str, ...], bands: list[int]) -> None:
    assert ScenePicture(TileGrid(9, 9, 9, 0), names).bands == bands


def test_a_map_in_colours_is_transparent_where_there_is_nothing() -> None:
    picture = in_colors(np.array([[0, 1, 2, NODATA]], np.uint8), LabelMap(("a", "b"), ((1, 2, 3), (4, 5, 6))))
    assert picture.dtype == np.uint8
    assert picture.transpose(1, 2, 0).tolist() == [[[1, 2, 3, 255], [4, 5, 6, 255], [0, 0, 0, 0], [0, 0, 0, 0]]]
