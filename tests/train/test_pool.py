"""The images that crops are drawn from: each read once, kept while they fit, drawn by area."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from d2ls_infer.errors import UsageError
from d2ls_infer.train.pool import CACHE_BYTES, PLACES, ImagePool, Pair, without_gaps

SIDES = (2, 4, 6)


class Reader:
    """Makes the pair of an index anew each time, and counts how often."""

    def __init__(self) -> None:
        self.reads: Counter[int] = Counter()

    def __call__(self, index: int) -> Pair:
        self.reads[index] += 1
        side = SIDES[index]
        return np.full((3, side, side), index, np.uint8), np.full((side, side), index, np.uint8)


def test_images_are_read_once_and_kept() -> None:
    read = Reader()
    pool = ImagePool(read, 3)
    assert len(pool) == 3
    for _ in range(3):
        for index in range(3):
            image, mask = pool[index]
            assert image.shape == (3, SIDES[index], SIDES[index])
            assert (mask == index).all()
    assert read.reads == {0: 1, 1: 1, 2: 1}


def test_images_beyond_the_limit_are_read_again() -> None:
    read = Reader()
    pool = ImagePool(read, 3, cache_bytes=4 * (4 + 16))  # the first and the second, no byte more
    assert sorted(pool.kept) == [0, 1]
    for index in range(3):
        assert (pool[index][1] == index).all()
    assert read.reads == {0: 1, 1: 1, 2: 2}
    assert sorted(ImagePool(Reader(), 3, cache_bytes=0).kept) == []
    assert CACHE_BYTES == 4 * 1024**3


def test_images_are_drawn_by_their_area() -> None:
    pool = ImagePool(Reader(), 3)
    assert pool.areas.tolist() == [4, 16, 36]
    rng = np.random.default_rng(0)
    drawn = Counter(int(pool.draw(rng)[1][0, 0]) for _ in range(3000))
    for index, area in enumerate(pool.areas):
        assert drawn[index] / 3000 == pytest.approx(area / 56, abs=0.03)


def test_places_are_drawn_with_all_classes_alike() -> None:
    # Class 1 has 3 pixels in the first image and 9 in the second, class 7 one, class 0 all the rest.
    masks = [np.zeros((30, 40), np.uint8), np.zeros((20, 10), np.uint8), np.full((50, 50), 255, np.uint8)]
    masks[0][3, 4:7] = 1
    masks[1][10:13, 2:5] = 1
    masks[1][19, 9] = 7
    masks[0][:2] = 255
    pool = ImagePool(lambda index: (np.full((1, 2, 2), index, np.uint8), masks[index]), 3)
    assert {value: shares.tolist() for value, (shares, _) in pool.classes.items()} == {
        0: [40 * 28 - 3, 200 - 9 - 1, 0], 1: [3, 9, 0], 7: [0, 1, 0],
    }  # fmt: skip
    rng = np.random.default_rng(0)
    drawn: Counter[tuple[int, int]] = Counter()
    ones = set()
    for _ in range(3000):
        (image, mask), (row, col) = pool.draw_class(rng)
        index, value = int(image[0, 0, 0]), int(mask[row, col])
        assert mask is masks[index]
        drawn[index, value] += 1
        if value == 1:
            ones.add((index, row, col))
    assert 255 not in {value for _, value in drawn}
    for value in (0, 1, 7):
        assert (drawn[0, value] + drawn[1, value]) / 3000 == pytest.approx(1 / 3, abs=0.04)
    assert drawn[1, 1] / (drawn[0, 1] + drawn[1, 1]) == pytest.approx(9 / 12, abs=0.05)
    assert len(ones) == 12
    among = [pool.draw_class(rng, (1, 5, 7)) for _ in range(300)]
    assert {int(mask[place]) for (_, mask), place in among} == {1, 7}


def test_few_places_of_a_large_image_are_remembered_but_from_all_over_it() -> None:
    pool = ImagePool(lambda _: (np.zeros((1, 300, 400), np.uint8), np.zeros((300, 400), np.uint8)), 1)
    places = pool.classes[0][1][0]
    assert PLACES <= len(places) < 1.1 * PLACES
    assert places.min(0).tolist() == [0, 0]
    assert places[:, 0].max() > 295


def test_nothing_labelled_in_any_image_is_told() -> None:
    with pytest.raises(UsageError, match="no pixel of the 3 images is labelled"):
        ImagePool(lambda _: (np.zeros((1, 4, 4), np.uint8), np.full((4, 4), 255, np.uint8)), 3)


def test_an_image_that_cannot_be_read_fails_at_the_start() -> None:
    def read(index: int) -> Pair:
        if index == 2:
            raise UsageError("image c comes without labels")
        return Reader()(index)

    with pytest.raises(UsageError, match="image c comes without labels"):
        ImagePool(read, 3)


def test_pixels_that_are_no_numbers_are_not_labelled() -> None:
    image = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    mask = np.array([[0, 1, 2], [0, 1, 2]], np.uint8)
    image[0, 0, 0], image[1, 1, 2] = np.nan, np.inf
    filled, labels = without_gaps(image, mask)
    assert labels.tolist() == [[255, 1, 2], [0, 1, 255]]
    assert labels.dtype == np.uint8
    assert filled.tolist() == [[[0, 1, 2], [3, 4, 0]], [[0, 7, 8], [9, 10, 0]]]
    assert filled.dtype == np.float32
    assert np.isnan(image[0, 0, 0])
    assert mask[0, 0] == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_pair_without_gaps_stays_what_it_is(dtype: type) -> None:
    image, mask = np.ones((3, 2, 2), dtype), np.zeros((2, 2), np.uint8)
    same = without_gaps(image, mask)
    assert same[0] is image
    assert same[1] is mask
