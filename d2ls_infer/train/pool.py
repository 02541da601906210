"""The training images, decoded once as far as memory allows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import NODATA

Pair = tuple[np.ndarray, np.ndarray]
"""An image (bands, H, W) of raw pixel values and its mask (H, W) uint8."""

CACHE_BYTES = 4 << 30
"""Decoded images are kept in memory up to this size; those beyond it are read again for each crop."""


def without_gaps(image: np.ndarray, mask: np.ndarray) -> Pair:
    """A pair whose pixels are all numbers: those that were none in some band are 0 and not labelled."""
    gaps = ~np.isfinite(image).all(0)
    return (np.where(gaps, 0, image), np.where(gaps, np.uint8(NODATA), mask)) if gaps.any() else (image, mask)


PLACES = 500
"""How many pixels of each class are remembered per image, to place crops on."""


class ImagePool:
    """`count` pairs by index, from `read`. `areas` (count,): the pixels of each, by which crops are drawn.

    classes: for each class that occurs, how many of its pixels each image has (count,), and by image some of their
    places (n, 2), as row and column. Each image is read once at the start, so that one that cannot be read fails before
    training does. Raises UsageError where nothing is labelled in any of them.
    """

    def __init__(self, read: Callable[[int], Pair], count: int, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.read = read
        self.kept: dict[int, Pair] = {}
        self.areas = np.zeros(count)
        self.classes: dict[int, tuple[np.ndarray, dict[int, np.ndarray]]] = {}
        size = 0
        for index in range(count):
            pair = read(index)
            self.areas[index] = pair[1].size
            self.remember(index, pair[1])
            size += pair[0].nbytes + pair[1].nbytes
            if size <= cache_bytes:
                self.kept[index] = pair
        if not self.classes:
            raise UsageError(f"no pixel of the {count} images is labelled")

    def __len__(self) -> int:
        return len(self.areas)

    def __getitem__(self, index: int) -> Pair:
        return self.kept[index] if index in self.kept else self.read(index)

    def remember(self, index: int, mask: np.ndarray) -> None:
        """Where the classes of an image are, as far as crops need it."""
        counts = np.bincount(mask.ravel(), minlength=NODATA + 1)[:NODATA]
        for value in np.flatnonzero(counts).tolist():
            shares, places = self.classes.setdefault(value, (np.zeros(len(self)), {}))
            shares[index] = counts[value]
            every = np.flatnonzero(mask == value)
            chosen = every[:: max(1, len(every) // PLACES)]
            places[index] = np.stack(np.unravel_index(chosen, mask.shape), axis=1)

    def draw(self, rng: np.random.Generator) -> Pair:
        """One of the pairs, by its area."""
        return self[int(rng.choice(len(self), p=self.areas / self.areas.sum()))]

    def draw_class(self, rng: np.random.Generator, among: tuple[int, ...] = ()) -> tuple[Pair, tuple[int, int]]:
        """One of the pairs, and the row and column of a pixel in it, so that every class is as likely as the others.

        among: the classes; all where none is named. One at least of them occurs.
        """
        known = sorted(self.classes.keys() & among if among else self.classes)
        shares, places = self.classes[int(rng.choice(known))]
        index = int(rng.choice(len(self), p=shares / shares.sum()))
        row, col = places[index][int(rng.integers(len(places[index])))].tolist()
        return self[index], (row, col)
