"""Overlapping tiles -> one field, row by row, in memory that does not grow with the raster's height."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2ls_infer.errors import UsageError
from d2ls_infer.tiling.grid import Tile, TileGrid
from d2ls_infer.transfers import uploaded

# Weight by distance to the tile's centre: 0 at the centre, 1 at the edge. None of them reaches zero inside a tile.
TAPERS: dict[str, Callable[[Tensor], Tensor]] = {
    "hann": lambda distance: torch.cos(distance * (math.pi / 2)).square(),
    "gaussian": lambda distance: torch.exp(-0.5 * (distance / 0.25) ** 2),
    "linear": lambda distance: 1 - distance,
}
WINDOWS = (*TAPERS, "none")

PIECE_BYTES = 1 << 20
"""What finished rows may take at a time: whoever works on them needs a few times as much, and not of a whole band."""

DEVICE_PIECE_BYTES = 64 << 20
"""The same off the CPU, where each step takes some time to start, and memory is not the host's."""


Around = Callable[[Sequence[Tile], Callable[[], Tensor]], Tensor]
"""Called with the tiles of a batch and what scores them; gives their scores."""

Batch = list[tuple[Tile, np.ndarray, np.ndarray]]
"""Tiles that are scored at once, each with values (bands, h, w) and valid (h, w) bool."""


class Rows(NamedTuple):
    """Finished rows of a field: scores (K, rows, width) float32, and where a tile gave any (rows, width) bool.

    disagreement: (rows, width) float32 where it was asked for, else None; see `BandBlender`.
    """

    first: int
    scores: Tensor
    covered: Tensor
    disagreement: Tensor | None = None


class BandBlender:
    """Weighted mean of tiles over a rolling band of rows, as high as one tile.

    `add` takes the tiles of a grid in row-major order and gives the rows that no later tile touches, a few at a time;
    `finish` gives the rest. Together the rows are the whole raster, once, from top to bottom. A tile may be left out.

    The mean is kept as a running one, `mean += (score - mean) * weight / weights so far`. Where all tiles agree on a
    value, the difference is 0 and the value comes out unchanged to the last bit, at every border and corner.

    With `disagreement`, each pixel also tells how far the tiles over it differ before they are blended: the largest
    difference, over all classes and all pairs of tiles that cover the pixel, between the scores of one class. It is the
    same as the highest less the lowest score of a class, of the class where that is most; so two planes of the band per
    class hold all it needs. Of probabilities it lies in 0..1. It is 0 where one tile alone covers the pixel, and
    depends, to the last bit, neither on the order of the tiles nor on the window's weights.
    """

    def __init__(
        self,
        grid: TileGrid,
        channels: int,
        window: str = "hann",
        *,
        device: torch.device | str = "cpu",
        disagreement: bool = False,
    ) -> None:
        rows = axis_windows(grid.row_starts, grid.tile_height, window)
        cols = axis_windows(grid.col_starts, grid.tile_width, window)
        self.grid = grid
        self.row_windows = {start: w.to(device) for start, w in zip(grid.row_starts, rows, strict=True)}
        self.col_windows = {start: w.to(device) for start, w in zip(grid.col_starts, cols, strict=True)}
        self.first_row = 0
        self.mean = torch.zeros((channels, grid.tile_height, grid.width), device=device)
        self.weight = torch.zeros((grid.tile_height, grid.width), device=device)
        self.range = (
            torch.empty((2, channels, grid.tile_height, grid.width), device=device) if disagreement else None
        )  # of the scores: the lowest, and the highest
        if self.range is not None:
            self.range[0], self.range[1] = math.inf, -math.inf

    def add(self, tile: Tile, scores: Tensor, valid: Tensor | None = None) -> Iterator[Rows]:
        """Give the rows above the tile, then blend it in: scores (K, h, w), valid (h, w) bool or None for all."""
        yield from self.advance(tile.row)
        cols = slice(tile.col, tile.col + tile.width)
        weight = self.row_windows[tile.row][:, None] * self.col_windows[tile.col]
        if valid is not None:
            weight = weight * valid
        total = self.weight[:, cols]
        total += weight
        # Where nothing has weight yet this is 0 / tiny, and the mean keeps its 0.
        self.mean[:, :, cols].lerp_(scores.detach().float(), weight / total.clamp_min(torch.finfo(torch.float32).tiny))
        if self.range is not None:
            lowest, highest = self.range[:, :, :, cols]
            scores = scores.detach().float()
            known = torch.ones_like(weight, dtype=torch.bool) if valid is None else valid
            torch.minimum(lowest, scores.where(known, math.inf), out=lowest)
            torch.maximum(highest, scores.where(known, -math.inf), out=highest)

    def finish(self) -> Iterator[Rows]:
        """The rows that are left."""
        yield from self.advance(self.grid.height)

    def advance(self, row: int) -> Iterator[Rows]:
        """Give the rows above `row`, and move the band down to it."""
        assert row >= self.first_row, "tiles come in row-major order"
        height = self.grid.tile_height
        while self.first_row < row:
            # Where whole rows of tiles were left out, the way down is longer than the band is high.
            done = min(row - self.first_row, height)
            piece = PIECE_BYTES if self.mean.device.type == "cpu" else DEVICE_PIECE_BYTES
            step = max(1, piece // (self.mean.element_size() * len(self.mean) * self.grid.width))
            for start in range(0, done, step):
                rows = slice(start, min(start + step, done))
                scores, covered = self.mean[:, rows].clone(), self.weight[rows] > 0
                yield Rows(self.first_row + start, scores, covered, self.differences(rows))
            for band, empty in self.bands():
                for start in range(done, height, done):  # so far that no row lies where it comes from
                    moved = band[..., start : start + done, :]
                    band[..., start - done : start - done + moved.shape[-2], :] = moved
                band[..., height - done :, :] = empty
            self.first_row += done

    def bands(self) -> Iterator[tuple[Tensor, float]]:
        """Everything that moves down with the band, and what stands where no tile was yet."""
        yield self.mean, 0.0
        yield self.weight, 0.0
        if self.range is not None:
            yield self.range[0], math.inf
            yield self.range[1], -math.inf

    def differences(self, rows: slice) -> Tensor | None:
        """(rows, width) float32: the disagreement in rows of the band, 0 where no tile was."""
        if self.range is None:
            return None
        lowest, highest = self.range[:, :, rows]
        differences: Tensor = (highest - lowest).amax(0).clamp_min(0)
        return differences


def blend(
    score: Callable[[Tensor], Tensor],
    tiles: Iterable[tuple[Tile, tuple[np.ndarray, np.ndarray]]],
    grid: TileGrid,
    *,
    channels: int,
    window: str = "hann",
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    disagreement: bool = False,
    first_row: int = 0,
    around: Around | None = None,
) -> Iterator[Rows]:
    """Score the tiles of a grid in batches and give the blended rows, from top to bottom.

    tiles: in row-major order, each with values (bands, h, w) and valid (h, w) bool. A tile without a valid pixel is
    not scored. score: (B, bands, h, w) -> (B, channels, h, w) on `device`; its errors are passed on. disagreement:
    whether the rows also tell how far the tiles differ, see `BandBlender`. first_row: the rows above are known from an
    earlier run: they come too, but mean nothing, and what only they need is not scored. All others are the same to the
    last bit, since the batches are. around: stands between a batch and its scores, which may be known from elsewhere.

    The tiles may begin at any group of rows of tiles that share batches (see `rows_sharing_batches`), and end after
    one: the rows that no tile outside touches are the same as those of the whole, to the last bit. They begin with the
    first tile's.
    """
    blender = BandBlender(grid, channels, window, device=device, disagreement=disagreement)

    def from_the_first() -> Iterator[tuple[Tile, tuple[np.ndarray, np.ndarray]]]:
        for index, (tile, pixels) in enumerate(tiles):
            if index == 0:
                blender.first_row = tile.row
            yield tile, pixels

    def add(batch: Batch) -> Iterator[Rows]:
        if all(tile.row + tile.height <= first_row for tile, _, _ in batch):
            for tile, _, _ in batch:
                yield from blender.advance(tile.row)
            return

        def scored() -> Tensor:
            return score(stacked(batch))

        scores = scored() if around is None else around([tile for tile, _, _ in batch], scored)
        expected = (len(batch), channels, grid.tile_height, grid.tile_width)
        if scores.shape != expected:
            raise UsageError(f"the segmenter gave scores of shape {tuple(scores.shape)}, not {expected}")
        for (tile, _, valid), tile_scores in zip(batch, scores, strict=True):
            all_valid = bool(valid.all())
            yield from blender.add(tile, tile_scores, None if all_valid else uploaded(torch.from_numpy(valid), device))

    for batch in batches(from_the_first(), grid, batch_size):
        yield from add(batch)
        batch.clear()  # so that its pixels are not there while the next are read
    yield from blender.finish()


def batches(
    tiles: Iterable[tuple[Tile, tuple[np.ndarray, np.ndarray]]], grid: TileGrid, batch_size: int
) -> Iterator[Batch]:
    """The tiles in the batches in which they are scored, without those that have no valid pixel; see `blend`."""
    together = rows_sharing_batches(grid, batch_size)
    groups = {row: index // together for index, row in enumerate(grid.row_starts)}
    batch: Batch = []
    for tile, (values, valid) in tiles:
        if batch and groups[tile.row] != groups[batch[0][0].row]:
            yield batch
            batch = []
        if valid.any():
            batch.append((tile, values, valid))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def stacked(batch: Batch) -> Tensor:
    """(B, bands, h, w): the values of a batch."""
    return torch.from_numpy(np.stack([values for _, values, _ in batch]))


def rows_sharing_batches(grid: TileGrid, batch_size: int) -> int:
    """How many rows of tiles, counted from the top, are batched together; no batch goes beyond such a group.

    One, but where a batch takes several whole ones. So the batches of a part of the raster are those of the whole.
    """
    return max(1, batch_size // len(grid.col_starts))


def axis_windows(starts: tuple[int, ...], size: int, window: str) -> list[Tensor]:
    """The weights (size,) float32 of each tile along one axis, given where the tiles start.

    A taper falls from the tile's centre towards its neighbours; towards the raster's own border it stays 1, since no
    other tile knows more there. "none" is 1 in the part of the tile that is nearer to its centre than to a
    neighbour's, and 0 outside: the parts of all tiles cover the axis once. Raises UsageError for an unknown window.
    """
    if window not in WINDOWS:
        raise UsageError(f"unknown blending window {window!r}; known are {', '.join(WINDOWS)}")
    windows = []
    position = torch.arange(size, dtype=torch.float64)
    for index, start in enumerate(starts):
        has_previous, has_next = index > 0, index + 1 < len(starts)
        if window == "none":
            low = (starts[index - 1] + size + start) // 2 - start if has_previous else 0
            high = (start + size + starts[index + 1]) // 2 - start if has_next else size
            weights = ((position >= low) & (position < high)).double()
        else:
            distance = 2 * (position + 0.5) / size - 1  # -1 .. 1 from edge to edge, never quite there
            distance = distance.clamp(min=-1.0 if has_previous else 0.0, max=1.0 if has_next else 0.0).abs()
            weights = TAPERS[window](distance)
        windows.append(weights.float())
    return windows
