"""A scene as a model sees it that was trained at another ground sampling distance."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from d2ls_infer.errors import UsageError
from d2ls_infer.raster.scene import ALL, Pixels, Scene, read_tiles
from d2ls_infer.tiling import Resampler, Rows, Tile, TileGrid, resample_rows

MOST_MAGNIFIED = 16
"""Pixels are made at most that many times finer: there is nothing in them, and there are the square of it to score."""


class ResampledScene:
    """A scene read as if its pixels were of another size on the ground, and back.

    The finer or coarser grid covers the same ground, and is made in the scene's own rows and columns: nothing is
    rotated or projected. Pixels that become coarser are averaged, as a coarser sensor would do it; finer ones are
    interpolated. Scores, not classes, are brought back the same way, and the best class is chosen on the scene's own
    grid: so an edge lies where the probabilities cross, not on the steps of the coarser grid.

    Laws: the map has the scene's grid, and is nodata exactly where the scene is. In memory there is one band of rows of
    either grid; of the scene's own a bit per pixel, and a piece of a few megabytes at a time.
    """

    def __init__(self, scene: Scene, gsd_m: float) -> None:
        size_m = scene.pixel_size_m()
        if size_m is None:
            raise UsageError(f"the pixels of {scene.path} have no known size on the ground; leave out --gsd")
        if max(size_m) > MOST_MAGNIFIED * gsd_m:
            raise UsageError(
                f"{scene.path} has pixels of {max(size_m):.3g} m, which are magnified at most {MOST_MAGNIFIED} times, "
                f"not to {gsd_m:.3g} m; try --gsd {max(size_m) / MOST_MAGNIFIED:.2g} or more"
            )
        self.scene = scene
        self.magnified = size_m[0] / gsd_m, size_m[1] / gsd_m  # how many new rows and columns become of one
        self.height, self.width = (
            max(1, round(side * factor))
            for side, factor in zip((scene.height, scene.width), self.magnified, strict=True)
        )
        self.sampler = Resampler((scene.height, scene.width), (self.height, self.width))
        self.valid: deque[tuple[int, np.ndarray]] = deque()  # of the scene's rows: which, and as bits what is valid
        self.read_to = 0

    def tiles(self, grid: TileGrid, tile_rows: slice = ALL) -> Iterator[tuple[Tile, Pixels]]:
        """The pixels of each tile of the grid, or of some rows of tiles, row by row, float32."""
        return read_tiles(self.rows, grid, bands=len(self.scene.bands), dtype=np.float32, tile_rows=tile_rows)

    def rows(self, start: int, stop: int) -> Pixels:
        """Rows `start` to `stop` of the resampled scene; each call begins where the last one ended."""
        step = self.sampler.rows_at_once(len(self.scene.bands))
        pieces = [self.piece(row, min(row + step, stop)) for row in range(start, stop, step)]
        return Pixels(np.concatenate([p.values for p in pieces], 1), np.concatenate([p.valid for p in pieces]))

    def piece(self, start: int, stop: int) -> Pixels:
        """A few rows. What is invalid holds what it does in the scene."""
        first, last = self.sampler.needs(start, stop)
        values, valid = self.scene.rows(first, last)
        self.valid.extend((row, np.packbits(valid[row - first])) for row in range(max(first, self.read_to), last))
        self.read_to = max(last, self.read_to)
        made, known = self.sampler(torch.from_numpy(values), torch.from_numpy(valid), start, stop, first)
        return Pixels(torch.where(known, made, self.scene.fill).numpy(), known.numpy())

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The rows (first, one after the last) of the resampled grid that these rows of the scene are made of."""
        back = Resampler((self.height, self.width), (self.scene.height, self.scene.width))
        return back.needs(start, stop) if start < stop else (self.height, self.height)

    def restored(self, rows: Iterable[Rows], *, first_row: int = 0) -> Iterator[Rows]:
        """Finished rows of a field on the resampled grid -> on the scene's own, covered where the scene is valid.

        first_row: of the scene; the rows above come too, but need not mean anything.
        """
        for part in resample_rows(rows, (self.height, self.width), (self.scene.height, self.scene.width)):
            valid = []
            while self.valid[0][0] < part.first:  # of a part of the scene: read for rows that are not made of it alone
                self.valid.popleft()
            for row in range(part.first, part.first + len(part.covered)):
                place, bits = self.valid.popleft()
                assert place == row, (place, row)
                valid.append(np.unpackbits(bits, count=self.scene.width))
            covered = torch.from_numpy(np.stack(valid).astype(bool)).to(part.covered.device)
            known = part.first < first_row or bool((part.covered | ~covered).all())
            assert known, "a valid pixel that no tile covers"
            yield part._replace(covered=covered)
