"""What a segmenter knows of a whole scene before its tiles are scored: seen in a few crops, the same for all tiles.

With it, a tile's scores do not depend on what else happens to lie in the tile, and neighbouring tiles agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from d2ls_infer.errors import UsageError

CROP_PX = 256
"""Side of a crop that is looked at: as large as those that the bundled models learned from."""

MOST = 36
"""Crops that are looked at; fewer where no more lie side by side. With 9 of Vaihingen's tile D, its map differed from
the one by other 9 crops as much as by a shifted tile grid; with 64 nothing was gained over 36."""

LEAST_VALID = 0.5
"""A crop with a smaller share of valid pixels is left out, where there are others."""

DICTIONARIES = ("auto", "scene", "tile")
"""Whose class embeddings tiles are scored by; auto: the scene's, if the segmenter is made for that."""

ReadRows = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""(start, stop) -> values (bands, stop - start, width) and valid (stop - start, width) bool of rows of a scene."""

Seen = list[tuple[bool, Any]]
"""Of each crop in a row of crops with a valid pixel: whether most of it is valid, and the context that it gives."""

Looks = Callable[[Callable[[tuple[int, int]], Seen], Iterable[tuple[int, int]]], Iterable[Seen]]
"""Called with what looks at a row of crops, and all of their `row_spans`: gives what is seen in each; such as `map`."""


class Observer(Protocol):
    """A segmenter that scores tiles in the light of what it has seen elsewhere; see `Segmenter`.

    observes: whether it is made for that. What a context is, only it knows.
    """

    observes: bool

    def observe(self, batch: Tensor) -> Any:
        """(B, bands, H, W) raw pixel values -> what they tell."""

    def merge(self, contexts: Sequence[Any]) -> Any:
        """What several batches of one size tell together."""

    def score(self, batch: Tensor, context: Any = None) -> Tensor:
        """(B, bands, H, W) raw pixel values -> (B, K, H, W) scores, by a context where one is given."""


def observed(segmenter: Observer, rows: ReadRows, height: int, width: int, looks: Looks = map) -> Any:
    """What a segmenter sees in a scene of `height` x `width` pixels; None where there is no valid pixel.

    rows: asked for as `looks` asks for them, by itself from top to bottom. looks: gives what is seen in each of the
    rows of crops, in their order; others may have had a look at some of them.
    """

    def look(span: tuple[int, int]) -> Seen:
        seen = []
        for values, valid in crops(rows, height, width, [span]):
            if (share := valid.mean()) > 0:
                pixels = torch.from_numpy(np.ascontiguousarray(values))
                seen.append((bool(share >= LEAST_VALID), segmenter.observe(pixels[None])))
        return seen

    contexts = [found for seen in looks(look, row_spans(height, width)) for found in seen]
    whole = [context for mostly_valid, context in contexts if mostly_valid]
    found = whole or [context for _, context in contexts]
    return segmenter.merge(found) if found else None


def crops(
    rows: ReadRows, height: int, width: int, spans: Iterable[tuple[int, int]] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Values and valid pixels of crops that are spread evenly over a scene; of some of its `row_spans`, or all."""
    wide = min(CROP_PX, width)
    cols = starts(width, wide, places(height, width)[1])
    for start, stop in row_spans(height, width) if spans is None else spans:
        values, valid = rows(start, stop)
        for col in cols:
            yield values[:, :, col : col + wide], valid[:, col : col + wide]


def row_spans(height: int, width: int) -> list[tuple[int, int]]:
    """The rows, start and stop, that `crops` reads of a scene."""
    tall = min(CROP_PX, height)
    return [(start, start + tall) for start in starts(height, tall, places(height, width)[0])]


def places(height: int, width: int) -> tuple[int, int]:
    """How many crops a scene has from top to bottom, and from left to right."""
    down, across = max(1, height // CROP_PX), max(1, width // CROP_PX)  # side by side
    wanted = min(MOST, down * across)
    rows = min(down, max(1, round(math.sqrt(wanted * down / across))), wanted)
    return rows, min(across, max(1, wanted // rows))


def starts(length: int, size: int, count: int) -> list[int]:
    """Where `count` crops of `size` begin that are spread evenly over an axis: in the middles of as many parts."""
    return [min(max(round((index + 0.5) * length / count - size / 2), 0), length - size) for index in range(count)]


def parse_dictionary(name: str) -> str:
    """One of `DICTIONARIES`. Raises UsageError for anything else."""
    if name not in DICTIONARIES:
        raise UsageError(f"unknown dictionary {name!r}; known are {', '.join(DICTIONARIES)}")
    return name
