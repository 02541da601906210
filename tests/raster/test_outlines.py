"""Areas of a label map and their outlines: the same however the rows come, and the map again when they are put back."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasterio.features import rasterize, shapes

from d2ls_infer.labels import NODATA
from d2ls_infer.raster import outlines
from d2ls_infer.raster.outlines import Area, Outliner


@st.composite
def label_maps(draw: st.DrawFn) -> np.ndarray:
    """(1..25, 1..25) uint8: noise, or larger areas, of one to four values; the last is nodata as often as not."""
    height, width = draw(st.integers(1, 25)), draw(st.integers(1, 25))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    values = np.array([*range(draw(st.integers(1, 4))), draw(st.sampled_from([7, NODATA]))], np.uint8)
    noise = random.random((height, width))
    for _ in range(draw(st.integers(0, 2))):
        noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 3
    ranks = noise.ravel().argsort().argsort().reshape(noise.shape)
    return values[ranks * len(values) // noise.size]


def outline(labels: np.ndarray, heights: list[int], *values: np.ndarray) -> list[Area]:
    """The areas of a map that comes in bands of those heights, again and again."""
    outliner = Outliner(labels.shape[1])
    areas, start = [], 0
    while start < len(labels):
        band = slice(start, start + heights[start % len(heights)])
        areas += outliner.add(labels[band], *(each[band] for each in values))
        start = band.stop
    return areas + outliner.finish()


def plain(areas: list[Area]) -> list[object]:
    """Areas as values that can be compared, in an order of their own."""
    return sorted((tuple(map(tuple, a.rings[0].tolist())), a.label, a.pixels, a.sums, len(a.rings)) for a in areas)


def burnt(area: Area, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels that an area covers, by GDAL."""
    polygon = {"type": "Polygon", "coordinates": [[(col, row) for row, col in ring.tolist()] for ring in area.rings]}
    for ring in polygon["coordinates"]:
        ring.append(ring[0])
    mask: np.ndarray = rasterize([polygon], out_shape=shape).astype(bool)
    return mask


def twice_the_area(ring: np.ndarray) -> int:
    """Positive where the way goes clockwise in the picture."""
    row, col = ring.T
    return int((col * np.roll(row, -1) - np.roll(col, -1) * row).sum())


@given(label_maps(), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_areas_are_those_of_the_whole_map_however_its_rows_come(labels: np.ndarray, heights: list[int]) -> None:
    values = np.random.default_rng(0).integers(0, 251, labels.shape)
    whole = outline(labels, [len(labels)], values)
    parts = outline(labels, heights, values)
    assert plain(parts) == plain(whole)
    by_start = {tuple(area.rings[0][0]): area for area in whole}
    for area in parts:
        for ring, other in zip(area.rings, by_start[tuple(area.rings[0][0])].rings, strict=True):
            assert np.array_equal(ring, other)


@given(label_maps(), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_areas_put_back_are_the_map_pixel_by_pixel(labels: np.ndarray, heights: list[int]) -> None:
    values = np.random.default_rng(0).integers(0, 251, labels.shape)
    found = np.full(labels.shape, NODATA, np.uint8)
    times = np.zeros(labels.shape, int)
    for area in outline(labels, heights, values):
        mask = burnt(area, labels.shape)
        assert area.pixels == mask.sum()
        assert area.sums == (values[mask].sum(),)
        found[mask] = area.label
        times += mask
    assert np.array_equal(found, labels)
    assert np.array_equal(times, (labels != NODATA).astype(int))


@given(label_maps())
def test_areas_are_as_many_and_as_large_as_gdals(labels: np.ndarray) -> None:
    expected = []
    for shape, value in shapes(labels, mask=labels != NODATA):
        rings = [np.array(ring[:-1])[:, ::-1] for ring in shape["coordinates"]]
        expected.append((value, sum(abs(twice_the_area(r)) * (1, -1)[i > 0] for i, r in enumerate(rings)) / 2))
    assert sorted(expected) == sorted((area.label, area.pixels) for area in outline(labels, [3]))


@given(label_maps(), st.integers(1, 9))
def test_rings_are_simple_and_go_the_right_way_round(labels: np.ndarray, height: int) -> None:
    for area in outline(labels, [height]):
        outer, *holes = area.rings
        assert twice_the_area(outer) > 0
        assert all(twice_the_area(hole) < 0 for hole in holes)
        assert sum(map(twice_the_area, area.rings)) == 2 * area.pixels
        for ring in area.rings:
            points = list(map(tuple, ring.tolist()))
            assert len(set(points)) == len(points), "no ring meets itself"
            assert points[0] == min(points)
            for (row, col), (next_row, next_col) in pairwise([*points, points[0]]):
                assert (row == next_row) != (col == next_col), "sides go along rows and columns by turns"


@given(label_maps())
def test_polygons_are_valid_for_geos(labels: np.ndarray) -> None:
    shapely = pytest.importorskip("shapely")
    for area in outline(labels, [4]):
        polygon = shapely.Polygon(area.rings[0], area.rings[1:])
        assert polygon.is_valid, shapely.is_valid_reason(polygon)


def test_pixels_that_touch_at_a_corner_only_are_two_areas() -> None:
    areas = outline(np.array([[0, 1], [1, 0]], np.uint8), [1])
    assert sorted((area.label, area.pixels) for area in areas) == [(0, 1), (0, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("turns", range(4))
def test_a_hole_that_touches_the_outside_at_a_corner_is_a_hole(turns: int) -> None:
    """Seven pixels around one, of which two touch at a vertex and are joined elsewhere, perhaps further down."""
    labels = np.rot90(np.array([[1, 1, NODATA], [1, NODATA, 1], [1, 1, 1]], np.uint8), turns)
    (area,) = outline(labels, [1])
    assert area.pixels == 7
    assert [len(ring) for ring in area.rings] == [6, 4]


def test_an_area_is_given_when_no_row_can_add_to_it() -> None:
    outliner = Outliner(4)
    assert outliner.add(np.array([[0, 0, 1, 1]], np.uint8)) == []
    assert [a.label for a in outliner.add(np.array([[0, 0, 0, 0]], np.uint8))] == [1]
    assert len(outliner.open) == 1
    assert [a.pixels for a in outliner.finish()] == [6]


def test_memory_is_that_of_the_open_areas() -> None:
    """Stripes that end and begin: two thousand areas go through, and a handful is open at any time."""
    outliner = Outliner(8)
    given_out = 0
    for row in range(2_000):
        given_out += len(outliner.add(np.full((1, 8), row % 2, np.uint8)))
        assert len(outliner.open) == 1
        assert sum(len(corners.row) for area in outliner.open for corners in area.corners) <= 4
    assert given_out + len(outliner.finish()) == 2_000


def test_a_band_that_is_large_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (50, 20)).astype(np.uint8)
    whole = plain(outline(labels, [50], labels))
    monkeypatch.setattr(outlines, "PIECE_PIXELS", 60)
    assert plain(outline(labels, [50], labels)) == whole


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (257, 3)])
def test_maps_of_any_shape(shape: tuple[int, int]) -> None:
    (area,) = outline(np.full(shape, 4, np.uint8), [64])
    height, width = shape
    assert (area.label, area.pixels) == (4, height * width)
    assert area.rings[0].tolist() == [[0, 0], [0, width], [height, width], [height, 0]]
    assert outline(np.full(shape, NODATA, np.uint8), [64]) == []


def test_a_spiral_is_one_area() -> None:
    """The worst for what joins rows: an arm that comes back to every row many times."""
    size = 61
    labels = np.zeros((size, size), np.uint8)
    low, high = 0, size - 1
    while low <= high:
        labels[low, max(0, low - 2) : high + 1] = 1
        labels[low : high + 1, high] = 1
        labels[high, low : high + 1] = 1
        labels[low + 2 : high + 1, low] = 1
        low, high = low + 2, high - 2
    for heights in ([size], [1], [7]):
        areas = outline(labels, heights)
        assert sorted((a.label, a.pixels) for a in areas if a.label == 1) == [(1, int(labels.sum()))]
