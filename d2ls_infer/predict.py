"""The pipeline: scene -> tiles -> scores -> blended rows -> class map."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from d2ls_infer.at_once import Halving
from d2ls_infer.background import Behind, ahead
from d2ls_infer.errors import UsageError
from d2ls_infer.job import (
    Job,
    PredictResult,
    check_not_there,
    choose_batch,
    finished_before,
    prepared,
    provenance,
    run_key,
    run_tag,
)
from d2ls_infer.journal import Journal, journal_path, key_of, remove_journal
from d2ls_infer.options import PredictOptions
from d2ls_infer.outputs import Finished, Outputs
from d2ls_infer.segmenter import Segmenter
from d2ls_infer.store import check_writable, place
from d2ls_infer.tiling import Around, Rows, Tile, blend, rows_sharing_batches
from d2ls_infer.transfers import Beside

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called after each tile with the number of tiles done and of all tiles."""

T = TypeVar("T")

WRITTEN_BEHIND = 4
"""Pieces of finished rows that may wait to be written while the next tiles are scored."""

DEVICE_WRITTEN_BEHIND = 2
"""The same off the CPU, where pieces are larger."""

COMPRESSING = 4
"""Threads that compress a map where the network does not need the cores: one is slower than a network on a GPU."""


def most_waiting(device: torch.device) -> int:
    """Pieces of finished rows made on a device that may wait for a thread beside the network."""
    return WRITTEN_BEHIND if device.type == "cpu" else DEVICE_WRITTEN_BEHIND


def predict_raster(
    model: Segmenter | str | Path,
    source: str | Path,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> PredictResult:
    """Map a raster of any size: a uint8 GeoTIFF of class indices on the raster's own grid, 255 = nodata.

    model: a segmenter, or a name or path for `load_model`. output: a file, or a folder for STEM_d2ls-MODEL.tif; by
    default beside the source. Either may be an address of an object store ("s3://bucket/maps/map.tif"; what does not
    end in .tif is a folder): the files are made here and uploaded when all are whole. options: see `PredictOptions`;
    what else is made of the scene, in the same pass, is among them: `confidence=True`, `vector=".gpkg"`,
    `report="page.html"`. Memory depends on the raster's width, not on its height.

    A run that stops early leaves no half-written output, but a journal of its finished rows beside it. `resume` goes on
    there, and the result is the same to the last byte; files that an earlier run has finished stay as they are. The
    journal of a map on an object store is on the machine that made it, see `d2ls_infer.store.place`. A segmenter
    without `sha256`, which says what it is, has no journal, and its maps are not taken for finished.

    Raises UsageError (also a ValueError) for what makes no sense, OutputExistsError, MissingFileError, OutputBusyError
    while another run makes the same map, RasterError (also an OSError) where reading or writing fails, and StoreError
    (likewise) where an object store does.
    """
    settings = PredictOptions(**options)
    check_whole_rasters(settings)
    if output is not None:
        check_writable(place(output))
    with prepared(model, source, output, settings, overwrite=overwrite or resume, writes=True) as job:
        tags, side_tags = provenance(job, settings), run_tag(job, settings)
        identified = bool(getattr(job.segmenter, "sha256", ""))
        if resume and not overwrite:
            if identified and (found := finished_before(job, settings, tags | side_tags)):
                remove_journal(journal_path(job.output))  # of a run that was killed right after its last file
                return found
            check_not_there(job.output, settings, str(source))
        job.warn(settings)
        if resume and settings.batch_size == "auto" and (before := key_of(job.output)):
            settings = replace(settings, batch_size=before["options"]["batch_size"])  # other batches, other last bits
        settings = replace(settings, batch_size=choose_batch(job, settings))
        log.info(
            "%s: %d x %d pixels, %d tiles, %d at once, on %s",
            source, job.scene.width, job.scene.height, len(job.grid), settings.batch_size, job.device,
        )  # fmt: skip
        with ExitStack() as stack:
            journal = None
            if identified:
                key = run_key(job, settings)
                journal = stack.enter_context(Journal(job.output, key, height=job.scene.height, resume=resume))
            threads = 1 if job.device.type == "cpu" else COMPRESSING
            # Entered before the scene is looked at, which takes a while: whatever ends that leaves nothing half made.
            outputs = stack.enter_context(
                job.outputs(settings, tags, side_tags=side_tags, overwrite=overwrite, threads=threads)
            )
            return map_scene(job.observed(settings), outputs, settings, journal, progress)


def check_whole_rasters(options: PredictOptions) -> None:
    """Raise UsageError where rasters shall stay in pieces, and nobody makes pieces."""
    if options.vrt:
        raise UsageError("--vrt is for work on a cluster, which makes a map in pieces; in Python, give a client too")


def map_scene(
    job: Job, outputs: Outputs, options: PredictOptions, journal: Journal | None, progress: Progress | None
) -> PredictResult:
    """The loop itself."""
    watch = Stopwatch()
    known = journal.rows if journal else 0  # rows that an earlier run has finished

    def write(rows: Rows) -> None:
        with watch("write"):
            if journal and rows.first < known:
                outputs.add(journal.at(rows.first))
                return
            finished = Finished(rows)
            outputs.add(finished)
            if journal:  # it gets arrays: what lies on a device is this thread's alone
                keeper.give(Finished.of(finished.first, finished.values()))

    keep = journal.add if journal else lambda _: None
    with Behind(keep, most_waiting(job.device)) as keeper:
        empty = finish_rows(job, options, write, watch=watch, known=known, seeing=outputs.seeing, progress=progress)
    seconds = {**watch.seconds, "total": watch.total()}
    return job.concluded(outputs, options, skipped=empty, seconds=seconds, known=known)


def finish_rows(
    job: Job,
    options: PredictOptions,
    write: Callable[[Rows], None],
    *,
    watch: Stopwatch,
    first: int = 0,
    last: int | None = None,
    known: int = 0,
    seeing: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    progress: Progress | None = None,
    around: Around | None = None,
) -> int:
    """Hand the scene's finished rows from `first` to `last`, all by default, to `write`, from top to bottom.

    A few rows above and below may come too, and mean nothing, as do those above `known`, which an earlier run has
    finished. The others are the same to the last bit, whichever part they are made in; only tiles that touch the part
    are read. seeing: looks at the tiles as they are read. around: see `blend`.

    Gives how many tiles had no valid pixel: of those that begin in the part, so that each tile counts in one alone.
    """
    view, grid, batch_size = job.view, job.grid, int(options.batch_size or 1)
    last = job.scene.height if last is None else last
    low, high = view.needs(first, last)
    below = view.needs(last, last + 1)[0] if last < job.scene.height else grid.height
    tile_rows = slice(*grid.touching(low, high, rows_sharing_batches(grid, batch_size)))
    starts = grid.row_starts[tile_rows]
    job.scene.counted_rows = slice(first, last)
    empty = 0

    def read() -> Iterator[tuple[Tile, tuple[np.ndarray, np.ndarray]]]:
        nonlocal empty
        # All of it, also what is known: pictures and counts want the pixels, and reading takes little time.
        for tile, (values, valid) in seeing(watch.each("read", view.tiles(grid, tile_rows))):
            empty += low <= tile.row < below and not valid.any()
            yield tile, (values, valid)

    in_parts = Halving(job.segmenter.score)

    def score(batch: Tensor) -> Tensor:
        with watch("score"):
            return in_parts(batch)

    beside = Beside(job.device)

    def write_handed(handed: Any) -> None:
        with beside.taking(handed) as rows:
            write(rows)

    # Closed before the scene is, whatever happens: what reads ahead reads it.
    with closing(ahead(read(), batch_size + 1)) as tiles, Behind(write_handed, most_waiting(job.device)) as writer:
        blended = blend(
            score,
            counted(tiles, len(starts) * len(grid.col_starts), progress),
            grid,
            channels=len(job.segmenter.labels),
            window=options.blend,
            batch_size=batch_size,
            device=job.device,
            disagreement=options.disagreement,
            first_row=view.needs(max(first, known), last)[0],
            around=around,
        )
        read_rows = rows_above(starts[-1] + grid.tile_height, blended)
        for rows in view.restored(read_rows, first_row=max(first, known)):
            if rows.first >= last:
                break
            if rows.first + len(rows.covered) > first:
                writer.give(beside.hand(rows))
    return empty


def rows_above(row: int, parts: Iterable[Rows]) -> Iterator[Rows]:
    """The finished rows above a row of the field."""
    for part in parts:
        if part.first >= row:
            return
        kept = slice(0, row - part.first)
        told = part.disagreement
        yield Rows(part.first, part.scores[:, kept], part.covered[kept], None if told is None else told[kept])


class Stopwatch:
    """Seconds by stage, each of which is one thread's, and in all since it was made; stages go on side by side."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: Counter[str] = Counter(read=0, score=0, write=0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time inside a `with` block."""
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started  # type: ignore[assignment]

    def each(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """Count the time that the items take to come."""
        iterator = iter(items)
        while True:
            with self(stage):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def total(self) -> float:
        return time.perf_counter() - self.started


def counted(items: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    """The items, with word to `progress` after each is dealt with."""
    for index, item in enumerate(items):
        yield item
        if progress is not None:
            progress(index + 1, total)
