"""Random crops: image and mask stay together, whatever is drawn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from d2ls_infer.train.augment import AugmentConfig, jitter, mirrored, random_crop, start_of
from d2ls_infer.train.pool import ImagePool

Pair = tuple[np.ndarray, np.ndarray]


def pool_of(pairs: list[Pair]) -> ImagePool:
    return ImagePool(pairs.__getitem__, len(pairs))


def crop_of(pairs: list[Pair], seed: int, **settings: Any) -> tuple[Tensor, Tensor]:
    config = AugmentConfig(**{"crop": 48, **settings})
    return random_crop(pool_of(pairs), config, np.random.default_rng(seed), value_range=(0.0, 255.0))


def expected_image(mask: Tensor) -> Tensor:
    """What the toy images hold where their mask is this, on 0..1."""
    return (20 + 110 * mask) / 255


@pytest.mark.parametrize("seed", range(6))
def test_crop_has_its_size_range_and_types(toy_pairs: list[Pair], seed: int) -> None:
    image, mask = crop_of(toy_pairs, seed, mosaic=0.5, balance=0.5, jitter=0.0)
    assert image.shape == (3, 48, 48)
    assert mask.shape == (48, 48)
    assert image.dtype == torch.float32
    assert mask.dtype == torch.int64
    assert image.min() >= 0
    assert image.max() <= 1
    assert set(mask.unique().tolist()) <= {0, 1, 2}


def test_crop_depends_on_the_generator_alone(toy_pairs: list[Pair]) -> None:
    torch.manual_seed(0)
    first = crop_of(toy_pairs, 7, mosaic=1.0)
    torch.manual_seed(1)
    again, other = crop_of(toy_pairs, 7, mosaic=1.0), crop_of(toy_pairs, 8, mosaic=1.0)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_of_an_unscaled_crop_agree_in_every_pixel(
    toy_pairs: list[Pair], seed: int, mosaic: float
) -> None:
    # A crop of 90 reaches past the smaller image, and the larger one in no direction.
    image, mask = crop_of(toy_pairs, seed, crop=90, scales=(1.0, 1.0), mosaic=mosaic, jitter=0.0)
    for band in image:
        torch.testing.assert_close(band, expected_image(mask), atol=1e-5, rtol=0)


@pytest.mark.parametrize("turn", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_of_a_scaled_crop_agree_away_from_borders(toy_pairs: list[Pair], seed: int, turn: float) -> None:
    image, mask = crop_of(toy_pairs, seed, scales=(0.5, 2.0), mosaic=0.0, jitter=0.0, turn=turn)
    near = mask.float()[None, None]
    reach = 3 if turn else 2  # pixels are resampled twice where crops are turned
    window = 2 * reach + 1
    inside = (F.max_pool2d(near, window, 1) == -F.max_pool2d(-near, window, 1))[0, 0]  # one class in the window
    assert inside.float().mean() > 0.01
    middle = (slice(reach, -reach), slice(reach, -reach))
    torch.testing.assert_close(image[0][middle][inside], expected_image(mask)[middle][inside], atol=1e-4, rtol=0)


def test_magnification_is_the_size_of_objects_in_the_crop() -> None:
    mask = np.zeros((400, 400), np.uint8)
    mask[:, ::2] = 1  # stripes of one pixel
    image = np.zeros((1, 400, 400), np.uint8)
    for seed in range(4):
        _, crop = crop_of([(image, mask)], seed, crop=40, scales=(2.0, 2.0), mosaic=0.0)
        across = crop[0] if (crop == crop[0]).all() else crop[:, 0]
        assert across.diff().abs().tolist() in ([1, 0] * 19 + [1], [0, 1] * 19 + [0])  # stripes of two pixels


@given(st.integers(-200, 100), st.integers(1, 300), st.integers(1, 100))
def test_places_outside_of_an_image_are_those_of_its_mirror_images(start: int, side: int, extent: int) -> None:
    places = np.arange(extent)[mirrored(start, side, extent)]
    assert places.shape == (max(0, side),)
    endless = np.tile(np.r_[np.arange(extent), np.arange(extent)[::-1]], 2 + (side + abs(start)) // extent)
    at = start % (2 * extent)
    np.testing.assert_array_equal(places, endless[at : at + side])


@pytest.mark.parametrize("shape", [(10, 10), (5, 100), (1, 1), (30, 40)])
def test_crop_of_a_small_image_shows_it_whole_and_mirrored_around(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, shape).astype(np.uint8)
    around = np.pad(mask, 48, mode="symmetric")
    windows = {np.lib.stride_tricks.sliding_window_view(around, (48, 48))[at].tobytes() for at in np.ndindex(49, 49)}
    for seed in range(5):
        image, labels = crop_of(
            [(np.repeat(80 * mask[None], 3, 0), mask)], seed, scales=(1.0, 1.0), mosaic=0.0, jitter=0.0
        )
        torch.testing.assert_close(image[0], 80 * labels / 255, atol=1e-5, rtol=0)
        upright = [np.rot90(turned, turns) for turned in (labels.numpy(), labels.flip(1).numpy()) for turns in range(4)]
        if max(shape) <= 48:
            assert any(candidate.astype(np.uint8).tobytes() in windows for candidate in upright)


def test_mirrored_images_give_mirrored_crops(toy_pairs: list[Pair]) -> None:
    # A magnification of 4/3 puts no pixel of the mask on a tie, and the whole image into the crop.
    (image, mask), *_ = toy_pairs
    image, mask = image[:, 3:51, 3:51], mask[3:51, 3:51]
    settings = {"crop": 64, "scales": (4 / 3, 4 / 3), "mosaic": 0.0, "jitter": 0.0}
    crop, labels = crop_of([(image, mask)], 0, **settings)
    turned = (image[:, ::-1, ::-1].copy(), mask[::-1, ::-1].copy())
    crop_turned, labels_turned = crop_of([turned], 0, **settings)
    assert torch.equal(labels_turned, labels.flip(0, 1))
    torch.testing.assert_close(crop_turned, crop.flip(1, 2))


def test_every_place_of_an_image_can_be_drawn() -> None:
    index = np.arange(60 * 60).reshape(60, 60)
    seen = set()
    for seed in range(120):
        image, _ = random_crop(
            pool_of([(index[None].astype(np.float32), np.zeros((60, 60), np.uint8))]),
            AugmentConfig(crop=40, scales=(1.0, 1.0), mosaic=0.0, jitter=0.0),
            np.random.default_rng(seed),
            value_range=(0.0, 3599.0),
        )
        seen.add(round(float(image.amin()) * 3599))  # the upper left pixel, however the crop is turned
    rows, cols = {place // 60 for place in seen}, {place % 60 for place in seen}
    assert min(rows) == min(cols) == 0
    assert max(rows) == max(cols) == 20


def test_crops_come_in_all_eight_orientations() -> None:
    ramp = np.add.outer(100.0 * np.arange(48), np.arange(48)).astype(np.float32)
    pair = (ramp[None], np.zeros((48, 48), np.uint8))
    orientations = set()
    for seed in range(80):
        image, _ = random_crop(
            pool_of([pair]),
            AugmentConfig(crop=48, scales=(1.0, 1.0), mosaic=0.0, jitter=0.0),
            np.random.default_rng(seed),
            value_range=(0.0, 5000.0),
        )
        corners = image[0][[0, 0, -1, -1], [0, -1, 0, -1]]
        orientations.add(tuple(corners.argsort().tolist()))
    assert len(orientations) == 8


def test_images_are_drawn_by_their_area() -> None:
    pairs = [(np.zeros((1, n, n), np.uint8), np.full((n, n), c, np.uint8)) for c, n in enumerate((100, 200))]
    drawn = Counter(int(crop_of(pairs, seed, crop=16, mosaic=0.0)[1][8, 8]) for seed in range(300))
    assert 0.7 < drawn[1] / 300 < 0.9  # four fifths


def test_balanced_crops_show_a_rare_class_as_often_as_the_others() -> None:
    mask = np.zeros((300, 300), np.uint8)
    mask[250, 40] = 1
    pair = (np.zeros((1, 300, 300), np.uint8), mask)
    settings: dict[str, Any] = {"crop": 32, "scales": (1.0, 1.0), "mosaic": 0.0}
    shown = {
        balance: sum(bool((crop_of([pair], seed, balance=balance, **settings)[1] == 1).any()) for seed in range(200))
        for balance in (0.0, 0.5, 1.0)
    }
    assert shown[0.0] < 10
    assert 30 < shown[0.5] < 75
    assert 80 < shown[1.0] < 130


@given(extent=st.integers(1, 60), side=st.integers(8, 80), on=st.none() | st.integers(0, 59), seed=st.integers(0, 1000))
def test_window_lies_in_the_image_or_around_it_and_over_its_pixel(
    extent: int, side: int, on: int | None, seed: int
) -> None:
    on = None if on is None else on % extent
    start = start_of(extent, side, np.random.default_rng(seed), on)
    if side <= extent:
        assert 0 <= start <= extent - side
    else:
        assert extent - side <= start <= 0
    assert on is None or start <= on < start + side


def test_mosaic_joins_four_crops_in_one_point() -> None:
    pairs = [(np.zeros((1, 80, 80), np.uint8), np.full((80, 80), c, np.uint8)) for c in range(250)]
    _, mask = crop_of(pairs, 3, mosaic=1.0, scales=(1.0, 1.0))
    corners = {int(mask[row, col]) for row in (0, -1) for col in (0, -1)}
    assert set(mask.unique().tolist()) == corners
    assert len(corners) == 4
    rows = [row for row in range(1, 48) if not torch.equal(mask[row], mask[row - 1])]
    cols = [col for col in range(1, 48) if not torch.equal(mask[:, col], mask[:, col - 1])]
    assert len(rows) == len(cols) == 1
    assert 12 <= rows[0] <= 36
    assert 12 <= cols[0] <= 36


def test_value_range_becomes_0_to_1_and_what_is_outside_is_clipped() -> None:
    image = np.full((2, 60, 60), 3000, np.uint16)
    image[1] = 20000
    config = AugmentConfig(crop=32, mosaic=0.0, jitter=0.0)
    crop, _ = random_crop(
        pool_of([(image, np.zeros((60, 60), np.uint8))]),
        config,
        np.random.default_rng(0),
        value_range=(1000.0, 11000.0),
    )
    torch.testing.assert_close(crop[0], torch.full((32, 32), 0.2))
    torch.testing.assert_close(crop[1], torch.ones(32, 32))


@pytest.mark.parametrize("amount", [0.1, 0.5, 2.0])
def test_jitter_is_a_gain_and_an_offset_of_each_band_within_its_limits(amount: float) -> None:
    image = torch.rand((4, 8, 8), generator=torch.Generator().manual_seed(0))
    mean, std = image.mean((1, 2)), image.std((1, 2), correction=0)
    for seed in range(10):
        changed = jitter(image, amount, np.random.default_rng(seed))
        gain = (changed[:, 0, 0] - changed[:, 5, 6]) / (image[:, 0, 0] - image[:, 5, 6])
        offset = (changed.mean((1, 2)) - mean) / std
        line = (image - mean.view(-1, 1, 1)) * gain.view(-1, 1, 1) + (mean + offset * std).view(-1, 1, 1)
        torch.testing.assert_close(changed, line, atol=1e-4, rtol=1e-4)
        for change in (gain - 1, offset):
            assert (change.abs() <= 1.5 * amount + 1e-4).all()
            assert change.unique().numel() == 4


def test_no_jitter_changes_nothing() -> None:
    image = torch.rand((4, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(jitter(image, 0.0, np.random.default_rng(0)), image, atol=1e-6, rtol=0)


def test_images_are_left_as_they_were(toy_pairs: list[Pair]) -> None:
    before = [(image.copy(), mask.copy()) for image, mask in toy_pairs]
    for seed in range(4):
        crop_of(toy_pairs, seed, mosaic=0.5)
    for (image, mask), (old_image, old_mask) in zip(toy_pairs, before, strict=True):
        np.testing.assert_array_equal(image, old_image)
        np.testing.assert_array_equal(mask, old_mask)


def test_turned_crop_shows_lines_at_any_angle() -> None:
    side = 200
    mask = np.zeros((side, side), np.uint8)
    mask[:, side // 2 :] = 1
    image = np.repeat((100 * mask)[None], 3, 0)
    angles = []
    for seed in range(40):
        found = crop_of([(image, mask)], seed, scales=(1.0, 1.0), mosaic=0.0, jitter=0.0, turn=1.0)[1].float()
        if not 0.2 < found.mean() < 0.8:
            continue
        down, right = found.diff(dim=0).sum(), found.diff(dim=1).sum()  # the line's extent along each axis
        angles.append(float(torch.atan2(down, right)) % (torch.pi / 2))
    assert len(angles) >= 8
    assert len([angle for angle in angles if 0.15 < angle < torch.pi / 2 - 0.15]) >= len(angles) / 2, angles
    assert max(angles) - min(angles) > 0.5, angles
