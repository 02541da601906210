"""How far a map depends on its tiles: segmenters that depend on them in known ways, and what is counted then."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2ls_infer.errors import UsageError
from d2ls_infer.seams import SeamReport, measure, measure_seams, try_overlaps
from d2ls_infer.seams.counts import BINS, Changes, Lines, count_changes, count_lines, edge_distances, seam_lines
from d2ls_infer.seams.counts import worst_square as worst
from d2ls_infer.tiling import TileGrid

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]

TILE = 64
SHIFTS = (0.25, 0.5)
FARTHEST = 32  # of the shifts, without overlap
SIDE = FARTHEST + 3 * TILE  # so that the grids hold whole tiles


@pytest.fixture
def rim(fakes: SimpleNamespace) -> Callable[[int], Any]:
    """A segmenter that says 1 in a rim of some pixels around a tile, and 0 inside; whatever it sees."""

    class Rim(fakes.Fake):  # type: ignore[misc, name-defined]
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width

        def scores(self, batch: Tensor) -> Tensor:
            index = torch.ones(len(batch), *batch.shape[-2:], dtype=torch.int64)
            index[:, self.width : -self.width, self.width : -self.width] = 0
            return self.one_hot(index)

    return Rim


@pytest.fixture
def bright(fakes: SimpleNamespace) -> Any:
    """A segmenter that gives a whole tile one class: 1 where its mean is above 105, else 0."""

    class Bright(fakes.Fake):  # type: ignore[misc, name-defined]
        def scores(self, batch: Tensor) -> Tensor:
            is_bright = batch.float().mean((1, 2, 3)) > 105
            return self.one_hot(is_bright.long().view(-1, 1, 1).expand(-1, *batch.shape[-2:]))

    return Bright()


@pytest.fixture
def flat(tmp_path: Path, write_raster: Write) -> Path:
    return write_raster(tmp_path / "flat.tif", np.full((3, SIDE, SIDE), 7, np.uint8))


def rim_distance(first: int) -> np.ndarray:
    """Of each place of a part, the pixels to the end of its tile, in whole tiles from `first` on."""
    inside = (np.arange(SIDE) - first) % TILE
    return np.minimum(inside, TILE - 1 - inside)


# Known dependence on tiles


@pytest.mark.parametrize("blend", ["hann", "none"])
def test_a_class_that_ignores_the_tile_never_changes(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, blend: str
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, 300, 333))
    report = measure_seams(fakes.PerPixel(), path, tile_size=TILE, blend=blend)
    for maps in (report.blended, report.raw):
        assert maps.compared[0] - maps.compared[1] == 33
        assert [shift.changed for shift in maps.shifts] == [0, 0, 0]
        assert {shift.of for shift in maps.shifts} == {math.prod(maps.compared)}
        assert maps.mean_share == 0
        for lines in (maps.columns, maps.rows):  # of three classes at random, 2 of 3 pairs differ anywhere
            assert lines.seams.share == pytest.approx(2 / 3, abs=0.02)
            assert lines.beside.share == pytest.approx(2 / 3, abs=0.02)
            assert lines.ratio == pytest.approx(1, abs=0.03)
    assert report.curve[0].of > 0
    assert [item.changed for item in report.curve] == [0] * len(BINS)
    assert report.shifts_px == (12, 24, 36)


@pytest.mark.parametrize("width", [8, 16])
def test_a_rim_is_the_curve(flat: Path, rim: Callable[[int], Any], width: int) -> None:
    report = measure_seams(rim(width), flat, tile_size=TILE, overlap=0, blend="none", shifts=SHIFTS)
    compared = slice(FARTHEST, SIDE - FARTHEST)
    pixels, changed = np.zeros(len(BINS), int), np.zeros(len(BINS), int)
    shares = []
    for first in (16, 32):
        plain, shifted = (
            np.minimum(along[:, None], along) for along in (rim_distance(0)[compared], rim_distance(first)[compared])
        )
        differ, nearer = (plain < width) != (shifted < width), np.minimum(plain, shifted)
        shares.append(differ.mean())
        for index, low in enumerate(BINS):
            where = (nearer >= low) & (nearer < (*BINS, 10**6)[index + 1])
            pixels[index] += where.sum()
            changed[index] += (where & differ).sum()
    assert [item.of for item in report.curve] == pixels.tolist()
    assert [item.changed for item in report.curve] == changed.tolist()
    assert all(item.share > 0.4 for item in report.curve if item.low < width)
    assert sum(item.changed for item in report.curve if item.low >= width) == 0
    assert [shift.share for shift in report.raw.shifts] == pytest.approx(shares)
    assert report.raw.mean_share == pytest.approx(sum(shares) / 2)
    assert (report.blended, report.tile_size) == (report.raw, TILE)


def test_the_scenes_own_border_is_no_edge(flat: Path, rim: Callable[[int], Any]) -> None:
    """A small shift leaves the border within reach: the first and last tiles are far from any edge there."""
    whole = measure_seams(rim(8), flat, tile_size=TILE, overlap=0, shifts=(0.125,))
    cut = measure_seams(rim(8), flat, tile_size=TILE, overlap=0, shifts=(0.125,), window=(0, 0, SIDE, SIDE - 1))
    for report in (whole, cut):
        assert sum(item.of for item in report.curve) == report.raw.shifts[0].of
    nearest = sum(item.of for item in whole.curve if item.low < 16) / whole.raw.shifts[0].of
    assert nearest < sum(item.of for item in cut.curve if item.low < 16) / cut.raw.shifts[0].of


def test_class_changes_at_seams_are_told_from_others(tmp_path: Path, write_raster: Write, bright: Any) -> None:
    """Stripes as wide as a tile: of the plain tiles every second is bright, and of the shifted ones still."""
    side = 48 + 4 * TILE
    stripes = np.where(np.arange(side) // TILE % 2, 200, 10).astype(np.uint8)
    path = write_raster(tmp_path / "stripes.tif", np.broadcast_to(stripes, (3, side, side)).copy())
    report = measure_seams(bright, path, tile_size=TILE, overlap=0, shifts=(0.25, 0.75))
    place = np.arange(48, side - 48)
    plain = place // TILE % 2
    # A tile is as bright as the stripe that it lies in for the most part: its own, or the next one.
    expected = [np.mean(plain != (place - 16) // TILE % 2), np.mean(plain != ((place - 48) // TILE + 1) % 2)]
    assert [shift.share for shift in report.raw.shifts] == pytest.approx(expected)
    assert 0 not in expected
    columns, rows = report.raw.columns, report.raw.rows
    assert (columns.seams.share, columns.beside.share, columns.difference) == (1, 0, 1)
    assert math.isnan(columns.ratio)
    cuts = [first + number * TILE for first in (0, 16, 48) for number in (1, 2, 3)]
    assert columns.seams.of == len(place) * sum(48 < cut < side - 48 for cut in cuts)
    assert rows.seams.of == columns.seams.of
    assert (rows.seams.changed, rows.beside.changed) == (0, 0)
    assert rows.beside.of == columns.beside.of > 0


def test_compared_pixels_have_all_their_tiles(
    flat: Path, rim: Callable[[int], Any], tmp_path: Path, write_raster: Write
) -> None:
    """Blended maps repeat themselves from tile to tile, up to the ends of what is compared."""
    step = 48
    side = 36 + TILE + 5 * step
    path = write_raster(tmp_path / "large.tif", np.full((3, side, side), 7, np.uint8))
    plain, shifted = measure_seams(rim(28), path, tile_size=TILE, overlap=16).example.blended
    assert plain.any()
    assert not plain.all()
    for labels in (plain, shifted):
        assert len(labels) == side - 2 * (36 + 16)
        assert np.array_equal(labels[step:], labels[:-step])
        assert np.array_equal(labels[:, step:], labels[:, :-step])


def test_blending_hides_a_rim(tmp_path: Path, write_raster: Write, rim: Callable[[int], Any]) -> None:
    path = write_raster(tmp_path / "large.tif", np.full((3, 300, 300), 7, np.uint8))
    report = measure_seams(rim(4), path, tile_size=TILE, overlap=0.5)
    assert report.blended.mean_share == 0 < report.raw.mean_share
    assert {maps.blend for maps in (report.blended, report.raw)} == {"hann", "none"}


# Which pixels


def test_pixels_without_data_are_not_counted(tmp_path: Path, write_raster: Write, rim: Callable[[int], Any]) -> None:
    array = np.full((3, SIDE, SIDE), 7, np.uint8)
    array[:, :, 90:] = 0
    path = write_raster(tmp_path / "holes.tif", array, nodata=0)
    report = measure_seams(rim(8), path, tile_size=TILE, overlap=0, shifts=SHIFTS)
    height = SIDE - 2 * FARTHEST
    assert [shift.of for shift in report.raw.shifts] == [height * (90 - FARTHEST)] * 2
    assert sum(item.of for item in report.curve) == 2 * height * (90 - FARTHEST)
    columns = report.raw.columns
    assert columns.seams.of == 2 * height  # at 64 and 80; that of the third grid, 96, lies beyond
    assert columns.beside.of == 2 * height  # at 48 and 64: beside 80 and 96


def test_a_part_without_data_is_refused(tmp_path: Path, write_raster: Write, fakes: SimpleNamespace) -> None:
    path = write_raster(tmp_path / "empty.tif", np.zeros((3, SIDE, SIDE), np.uint8), nodata=0)
    with pytest.raises(UsageError, match=r"no pixel that is compared has data; choose another part"):
        measure_seams(fakes.PerPixel(), path, tile_size=TILE)


@pytest.mark.parametrize(("tile_size", "overlap", "least"), [(512, 0.25, 833), (64, 0, 113), (64, 0.5, 113)])
def test_an_image_that_is_too_small_is_refused(
    tmp_path: Path, write_raster: Write, fakes: SimpleNamespace, tile_size: int, overlap: float, least: int
) -> None:
    segmenter = fakes.Constant()
    for shape in ((least - 1, least), (least, least - 1)):
        path = write_raster(tmp_path / "small.tif", np.ones((3, *shape), np.uint8))
        with pytest.raises(UsageError, match=f"nothing to measure in {shape[1]} x {shape[0]} .* {least} x {least} or"):
            measure_seams(segmenter, path, tile_size=tile_size, overlap=overlap)
    assert segmenter.scored == 0
    path = write_raster(tmp_path / "small.tif", np.ones((3, least, least), np.uint8))
    assert measure_seams(segmenter, path, tile_size=tile_size, overlap=overlap).raw.mean_share == 0


def test_the_middle_of_a_large_scene_is_measured(
    tmp_path: Path, write_raster: Write, fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LIMIT_PX", 200)
    path = write_raster(tmp_path / "large.tif", np.ones((3, 180, 301), np.uint8))
    report = measure_seams(fakes.Constant(), path, tile_size=TILE)
    assert (report.scene_size, report.part) == ((301, 180), (50, 0, 200, 180))
    told = measure_seams(fakes.Constant(), path, tile_size=TILE, window=(0, 0, 301, 180))
    assert told.part == (0, 0, 301, 180)
    box = measure_seams(fakes.Constant(), path, tile_size=TILE, bbox=(500_020, 4_599_660, 500_420, 4_599_980))
    assert box.part == (10, 10, 200, 160)


def test_distances_are_in_pixels_that_the_model_sees(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    """Two metres a pixel, read at four."""
    path = write_raster(tmp_path / "fine.tif", pixels(3, 400, 400))
    report = measure_seams(fakes.PerPixel(), path, tile_size=32, overlap=0, gsd=4)
    assert report.raw.compared == (200 - 2 * 24, 200 - 2 * 24)
    assert report.raw.mean_share == 0
    assert (report.example.col, report.example.row) == (48, 48)


# The least overlap that is enough


def test_the_least_overlap_that_keeps_the_rim_out_is_found(flat: Path, rim: Callable[[int], Any]) -> None:
    """Tiles of 64 px that are cut between their centres show 8 px of rim until they overlap by 16."""
    found = try_overlaps(rim(8), flat, 0.0, tile_size=TILE, blend="none", shifts=SHIFTS)
    assert [trial.overlap_px for trial in found] == [0, 4, 8, 12, 16]
    shares = [trial.share for trial in found]
    assert shares == sorted(shares, reverse=True)
    assert shares[-2] > shares[-1] == 0
    assert (
        found[0].share
        == measure_seams(rim(8), flat, tile_size=TILE, blend="none", shifts=SHIFTS, overlap=0).blended.mean_share
    )
    assert found[-1].cost == (len(TileGrid(SIDE, SIDE, TILE, 16)) * TILE**2) / SIDE**2
    assert len(try_overlaps(rim(8), flat, found[2].share, tile_size=TILE, blend="none", shifts=SHIFTS)) == 3


def test_what_no_overlap_reaches_is_told_by_the_last_trial(flat: Path, fakes: SimpleNamespace, rim: Any) -> None:
    found = try_overlaps(rim(28), flat, 0.0, tile_size=TILE, blend="none", shifts=SHIFTS)
    assert found[-1].share > 0
    assert found[-1].overlap_px < TILE
    with pytest.raises(UsageError, match="nothing to measure"):
        try_overlaps(fakes.Constant(), flat, 0.0, tile_size=4 * SIDE)


# What is told


def test_the_example_is_where_most_changes(tmp_path: Path, write_raster: Write, bright: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(measure, "EXAMPLE_PX", 40)
    array = np.full((3, 240, 272), 10, np.uint8)
    array[:, 96:128, 160:192] = 200  # one tile of the plain grid, and of no other
    report = measure_seams(bright, write_raster(tmp_path / "spot.tif", array), tile_size=32, overlap=0, shifts=(0.5,))
    example = report.example
    assert example.shift_px == 16
    where = (slice(example.row, example.row + 40), slice(example.col, example.col + 40))
    assert np.array_equal(example.raw[0], array[0][where] > 100)
    assert not example.raw[1].any()
    assert example.raw[0].sum() >= 32 * 32 / 4
    assert example.scene.shape == (3, 40, 40)
    (rows, cols), (shifted_rows, shifted_cols) = example.cuts
    assert ((rows + example.row) % 32 == 0).all()
    assert ((cols + example.col) % 32 == 0).all()
    assert ((shifted_rows + example.row) % 32 == 16).all()
    assert ((shifted_cols + example.col) % 32 == 16).all()


def test_a_report_is_json(flat: Path, rim: Callable[[int], Any]) -> None:
    report = measure_seams(rim(8), flat, tile_size=TILE, shifts=SHIFTS, overlap=0)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["raw"]["mean_share"] == report.raw.mean_share
    assert told["raw"]["most_share"] == max(shift.share for shift in report.raw.shifts)
    assert told["raw"]["columns"]["seams"]["share"] == report.raw.columns.seams.share
    nearest = report.curve[0]
    assert told["curve"][0] == {
        "of": nearest.of, "changed": nearest.changed, "low": 0, "high": 8, "share": nearest.share,
    }  # fmt: skip
    assert (told["curve"][-1]["high"], told["curve"][-1]["share"]) == (None, None)
    assert told["options"]["tile_size"] == TILE
    assert told["options"]["overlap"] == 0
    assert (told["model"], told["source"], told["shifts_px"]) == ("Rim", str(flat), [16, 32])


def test_progress_counts_the_tiles_of_all_maps(flat: Path, fakes: SimpleNamespace) -> None:
    told: list[tuple[int, int]] = []
    segmenter = fakes.Constant()
    measure_seams(segmenter, flat, tile_size=TILE, shifts=SHIFTS, progress=lambda *count: told.append(count))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {total for _, total in told} == {len(told)} == {segmenter.scored}


@pytest.mark.parametrize("shifts", [(), (0,), (1,), (0.5, 0.5), (-0.25,), (float("nan"),)])
def test_shifts_that_are_none_are_refused(flat: Path, fakes: SimpleNamespace, shifts: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"shifts are different shares, between 0 and 1, of the 48 pixels"):
        measure_seams(fakes.Constant(), flat, tile_size=TILE, shifts=shifts)


def test_outputs_of_a_map_are_refused(flat: Path, fakes: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match="confidence, report: no map is written"):
        measure_seams(fakes.Constant(), flat, tile_size=TILE, confidence=True, report=".html")
    with pytest.raises(UsageError, match=r"max_memory: .* memory is not limited"):
        measure_seams(fakes.Constant(), flat, tile_size=TILE, max_memory="4G")
    with pytest.raises(UsageError, match="batch_size is a number"):
        measure_seams(fakes.Constant(), flat, tile_size=TILE, batch_size="auto")


# What is counted


def test_distances_along_an_axis() -> None:
    up = [0, 1, 2, 3]
    down = up[::-1]
    assert edge_distances((0, 8), 8).tolist() == (up + down) * 2
    assert edge_distances((0, 5), 8).tolist() == [0, 1, 2, 3, 3, 2, 1, 2, 3, 3, 2, 1, 0]
    assert edge_distances((0, 8), 8, at_border=(True, False)).tolist() == [7, 6, 5, 4, *down, *up, *down]
    assert edge_distances((0, 8), 8, at_border=(False, True)).tolist() == [*up, *down, *up, 4, 5, 6, 7]


def test_seams_along_an_axis() -> None:
    assert seam_lines((0, 24, 40), 32, "hann").tolist() == [24, 32, 40, 56]
    assert seam_lines((0, 24, 40), 32, "none").tolist() == [28, 48]
    assert seam_lines((0, 32), 32, "hann").tolist() == seam_lines((0, 32), 32, "none").tolist() == [32]


def test_pairs_across_lines() -> None:
    labels = np.zeros((80, 6), np.uint8)
    labels[40:] = 1
    labels[:, 0] = 255
    labels[72:, 1] = 2
    assert count_lines(labels, np.array([40])) == Lines(Changes(5, 5), Changes(10, 1))  # at 8 and 72
    # Not those at 38 and 72, which are too near to the other seam.
    assert count_lines(labels, np.array([40, 70])) == Lines(Changes(10, 5), Changes(5, 0))
    assert count_lines(labels, np.array([-5, 90])) == Lines(Changes(0, 0), Changes(10, 0))
    nothing = count_lines(labels, np.array([-90]))
    assert nothing == Lines(Changes(0, 0), Changes(0, 0))
    assert math.isnan(nothing.ratio)
    assert math.isnan(nothing.difference)
    lines = Lines(Changes(10, 6), Changes(20, 4))
    assert (lines.ratio, lines.difference) == (pytest.approx(3), pytest.approx(0.4))
    assert count_changes(labels, labels[::-1]) == Changes(5 * 80, 5 * 80)


def test_the_worst_square() -> None:
    one, other = np.zeros((25, 30), np.uint8), np.zeros((25, 30), np.uint8)
    other[14:18, 17:21] = 1
    other[0, 0] = 1
    other[13, 20:25] = 255
    changed, row, col = worst(one, other, 8)
    assert changed == 16
    assert 10 <= row <= 14
    assert 13 <= col <= 17
    assert worst(one, other, 100) == (17, 0, 0)
    assert worst(one, one, 8) == (0, 0, 0)


def test_a_report_is_frozen(flat: Path, fakes: SimpleNamespace) -> None:
    report = measure_seams(fakes.Constant(), flat, tile_size=TILE)
    assert isinstance(report, SeamReport)
    with pytest.raises(AttributeError):
        report.model = "another"  # type: ignore[misc]
