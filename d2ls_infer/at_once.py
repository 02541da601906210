"""How many tiles to score at once: as many as fit into memory, as many as are fast."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from d2ls_infer.errors import D2LSError, UsageError
from d2ls_infer.memory import forget_peak, peak_bytes
from d2ls_infer.tiling import TileGrid

log = logging.getLogger(__name__)

Score = Callable[[Tensor], Tensor]

MOST_TILES = 64
"""More than that at once was not seen to be faster anywhere, and only takes memory."""

USUAL_PX = 8 * 512 * 512

WORTH_IT = 0.97
"""Twice as many tiles are worth their memory where each takes at most so much of the time."""


class Halving:
    """A segmenter's `score` that goes on with half as many tiles at once where memory runs out.

    What was too many once is not tried again. Raises D2LSError where a single tile does not fit.
    """

    def __init__(self, score: Score) -> None:
        self.score, self.most = score, MOST_TILES

    def __call__(self, batch: Tensor) -> Tensor:
        """(B, bands, h, w) -> (B, K, h, w), in as many steps as it takes."""
        try:
            parts = [self.score(part) for part in torch.split(batch, self.most)]
        except torch.OutOfMemoryError as error:
            tried = min(self.most, len(batch))
            if tried == 1:
                raise D2LSError(
                    f"a tile of {batch.shape[-2]} x {batch.shape[-1]} pixels does not fit into the device's memory; "
                    "try a smaller --tile-size, or --precision bfloat16"
                ) from error
            self.most = tried // 2
            log.warning("%d tiles at once do not fit into the device's memory; going on with %d", tried, self.most)
        else:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        torch.cuda.empty_cache()  # outside of the handler, which holds on to what did not fit
        return self(batch)


def usual_batch(device: torch.device | str, grid: TileGrid) -> int:
    """How many tiles to score at once where nobody says: off the CPU as many pixels as eight tiles of 512 have."""
    if torch.device(device).type == "cpu":
        return 1
    return min(8, max(1, USUAL_PX // (grid.tile_height * grid.tile_width)))


def fastest_batch(score: Score, grid: TileGrid, bands: int) -> int:
    """How many tiles at once take the least time each: 1, 2, 4 and so on are tried while it pays."""
    fastest, best = 1, float("inf")
    tiles = 1
    while tiles <= min(MOST_TILES, len(grid)):
        batch = sample(grid, bands, tiles)
        try:
            if score(batch).is_cuda:  # makes ready
                score(batch)  # the second makes a graph
            started = time.perf_counter()
            score(batch).sum().item()  # waits for the device
        except torch.OutOfMemoryError:
            break
        seconds = (time.perf_counter() - started) / tiles
        if seconds > WORTH_IT * best:
            break
        fastest, best, tiles = tiles, seconds, 2 * tiles
    return fastest


def fitting_batch(score: Score, batch: Tensor, limit: int, others: int) -> int:
    """How many tiles fit at once, at most those of `batch` (B, bands, h, w): tried, starting with one.

    limit: bytes that the process may take. others: what is not the network's. Raises UsageError where one tile is too
    much already, D2LSError where it does not fit into the device's memory.
    """
    forget_peak()
    before = peak_bytes()
    fitting, wanted = 1, len(batch)
    Halving(score)(batch[:1])
    if (needed := peak_bytes() + others) > limit:
        raise UsageError(
            f"tiles of {batch.shape[-2]} x {batch.shape[-1]} pixels and a scene of this width need about "
            f"{needed / 1e9:.2f} GB, {before / 1e9:.2f} GB of them for the program and its model; --max-memory allows "
            f"{limit / 1e9:.3g} GB. A smaller --tile-size lowers the rest"
        )
    per_tile = max(1, peak_bytes() - before)
    while fitting < wanted:
        more = min(2 * fitting, wanted)
        if peak_bytes() + (more - fitting) * per_tile + others > limit:
            break
        try:
            score(batch[:more])
        except torch.OutOfMemoryError:
            break
        if peak_bytes() + others > limit:  # so many took more than their share
            break
        fitting = more
    return fitting


def sample(grid: TileGrid, bands: int, tiles: int) -> Tensor:
    """(tiles, bands, h, w) uint8: a batch to try the network on."""
    return torch.zeros((tiles, bands, grid.tile_height, grid.tile_width), dtype=torch.uint8)
