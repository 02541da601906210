"""Scores without the pattern that the network's pixel shuffles leave in them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CELL_PX = 4
"""Pixels, each way, that the upsampler makes of one image token, each by channels of its own (Eq. 16): nothing ties
neighbouring ones together, and what tells them apart is the same in every cell.
"""


def smoothed(scores: Tensor) -> Tensor:
    """(B, K, H, W) -> the same shape: the mean of each pixel's sixteen cells of four by four pixels.

    That is weights of 1, 2, 3, 4, 3, 2, 1 (of 16) along either axis, which take out whatever repeats every four pixels,
    and hardly anything else; beyond the border the last pixel goes on. What sums up to 1 still does.
    """
    if scores.device.type != "cpu":
        return mean_of_cells(scores)
    # Plane by plane the sums in passing stay in the caches: of large tiles a third of the time, and the same bits.
    result = torch.empty(scores.shape, dtype=scores.dtype)
    for into, plane in zip(result.flatten(0, 1), scores.flatten(0, 1), strict=True):
        into.copy_(mean_of_cells(plane[None, None])[0, 0])
    return result


def mean_of_cells(scores: Tensor) -> Tensor:
    """`smoothed` as a graph takes it, of all planes at once."""
    margin = CELL_PX - 1
    # Sums of shifted views: on a CPU some times as fast as pooling or a convolution over so few channels.
    total = F.pad(scores, (margin,) * 4, mode="replicate")
    for axis in (-1, -2):
        for _ in range(2):
            for step in (1, 2):
                length = total.shape[axis] - step
                total = total.narrow(axis, 0, length) + total.narrow(axis, step, length)
    return total / CELL_PX**4
