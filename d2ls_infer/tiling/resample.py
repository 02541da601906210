"""Fields brought onto a finer or coarser grid over the same ground, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2ls_infer.tiling.blend import Rows

CHUNK_BYTES = 8 << 20
"""What a piece of a field may take in memory while it is resampled, in float32."""

LEAST_SHARE = 1e-6
"""Shares of a pixel below this are the rounding of its edges and count as none."""


@dataclass(frozen=True)
class Taps:
    """Which places of one axis make each place of another over the same length.

    first, last: (n_out,) int64, the first and last place that is needed, both ascending. index: (n_out, taps) int64;
    weight: (n_out, taps) float32, together 1 along each row.
    """

    first: np.ndarray
    last: np.ndarray
    index: Tensor
    weight: Tensor

    @classmethod
    def of(cls, n_in: int, n_out: int, device: torch.device | str = "cpu") -> Taps:
        """Onto fewer places: the mean over each new place, as a coarser sensor would see it. Onto more: linear between
        the centres, constant beyond the outermost. Onto as many: the same.
        """
        step = n_in / n_out
        place = np.arange(n_out)[:, None]
        if n_out > n_in:
            centre = np.clip((place + 0.5) * step - 0.5, 0, n_in - 1)
            index = np.floor(centre).astype(np.int64) + np.arange(2)
            weight = 1 - np.abs(centre - index)
        else:
            index = np.floor(place * step).astype(np.int64) + np.arange(int(np.ceil(step)) + 1)
            weight = np.minimum((place + 1) * step, index + 1) - np.maximum(place * step, index)
        weight = np.where((weight < LEAST_SHARE) | (index >= n_in), 0, weight)
        weight /= weight.sum(1, keepdims=True)
        used = weight > 0
        first = np.where(used, index, n_in).min(1)
        last = np.where(used, index, -1).max(1)
        index = np.clip(index, first[:, None], last[:, None])  # what has no weight is not to be read either
        kept = used.any(0)
        return cls(
            first,
            last,
            torch.from_numpy(index[:, kept]).to(device),
            torch.from_numpy(weight[:, kept].astype(np.float32)).to(device),
        )

    def __call__(self, values: Tensor, dim: int, start: int, stop: int, origin: int = 0) -> Tensor:
        """The places `start` to `stop` of values whose place 0 along `dim` is `origin` of the whole axis."""
        shape = [1] * values.dim()
        shape[dim] = -1
        index, weight = self.index[start:stop] - origin, self.weight[start:stop]
        total = values.index_select(dim, index[:, 0]) * weight[:, 0].view(shape)
        for tap in range(1, index.shape[1]):
            total.addcmul_(values.index_select(dim, index[:, tap]), weight[:, tap].view(shape))
        return total


class Resampler:
    """Fields of `shape` (rows, columns) -> fields of `out_shape` over the same ground.

    A mean counts valid pixels only, and a new pixel is valid where any pixel that it is made of is. So a constant field
    stays constant up to its holes, and each valid pixel lies in a valid one. What comes out for a row does not depend
    on how many rows are asked for at once.
    """

    def __init__(self, shape: tuple[int, int], out_shape: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.shape, self.out_shape = shape, out_shape
        self.row_taps, self.col_taps = (Taps.of(n, m, device) for n, m in zip(shape, out_shape, strict=True))

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The rows (first, one after the last) that the new rows `start` to `stop` are made of."""
        return int(self.row_taps.first[start]), int(self.row_taps.last[stop - 1]) + 1

    def ready(self, rows: int) -> int:
        """How many new rows, from the top, the first `rows` rows suffice for."""
        return int(np.searchsorted(self.row_taps.last, rows))

    def rows_at_once(self, channels: int) -> int:
        """How many new rows to make at a time, so that neither they nor what they are made of take much memory."""
        (height, width), (out_height, out_width) = self.shape, self.out_shape
        widest = max(out_width, width * max(1.0, height / out_height))  # pixels that a new row needs or is
        return max(1, int(CHUNK_BYTES / (4 * (channels + 1) * widest)))

    def __call__(self, values: Tensor, valid: Tensor, start: int, stop: int, origin: int) -> tuple[Tensor, Tensor]:
        """values (C, rows, width) and valid (rows, width) bool, of which row 0 is row `origin` of the whole field ->
        the new rows `start` to `stop`: (C, stop - start, out_width) float32, 0 where invalid, and which are valid.
        """
        weight = valid[None].float()
        field = torch.cat([torch.where(valid, values.float(), 0), weight])  # (C + 1, rows, width)
        field = self.row_taps(field, 1, start, stop, origin)
        field = self.col_taps(field, 2, 0, self.out_shape[1])
        covered = field[-1] > 0
        return field[:-1] / torch.where(covered, field[-1], 1), covered


def resample_rows(parts: Iterable[Rows], shape: tuple[int, int], out_shape: tuple[int, int]) -> Iterator[Rows]:
    """Finished rows of a field of `shape`, from top to bottom -> the same of the field resampled to `out_shape`.

    What the rows tell of disagreement is resampled likewise. The rows come in small parts; of the incoming ones no more
    is kept than a later row needs. Where those of a part of the field come, the rows begin with the first one that is
    made of them alone.
    """
    resampler: Resampler | None = None
    done = 0
    for part in parts:
        told = part.scores if part.disagreement is None else torch.cat([part.scores, part.disagreement[None]])
        if resampler is None:
            resampler = Resampler(shape, out_shape, told.device)
            first, fields, covered = part.first, told, part.covered
            done = int(np.searchsorted(resampler.row_taps.first, first))
        else:
            fields, covered = torch.cat([fields, told], 1), torch.cat([covered, part.covered])
        ready = resampler.ready(first + len(covered))
        while done < ready:
            stop = min(ready, done + resampler.rows_at_once(len(fields)))
            low, high = (row - first for row in resampler.needs(done, stop))
            made, known = resampler(fields[:, low:high], covered[low:high], done, stop, first + low)
            yield Rows(done, made, known) if part.disagreement is None else Rows(done, made[:-1], known, made[-1])
            done = stop
        if done < out_shape[0]:
            unneeded = min(resampler.needs(done, done + 1)[0] - first, len(covered))
            first, fields, covered = first + unneeded, fields[:, unneeded:].clone(), covered[unneeded:].clone()
