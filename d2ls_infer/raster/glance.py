"""What a scene is like at first sight: very little of it is read."""

from __future__ import annotations

import numpy as np

from d2ls_infer.raster.scene import Scene

MIDDLE_SIDE = 512
CORNER_SIDE = 64
"""Rows and columns of the middle, and of a corner."""

POINTS = 6
"""So many rows and columns of pixels tell which share of a scene is valid."""


def middle_values(scene: Scene) -> tuple[float, float] | None:
    """The least and the largest valid raw value in a scene's middle; None where none is valid there."""
    height, width = (min(side, MIDDLE_SIDE) for side in (scene.height, scene.width))
    raw, valid = scene.piece((scene.height - height) // 2, (scene.width - width) // 2, height, width)
    found = raw[:, valid]
    return (float(found.min()), float(found.max())) if found.size else None


def unmarked_collar(scene: Scene) -> int | None:
    """The value of a collar that the file does not mark, as it seems; else None.

    One of the upper corners has it throughout and in all bands, it is 0 or the largest of a whole type, and valid. (The
    lower ones are left alone: their blocks would have to be read once more.) None also where the user has said what is
    nodata or which area is wanted.
    """
    if scene.nodata is not None or scene.part.polygons is not None or min(scene.height, scene.width) < 4 * CORNER_SIDE:
        return None
    extremes = {0, np.iinfo(scene.dtype).max} if scene.dtype.kind in "ui" else {0}
    for col in (0, scene.width - CORNER_SIDE):
        raw, valid = scene.piece(0, col, CORNER_SIDE, CORNER_SIDE)
        if valid.all() and raw.min() == raw.max() and raw.max() in extremes:
            return int(raw.max())
    return None


def valid_share(scene: Scene, tiles: tuple[int, int]) -> float:
    """About which share (0..1) of a scene's tiles, down and across, has a valid pixel.

    Those that polygons touch are counted; whether the pixels there are valid is told by some, spread evenly.
    """
    touched = scene.part.touched(scene.transform, tiles).mean()
    if scene.is_full():
        return float(touched)
    rows, cols = (
        ((np.arange(POINTS) + 0.5) * side / POINTS).astype(int).tolist() for side in (scene.height, scene.width)
    )
    valid = []
    for row in rows:
        inside = scene.part.inside(scene.transform, row, row + 1)[0]
        valid += [scene.piece(row, col, 1, 1).valid.all() for col in cols if inside[col]]
    return float(touched * np.mean(valid)) if valid else float(touched)
