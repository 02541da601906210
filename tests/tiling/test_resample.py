"""Fields on finer and coarser grids: means, lines between centres, holes, and that parts make the whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ls_infer.tiling import Resampler, Rows, resample_rows
from d2ls_infer.tiling import resample as module
from d2ls_infer.tiling.resample import Taps

sides = st.integers(1, 40)


def field(channels: int, height: int, width: int, share_valid: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(channels * 10_000 + height * 100 + width)
    values = torch.rand((channels, height, width), generator=random) * 200
    return values, torch.rand((height, width), generator=random) < share_valid


def whole(values: torch.Tensor, valid: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return Resampler((valid.shape[0], valid.shape[1]), shape)(values, valid, 0, shape[0], 0)


@given(sides, sides)
def test_weights_are_shares_of_places_that_exist(n_in: int, n_out: int) -> None:
    taps = Taps.of(n_in, n_out)
    assert (taps.weight >= 0).all()
    torch.testing.assert_close(taps.weight.sum(1), torch.ones(n_out))
    assert taps.index.min() >= 0
    assert taps.index.max() < n_in
    assert (np.diff(taps.first) >= 0).all()
    assert (np.diff(taps.last) >= 0).all()
    assert taps.first[0] == 0
    assert taps.last[-1] == n_in - 1 or n_out > n_in


@given(sides, sides)
def test_onto_as_many_pixels_nothing_changes(height: int, width: int) -> None:
    values, valid = field(2, height, width, 0.7)
    made, known = whole(values, valid, (height, width))
    assert torch.equal(known, valid)
    assert torch.equal(made, torch.where(valid, values, 0))


@given(sides, sides, sides, sides, st.sampled_from([1.0, 0.8, 0.2]))
def test_a_constant_stays_and_each_valid_pixel_lies_in_a_valid_one(
    height: int, width: int, out_height: int, out_width: int, share: float
) -> None:
    """There and back: what was valid is covered, by the same constant."""
    _, valid = field(1, height, width, share)
    values = torch.where(valid, 7.25, torch.nan)[None]
    made, known = whole(values, valid, (out_height, out_width))
    torch.testing.assert_close(made[0], torch.where(known, 7.25, 0.0))
    back, covered = whole(made, known, (height, width))
    assert (covered | ~valid).all()
    torch.testing.assert_close(back[0][valid], torch.full((int(valid.sum()),), 7.25))
    if not valid.any():
        assert not known.any()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8))
def test_coarser_pixels_are_the_means_of_those_they_are_made_of(rows: int, cols: int, height: int, width: int) -> None:
    values, valid = field(2, rows * height, cols * width)
    made, _ = whole(values, valid, (height, width))
    torch.testing.assert_close(made, values.unflatten(1, (height, rows)).unflatten(3, (width, cols)).mean((2, 4)))


@given(sides, sides, st.data())
def test_the_mean_of_the_whole_stays_on_a_coarser_grid(height: int, width: int, data: st.DataObject) -> None:
    values, valid = field(1, height, width)
    shape = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    made, _ = whole(values, valid, shape)
    torch.testing.assert_close(made.mean(), values.mean())


def test_a_mean_is_taken_of_what_is_valid() -> None:
    values = torch.tensor([[[1.0, 1e30], [torch.nan, 4.0]]])
    made, known = whole(values, torch.tensor([[True, False], [False, True]]), (1, 1))
    assert made.tolist() == [[[2.5]]]
    assert known.tolist() == [[True]]


@given(st.integers(2, 30), st.integers(1, 30))
def test_finer_pixels_lie_on_the_line_between_centres(n_in: int, factor: int) -> None:
    centres = torch.arange(n_in) + 0.5
    made, _ = whole(centres.view(1, 1, -1), torch.ones(1, n_in, dtype=torch.bool), (1, n_in * factor))
    places = (torch.arange(n_in * factor) + 0.5) / factor
    torch.testing.assert_close(made[0, 0], places.clamp(0.5, n_in - 0.5))


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 1 << 20])
@settings(max_examples=40)
@given(sides, sides, sides, sides, st.lists(st.integers(1, 9), min_size=40, max_size=40), st.booleans())
def test_rows_in_parts_make_the_whole_to_the_last_bit(
    chunk_bytes: int, height: int, width: int, out_height: int, out_width: int, parts: list[int], disagreement: bool
) -> None:
    values, valid = field(3, height, width, 0.7)

    def rows() -> Iterator[Rows]:
        first = 0
        for count in parts:
            if first < height:
                part = slice(first, min(first + count, height))
                yield Rows(first, values[:2, part], valid[part], values[2, part] if disagreement else None)
                first += count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        found = list(resample_rows(rows(), (height, width), (out_height, out_width)))
    assert [row for part in found for row in range(part.first, part.first + len(part.covered))] == [*range(out_height)]
    made, known = whole(values, valid, (out_height, out_width))
    assert torch.equal(torch.cat([part.scores for part in found], 1), made[:2])
    assert torch.equal(torch.cat([part.covered for part in found]), known)
    for part in found:
        assert (part.disagreement is not None) == disagreement
        if part.disagreement is not None:
            assert torch.equal(part.disagreement, made[2, part.first : part.first + len(part.covered)])


@pytest.mark.parametrize(
    ("shape", "out_shape"), [((5000, 300), (400, 24)), ((400, 24), (5000, 300)), ((60, 9), (9, 60))]
)
def test_no_more_rows_are_taken_at_once_than_fit_in_the_memory_they_may_have(
    shape: tuple[int, int], out_shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    sampler = Resampler(shape, out_shape)
    step = min(sampler.rows_at_once(3), out_shape[0])
    first, last = sampler.needs(0, step)
    assert 4 * 4 * (last - first - 2) * shape[1] <= 1 << 20
    assert 4 * 4 * step * out_shape[1] <= 1 << 20
    assert step == out_shape[0] or 4 * 4 * (step + 1) * max(out_shape[1], shape[1] * shape[0] / out_shape[0]) > 1 << 20
